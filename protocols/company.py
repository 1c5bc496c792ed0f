"""Keeping company: who we are, said to whoever should know; and that we live, to the group.

A hello introduces (record, standing), a heartbeat reminds. Suspects are hailed now and then, for
they may be back.
"""

from __future__ import annotations

from typing import Final

from protocols import limits
from protocols.errors import RemoteProtocolError
from protocols.events import Effect, RecordIssued, Send, Suspected
from protocols.messages import Heartbeat, Hello
from protocols.records import PeerRecord, read_record
from protocols.schema import SchemaError
from protocols.standing import Standing
from protocols.types import Digest, PeerId

BEATS_MAX: Final = 8 * limits.GROUP_MEMBERS_MAX  # a site label can gather more than a group


class Company:
    """Greetings, heartbeats and records."""

    def __init__(self, standing: Standing, now_s: float) -> None:
        self._here = standing
        self.next_beat_s = now_s

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
        here.members.heard(sender, now_s)
        known = here.members.get(sender)
        if known is not None:
            known.round, known.digest = hello.round, Digest(hello.digest)
            known.ready = hello.ready
        return self.greet(sender, answer=False) if hello.answer else []

    def record_seen(self, record: PeerRecord, now_s: float) -> list[Effect]:
        here = self._here
        if record.run != here.config.run or record.peer == here.me:
            return []
        known = here.members.get(record.peer)
        returned = (
            known is not None and known.suspected and record.issued_ms > known.record.issued_ms
        )
        if here.members.saw(record, now_s) or returned:
            return self.greet(record.peer, answer=True)
        return []

    def record_issued(self, event: RecordIssued) -> list[Effect]:
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
            for effect in self.greet(n.record.peer, answer=False)
        ]

    def greet(self, peer: PeerId, *, answer: bool) -> list[Effect]:
        here = self._here
        if here.record is None or here.leaving:
            return []
        hello = Hello(
            limits.PROTOCOL_VERSION,
            here.config.run,
            here.record.signed,
            here.round,
            here.digest,
            here.ready,
            answer,
        )
        return [Send(peer, hello)]

    def tick(self, now_s: float) -> list[Effect]:
        here = self._here
        effects: list[Effect] = []
        if now_s >= self.next_beat_s and not here.leaving:
            self.next_beat_s = now_s + limits.HEARTBEAT_S
            effects += self.beat(now_s)
            effects += [
                Suspected(peer, f"silent for {limits.SUSPECT_AFTER_S:g} s")
                for peer in here.members.sweep(here.group, now_s)
            ]
        return effects

    def beat(self, now_s: float) -> list[Effect]:
        here = self._here
        if not here.group:
            return []
        beat = Heartbeat(
            here.config.run, here.group, here.epoch, here.round, here.digest, here.ready, 0
        )
        effects: list[Effect] = []
        for n in here.members.in_group(here.group)[:BEATS_MAX]:
            # Suspects are hailed now and then: they may be back.
            every_s = 5 * limits.HEARTBEAT_S if n.suspected else 0.0
            if now_s - n.hailed_s < every_s:
                continue
            n.hailed_s = now_s
            if n.heard_s > 0 and not n.suspected:
                effects.append(Send(n.record.peer, beat))
            else:
                effects += self.greet(n.record.peer, answer=True)
        return effects
