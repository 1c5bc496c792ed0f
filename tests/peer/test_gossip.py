"""Two groups of whole peers, in one process: they learn apart and stay together."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np

from peer.manifest import Manifest
from peer.observe import events as ev
from tests.peer.swarm import Swarm, swarm, toy_manifest


def manifest(every: int) -> Manifest:
    plain = toy_manifest(round_s=0.5)
    schedule = dataclasses.replace(plain.schedule, gossip_every=every, gossip_slots=2)
    return dataclasses.replace(plain, schedule=schedule)


async def two_groups(it: Swarm) -> None:
    """a and b at one site, c and d at another."""
    await it.start("a", site="east")
    await it.start("b", via="a", site="east")
    await it.start("c", via="a", site="west")
    await it.start("d", via="c", site="west")


def said(it: Swarm, names: str, kind: type[ev.MixSettled | ev.MixReturned]) -> bool:
    return any(it.all(name, kind) for name in names)


async def theta(it: Swarm, name: str) -> np.ndarray:
    state = await it.peers[name]._learner.snapshot()
    return np.asarray(state.arrays["theta"], np.float64)


async def test_two_groups_mix_and_both_sides_say_so(tmp_path: Path) -> None:
    async with swarm(tmp_path, manifest(1)) as it:
        await two_groups(it)
        east, west = "ab", "cd"
        await it.until(lambda: all(it.all(n, ev.MixCommitted) for n in "abcd"), within_s=60)
        both = (east, west)
        await it.until(lambda: all(said(it, g, ev.MixSettled) for g in both), within_s=60)
        await it.until(lambda: all(said(it, g, ev.MixReturned) for g in both), within_s=60)
        for names in both:
            seen: dict[int, set[str]] = {}
            for name in names:
                for r in it.finished(name):
                    seen.setdefault(r.round, set()).add(r.digest)
            assert all(len(digests) == 1 for digests in seen.values())
        assert not any(it.all(n, ev.MixLost) for n in "abcd")
        assert not any(it.all(n, ev.DigestDiffered) for n in "abcd")


async def test_groups_that_gossip_stay_near_each_other(tmp_path: Path) -> None:
    """Their targets differ by as much as either is large; what they hold in common does not."""
    gaps = {}
    for every in (0, 1):
        async with swarm(tmp_path / str(every), manifest(every)) as it:
            await two_groups(it)
            await it.until(lambda: all(len(it.finished(n)) >= 25 for n in "ac"), within_s=120)
            if every:  # a busy machine makes fewer of them in as many rounds
                await it.until(
                    lambda: all(len(it.all(n, ev.MixCommitted)) >= 10 for n in "ac"), within_s=90
                )
            a, c = await theta(it, "a"), await theta(it, "c")
            gaps[every] = float(np.linalg.norm(a - c) / np.linalg.norm(a + c))
    assert gaps[1] < 0.9 * gaps[0], gaps
