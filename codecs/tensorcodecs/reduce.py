"""The weighted mean of coded units, folded in as they arrive.

Per unit: acc = sum of weight * values, total = sum of weights, mean = acc / total. Units arrive
independently, so each has its own contributors and total. What is folded in the same order gives
the same bytes.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final, Self

import numpy as np

from tensorcodecs.frame import VALUE_ABS_MAX

if TYPE_CHECKING:
    from collections.abc import Sequence

    from tensorcodecs.codec import Codec
    from tensorcodecs.frame import Float32, Payload
    from tensorcodecs.layout import Layout

WEIGHT_MIN: Final = 2.0**-16
WEIGHT_MAX: Final = 2.0**40
"""A weight is in tokens, perhaps damped for age. With values below 2**65 (see `VALUE_ABS_MAX`) it
takes 2**22 contributions of the largest weight to overflow an accumulator."""


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
        if not WEIGHT_MIN <= weight <= WEIGHT_MAX:  # NaN is not
            raise ValueError(f"weight {weight} is outside {WEIGHT_MIN}..{WEIGHT_MAX}")
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
            np.multiply(total, np.float32(1 / self._totals[index]), out=total)
            # A hostile frame may carry up to twice what we would send; the mean must stay sendable.
            np.clip(total, -VALUE_ABS_MAX, VALUE_ABS_MAX, out=total)
            coded.append(self._codec.encode(total))
            self._sums[index] = None
            self._totals[index] = 0.0
        return coded
