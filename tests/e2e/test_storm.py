"""Eight peers in two groups and two bootstrap nodes in a storm of kills, freezes and leaves.

The seed is printed; with it the same faults are drawn again. For longer storms by hand:

    MURMURATION_STORM_MINUTES=20 MURMURATION_STORM_SEED=7 pytest -s tests/e2e/test_storm.py
"""

from __future__ import annotations

import itertools
import os
import random
import re
import time
from collections import Counter
from pathlib import Path
from statistics import median
from typing import Final

from protocols import limits
from protocols.ranges import Ranges
from protocols.steering import PATIENCE_S
from tests.e2e.processes import Fact
from tests.e2e.storm import CALM_S, EXCHANGE_S, ROUND_S, Life, Storm, storm
from tests.e2e.storm_plan import OUT_MAX, Deed, Role, draw

GROUPS: Final = {site: [f"{site}{number}" for number in range(4)] for site in "ab"}
NODES: Final = ["n0", "n1"]

GAP_S_MAX: Final = ROUND_S + 3 * EXCHANGE_S + limits.SUSPECT_AFTER_S + PATIENCE_S
"""Between two rounds of a group: training, the end of a round however often it was revised, and
the time to notice that a coordinator is gone or useless. Liveness, not speed."""

HARMLESS: Final = [
    re.compile(pattern)
    for pattern in (
        # The sender's round, plan or view of the group is a little older or newer than ours.
        r"round \d+; we are in round \d+",
        r"epoch \d+; span \d+ is of (epoch )?\d+",
        r"is of group .*, ours is .*",
        r"plans for a group that it is not in",
        r"is not in the roster of round \d+",
        # The span was given to another aggregator, or is closed.
        r"span \d+ is not ours to reduce",
        r"span \d+ is closed",
        r"span \d+ with other bounds",
        r"does not aggregate span \d+",
        r"hands over an outcome of another round",
        # It died in the middle of a stream.
        r"ended its contribution early",
        r"an outcome that ends early",
    )
]
"""Refusals that come of being out of step for a moment; all others are breaches."""


def test_a_storms_plan_is_a_function_of_its_seed_and_leaves_nobody_alone() -> None:
    for seed in range(300):
        plan = draw(seed, 120.0, GROUPS, NODES)
        assert plan == draw(seed, 120.0, GROUPS, NODES), seed
        assert plan != draw(seed + 1, 120.0, GROUPS, NODES), seed
        assert [f.at_s for f in plan] == sorted(f.at_s for f in plan), seed
        assert {f.target for f in plan if f.deed is Deed.kill and not f.role} >= set(NODES), seed
        roles = {(f.target, f.role) for f in plan if f.role}
        assert roles == {(group, role) for group in GROUPS for role in Role}, seed
        for group, names in GROUPS.items():
            here = [f for f in plan if f.target in (group, *names)]
            for fault in here:
                out = [f for f in here if f.at_s <= fault.at_s < f.at_s + f.out_s]
                assert len(out) <= OUT_MAX, (seed, fault)


async def test_two_groups_live_through_a_storm_of_kills_freezes_and_leaves(tmp_path: Path) -> None:
    length_s = 60 * float(os.environ.get("MURMURATION_STORM_MINUTES", "2"))
    seed = int(os.environ.get("MURMURATION_STORM_SEED", random.SystemRandom().randrange(10**6)))
    plan = draw(seed, length_s, GROUPS, NODES)
    print(f"storm with seed {seed}: {len(plan)} faults in {length_s:g} s")
    async with storm(tmp_path, GROUPS, NODES) as it:
        try:
            await it.assemble()
            await it.rage(plan)
            await it.calm(CALM_S, time.time())
            print("\n".join(report(it)))
            check_office_holders_died(it)
            for group in it.groups:
                check_agreement(it, group)
                check_liveness(it, group)
                check_accounts_agree(it, group)
            for life in it.lives():
                check_once(life)
                check_account(life)
                check_refusals(life)
            for seat in it.peers:
                check_carried_over(seat.lives)
                assert seat.life.working, f"{seat.process.name} never contributed again"
            await it.leave()
        except AssertionError as error:
            raise AssertionError(f"storm with seed {seed}: {error}") from error


# ── what has to hold ─────────────────────────────────────────────────────────────────────
def check_office_holders_died(it: Storm) -> None:
    """Every bootstrap node, and a coordinator and an aggregator of each group, were killed."""
    killed = {blow.seat for blow in it.blows if blow.fault.deed is Deed.kill}
    assert killed >= set(NODES), killed
    offices = {(b.fault.target, b.fault.role) for b in it.blows if b.office}
    assert offices == {(group, role) for group in GROUPS for role in Role}, offices


def check_agreement(it: Storm, group: str) -> None:
    """The group's members stand at the same state, by the last round that all of them finished."""
    told = [
        {fact["round"]: fact["digest"] for fact in seat.process.rounds}
        for seat in it.members(group)
    ]
    last = max(set.intersection(*(set(rounds) for rounds in told)))
    digests = {rounds[last] for rounds in told}
    assert len(digests) == 1, f"{group}, round {last}: {digests}"


def check_accounts_agree(it: Storm, group: str) -> None:
    """The group's members have the same account of the data's blocks after a late whole round."""
    last = it.whole_rounds(group)[-2]  # of the very last, somebody may not have told all yet
    told = [
        {name: value for name, value in fact.items() if name != "t"}
        for seat in it.members(group)
        for fact in seat.process.all("BlocksCounted")
        if fact["round"] == last
    ]
    assert len(told) == len(it.members(group)), f"{group}, round {last}: {len(told)} accounts"
    assert all(account == told[0] for account in told), f"{group}, round {last}: {told}"


def check_account(life: Life) -> None:
    """The ledger adds up from round to round, until a transfer brings another's."""
    before: Fact | None = None
    seen = Ranges()
    for fact in life.events:
        if fact["event"] == "StateReceived":
            before, seen = None, Ranges()
        if fact["event"] != "BlocksCounted":
            continue
        where = f"{life.process.name}, round {fact['round']}"
        pieces = [tuple(piece) for ranges in fact["by"].values() for piece in ranges]
        new = sum(b - a for a, b in pieces)
        assert sum(seen.add(a, b) for a, b in pieces) == new, f"{where}: a block counted twice"
        if before is not None and fact["round"] == before["round"] + 1:
            assert fact["trained"] == before["trained"] + new, f"{where}: {before} then {fact}"
        settled = fact["trained"] + fact["lost"] + fact["elsewhere"]
        assert settled >= fact["floor"], f"{where}: {fact}"
        before = fact


def check_liveness(it: Storm, group: str) -> None:
    """The group finished round after round all the time."""
    gap_s, at_s = longest_gap(it, group)
    assert gap_s < GAP_S_MAX, f"{group} stood still for {gap_s:.1f} s from {at_s:.1f} s on"


def check_once(life: Life) -> None:
    """No round was applied twice or after a later one, but what a transfer says it goes back to."""
    stands_at = -1
    for fact in life.events:
        if fact["event"] == "StateReceived":
            stands_at = fact["round"]
        elif fact["event"] == "RoundFinished":
            name = life.process.name
            assert fact["round"] >= stands_at, f"{name}: round {fact['round']} after {stands_at}"
            stands_at = fact["round"] + 1


def check_carried_over(lives: list[Life]) -> None:
    """What a life reported, the next one in the same home starts from."""
    for before, after in itertools.pairwise(lives):
        reported = stand(before)
        if after.fresh or reported is None or not after.process.all("Started"):
            continue
        loaded = after.process.last("CheckpointLoaded")
        name = after.process.name
        assert loaded is not None, f"{name} found nothing on its disk, {reported} was reported"
        assert loaded["round"] >= reported, f"{name}: {loaded['round']}, {reported} was reported"


def check_refusals(life: Life) -> None:
    """Nobody was taken for a liar: all were honest."""
    for fact in life.process.all("PeerRefused"):
        known = any(pattern.fullmatch(fact["reason"]) for pattern in HARMLESS)
        assert known, f"{life.process.name} refused {fact['peer']}: {fact['reason']}"


# ── what was seen ────────────────────────────────────────────────────────────────────────
def stand(life: Life) -> int | None:
    """Rounds in the state that a life last told of."""
    for fact in reversed(life.events):
        if fact["event"] == "RoundFinished":
            return int(fact["round"]) + 1
        if fact["event"] in ("StateReceived", "CheckpointLoaded"):
            return int(fact["round"])
    return None


def longest_gap(it: Storm, group: str) -> tuple[float, float]:
    """(seconds, when in the storm) in which no member of the group finished a round."""
    times = [f["t"] - it.begun_s for f in finished(it, group) if f["t"] > it.begun_s]
    edges = [0.0, *sorted(times)]
    return max((after - before, before) for before, after in itertools.pairwise(edges))


def finished(it: Storm, group: str) -> list[Fact]:
    return [fact for life in it.lives(group) for fact in life.process.rounds]


def report(it: Storm) -> list[str]:
    """The storm in a few lines, for whoever watches."""
    deeds = Counter(str(blow.fault.deed) for blow in it.blows)
    lines = [f"struck: {dict(deeds)}; {sum(1 for _ in it.lives())} lives of peers"]
    for group in it.groups:
        facts = [fact for fact in finished(it, group) if fact["t"] > it.begun_s]
        digests: dict[int, set[str]] = {}
        inside: dict[int, int] = {}
        for fact in facts:
            digests.setdefault(fact["round"], set()).add(fact["digest"])
            if fact["spans"]:
                inside[fact["round"]] = min(len(s["contributors"]) for s in fact["spans"])
        apart = [number for number, seen in digests.items() if len(seen) > 1]
        gap_s, at_s = longest_gap(it, group)
        lines.append(
            f"{group}: {len(digests)} rounds, work of {sum(inside.values()) / len(inside):.2f} of 4"
            f" peers in each, {len(apart)} with two outcomes {apart}; longest gap {gap_s:.1f} s"
            f" at {at_s:.0f} s"
        )
    kinds = Counter(f["event"] for life in it.lives() for f in life.events)
    shown = ("DigestDiffered", "StateReceived", "CaughtUp", "CheckpointLoaded", "DaemonRestarted")
    lines.append(", ".join(f"{kinds[kind]} {kind}" for kind in shown))
    reasons = Counter(
        re.sub(r"\d+", "N", f["reason"]) for x in it.lives() for f in x.process.all("PeerRefused")
    )
    lines += [f"  refused {count} times: {reason}" for reason, count in reasons.most_common()]
    waits = sorted(
        next(f["t"] for f in life.process.rounds if f["included"] and f["t"] > life.returned_s)
        - life.returned_s
        for life in it.lives()
        if life.returned_s > it.begun_s and life.working
    )
    accounts = [f for g in it.groups for f in it.members(g)[0].process.all("BlocksCounted")[-1:]]
    lines += [
        f"{a['group']}: {a['trained']} blocks trained, {a['repeated']} of them again,"
        f" {a['reissued']} re-issued, {a['lost']} lost"
        for a in accounts
    ]
    if waits:
        lines.append(f"back at work after {median(waits):.1f} s, at worst {waits[-1]:.1f} s")
    return lines
