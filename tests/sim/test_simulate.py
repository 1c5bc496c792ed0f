"""Scenarios as sentences, lived through by the product's own code in virtual time."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
import xml.etree.ElementTree as ElementTree

import numpy as np
import pytest

from peer.exchange import Outcome
from peer.observe import events as ev
from peer.own_work import OwnWork
from peer.simulate.books import History
from peer.simulate.links import Line, Path, PathSpec, goodput_bps
from peer.simulate.loop import StandstillError, VirtualLoop
from peer.simulate.nodes import Node
from peer.simulate.planning import plan
from peer.simulate.report import figures, to_json, to_text
from peer.simulate.scenario import Fault, Kind, Lie, Scenario, draw
from peer.simulate.timeline import draw_timeline
from peer.simulate.world import Record, World, simulate
from protocols import limits
from protocols.types import Digest
from tests.pages import ROOT


def village(peers: int = 4, minutes: float = 2.0, **changes: object) -> Scenario:
    """A few peers at one place, rounds of six seconds."""
    scenario = plan(
        1, peers=peers, minutes=minutes, sites=1, round_s=6.0, exchange_s=8.0, parameters=1e5
    )
    return dataclasses.replace(scenario, **changes)  # type: ignore[arg-type]


def broken(kind: Kind, at_s: float, seconds: float, *targets: int) -> Fault:
    return Fault(at_s=at_s, kind=kind, targets=targets, seconds=seconds)


def kept(record: Record) -> Record:
    """Its promises held; the story else."""
    assert not record.violations, to_text(record)
    return record


def test_a_model_of_gigabytes_begins_and_goes_on_together() -> None:
    """Nobody waits for a state that the manifest makes; no member is left behind where an outcome
    takes longer to arrive than a round is long."""
    scenario = plan(
        5, peers=8, minutes=5.0, sites=1, round_s=10.0, rate_bps=5e8, parameters=2e9,
        exchange_s=120.0, units=256,
    )  # fmt: skip
    world = World(dataclasses.replace(scenario, aggregators_max=8, round_s_max=80.0))
    fetched: list[int] = []
    rosters: set[int] = set()
    carried_over = 0.0

    def listen(_: float, node: Node, event: ev.Event) -> None:
        nonlocal carried_over
        if isinstance(event, ev.WorkCarriedOver):
            carried_over += event.tokens
        if isinstance(event, ev.StateReceived):
            fetched.append(node.index)
        if isinstance(event, ev.RoundPlanned) and event.round > 0:
            rosters.add(len(event.roster))

    world.listen(listen)
    record = kept(world.run())
    assert not fetched
    assert rosters == {8}
    offered = sum(fact.tokens for fact in record.rounds)
    assert carried_over < 0.05 * offered
    assert len(record.rounds) >= 4


# ── time ─────────────────────────────────────────────────────────────────────────────────
def test_an_hour_passes_at_once() -> None:
    import asyncio

    async def wait() -> float:
        before_s = asyncio.get_running_loop().time()
        await asyncio.sleep(3600)
        return asyncio.get_running_loop().time() - before_s

    loop = VirtualLoop()
    assert loop.run_until_complete(wait()) == pytest.approx(3600)
    loop.close()


def test_waiting_for_what_cannot_come_is_told_and_not_waited_for() -> None:
    loop = VirtualLoop()
    with pytest.raises(StandstillError):
        loop.run_until_complete(loop.create_future())
    loop.close()


# ── links ────────────────────────────────────────────────────────────────────────────────
def test_a_connection_is_slower_the_more_is_lost_and_the_longer_the_way() -> None:
    rates = [goodput_bps(0.05, loss) for loss in (0.0, 0.001, 0.01, 0.1)]
    assert rates == sorted(rates, reverse=True)
    assert goodput_bps(0.01, 0.01) > goodput_bps(0.1, 0.01)
    # 1 % at 50 ms: between Mathis' bound (1.22 packets a round trip over sqrt(loss)) and its half.
    mathis = 8 * 1200 * 1.22 / 0.05 / 0.1
    assert 0.5 * mathis < goodput_bps(0.05, 0.01) <= 1.05 * mathis


def test_control_goes_ahead_of_bulk_and_bulk_waits_the_longer() -> None:
    line = Line(8e6)
    assert line.bulk(1_000_000, 0.0) == (0.0, 1.0)
    assert line.control(1000, 0.0) == pytest.approx(0.001)
    assert line.bulk(1000, 0.0)[0] == pytest.approx(1.001)


def test_a_lost_message_comes_later_and_never_not_at_all() -> None:
    import random

    path = Path(PathSpec(latency_s=0.01, loss=0.3), random.Random(1))
    delays = [path.delay_s(100, 0.0) for _ in range(1000)]
    assert min(delays) == pytest.approx(0.01)
    late = sum(delay > 0.1 for delay in delays) / len(delays)
    assert 0.25 < late < 0.35


# ── stories ──────────────────────────────────────────────────────────────────────────────
def test_a_quiet_village_trains_together_and_all_are_inside() -> None:
    record = kept(simulate(village()))
    total = figures(record)
    assert total.rounds >= 12
    assert total.participation > 0.9
    assert total.utilisation > 0.9


def test_a_member_that_crashes_comes_back_and_takes_part_again() -> None:
    record = kept(simulate(village(faults=(broken(Kind.crash, 40, 10, 2),))))
    assert record.tallies[2].rounds >= 8
    assert figures(record).stood_still_s == 0.0


def test_a_member_whose_disk_was_wiped_gets_the_state_from_another() -> None:
    world = World(village(faults=(broken(Kind.wipe, 40, 10, 2),)))
    received: list[float] = []

    def listen(now_s: float, node: Node, event: ev.Event) -> None:
        if node.index == 2 and isinstance(event, ev.StateReceived):
            received.append(now_s)

    world.listen(listen)
    kept(world.run())
    assert any(50 < at_s < 70 for at_s in received)


def test_a_state_that_takes_longer_than_outcomes_are_kept_is_fetched_once() -> None:
    scenario = village(4, 5.0, faults=(broken(Kind.wipe, 40, 10, 2),))
    load = dataclasses.replace(scenario.load, state_bytes=1_500_000_000)
    world = World(dataclasses.replace(scenario, load=load))
    states: list[ev.StateReceived] = []
    caught: list[int] = []

    def listen(_: float, node: Node, event: ev.Event) -> None:
        if node.index == 2 and isinstance(event, ev.StateReceived):
            states.append(event)
        if node.index == 2 and isinstance(event, ev.CaughtUp):
            caught.append(event.round)

    world.listen(listen)
    record = kept(world.run())
    (state,) = states
    assert len(state.given) == 3
    assert state.seconds > 2 * limits.OUTCOME_ROUNDS_KEPT * 6.0
    assert caught == list(range(state.round, state.round + len(caught)))
    assert len(caught) > 2 * limits.OUTCOME_ROUNDS_KEPT
    last = [tally.rounds for tally in record.tallies]
    assert min(last) > max(last) - 4


def test_a_frozen_member_is_passed_over_and_catches_up() -> None:
    record = kept(simulate(village(faults=(broken(Kind.freeze, 40, 15, 1),))))
    assert min(tally.rounds for tally in record.tallies) >= 10


def test_two_halves_that_could_not_talk_agree_again() -> None:
    kept(simulate(village(6, 3.0, faults=(broken(Kind.cut, 40, 20, 0, 1),))))


def test_without_bootstrap_nodes_those_who_know_each_other_go_on() -> None:
    faults = (broken(Kind.entrance, 20, 60, 0, 1), broken(Kind.crash, 40, 10, 3))
    record = kept(simulate(village(faults=faults)))
    assert record.tallies[3].rounds >= 8


@pytest.mark.parametrize("lie", [lie for lie in Lie if lie])
def test_one_liar_among_five_breaks_nobody_elses_promises(lie: Lie) -> None:
    scenario = village(5)
    liar = dataclasses.replace(scenario.peers[-1], lie=lie)
    record = simulate(dataclasses.replace(scenario, peers=(*scenario.peers[:-1], liar)))
    kept(record)
    assert all(tally.rounds >= 8 for tally in record.tallies[:-1])


def test_a_loss_of_packets_costs_time_and_no_work() -> None:
    clear = kept(simulate(village()))
    lossy = kept(simulate(village(loss=0.05)))
    clear_s, lossy_s = (sum(seconds for _, _, seconds in r.exchanges) for r in (clear, lossy))
    assert lossy_s > 1.05 * clear_s
    assert figures(lossy).participation > 0.9


# ── the same again ───────────────────────────────────────────────────────────────────────
def test_equal_seeds_have_equal_histories_whatever_the_hash_seed() -> None:
    program = (
        "from peer.simulate.scenario import draw; from peer.simulate.world import simulate;"
        "print(simulate(draw(3, peers=5, duration_s=130)).digest)"
    )
    digests = set()
    for hash_seed in ("0", "4242"):
        environment = {
            **os.environ,
            "PYTHONHASHSEED": hash_seed,
            "PYTHONPATH": os.pathsep.join((str(ROOT), str(ROOT / "codecs"))),
        }
        told = subprocess.run(
            [sys.executable, "-c", program], env=environment, capture_output=True, text=True,
            check=True, cwd=ROOT,
        )  # fmt: skip
        digests.add(told.stdout.strip())
    assert len(digests) == 1
    assert simulate(draw(4, peers=5, duration_s=130)).digest not in digests


def test_a_scenario_is_a_pure_function_of_its_seed() -> None:
    assert draw(7) == draw(7)
    assert draw(7) != draw(8)


# ── the judge ────────────────────────────────────────────────────────────────────────────
def test_work_that_is_applied_twice_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """A learner that forgets what got inside sends the same work again."""
    monkeypatch.setattr(OwnWork, "inside", lambda *_: np.zeros(16, np.bool_))
    record = simulate(village(2, 0.7))
    assert {v.promise for v in record.violations} >= {"nothing is applied twice"}
    assert "--seed" in to_text(record)


def test_a_mean_of_something_else_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    from peer.simulate import learner

    true = learner.SimReducer.reduce

    def skewed(self: object, unit: int, parts: object) -> object:
        return true(self, unit, [(w * (1 + i), p) for i, (w, p) in enumerate(parts)])  # type: ignore[arg-type,var-annotated]

    monkeypatch.setattr(learner.SimReducer, "reduce", skewed)
    record = simulate(village(2, 0.7))
    assert {v.promise for v in record.violations} == {"mass is conserved"}


# ── telling ──────────────────────────────────────────────────────────────────────────────
def test_the_report_is_json_and_the_picture_is_xml() -> None:
    record = simulate(village(3, 1.5, faults=(broken(Kind.crash, 30, 10, 1),)))
    told = json.loads(json.dumps(to_json(record)))
    assert told["figures"]["peers"] == 3
    picture = ElementTree.fromstring(draw_timeline(record))
    assert picture.tag.endswith("svg")
    assert "crash" in draw_timeline(record)


def test_a_loner_that_dies_before_its_disk_had_a_round_may_do_it_again() -> None:
    """Nobody else has seen the first outcome, so there is one (seed 20058 with 5 peers)."""
    quiet = plan(1, peers=2, minutes=2.0, sites=2, round_s=6.0, exchange_s=8.0, parameters=1e5)
    slow = tuple(dataclasses.replace(spec, disk_s=4.0) for spec in quiet.peers)
    for at_s in (38.0, 40.0, 42.0):
        faults = (broken(Kind.outage, at_s, 5, 1),)
        kept(simulate(dataclasses.replace(quiet, peers=slow, faults=faults)))


def test_two_outcomes_of_one_span_and_epoch_are_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """An aggregator whose members get means of different bytes, each properly signed."""
    from peer.simulate.judge import Judge

    honest = Judge._one_content
    seen: list[int] = []

    def doubting(self: Judge, node: Node, outcome: Outcome, before: History) -> None:
        seen.append(node.index)
        header = outcome.header
        if len(set(seen)) > 1 and node.index == seen[-1] != seen[0]:
            header = dataclasses.replace(header, content=Digest(bytes(32)))
        honest(self, node, dataclasses.replace(outcome, header=header), before)

    monkeypatch.setattr(Judge, "_one_content", doubting)
    record = simulate(village(2, 0.7))
    assert {v.promise for v in record.violations} == {"one outcome per span and epoch"}


def test_an_outcome_that_died_with_its_maker_never_was() -> None:
    """A loner closed a round, then lost its disk; it did the round again with another, who was the
    first to apply it."""
    kept(simulate(draw(700000560, peers=2, duration_s=150.0)))


def test_who_took_a_state_goes_on_from_it_even_while_its_own_round_ends() -> None:
    """A loner's round was due while it fetched its neighbour's state: it stood still ever after."""
    record = simulate(draw(62530, peers=4))
    assert not record.violations, to_text(record)
