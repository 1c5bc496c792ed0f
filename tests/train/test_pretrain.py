"""Outer steps keep peers bit-identical, lose no work and count none twice."""

from __future__ import annotations

import math
import random
from pathlib import Path

import numpy as np
import pytest
import torch

from peer.errors import ManifestError
from peer.train import build_method
from peer.train.flat import FlatMethod, FrozenWork
from peer.train.pretrain import PretrainMethod
from tensorcodecs import get_codec
from tests.train.tiny import batch, everywhere, inner_of, manifest, method, reduce


def _delta(made: FlatMethod) -> np.ndarray[tuple[int], np.dtype[np.float32]]:
    delta: np.ndarray[tuple[int], np.dtype[np.float32]] = (
        made.state()["theta"] - made.inner.to_numpy()
    )
    return delta


def test_ones_own_update_at_rate_one_leaves_the_local_model_where_it_is() -> None:
    made = method(lr=1.0, momentum=0.0)
    for i in range(3):
        made.step(batch(i))
    part = made.contribution()
    before = made.inner.to_numpy()
    made.apply(reduce(made, [part]), everywhere(made, True))
    assert np.abs(made.inner.to_numpy() - before).max() <= 1e-6
    assert np.abs(made.state()["theta"] - before).max() <= 1e-6


@pytest.mark.parametrize("codec", ["fp32", "high", "q4"])
def test_two_peers_stay_bit_identical_with_work_in_flight(codec: str) -> None:
    peers = [method(codec=codec), method(codec=codec)]
    rng = random.Random(5)
    for round_ in range(20):
        parts: list[FrozenWork] = []
        for i, peer in enumerate(peers):
            for step in range(rng.randint(1, 2)):
                peer.step(batch(1000 * i + 10 * round_ + step))
            parts.append(peer.contribution())
        for i, peer in enumerate(peers):  # training goes on while the round is in flight
            if rng.random() < 0.5:
                peer.step(batch(-1000 * i - round_))
        outcome = reduce(peers[0], parts)
        for peer in peers:
            peer.apply(outcome, everywhere(peer, True))
        assert peers[0].digest() == peers[1].digest(), f"round {round_}"
    assert np.array_equal(peers[0].state()["theta"], peers[1].state()["theta"])
    assert not np.array_equal(peers[0].inner.to_numpy(), peers[1].inner.to_numpy())


def test_nesterov_is_the_plain_formula() -> None:
    made = method(lr=0.7, momentum=0.9)
    start = made.state()
    theta, m = start["theta"].astype(np.float64), start["momentum"].astype(np.float64)
    for i in range(4):
        made.step(batch(i))
        delta = _delta(made).astype(np.float64)
        made.apply(reduce(made, [made.contribution()]), everywhere(made, True))
        m = 0.9 * m + delta
        theta = theta - 0.7 * (delta + 0.9 * m)
        assert np.abs(made.state()["theta"] - theta).max() <= 1e-6
        assert np.abs(made.state()["momentum"] - m).max() <= 1e-6


def test_missed_work_rides_into_the_next_contribution() -> None:
    made, other = method(), method()
    made.step(batch(1))
    other.step(batch(2))
    missed = _delta(made)
    late = made.contribution()
    outcome = reduce(other, [other.contribution()])
    made.apply(outcome, everywhere(made, False))
    assert np.abs(_delta(made) - missed).max() <= 1e-6
    stale = late.weight / 1.5  # outer.staleness is 0.5, and it missed one exchange
    assert made.contribution().weight == pytest.approx(stale)


def test_a_part_that_was_missed_keeps_its_share_of_the_weight() -> None:
    made = method()
    made.step(batch(1))
    part = made.contribution()
    before = _delta(made)
    mine = everywhere(made, True)
    mine[0] = False
    made.apply(reduce(made, [part]), mine)
    size = made.inner.layout.unit_sizes()[0]
    again = made.contribution()
    share = size / made.inner.layout.numel
    assert again.weight == pytest.approx(part.weight * share / 1.5)  # stale by one exchange
    left = made.state()["theta"] - made.inner.to_numpy()
    assert np.abs(left[:size] - before[:size]).max() <= 1e-6
    assert np.abs(left[size:]).max() <= 1e-6


def test_the_same_outcome_takes_ones_work_off_only_once() -> None:
    made = method()
    made.step(batch(1))
    outcome = reduce(made, [made.contribution()])
    made.apply(outcome, everywhere(made, True))
    assert np.abs(_delta(made)).max() <= 1e-6
    made.apply(outcome, everywhere(made, True))
    assert np.abs(_delta(made)).max() <= 1e-6


def test_a_round_that_never_came_counts_in_the_next() -> None:
    made = method()
    made.step(batch(1))
    first = made.contribution()
    made.step(batch(2))
    late = first.weight / 1.5  # outer.staleness is 0.5
    assert made.contribution().weight == pytest.approx(first.weight + late)


def test_units_without_a_mean_change_nothing() -> None:
    made = method()
    made.step(batch(1))
    made.contribution()
    before, local = made.digest(), made.inner.to_numpy()
    made.apply([b""] * made.units, everywhere(made, False))
    assert made.digest() == before
    assert np.array_equal(made.inner.to_numpy(), local)


def test_a_broken_unit_changes_nothing_and_is_counted() -> None:
    made = method()
    made.step(batch(1))
    outcome = reduce(made, [made.contribution()])
    before = made.digest()
    made.apply([b"garbage"] * made.units, everywhere(made, True))
    assert made.digest() == before
    assert made.refused_units == made.units
    with pytest.raises(ValueError, match="units"):
        made.apply([*outcome, b""], everywhere(made, True))
    assert made.digest() == before


def test_a_step_that_is_not_finite_is_skipped_and_counted() -> None:
    made = method()
    made.step(batch(0))
    before = made.inner.to_numpy()
    head = next(iter(made.inner.model.parameters()))
    handle = head.register_hook(  # type: ignore[no-untyped-call]
        lambda gradient: gradient * math.nan
    )
    result = made.step(batch(1))
    handle.remove()
    assert result.tokens == 0
    assert inner_of(made).skipped_steps == 1
    assert np.array_equal(made.inner.to_numpy(), before)
    assert made.step(batch(2)).tokens == 64


def test_a_model_that_ran_away_contributes_nothing_and_comes_back() -> None:
    made = method()
    made.step(batch(0))
    inner_of(made).flat[7] = math.nan
    assert made.contribution().weight == 0
    assert made.dropped_work == 1
    assert np.array_equal(made.inner.to_numpy(), made.state()["theta"])
    assert made.step(batch(1)).tokens == 64


def test_state_moves_to_another_peer_and_inner_state_survives_a_restart() -> None:
    made = method()
    for i in range(3):
        made.step(batch(i))
        made.apply(reduce(made, [made.contribution()]), everywhere(made, True))
    joiner = method()
    joiner.load_state(made.state())
    assert joiner.digest() == made.digest()
    joiner.load_inner_state(made.inner_state())
    made.load_state(made.state())
    assert made.step(batch(9)).loss == joiner.step(batch(9)).loss
    assert np.array_equal(made.inner.to_numpy(), joiner.inner.to_numpy())


def test_a_state_that_does_not_fit_is_refused_before_anything_changes() -> None:
    made = method()
    before = made.digest()
    good = made.state()
    for bad in (
        {"theta": good["theta"]},
        {**good, "momentum": good["momentum"][:-1]},
        {**good, "momentum": good["momentum"].astype(np.float64)},
        {**good, "momentum": np.full_like(good["momentum"], np.nan)},
    ):
        with pytest.raises(ValueError, match=r"state|momentum"):
            made.load_state(bad)
        assert made.digest() == before
    made.load_inner_state({"exp_avg": np.zeros(3, np.float32), "steps": np.zeros(1, np.int64)})


def test_the_first_weights_depend_on_the_seed_alone() -> None:
    torch.manual_seed(123)
    one = method()
    torch.manual_seed(321)
    assert method().digest() == one.digest()
    theta = one.state()["theta"]
    assert theta.std() > 0.01


def test_evaluation_is_of_the_outer_parameters_and_leaves_the_local_ones() -> None:
    made = method()
    batches = [batch(100), batch(101)]
    start = made.evaluate(batches)
    assert start == pytest.approx(math.log(260), rel=0.1)
    made.step(batch(1))
    local = made.inner.to_numpy()
    assert made.evaluate(batches) == start
    assert np.array_equal(made.inner.to_numpy(), local)


def test_the_export_is_a_transformers_model_with_the_same_logits(tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    made = method()
    for i in range(3):
        made.step(batch(i))
    made.apply(reduce(made, [made.contribution()]), everywhere(made, True))
    made.step(batch(9))  # local work is not exported
    made.export(str(tmp_path / "out"))
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out", local_files_only=True)
    ids = batch(50)
    with torch.no_grad(), made.outer_model() as model:
        assert torch.equal(loaded(input_ids=ids).logits, model(input_ids=ids).logits)
    assert not list((tmp_path / "out").glob("*.bin"))


def test_a_model_too_large_for_the_machine_is_refused_before_it_is_built() -> None:
    big = manifest()
    big.model.config.update(hidden_size=65536, intermediate_size=262144, num_hidden_layers=512)
    with pytest.raises(ManifestError, match=r"billion|GiB"):
        build_method(big, device="cpu")


def test_a_config_whose_sizes_do_not_agree_is_the_manifests_fault() -> None:
    odd = manifest()
    odd.model.config.update(num_attention_heads=3, num_key_value_heads=2, head_dim=8)
    with pytest.raises(ManifestError, match=r"model\.config"):
        build_method(odd, device="cpu")


def test_top_k_keeps_what_it_leaves_out_until_it_was_sent() -> None:
    made = method(codec="sparse", momentum=0.0, lr=1.0)
    assert isinstance(made, PretrainMethod)
    residual = np.zeros(made.inner.layout.numel, np.float32)
    for round_ in range(4):
        made.step(batch(round_))
        before = made.inner.to_numpy()
        delta = made.state()["theta"] - before
        part = made.contribution()
        sent = np.zeros_like(delta)
        get_codec("sparse").decode_many(part.encode(0, made.units), sent)
        assert 0 < np.count_nonzero(sent) <= len(sent) // 50
        expected = np.float32(0.95) * residual + delta - sent
        mine = everywhere(made, True)
        mine[0] = round_ != 1  # once, a part of it does not arrive
        made.apply(reduce(made, [part]), mine)
        where = made.inner.layout.unit_slice(0)
        if not mine[0]:
            expected[where] = residual[where]
        residual = made.inner_state()["residual"]
        assert np.allclose(residual, expected, atol=1e-7)
    again = method(codec="sparse")
    again.load_inner_state(made.inner_state())
    assert np.array_equal(again.inner_state()["residual"], residual)
    made.load_state(made.state())
    assert not made.inner_state()["residual"].any()


def test_a_link_may_choose_the_codec_of_an_adaptive_run() -> None:
    made = method(codec="auto")
    made.step(batch(1))
    part = made.contribution()
    assert part.snr_db is not None
    thin, usual, exact = (
        sum(map(len, part.encode(0, made.units, name))) for name in ("min", "q4", "fp32")
    )
    assert thin < usual < exact
    reducer = made.reducer()
    for unit in range(made.units):
        parts = [(1.0, part.encode(unit, unit + 1, name)[0]) for name in ("min", "fp32")]
        for _, payload in parts:
            reducer.check(unit, payload)
        assert not reducer.reduce(unit, parts).refused
