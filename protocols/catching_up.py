"""Catching up: outcomes that we missed, fetched from who holds them and applied one by one.

Who is behind by more than others keep, or failed several times, takes a donor's state instead.
"""

from __future__ import annotations

from typing import Final

from protocols import limits
from protocols.errors import RemoteProtocolError
from protocols.events import ApplyRound, Effect, FetchFinished, FetchOutcomes, OutcomeHeld
from protocols.healing import Healing
from protocols.messages import OutcomeHeader
from protocols.records import Signed
from protocols.standing import RETRY_S, STRAGGLER_SHARE, Attempt, Standing
from protocols.types import PeerId

BEHIND_GRACE_S: Final = 1.5  # others finish a round a little earlier; outcomes are on their way
FETCH_TRIES_MAX: Final = 3


class CatchingUp:
    """Keeps in step with those who have more rounds than we."""

    def __init__(self, standing: Standing, healing: Healing) -> None:
        self._here = standing
        self._healing = healing
        self._behind_since_s: float | None = None
        self._fetch: Attempt | None = None
        self._tries = 0
        self._caught: dict[int, tuple[OutcomeHeader, Signed]] = {}
        """First unit -> a fetched outcome of the round that we stand at."""
        self._until = 0
        """Outcomes of rounds before this one are here, whatever others still keep."""

    def at_hand(self, until: int) -> None:
        """So far are the outcomes here that lead on from our state."""
        self._until = until

    def settled(self) -> None:
        """We have moved on: to another round, or to another state."""
        self._behind_since_s = None
        self._fetch = None
        self._tries = 0
        self._caught.clear()

    def held(self, event: OutcomeHeld, now_s: float) -> list[Effect]:
        here = self._here
        header = event.header
        units = here.config.exchanged(header.round)
        if header.start < units.start or header.stop > units.stop:
            raise RemoteProtocolError(
                event.sender,
                f"units {header.start} to {header.stop} have no turn in round {header.round}",
            )
        here.members.heard(event.sender, now_s)
        if header.round != here.round:
            return []
        if header.base and header.base != here.digest:
            self._tries = FETCH_TRIES_MAX  # theirs is another history: only a state helps
            self._apart(event.sender)
            return []
        if event.fetched and len(self._caught) < limits.AGGREGATORS_MAX:
            self._caught[header.start] = (header, event.signed)
        if here.current is not None and here.current.number == header.round:
            return here.current.hold(header, event.signed, now_s)
        return []

    def _apart(self, peer: PeerId) -> None:
        """What it holds of our round does not begin at our state: so neither do those at its."""
        members = self._here.members
        if (known := members.get(peer)) is not None and known.round > self._here.round:
            for n in members.in_group(known.group):
                if (n.round, n.digest) == (known.round, known.digest):
                    n.apart = True

    def fetch_finished(self, event: FetchFinished, now_s: float) -> list[Effect]:
        here = self._here
        if here.current is not None and here.current.number == event.round:
            here.current.fetch_finished(event.peer)
        if self._fetch is None or self._fetch.peer != event.peer:
            return []
        self._fetch.until_s = now_s + RETRY_S / 4
        whole = self._assembled()
        trusted = self._same_history(whole, now_s)
        if event.round == here.round and whole and here.ready and trusted:
            if here.current is not None and here.current.applying:
                return []
            plan = here.current.plan if here.current is not None else None
            if here.current is not None:
                here.current.applying = True
            self._fetch.until_s = now_s + here.config.exchange_s
            return [ApplyRound(plan, here.round, whole)]
        self._tries += 1
        return []

    def _assembled(self) -> tuple[tuple[OutcomeHeader, Signed], ...]:
        """Fetched outcomes that together cover every unit of our round, or nothing."""
        units = self._here.config.exchanged(self._here.round)
        edge, parts = units.start, []
        for start in sorted(self._caught):
            header, signed = self._caught[start]
            if header.start != edge:
                return ()
            parts.append((header, signed))
            edge = header.stop
        return tuple(parts) if edge == units.stop else ()

    def _same_history(
        self, outcomes: tuple[tuple[OutcomeHeader, Signed], ...], now_s: float
    ) -> bool:
        """Whether fetched outcomes can be those of our own group's round.

        Outcomes of the plan that we follow are. Of a later epoch we can't know, but what a
        clear minority did by itself while it was cut off is not what the group did.
        """
        here = self._here
        if here.current is None:
            return True
        later = [h for h, _ in outcomes if h.epoch > here.current.plan.epoch]
        if not later:
            return True
        support = max(len(h.contributors) for h in later)
        return 2 * support > here.camp(here.members.live(here.group, now_s))

    def _patience_s(self, now_s: float) -> float:
        """How long others may be ahead before we ask for what they have and we don't.

        In an exchange it is most likely on its way to us already, and asking for all of it once
        more would take the line from that.
        """
        current = self._here.current
        if current is None or current.training or now_s > current.end_s:
            return 0.0
        usual_s = STRAGGLER_SHARE * (now_s - current.due_s)
        return usual_s if self._here.pending is not None else max(BEHIND_GRACE_S, usual_s)

    def sync(self, now_s: float) -> list[Effect]:
        """Get the state, or make good what we missed."""
        here = self._here
        self._healing.expire(now_s)
        if self._healing.fetching:
            return []
        if not here.ready:
            return self._healing.fetch_state(self._healing.donors(now_s), now_s)
        ahead = here.outlook(now_s).ahead
        if not ahead:
            self._behind_since_s = None
            return self._healing.step_back(now_s)
        if self._behind_since_s is None:
            self._behind_since_s = now_s
        if here.current is not None and here.current.applying:
            return []
        if now_s - self._behind_since_s < self._patience_s(now_s):
            return []
        gap = ahead[0].round - max(here.round, self._until)
        if gap > here.config.rounds_kept or self._tries >= FETCH_TRIES_MAX:
            self._tries = 0
            return self._healing.fetch_state(self._healing.overtaken_by(now_s), now_s)
        if self._fetch is not None and now_s < self._fetch.until_s:
            return []
        sources = sorted(ahead, key=lambda n: n.apart)  # in the same order otherwise
        source = sources[self._tries % len(sources)].record.peer
        self._fetch = Attempt(source, now_s + here.config.exchange_s)
        self._caught.clear()
        return [FetchOutcomes(source, here.round, None)]
