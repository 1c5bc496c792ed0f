"""Streaming DiLoCo's fragments, tau and alpha: exact in turns, and learning as whole rounds do."""

from __future__ import annotations

import dataclasses
import random
from typing import Any

import numpy as np
import pytest

from peer.errors import ManifestError
from peer.train.flat import FlatMethod, FrozenWork
from peer.train.owed import Owed
from tests.train import tiny
from tests.train.tiny import batch, built, manifest, method, reduce


def made(fragments: int, **changes: Any) -> FlatMethod:
    """The tiny model, wide enough for four units."""
    some = manifest(fragments=fragments, **changes)
    config = some.model.config | {"intermediate_size": 1700}
    some = dataclasses.replace(some, model=dataclasses.replace(some.model, config=config))
    return built(some)


def gap(one: FlatMethod) -> np.ndarray[Any, np.dtype[np.float32]]:
    theta: np.ndarray[Any, np.dtype[np.float32]] = one.state()["theta"]
    return theta - one.inner.to_numpy()


def flags(units: range, mine: bool = True) -> np.ndarray[Any, np.dtype[np.bool_]]:
    return np.full(len(units), mine)


def values(one: FlatMethod, units: range) -> slice:
    layout = one.inner.layout
    return slice(layout.unit_slice(units.start).start, layout.unit_slice(units.stop - 1).stop)


def test_more_fragments_than_units_name_the_field() -> None:
    with pytest.raises(ManifestError, match=r"schedule\.fragments.*2 units.*lower it"):
        method(fragments=3)
    assert method(fragments=2).fragments.count == 2


@pytest.mark.parametrize("codec", ["fp32", "q4", "sparse"])
def test_two_peers_stay_bit_identical_and_digests_are_those_of_a_fresh_copy(codec: str) -> None:
    peers = [made(4, codec=codec), made(4, codec=codec)]
    rng = random.Random(5)
    for number in range(12):
        units = peers[0].fragments.of(number)
        parts: list[FrozenWork] = []
        for i, one in enumerate(peers):
            one.step(batch(1000 * i + number))
            parts.append(one.contribution(units))
        if rng.random() < 0.5:  # training goes on while the round is in flight
            peers[number % 2].step(batch(-number))
        outcome = reduce(peers[0], parts, units)
        for one in peers:
            one.apply(outcome, flags(units), units.start)
        assert peers[0].digest() == peers[1].digest(), f"round {number}"
    again = made(4, codec=codec)
    again.load_state(peers[0].state())
    assert again.digest() == peers[1].digest()
    units = again.fragments.of(12)
    for one in (again, peers[1]):
        one.apply(outcome[: len(units)], flags(units, mine=False), units.start)
    assert again.digest() == peers[1].digest()


def test_a_fragments_update_is_its_change_since_its_last_turn() -> None:
    one = made(2, lr=1.0, momentum=0.0)
    first, second = one.fragments.of(0), one.fragments.of(1)
    for number in range(5):
        one.step(batch(number))
        units = one.fragments.of(number)
        before, local = gap(one), one.inner.to_numpy()
        part = one.contribution(units)
        sent = np.concatenate([_decoded(one, u, part) for u in units])
        assert np.array_equal(sent, before[values(one, units)])
        one.apply(reduce(one, [part], units), flags(units), units.start)
        # Alone and at rate one an outcome is one's own word: theta comes to where x is.
        assert np.abs(one.inner.to_numpy() - local).max() <= 1e-6
        assert np.abs(gap(one)[values(one, units)]).max() <= 1e-6
        other = values(one, second if units == first else first)
        assert np.array_equal(gap(one)[other], before[other]), "whose turn it was not"


def _decoded(one: FlatMethod, unit: int, part: FrozenWork) -> np.ndarray[Any, np.dtype[np.float32]]:
    from tensorcodecs import get_codec

    where = one.inner.layout.unit_slice(unit)
    found = np.empty(where.stop - where.start, np.float32)
    get_codec("fp32").decode_into(part.encode(unit, unit + 1)[0], found)
    return found


def test_what_missed_its_turn_rides_in_its_next_one_and_the_others_wait_undiscounted() -> None:
    one = made(2)
    tokens = one.step(batch(0)).tokens
    weights = []
    for number in range(4):
        units = one.fragments.of(number)
        part = one.contribution(units)
        weights.append(part.weight)
        if number:  # the first one comes too late
            one.apply(reduce(one, [part], units), flags(units), units.start)
        one.step(batch(number + 1))
    # Fragment 0 was in no outcome at first: a turn late, so 1 / 1.5 of what it had then.
    assert weights == pytest.approx([tokens, 2 * tokens, 2 * tokens + tokens / 1.5, 2 * tokens])


def test_error_feedback_loses_nothing_of_a_fragment() -> None:
    one = made(4, codec="sparse", lr=1.0, momentum=0.0)
    for number in range(9):
        one.step(batch(number))
        units = one.fragments.of(number)
        where = values(one, units)
        before = one.inner_state()["residual"].copy()
        delta = gap(one)[where]
        part = one.contribution(units)
        sent = np.concatenate([_sparse(one, u, part) for u in units])
        included = number % 3 != 2
        one.apply(reduce(one, [part], units), flags(units, included), units.start)
        after = one.inner_state()["residual"]
        if included:
            assert np.abs(sent + after[where] - (0.95 * before[where] + delta)).max() <= 1e-5
        else:
            assert np.array_equal(after[where], before[where])
        after[where] = before[where]
        assert np.array_equal(after, before), "other fragments' residuals are theirs"


def _sparse(one: FlatMethod, unit: int, part: FrozenWork) -> np.ndarray[Any, np.dtype[np.float32]]:
    from tensorcodecs import get_codec

    where = one.inner.layout.unit_slice(unit)
    found = np.empty(where.stop - where.start, np.float32)
    get_codec("sparse").decode_into(part.encode(unit, unit + 1)[0], found)
    return found


def test_an_outcome_of_anything_but_a_fragment_is_refused() -> None:
    one = made(2)
    one.step(batch(0))
    units = one.fragments.of(0)
    outcome = reduce(one, [one.contribution(units)], units)
    before = one.digest()
    for first, some in ((1, outcome), (0, outcome * 2), (0, outcome[:1]), (-1, outcome)):
        with pytest.raises(ValueError, match="no fragment"):
            one.apply(some, np.ones(len(some), np.bool_), first)
    with pytest.raises(ValueError, match="flags"):
        one.apply(outcome, np.ones(len(outcome) + 1, np.bool_))
    assert one.digest() == before


def test_tau_puts_off_the_merge_and_changes_nothing_else() -> None:
    now, later, alone = made(2), made(2, tau=3), made(2)
    for one in (now, later, alone):
        one.step(batch(0))
    units = now.fragments.of(0)
    outcome = reduce(now, [now.contribution(units)], units)
    later.contribution(units)
    local = later.inner.to_numpy()
    for one in (now, later):
        one.apply(outcome, flags(units), units.start)
    assert now.digest() == later.digest(), "the outer state does not wait"
    shift = now.inner.to_numpy() - local
    assert np.abs(shift).max() > 1e-3
    for seed in (1, 2, 3):
        assert np.array_equal(later.inner.to_numpy(), alone.inner.to_numpy())
        for one in (later, alone):
            one.step(batch(seed))
    assert np.abs(later.inner.to_numpy() - alone.inner.to_numpy() - shift).max() <= 1e-6
    # A contribution that comes before tau steps were made must not miss the merge.
    early = made(2, tau=100)
    early.step(batch(0))
    early.contribution(units)
    early.apply(outcome, flags(units), units.start)
    early.contribution(early.fragments.of(1))
    assert np.abs(early.inner.to_numpy() - now.inner.to_numpy()).max() <= 1e-6


def test_alpha_keeps_a_share_of_the_local_values_where_the_contribution_is_inside() -> None:
    for mine in (True, False):
        full, half = made(2), made(2, alpha=0.5)
        for one in (full, half):
            one.step(batch(0))
        units = full.fragments.of(0)
        local = full.inner.to_numpy()
        outcome = reduce(full, [full.contribution(units)], units)
        half.contribution(units)
        for one in (full, half):
            one.apply(outcome, flags(units, mine), units.start)
        assert full.digest() == half.digest()
        merged = full.inner.to_numpy()
        expected = 0.5 * local + 0.5 * merged if mine else merged
        assert np.abs(half.inner.to_numpy() - expected).max() <= 1e-6


def test_a_difference_of_histories_weighs_a_turn_of_the_others() -> None:
    """P rounds of theirs are in each contribution of theirs, so as many of ours count."""
    for fragments in (1, 4):
        owed = Owed([1] * 4, fragments=fragments)
        owed.reconciled(800.0, 8)
        owed.add(100)
        turn = np.arange(4) < 4 // fragments
        assert owed.freeze(None, turn) == pytest.approx(fragments * 900 / 9)


STEPS = 12  # inner steps of a peer in a turn of all fragments


def learned(fragments: int, turns: int, **changes: Any) -> tuple[float, list[int]]:
    """(held-out loss after what two peers did, bytes of one's contribution to each round)."""
    peers = [made(fragments, codec="q4", lr=0.7, momentum=0.5, **changes) for _ in range(2)]
    sizes = []
    seeds = iter(range(10**6))
    for number in range(turns * fragments):
        for one in peers:
            for _ in range(STEPS // fragments):
                one.step(batch(next(seeds)))
        units = peers[0].fragments.of(number)
        parts = [one.contribution(units) for one in peers]
        sizes.append(sum(map(len, parts[0].encode(units.start, units.stop))))
        # The next round trains while the outcome is on its way.
        outcome = reduce(peers[0], parts, units)
        for one in peers:
            one.apply(outcome, flags(units), units.start)
    assert peers[0].digest() == peers[1].digest()
    return peers[0].evaluate([batch(-1 - i) for i in range(8)]), sizes


def test_fragments_learn_as_whole_rounds_do_and_a_round_sends_a_share_of_the_bytes() -> None:
    """While the loss falls fast: at the end of a turn the other fragments are a part of it behind,
    so they are no worse than whole rounds that stopped a turn earlier; alpha holds back more."""
    earlier, _ = learned(1, 4)
    before, all_bytes = learned(1, 5)
    assert before < 0.5 * earlier
    options: list[tuple[int, float, dict[str, Any]]] = [
        (2, before, {}),
        (4, before, {}),
        (4, earlier, {"alpha": 0.5, "tau": 1}),
    ]
    for fragments, bound, changes in options:
        loss, sizes = learned(fragments, 6, **changes)
        assert loss <= bound, f"{fragments}: {loss} after {bound}"
        # The tiny layout's last unit is shorter, so a fragment may be a quarter off its share.
        assert max(sizes) <= 1.3 * max(all_bytes) / fragments
        assert sum(sizes[-fragments:]) == pytest.approx(np.mean(all_bytes), rel=0.15)


def test_adapters_take_turns_too() -> None:
    peers = [method("lora", fragments=3) for _ in range(2)]
    for number in range(6):
        units = peers[0].fragments.of(number)
        parts = []
        for i, one in enumerate(peers):
            one.step(batch(10 * i + number))
            parts.append(one.contribution(units))
        outcome = reduce(peers[0], parts, units)
        for one in peers:
            one.apply(outcome, flags(units), units.start)
        assert peers[0].digest() == peers[1].digest()


def test_invalid_values_name_their_field() -> None:
    some = tiny.manifest()
    for changes, message in (
        ({"fragments": 0}, r"schedule\.fragments: must be 1 to 16"),
        ({"fragments": 17}, r"schedule\.fragments: must be 1 to 16"),
        ({"fragments": 8, "round_s": 0.4}, r"schedule\.round_s: .*8 fragments"),
    ):
        with pytest.raises(ManifestError, match=message):
            dataclasses.replace(some.schedule, **changes)
    for outer, message in (
        ({"tau": -1}, r"outer\.tau: must be 0"),
        ({"alpha": 1.0}, r"outer\.alpha: must be from 0 to less than 1"),
    ):
        with pytest.raises(ManifestError, match=message):
            dataclasses.replace(some.outer, **outer)
    with pytest.raises(ManifestError, match=r"schedule\.fragments: must be 1 where outer\.async"):
        dataclasses.replace(
            some,
            outer=dataclasses.replace(some.outer, asynchronous=True),
            schedule=dataclasses.replace(some.schedule, fragments=2),
        )
