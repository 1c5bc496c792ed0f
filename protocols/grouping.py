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
    me: PeerId,
    site: str,
    current: GroupName,
    records: Iterable[PeerRecord],
    rtt_s: Mapping[PeerId, float],
    members_max: int,
    own: PeerRecord | None = None,
) -> GroupName:
    """The group for `me`. `records`: live peers of the run, without `me`; `current`: may be empty.

    Stable: a peer that has company keeps its group. `own`: this peer's record as others see it, so
    that of two lone founders only the younger moves (without it, both would, for ever).
    """
    if site:
        return GroupName(f"site:{site}")
    groups: dict[GroupName, list[PeerRecord]] = {}
    for record in records:
        if record.group.startswith("near:"):
            groups.setdefault(record.group, []).append(record)
    mine = GroupName(f"near:{me[-12:]}")
    if current and groups.get(current):
        return current
    alone = (own.round == 0, own.founded_ms, current) if own is not None and current else None
    near: list[tuple[bool, int, float, GroupName]] = []
    for name, members in groups.items():
        known = [rtt_s[m.peer] for m in members if m.peer in rtt_s]
        if known and median(known) <= NEAR_RTT_S and len(members) < members_max:
            # A group with history first, then the oldest: everybody's order is the same.
            fresh = all(m.round == 0 for m in members)
            founded_ms = min(m.founded_ms for m in members)
            if alone is not None and len(members) == 1 and alone < (fresh, founded_ms, name):
                continue  # that founder comes to us
            near.append((fresh, founded_ms, median(known), name))
    return min(near)[3] if near else (current or mine)
