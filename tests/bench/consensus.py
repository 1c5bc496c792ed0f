"""Consensus: how near each other gossip keeps the groups of 1,000 peers, in virtual time.

Every peer runs the product's own gossip machine and table of mixes, over a lossy network on which
members die (`tests/sim/gossip_world`); a state is one number to each slot, training a random step
of it in every round of every group, and differences are as inexact as the codec makes them. Three
questions: does the distance between groups stay bounded while all of them learn apart; does it go
away when learning stops; and how long does what one group has learned take to all others, where
there are more groups.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Final

from peer.manifest import GroupSpec, ScheduleSpec
from tests.bench.result import Bar, Cell, Progress, Result
from tests.sim.gossip_world import GossipWorld

EVERY: Final = ScheduleSpec().gossip_every
OFTEN: Final = 4
"""Rounds between two mixes where these get into each other's way."""
SLOTS: Final = GroupSpec().aggregators_max
ROUND_S: Final = 5.0
LOSS: Final = 0.05
CRASH: Final = 0.02
CODED: Final = 0.2
"""Error of a difference / the difference: 0.14 by what is lent in six bits and 0.15 by q4."""

_UNIT: Final = 10**15  # numbers are whole: a thousandth of a thousandth still has nine digits
_STEP: Final = _UNIT // 1000
_NEAR: Final = 0.01


@dataclass(frozen=True, slots=True)
class _Scale:
    peers: int = 1000
    groups: tuple[int, ...] = (64, 128)
    """Of all peers."""
    learning: int = 18
    """Mixing periods of `EVERY` rounds in which groups learn."""
    spread: tuple[int, ...] = (8, 16, 32, 64, 128)
    """Groups among which one's knowledge spreads."""
    members: int = 3
    """Of each of those."""
    seeds: int = 3


_QUICK: Final = _Scale(peers=24, groups=(8,), learning=6, spread=(4, 8), members=2, seeds=1)


def run(quick: bool, seed: int, progress: Progress) -> Result:
    """See `registry.Measurement`. A few minutes on one core; quick: seconds."""
    scale = _QUICK if quick else _Scale()
    rows: list[dict[str, Cell]] = []
    bars: list[Bar] = []
    for groups in scale.groups:
        progress(f"{scale.peers} peers in {groups} groups ...")
        row, held = _together(seed, scale, groups)
        rows.append(row)
        bars += held
    progress(f"{scale.peers} peers in {scale.groups[0]} groups that mix every {OFTEN} rounds ...")
    rows.append(_together(seed, scale, scale.groups[0], OFTEN)[0])
    times: list[tuple[int, float]] = []
    done: list[float] = []
    for groups in scale.spread:
        progress(f"what one of {groups} groups knows ...")
        row = _spreading(seed, scale, groups)
        rows.append(row)
        times.append((groups, float(row["rounds to 1 %"] or math.nan)))
        done.append(float(row["mixes done / due"] or math.nan))
    bars += _growth(times, fmean(done))
    return Result(rows, bars, _notes(scale))


# ── all learn, then none ─────────────────────────────────────────────────────────────────
def _together(
    seed: int, scale: _Scale, groups: int, every: int = EVERY
) -> tuple[dict[str, Cell], list[Bar]]:
    world = _world(seed, scale.peers, groups, [_UNIT] * SLOTS, every)
    before = world.mass()
    world.learn = _STEP
    thirds = [_levels(world, scale.learning // 3 * every) for _ in range(3)]
    middle, late = (fmean(levels) for levels in thirds[1:])
    begun = _mixes(world)
    rounds = _rounds(world)
    world.learn = 0.0
    stopped = _variance(world)
    limit = 4 * math.ceil(_periods(1 / _NEAR**2))
    levels = [math.sqrt(stopped)]
    while levels[-1] > _NEAR * levels[0] and len(levels) <= limit * every:
        _run(world, 1)
        levels.append(math.sqrt(_variance(world)))
    took = _rounds(world) - rounds
    mixes = _mixes(world) - begun
    # d ln(variance) / mix, against its expectation.
    measured = 2 * math.log(levels[-1] / levels[0]) / (mixes / SLOTS)
    theory = math.log1p(-(1 - CODED**2) / (groups - 1))
    per_round = mixes / SLOTS / groups / took
    # Every round adds its steps, every mix takes its share: they balance at this variance.
    steady = _STEP / _UNIT / math.sqrt((1 - CODED**2) * per_round)
    name = f"consensus: {scale.peers} peers in {groups} groups"
    lost = sum(abs(a - b) for a, b in zip(world.mass(), before, strict=True))
    row = _row(
        f"{scale.peers} peers: all learn, then none", groups, every, took,
        mixes / SLOTS / groups * every / took, measured / theory,
    )  # fmt: skip
    row["apart while learning"] = f"{late:.3%}"
    row["by theory"] = f"{steady:.3%}"
    row["apart at the end"] = f"{levels[-1]:.4%}"
    alone = _STEP / _UNIT * math.sqrt(scale.learning * every)
    return row, [
        Bar.at_most(
            f"{name}, all learning: distance in the last third of the time / in the middle one",
            late / middle, 1.1, f"bounded; without gossip it would grow to {alone:.1%}, by 1.3",
        ),
        Bar.at_most(
            f"{name}, all learning: distance / by theory", late / steady, 1.25,
            "steps of every round against mixes as often as there were",
        ),
        Bar.at_most(
            f"{name}, after learning: distance / when it stopped",
            levels[-1] / levels[0], _NEAR, f"after {took:.0f} rounds",
        ),
        Bar.at_least(
            f"{name}, after learning: logarithm of the distance lost in a mix / by theory",
            measured / theory, 0.8, "a random pair meets half-way",
        ),
        Bar.at_most(f"{name}: mass lost", float(lost), 0, "whole numbers; loss and deaths go on"),
    ]  # fmt: skip


# ── one knows, then all ──────────────────────────────────────────────────────────────────
def _spreading(seed: int, scale: _Scale, groups: int) -> dict[str, Cell]:
    """In each slot one group holds what all should have a share of."""
    times: list[float] = []
    shares: list[float] = []
    ratios: list[float] = []
    for number in range(scale.seeds):
        world = _world(f"{seed}/{number}", groups * scale.members, groups, [0] * SLOTS)
        for slot in range(SLOTS):
            one = world.rng.choice(list(world.groups.values()))
            one.head.values[slot] = groups * _UNIT
            for member in one.living:
                member.state.values[slot] = groups * _UNIT
        reached = [math.nan] * SLOTS
        first = _variance(world)
        while any(math.isnan(time) for time in reached) and _rounds(world) < 1000:
            _run(world, 0.5)
            for slot, worst in enumerate(_worst(world)):
                if math.isnan(reached[slot]) and worst <= _NEAR:
                    reached[slot] = _rounds(world)
        times += reached
        mixes = _mixes(world) / SLOTS
        shares.append(mixes / groups / _rounds(world) * EVERY)
        ratios.append(
            math.log(_variance(world) / first) / mixes / math.log1p(-(1 - CODED**2) / (groups - 1))
        )
    return _row(
        f"{groups * scale.members} peers: one group knows, then all", groups, EVERY,
        fmean(times), fmean(shares), fmean(ratios),
    )  # fmt: skip


def _growth(times: Sequence[tuple[int, float]], share: float) -> list[Bar]:
    """`share`: of the mixes that were due, those that happened."""
    intercept, slope, worst = fit(times)
    (first, least), (last, most) = times[0], times[-1]
    most_by_theory = 2 * EVERY / (share * (1 - CODED**2))
    return [
        Bar.at_most(
            f"consensus: rounds until every group is within 1 %, {last} groups / {first}",
            most / least, round(math.log(last) / math.log(first), 2), "log(groups) grows so much",
        ),
        Bar.at_most(
            f"consensus: these rounds, largest residual of their fit / growth from {first} groups"
            f" to {last}", worst / abs(most - least), 0.25,
            f"least squares, {intercept:.1f} + {slope:.2f} ln(groups)",
        ),
        Bar.at_most(
            "consensus: rounds that e times as many groups need more / the most by theory",
            slope / most_by_theory, 1.25,
            f"two mixing periods, by what happened: {most_by_theory:.1f} rounds",
        ),
    ]  # fmt: skip


def fit(times: Sequence[tuple[int, float]]) -> tuple[float, float, float]:
    """(a, b, the largest residual) of time = a + b ln(groups), by least squares."""
    logs = [math.log(groups) for groups, _ in times]
    middle, mean = fmean(logs), fmean(time for _, time in times)
    slope = sum((x - middle) * (time - mean) for x, (_, time) in zip(logs, times, strict=True))
    slope /= sum((x - middle) ** 2 for x in logs)
    intercept = mean - slope * middle
    worst = max(abs(time - intercept - slope * x) for x, (_, time) in zip(logs, times, strict=True))
    return intercept, slope, worst


# ── helpers ──────────────────────────────────────────────────────────────────────────────
def _world(
    seed: int | str, peers: int, groups: int, values: Sequence[int], every: int = EVERY
) -> GossipWorld:
    world = GossipWorld(
        seed, units=SLOTS, slots=SLOTS, every=every, loss=LOSS, crash=CRASH, round_s=ROUND_S,
        coded=CODED,
    )  # fmt: skip
    for index in range(groups):
        size = peers * (index + 1) // groups - peers * index // groups
        world.add_group(f"g{index}", size, values)
    return world


def _run(world: GossipWorld, rounds: float) -> None:
    world.run(rounds * ROUND_S)


def _rounds(world: GossipWorld) -> float:
    """That a group has done, the mean."""
    return fmean(len(group.log) for group in world.groups.values())


def _mixes(world: GossipWorld) -> float:
    """Sides of mixes that are in a state, in pairs; one number is mixed in each."""
    return sum(sum(group.applied.values()) for group in world.groups.values()) / 2


def _columns(world: GossipWorld) -> list[list[float]]:
    """Every slot's numbers, by group, in `_UNIT`s."""
    heads = [group.head.values for group in world.groups.values()]
    return [[value / _UNIT for value in column] for column in zip(*heads, strict=True)]


def _variance(world: GossipWorld) -> float:
    """Mean square of the distance from the mean of all groups, over groups and slots."""
    squares = []
    for column in _columns(world):
        mean = fmean(column)
        squares.append(fmean((x - mean) ** 2 for x in column))
    return fmean(squares)


def _worst(world: GossipWorld) -> list[float]:
    """In each slot: how far the furthest group is from the mean / that mean."""
    return [max(abs(x / fmean(column) - 1) for x in column) for column in _columns(world)]


def _levels(world: GossipWorld, rounds: int) -> list[float]:
    """Distances after each of so many rounds."""
    levels = []
    for _ in range(rounds):
        _run(world, 1)
        levels.append(math.sqrt(_variance(world)))
    return levels


def _periods(ratio: float) -> float:
    """Mixing periods in which the variance falls by `ratio`, if every mix that is due happens."""
    return math.log(ratio) / (1 - CODED**2)


def _row(
    what: str, groups: int, every: int, took: float, share: float, ratio: float
) -> dict[str, Cell]:
    return {
        "what": what,
        "groups": groups,
        "mix every": every,
        "rounds to 1 %": f"{took:.1f}",
        "mixes done / due": f"{share:.2f}",
        "contraction / theory": f"{ratio:.2f}",
        "apart while learning": "-",
        "by theory": "-",
        "apart at the end": "-",
    }


def _notes(scale: _Scale) -> list[str]:
    setting = (
        f"Each group mixes every {EVERY} rounds of its own in each of {SLOTS} slots; "
        f"{LOSS:.0%} of everything that crosses the network is lost, in {CRASH:.0%} of a group's "
        "rounds a member dies at some moment and another comes; a difference that is mixed has a "
        f"relative error of {CODED:g} (a loan of six bits and q4)."
    )
    learning = (
        f"All learn: in every round of every group each slot's number moves by a normal step of "
        f"{_STEP / _UNIT:.1%} of its size, of each group its own: the part of learning that they "
        "do not share. Apart: rms distance of groups from their mean / that mean."
    )
    theory = (
        "Theory: a mix of two groups at random takes (1 - e^2) / (G - 1) of the sum of squared "
        "distances, where e is the error of the difference (the mean squared gap of two of G "
        "groups is 2 / (G - 1) of that sum, and meeting half-way takes half of a squared gap; "
        "randomized gossip, Boyd et al. 2006). If each group begins one mix in M rounds and f of "
        "them happen, the variance falls by exp(-f (1 - e^2)) in M rounds, however many groups "
        "there are: rms distances halve every 1.39 M / f rounds at e = 0. Steps of variance s^2 "
        "a round then keep it at M s^2 / (f (1 - e^2)). Mixes are counted as they happened; a due "
        "one does not happen where the other group was busy, and waits for the next turn."
    )
    spreading = (
        "One group knows: in each slot one group holds what is G times the mean and all others "
        "hold nothing, the worst start there is; time until the furthest group is within 1 % of "
        f"the mean, the mean of {scale.seeds} seeds and {SLOTS} slots. The sum of squared "
        "distances begins at G (G - 1) squared means. If all groups were equally far, 1 % would "
        "be reached after ln(G) + 9.2 periods in which the variance falls by e; as no group is "
        "further than the root of that sum, 2 ln(G) + 9.2 do in any case."
    )
    overlap = (
        "Where groups are larger a mix does less: who lends is alone in its group to know of the "
        "loan until -d arrives, so another member can lend or borrow the same slot meanwhile. "
        f"The more often groups mix, the more of that: see the row of `gossip_every` = {OFTEN}."
    )
    return [setting, learning, theory, spreading, overlap]
