"""Pretraining: pseudo-gradients, averaged, drive an outer Nesterov step (DiLoCo, arXiv 2311.08105).

Each peer sends delta = theta - x after its inner steps. With D the weighted mean of deltas:

    m     <- beta m + D
    theta <- theta - eta (D + beta m)

in float32 with separate NumPy multiplications and additions, unit by unit: the same bits on every
machine, since IEEE 754 fixes each of them and nothing is fused.

Shapes: N = all parameters (tied ones once), U = values of one unit.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from peer.manifest import OuterSpec
from peer.train.flat import FlatMethod, UnitCoder
from peer.train.inner import Float32, Inner, save_model
from peer.train.method import Reducer
from tensorcodecs import CHUNK_VALUES, Codec, Reduced, codec_of, reduce_unit
from tensorcodecs.frame import Frame


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


class PretrainMethod(FlatMethod):
    """Trains all parameters. Memory beside `Inner`'s: 12 bytes per parameter on the CPU."""

    def __init__(self, inner: Inner, outer: OuterSpec, codec: Codec) -> None:
        self._momentum_N = np.zeros(inner.layout.numel, np.float32)
        super().__init__(inner, inner.layout.units, {"momentum": self._momentum_N})
        self._lr = np.float32(outer.lr)
        self._beta = np.float32(outer.momentum)
        self._codec = codec
        self._mean = np.empty(CHUNK_VALUES, np.float32)
        self._look = np.empty(CHUNK_VALUES, np.float32)

    def reducer(self) -> Reducer:
        return MeanReducer(self.inner.layout.unit_sizes(), self._codec)

    def export(self, folder: str) -> None:
        with self.outer_model() as model:
            save_model(model, Path(folder))

    def _slice(self, unit: int) -> slice:
        return self.inner.layout.unit_slice(unit)

    def _freeze(self, x_N: Float32) -> tuple[Float32, UnitCoder]:
        delta_N = np.subtract(self._theta_N, x_N, out=x_N)

        def encode(start: int, stop: int) -> list[bytes]:
            return self._codec.encode_many(delta_N[start * CHUNK_VALUES : stop * CHUNK_VALUES])

        return delta_N, encode

    def _outer_step(self, unit: int, payload: bytes) -> None:
        where = self._slice(unit)
        size = where.stop - where.start
        mean_U, look_U = self._mean[:size], self._look[:size]
        self._codec.decode_into(payload, mean_U)
        theta_U, m_U = self._theta_N[where], self._momentum_N[where]
        np.multiply(m_U, self._beta, out=m_U)
        np.add(m_U, mean_U, out=m_U)
        np.multiply(m_U, self._beta, out=look_U)
        np.add(look_U, mean_U, out=look_U)
        np.multiply(look_U, self._lr, out=look_U)
        np.subtract(theta_U, look_U, out=theta_U)
