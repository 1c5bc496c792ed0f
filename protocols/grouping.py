"""Which group a peer stands in: the same answer for everybody, from signed records.

A declared `--site` label is a group. Peers without a label join the nearest group (by the
round-trip times that calls measure anyway) that lies within `NEAR_RTT_S` and has room; where there
is none, they found one of their own. A lone founder gives its group up for an older one nearby.
Cells on a space-filling curve will replace the nearness rule; this function is their place.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from statistics import median
from typing import Final

from protocols.records import PeerRecord
from protocols.types import GroupName, PeerId

NEAR_RTT_S: Final = 0.030  # within one country or campus; aggregation inside is fast


def choose_group(
    me: PeerRecord,
    others: Iterable[tuple[PeerRecord, GroupName]],
    rtt_s: Mapping[PeerId, float],
    members_max: int,
) -> GroupName | None:
    """The group for `me`, or None: wait, somebody nearby is about to found one.

    `others`: live peers of the run with the group that each stands in by its latest word; empty =
    still looking. Stable: a peer that has company keeps its group. A loner moves to one with
    company, or to an older loner's: so two loners can't swap places for ever.
    """
    if me.site:
        return GroupName(f"site:{me.site}")
    groups: dict[GroupName, list[PeerRecord]] = {}
    looking: list[PeerRecord] = []
    for record, group in others:
        if group.startswith("near:"):
            groups.setdefault(group, []).append(record)
        elif not group and not record.site and rtt_s.get(record.peer, NEAR_RTT_S) < NEAR_RTT_S:
            looking.append(record)
    if me.group and groups.get(me.group):
        return me.group
    near: list[tuple[bool, bool, int, GroupName]] = []
    for name, members in groups.items():
        known = [rtt_s[m.peer] for m in members if m.peer in rtt_s]
        if known and median(known) <= NEAR_RTT_S and len(members) < members_max:
            # Company first, then history, then age: everybody's order is the same.
            fresh = all(m.round == 0 for m in members)
            near.append((len(members) < 2, fresh, min(m.founded_ms for m in members), name))
    if me.group:
        near.append((True, me.round == 0, me.founded_ms, me.group))
    if near:
        return min(near)[3]
    if any((r.founded_ms, r.peer) < (me.founded_ms, me.peer) for r in looking):
        return None
    return GroupName(f"near:{me.peer[-12:]}")
