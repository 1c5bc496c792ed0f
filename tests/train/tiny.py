"""The smallest runs that are still runs."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import torch

from peer.manifest import (
    CodecSpec,
    DataSpec,
    InnerSpec,
    Manifest,
    MethodSpec,
    ModelSpec,
    OuterSpec,
    ScheduleSpec,
)
from peer.train import build_method
from peer.train.flat import FlatMethod, FrozenWork
from peer.train.inner import Inner

CONFIG: dict[str, Any] = {
    "model_type": "llama",
    "vocab_size": 260,
    "hidden_size": 32,
    "intermediate_size": 640,  # enough for two units
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 64,
    "tie_word_embeddings": True,
    "bos_token_id": 256,
    "eos_token_id": 256,
}


def manifest(
    kind: str = "pretrain", *, lr: float = 0.7, momentum: float = 0.9, codec: str = "fp32",
    fragments: int = 1, tau: int = 0, alpha: float = 0.0,
) -> Manifest:  # fmt: skip
    assert kind in ("pretrain", "lora")
    return Manifest(
        name="tiny",
        model=ModelSpec(config=dict(CONFIG)),
        data=DataSpec(sequence_length=16, block_samples=4),
        method=MethodSpec(kind="lora" if kind == "lora" else "pretrain", rank=4),
        inner=InnerSpec(lr=1e-2, warmup_steps=2, batch_size=4),
        outer=OuterSpec(lr=lr, momentum=momentum, tau=tau, alpha=alpha),
        codec=CodecSpec(name=codec),
        schedule=ScheduleSpec(gossip_every=0 if kind == "lora" else 4, fragments=fragments),
    )


def method(kind: str = "pretrain", **changes: Any) -> FlatMethod:
    return built(manifest(kind, **changes))


def built(run: Manifest) -> FlatMethod:
    """The method of a run of all weights, or of adapters alone."""
    made = build_method(run, device="cpu", threads=1)
    assert isinstance(made, FlatMethod)
    return made


def inner_of(method: FlatMethod) -> Inner:
    """What trains the method's local values."""
    assert isinstance(method.inner, Inner)
    return method.inner


def batch(seed: int) -> torch.Tensor:
    """(4, 16) ids that a model can learn: counting up from a random byte."""
    rng = random.Random(seed)
    starts = torch.tensor([[rng.randrange(200)] for _ in range(4)])
    return starts + torch.arange(16)


def reduce(method: FlatMethod, parts: list[FrozenWork], only: range | None = None) -> list[bytes]:
    """What one aggregator of everything, or `only` of a fragment, would send back."""
    reducer = method.reducer()
    chosen = range(method.units) if only is None else only
    coded = [part.encode(chosen.start, chosen.stop) for part in parts]
    means = []
    for index, unit in enumerate(chosen):
        for units in coded:
            reducer.check(unit, units[index])
        pairs = [(part.weight, units[index]) for part, units in zip(parts, coded, strict=True)]
        reduced = reducer.reduce(unit, [pair for pair in pairs if pair[0] > 0])
        assert not reduced.refused
        means.append(reduced.payload)
    return means


def everywhere(method: FlatMethod, mine: bool) -> np.ndarray[Any, np.dtype[np.bool_]]:
    return np.full(method.units, mine)
