"""The weighted mean of coded units.

Per unit: acc = sum of weight * values, total = sum of weights, mean = acc / total, coded again.
`reduce_unit` takes one unit's contributions together, in an order that the caller fixes, so that
anybody who has them can compute the same bytes; it keeps one unit's accumulator, which stays in
the core's cache, and never a decoded copy of the whole. `WeightedMean` folds in what arrives when
it arrives; the same order gives the same bytes there too.
"""

from __future__ import annotations

import threading
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final, Self

import numpy as np

from tensorcodecs.codec import codec_of
from tensorcodecs.errors import DecodeError
from tensorcodecs.frame import VALUE_ABS_MAX
from tensorcodecs.layout import CHUNK_VALUES

if TYPE_CHECKING:
    from collections.abc import Sequence

    from tensorcodecs.codec import Codec
    from tensorcodecs.frame import Float32, Payload
    from tensorcodecs.layout import Layout

WEIGHT_MIN: Final = 2.0**-16
WEIGHT_MAX: Final = 2.0**40
"""A weight is in tokens, perhaps damped for age. With values up to 2**70 (see `VALUE_ABS_MAX`) it
takes 2**17 contributions of the largest weight to overflow an accumulator."""


@dataclass(frozen=True, slots=True)
class Reduced:
    """One unit's coded mean."""

    payload: bytes
    """b"" if nothing was in it."""
    refused: tuple[tuple[int, str], ...]
    """(index, what is wrong) of contributions that are no frames of this unit; left out."""


class _Scratch(threading.local):
    def __init__(self) -> None:
        self.sums: Float32 = np.empty(CHUNK_VALUES, np.float32)


_scratch: Final = _Scratch()


def reduce_unit(parts: Sequence[tuple[float, Payload]], numel: int, codec: Codec) -> Reduced:
    """The mean of (weight, frame) pairs, folded in this order, coded with `codec`.

    The frames may be of any codec. The same parts give the same bytes on every machine.

    Raises:
        ValueError: a weight outside WEIGHT_MIN..WEIGHT_MAX, or more than CHUNK_VALUES values.
    """
    if numel > CHUNK_VALUES:
        raise ValueError(f"{numel} values; a unit has at most {CHUNK_VALUES}")
    sum_N = _scratch.sums[:numel]
    sum_N.fill(0)
    total = 0.0
    refused = []
    for index, (weight, payload) in enumerate(parts):
        _check_weight(weight)
        try:
            codec_of(payload).accumulate(payload, weight, sum_N)
        except DecodeError as error:
            refused.append((index, str(error)))
        else:
            total += weight
    if total == 0:
        return Reduced(b"", tuple(refused))
    return Reduced(_coded_mean(sum_N, total, codec), tuple(refused))


def _check_weight(weight: float) -> None:
    if not WEIGHT_MIN <= weight <= WEIGHT_MAX:  # NaN is not
        raise ValueError(f"weight {weight} is outside {WEIGHT_MIN}..{WEIGHT_MAX}")


def _coded_mean(sum_N: Float32, total: float, codec: Codec) -> bytes:
    """Overwrites `sum_N` with the mean."""
    np.multiply(sum_N, np.float32(1 / total), out=sum_N)
    # A hostile frame may carry more than what we would send; the mean must stay sendable.
    np.clip(sum_N, -VALUE_ABS_MAX, VALUE_ABS_MAX, out=sum_N)
    return codec.encode(sum_N)


class WeightedMean:
    """Means of the units first..first+len(sizes)-1, coded with `codec` on both sides.

    Memory: 4 bytes per value of the units that something was folded into.
    """

    def __init__(self, sizes: Sequence[int], codec: Codec, *, first: int = 0) -> None:
        self._sizes = tuple(sizes)
        self._codec = codec
        self._first = first
        self._sums: list[Float32 | None] = [None] * len(self._sizes)
        self._totals = [0.0] * len(self._sizes)

    @classmethod
    def of_span(cls, layout: Layout, start: int, stop: int, codec: Codec) -> Self:
        """For units start..stop-1 of `layout`; `fold` takes the layout's own unit numbers."""
        return cls(layout.unit_sizes(start, stop), codec, first=start)

    @property
    def totals(self) -> tuple[float, ...]:
        """The sum of the weights folded into each unit; 0 where there is nothing."""
        return tuple(self._totals)

    def fold(self, unit: int, weight: float, payload: Payload) -> None:
        """Fold one coded unit in. On an error nothing of it is kept.

        Raises:
            DecodeError: `payload` is not an intact frame of that unit's size.
            ValueError: the unit is outside the span, or the weight outside WEIGHT_MIN..WEIGHT_MAX.
        """
        index = unit - self._first
        if not 0 <= index < len(self._sizes):
            last = self._first + len(self._sizes) - 1
            raise ValueError(f"unit {unit} is outside the span {self._first}..{last}")
        _check_weight(weight)
        total = self._sums[index]
        if total is None:
            total = np.zeros(self._sizes[index], np.float32)
        self._codec.accumulate(payload, weight, total)
        self._sums[index] = total
        self._totals[index] += weight

    def finish(self) -> list[bytes]:
        """The coded mean of each unit in order, b"" where nothing was folded.

        Empties the reducer: its memory is given back unit by unit.
        """
        coded = []
        for index, total in enumerate(self._sums):
            if total is None:
                coded.append(b"")
                continue
            coded.append(_coded_mean(total, self._totals[index], self._codec))
            self._sums[index] = None
            self._totals[index] = 0.0
        return coded
