"""Pretraining: pseudo-gradients, averaged, drive an outer optimiser (DiLoCo, arXiv 2311.08105).

Each peer sends delta = theta - x after its inner steps; `peer/train/outer.py` has what the weighted
mean of deltas does to theta.

Shapes: N = all parameters (tied ones once), U = values of one unit.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from peer.manifest import OuterSpec
from peer.train.flat import WHOLE, FlatMethod, Streaming, UnitCoder, sound
from peer.train.inner import save_model
from peer.train.local import Float32, LocalValues
from peer.train.method import ArrayMap, Reducer
from peer.train.mixing import UnitMixer
from peer.train.mixtable import MixTable
from peer.train.outer import DelayedNesterov, Nesterov, Outer
from tensorcodecs import CHUNK_VALUES, Codec, Reduced, codec_of, get_codec, reduce_unit
from tensorcodecs.feedback import decay_of, encode_with_feedback
from tensorcodecs.frame import Frame

MEAN_CODEC: Final = "q4"
"""For the means of contributions that are coded with error feedback."""

SNR_DB: Final = (16.5, 5.5)
"""Of contributions: that of `q4` is wished for, and `min` still trains (docs/results/parity.md)."""


class MeanReducer:
    """Reducer: the weighted mean of each unit, coded like the contributions."""

    def __init__(self, sizes: Sequence[int], codec: Codec) -> None:
        """`sizes`: values in each unit."""
        self._sizes = tuple(sizes)
        self._codec = codec

    def check(self, unit: int, payload: bytes) -> None:
        """See `Reducer.check`."""
        Frame.parse(payload, codec_of(payload).codec_id, self._sizes[unit])

    def reduce(self, unit: int, parts: Sequence[tuple[float, bytes]]) -> Reduced:
        """See `Reducer.reduce`."""
        return reduce_unit(parts, self._sizes[unit], self._codec)

    def check_sum(self, unit: int, payload: bytes) -> None:
        """See `SummingReducer.check_sum`."""
        self.check(unit, payload)


class PretrainMethod(FlatMethod):
    """Trains all parameters. Memory beside `Inner`'s: 12 bytes per parameter on the CPU."""

    def __init__(
        self, inner: LocalValues, outer: OuterSpec, codec: Codec, *, adaptive: bool = False,
        mixing: bool = False, streaming: Streaming = WHOLE,
    ) -> None:  # fmt: skip
        """`adaptive`: each link may code contributions otherwise, as its bandwidth allows.
        `mixing`: the state remembers mixes with other groups."""
        layout = inner.layout
        largest = max(layout.unit_sizes(), default=0)
        if outer.asynchronous:
            self._optimizer: Outer = DelayedNesterov(
                layout.numel, layout.units, largest, outer.lr, outer.momentum, outer.delay
            )
        else:
            self._optimizer = Nesterov(layout.numel, largest, outer.lr, outer.momentum)
        super().__init__(
            inner, layout.units, self._optimizer.arrays, staleness=outer.staleness,
            streaming=streaming,
        )  # fmt: skip
        self._codec = codec
        self._snr_db = SNR_DB if adaptive else None
        self._decay = decay_of(codec.name)
        # What needs feedback can't code means: there is nobody to keep their residual.
        self._mean_codec = codec if self._decay is None else get_codec(MEAN_CODEC)
        kept = inner.layout.numel if self._decay is not None else 0
        self._residual_N = np.zeros(kept, np.float32)
        self._next_residual = (0, self._residual_N)
        """Of the last contribution's values: the first of them, and what the codec left out."""
        self._mean = np.empty(CHUNK_VALUES, np.float32)
        self.mixes = MixTable(self.units) if mixing else None
        # Without momentum what the optimiser remembers moves nothing: only parameters are mixed.
        mixed = len(self._vectors()) if outer.momentum else 1
        self._mixer = UnitMixer(layout.unit_sizes(), mixed, self._mean_codec)

    def reducer(self) -> Reducer:
        return MeanReducer(self.inner.layout.unit_sizes(), self._mean_codec)

    def mixer(self) -> UnitMixer:
        return self._mixer

    def export(self, folder: str) -> None:
        with self.outer_model() as model:
            save_model(model, Path(folder))

    def _slice(self, unit: int) -> slice:
        return self.inner.layout.unit_slice(unit)

    def _freeze(self, units: range, where: slice, x_F: Float32) -> tuple[Float32, UnitCoder]:
        delta_F = np.subtract(self._theta_N[where], x_F, out=x_F)
        first = units.start

        if self._decay is not None and sound(delta_F):
            frames, left_F = encode_with_feedback(
                self._codec, delta_F, self._residual_N[where], self._decay
            )
            self._next_residual = (where.start, left_F)
            return delta_F, lambda start, stop, _: frames[start - first : stop - first]

        def encode(start: int, stop: int, codec: str | None) -> list[bytes]:
            chosen = self._codec if codec is None else get_codec(codec)
            a, b = (start - first) * CHUNK_VALUES, (stop - first) * CHUNK_VALUES
            return chosen.encode_many(delta_F[a:b])

        return delta_F, encode

    def _included(self, where: slice) -> None:
        # What did not arrive is part of the next difference anyway: there the old residual counts.
        if self._decay is not None:
            first, left_F = self._next_residual
            self._residual_N[where] = left_F[where.start - first : where.stop - first]

    def _reset(self) -> None:
        super()._reset()
        self._residual_N[:] = 0

    def inner_state(self) -> ArrayMap:
        residual = {"residual": self._residual_N.copy()} if self._decay is not None else {}
        return {**super().inner_state(), **residual}

    def load_inner_state(self, arrays: Mapping[str, npt.NDArray[Any]]) -> None:
        super().load_inner_state(arrays)
        kept = arrays.get("residual")
        if kept is not None and kept.shape == self._residual_N.shape and sound(kept):
            self._residual_N[:] = kept

    def _outer_step(self, unit: int, payload: bytes) -> None:
        where = self._slice(unit)
        size = where.stop - where.start
        mean_U = self._mean[:size]
        codec_of(payload).decode_into(payload, mean_U)
        self._optimizer.step(unit, where, self._theta_N[where], mean_U)
