"""Strangers train one model: joining, killing, freezing, leaving, over real libp2p."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

import pytest

from tests.e2e.processes import Fleet, Process, check_agreement, check_ledgers, check_once, fleet

EXCHANGE_S = 12.0  # of the manifest: nobody may wait longer for a round


async def four(it: Fleet) -> list[Process]:
    """Four peers that average together."""
    it.start("a", founder=True)
    await it.started("a")
    for name in "bcd":
        it.start(name, via="a")
    await it.together(*"abcd", within_s=120)
    return [it[n] for n in "abcd"]


def roles(process: Process) -> tuple[str, list[str]]:
    """(coordinator, aggregators) of the plan in force."""
    plan = process.last("RoundPlanned")
    assert plan is not None
    return plan["coordinator"], plan["aggregators"]


async def test_four_peers_join_one_after_another_agree_and_learn_more_than_one_alone(
    tmp_path: Path,
) -> None:
    async with fleet(tmp_path) as it:
        it.start("a", founder=True)
        await it.started("a")
        await it.until(lambda: len(it["a"].rounds) >= 1)
        for name in "bcd":
            it.start(name, via="a")
            await it.together(*"abcd"[: "abcd".index(name) + 1], within_s=60)
        start = it["a"].rounds[-1]["round"]
        await it.until(lambda: it["a"].rounds[-1]["round"] >= start + 6)
        processes = [it[n] for n in "abcd"]
        check_agreement(processes)
        check_once(processes)
        for fact in it["b"].rounds[-4:]:
            assert all(span["coverage"] == 1.0 for span in fact["spans"])
            assert fact["included"] == 1.0
        agreed = it["c"].last("DigestsAgreed")
        assert agreed is not None
        assert len(agreed["peers"]) == 4
        losses = [f["validation_loss"] for f in it["a"].rounds if f["validation_loss"] is not None]
        assert losses[-1] < losses[0]
        used = [
            {tuple(b) for f in p.all("ContributionSent")[-5:] for b in f["blocks"]}
            for p in processes
        ]
        for i, mine in enumerate(used):
            for theirs in used[i + 1 :]:
                assert not mine & theirs, "two peers trained on the same block"
        for name in "bcd":
            check_ledgers(it["a"], it[name])


@pytest.mark.parametrize("victim", ["coordinator", "aggregator"])
async def test_the_round_goes_on_when_its_coordinator_or_an_aggregator_is_killed_in_the_middle(
    tmp_path: Path, victim: str
) -> None:
    async with fleet(tmp_path) as it:
        processes = await four(it)
        counts = {p.name: len(p.all("ContributionSent")) for p in processes}
        # In the middle: somebody's work of the round is out, and nobody has applied it.
        await it.until(
            lambda: any(len(p.all("ContributionSent")) > counts[p.name] for p in processes)
        )
        coordinator, aggregators = roles(it["a"])
        target = coordinator if victim == "coordinator" else aggregators[-1]
        dead = next(p for p in processes if p.id == target)
        dead.signal(signal.SIGKILL)
        killed_s = time.monotonic()
        rest = [p for p in processes if p is not dead]
        ids = {p.id for p in rest}
        rounds = {p.name: len(p.rounds) for p in rest}
        await it.until(lambda: all(len(p.rounds) >= rounds[p.name] + 1 for p in rest), EXCHANGE_S)
        assert time.monotonic() - killed_s < EXCHANGE_S
        await it.until(
            lambda: all(set(p.rounds[-1]["spans"][0]["contributors"]) == ids for p in rest)
        )
        check_agreement(rest)
        check_once(rest)
        assert not any(p.all("DigestDiffered") for p in rest)


async def test_a_stopped_peer_is_left_behind_and_comes_back_into_step(tmp_path: Path) -> None:
    async with fleet(tmp_path) as it:
        processes = await four(it)
        _, aggregators = roles(it["a"])
        frozen = next(p for p in processes if p.id == aggregators[-1])
        rest = [p for p in processes if p is not frozen]
        rounds = {p.name: len(p.rounds) for p in rest}
        frozen.signal(signal.SIGSTOP)
        await it.until(lambda: all(len(p.rounds) >= rounds[p.name] + 3 for p in rest), 45)
        assert all(f["seconds"] < EXCHANGE_S for p in rest for f in p.rounds)
        check_agreement(rest)
        frozen.signal(signal.SIGCONT)
        await it.together(*"abcd", within_s=60)
        check_agreement(rest)
        check_once(rest)


async def test_a_peer_whose_network_daemon_is_killed_recovers(tmp_path: Path) -> None:
    async with fleet(tmp_path) as it:
        it.start("a", founder=True)
        await it.started("a")
        it.start("b", via="a")
        await it.together("a", "b")
        (daemon,) = it["b"].children()
        os.kill(daemon, signal.SIGKILL)
        await it.until(lambda: it["b"].all("DaemonRestarted"), 20)
        rounds = len(it["b"].rounds)
        await it.until(lambda: len(it["b"].rounds) >= rounds + 2)
        await it.together("a", "b", within_s=60)


async def test_two_sites_train_apart_and_survive_each_others_loss(tmp_path: Path) -> None:
    async with fleet(tmp_path) as it:
        it.start("a1", "--site", "a", founder=True)
        await it.started("a1")
        it.start("a2", "--site", "a", via="a1")
        it.start("b1", "--site", "b", via="a1")
        it.start("b2", "--site", "b", via="a1")
        await it.together("a1", "a2", within_s=90)
        await it.together("b1", "b2", within_s=90)
        check_agreement([it["a1"], it["a2"]])
        it["a1"].signal(signal.SIGKILL)
        it["a2"].signal(signal.SIGKILL)
        rounds = len(it["b1"].rounds)
        await it.until(lambda: len(it["b1"].rounds) >= rounds + 3)
        since = it["b1"].rounds[rounds]["round"]
        check_agreement([it["b1"], it["b2"]], since)


async def test_a_killed_peer_finds_its_run_and_its_state_again_by_itself(tmp_path: Path) -> None:
    async with fleet(tmp_path) as it:
        it.start("a", founder=True)
        await it.started("a")
        it.start("b", via="a")
        await it.together("a", "b")
        reported = it["b"].rounds[-1]["round"] + 1
        it["b"].signal(signal.SIGKILL)
        await it.until(lambda: it["b"].code is not None)
        it.start("b")  # no --via: it remembers
        await it.until(lambda: it["b"].all("CheckpointLoaded"))
        loaded = it["b"].all("CheckpointLoaded")[0]
        assert loaded["round"] >= reported
        await it.together("a", "b", within_s=60)
        # On a busy machine b may have gone on alone for a round before it heard of a.
        since = it["b"].rounds[-1]["round"]
        await it.until(lambda: it["b"].rounds[-1]["round"] >= since + 2)
        await it.until(lambda: it["a"].rounds[-1]["round"] >= since + 2)
        check_agreement([it["a"], it["b"]], since)


async def test_the_last_one_standing_restarts_the_run_from_its_disk(tmp_path: Path) -> None:
    async with fleet(tmp_path) as it:
        it.start("a", founder=True)
        await it.until(lambda: len(it["a"].rounds) >= 3)
        reported = it["a"].rounds[-1]["round"] + 1
        it["a"].signal(signal.SIGKILL)
        await it.until(lambda: it["a"].code is not None)
        it.start("a")
        await it.until(lambda: it["a"].rounds)
        assert it["a"].rounds[0]["round"] >= reported


async def test_ctrl_c_leaves_politely_and_nobody_waits(tmp_path: Path) -> None:
    async with fleet(tmp_path) as it:
        it.start("a", founder=True)
        await it.started("a")
        it.start("b", via="a")
        await it.together("a", "b")
        it["b"].signal(signal.SIGINT)
        await it.until(lambda: it["b"].code == 0, 20)
        assert it["b"].all("Left")
        assert it["b"].all("CheckpointSaved")
        rounds = len(it["a"].rounds)
        await it.until(lambda: len(it["a"].rounds) >= rounds + 2, 15)
        assert any("left" in f["reason"] for f in it["a"].all("MemberSuspected"))
