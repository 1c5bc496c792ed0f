"""A method and data small enough for hundreds of rounds a second: least squares in NumPy."""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from peer.state_chunks import StateGrid
from peer.train.composite import split
from peer.train.method import ArrayMap, Contribution, Reducer, StepResult
from peer.train.mixing import UnitMixer, add_mix
from peer.train.mixtable import MixTable
from peer.train.pretrain import MeanReducer
from protocols.fragments import Fragments
from tensorcodecs import CHUNK_VALUES, get_codec

CODEC = get_codec("high")


class ToyContribution:
    """A frozen difference vector."""

    def __init__(
        self,
        delta: npt.NDArray[np.float32],
        weight: float,
        snr_db: tuple[float, float] | None = None,
    ) -> None:
        self.weight = weight
        self.snr_db = snr_db
        self._delta = delta

    def encode(self, start: int, stop: int, codec: str | None = None) -> list[bytes]:
        chosen = CODEC if codec is None else get_codec(codec)
        return chosen.encode_many(self._delta[start * CHUNK_VALUES : stop * CHUNK_VALUES])


class ToyMethod:
    """Moves a vector towards a target; every peer's target is a little off in its own way."""

    snr_db: tuple[float, float] | None = None
    carries = True
    idle = False
    refusal = ""

    def __init__(self, size: int, seed: int, step_s: float = 0.002, fragments: int = 1) -> None:
        self.units = -(-size // CHUNK_VALUES)
        self.fragments = Fragments.cut([1] * self.units, fragments)
        self._theta_N = np.zeros(size, np.float32)
        self._x_N = self._theta_N.copy()
        self._pending_N = np.zeros(size, np.float32)
        rng = np.random.default_rng(seed)
        common = np.random.default_rng(0).normal(size=size).astype(np.float32)
        self._target_N = common + rng.normal(size=size).astype(np.float32)
        self._common_N = common
        self._tokens = 0
        self._step_s = step_s
        self._table = MixTable(self.units)
        self.mixes: MixTable | None = self._table
        left = range(size, 0, -CHUNK_VALUES)
        self._sizes = [min(CHUNK_VALUES, rest) for rest in left]
        self._mixer = UnitMixer(self._sizes, 1, CODEC)

    def step(self, batch: torch.Tensor) -> StepResult:
        time.sleep(self._step_s)  # a step's work, so that rounds hold a bounded number of them
        gap_N = self._target_N - self._x_N
        self._x_N += np.float32(0.01) * gap_N
        self._tokens += 10
        return StepResult(float(np.mean(gap_N**2)), 10)

    def owes(self) -> bool:
        return False

    def contribution(self, units: range) -> Contribution:
        self._pending_N = self._theta_N - self._x_N
        weight, self._tokens = float(self._tokens), 0
        return ToyContribution(self._pending_N.copy(), weight, self.snr_db)

    def apply(self, outcome: Sequence[bytes], mine: npt.NDArray[np.bool_], first: int = 0) -> None:
        for unit, payload in enumerate(outcome, first):
            if not payload:
                continue
            where = slice(unit * CHUNK_VALUES, (unit + 1) * CHUNK_VALUES)
            coded, mixes = split(payload)
            if coded:
                mean = np.zeros_like(self._theta_N[where])
                CODEC.decode_into(coded, mean)
                self._theta_N[where] -= mean
                self._x_N[where] -= mean
                if mine[unit - first]:
                    self._x_N[where] += self._pending_N[where]
            for mix in mixes:
                if self._table.admits(unit, mix.id, mix.until, mix.sign):
                    d_VU = self._mixer.decode(unit, mix.payload)
                    add_mix([self._theta_N[where]], d_VU, mix.sign)
                    add_mix([self._x_N[where]], d_VU, mix.sign)
                    self._table.add(unit, mix.id, mix.until, mix.sign)

    def reducer(self) -> Reducer:
        return MeanReducer(self._sizes, CODEC)

    def mixer(self) -> UnitMixer:
        return self._mixer

    def outer(self, start: int, stop: int) -> list[npt.NDArray[np.float32]]:
        cuts = [unit * CHUNK_VALUES for unit in range(start, stop)]
        return [self._theta_N[None, at : at + CHUNK_VALUES].copy() for at in cuts]

    def state(self) -> ArrayMap:
        return {"theta": self._theta_N.copy(), "mixes": self._table.array.copy()}

    def load_state(self, arrays: Mapping[str, npt.NDArray[Any]]) -> None:
        if arrays["theta"].shape != self._theta_N.shape:
            raise ValueError("another shape")
        self._theta_N[:] = arrays["theta"]
        self._table.load(arrays["mixes"])
        self._x_N[:] = self._theta_N

    def reconcile(self, arrays: Mapping[str, npt.NDArray[Any]], tokens: float, rounds: int) -> None:
        if arrays["theta"].shape != self._theta_N.shape:
            raise ValueError("another shape")
        self._theta_N[:] = arrays["theta"]

    @property
    def grid(self) -> StateGrid:
        return StateGrid({"theta": self._theta_N, "mixes": self._table.array})

    def digest(self) -> bytes:
        arrays: ArrayMap = {"theta": self._theta_N, "mixes": self._table.array}
        return self.grid.digest(self.grid.leaves(arrays))

    def inner_state(self) -> ArrayMap:
        return {}

    def load_inner_state(self, arrays: Mapping[str, npt.NDArray[Any]]) -> None:
        pass

    def evaluate(self, batches: Iterable[torch.Tensor]) -> float:
        return float(np.mean((self._theta_N - self._common_N) ** 2))

    def export(self, folder: str) -> None:
        raise ValueError("a toy is no transformers model")


class ToyData:
    """Blocks of one sample each."""

    blocks = 256

    def block(self, index: int, epoch: int) -> list[torch.Tensor]:
        return [torch.tensor([index, epoch])] * 8

    def validation(self) -> list[torch.Tensor]:
        return [torch.tensor([0, 0])]
