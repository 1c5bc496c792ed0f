"""Keeping company: who we are, said to whoever should know; and that we live, to the group.

A hello introduces (record, standing), a heartbeat reminds and is answered with a heartbeat, and
all say by when the next word follows. Of two members one calls at the regular times and the other
answers (`membership.calls_first`); the other calls too when its standing has changed or the first
is late. They come every second while it matters who lives, which is from shortly before
contributions are due until the round is applied and all have agreed, and whenever anything is
unsettled; in a long training phase after a part of it (`pace.chores_s`), so that rounds of half an
hour cost next to nothing. The last slow heartbeat is timed to end where the quick ones begin, so
the dead are known before they are missed.
Suspects are hailed now and then, for they may be back.
"""

from __future__ import annotations

import math
from typing import Final

from protocols import limits
from protocols.errors import RemoteProtocolError
from protocols.events import Effect, RecordIssued, Send, Suspected
from protocols.messages import Heartbeat, Hello
from protocols.pace import chores_s
from protocols.records import PeerRecord, read_record
from protocols.schema import SchemaError
from protocols.standing import Standing
from protocols.types import PeerId

LEAD_S: Final = 5.0  # quick heartbeats begin this long before contributions are due
CALM_S: Final = 5.0  # and end this long after the last step, if digests don't agree sooner
HURRY_S: Final = 0.05  # from a change of mind to the heartbeat
HAIL_S: Final = 5.0  # between words to a suspect
AGAIN_S: Final = 0.5  # from a call that failed to the next one: a process that is gone refuses both
LATE_S: Final = 0.25  # whoever should have called and did not by then is called
ASLEEP_S: Final = limits.HEARTBEAT_S  # this late for our own deadline, we were not running
BEATS_MAX: Final = 8 * limits.GROUP_MEMBERS_MAX  # a site label can gather more than a group


class Company:
    """Greetings, heartbeats and records."""

    def __init__(self, standing: Standing, now_s: float) -> None:
        self._here = standing
        self._next_beat_s = now_s
        self._beat_s = now_s
        """When the last regular heartbeat went out."""
        self._promised_s = math.inf
        """When we meant to be awake again, as of the last event."""
        self._again: dict[PeerId, float] = {}
        """Members whom a word did not reach, and when it is said again."""
        self._schedule(now_s)

    def hello(self, sender: PeerId, hello: Hello, now_s: float) -> list[Effect]:
        here = self._here
        here.own_run(sender, hello.run)
        if hello.version != limits.PROTOCOL_VERSION:
            raise RemoteProtocolError(sender, f"speaks protocol version {hello.version}")
        try:
            record = read_record(hello.record)
        except SchemaError as error:
            raise RemoteProtocolError(sender, str(error)) from None
        if record.peer != sender or record.run != here.config.run:
            raise RemoteProtocolError(sender, "shows a record that is not its own")
        here.members.saw(record, now_s)
        here.members.announced(sender, hello.next_ms, now_s)
        here.members.spoke(sender, now_s)
        here.members.stands(sender, hello.round, hello.digest, ready=hello.ready)
        return self.greet(sender, now_s, answer=False) if hello.answer else []

    def record_seen(self, record: PeerRecord, now_s: float) -> list[Effect]:
        here = self._here
        if record.run != here.config.run or record.peer == here.me:
            return []
        known = here.members.get(record.peer)
        returned = (
            known is not None and known.suspected and record.issued_ms > known.record.issued_ms
        )
        fresh = here.members.saw(record, now_s)
        if not fresh and not returned:
            return []
        # Who has company needs no stranger's answer at once: it measures them in turn.
        ours = record.group == here.group or record.site == here.config.site != ""
        if not ours and not returned and here.group and here.members.live(here.group, now_s):
            return []
        return self.greet(record.peer, now_s, answer=True)

    def record_issued(self, event: RecordIssued, now_s: float) -> list[Effect]:
        here = self._here
        before, here.record = here.record, event
        if before is None or before.record.group == event.record.group:
            return []
        # Those who choose a group right now should know at once where we stand.
        known = sorted(here.members.everybody(), key=lambda n: -n.heard_s)
        return [
            effect
            for n in known[: 4 * limits.GROUP_MEMBERS_MAX]
            if not n.left and not n.suspected
            for effect in self.greet(n.record.peer, now_s, answer=False)
        ]

    def greet(self, peer: PeerId, now_s: float, *, answer: bool) -> list[Effect]:
        here = self._here
        if here.record is None or here.leaving:
            return []
        hello = Hello(
            limits.PROTOCOL_VERSION,
            here.config.run,
            here.record.signed,
            here.round,
            here.digest,
            here.ready and not here.visiting,
            answer,
            self._next_ms(now_s),
        )
        return [Send(peer, hello)]

    @property
    def deadline_s(self) -> float:
        """When `tick` has something to do."""
        again_s = min(self._again.values()) if self._again else math.inf
        return min(self._next_beat_s, self._here.members.sweep_s + 0.001, again_s)

    def wake(self, now_s: float) -> None:
        """Where we ourselves stood still (a laptop slept, a process was stopped), the others'
        silence proves nothing: their words may lie unread, so they get the time for another one.
        """
        if now_s - self._promised_s > ASLEEP_S:
            self._here.members.excuse(self._here.group, now_s)

    def rest(self, now_s: float) -> None:
        """An event is dealt with; note when the next tick is due."""
        self._promised_s = max(now_s, self.deadline_s)

    def tick(self, now_s: float) -> list[Effect]:
        """Heartbeats and suspicions that are due."""
        here = self._here
        effects: list[Effect] = []
        if self._again:
            effects += self._say_again(now_s)
        if now_s >= self._next_beat_s:
            effects += self._say(now_s, news=False)
        elif now_s <= here.members.sweep_s:
            return effects
        effects += [
            Suspected(peer, f"silent for {now_s - heard_s:.1f} s")
            for peer, heard_s in here.members.sweep(here.group, now_s)
        ]
        return effects

    def hurry(self, now_s: float) -> None:
        """Something changed: the next heartbeat may be wanted sooner."""
        soon_s = max(now_s + HURRY_S, self._following_s(now_s))
        if soon_s < self._next_beat_s:
            self._schedule(soon_s)

    def undelivered(self, peer: PeerId, now_s: float) -> None:
        """A word was lost: say it again soon, or a slow rhythm makes us look dead; and who is
        gone is known the sooner."""
        known = self._here.members.get(peer)
        if known is not None and not known.suspected and known.group == self._here.group:
            self._again.setdefault(peer, now_s + AGAIN_S)

    def _next_ms(self, now_s: float) -> int:
        return int(max(limits.HEARTBEAT_S, self._next_beat_s - now_s) * 1000)

    def _following_s(self, now_s: float) -> float:
        """When the heartbeat after the last one is due, as things are."""
        soon_s = self._beat_s + limits.HEARTBEAT_S
        here = self._here
        current = here.current
        unready = not here.ready or here.visiting
        if unready or here.pending is not None or current is None or not current.training:
            return soon_s
        if here.agreed < here.round and now_s - here.moved_s < CALM_S:
            return soon_s
        outlook = here.outlook(now_s)
        if not outlook.live or not outlook.in_step:
            return soon_s
        pause_s = chores_s(current.plan.train_ms / 1000)
        return max(soon_s, min(self._beat_s + pause_s, current.due_s - LEAD_S))

    def _schedule(self, next_s: float) -> None:
        self._next_beat_s = self._here.members.next_call_s = next_s

    @property
    def _standing(self) -> tuple[object, ...]:
        """What the others have to know of us."""
        here = self._here
        return (here.group, here.epoch, here.round, here.digest, here.ready, here.visiting)

    def heartbeat(self, now_s: float) -> Heartbeat:
        """Where we stand, for the group."""
        here = self._here
        ways = here.ways
        return Heartbeat(
            here.config.run,
            here.group,
            here.epoch,
            here.round,
            here.digest,
            here.ready and not here.visiting,
            self._next_ms(now_s),
            min(here.firm_round, here.round),
            min(here.since, here.round),
            ways.near,
            ways.far,
        )

    def answer(self, peer: PeerId, now_s: float) -> Heartbeat | None:
        """What a heartbeat of `peer` is answered with; None where there is nothing to tell it."""
        here = self._here
        if not here.group or here.leaving or here.members.get(peer) is None:
            return None
        here.members.told(peer, self._standing)
        return self.heartbeat(now_s)

    def beat(self, now_s: float) -> list[Effect]:
        """Tell the whole group where we stand: something changed."""
        return self._say(now_s, news=True)

    def _say(self, now_s: float, *, news: bool) -> list[Effect]:
        here = self._here
        self._beat_s = now_s
        self._schedule(self._following_s(now_s))
        if not here.group:
            return []
        beat, standing = self.heartbeat(now_s), self._standing
        effects: list[Effect] = []
        for n in here.members.in_group(here.group)[:BEATS_MAX]:
            known = n.heard_s > 0 and not n.suspected
            if known and not (
                news or n.ours_to_call or n.told != standing or now_s > n.next_s + LATE_S
            ):
                continue
            # Suspects are hailed now and then: they may be back.
            if n.suspected and now_s - n.hailed_s < HAIL_S:
                continue
            n.hailed_s = now_s
            self._again.pop(n.record.peer, None)
            if known:
                n.told = standing
                effects.append(Send(n.record.peer, beat))
            else:
                effects += self.greet(n.record.peer, now_s, answer=True)
        return effects

    def _say_again(self, now_s: float) -> list[Effect]:
        """To whom a word was lost a moment ago."""
        here = self._here
        effects: list[Effect] = []
        for peer in [p for p, again_s in self._again.items() if again_s <= now_s]:
            del self._again[peer]
            known = here.members.get(peer)
            if known is not None and not known.suspected and known.group == here.group:
                known.hailed_s, known.told = now_s, self._standing
                effects.append(Send(peer, self.heartbeat(now_s)))
        return effects
