"""Zeroth-order runs over whole peers' real rounds, in one process."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from peer.config import PeerConfig
from peer.exchange import Exchange
from peer.home import Seat
from peer.manifest import Manifest, ScheduleSpec
from peer.observe import events as ev
from peer.observe.hub import Hub
from peer.train.method import DataSource, Method
from peer.train.zeroth import ZerothMethod
from protocols.identity import Signer
from protocols.types import PeerId
from tests.peer.swarm import InMemory, Swarm
from tests.train.tiny import batch
from tests.train.zo_tiny import build as build_tiny
from tests.train.zo_tiny import zo_manifest


class Counting:
    """Ids that count up, as `tests.train.tiny.batch`, a block at a time."""

    blocks = 64

    def block(self, index: int, epoch: int) -> list[torch.Tensor]:
        return list(batch(index))

    def validation(self) -> list[torch.Tensor]:
        return list(torch.cat([batch(9001), batch(9002)]))


class ZoSwarm(Swarm):
    """Peers of a zeroth-order run; those called `half...` compute in bfloat16."""

    def __init__(self, folder: Path, manifest: Manifest) -> None:
        super().__init__(folder, manifest)
        self.methods: dict[str, ZerothMethod] = {}
        self._signers: dict[str, Signer] = {}

    async def _open(self, config: PeerConfig, seat: Seat, signer: Signer, hub: Hub) -> InMemory:
        assert config.home is not None
        self._signers[config.home.name] = signer
        return await super()._open(config, seat, signer, hub)

    def _build(self, name: str) -> Callable[[Manifest, Path], tuple[Method, DataSource]]:
        def build(manifest: Manifest, assets: Path) -> tuple[Method, DataSource]:
            made = build_tiny(
                manifest, None, half=name.startswith("half"), signer=self._signers[name]
            )
            self.methods[name] = made
            return made, Counting()

        return build

    def digests(self, name: str) -> dict[int, str]:
        return {event.round: event.digest for event in self.finished(name)}

    def complete(self, names: Sequence[str]) -> bool:
        """Whether everybody's last round held everybody's work."""
        ids = {self.network_id(name) for name in names}
        return all(
            self.finished(name) and set(self.finished(name)[-1].spans[0].contributors) == ids
            for name in names
        )

    async def end(self) -> None:
        for name in list(self._tasks):
            await self.stop(name)


def short(**spec: Any) -> Manifest:
    made = zo_manifest(**spec)
    schedule = ScheduleSpec(
        round_s=0.6, exchange_s=6.0, evaluate_every=1, checkpoint_every=3, gossip_every=0
    )
    return dataclasses.replace(made, schedule=schedule)


@pytest.fixture
def sizes(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Bytes of each contribution's payload, as its aggregator received it from another peer."""
    seen: list[int] = []
    check = Exchange._check

    async def noted(self: Exchange, sender: PeerId, batch: Sequence[tuple[int, bytes]]) -> None:
        seen.append(sum(len(payload) for _, payload in batch))
        await check(self, sender, batch)

    monkeypatch.setattr(Exchange, "_check", noted)
    return seen


@pytest.mark.parametrize(
    ("spec", "bytes_max"),
    [
        ({"steps": 4, "perturbations": 4, "adapters": False, "eps": 1e-3}, 100),
        ({"estimator": "kseed", "pool": 4096}, 16_400),
    ],
    ids=["decomfl on all weights", "kseed on adapters"],
)
async def test_peers_of_two_types_train_and_a_late_one_replays_to_the_same_values(
    tmp_path: Path, spec: dict[str, Any], bytes_max: int, sizes: list[int]
) -> None:
    it = ZoSwarm(tmp_path, short(**spec))
    names = ["a", "half"]
    try:
        await it.start("a")
        await it.start("half", via="a")
        await it.until(lambda: it.complete(names))
        it.forget_rounds("a")
        await it.until(lambda: len(it.finished("a")) >= 2)
        await it.start("late", via="a")
        await it.until(lambda: it.complete([*names, "late"]))
        assert it.all("late", ev.StateReceived)
        everybody = [*names, "late"]
        seen: dict[int, set[str]] = {}
        for name in everybody:
            for number, digest in it.digests(name).items():
                seen.setdefault(number, set()).add(digest)
        assert all(len(digests) == 1 for digests in seen.values())
        assert not any(it.all(name, ev.DigestDiffered) for name in everybody)
        assert not any(it.all(name, ev.PeerRefused) for name in everybody)
        assert sizes
        assert max(sizes) <= bytes_max
    finally:
        await it.end()
    # Their values, whatever they were computed with: of those that ended at the same round.
    ends: dict[bytes, set[bytes]] = {}
    for name in ("a", "half", "late"):
        method = it.methods[name]
        ends.setdefault(method.digest(), set()).add(method.weights.digest())
    assert all(len(values) == 1 for values in ends.values())
