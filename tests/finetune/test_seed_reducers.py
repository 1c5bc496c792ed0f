"""DeComFL's and FedKSeed's reducers: pure functions of the entries, whatever their order."""

from __future__ import annotations

import itertools
import math
import random

import numpy as np
import pytest

from peer.finetune import decomfl, kseed
from peer.finetune.scalars import Reading
from tests.finetune.seed_runs import reading, rules, signer


def many(count: int, scalars: int, seed: int = 0) -> list[Reading]:
    rng = random.Random(seed)
    return [
        Reading(
            signer(who + 1).peer_id, rng.randrange(1, 1000),
            {i: rng.gauss(0, 10 ** rng.uniform(-6, 6)) for i in range(scalars)},
        )
        for who in range(count)
    ]  # fmt: skip


@pytest.mark.parametrize("reduction", ["mean", "median", "trimmed"])
def test_the_order_of_entries_does_not_matter(reduction: str) -> None:
    run = rules(reduction=reduction)
    readings = many(5, 4)
    expected = decomfl.reduce(run, readings)
    for order in itertools.permutations(readings):
        assert decomfl.reduce(run, order) == expected


def test_kseed_sums_do_not_depend_on_the_order_either() -> None:
    run = rules("kseed", pool=8)
    readings, begin = many(5, 8), np.linspace(-1, 1, 8)
    expected = kseed.add(run, begin, readings)
    for order in itertools.permutations(readings):
        assert np.array_equal(kseed.add(run, begin, order), expected)


def test_the_mean_goes_by_weight_and_only_ratios_count() -> None:
    run = rules()
    readings = [reading(1, 1, s0=1.0, s1=4.0), reading(2, 3, s0=5.0)]
    assert decomfl.reduce(run, readings) == {0: 4.0, 1: 1.0}
    twice = [Reading(r.peer, 2 * r.weight, r.scalars) for r in readings]
    assert decomfl.reduce(run, twice) == {0: 4.0, 1: 1.0}


def test_one_peer_gets_its_own_scalars_back() -> None:
    only = reading(1, 77, s0=0.1, s3=-3e5)
    for reduction in ("mean", "median", "trimmed"):
        found = decomfl.reduce(rules(reduction=reduction), [only])
        assert found == pytest.approx(dict(only.scalars), rel=1e-15)


def test_a_liar_moves_the_mean_but_not_the_median_or_the_trimmed_mean() -> None:
    honest = [reading(who, s0=1.0 + who / 100) for who in range(1, 5)]
    liar = reading(9, weight=10**6, s0=-1e6)
    assert decomfl.reduce(rules(), [*honest, liar])[0] < -9e5
    assert 1 < decomfl.reduce(rules(reduction="median"), [*honest, liar])[0] < 1.05
    assert 1 < decomfl.reduce(rules(reduction="trimmed"), [*honest, liar])[0] < 1.05


def test_median_and_trimmed_mean_are_those_of_the_field() -> None:
    four = [reading(who, s0=float(x)) for who, x in enumerate([1, 10, 2, 100], 1)]
    assert decomfl.reduce(rules(reduction="median"), four)[0] == 6.0
    assert decomfl.reduce(rules(reduction="trimmed", trim_percent=25), four)[0] == 6.0
    assert decomfl.reduce(rules(reduction="trimmed", trim_percent=0), four)[0] == 113 / 4
    assert decomfl.reduce(rules(reduction="trimmed", trim_percent=49), four[:2])[0] == 5.5


def test_nobodys_round_is_no_step() -> None:
    run = rules()
    assert decomfl.reduce(run, []) == {}
    assert len(decomfl.step_of(run, 3, decomfl.factors_of(run, {}))) == 0
    sums = np.ones(64)
    assert kseed.add(rules("kseed"), sums, []) is sums


def test_a_decomfl_step_is_minus_lr_over_p_along_the_rounds_directions() -> None:
    run = rules(perturbations=2, steps=2, lr=0.5)
    step = decomfl.step_of(run, 9, decomfl.factors_of(run, {0: 1.0, 3: -8.0}))
    seeds = decomfl.seeds_of(run, 9)
    assert step.seeds.tolist() == [seeds[0][0], seeds[1][1]]
    assert step.factors.tolist() == [-0.25, 2.0]


def test_all_directions_of_all_rounds_differ_and_follow_from_the_rules() -> None:
    run = rules(perturbations=3, steps=2)
    seen = [s for n in range(100) for step in decomfl.seeds_of(run, n) for s in step]
    assert len(set(seen)) == 600
    assert decomfl.seeds_of(run, 5) == decomfl.seeds_of(rules(perturbations=3, steps=2), 5)
    assert decomfl.seeds_of(rules(perturbations=3, steps=2, seed=8), 5) != decomfl.seeds_of(run, 5)
    pool = kseed.pool_of(rules("kseed", pool=4096))
    assert len(set(pool.tolist())) == 4096


def test_kseed_sums_are_linear_in_rounds_and_peers() -> None:
    run = rules("kseed", pool=8, lr=2.0)
    one = kseed.add(run, np.zeros(8), [reading(1, 1, s2=4.0), reading(2, 3, s2=8.0, s5=1.0)])
    assert one.tolist() == [0, 0, 7.0, 0, 0, 0.75, 0, 0]
    two = kseed.add(run, one, [reading(1, 5, s5=-0.75)])
    assert two.tolist() == [0, 0, 7.0, 0, 0, 0, 0, 0]
    step = kseed.step_of(run, kseed.pool_of(run), two)
    assert step.seeds.tolist() == [kseed.pool_of(run)[2]]
    assert step.factors.tolist() == [-14.0]


def test_pro_draws_loud_directions_e_times_as_often_as_quiet_ones() -> None:
    run = rules("kseed", pool=8)
    rounds = [[reading(1, s0=-3.0, s1=1.0)], [reading(2, s0=1.0)]]
    loud = kseed.loudness(run, rounds)
    assert loud.tolist() == [2.0, 1.0] + [1.5] * 6
    odds = kseed.probabilities(loud)
    assert math.isclose(odds.sum(), 1)
    assert math.isclose(odds[0] / odds[1], math.e)
    assert np.allclose(kseed.probabilities(kseed.loudness(run, [])), 1 / 8)


def test_local_sums_add_up_what_one_direction_gave() -> None:
    found = kseed.LocalSums()
    for index, slope in [(3, 1.0), (5, 2.0), (3, -4.0)]:
        found.add(index, slope)
    assert dict(found.values()) == {3: -3.0, 5: 2.0}
    assert found.steps == 3
