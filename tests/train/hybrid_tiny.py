"""Small hybrid runs: peers of every kind, and rounds of them in one process."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch

from peer.manifest import CodecSpec, Manifest, MethodSpec
from peer.train.flat import FrozenWork
from peer.train.hybrid import HybridMethod
from peer.train.means import Means
from peer.train.models import build_model
from tests.train.tiny import manifest

RANK = 4
LORA4 = Means("lora", 4)
LORA2 = Means("lora", 2)
ZO = Means("zo", 2, 8)
FULL = Means("full", 0)


def hybrid_manifest(codec: str = "fp32", **changes: Any) -> Manifest:
    spec = MethodSpec(kind="hybrid", rank=RANK, alpha=8.0, **changes)
    return replace(manifest("lora"), method=spec, codec=CodecSpec(name=codec))


def peer(means: Means, run: Manifest | None = None, seed: int = 1) -> HybridMethod:
    run = run or hybrid_manifest()
    return HybridMethod(build_model(run, None), run, torch.device("cpu"), means, seed=seed)


def close(
    aggregator: HybridMethod, parts: Sequence[FrozenWork]
) -> tuple[list[bytes], list[tuple[int, str]]]:
    """What one aggregator of everything would send, and whom it refuses for what."""
    reducer = aggregator.reducer()
    coded = [part.encode(0, aggregator.units) for part in parts]
    outcome: list[bytes] = []
    refused: list[tuple[int, str]] = []
    for unit in range(aggregator.units):
        for units in coded:
            reducer.check(unit, units[unit])
        pairs = [(p.weight, u[unit]) for p, u in zip(parts, coded, strict=True) if p.weight > 0]
        reduced = reducer.reduce(unit, pairs)
        outcome.append(reduced.payload)
        refused += reduced.refused
    return outcome, refused


def inside(method: HybridMethod, mine: bool = True) -> np.ndarray[Any, np.dtype[np.bool_]]:
    return np.full(method.units, mine)
