"""What one peer of a hybrid run trains on top of the common state, and how it is sent.

| kind | trains | sends |
|---|---|---|
| `LoraWork` | an A and a B of its own rank, B from 0 in each round, A kept | the factors |
| `FullWork` | a dense D for each layer | D by the run's codec, or its best product of rank R |
| `SeedWork` | B of a new random A in each round, without gradients | seeds and scalars |

`freeze` turns all work that no outcome contains into one payload per layer, and begins anew on top
of it; the model goes on as if nothing had happened. `included` takes the frozen part of a layer
away, because the outer state has it now. What was frozen and missed its exchange stays in the
model and goes with the next payload: `LoraWork` adds it to its factors, exactly where the rank
holds the sum (what it does not hold is lost and counted in `lost`); `FullWork` never took it out,
and so sends what its codec left out, too; `SeedWork` sends its seeds again, of the last few rounds.

`carry` adds what is to be sent besides: after a partition, what the own half learned and the other
half, whose state this now is, did not. Its rank is the run's, so the next payload's is, too, from
`SeedWork` as factors: the price of a partition, once.

Adam's moments of B stay: A is kept, so B's gradient means what it meant.

Shapes: m x n = a layer, r = own rank, R = the run's, P = directions a step.
"""

from __future__ import annotations

import math
import secrets
import time
from collections.abc import Mapping, Sequence
from typing import Any, Final, Protocol

import numpy as np
import numpy.typing as npt
import torch

from peer.finetune import mezo
from peer.finetune.changes import Dense, LowRank
from peer.finetune.coded import (
    SCALAR_MAX,
    SCALARS_MAX,
    SEGMENTS_MAX,
    Float32,
    Segment,
    decode,
    direction_seed,
    drawn_rows,
    encode_dense,
    encode_lowrank,
    encode_seeds,
    expanded,
)
from peer.finetune.perturb import Directions, derive_seed
from peer.finetune.products import mean_of, stack
from peer.finetune.tensors import Weights
from peer.manifest import InnerSpec
from peer.train.adapted import Adapted
from peer.train.inner import Inner, next_token_loss
from peer.train.method import ArrayMap, StepResult
from peer.train.samples import learned_tokens
from protocols import limits
from tensorcodecs import CHUNK_VALUES, VALUE_ABS_MAX, Codec

EPS: Final = 1e-2  # MeZO's for adapters: the larger, the less rounding and the more curvature
_SQUARES_KEPT: Final = 0.9  # of the running mean of squared slopes


class OwnWork(Protocol):
    """See the module. Touched by the training thread only."""

    words: str
    """What this peer does, in words."""
    lost: float
    """Frobenius norm, over all layers and rounds, of work that its rank could not hold."""
    dropped: int
    """Rounds of work that were given up because they missed too many exchanges."""

    def step(self, batch: torch.Tensor) -> StepResult: ...

    def freeze(self, bases: Sequence[bytes]) -> list[bytes] | None:
        """A payload for each layer, in their order, made on states of these tags; None where the
        work is not finite, and nothing may be sent."""

    def included(self, unit: int) -> None:
        """The layer's last payload is inside the state."""

    def carry(self, unit: int, change: LowRank) -> bool:
        """The model has `change` in this layer, and the next payload, too. False: it can't be sent,
        and is lost."""

    def restart(self) -> None:
        """Give all work up and begin on the layers' present state."""

    def state(self) -> ArrayMap: ...

    def load_state(self, arrays: Mapping[str, npt.NDArray[Any]]) -> None: ...


class LoraWork:
    """First order, by factors of rank r."""

    def __init__(
        self,
        model: torch.nn.Module,
        layers: Sequence[Adapted],
        spec: InnerSpec,
        device: torch.device,
        *,
        rank: int,
        alpha: float,
        codec: Codec,
    ) -> None:
        self.words = f"LoRA of rank {rank}"
        self.lost = 0.0
        self.dropped = 0
        self._layers, self._codec = layers, codec
        for adapted in layers:
            adapted.with_factors(rank, alpha / rank)
        self._rank = rank
        self._kept: list[LowRank | None] = [None] * len(layers)
        self._inner = Inner(model, spec, device)

    def step(self, batch: torch.Tensor) -> StepResult:
        return self._inner.step(batch)

    def freeze(self, bases: Sequence[bytes]) -> list[bytes] | None:
        changes = []
        for adapted, kept in zip(self._layers, self._kept, strict=True):
            A_rn, B_mr = to_numpy(adapted.A), to_numpy(adapted.B)
            if not (_sound(A_rn) and _sound(B_mr)):
                return None
            change = LowRank(A_rn, B_mr, adapted.scale)
            if kept is not None:
                rank = max(self._rank, kept.rank)
                near = A_rn if rank == self._rank else None
                change, tail = _together([kept, change], rank, scale=adapted.scale, near=near)
                self.lost = math.hypot(self.lost, tail)
            changes.append(change)
        payloads = []
        for unit, (adapted, change) in enumerate(zip(self._layers, changes, strict=True)):
            payloads.append(encode_lowrank(adapted.layer, bases[unit], change, self._codec))
            adapted.kept = [adapted.on_device(change)]
            self._kept[unit] = change
            with torch.no_grad():
                if change.rank == self._rank:
                    adapted.A.copy_(torch.from_numpy(np.asarray(change.A)))
                adapted.B.zero_()
        return payloads

    def carry(self, unit: int, change: LowRank) -> bool:
        kept = self._kept[unit]
        if kept is not None:
            change, tail = _together([kept, change], max(kept.rank, change.rank))
            self.lost = math.hypot(self.lost, tail)
        self._kept[unit] = change
        self._layers[unit].kept = [self._layers[unit].on_device(change)]
        return True

    def included(self, unit: int) -> None:
        self._kept[unit] = None
        self._layers[unit].kept = []

    def restart(self) -> None:
        for unit, adapted in enumerate(self._layers):
            self.included(unit)
            assert adapted.state is not None
            with torch.no_grad():  # rows that the state has too: what comes of it fits into R
                adapted.A.copy_(adapted.state[0][: self._rank])
                adapted.B.zero_()
        self._inner.forget(slice(None))

    def state(self) -> ArrayMap:
        return self._inner.state()

    def load_state(self, arrays: Mapping[str, npt.NDArray[Any]]) -> None:
        self._inner.load_state(arrays)


class FullWork:
    """First order, by all values of the adapted layers."""

    def __init__(
        self,
        model: torch.nn.Module,
        layers: Sequence[Adapted],
        spec: InnerSpec,
        device: torch.device,
        *,
        rank: int,
        sent_rank: int,
        admit: Sequence[str],
        codec: Codec,
    ) -> None:
        """`rank`: the run's. `sent_rank`: of the product that is sent; 0: the values themselves. A
        layer whose change is not admitted as values, or too large for a message, is sent as its
        best product of the run's rank all the same."""
        self.words = "all values of the adapted layers"
        if sent_rank:
            self.words += f", sent at rank {sent_rank}"
        self.lost = 0.0
        self.dropped = 0
        self._layers, self._codec = layers, codec
        self._rank, self._admit, self._sent_rank = rank, admit, sent_rank or rank
        for adapted in layers:
            adapted.with_values()
        self._sent: list[Float32 | None] = [None] * len(layers)
        self._inner = Inner(model, spec, device)
        kind = "sparse" if codec.name.startswith("sparse") else "dense"
        self._as_values = [
            not sent_rank
            and kind in admit
            and bytes_of_values(a.layer.m * a.layer.n, codec) <= limits.UNIT_BYTES_MAX
            for a in layers
        ]

    def step(self, batch: torch.Tensor) -> StepResult:
        return self._inner.step(batch)

    def freeze(self, bases: Sequence[bytes]) -> list[bytes] | None:
        changes = [to_numpy(adapted.D) for adapted in self._layers]
        if not all(map(_sound, changes)):
            return None
        payloads = []
        for unit, (adapted, D_mn) in enumerate(zip(self._layers, changes, strict=True)):
            layer = adapted.layer
            if self._as_values[unit]:
                payload = encode_dense(layer, bases[unit], D_mn, self._codec)
            else:
                payload = encode_lowrank(layer, bases[unit], self._product(D_mn), self._codec)
            payloads.append(payload)
            read = decode(layer, payload, self._rank, tuple(self._admit)).change
            assert isinstance(read, LowRank | Dense)  # as it was just coded
            self._sent[unit] = read.dense().astype(np.float32)
        return payloads

    def _product(self, D_mn: Float32) -> LowRank:
        return (
            mean_of([(1.0, Dense(D_mn))]).spectrum(self._sent_rank).project(self._sent_rank).change
        )

    def included(self, unit: int) -> None:
        sent = self._sent[unit]
        if sent is not None:
            with torch.no_grad():
                D = self._layers[unit].D
                D.sub_(torch.from_numpy(sent).to(D.device))
        self._sent[unit] = None

    def carry(self, unit: int, change: LowRank) -> bool:
        D = self._layers[unit].D
        with torch.no_grad():
            D.add_(torch.from_numpy(change.dense().astype(np.float32)).to(D.device))
        self._sent[unit] = None
        return True

    def restart(self) -> None:
        for unit, adapted in enumerate(self._layers):
            self._sent[unit] = None
            with torch.no_grad():
                adapted.D.zero_()
        self._inner.forget(slice(None))

    def state(self) -> ArrayMap:
        return self._inner.state()

    def load_state(self, arrays: Mapping[str, npt.NDArray[Any]]) -> None:
        self._inner.load_state(arrays)


class SeedWork:
    """Zeroth order: P directions a step, in passing, at inference memory.

    A step along z is - lr slope / rms of the recent slopes: of the same size however steep the
    loss is, as Adam's are.
    """

    def __init__(
        self,
        model: torch.nn.Module,
        layers: Sequence[Adapted],
        spec: InnerSpec,
        device: torch.device,
        *,
        rank: int,
        alpha: float,
        lr: float,
        perturbations: int,
        run_rank: int,
        codec: Codec | None,
        seed: int | None = None,
    ) -> None:
        """`run_rank`, `codec`: of what `carry` adds; None: the run admits no factors, and that is
        given up. `seed`: of all that is drawn; by default one that nobody else has."""
        self.words = f"zeroth order, rank {rank}, {perturbations} directions a step"
        self.lost = 0.0
        self.dropped = 0
        self._layers, self._spec, self._device = layers, spec, device
        self._rank, self._scale = rank, float(np.float32(alpha / rank))
        self._lr, self._perturbations = lr, perturbations
        self._seed = secrets.randbits(64) if seed is None else seed
        self._drawn = 0
        self._squares, self._steps, self._tried = 0.0, 0, 0
        self._segments: list[list[Segment]] = [[] for _ in layers]
        self._run_rank, self._codec = run_rank, codec
        self._carried: list[LowRank | None] = [None] * len(layers)
        """Beside the segments; the last of the layer's `kept`."""
        for adapted in layers:
            adapted.with_factors(rank, self._scale, train_A=False)
        self._model = model.to(device).eval()
        self._weights = Weights(model, noise="rademacher")
        self._begin()

    def _begin(self) -> None:
        """A new A, and B = 0."""
        self._a_seed = derive_seed("A", self._seed, self._drawn)
        self._z_seed = derive_seed("z", self._seed, self._drawn)
        self._drawn += 1
        self._tried = 0
        self._scalars = np.zeros(SCALARS_MAX, np.float32)
        for adapted in self._layers:
            rows = drawn_rows(adapted.layer, self._rank, self._a_seed)
            with torch.no_grad():
                adapted.A.copy_(torch.from_numpy(rows))
                adapted.B.zero_()

    def step(self, batch: torch.Tensor) -> StepResult:
        indices = [(self._tried + p) % SCALARS_MAX for p in range(self._perturbations)]
        seeds = [direction_seed(self._z_seed, index) for index in indices]
        measured = mezo.measure(
            self._weights, lambda: next_token_loss(self._model, batch, self._device), seeds, EPS
        )
        if not measured.finite:
            return StepResult(loss=math.nan, tokens=0)
        slopes = np.array(measured.slopes)
        self._steps += 1
        self._squares = _SQUARES_KEPT * self._squares + (1 - _SQUARES_KEPT) * np.mean(slopes**2)
        typical = math.sqrt(self._squares / (1 - _SQUARES_KEPT**self._steps))
        if typical > 0.0:
            warm = min(1.0, self._steps / max(1, self._spec.warmup_steps))
            lr = self._lr * warm * self._spec.rate_at(time.time())
            along = (-lr / (self._perturbations * typical) * slopes).astype(np.float32)
            self._weights.apply(Directions(np.array(seeds, np.uint64), along), dither_seed=0)
            np.add.at(self._scalars, indices, along)
            self._tried += self._perturbations
        return StepResult(loss=measured.loss, tokens=learned_tokens(batch))

    def freeze(self, bases: Sequence[bytes]) -> list[bytes] | None:
        if not (np.abs(self._scalars) <= SCALAR_MAX).all():
            return None
        if self._tried:
            used = self._scalars[: min(self._tried, SCALARS_MAX)].copy()
            made = Segment(self._a_seed, self._z_seed, self._rank, self._scale, used)
            late = False
            for adapted, segments in zip(self._layers, self._segments, strict=True):
                B_mr = self._scale * adapted.B.detach().clone()
                adapted.kept.insert(len(segments), (adapted.A.detach().clone(), B_mr))
                segments.append(made)
                if len(segments) > SEGMENTS_MAX:
                    late = True
                    del segments[0], adapted.kept[0]
            self.dropped += late
            self._begin()
        return [self._payload(unit, base) for unit, base in enumerate(bases)]

    def _payload(self, unit: int, base: bytes) -> bytes:
        layer, segments = self._layers[unit].layer, self._segments[unit]
        carried = self._carried[unit]
        if carried is None or self._codec is None:
            return encode_seeds(layer, base, segments)
        both, tail = _together([carried, expanded(layer, segments)], self._run_rank)
        self.lost = math.hypot(self.lost, tail)
        return encode_lowrank(layer, base, both, self._codec)

    def carry(self, unit: int, change: LowRank) -> bool:
        if self._codec is None:
            self.lost = math.hypot(self.lost, change.norm())
            return False
        before, adapted = self._carried[unit], self._layers[unit]
        if before is not None:
            change, tail = _together([before, change], self._run_rank)
            self.lost = math.hypot(self.lost, tail)
            adapted.kept.pop()
        self._carried[unit] = change
        adapted.kept.append(adapted.on_device(change))
        return True

    def included(self, unit: int) -> None:
        self._segments[unit].clear()
        self._carried[unit] = None
        self._layers[unit].kept.clear()

    def restart(self) -> None:
        for unit in range(len(self._layers)):
            self.included(unit)
        self._begin()

    def state(self) -> ArrayMap:
        """Nothing: the slopes' size is measured again in a few steps."""
        return {}

    def load_state(self, arrays: Mapping[str, npt.NDArray[Any]]) -> None:
        pass


def _together(
    changes: Sequence[LowRank], rank: int, *, scale: float = 1.0, near: Float32 | None = None
) -> tuple[LowRank, float]:
    """(the sum at a rank, in float32, the norm of what that cut off). See `Spectrum.project`."""
    summed = mean_of([(1.0, stack([(1.0, change) for change in changes]))])
    made = summed.spectrum(rank).project(rank, scale=scale, near=near)
    A_rn, B_mr = made.change.A.astype(np.float32), made.change.B.astype(np.float32)
    return LowRank(A_rn, B_mr, scale), made.tail


def to_numpy(values: torch.Tensor) -> Float32:
    """A copy on the CPU."""
    made: Float32 = values.detach().to("cpu", copy=True).numpy()
    return made


def bytes_of_values(numel: int, codec: Codec) -> int:
    """The most that so many values take in a payload, its header included."""
    whole, rest = divmod(numel, CHUNK_VALUES)
    frames = whole * (codec.bytes_max(CHUNK_VALUES) + 4)
    return 64 + frames + (codec.bytes_max(rest) + 4 if rest else 0)


def bits_of(codec: Codec) -> float:
    """What a value takes on the wire, tried on normal ones."""
    tried = np.random.Generator(np.random.Philox(0)).standard_normal(16384).astype(np.float32)
    return 8 * len(codec.encode(tried)) / len(tried)


def _sound(values: Float32) -> bool:
    return bool(values.max() <= VALUE_ABS_MAX and values.min() >= -VALUE_ABS_MAX)
