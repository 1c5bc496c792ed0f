"""Losses are compared seed by seed, and noise is what seeds alone make."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest

from tests.bench import parity
from tests.bench.parity import Arm, Channel, Difference, Run, exchange
from tests.bench.swarm import Plan, Swarm

TINY = Plan(
    hidden=32, layers=1, workers=2, warmup_steps=5, rounds=2, steps=5, batch=2, tokens=32,
    validation_samples=8,
)  # fmt: skip


def runs(*losses: float) -> list[Run]:
    return [Run(loss, 3.0, 3.0) for loss in losses]


# ── the noise ────────────────────────────────────────────────────────────────────────────
def test_a_difference_is_taken_seed_by_seed() -> None:
    apart = Difference.of([1.5, 2.5, 3.5], [1.0, 2.0, 3.0])
    assert (apart.mean, apart.spread, apart.noise) == (0.5, 0.0, 1.0)
    assert apart.in_noises == 0.5


def test_without_noise_nothing_is_within_it() -> None:
    assert Difference.of([2.0, 2.0], [1.0, 1.0]).in_noises == math.inf


def test_seeds_that_do_not_match_are_refused() -> None:
    with pytest.raises(ValueError, match="zip"):
        Difference.of([1.0, 2.0, 3.0], [1.0, 2.0])


@pytest.mark.parametrize(
    ("shift", "holds"), [(0.9, True), (-0.9, True), (1.1, False), (-1.1, False)]
)
def test_q4_must_be_within_the_noise_on_either_side(shift: float, holds: bool) -> None:
    reference = [1.0, 2.0, 3.0]
    found = {
        Arm("fp32"): runs(*reference),
        Arm("q4"): runs(*(loss + shift for loss in reference)),
    }
    bar, _ = parity._bars(found, [10.0, 11.0, 12.0])
    assert bar.holds is holds


def test_what_cannot_tell_one_worker_from_four_holds_no_bar() -> None:
    found = {Arm("fp32"): runs(1.0, 2.0, 3.0), Arm("q4"): runs(1.0, 2.0, 3.0)}
    assert [bar.holds for bar in parity._bars(found, [1.5, 2.5, 3.5])] == [True, False]


# ── channels ─────────────────────────────────────────────────────────────────────────────
def test_a_channel_counts_what_travels_and_keeps_nothing_without_feedback() -> None:
    vector = np.random.default_rng(1).standard_normal(5000).astype(np.float32)
    channel = Channel(Arm("q4"))
    first = channel(vector)
    assert 3 < channel.bits < 4
    assert not np.array_equal(first, vector)
    assert np.array_equal(channel(vector), first)


def test_with_feedback_what_was_left_out_arrives_later() -> None:
    vector = np.random.default_rng(2).standard_normal(5000).astype(np.float32)
    plain, fed = Channel(Arm("min")), Channel(Arm("min", feedback=True))
    errors = []
    for channel in (plain, fed):
        mean = np.mean([channel(vector) for _ in range(8)], axis=0)
        errors.append(float(np.linalg.norm(mean - vector)))
    assert errors[1] < errors[0] / 2


# ── the whole ────────────────────────────────────────────────────────────────────────────
def test_exact_codecs_learn_what_no_codec_learns_and_coarse_ones_something_near_it() -> None:
    swarm = Swarm(5, TINY)
    none = swarm.learn([lambda sent: sent] * 2, lambda mean: mean)
    assert exchange(swarm, Arm("fp32"), 2).loss == none
    coarse = exchange(swarm, Arm("low"), 2)
    assert coarse.loss != none
    assert abs(coarse.loss - none) < swarm.first_loss - none
    assert coarse.bits_up < 2.5
    assert coarse.bits_down < 2.5


def test_a_measurement_has_a_row_for_every_codec_with_and_without_feedback(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(parity, "_QUICK", replace(TINY, rounds=1, steps=1))
    lines: list[str] = []
    result = parity.run(True, 1, lines.append)
    told = {(row["codec"], row["feedback"]) for row in result.rows}
    assert {(codec, fed) for codec in parity._LOSSY for fed in ("yes", "no")} < told
    assert len(lines) == 2
    assert len({tuple(row) for row in result.rows}) == 1
