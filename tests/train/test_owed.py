"""What late work weighs, and how two halves become one again."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from peer.train.flat import FlatMethod
from peer.train.owed import AGE_MAX, Owed
from tests.train.tiny import batch, everywhere, inner_of, method, reduce


def mask(*inside: int) -> np.ndarray[Any, np.dtype[np.bool_]]:
    return np.array(inside, np.bool_)


def test_work_that_is_inside_is_owed_no_more() -> None:
    owed = Owed([1] * 4, staleness=0.5)
    for counted in (None, mask(1, 1, 1, 1), mask(1, 1, 1, 1)):
        owed.add(100)
        assert owed.freeze(counted) == 100.0


@pytest.mark.parametrize("staleness", [0.0, 0.5, 2.0])
def test_late_work_counts_less_the_later_it_is(staleness: float) -> None:
    owed = Owed([1] * 2, staleness)
    tokens = [100, 50, 70, 10]
    for made, tokens_k in enumerate(tokens):
        owed.add(tokens_k)
        weight = owed.freeze(None if made == 0 else mask(1, 0))
        late = sum(t / (1 + staleness * s) for s, t in enumerate(tokens[made::-1]))
        assert weight == pytest.approx((tokens_k + late) / 2), "the mean of both units"


def test_without_staleness_no_token_is_lost_however_old() -> None:
    owed = Owed([1] * 1)
    for made in range(3 * AGE_MAX):
        owed.add(2)
        assert owed.freeze(None if made == 0 else mask(0)) == 2.0 * (made + 1)


def test_a_unit_that_waits_for_its_fragments_turn_is_not_stale() -> None:
    owed = Owed([1] * 3, staleness=1.0, fragments=3)
    weights = []
    for made in range(9):
        turn = np.arange(3) == made % 3
        owed.add(10)
        weights.append(owed.freeze(None if made == 0 else np.roll(turn, -1), turn))
    assert weights[3:] == [30.0] * 6, "each unit carries the work of three rounds"


# ── two halves ───────────────────────────────────────────────────────────────────────────
def trained_round(peers: list[FlatMethod], seed: int) -> list[float]:
    """One round of a group: everybody learns, all are averaged. The contributions' weights."""
    parts = []
    for index, peer in enumerate(peers):
        peer.step(batch(seed + index))
        parts.append(peer.contribution())
    outcome = reduce(peers[0], parts)
    for peer in peers:
        peer.apply(outcome, everywhere(peer, True))
    return [part.weight for part in parts]


def test_two_halves_that_both_went_on_end_at_their_mix_by_tokens() -> None:
    """Two of three peers and the third train for some rounds without each other."""
    peers = [method(lr=1.0, momentum=0.0) for _ in range(3)]
    trained_round(peers, 0)
    rounds, tokens = 4, 0.0
    for number in range(rounds):
        trained_round(peers[:2], 100 + 10 * number)
        tokens += sum(trained_round(peers[2:], 500 + 10 * number))
    most, few = peers[0].state()["theta"], peers[2].state()["theta"]
    peers[2].reconcile(peers[0].state(), tokens, rounds)
    assert peers[2].digest() == peers[0].digest()

    progress = []
    for index, peer in enumerate(peers):
        before = peer.inner.to_numpy()
        peer.step(batch(900 + index))
        progress.append(peer.inner.to_numpy() - before)
    parts = [peer.contribution() for peer in peers]
    assert [part.weight for part in parts] == [parts[0].weight] * 3, "each worked as much a round"
    outcome = reduce(peers[0], parts)
    for peer in peers:
        peer.apply(outcome, everywhere(peer, True))
    mixed = (2 * most + few) / 3 + sum(progress) / 3
    assert len({peer.digest() for peer in peers}) == 1
    assert np.allclose(peers[0].state()["theta"], mixed, atol=1e-6)
    assert np.abs(most - few).max() > 1e-3, "or else this test says nothing"
    # Nothing is left over: what went in is not sent again.
    for peer in peers:
        assert np.allclose(peer.inner.to_numpy(), peer.state()["theta"], atol=1e-6)


def test_the_halves_weigh_what_they_learned() -> None:
    """A half that learned three times as much a round has three times the say."""
    peers = [method(lr=1.0, momentum=0.0) for _ in range(2)]
    trained_round(peers, 0)
    for number in range(3):
        trained_round(peers[:1], 100 + number)
    learned = 0.0
    for number in range(3):
        for extra in range(3):
            peers[1].step(batch(500 + 10 * number + extra))
        part = peers[1].contribution()
        learned += part.weight
        peers[1].apply(reduce(peers[1], [part]), everywhere(peers[1], True))
    a, b = peers[0].state()["theta"], peers[1].state()["theta"]
    peers[1].reconcile(peers[0].state(), learned, 3)
    peers[0].step(batch(900))
    for extra in range(3):
        peers[1].step(batch(901 + extra))
    own = [p.inner.to_numpy() for p in peers]
    parts = [p.contribution() for p in peers]
    assert parts[1].weight == pytest.approx(3 * parts[0].weight)
    peers[0].apply(reduce(peers[0], parts), everywhere(peers[0], True))
    assert np.allclose(peers[0].state()["theta"], (own[0] + 3 * own[1]) / 4, atol=1e-6)
    assert not np.allclose(a, b, atol=1e-3)


def test_what_is_not_finite_is_not_kept() -> None:
    one, other = method(), method()
    inner_of(other).flat[3] = float("inf")
    other.reconcile(one.state(), 100.0, 2)
    assert np.array_equal(other.inner.to_numpy(), one.state()["theta"])
    other.step(batch(1))
    assert other.contribution().weight == one.step(batch(1)).tokens


def test_a_state_that_does_not_fit_is_not_reconciled_with() -> None:
    made = method()
    before = made.digest()
    with pytest.raises(ValueError, match="state"):
        made.reconcile({"theta": made.state()["theta"]}, 1.0, 1)
    assert made.digest() == before
