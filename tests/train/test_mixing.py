"""A mix of two states: the same bytes with two signs, once each, whatever strangers send."""

from __future__ import annotations

import random

import numpy as np
import pytest

from peer.errors import ManifestError
from peer.manifest import Manifest, ScheduleSpec
from peer.train.composite import MAGIC, Mix, compose, has_mixes, split
from peer.train.flat import FlatMethod
from peer.train.mixing import TooFarError, UnitMixer, add_mix
from peer.train.mixtable import MixTable
from protocols import limits
from tensorcodecs import DecodeError, get_codec
from tests.train.tiny import batch, manifest, method, reduce

SIZES = (5000, 300)


def state(seed: int, size: int = SIZES[0]) -> np.ndarray:
    rng = np.random.default_rng(seed)
    return np.stack([rng.normal(size=size), 0.01 * rng.normal(size=size)]).astype(np.float32)


def mixer(codec: str = "q4") -> UnitMixer:
    return UnitMixer(SIZES, 2, get_codec(codec))


# ── a unit with mixes ────────────────────────────────────────────────────────────────────
def test_a_unit_with_mixes_comes_back_as_it_was() -> None:
    rng = random.Random(1)
    for count in range(limits.MIXES_PER_UNIT_MAX + 1):
        mixes = tuple(
            Mix(rng.randrange(1, 2**63), rng.randrange(1, 2**48), rng.choice([1, -1]),
                rng.randbytes(rng.randrange(50)))
            for _ in range(count)
        )  # fmt: skip
        for mean in (b"", b"MTC and so on"):
            assert split(compose(mean, mixes)) == (mean, mixes)
            assert has_mixes(compose(mean, mixes)) == bool(count)


def test_a_unit_without_mixes_is_its_mean() -> None:
    assert compose(b"mean", ()) == b"mean"
    with pytest.raises(ValueError, match="5 mixes"):
        compose(b"", [Mix(i + 1, 1, 1, b"") for i in range(5)])


def test_every_truncation_and_lie_of_a_composite_is_refused() -> None:
    mix = Mix(7, 9, -1, b"payload")
    whole = compose(b"mean", [mix])
    for cut in range(4, len(whole)):
        with pytest.raises(DecodeError):
            split(whole[:cut])
    for bad in (
        whole + b"x",
        compose(b"mean", [mix, mix]),
        compose(MAGIC + b"within", [mix]),
        compose(b"mean", [Mix(0, 9, 1, b"")]),
        compose(b"mean", [Mix(2**63, 9, 1, b"")]),
        compose(b"mean", [Mix(7, 0, 1, b"")]),
        compose(b"mean", [Mix(7, 9, 2, b"")]),
        MAGIC + bytes(4) + b"\x00",
        MAGIC + bytes(4) + b"\xff" + bytes(2000),
    ):
        with pytest.raises(DecodeError):
            split(bad)


def test_random_bytes_are_refused_or_split_into_what_they_say() -> None:
    rng = random.Random(2)
    for _ in range(3000):
        data = MAGIC + rng.randbytes(rng.randrange(80))
        try:
            mean, mixes = split(data)
        except DecodeError:
            continue
        assert compose(mean, mixes) == data


# ── which mixes are in ───────────────────────────────────────────────────────────────────
def test_a_mix_counts_once_and_never_again_even_when_it_is_forgotten() -> None:
    """Against a set that never forgets: what the table admits, that set does not hold."""
    for seed in range(30):
        rng = random.Random(seed)
        table, ever = MixTable(1), set()
        known = [(rng.randrange(1, 10**6), rng.randrange(1, 300), rng.choice([1, -1]))
                 for _ in range(200)]  # fmt: skip
        for _ in range(2000):
            mix, until, sign = rng.choice(known)
            if table.admits(0, mix, until, sign):
                assert mix not in ever, f"seed {seed}"
                ever.add(mix)
                table.add(0, mix, until, sign)
        assert len(ever) > limits.MIX_ROWS_TAKEN


def test_a_table_remembers_and_its_masks_say_what() -> None:
    table = MixTable(10)
    for unit in (2, 3, 7):
        table.add(unit, 99, 5, -1)
    assert table.mask(99, 1, 9) == 0b1000110
    assert table.mask(98, 1, 9) == 0
    assert table.has(7, 99)
    assert not table.admits(7, 99, 5, -1)
    assert table.forgotten(5, -1, 0, 10) == 0
    assert table.copy(slice(2, 4)).mask(99, 0, 2) == 0b11
    with pytest.raises(ValueError, match="mixes"):
        table.load(np.zeros((9, 66, 2), np.uint64))


def test_what_is_pushed_out_raises_the_floor() -> None:
    table = MixTable(1)
    for mix in range(1, limits.MIX_ROWS_TAKEN + 2):
        table.add(0, mix, 1000 + mix, -1)
    assert not table.has(0, 1)
    assert not table.admits(0, 1, 1001, -1)
    assert table.forgotten(1001, -1, 0, 1) == 1
    assert table.admits(0, 5000, 1002, -1)
    assert table.admits(0, 5000, 1, 1), "the other sign has a floor of its own"


# ── the arithmetic ───────────────────────────────────────────────────────────────────────
@pytest.mark.parametrize("codec", ["q4", "high", "fp32"])
def test_both_sides_of_a_mix_hold_what_they_held(codec: str) -> None:
    ours, theirs = state(1), (state(1) + 0.02 * state(2)).astype(np.float32)
    total = ours.astype(np.float64) + theirs
    before = np.abs(theirs - ours).mean()
    difference = mixer(codec).difference(0, ours, mixer(codec).lend(theirs, (2.0, 0.02)))
    d_VU = mixer(codec).decode(0, difference.payload)
    add_mix(list(ours), d_VU, 1)
    add_mix(list(theirs), d_VU, -1)
    assert np.abs(ours.astype(np.float64) + theirs - total).max() < 1e-6
    assert np.abs(theirs - ours).mean() < 0.3 * before
    assert len(difference.ratios) == 2


def test_who_is_too_far_away_asks_for_it_exactly() -> None:
    ours, theirs = state(1), state(3)
    with pytest.raises(TooFarError):
        mixer().difference(0, ours, mixer().lend(theirs, (0.01, 0.01)))
    exact = mixer("fp32").difference(0, ours, mixer().lend(theirs, (), exact=True))
    assert np.allclose(mixer().decode(0, exact.payload), (theirs - ours) / 2)


def test_a_hint_makes_the_next_loan_readable() -> None:
    ours, theirs = state(1), state(3)
    exact = mixer().lend(theirs, (), exact=True)
    ratios = mixer().difference(0, ours, exact).ratios
    again = mixer().difference(0, ours, mixer().lend(theirs, ratios))
    assert again.payload


def test_strangers_bytes_are_refused_before_anything_changes() -> None:
    good = mixer().difference(0, state(1), mixer().lend(state(1), ())).payload
    mixer().check(0, good)
    for bad in (b"", b"\x02", good[:-1], good + b"x", b"\x03" + good[1:], good[:9] + good[10:]):
        with pytest.raises(DecodeError):
            mixer().check(0, bad)
        with pytest.raises(DecodeError):
            mixer().decode(0, bad)
        with pytest.raises(DecodeError):
            mixer().difference(0, state(1), bad)
    with pytest.raises(DecodeError):
        mixer().check(1, good)
    with pytest.raises(DecodeError, match="neither for near receivers nor exact"):
        mixer().difference(0, state(1), good)


# ── the method ───────────────────────────────────────────────────────────────────────────
def pair(steps: int = 3) -> list[FlatMethod]:
    """Two groups of one that have learned apart."""
    both = [method(codec="fp32"), method(codec="fp32")]
    for index, one in enumerate(both):
        for step in range(steps):
            one.step(batch(10 * index + step))
        mean = reduce(one, [one.contribution()])
        one.apply(mean, np.ones(one.units, np.bool_))
    return both


def mixed(one: FlatMethod, other: FlatMethod, mix: int = 77) -> tuple[list[bytes], list[bytes]]:
    """The outcomes that mix all units of both."""
    added, taken = [], []
    for unit in range(one.units):
        lent = other.mixer().lend(other.outer(unit, unit + 1)[0], (), exact=True)
        d = one.mixer().difference(unit, one.outer(unit, unit + 1)[0], lent).payload
        added.append(compose(b"", [Mix(mix, 9, 1, d)]))
        taken.append(compose(b"", [Mix(mix, 521, -1, d)]))
    return added, taken


def whole(one: FlatMethod) -> np.ndarray:
    return np.concatenate([u.ravel() for u in one.outer(0, one.units)]).astype(np.float64)


def test_pretraining_mixes_parameters_and_momentum_once() -> None:
    one, other = pair()
    total, gap = whole(one) + whole(other), np.abs(whole(one) - whole(other)).max()
    local = one.inner.to_numpy().astype(np.float64) - one.state()["theta"]
    nobody = np.zeros(one.units, np.bool_)
    added, taken = mixed(one, other)
    one.apply(added, nobody)
    other.apply(taken, nobody)
    assert np.abs(whole(one) + whole(other) - total).max() < 1e-6
    assert np.abs(whole(one) - whole(other)).max() < 0.01 * gap
    after = one.inner.to_numpy().astype(np.float64) - one.state()["theta"]
    assert np.abs(after - local).max() < 1e-6, "local work rides along"
    digest = one.digest()
    one.apply(added, nobody)
    assert one.digest() == digest, "twice is once"


def test_without_momentum_only_parameters_are_mixed() -> None:
    """What the optimiser remembers then moves nothing; it only tells how large a step is."""
    one, other = method(momentum=0.0), method(momentum=0.0)
    for index, learner in enumerate((one, other)):
        learner.step(batch(index))
        learner.apply(reduce(learner, [learner.contribution()]), np.ones(one.units, np.bool_))
    before = one.state()
    lent = other.mixer().lend(other.outer(0, 1)[0], ())
    with_momentum = method().mixer().lend(other.outer(0, 1)[0], ())
    assert len(lent) < 0.51 * len(with_momentum)
    added, taken = mixed(one, other)
    nobody = np.zeros(one.units, np.bool_)
    one.apply(added, nobody)
    other.apply(taken, nobody)
    assert one.refused_units == other.refused_units == 0
    np.testing.assert_allclose(one.state()["theta"], other.state()["theta"], atol=1e-6)
    assert np.abs(one.state()["theta"] - before["theta"]).max() > 1e-4
    np.testing.assert_array_equal(one.state()["momentum"], before["momentum"])


def test_who_knows_the_distance_is_lent_fewer_bits() -> None:
    guessed, measured = mixer().lend(state(1), ()), mixer().lend(state(1), (2.0, 0.02))
    assert len(measured) < 0.52 * len(guessed)


def test_the_state_remembers_its_mixes() -> None:
    one, other = pair()
    added, _ = mixed(one, other)
    nobody = np.zeros(one.units, np.bool_)
    one.apply(added, nobody)
    newcomer = method()
    newcomer.load_state(one.state())
    assert newcomer.digest() == one.digest()
    newcomer.apply(added, nobody)
    assert newcomer.digest() == one.digest()


def test_a_mix_that_is_none_leaves_the_mean_in() -> None:
    one, twin = pair()
    twin.load_state(one.state())
    one.step(batch(99))
    means = reduce(one, [one.contribution()])
    nobody = np.zeros(one.units, np.bool_)
    twin.apply([compose(mean, [Mix(5, 9, 1, b"nonsense")]) for mean in means], nobody)
    assert twin.refused_units == twin.units
    one.apply(means, nobody)
    assert twin.digest() == one.digest()


def test_lora_says_that_it_does_not_mix() -> None:
    made = manifest("lora")
    assert made.schedule.gossip_every == 0
    with pytest.raises(ManifestError, match=r"schedule\.gossip_every"):
        Manifest(
            name="x", model=made.model, method=made.method, schedule=ScheduleSpec(gossip_every=4)
        )
