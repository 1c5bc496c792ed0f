"""What pretraining and LoRA share: an outer state that rounds move, and local work on top of it.

The outer state theta (N,) is the same on every peer. The local values x (N,) run ahead of it by
inner steps. At a contribution the difference `pending` = theta - x is frozen; training goes on.
When the round's outcome has moved theta, x moves along:

    x += (theta_new - theta_old) + pending      where the outcome contains our contribution
    x += (theta_new - theta_old)                elsewhere: the work stays in x, and so in the next

so no work is lost and none counts twice, whatever arrives, late or in part. Another half's state,
after a partition, is taken the same way: theta becomes theirs, x stays, and the difference between
the two halves is the next contribution's (`reconcile`).

With fragments (Streaming DiLoCo, arXiv 2501.18512) all this happens to a round's units alone, and
`pending` is what they changed since their last turn. Two more of its options concern x only, and
so need no agreement: x moves along once at least tau inner steps were made since the freeze, and
then becomes alpha of what it was and 1 - alpha of what it would be. (What alpha keeps of the local
values is sent again, so with alpha some work counts more than once.)
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Final

import numpy as np
import numpy.typing as npt
import torch

from peer.errors import ManifestError
from peer.state_chunks import ChunkHashes, StateGrid
from peer.train.composite import Mix, split
from peer.train.local import Float32, LocalValues
from peer.train.method import ArrayMap, Reducer, StepResult
from peer.train.mixing import UnitMixer, add_mix
from peer.train.mixtable import MixTable
from peer.train.owed import Owed
from protocols.fragments import Fragments
from tensorcodecs import VALUE_ABS_MAX, DecodeError

MIXES: Final = "mixes"
"""What the state calls the table of mixes."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Streaming:
    """Streaming DiLoCo's options; see the module."""

    fragments: int = 1
    tau: int = 0
    """Inner steps."""
    alpha: float = 0.0


WHOLE: Final = Streaming()

UnitCoder = Callable[[int, int, str | None], list[bytes]]
"""The coded bytes of units start..stop-1, in the codec of that name or the method's own."""


@dataclass(frozen=True, slots=True)
class FrozenWork:
    """A contribution: what `unit_bytes` codes, which nothing changes any more."""

    weight: float
    unit_bytes: UnitCoder
    snr_db: tuple[float, float] | None = None

    def encode(self, start: int, stop: int, codec: str | None = None) -> list[bytes]:
        return self.unit_bytes(start, stop, codec)


@dataclass(slots=True)
class _Pending:
    """The frozen difference of the last contribution, and where it has been counted."""

    units: range
    start: int
    """The first of the units' values in theta."""
    delta: Float32
    """Theirs only."""
    counted: npt.NDArray[np.bool_] = field(repr=False)
    """Of all units."""

    def of(self, where: slice) -> Float32:
        """The difference of a unit whose values in theta are at `where`."""
        return self.delta[where.start - self.start : where.stop - self.start]


class FlatMethod(ABC):
    """A `Method` whose outer state is flat vectors; see the module's text for the arithmetic."""

    units: int
    refused_units = 0
    """Units of outcomes that could not be decoded and so changed nothing, on any peer alike."""
    mixes: MixTable | None = None
    """See `Method`; one that mixes sets it, and overrides `mixer`."""
    dropped_work = 0
    """Contributions dropped because they were not finite."""
    carries = True
    idle = False
    refusal = ""

    def __init__(
        self,
        inner: LocalValues,
        units: int,
        others: Mapping[str, Float32],
        *,
        staleness: float = 0.0,
        streaming: Streaming = WHOLE,
    ) -> None:
        """`others`: parts of the outer state besides theta. `staleness`: see `Owed`.

        Raises:
            ManifestError: more fragments than units.
        """
        self.inner = inner
        self.units = units
        self._theta_N = inner.to_numpy()
        self._outer: dict[str, Float32] = {self._main: self._theta_N, **others}
        sizes = [where.stop - where.start for where in map(self._slice, range(units))]
        check_fragments(streaming.fragments, units)
        self.fragments = Fragments.cut(sizes, streaming.fragments)
        self._streaming = streaming
        self._grid: StateGrid | None = None  # made when all of the state is there
        self._hashes: ChunkHashes | None = None
        self._owed = Owed(sizes, staleness, streaming.fragments)
        self._pending: _Pending | None = None
        self._ahead = 0
        """Inner steps since the last contribution was frozen."""
        self._due: list[tuple[slice, Float32]] = []
        """By what x has yet to move along, once tau steps were made."""

    _main = "theta"
    """What the state calls theta."""

    _snr_db: tuple[float, float] | None = None
    """See `Contribution.snr_db`."""

    def _included(self, where: slice) -> None:  # noqa: B027  (most need not know)
        """The last contribution's part of theta[where] is in the swarm's now."""

    @abstractmethod
    def _slice(self, unit: int) -> slice:
        """The unit's values in theta."""

    @abstractmethod
    def _freeze(self, units: range, where: slice, x_F: Float32) -> tuple[Float32, UnitCoder]:
        """(theta - x of these units, its coder). `where` they lie; `x_F` may be overwritten."""

    @abstractmethod
    def _outer_step(self, unit: int, payload: bytes) -> None:
        """Move the outer state of one unit. Raises DecodeError before anything changes."""

    @abstractmethod
    def reducer(self) -> Reducer:
        """How contributions are averaged."""

    @abstractmethod
    def export(self, folder: str) -> None:
        """Write the outer parameters as a transformers model folder."""

    @property
    def parameters(self) -> int:
        """All parameters of the model, frozen ones too, tied ones once."""
        return sum(p.numel() for p in self.inner.model.parameters())

    @property
    def device(self) -> torch.device:
        return self.inner.device

    def step(self, batch: torch.Tensor) -> StepResult:
        result = self.inner.step(batch)
        self._owed.add(result.tokens)
        self._ahead += 1
        if self._due and self._ahead >= self._streaming.tau:
            self._move_along()
        return result

    def contribution(self, units: range | None = None) -> FrozenWork:
        self._move_along()
        self._ahead = 0
        chosen = range(self.units) if units is None else units
        where = slice(self._slice(chosen.start).start, self._slice(chosen.stop - 1).stop)
        delta_F, unit_bytes = self._freeze(chosen, where, self.inner.to_numpy(where))
        if not sound(delta_F):
            # The optimiser ran away; go back to what the swarm has rather than poison it.
            self.dropped_work += 1
            self.inner.load(self._theta_N)
            self.inner.forget(slice(None))
            self._reset()
            return FrozenWork(0.0, unit_bytes)
        counted = self._pending.counted if self._pending is not None else None
        sent = np.zeros(self.units, np.bool_)
        sent[chosen.start : chosen.stop] = True
        weight = self._owed.freeze(counted, sent)
        self._pending = _Pending(chosen, where.start, delta_F, np.zeros(self.units, np.bool_))
        return FrozenWork(weight, unit_bytes, self._snr_db)

    def owes(self) -> bool:
        return self._owed.any

    def apply(self, outcome: Sequence[bytes], mine: npt.NDArray[np.bool_], first: int = 0) -> None:
        units = range(first, first + len(outcome))
        if units not in map(self.fragments.of, range(self.fragments.count)):
            raise ValueError(f"an outcome of units {units}, which are no fragment")
        if mine.shape != (len(units),):
            raise ValueError(f"{mine.shape} flags for {len(units)} units")
        self._changed(units)
        for unit, payload, own in zip(units, outcome, mine, strict=True):
            if payload:
                where = self._slice(unit)
                shift_U = self._apply_unit(unit, where, payload, bool(own))
                if self._ahead < self._streaming.tau:
                    self._due.append((where, shift_U))
                else:
                    self.inner.shift(where, shift_U)

    def _apply_unit(self, unit: int, where: slice, payload: bytes, mine: bool) -> Float32:
        """The mean, then the mixes: by how much x moves. What can't be decoded changes nothing,
        on any peer alike."""
        pending, averaged = self._pending, False
        mixes: tuple[Mix, ...] = ()
        before_U = self._theta_N[where].copy()
        with self._refusing():
            mean, mixes = split(payload) if self.mixes is not None else (payload, ())
            if mean:
                self._outer_step(unit, mean)
                averaged = True
        shift_U: Float32 = self._theta_N[where] - before_U
        fresh = pending is not None and unit in pending.units and not pending.counted[unit]
        if averaged and mine and pending is not None and fresh:
            shift_U += pending.of(where)
            shift_U *= np.float32(1.0 - self._streaming.alpha)
            pending.counted[unit] = True
            self._included(where)
        if mixes:
            before_U[:] = self._theta_N[where]
            for mix in mixes:
                with self._refusing():
                    self._mix(unit, mix)
            shift_U += self._theta_N[where] - before_U
        return shift_U

    def _move_along(self) -> None:
        """x follows what was applied."""
        for where, shift_U in self._due:
            self.inner.shift(where, shift_U)
        self._due.clear()

    @contextmanager
    def _refusing(self) -> Iterator[None]:
        try:
            yield
        except DecodeError:
            self.refused_units += 1

    def _mix(self, unit: int, mix: Mix) -> None:
        """Add or take away another group's difference, once."""
        assert self.mixes is not None
        if self.mixes.admits(unit, mix.id, mix.until, mix.sign):
            d_VU = self.mixer().decode(unit, mix.payload)
            where = self._slice(unit)
            mixed = self._vectors()[: len(d_VU)]
            add_mix([values[where] for values in mixed], d_VU, mix.sign)
            self.mixes.add(unit, mix.id, mix.until, mix.sign)

    def _vectors(self) -> list[Float32]:
        """The vectors (N,) of the outer state, theta first and the momentum last."""
        own = sorted(self._outer.items(), key=lambda item: item[0] == "momentum")
        return [values for _, values in own if len(values) == len(self._theta_N)]

    def mixer(self) -> UnitMixer:
        """What decodes a mix; asked only of methods that have `mixes`, which then override it.

        Raises:
            NotImplementedError: `mixes` is None, so that no mix can have got here.
        """
        raise NotImplementedError("this method does not mix")

    def outer(self, start: int, stop: int) -> list[Float32]:
        vectors = self._vectors()
        return [np.stack([v[self._slice(unit)] for v in vectors]) for unit in range(start, stop)]

    def state(self) -> ArrayMap:
        mixes = {} if self.mixes is None else {MIXES: self.mixes.array.copy()}
        return {name: values.copy() for name, values in self._outer.items()} | mixes

    def load_state(self, arrays: Mapping[str, npt.NDArray[Any]]) -> None:
        self._replace(arrays)
        self.inner.load(self._theta_N)
        self._reset()

    def reconcile(self, arrays: Mapping[str, npt.NDArray[Any]], tokens: float, rounds: int) -> None:
        self._replace(arrays)
        self._move_along()  # x is what it is: its distance from theirs is our history
        self._reset()
        self._owed.reconciled(tokens, rounds)
        if not sound(self._theta_N - self.inner.to_numpy()):
            self.inner.load(self._theta_N)
            self._reset()

    def _replace(self, arrays: Mapping[str, npt.NDArray[Any]]) -> None:
        """The outer state, all of it or nothing."""
        names = {*self._outer, *([] if self.mixes is None else [MIXES])}
        if set(arrays) != names:
            raise ValueError(f"a state of {sorted(arrays)}, expected {sorted(names)}")
        for name, own in self._outer.items():
            values = arrays[name]
            if values.shape != own.shape or values.dtype != own.dtype:
                raise ValueError(
                    f"{name}: {values.dtype} {values.shape}, expected {own.dtype} {own.shape}"
                )
            if not sound(values):
                raise ValueError(f"{name}: holds values that are not finite")
        if self.mixes is not None:
            self.mixes.load(arrays[MIXES])
        for name, own in self._outer.items():
            own[:] = arrays[name]
        self._chunk_hashes().replaced()

    def digest(self) -> bytes:
        return self._chunk_hashes().digest(self._arrays())

    @property
    def grid(self) -> StateGrid:
        if self._grid is None:
            self._grid = StateGrid(self._arrays(), self.inner.layout.digest())
        return self._grid

    def _chunk_hashes(self) -> ChunkHashes:
        if self._hashes is None:
            self._hashes = ChunkHashes(self.grid)
        return self._hashes

    def _arrays(self) -> ArrayMap:
        """The outer state itself, not copies."""
        mixes: ArrayMap = {} if self.mixes is None else {MIXES: self.mixes.array}
        return {**self._outer, **mixes}

    def _changed(self, units: range) -> None:
        """The outer state of these units: vectors by their values, the rest by units."""
        where = slice(self._slice(units.start).start, self._slice(units.stop - 1).stop)
        for name, values in self._arrays().items():
            whole = name != MIXES and len(values) == len(self._theta_N)
            rows = where if whole else slice(units.start, units.stop)
            size = values.nbytes // len(values) if len(values) else 0
            self._chunk_hashes().changed(name, rows.start * size, rows.stop * size)

    def inner_state(self) -> ArrayMap:
        return self.inner.state()

    def load_inner_state(self, arrays: Mapping[str, npt.NDArray[Any]]) -> None:
        self.inner.load_state(arrays)

    def evaluate(self, batches: Iterable[torch.Tensor]) -> float:
        return self.inner.evaluate(self._theta_N, batches)

    @contextmanager
    def outer_model(self) -> Iterator[torch.nn.Module]:
        """The model with the outer parameters, for sampling and export; in the training thread."""
        with self.inner.holding(self._theta_N) as model:
            yield model

    def _reset(self) -> None:
        self._owed.reset()
        self._pending = None
        self._due.clear()


def check_fragments(fragments: int, units: int) -> None:
    """Raises ManifestError: the layout has too few units for so many fragments."""
    if fragments > units:
        raise ManifestError(
            f"schedule.fragments: this model has {units} units, too few for {fragments} fragments;"
            " lower it"
        )


def sound(x_N: npt.NDArray[Any]) -> bool:
    """No NaN, no infinity, nothing beyond what codecs carry. NaN survives max and min."""
    return len(x_N) == 0 or bool(x_N.max() <= VALUE_ABS_MAX and x_N.min() >= -VALUE_ABS_MAX)
