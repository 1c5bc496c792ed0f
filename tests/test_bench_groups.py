"""Stacked peers train like single ones; mixes lose nothing; tables compare like with like."""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import cast

import numpy as np
import pytest
import torch

from peer.manifest import InnerSpec, OuterSpec
from peer.train.inner import Inner
from peer.train.models import seeded_model
from peer.train.pretrain import PretrainMethod
from tensorcodecs import get_codec
from tests.bench import learning_groups, learning_tuning, machine
from tests.bench.kept import LEARNING, Kept, run_all
from tests.bench.learning_groups import INNER_LR, QUICK, QUICK_H
from tests.bench.mixing import Crossing, Difference, Gossip, Group, apart
from tests.bench.result import BenchError, Progress
from tests.bench.stacked import Seat, Stack
from tests.bench.trial import WAYS, Course, Outcome, Trial, crossed, train

CONFIG = {
    "model_type": "llama", "vocab_size": 264, "hidden_size": 16, "intermediate_size": 24,
    "num_hidden_layers": 2, "num_attention_heads": 2, "max_position_embeddings": 16,
    "tie_word_embeddings": True,
}  # fmt: skip
SPEC = InnerSpec(lr=1e-2, warmup_steps=3, batch_size=2, grad_clip=0.5)
PLAIN = Trial(way="ddp", seed=3, inner_lr=INNER_LR, size=QUICK)


def single() -> Inner:
    return Inner(seeded_model(CONFIG, 1), SPEC, torch.device("cpu"))


def batches(peers: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(0, 264, (peers, 2, 16), generator=torch.Generator().manual_seed(seed))


def stack_of(peers: int) -> Stack:
    inner = single()
    return Stack(CONFIG, inner.layout, inner.to_numpy(), SPEC, peers)


def swarm(
    groups: int, members: int, codec: str, momentum: float = 0.9
) -> tuple[Stack, list[Group]]:
    """Groups of peers that have taken a different step each since the start."""
    stack = stack_of(groups * members)
    outer = OuterSpec(lr=0.7, momentum=momentum)
    made = [
        PretrainMethod(cast("Inner", Seat(stack, peer)), outer, get_codec(codec), mixing=True)
        for peer in range(stack.peers)
    ]
    learn(stack, made, 0)
    return stack, [Group(made[n * members : (n + 1) * members]) for n in range(groups)]


def learn(stack: Stack, methods: Sequence[PretrainMethod], seed: int) -> None:
    batch_PBT = batches(stack.peers, seed)
    stack.step(batch_PBT)
    for method, batch_BT in zip(methods, batch_PBT, strict=True):
        method.step(batch_BT)


# ── stacked peers ────────────────────────────────────────────────────────────────────────
def test_stacked_peers_learn_what_each_would_alone() -> None:
    alone = [single() for _ in range(3)]
    stack = stack_of(3)
    for step in range(6):
        batch_PBT = batches(3, step)
        losses = [
            inner.step(batch_BT).loss for inner, batch_BT in zip(alone, batch_PBT, strict=True)
        ]
        stack.step(batch_PBT)
        assert stack.losses == pytest.approx(losses, rel=1e-5)
    for peer, inner in enumerate(alone):
        np.testing.assert_allclose(stack.take(peer), inner.to_numpy(), atol=2e-5)
    validation_BT = batches(1, 9)[0]
    theirs = alone[1].evaluate(stack.take(1), [validation_BT])
    assert stack.evaluate(validation_BT)[1] == pytest.approx(theirs, rel=1e-5)


def test_a_seat_reads_and_writes_its_own_peer_only() -> None:
    stack = stack_of(2)
    seat, other_N = Seat(stack, 1), stack.take(0)
    before_N = seat.to_numpy()
    seat.shift(slice(5, 9), np.full(4, 0.5, np.float32))
    moved_N = seat.to_numpy() - before_N
    assert np.flatnonzero(moved_N).tolist() == [5, 6, 7, 8]
    np.testing.assert_array_equal(stack.take(0), other_N)


def test_another_kind_of_model_is_not_stacked() -> None:
    inner = single()
    with pytest.raises(ValueError, match="only Llamas"):
        Stack({**CONFIG, "tie_word_embeddings": False}, inner.layout, inner.to_numpy(), SPEC, 1)


# ── groups ───────────────────────────────────────────────────────────────────────────────
def test_members_of_a_group_agree_to_the_bit_whoever_was_lost() -> None:
    stack, (group,) = swarm(1, 4, "q4")
    group.average(frozenset({2}))
    assert len({member.digest() for member in group.members}) == 1
    theta_N = group.state()["theta"]
    np.testing.assert_allclose(stack.take(0), theta_N, atol=1e-6)
    assert np.abs(stack.take(2) - theta_N).max() > 1e-3  # its work is still there


def test_lost_work_comes_with_the_next_contribution() -> None:
    stack, (group,) = swarm(1, 2, "fp32")
    work_N = group.state()["theta"] - stack.take(1)
    group.average(frozenset({1}))
    kept_N = group.state()["theta"] - stack.take(1)
    np.testing.assert_allclose(kept_N, work_N, atol=1e-6)
    group.average()
    np.testing.assert_allclose(stack.take(1), group.state()["theta"], atol=1e-6)


def test_a_round_in_which_everything_is_lost_changes_nothing() -> None:
    _, (group,) = swarm(1, 2, "q4")
    before = group.members[0].digest()
    assert group.average(frozenset({0, 1})) == 0
    assert group.members[0].digest() == before


# ── mixes ────────────────────────────────────────────────────────────────────────────────
@pytest.mark.parametrize("codec", ["fp32", "q4", "min"])
def test_a_mix_leaves_the_sum_of_parameters_and_momentum(codec: str) -> None:
    _, groups = swarm(2, 2, codec)
    for group in groups:
        group.average()
    before = [group.state() for group in groups]
    far = apart(groups)
    gossip = Gossip(groups, random.Random(1), every=1, rides=(1, 2))
    for round_ in (1, 2, 3):
        gossip.after(round_, 3)
    assert gossip.mixes == 1
    after = [group.state() for group in groups]
    for name in ("theta", "momentum"):
        sums = [sum(state[name].astype(np.float64) for state in both) for both in (before, after)]
        np.testing.assert_allclose(sums[1], sums[0], atol=1e-6)
        assert np.abs(after[0][name] - before[0][name]).max() > 1e-4
    assert apart(groups) < far * {"fp32": 0.2, "q4": 0.3, "min": 0.7}[codec]
    assert all(len({m.digest() for m in group.members}) == 1 for group in groups)


def between(groups: Sequence[Group]) -> Difference:
    return Difference.between(groups[0], groups[1], range(groups[0].members[0].units), ())


def test_local_work_moves_along_with_a_mix() -> None:
    stack, groups = swarm(2, 1, "fp32")
    for group in groups:
        group.average()
    learn(stack, [group.members[0] for group in groups], 1)
    works = [group.state()["theta"] - stack.take(n) for n, group in enumerate(groups)]
    difference, far = between(groups), apart(groups)
    for unit, payload in difference.payloads.items():
        groups[0].mix(unit, payload, 1, 1)
        groups[1].mix(unit, payload, 1, -1)
    assert apart(groups) < 0.2 * far  # a first loan is not exact
    for number, group in enumerate(groups):
        np.testing.assert_allclose(
            group.state()["theta"] - stack.take(number), works[number], atol=1e-6
        )


def test_a_mix_counts_what_is_lent_and_the_difference_once() -> None:
    for momentum, vectors in ((0.9, 2), (0.0, 1)):
        _, groups = swarm(2, 1, "q4", momentum)
        for group in groups:
            group.average()
        numel = len(groups[0].state()["theta"])
        first = between(groups)
        assert first.lent_bytes == pytest.approx(1.5 * vectors * numel, rel=0.1)
        assert 0 < first.coded_bytes < 0.6 * vectors * numel
        assert len(first.hints) == vectors
        units = range(groups[0].members[0].units)
        again = Difference.between(groups[0], groups[1], units, first.hints)
        assert again.lent_bytes == pytest.approx(0.75 * vectors * numel, rel=0.1)


def test_who_is_too_far_away_pays_for_a_second_look() -> None:
    _, groups = swarm(2, 1, "q4")
    for group in groups:
        group.average()
    units = range(groups[0].members[0].units)
    difference = Difference.between(groups[0], groups[1], units, (1e-4, 1e-4))
    assert difference.lent_bytes > 4 * len(groups[0].state()["theta"])


def test_every_group_begins_in_its_turn_and_a_busy_one_lends_nothing() -> None:
    _, groups = swarm(4, 1, "q4")
    gossip = Gossip(groups, random.Random(5), every=6, rides=(1, 2))
    rounds = 60
    for round_ in range(1, rounds + 1):
        gossip.after(round_, rounds)
        for slot in range(len(gossip._slots)):
            busy = [ride.group for ride in gossip._riding if ride.slot == slot]
            assert len(set(busy)) == len(busy), "once borrower or lender at a time"
    due = len(gossip._slots) * len(groups) * rounds / 6
    assert 0.6 * due < gossip.mixes <= due


def test_a_mix_that_could_not_arrive_is_not_begun() -> None:
    _, groups = swarm(2, 1, "q4")
    gossip = Gossip(groups, random.Random(1), every=1, rides=(1, 2))
    for round_ in (1, 2):
        gossip.after(round_, 2)
    assert (gossip.mixes, gossip.bytes) == (0, 0)


def test_a_rival_is_charged_the_least_that_an_all_reduce_can_send() -> None:
    crossing = Crossing(peers=16, sites=4)
    assert (crossing.ring, crossing.aggregators) == (6, 24)


# ── trials and tables ────────────────────────────────────────────────────────────────────
def test_everybody_has_samples_of_his_own_and_sites_their_own_files() -> None:
    for shards in ("iid", "sites"):
        course = Course(3, shards, QUICK)
        samples = course.batches_SPBT.transpose(0, 1).flatten(1, 2)
        assert samples.shape == (16, QUICK.steps * QUICK.batch, QUICK.tokens)
        assert len({bytes(np.asarray(peer[:8])) for peer in samples}) == 16


def test_a_trial_is_repeatable_and_groups_that_mix_are_nearer() -> None:
    mixing = replace(learning_groups.in_rounds(PLAIN, "gossip", "near", QUICK_H), gossip_every=2)
    alone = learning_groups.in_rounds(PLAIN, "none", "near", QUICK_H)
    first, again, apart_ = train(mixing), train(mixing), train(alone)
    assert replace(first, seconds=0) == replace(again, seconds=0)
    assert first.apart < apart_.apart / 1.2
    assert first.loss < first.curve[0][1]
    assert crossed(alone, apart_) == 0
    flat = learning_groups.in_rounds(PLAIN, "flat", "flat", QUICK_H)
    assert crossed(flat, train(flat)) > 10 * first.parameters


def facts(loss: float) -> Outcome:
    return Outcome(
        curve=[(10, loss)], losses=[loss], mean_loss=loss, apart=0.0, gossip_bytes=1,
        mean_bytes=3, averages=2, parameters=7, seconds=1.0,
    )  # fmt: skip


def test_what_was_finished_is_not_run_again(tmp_path: Path) -> None:
    kept = Kept(tmp_path / "kept", LEARNING)
    assert kept.get(PLAIN) is None
    kept.put(PLAIN, dataclasses.asdict(facts(2.5)))
    lines: list[str] = []
    assert run_all([PLAIN], kept, lines.append) == {PLAIN: facts(2.5)}
    assert len(lines) == 1
    assert kept.get(replace(PLAIN, seed=4)) is None
    (file,) = (tmp_path / "kept").iterdir()
    file.write_text(file.read_text()[:20])
    assert kept.get(PLAIN) is None
    kept.forget()
    assert not (tmp_path / "kept").exists()


def test_a_trial_that_fails_is_named(tmp_path: Path) -> None:
    wrong = replace(PLAIN, way="nonsense", h=5)
    with pytest.raises(BenchError, match=r"nonsense, H = 5, seed 3[\s\S]*KeyError"):
        run_all([wrong], Kept(tmp_path, LEARNING), lambda _: None)


def in_process(
    trials: Sequence[Trial], kept: Kept[Trial, Outcome], progress: Progress
) -> dict[Trial, Outcome]:
    """Losses that grow with every way, without training."""
    order = list(WAYS)
    return {trial: facts(2.0 + 0.01 * order.index(trial.way)) for trial in trials}


def test_the_table_compares_every_row_with_flat_diloco_of_its_kind(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(learning_groups, "run_all", in_process)
    monkeypatch.setattr(machine, "ROOT", tmp_path)
    (tmp_path / "docs" / "results").mkdir(parents=True)
    result = learning_groups.run(False, 1, lambda _: None)
    assert len({tuple(row) for row in result.rows}) == 1
    by_way = {row["way"]: row for row in result.rows if row["inner lr"] == f"{INNER_LR:g}"}
    assert by_way["groups + gossip, q4"]["/ flat"] == f"{2.02 / 2.01:.4f}"
    near = [row["mix every"] for row in result.rows if row["H"] == "2"]
    assert [every for every in near if every != "-"] == [
        f"{rounds} rounds" for rounds in (15, 50, 700, 50)
    ]
    assert len(result.bars) == 2 * (3 + 1)
    assert all(bar.holds for bar in result.bars if "bytes" in bar.bar)
    picture = (tmp_path / "docs" / "results" / "learning-groups.svg").read_text()
    assert "flat DiLoCo, fp32" in picture


def test_tuning_shows_the_whole_grid_and_judges_what_is_in_use(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(learning_tuning, "run_all", in_process)
    monkeypatch.setattr(machine, "ROOT", tmp_path)
    result = learning_tuning.run(False, 1, lambda _: None)
    assert len(result.rows) == 4 * 4
    assert [bar.holds for bar in result.bars] == [True] * 4
    cells = [str(cell) for row in result.rows for cell in row.values()]
    assert sum(cell.endswith("*") for cell in cells) == 4


def test_the_search_goes_on_where_a_neighbour_is_better(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """To the corner of the grid, step by step; what is in use is then said not to be the best."""

    def towards_a_corner(
        trials: Sequence[Trial], kept: Kept[Trial, Outcome], progress: Progress
    ) -> dict[Trial, Outcome]:
        return {trial: facts(3.0 - trial.outer_lr - trial.momentum) for trial in trials}

    monkeypatch.setattr(learning_tuning, "run_all", towards_a_corner)
    monkeypatch.setattr(machine, "ROOT", tmp_path)
    result = learning_tuning.run(False, 1, lambda _: None)
    assert not any(bar.holds for bar in result.bars)
    assert any(row["momentum 0.9"] == f"{3.0 - 1.4 - 0.9:.4f}" for row in result.rows)
