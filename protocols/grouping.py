"""Which group a peer stands in: by declared label or by nearness, the same answer for everybody.

A declared `--site` label is a group, and several where it has too many peers. Without one a peer
joins a group nearby: by the round trips that it measured, or, for peers that it never called, by
coordinates. Where there is none it founds one. After that a peer stays, unless

    crowded  its group has more than `members_max`: it parts in two, each half near itself
    apart    its group lies in two places: it parts between them
    far      another group with room is less than half as far, by more than `FAR_S`
    small    its group is no more than a quarter full: it joins a larger one as near as itself
    lonely   it has been alone for `LONELY_S`: company comes before nearness

Each has another threshold for parting than for joining, must hold for a while (`HOLD_S`), and after
a move a peer stays for `REST_S` unless its group is crowded or it is alone: measurements tremble,
and a move costs work. Cells (`cells`) are where peers find those to choose among; nothing here
depends on where cells end. Whoever sees the same signed records gives the same answer; those who
see others give in, as the next look shows them where everybody went.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Final

from protocols.cells import rank
from protocols.coordinates import distance_s
from protocols.records import PeerRecord
from protocols.types import GroupName, PeerId

NEAR_RTT_S: Final = 0.030  # within one country or campus; aggregation inside is fast
SAME_RTT_S: Final = 0.005  # nearer than this, differences are those of the machines
FAR_S: Final = 0.010  # coordinates are wrong by a few ms: a smaller gain is none
APART_S: Final = 0.020  # two halves nearer than this are one place
APART_RATIO: Final = 3.0  # and they part if they are so many times as far as inside,
TOGETHER_RATIO: Final = 2.0  # but join only if they are less than so many times
HOLD_S: Final[Mapping[str, float]] = {
    "crowded": 5.0,  # everybody's records arrive
    "apart": 120.0,  # coordinates follow a change within a minute or two
    "far": 120.0,
    "small": 60.0,
    "lonely": 0.0,  # it has waited already
}
LONELY_S: Final = 60.0
CROWD_WAIT_S: Final = 30.0  # a crowd that never stands still parts all the same
REST_S: Final = 600.0

Standing = tuple[PeerRecord, GroupName]
"""A peer, and the group that it stands in by its latest word, which may be newer."""


@dataclass(frozen=True, slots=True)
class Proposal:
    """What would be better, and why; the reasons are the module's."""

    group: GroupName
    why: str


class Grouping:
    """Proposals that have to prove themselves. One per peer."""

    def __init__(self, members_max: int) -> None:
        self._members_max = members_max
        self._proposal: Proposal | None = None
        self._since_s = float("-inf")
        self._moved_s = float("-inf")
        self._alone_s: float | None = None
        self._crowd: frozenset[PeerId] = frozenset()
        self._crowded_s = float("-inf")

    def decide(
        self,
        me: PeerRecord,
        others: Sequence[Standing],
        rtt_s: Mapping[PeerId, float],
        now_s: float,
    ) -> GroupName | None:
        """Where to stand now, which may be where we are; None: wait, somebody is founding one.

        `me` with the group that it stands in now; `others` are live peers.
        """
        mine = [record for record, group in others if group == me.group] if me.group else []
        if not mine:
            self._alone_s = now_s if self._alone_s is None else self._alone_s
            chosen = choose_group(me, others, rtt_s, self._members_max)
            if chosen is None:
                return None
            if chosen != me.group:
                self._proposal = self._alone_s = None
                return chosen
        else:
            self._alone_s = None
        lonely = self._alone_s is not None and now_s - self._alone_s >= LONELY_S
        wish = propose(me, mine, others, self._members_max, rtt_s, lonely=lonely)
        parting = self._proposal
        begun = parting is not None and any(group == parting.group for _, group in others)
        if parting is not None and begun and parting.why in ("crowded", "apart"):
            # Who leaves with us went first; that we are fewer now does not call it off.
            self._proposal, self._moved_s = None, now_s
            return parting.group
        resting = now_s - self._moved_s < REST_S
        if wish is None or (resting and wish.why not in ("crowded", "lonely")):
            self._proposal = None
            return me.group
        # The reason has to last, not the detail: where halves part trembles with the coordinates.
        if self._proposal is None or wish.why != self._proposal.why:
            self._since_s = self._crowded_s = now_s
        # But whoever parts with others must see the same others: until the crowd has stood still.
        crowd = frozenset(record.peer for record in mine)
        if wish.why == "crowded" and crowd != self._crowd:
            self._crowd = crowd
            if now_s - self._crowded_s < CROWD_WAIT_S:
                self._since_s = now_s
        self._proposal = wish
        if now_s - self._since_s < HOLD_S[wish.why]:
            return me.group
        self._proposal = self._alone_s = None
        self._moved_s = now_s
        return wish.group

    @property
    def undecided(self) -> bool:
        """Whether a proposal has to prove itself: look again soon."""
        return self._proposal is not None


def choose_group(
    me: PeerRecord,
    others: Iterable[Standing],
    rtt_s: Mapping[PeerId, float],
    members_max: int,
) -> GroupName | None:
    """The group for a newcomer or a loner, or None: wait, somebody nearby is about to found one.

    `others`: live peers of the run with the group that each stands in by its latest word; empty =
    still looking. Stable: a peer that has company keeps its group. A loner moves to one with
    company, or to an older loner's: so two loners can't swap places for ever.
    """
    groups: dict[GroupName, list[PeerRecord]] = {}
    looking: list[PeerRecord] = []
    for record, group in others:
        if group and record.site == me.site:
            groups.setdefault(group, []).append(record)
        elif not group and not record.site and rtt_s.get(record.peer, NEAR_RTT_S) < NEAR_RTT_S:
            looking.append(record)
    if me.group and groups.get(me.group):
        return me.group
    if me.site:
        return _site_group(me, groups, members_max)
    near = _near(me, groups, rtt_s, members_max)
    if me.group:
        near.append((True, me.round == 0, me.founded_ms, me.group))
    if near:
        return min(near)[3]
    if any((r.founded_ms, r.peer) < (me.founded_ms, me.peer) for r in looking):
        return None
    return GroupName(f"near:{me.peer[-12:]}")


def _near(
    me: PeerRecord,
    groups: Mapping[GroupName, list[PeerRecord]],
    rtt_s: Mapping[PeerId, float],
    members_max: int,
) -> list[tuple[bool, bool, int, GroupName]]:
    """Groups with room and near enough, as what they are sorted by: company first, then history,
    then age, so that everybody's order is the same. But none twice as far as the nearest."""
    far_s: dict[GroupName, float] = {}
    for name, members in groups.items():
        known = [rtt_s[m.peer] for m in members if m.peer in rtt_s]
        if known and size_of(members) < members_max:
            far_s[name] = median(known)
    nearest_s = min(far_s.values(), default=0.0)
    limit_s = min(NEAR_RTT_S, max(2 * nearest_s, nearest_s + SAME_RTT_S))
    return [
        (
            len(members) < 2,
            all(m.round == 0 for m in members),
            min(m.founded_ms for m in members),
            name,
        )
        for name, members in groups.items()
        if far_s.get(name, float("inf")) <= limit_s
    ]


def _site_group(
    me: PeerRecord, groups: Mapping[GroupName, list[PeerRecord]], members_max: int
) -> GroupName:
    """The label's own group while it has room; then the fullest of the others that have."""
    base = GroupName(f"site:{me.site}")
    if size_of(groups.get(base, [])) < members_max:
        return base
    room = [
        (-len(members), name) for name, members in groups.items() if size_of(members) < members_max
    ]
    return min(room)[1] if room else base


def size_of(members: Sequence[PeerRecord]) -> int:
    """How many a group has: those we know, or what most of them say."""
    return max(len(members), int(median(m.company for m in members)) if members else 0)


# ── what would be better ─────────────────────────────────────────────────────────────────
def propose(
    me: PeerRecord,
    mine: Sequence[PeerRecord],
    others: Sequence[Standing],
    members_max: int,
    rtt_s: Mapping[PeerId, float],
    *,
    lonely: bool = False,
) -> Proposal | None:
    """The first of the module's reasons to move that applies; None: stay.

    `mine`: the group's other members. Cost for who is well placed: one distance per member.
    """
    everybody = [me, *mine]
    if len(everybody) > members_max:
        return _parted(me, everybody, "crowded", len(everybody) - members_max)
    if me.site:
        return None
    gaps_s = [gap for m in mine if (gap := gap_s(me, m, {})) is not None]
    if len(gaps_s) >= 3 and max(gaps_s) > APART_S and _lies_apart(everybody):
        return _parted(me, everybody, "apart")
    gaps_s = [gap for m in mine if (gap := gap_s(me, m, rtt_s)) is not None]
    own_s = median(gaps_s) if gaps_s else None
    small = 4 * len(everybody) <= members_max
    if not lonely and not (small and mine) and (own_s is None or own_s <= FAR_S):
        return None
    groups: dict[GroupName, list[PeerRecord]] = {}
    for record, group in others:
        if group and group != me.group and not record.site:
            groups.setdefault(group, []).append(record)
    if own_s is not None and own_s > FAR_S:
        found = _nearer(me, own_s, groups, rtt_s, members_max)
        if found is not None:
            return Proposal(found, "far")
    if small and mine:
        found = _larger(everybody, groups, members_max)
        if found is not None:
            return Proposal(found, "small")
    if lonely:
        found = _any_company(me, groups, rtt_s, members_max)
        if found is not None:
            return Proposal(found, "lonely")
    return None


def gap_s(one: PeerRecord, other: PeerRecord, rtt_s: Mapping[PeerId, float]) -> float | None:
    """From `one` to `other`, by our own measurement where there is one; None: nobody knows."""
    if other.peer in rtt_s:
        return rtt_s[other.peer]
    if one.coordinate is None or other.coordinate is None:
        return None
    return distance_s(one.coordinate, other.coordinate)


def _gaps_s(some: Sequence[PeerRecord], others: Sequence[PeerRecord]) -> float:
    """The median distance between two sets of peers; infinity where nobody knows."""
    found = [
        gap for a in some for b in others if a is not b and (gap := gap_s(a, b, {})) is not None
    ]
    return median(found) if found else float("inf")


def _nearer(
    me: PeerRecord,
    own_s: float,
    groups: Mapping[GroupName, list[PeerRecord]],
    rtt_s: Mapping[PeerId, float],
    members_max: int,
) -> GroupName | None:
    """By our own measurements, of two members if there are: coordinates say whom to measure."""
    best: tuple[float, GroupName] | None = None
    for name, members in groups.items():
        known = [rtt_s[m.peer] for m in members if m.peer in rtt_s]
        if len(known) < min(2, len(members)):
            continue
        there_s = median(known)
        if there_s < own_s / 2 and own_s - there_s > FAR_S and size_of(members) < members_max:
            best = min(best or (there_s, name), (there_s, name))
    return best[1] if best is not None else None


def _order(name: GroupName, members: Sequence[PeerRecord]) -> tuple[bool, int, int, str]:
    """Who joins whom: the later in this order the earlier. History, then size, then age."""
    fresh = all(m.round == 0 for m in members)
    return (fresh, -len(members), min(m.founded_ms for m in members), name)


def _larger(
    everybody: Sequence[PeerRecord],
    groups: Mapping[GroupName, list[PeerRecord]],
    members_max: int,
) -> GroupName | None:
    """A group that ours should join: before ours in the order, near, and with ample room."""
    inside_s = _gaps_s(everybody, everybody)
    best: tuple[float, GroupName] | None = None
    for name, members in groups.items():
        if 4 * (size_of(members) + len(everybody)) > 3 * members_max:
            continue
        if _order(name, members) > _order(everybody[0].group, everybody):
            continue
        there_s = _gaps_s(everybody, members)
        within_s = max(inside_s, _gaps_s(members, members) if len(members) > 1 else 0.0)
        if there_s <= NEAR_RTT_S and there_s <= max(TOGETHER_RATIO * within_s, APART_S / 2):
            best = min(best or (there_s, name), (there_s, name))
    return best[1] if best is not None else None


def _any_company(
    me: PeerRecord,
    groups: Mapping[GroupName, list[PeerRecord]],
    rtt_s: Mapping[PeerId, float],
    members_max: int,
) -> GroupName | None:
    """The nearest group with room at any distance; of two loners the younger goes."""
    found: list[tuple[float, GroupName]] = []
    for name, members in groups.items():
        known = [gap for m in members if (gap := gap_s(me, m, rtt_s)) is not None]
        elder = min((m.founded_ms, m.peer) for m in members) < (me.founded_ms, me.peer)
        if known and size_of(members) < members_max and (len(members) > 1 or elder):
            found.append((median(known), name))
    return min(found)[1] if found else None


# ── parting ──────────────────────────────────────────────────────────────────────────────
def halves(
    members: Sequence[PeerRecord], least: int = 1
) -> tuple[list[PeerRecord], list[PeerRecord]]:
    """A group in two, each near itself: the half of its oldest member first.

    Members are ordered along the line between the two that are farthest apart, and cut at the
    widest gap that leaves each side a quarter (and `least`, if it can be). Those of whom not all
    have coordinates go by their rank, in the middle.
    """
    order = _along(members)
    count = len(order)
    least = min(max(1, least, count // 4), count // 2)
    cuts = range(least, count - least + 1)
    if any(r.coordinate is None for r in members):
        cuts = range(count // 2, count // 2 + 1)
    cut = max(cuts, key=lambda i: (order[i][0] - order[i - 1][0], -abs(2 * i - count), -i))
    sides = [r for _, r in order[:cut]], [r for _, r in order[cut:]]
    oldest = min(members, key=lambda r: (r.founded_ms, r.peer))
    first, second = sides if any(r is oldest for r in sides[0]) else (sides[1], sides[0])
    return first, second


def _along(members: Sequence[PeerRecord]) -> list[tuple[float, PeerRecord]]:
    """(place on a line, member), in order; the same for everybody who knows the same members."""
    by_id = sorted(members, key=lambda r: r.peer)
    if any(r.coordinate is None for r in by_id):
        return sorted(((rank(r.peer), r) for r in by_id), key=lambda pair: (pair[0], pair[1].peer))
    pairs = ((gap_s(a, b, {}) or 0.0, i, j) for i, a in enumerate(by_id)
             for j, b in enumerate(by_id) if i < j)  # fmt: skip
    _, i, j = max(pairs)
    ends = by_id[i], by_id[j]
    places = [((gap_s(ends[0], r, {}) or 0.0) - (gap_s(ends[1], r, {}) or 0.0), r) for r in by_id]
    return sorted(places, key=lambda pair: (pair[0], pair[1].peer))


def _lies_apart(everybody: Sequence[PeerRecord]) -> bool:
    """Whether a group is really two: both halves of two or more, far from each other."""
    if any(r.coordinate is None for r in everybody):
        return False
    first, second = halves(everybody)
    if min(len(first), len(second)) < 2:
        return False
    between_s = _gaps_s(first, second)
    inside_s = max(_gaps_s(first, first), _gaps_s(second, second))
    return between_s > max(APART_S, APART_RATIO * inside_s)


def _parted(
    me: PeerRecord, everybody: Sequence[PeerRecord], why: str, least: int = 1
) -> Proposal | None:
    """The leaving half's new group, for who is in it. The oldest member's half keeps the name."""
    _, leaving = halves(everybody, least)
    if not any(r is me for r in leaving):
        return None
    eldest = min(leaving, key=lambda r: (r.founded_ms, r.peer))
    mark = hashlib.sha256(f"{me.group}\x00{eldest.peer}".encode()).hexdigest()[:12]
    stem = f"site:{me.site}"[:51] + "/" if me.site else "near:"
    return Proposal(GroupName(stem + mark), why)
