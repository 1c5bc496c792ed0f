"""Finetuning by low-rank adapters: peers average the products B A, not the factors.

(With `method.aggregate = "fedit"` they average the factors, to see the difference.)

The base is frozen and the same on every peer (assets, or the run's seed). A unit is one adapted
layer's pair of factors, coded exactly. The mean of products is brought back to the adapter's rank
(`peer.finetune.products`) by one aggregator, and everybody takes the same coded factors as the new
outer state: no outer optimiser. Work done since the contribution stays, added to the factors; the
factors that come back are the nearest to those that went in, so it still points the right way.
Where they moved by more than half their length all the same, Adam's moments start afresh.

Shapes: m x n = an adapted layer, r = rank; A: (r, n), B: (m, r).
"""

from __future__ import annotations

import copy
import struct
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, cast

import numpy as np
import torch

from peer.errors import ManifestError
from peer.finetune.baselines import fedit
from peer.finetune.changes import LowRank
from peer.finetune.products import Factors, mean_product
from peer.manifest import MethodSpec
from peer.train.base import base_digest, note_base
from peer.train.flat import WHOLE, FlatMethod, Streaming, UnitCoder
from peer.train.inner import save_model
from peer.train.local import Float32, LocalValues
from peer.train.method import Reducer
from peer.train.models import generator_of
from protocols import limits
from tensorcodecs import FRAME_VALUES_MAX, VALUE_ABS_MAX, DecodeError, Reduced, get_codec

PARTS_MAX: Final = 64  # contributions to one unit; a roster is smaller

_HEADER: Final = struct.Struct("<III")  # m, r, n
_CODEC: Final = get_codec("fp32")
_TURNED: Final = 0.5  # of the factors' norm


@dataclass(frozen=True, slots=True)
class Adapter:
    """Where one layer's factors lie in the flat vector: A, then B."""

    name: str
    m: int
    r: int
    n: int
    where: slice

    @property
    def size(self) -> int:
        """Values in both factors."""
        return self.r * (self.m + self.n)

    def frame(self, values: Float32) -> bytes:
        """A, then B, with their shape."""
        return _HEADER.pack(self.m, self.r, self.n) + _CODEC.encode(values)

    def decode(self, payload: bytes) -> Float32:
        """The pair's values, A then B.

        Raises:
            DecodeError: not an intact pair of this layer's shape.
        """
        if len(payload) < _HEADER.size:
            raise DecodeError(f"{len(payload)} bytes are too few for a pair of factors")
        shape = _HEADER.unpack_from(payload)
        if shape != (self.m, self.r, self.n):
            raise DecodeError(f"{self.name}: factors of (m, r, n) = {shape}, not "
                              f"{(self.m, self.r, self.n)}")  # fmt: skip
        values = np.empty(self.size, np.float32)
        _CODEC.decode_into(memoryview(payload)[_HEADER.size :], values)
        return values

    def split(self, values: Float32) -> Factors:
        """(A, B) as views."""
        cut = self.r * self.n
        return values[:cut].reshape(self.r, self.n), values[cut:].reshape(self.m, self.r)


class ProductMean:
    """Reducer: the mean of products of each adapter, at the adapters' own rank."""

    def __init__(self, adapters: list[Adapter]) -> None:
        self._adapters = adapters
        self.tails: dict[int, float] = {}
        """Per unit, of its last mean: the norm of what its rank could not hold."""

    def check(self, unit: int, payload: bytes) -> None:
        """See `Reducer.check`."""
        self._adapters[unit].decode(payload)

    def reduce(self, unit: int, parts: Sequence[tuple[float, bytes]]) -> Reduced:
        """See `Reducer.reduce`.

        Raises:
            ValueError: more than PARTS_MAX contributions, or a weight that is none.
        """
        if len(parts) > PARTS_MAX:
            raise ValueError(f"more than {PARTS_MAX} contributions to unit {unit}")
        adapter = self._adapters[unit]
        whole: list[tuple[float, Float32]] = []
        refused = []
        for index, (weight, payload) in enumerate(parts):
            if not 0 < weight < 2.0**60:
                raise ValueError(f"a weight of {weight}")
            try:
                whole.append((weight, adapter.decode(payload)))
            except DecodeError as error:
                refused.append((index, str(error)))
        if not whole:
            return Reduced(b"", tuple(refused))
        total = sum(weight for weight, _ in whole)
        pairs = [(weight / total, adapter.split(values)) for weight, values in whole]
        A, B = self._mean(unit, pairs)
        values = np.concatenate([A.ravel(), B.ravel()])
        # Hostile factors can be huge and still pass; what comes of them must stay sendable.
        flat = np.clip(values, -VALUE_ABS_MAX, VALUE_ABS_MAX).astype(np.float32)
        return Reduced(adapter.frame(flat), tuple(refused))

    def _mean(self, unit: int, pairs: list[tuple[float, Factors]]) -> Factors:
        """Of factors whose weights add up to one."""
        factors, self.tails[unit] = mean_product(pairs)
        return factors


class FactorMean(ProductMean):
    """Reducer: the mean of A and the mean of B (FedIT). Not the mean of what peers learned; there
    to be compared with."""

    def _mean(self, unit: int, pairs: list[tuple[float, Factors]]) -> Factors:
        mean = fedit([(weight, LowRank(A_rn, B_mr)) for weight, (A_rn, B_mr) in pairs])
        return mean.A, mean.B


class LoraMethod(FlatMethod):
    """Trains adapters on a frozen model."""

    _main = "factors"

    def __init__(
        self,
        inner: LocalValues,
        method: MethodSpec,
        *,
        staleness: float = 0.0,
        streaming: Streaming = WHOLE,
    ) -> None:
        """`inner`: the values of a model of `with_adapters`.

        Raises:
            ManifestError: the rank is too large for a layer, or there are more fragments than
                layers.
        """
        self._mean_of = FactorMean if method.aggregate == "fedit" else ProductMean
        self._adapters = _adapters(inner)
        super().__init__(inner, len(self._adapters), {}, staleness=staleness, streaming=streaming)

    def reducer(self) -> Reducer:
        return self._mean_of(self._adapters)

    def export(self, folder: str) -> None:
        """Write the merged model to `folder` and the adapter alone to `folder`/adapter."""
        with self.outer_model() as model:
            save_merged(model, Path(folder))

    def _slice(self, unit: int) -> slice:
        return self._adapters[unit].where

    def _freeze(self, units: range, where: slice, x_F: Float32) -> tuple[Float32, UnitCoder]:
        def encode(start: int, stop: int, codec: str | None) -> list[bytes]:
            return [
                adapter.frame(x_F[adapter.where.start - where.start :][: adapter.size])
                for adapter in self._adapters[start:stop]
            ]

        return self._theta_N[where] - x_F, encode

    def _outer_step(self, unit: int, payload: bytes) -> None:
        adapter = self._adapters[unit]
        new = adapter.decode(payload)
        old = self._theta_N[adapter.where]
        if np.linalg.norm(new - old) > _TURNED * np.linalg.norm(old):
            self.inner.forget(adapter.where)
        old[:] = new


def with_adapters(model: torch.nn.Module, method: MethodSpec, seed: int) -> torch.nn.Module:
    """`model` (taken over), frozen, with adapters; A from the seed, B zero, on every peer alike.

    Raises:
        ManifestError: the targets fit no layer.
    """
    peft_model = adapt_by_peft(model, method)
    for name, parameter in peft_model.named_parameters():
        if ".lora_A." in name:
            bound = 1 / np.sqrt(parameter.shape[1])  # peft's own: Kaiming uniform, a = sqrt 5
            drawn = generator_of(seed, name).uniform(-bound, bound, tuple(parameter.shape))
            parameter.data.copy_(torch.from_numpy(drawn.astype(np.float32)))
        elif ".lora_B." in name:
            parameter.data.zero_()
    return peft_model


def save_merged(model: torch.nn.Module, folder: Path) -> None:
    """Write a model of `with_adapters`, merged, to `folder` and the adapter to `folder`/adapter.

    Raises:
        StorageError: the disk is full or not writable.
    """
    merged = copy.deepcopy(model).merge_and_unload()  # type: ignore[operator]
    save_model(merged, folder)
    cast("Any", model).save_pretrained(str(folder / "adapter"), save_embedding_layers=False)
    note_base(folder / "adapter", base_digest(model))


def adapt_by_peft(model: torch.nn.Module, method: MethodSpec) -> torch.nn.Module:
    """`model` (taken over) in peft's hands, with the manifest's adapters.

    Raises:
        ManifestError: the targets fit no layer.
    """
    from peft import LoraConfig, get_peft_model
    from transformers.pytorch_utils import Conv1D

    config = LoraConfig(
        task_type="CAUSAL_LM",
        r=method.rank,
        lora_alpha=method.alpha,
        lora_dropout=method.dropout,
        target_modules=list(method.targets) or "all-linear",
        fan_in_fan_out=any(isinstance(module, Conv1D) for module in model.modules()),
        bias="none",
    )
    try:
        with warnings.catch_warnings():  # peft still asks transformers 5 the way of transformers 4
            warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing")
            return cast("torch.nn.Module", get_peft_model(cast("Any", model), config))
    except ValueError as error:
        raise ManifestError(
            f"method.targets: fit no layer of this model ({str(error)[:200]}); correct them"
        ) from None


def _adapters(inner: LocalValues) -> list[Adapter]:
    """The pairs in canonical order: by name, A lies right before its B."""
    layout = inner.layout
    found = []
    for i in range(0, len(layout.names), 2):
        name, (r, n), (m, rank) = layout.names[i], *map(tuple, layout.shapes[i : i + 2])
        start = layout.offsets[i]
        stop = start + r * (m + n)
        assert ".lora_A." in name, name
        assert layout.names[i + 1] == name.replace(".lora_A.", ".lora_B."), name
        assert rank == r, name
        found.append(check_adapter(Adapter(name, m, r, n, slice(start, stop))))
    return found


def check_adapter(adapter: Adapter, room: int = 0) -> Adapter:
    """The adapter itself. `room`: bytes that are sent beside its factors.

    Raises:
        ManifestError: its rank is more than the layer has, or than a message holds.
    """
    m, r, n = adapter.m, adapter.r, adapter.n
    if r > min(m, n):
        raise ManifestError(
            f"method.rank: {r} is more than the smaller side of {adapter.name} ({m} x {n}); lower"
            " it or leave that layer out of method.targets"
        )
    bytes_max = _HEADER.size + room + _CODEC.bytes_max(adapter.size)
    if adapter.size > FRAME_VALUES_MAX or bytes_max > limits.UNIT_BYTES_MAX:
        raise ManifestError(f"method.rank: {r} makes factors too large to send; lower it")
    return adapter
