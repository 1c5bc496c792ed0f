"""Zeroth-order runs of a few small peers, round by round, without a network."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from peer.manifest import InnerSpec, Manifest
from peer.manifest_zeroth import ZerothSpec
from peer.train import build_method
from peer.train.method import SignedReducer
from peer.train.zeroth import SignedWork, ZerothMethod
from protocols.identity import Signer
from protocols.types import PeerId
from tensorcodecs import Reduced
from tests.train.tiny import batch, manifest

SMALL = {"intermediate_size": 64}


def signer(number: int) -> Signer:
    return Signer(bytes([number]) * 32)


def zo_manifest(lr: float = 0.05, **spec: Any) -> Manifest:
    """Two local steps of two directions on adapters, unless told otherwise."""
    given: dict[str, Any] = {"perturbations": 2, "eps": 1e-2} | spec
    made = manifest("lora")
    return dataclasses.replace(
        made,
        model=dataclasses.replace(made.model, config=made.model.config | SMALL),
        method=dataclasses.replace(made.method, kind="zo"),
        inner=InnerSpec(lr=lr, batch_size=4),
        zeroth=ZerothSpec(**given),
    )


def build(
    made: Manifest,
    who: int | None = 1,
    half: bool = False,
    folder: Path | None = None,
    say: Callable[[str], None] = lambda _: None,
    signer: Signer | None = None,
) -> ZerothMethod:
    """Peer number `who`'s method (or `signer`'s), or one that only looks."""
    key = signer if who is None else Signer(bytes([who]) * 32)
    method = build_method(made, folder, device="cpu", threads=1, signer=key, say=say)
    assert isinstance(method, ZerothMethod)
    method._half = half
    return method


def work(method: ZerothMethod, seed: int, steps: int = 1) -> SignedWork:
    for step in range(steps):
        method.step(batch(100 * seed + step))
    return method.contribution()


def reduce(method: ZerothMethod, parts: Sequence[tuple[int, SignedWork]]) -> Reduced:
    """What an aggregator with `method` makes of them."""
    reducer = method.reducer()
    assert isinstance(reducer, SignedReducer)
    rows = []
    for who, part in sorted(parts, key=lambda row: signer(row[0]).peer_id):
        (payload,) = part.encode(0, 1)
        reducer.check(0, payload)
        rows.append((PeerId(signer(who).peer_id), part.weight, payload))
    return reducer.reduce_signed(0, method.digest(), rows)


def mine(yes: bool = True) -> np.ndarray[Any, np.dtype[np.bool_]]:
    return np.array([yes])


class Company:
    """Peers 1, 2, ... of one run."""

    def __init__(self, made: Manifest, count: int, halves: Sequence[bool] = ()) -> None:
        self.manifest = made
        self.methods = [
            build(made, who, halves[who - 1] if halves else False) for who in range(1, count + 1)
        ]
        self.rounds = 0

    def play(self, rounds: int = 1, steps: int = 1) -> bytes:
        """Everybody measures, the first one aggregates, everybody applies; the last record."""
        record = b""
        for _ in range(rounds):
            parts = [
                (who, work(method, 10 * self.rounds + who, steps))
                for who, method in enumerate(self.methods, 1)
            ]
            reduced = reduce(self.methods[0], parts)
            assert not reduced.refused
            record = reduced.payload
            for method in self.methods:
                method.apply([record], mine())
                assert not method.refusal
            self.rounds += 1
        return record

    def loss(self) -> float:
        return self.methods[0].evaluate([batch(9001), batch(9002)])

    def agree(self) -> bytes:
        """The digest, after a look whether everybody's values are the same as well."""
        assert len({method.weights.digest() for method in self.methods}) == 1
        (digest,) = {method.digest() for method in self.methods}
        return digest


def values(method: ZerothMethod) -> dict[str, torch.Tensor]:
    return method.weights.state()
