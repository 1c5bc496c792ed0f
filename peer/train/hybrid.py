"""Finetuning in which every peer trains by its own means, and all means add up exactly.

The outer state of an adapted layer is a product B A of the run's rank R, the same on every peer.
Everybody has all of it beside the frozen weights (`peer.train.adapted`) and trains on top what it
can afford (`peer.train.own_change`): factors of its own rank, seeds and scalars, or all values.
What is sent is the change alone, so ranks, scales and kinds may differ:

    new state = the nearest of rank R to (state + weighted mean of the changes)

(`peer.finetune.products.advance`; where `method.spectrum` or `method.step` say so, the mean is
`spread` first, against drift); one aggregator computes it, everybody takes the same coded
factors, and the outcome tells the norm of what rank R could not hold.

So the reducer needs the state that the changes were made on. It takes the method's own, layer by
layer a frozen array with a tag (`Held`), read once for each mean: the training thread may put
another in its place at any time. Each change names the tag of the state that it was made on. One
that was made on another is refused in its sender's name; where all were, it is we who are
elsewhere (a donor's state came meanwhile): then the layer stays as it is, and nobody is to blame.

Shapes: m x n = an adapted layer, R = the run's rank; A: (R, n), B: (m, R).
"""

from __future__ import annotations

import copy
import hashlib
import math
import struct
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, cast

import numpy as np
import numpy.typing as npt
import torch

from peer.finetune.changes import Change, Expanded, LowRank
from peer.finetune.coded import Layer, decode, tag_of_state
from peer.finetune.perturb import warm_up
from peer.finetune.products import advance, mean_of, stack
from peer.finetune.weights import Evidence, weight_of
from peer.manifest import ADAPTIVE, Manifest, MethodSpec
from peer.state_chunks import ChunkHashes, StateGrid
from peer.train.adapted import Adapted, adapt, plain
from peer.train.base import base_digest, note_base
from peer.train.flat import FrozenWork, check_fragments, sound
from peer.train.inner import mean_loss, save_model
from peer.train.local import Float32
from peer.train.lora import PARTS_MAX, Adapter, adapt_by_peft, check_adapter
from peer.train.means import Means
from peer.train.method import ArrayMap, Reducer, StepResult
from peer.train.mixing import UnitMixer
from peer.train.mixtable import MixTable
from peer.train.models import count_parameters, generator_of
from peer.train.owed import Owed
from peer.train.own_change import FullWork, LoraWork, OwnWork, SeedWork
from peer.train.pretrain import MEAN_CODEC
from protocols.fragments import Fragments
from tensorcodecs import VALUE_ABS_MAX, Codec, DecodeError, Reduced, get_codec

STATE: Final = "factors"
"""What the state calls its one vector: A and B of each layer, by name."""
_OUTCOME: Final = struct.Struct("<Bf")
_STATE_KIND: Final = 0x10  # of an outcome; `coded.KINDS` are those of contributions


@dataclass(frozen=True, slots=True, eq=False)
class Held:
    """A layer's outer state. Never changed: another takes its place."""

    values: Float32
    """A, then B."""
    tag: bytes

    @classmethod
    def of(cls, values: Float32) -> Held:
        values.flags.writeable = False
        return cls(values, tag_of_state(values))


class ChangeMean:
    """Reducer: the state, moved by the mean of what came in, at the run's rank."""

    def __init__(
        self, layers: Sequence[Layer], adapters: Sequence[Adapter], held: Sequence[Held],
        admit: Sequence[str], *, power: float = 1.0, length: float = 1.0,
    ) -> None:  # fmt: skip
        """`held`: the method's own list, whose items the training thread exchanges. `power`,
        `length`: see `products.spread`."""
        self._layers = layers
        self._adapters = adapters
        self._held = held
        self._admit = tuple(admit)
        self._power, self._length = power, length

    def check(self, unit: int, payload: bytes) -> None:
        """See `Reducer.check`."""
        decode(self._layers[unit], payload, self._adapters[unit].r, self._admit)

    def reduce(self, unit: int, parts: Sequence[tuple[float, bytes]]) -> Reduced:
        """See `Reducer.reduce`; it depends on the state, too.

        Raises:
            ValueError: more than PARTS_MAX contributions, or a weight that is none.
        """
        if len(parts) > PARTS_MAX:
            raise ValueError(f"more than {PARTS_MAX} contributions to unit {unit}")
        adapter, here = self._adapters[unit], self._held[unit]
        changes: list[tuple[float, LowRank | None, Change]] = []
        refused: list[tuple[int, str]] = []
        elsewhere: list[tuple[int, str]] = []
        for index, (weight, payload) in enumerate(parts):
            if not 0 < weight < 2.0**60:
                raise ValueError(f"a weight of {weight}")
            try:
                read = decode(self._layers[unit], payload, adapter.r, self._admit)
                change = read.change
                if isinstance(change, Expanded):
                    change = change.made()
            except ValueError as error:
                refused.append((index, str(error)))
                continue
            if read.base != here.tag:
                elsewhere.append((index, f"{adapter.name}: a change of another state"))
            else:
                changes.append((weight, None, change))
        if not changes:
            return Reduced(b"", tuple(refused))
        A, B = adapter.split(here.values)
        moved = advance(LowRank(A, B), changes, power=self._power, length=self._length)
        made = moved.spectrum(adapter.r).project(adapter.r, near=A)
        values = np.concatenate([made.change.A.ravel(), made.change.B.ravel()])
        # Hostile factors can be huge and still pass; what comes of them must stay sendable.
        flat = np.clip(values, -VALUE_ABS_MAX, VALUE_ABS_MAX).astype(np.float32)
        tail = min(made.tail, VALUE_ABS_MAX)
        payload = _OUTCOME.pack(_STATE_KIND, tail) + adapter.frame(flat)
        return Reduced(payload, tuple(sorted(refused + elsewhere)))


class HybridMethod:
    """`Method`; see the module."""

    mixes: MixTable | None = None
    carries = True
    idle = False
    refusal = ""

    def __init__(
        self,
        model: torch.nn.Module,
        manifest: Manifest,
        device: torch.device,
        means: Means,
        *,
        seed: int | None = None,
        say: Callable[[str], None] = lambda _: None,
    ) -> None:
        """Takes `model` over. `seed`: of a zeroth-order peer's draws; None: nobody else's. `say`:
        told what takes long.

        Raises:
            ManifestError: the targets fit no layer, or the rank is too large for one.
        """
        spec = manifest.method
        if "seeds" in spec.admit:  # an aggregator expands them on the CPU: not in its first round
            for where in {torch.device("cpu"), *([device] if means.kind == "zo" else [])}:
                warm_up(where, say)
        self.parameters = count_parameters(model)
        """All parameters of the model, tied ones once."""
        self.device = device
        self.means = means
        self.refused_units = 0
        """Units of outcomes that could not be read and so changed nothing, on any peer alike."""
        self.dropped_work = 0
        """Contributions dropped because they were not finite."""
        self.tails: npt.NDArray[np.float64]
        """(units,), of each unit's last outcome: the norm of what the run's rank could not hold."""
        self._spec = spec
        by_name = adapt(model, spec.targets, spec.dropout)
        self._by_name, self._model = by_name, model.to(device)
        self._layers = list(by_name.values())
        self._adapters = _adapters(by_name, spec.rank)
        self.units = len(self._layers)
        self.tails = np.zeros(self.units)
        check_fragments(manifest.schedule.fragments, self.units)
        sizes = [adapter.size for adapter in self._adapters]
        self.fragments = Fragments.cut(sizes, 1)
        first = [_first_state(adapter, manifest.model.seed) for adapter in self._adapters]
        self._held = [Held.of(values) for values in first]
        self._state_N = np.concatenate(first)
        layout = "\n".join(f"{a.name}/{a.m}/{a.r}/{a.n}" for a in self._adapters)
        self.grid = StateGrid({STATE: self._state_N}, hashlib.sha256(layout.encode()).digest())
        self._hashes = ChunkHashes(self.grid)
        for unit in range(self.units):
            self._show(unit)
        self._owed = Owed(sizes, manifest.outer.staleness)
        self._counted: npt.NDArray[np.bool_] | None = None
        self._history = False
        """Whether the next contribution carries what our half learned while we were parted."""
        self._share = 1.0
        if means.kind == "zo":
            self._share = weight_of(
                Evidence(tokens=1.0, perturbations=means.perturbations),
                effective_dim=spec.effective_dim,
            )
        self._own = _own_work(self._model, self._layers, manifest, device, means, seed)
        self._own.restart()

    # ── training ─────────────────────────────────────────────────────────────────────────
    def step(self, batch: torch.Tensor) -> StepResult:
        result = self._own.step(batch)
        self._owed.add(result.tokens)
        return result

    def contribution(self, units: range | None = None) -> FrozenWork:
        payloads = self._own.freeze([held.tag for held in self._held])

        def unit_bytes(start: int, stop: int, codec: str | None) -> list[bytes]:
            assert payloads is not None
            return payloads[start:stop]

        if payloads is None:
            self.dropped_work += 1
            self._restart()
            return FrozenWork(0.0, lambda start, stop, codec: [b""] * (stop - start))
        if self._counted is not None and self._counted.all():
            self._history = False
        # What a whole half learned is no single peer's guess, and counts in full.
        weight = self._owed.freeze(self._counted) * (1.0 if self._history else self._share)
        self._counted = np.zeros(self.units, np.bool_)
        return FrozenWork(weight, unit_bytes)

    def owes(self) -> bool:
        return self._owed.any

    def apply(self, outcome: Sequence[bytes], mine: npt.NDArray[np.bool_], first: int = 0) -> None:
        if first or len(outcome) != self.units or mine.shape != (self.units,):
            raise ValueError(f"an outcome of {len(outcome)} units from {first}")
        for unit, (payload, own) in enumerate(zip(outcome, mine, strict=True)):
            if not payload:
                continue
            try:
                values, tail = self._read(unit, payload)
            except DecodeError:
                self.refused_units += 1
                continue
            self.tails[unit] = tail
            self._take(unit, values)
            if own and self._counted is not None and not self._counted[unit]:
                self._counted[unit] = True
                self._own.included(unit)

    def _read(self, unit: int, payload: bytes) -> tuple[Float32, float]:
        if len(payload) < _OUTCOME.size:
            raise DecodeError("an outcome that is cut short")
        kind, tail = _OUTCOME.unpack_from(payload)
        if kind != _STATE_KIND or not 0.0 <= tail <= VALUE_ABS_MAX:
            raise DecodeError(f"an outcome of kind {kind} and a tail of {tail}")
        return self._adapters[unit].decode(payload[_OUTCOME.size :]), tail

    def reducer(self) -> Reducer:
        layers = [adapted.layer for adapted in self._layers]
        spec = self._spec
        return ChangeMean(
            layers, self._adapters, self._held, spec.admit, power=spec.spectrum, length=spec.step
        )

    def mixer(self) -> UnitMixer:
        """Raises NotImplementedError: it is asked only of methods that have `mixes`."""
        raise NotImplementedError("this method does not mix")

    # ── the outer state ──────────────────────────────────────────────────────────────────
    def outer(self, start: int, stop: int) -> list[npt.NDArray[np.float32]]:
        return [self._held[unit].values.copy()[None] for unit in range(start, stop)]

    def state(self) -> ArrayMap:
        return {STATE: self._state_N.copy()}

    def load_state(self, arrays: Mapping[str, npt.NDArray[Any]]) -> None:
        values = self._sound_state(arrays)
        for unit, adapter in enumerate(self._adapters):
            self._take(unit, values[adapter.where].copy())
        self._restart()

    def _sound_state(self, arrays: Mapping[str, npt.NDArray[Any]]) -> Float32:
        """Raises ValueError: it is none of this run."""
        size = sum(adapter.size for adapter in self._adapters)
        if set(arrays) != {STATE}:
            raise ValueError(f"a state of {sorted(arrays)}, expected {STATE}")
        values = arrays[STATE]
        if values.shape != (size,) or values.dtype != np.float32:
            raise ValueError(f"{STATE}: {values.dtype} {values.shape}, expected float32 ({size},)")
        if not sound(values):
            raise ValueError(f"{STATE}: holds values that are not finite")
        return values

    def reconcile(self, arrays: Mapping[str, npt.NDArray[Any]], tokens: float, rounds: int) -> None:
        before = [held.values for held in self._held]
        values = self._sound_state(arrays)
        for unit, adapter in enumerate(self._adapters):
            old, new = (adapter.split(v) for v in (before[unit], values[adapter.where]))
            self._take(unit, values[adapter.where].copy())
            apart = stack([(1.0, LowRank(*old)), (-1.0, LowRank(*new))])
            made = mean_of([(1.0, apart)]).spectrum(adapter.r).project(adapter.r)
            self._own.lost = math.hypot(self._own.lost, made.tail)
            self._history = self._own.carry(unit, made.change)
        self._counted = None
        if self._history:
            self._owed.reconciled(tokens, rounds)
        else:
            self._owed.reset()

    def digest(self) -> bytes:
        return self._hashes.digest({STATE: self._state_N})

    def inner_state(self) -> ArrayMap:
        return self._own.state()

    def load_inner_state(self, arrays: Mapping[str, npt.NDArray[Any]]) -> None:
        self._own.load_state(arrays)

    # ── what has come of it ──────────────────────────────────────────────────────────────
    def evaluate(self, batches: Iterable[torch.Tensor]) -> float:
        with self.outer_model() as model:
            return mean_loss(model, batches, self.device)

    @contextmanager
    def outer_model(self) -> Iterator[torch.nn.Module]:
        """The model as the swarm has it, without own work; in the training thread."""
        training = self._model.training
        try:
            for adapted in self._layers:
                adapted.own_work = False
            yield self._model.eval()
        finally:
            for adapted in self._layers:
                adapted.own_work = True
            self._model.train(training)

    def export(self, folder: str) -> None:
        """Write the merged model to `folder` and an adapter of the run's rank, which peft loads,
        to `folder`/adapter."""
        with plain(self._model, self._by_name) as model:
            copied = copy.deepcopy(model)
        base = base_digest(copied)
        rank = self._spec.rank
        lora = MethodSpec(kind="lora", rank=rank, alpha=float(rank), targets=self._spec.targets)
        adapted = adapt_by_peft(copied, lora)
        tensors = dict(adapted.named_parameters())
        for adapter, held in zip(self._adapters, self._held, strict=True):
            for letter, values in zip("AB", adapter.split(held.values), strict=True):
                name = f"base_model.model.{adapter.name}.lora_{letter}.default.weight"
                tensors[name].data.copy_(torch.from_numpy(values.copy()))
        where = Path(folder)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing")
            cast("Any", adapted).save_pretrained(
                str(where / "adapter"), save_embedding_layers=False
            )
        note_base(where / "adapter", base)
        save_model(cast("Any", adapted).merge_and_unload(), where)

    def facts(self) -> dict[str, Any]:
        """For `peer status`: what this peer does, why, and what is lost on the way."""
        return {
            "does": self._own.words,
            "why": self.means.why,
            "tail": float(np.linalg.norm(self.tails)),
            "lost": self._own.lost,
            "dropped_rounds": self._own.dropped + self.dropped_work,
        }

    def _take(self, unit: int, values: Float32) -> None:
        """Other values in the place of a layer's state."""
        where = self._adapters[unit].where
        self._held[unit] = Held.of(values)
        self._state_N[where] = values
        size = self._state_N.itemsize
        self._hashes.changed(STATE, where.start * size, where.stop * size)
        self._show(unit)

    def _show(self, unit: int) -> None:
        """The model has the state of a layer."""
        A, B = self._adapters[unit].split(self._held[unit].values)
        self._layers[unit].state = self._layers[unit].on_device(LowRank(A, B))

    def _restart(self) -> None:
        self._owed.reset()
        self._counted = None
        self._history = False
        self._own.restart()


def _own_work(
    model: torch.nn.Module,
    layers: Sequence[Adapted],
    manifest: Manifest,
    device: torch.device,
    means: Means,
    seed: int | None,
) -> OwnWork:
    spec, inner = manifest.method, manifest.inner
    codec = codec_for(manifest)
    if means.kind == "zo":
        return SeedWork(
            model, layers, inner, device,
            rank=means.rank, alpha=spec.alpha, lr=spec.seeds_lr,
            perturbations=means.perturbations, run_rank=spec.rank,
            codec=codec if "lowrank" in spec.admit else None, seed=seed,
        )  # fmt: skip
    if means.kind == "full":
        return FullWork(
            model,
            layers,
            inner,
            device,
            rank=spec.rank,
            sent_rank=means.rank,
            admit=spec.admit,
            codec=codec,
        )
    return LoraWork(model, layers, inner, device, rank=means.rank, alpha=spec.alpha, codec=codec)


def codec_for(manifest: Manifest) -> Codec:
    """How values of contributions are coded. Compiled, if need be, before the first round."""
    name = manifest.codec.name
    codec = get_codec(MEAN_CODEC if name == ADAPTIVE else name)
    codec.encode(np.zeros(1, np.float32))
    return codec


def _adapters(layers: Mapping[str, Adapted], rank: int) -> list[Adapter]:
    found, at = [], 0
    for name, adapted in layers.items():
        m, n = adapted.layer.shape
        size = rank * (m + n)
        found.append(check_adapter(Adapter(name, m, rank, n, slice(at, at + size)), room=64))
        at += size
    return found


def _first_state(adapter: Adapter, seed: int) -> Float32:
    """A from the run's seed as peft draws it, B = 0."""
    bound = 1 / np.sqrt(adapter.n)
    drawn = generator_of(seed, adapter.name).uniform(-bound, bound, adapter.r * adapter.n)
    return np.concatenate([drawn, np.zeros(adapter.m * adapter.r)]).astype(np.float32)
