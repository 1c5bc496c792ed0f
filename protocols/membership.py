"""Who is there: records, liveness and where everybody stands.

Records come from the DHT and from handshakes; life comes from heartbeats, each of which says by
when the next one follows: within a second while it matters, later in a long training phase. Of each
two members one calls and the other answers with a heartbeat of its own, so a pair costs one call
and not two. Whoever is silent beyond its time, or twice in a row can't be reached, is *suspected*:
rounds go on without it, and one word from it clears the suspicion. The table is bounded; peers that
we never hailed, and were heard longest ago, go first.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Final

from protocols import limits
from protocols.messages import Heartbeat, Seat
from protocols.records import PeerRecord, says_the_same
from protocols.regions import FAR_S, Ways, ways_to
from protocols.types import Digest, GroupName, PeerId

NO_WAYS: Final = Ways()
FAILURES_MAX: Final = 2
STOOD_MAX: Final = 16  # a snapshot is taken at the newest; what all had at it shows soon after
RTTS_KEPT: Final = 6  # a changed link is believed after so many calls


@dataclass(slots=True)
class Neighbour:
    """What we know of one other peer of the run."""

    record: PeerRecord
    seen_s: float
    """When its record was last seen."""
    ours_to_call: bool
    """Whether it is we who call, and it answers; `calls_first` decides."""
    group: GroupName = GroupName("")  # noqa: RUF009
    """Where it stands by its latest word, which may be newer than its record."""
    heard_s: float = float("-inf")
    """When it last said anything itself."""
    next_s: float = float("-inf")
    """By when its next word is due, as it said itself."""
    hailed_s: float = float("-inf")
    """When we last said hello or sent a heartbeat."""
    failures: int = 0
    suspected: bool = False
    left: bool = False
    round: int = 0
    digest: Digest = Digest(b"")  # noqa: RUF009  (an immutable value)
    ready: bool = False
    epoch: int = 0
    agreed: int = -1
    """The latest round at whose start its digest was ours; -1: never seen."""
    firm: int = 0
    """The latest round of its history at which, it says, most of the group stood at its state."""
    ways: Ways = NO_WAYS
    """To whom of the roster of its epoch's plan its ways are long."""
    since: int = 0
    """The round at which, it says, it took the history that it has now."""
    jumped: bool = False
    """It did so after the latest round at which it agreed with us."""
    apart: bool = False
    """Its history is not ours, for all that we know; until our digests agree again."""
    rtt_s: float | None = None
    """The smallest of the last few round trips: a busy machine inflates the others."""
    rtts_s: tuple[float, ...] = ()
    spoke_s: float = float("-inf")
    """When it last told of its own accord where it stands: what it answered to a call that began
    before is older."""
    told: tuple[object, ...] | None = None
    """Where it knows that we stand, as far as we know."""
    stood: dict[int, Digest] = field(default_factory=dict)
    """Round -> where its state stood then, by its own word; the latest `STOOD_MAX` that it told."""
    sampled_s: float = float("-inf")
    """When its round trip last counted for our coordinate."""

    @property
    def shared(self) -> int:
        """The latest round at which its history, as it is now, was ours; -1: unknown."""
        return -1 if self.jumped else self.agreed

    @property
    def silent_after_s(self) -> float:
        """Heard of nothing by then, it is suspected."""
        due_s = max(self.heard_s + limits.HEARTBEAT_S, self.next_s)
        return due_s + limits.SUSPECT_AFTER_S - limits.HEARTBEAT_S


@dataclass(slots=True)
class _View:
    """Who stands in one group, worked out once and asked for many times per event."""

    group: GroupName
    version: int
    """Of the table; another one makes this view stale ..."""
    until_s: float
    """... and so does time: whoever lives falls silent then at the earliest."""
    members: list[Neighbour]
    live: list[Neighbour]
    suspects: set[PeerId]


class Membership:
    """The table of neighbours. All times are the machine's clock.

    Lists and sets that it hands out are shared: nobody may change them.
    """

    def __init__(
        self,
        me: PeerId,
        *,
        pause_s_max: float = limits.HEARTBEAT_S_MAX,
        record_s: float = limits.RECORD_TTL_S,
    ) -> None:
        """`pause_s_max`: nobody's next word may be announced for later; `record_s`: so long a
        record that was seen says that its peer is there."""
        self.me = me
        self.record_s = record_s
        self._pause_s_max = pause_s_max
        self.version = 0
        """Grows whenever somebody comes, goes, moves, revives, is suspected, or stands elsewhere
        than before: what follows from that alone need not be worked out again until it does."""
        self._view = _View(GroupName(""), -1, -math.inf, [], [], set())
        self._table: dict[PeerId, Neighbour] = {}
        self._swept_s = float("-inf")
        self._groups: dict[GroupName, dict[PeerId, Neighbour]] = {}
        self.sweep_s = math.inf
        """Nobody is suspected of silence before then."""
        self._lost: dict[PeerId, tuple[GroupName, float]] = {}
        """Who was forgotten and said no goodbye -> its group, and when it was heard last."""
        self.next_call_s = -math.inf
        """When we call those next who are `ours_to_call`: until then they owe us no word."""

    def get(self, peer: PeerId) -> Neighbour | None:
        return self._table.get(peer)

    def everybody(self) -> list[Neighbour]:
        return list(self._table.values())

    def saw(self, record: PeerRecord, now_s: float) -> bool:
        """Take a record; True if it is of a peer we did not know."""
        known = self._table.get(record.peer)
        if known is not None:
            known.seen_s = now_s
            if record.issued_ms > known.record.issued_ms:
                news = not says_the_same(record, known.record)
                known.record = record
                if record.group != known.group:
                    self._place(known, record.group)
                elif news:
                    self.version += 1
            return False
        if len(self._table) >= limits.KNOWN_PEERS_MAX:
            self._forget(min(self._table, key=self._worth))
        ours = calls_first(self.me, record.peer) == self.me
        self._table[record.peer] = known = Neighbour(record, now_s, ours)
        if record.peer in self._lost and self._lost[record.peer][0] != record.group:
            del self._lost[record.peer]
        self._place(known, record.group)
        return True

    def _place(self, known: Neighbour, group: GroupName) -> None:
        """Note where it stands; the index keeps the cost of a beat that of its own group."""
        self._groups.get(known.group, {}).pop(known.record.peer, None)
        if not self._groups.get(known.group, True):
            del self._groups[known.group]
        known.group = group
        self._groups.setdefault(group, {})[known.record.peer] = known
        self.version += 1

    def _forget(self, peer: PeerId) -> None:
        known = self._table.pop(peer)
        self.version += 1
        self._groups.get(known.group, {}).pop(peer, None)
        if not self._groups.get(known.group, True):
            del self._groups[known.group]

    def _worth(self, peer: PeerId) -> tuple[float, float]:
        """A flood of strangers' first words must not push out those we keep company with."""
        known = self._table[peer]
        return (known.hailed_s, known.heard_s)

    def heard(self, peer: PeerId, now_s: float) -> None:
        """`peer` said something: it lives."""
        known = self._table.get(peer)
        if known is not None:
            self._lives(known, now_s, known.next_s)

    def announced(self, peer: PeerId, next_ms: int, now_s: float) -> None:
        """`peer` said something, and by when we hear from it again: never later than any may, and
        if it is we who call, when we do."""
        known = self._table.get(peer)
        if known is not None:
            told_s = now_s + min(next_ms / 1000, self._pause_s_max)
            self._lives(known, now_s, self.next_call_s if known.ours_to_call else told_s)

    def _lives(self, known: Neighbour, now_s: float, next_s: float) -> None:
        ours = known.group == self._view.group
        if known.suspected or known.left or (ours and now_s > known.silent_after_s):
            known.suspected = known.left = False
            self.version += 1
        known.heard_s, known.next_s, known.failures = now_s, next_s, 0
        self._lost.pop(known.record.peer, None)
        if ours:  # it may announce itself for sooner
            until_s = known.silent_after_s
            self.sweep_s = min(self.sweep_s, until_s)
            self._view.until_s = min(self._view.until_s, until_s)

    def excuse(self, group: GroupName, now_s: float) -> None:
        """Who was not silent for too long yet may be silent until another word was due."""
        for known in self._groups.get(group, {}).values():
            if known.heard_s > 0 and not known.suspected:
                known.next_s = max(known.next_s, now_s + limits.HEARTBEAT_S)
        self.version += 1

    def heartbeat(
        self, peer: PeerId, beat: Heartbeat, now_s: float, asked_s: float | None = None
    ) -> bool:
        """Note where `peer` stands; False if that is nothing new. `asked_s`: it is the answer to a
        call of then."""
        known = self._table.get(peer)
        if known is None:
            return False
        if asked_s is None:
            self.spoke(peer, now_s)
        elif known.spoke_s > asked_s:  # its own call has overtaken its answer, and is newer
            back = known.suspected or known.left
            self.heard(peer, now_s)  # by when the next word is due the call has said, too
            return back
        back = known.suspected or known.left or known.heard_s < 0
        self.announced(peer, beat.next_ms, now_s)
        moved = known.group != beat.group or known.epoch != beat.epoch
        moved |= self.stands(peer, beat.round, beat.digest, ready=beat.ready)
        known.epoch, known.firm = beat.epoch, min(beat.firm, beat.round)
        known.ways = Ways(beat.near, beat.far) if beat.far else NO_WAYS
        if beat.since != known.since:  # what it had in common with us before tells nothing now
            known.since, known.jumped = beat.since, True
        if known.group != beat.group:
            self._place(known, beat.group)
        if moved:
            self.version += 1
        return back or moved

    def stands(self, peer: PeerId, round: int, digest: bytes, *, ready: bool) -> bool:  # noqa: A002
        """Where `peer`'s state stands by its own word; False if that is nothing new."""
        known = self._table.get(peer)
        if known is None or (known.round, known.digest, known.ready) == (round, digest, ready):
            return False
        known.round, known.digest, known.ready = round, Digest(digest), ready
        if ready:
            known.stood.pop(round, None)
            known.stood[round] = known.digest
            if len(known.stood) > STOOD_MAX:
                del known.stood[next(iter(known.stood))]
        self.version += 1
        return True

    def spoke(self, peer: PeerId, now_s: float) -> None:
        """`peer` told of its own accord where it stands."""
        known = self._table.get(peer)
        if known is not None:
            known.spoke_s = now_s

    def told(self, peer: PeerId, standing: tuple[object, ...]) -> None:
        """`peer` was told where we stand."""
        known = self._table.get(peer)
        if known is not None:
            known.told = standing

    def delivered(self, peer: PeerId, rtt_s: float) -> None:
        known = self._table.get(peer)
        if known is not None:
            known.rtts_s = (*known.rtts_s[1 - RTTS_KEPT :], rtt_s)
            known.rtt_s = min(known.rtts_s)
            known.failures = 0

    def undelivered(self, peer: PeerId) -> bool:
        """A message or stream failed; True if `peer` is suspected from now on."""
        known = self._table.get(peer)
        if known is None:
            return False
        known.failures += 1
        known.told = None
        if known.failures < FAILURES_MAX or known.suspected:
            return False
        known.suspected = True
        self.version += 1
        return True

    def said_goodbye(self, peer: PeerId) -> None:
        known = self._table.get(peer)
        if known is not None:
            known.suspected = known.left = True
            self._lost.pop(peer, None)
            self.version += 1

    def sweep(self, group: GroupName, now_s: float) -> list[tuple[PeerId, float]]:
        """Suspect the silent and forget the lost; the newly suspected of `group`, and when
        they were last heard."""
        if now_s - self._swept_s > limits.SUSPECT_AFTER_S:
            self._swept_s = now_s
            lost_s = now_s - limits.FORGET_AFTER_S - self.record_s
            lost = [p for p, n in self._table.items() if max(n.heard_s, n.seen_s) < lost_s]
            for peer in lost:
                known = self._table[peer]
                kept = known.heard_s > 0 and not known.left
                if kept and len(self._lost) < limits.KNOWN_PEERS_MAX:
                    self._lost[peer] = (known.group, known.heard_s)
                self._forget(peer)
            self._lost = {
                p: (where, s) for p, (where, s) in self._lost.items() if now_s - s < limits.FIRM_S
            }
        fresh: list[tuple[PeerId, float]] = []
        self.sweep_s = math.inf
        for peer, known in self._groups.get(group, {}).items():
            if known.heard_s <= 0 or known.suspected:
                continue
            if now_s > known.silent_after_s:
                fresh.append((peer, known.heard_s))
                known.suspected = True
                self.version += 1
            else:
                self.sweep_s = min(self.sweep_s, known.silent_after_s)
        return fresh

    def lately(self, group: GroupName, now_s: float) -> int:
        """How many others stood in `group` by their own word within the last `FIRM_S`, without
        those who said goodbye or went elsewhere."""
        return len(self.company(group, now_s))

    def remember(self, group: GroupName, members: Iterable[PeerId], heard_s: float) -> None:
        """Those were in `group` before our restart, or before we came: they count as silent ones
        until heard of."""
        for peer in members:
            known = self._table.get(peer)
            if len(self._lost) < limits.KNOWN_PEERS_MAX and (known is None or known.heard_s <= 0):
                self._lost[peer] = (group, heard_s)

    def ways(self, roster: Sequence[Seat]) -> Ways:
        """Ours to a plan's members, as far as we have measured them."""
        if all(
            n.rtt_s is None or n.rtt_s < FAR_S
            for n in (self._table.get(seat.peer) for seat in roster)
            if n is not None
        ):
            return NO_WAYS
        known = [n for seat in roster if (n := self._table.get(seat.peer)) is not None]
        return ways_to(roster, {n.record.peer: n.rtt_s for n in known if n.rtt_s is not None})

    def company(self, group: GroupName, now_s: float) -> list[PeerId]:
        """The others whom `lately` counts."""
        known = [
            n.record.peer
            for n in self.in_group(group)
            if n.heard_s > 0
            and (not n.suspected or now_s - max(n.heard_s, n.next_s) < limits.FIRM_S)
        ]
        lost = [
            peer
            for peer, (where, heard_s) in self._lost.items()
            if where == group and now_s - heard_s < limits.FIRM_S
        ]
        return known + lost

    def in_group(self, group: GroupName) -> list[Neighbour]:
        """Everyone who says that it stands in `group`, living or not."""
        view = self._view
        if view.group == group and view.version == self.version:
            return view.members
        return [n for n in self._groups.get(group, {}).values() if not n.left]

    def suspects(self, group: GroupName) -> set[PeerId]:
        view = self._view
        if view.group == group and view.version == self.version:
            return view.suspects
        return {p for p, n in self._groups.get(group, {}).items() if n.suspected}

    def live(self, group: GroupName, now_s: float) -> list[Neighbour]:
        """Members of `group` that were heard lately and are not suspected."""
        view = self._view
        known = view.group == group and view.version == self.version
        if not known or now_s > view.until_s:
            self._view = fresh = self._look_at(group, now_s)
            if known and len(fresh.live) < len(view.live):  # somebody fell silent
                self.version += 1
                fresh.version = self.version
            view = fresh
        return view.live

    def _look_at(self, group: GroupName, now_s: float) -> _View:
        placed = self._groups.get(group, {})
        members = [n for n in placed.values() if not n.left]
        live = [n for n in members if not n.suspected and now_s <= n.silent_after_s]
        until_s = min((n.silent_after_s for n in live), default=math.inf)
        suspects = {p for p, n in placed.items() if n.suspected}
        self.sweep_s = min(self.sweep_s, until_s)
        return _View(group, self.version, until_s, members, live, suspects)


def calls_first(one: PeerId, other: PeerId) -> PeerId:
    """Which of two calls, so that the other need only answer: by lot, half of all pairs each."""
    low, high = sorted((one, other))
    even = hashlib.sha256(f"{low}\x00{high}".encode()).digest()[0] % 2 == 0
    return low if even else high


def seat_of(record: PeerRecord) -> Seat:
    """A peer's weight in elections: its upload as far as it counts, if others can reach it."""
    weight = min(max(1, record.upload_kbps), limits.UPLOAD_KBPS_COUNTED_MAX)
    return Seat(record.peer, weight if record.reachable else 1)
