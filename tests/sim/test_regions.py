"""One group on two continents: what crosses between them is summed up first, and none is lost."""

from __future__ import annotations

import dataclasses
import random
from typing import Any

import pytest

from peer.observe import events as ev
from peer.simulate import network
from peer.simulate.nodes import Node
from peer.simulate.planning import plan
from peer.simulate.report import figures, to_text
from peer.simulate.scenario import Fault, Kind, Scenario, draw_faults
from peer.simulate.world import World

FAR_KM = 8000.0  # 40 ms one way
EACH = 4


def two_places(*faults: Fault, minutes: float = 6.0, seed: int = 3, **changes: Any) -> Scenario:
    """`EACH` peers at each of two places, with one label."""
    scenario = plan(
        seed, peers=2 * EACH, minutes=minutes, sites=1, round_s=10.0, exchange_s=20.0,
        parameters=5e6, units=16, rate_bps=2e7, latency_s=0.001,
    )  # fmt: skip
    specs = tuple(
        dataclasses.replace(spec, site="one", place_km=(FAR_KM * (index % 2), 0.0))
        for index, spec in enumerate(scenario.peers)
    )
    return dataclasses.replace(
        scenario, peers=specs, faults=faults, aggregators_max=2 * EACH, **changes
    )


class Watch:
    """Plans, outcomes, and bulk between the two places."""

    def __init__(self, world: World, monkeypatch: pytest.MonkeyPatch) -> None:
        self.world = world
        self.across = 0
        """Bytes."""
        put = network._Half.put

        def counted(half: Any, size: int, frame: Any) -> None:
            if half._source.machine.index % 2 != half._target.machine.index % 2:
                self.across += size
            put(half, size, frame)

        monkeypatch.setattr(network._Half, "put", counted)
        self.regions: list[tuple[float, list[int]]] = []
        world.listen(self._listen)

    def _listen(self, at_s: float, node: Node, event: ev.Event) -> None:
        current = node.group.current if node.group is not None else None
        if isinstance(event, ev.RoundPlanned) and current is not None:
            where = {n.id: n.index % 2 for n in self.world.nodes}
            seats = current.plan.roster
            self.regions.append((at_s, [s.region for s in seats]))
            if at_s > 60 and len({s.region for s in seats}) == 2:
                by = {r: {where[s.peer] for s in seats if s.region == r} for r in (0, 1)}
                assert all(len(places) == 1 for places in by.values()), "regions are places"


def test_regions_are_the_places_and_a_quarter_crosses(monkeypatch: pytest.MonkeyPatch) -> None:
    across, rounds, participation = {}, {}, {}
    for collect in (False, True):
        with monkeypatch.context() as patch:
            world = World(two_places(collect=collect))
            watch = Watch(world, patch)
            record = world.run()
            assert not record.violations, to_text(record)
            late = [regions for at_s, regions in watch.regions if at_s > 60]
            assert late
            assert all((set(regions) == {0, 1}) == collect for regions in late)
            across[collect] = watch.across
            total = figures(record)
            rounds[collect], participation[collect] = total.peer_rounds, total.participation
    assert participation[True] >= participation[False] - 0.01
    assert rounds[True] >= rounds[False]
    # One sum and one outcome cross for each span, not one of each for each of four peers.
    assert across[True] / rounds[True] < 0.3 * across[False] / rounds[False]


@pytest.mark.parametrize("kind", [Kind.crash, Kind.freeze, Kind.flap])
def test_a_collector_that_fails_costs_nobody_elses_work(
    kind: Kind, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every peer collects for somebody: whoever fails, its neighbours find another way."""
    faults = tuple(
        Fault(at_s=60.0 + 40.0 * i, kind=kind, targets=(i,), seconds=15.0) for i in range(1, 6)
    )
    participation = {}
    for collect in (False, True):
        world = World(two_places(*faults, collect=collect))
        watch = Watch(world, monkeypatch)
        record = world.run()
        assert not record.violations, to_text(record)
        participation[collect] = figures(record).participation
    assert any(len(set(regions)) == 2 for _, regions in watch.regions)
    assert participation[True] > participation[False] - 0.05


@pytest.mark.parametrize("seed", range(6))
def test_two_places_survive_what_a_group_survives(seed: int) -> None:
    rng = random.Random(seed)
    faults = draw_faults(rng, 2 * EACH, 2, 200.0, 60.0, 240.0)
    record = World(two_places(*faults, seed=seed, minutes=5.5, loss=0.02)).run()
    assert not record.violations, to_text(record)
