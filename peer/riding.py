"""Mixes that ride in a round: attached to contributions, admitted once by the aggregator, noted.

`peer.exchange` calls this where units pass through it; without gossip there is none of it. A
contribution's header names the loans of the mixes in its units; the aggregator lets a mix into a
unit if its loan is one of those, its time is not over, and the state does not have it yet.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

from peer.train.composite import Mix, compose, split
from peer.train.mixing import Mixer
from peer.train.mixtable import MixTable
from protocols import limits
from protocols.errors import RemoteProtocolError
from protocols.gossip import GossipMachine
from protocols.loans import Loan, MixId, MixNote, mix_id, open_loan
from protocols.messages import ContributionHeader, Plan
from protocols.records import Signed
from protocols.types import Digest, PeerId

ADMITTED_MAX = 4 * limits.LOANS_MAX
"""Loans remembered from the headers of one round: those that are past are dropped with it."""


@dataclass(slots=True)
class Board:
    """What rides in one span that is being reduced. Used in the codec thread, unit after unit."""

    number: int
    table: MixTable
    """Of the span's units only, and ours to change."""
    start: int
    loans: dict[MixId, tuple[Signed, int, int]]
    """mix -> (loan, until, sign)."""
    runs: list[list[int]] = field(default_factory=list)
    """[mix, start, stop] of what was let in."""

    def let_in(self, unit: int, riding: Iterable[Mix]) -> list[Mix]:
        """Those that count in this unit, each once; the others have to wait."""
        chosen: list[Mix] = []
        for mix in sorted({m.id: m for m in riding}.values(), key=lambda m: m.id):
            row = unit - self.start
            fits = len(chosen) < limits.MIXES_PER_UNIT_MAX and mix.until >= self.number
            if not fits or mix.id not in self.loans:
                continue
            if not self.table.admits(row, mix.id, mix.until, mix.sign):
                continue
            if not self._note(mix.id, unit):
                continue
            self.table.add(row, mix.id, mix.until, mix.sign)
            chosen.append(mix)
        return chosen

    def _note(self, mix: MixId, unit: int) -> bool:
        """Whether the outcome's header still has room to say so."""
        for run in self.runs:
            if run[0] == mix and run[2] == unit:
                run[2] += 1
                return True
        if len(self.runs) >= limits.MIX_NOTES_MAX:
            return False
        self.runs.append([mix, unit, unit + 1])
        return True


class Riding:
    """See the module. In the event loop, but for what says otherwise."""

    def __init__(self, machine: GossipMachine, mixer: Mixer, table: MixTable) -> None:
        """`table`: the state's own; only looked at."""
        self._machine = machine
        self._mixer = mixer
        self.table = table
        self.payloads: dict[MixId, dict[int, bytes]] = {}
        """mix -> unit -> coded d: of what we carry, and of what our group owes."""
        self._admitted: dict[MixId, tuple[int, Signed, int, int]] = {}
        """mix -> (round, loan, until, sign), from contributions' headers."""

    # ── contributions ────────────────────────────────────────────────────────────────────
    def loans(self, plan: Plan, start: int, stop: int) -> tuple[Signed, ...]:
        """Of what `attach` may put into these units.

        Who has moved to another group still carries what it borrowed for the one that it left,
        until its first round there is done: that does not ride here.
        """
        able = [
            c.signed for _, c in self._machine.attachable(plan.round)
            if c.loan.start < stop and start < c.loan.stop and c.loan.sign_for(plan.group) == c.sign
        ]  # fmt: skip
        return tuple(able[: limits.LOANS_MAX])

    def attach(
        self, loans: Sequence[Signed], number: int, start: int, units: Sequence[bytes]
    ) -> list[bytes]:
        """Contributed units from `start` on, with what rides along."""
        named = {mix_id(signed.body) for signed in loans}
        able = [(m, c) for m, c in self._machine.attachable(number) if m in named]
        result = []
        for unit, payload in enumerate(units, start):
            riding = []
            for mix, carried in able:
                d = self.payloads.get(mix, {}).get(unit)
                inside = carried.loan.start <= unit < carried.loan.stop
                if d is None or not inside or not carried.left >> (unit - carried.loan.start) & 1:
                    continue
                if self.table.admits(unit, mix, carried.until, carried.sign):
                    riding.append(Mix(mix, carried.until, carried.sign, d))
            result.append(compose(payload, riding[: limits.MIXES_PER_UNIT_MAX]))
        return result

    def admit_own(self, loans: Sequence[Signed], number: int) -> None:
        """Our own contribution goes into a span that we reduce."""
        for mix, carried in self._machine.attachable(number):
            if carried.signed in loans:
                self._admit(number, mix, carried.signed, carried.until, carried.sign)

    def admit(self, header: ContributionHeader, sender: PeerId) -> None:
        """Look over the loans that a contribution names.

        Raises:
            RemoteProtocolError: one is forged, or none of this group's business.
        """
        opened = [(signed, open_loan(signed, sender)) for signed in header.loans]
        for _, loan in opened:
            if loan.run != header.run or not loan.sign_for(header.group):
                raise RemoteProtocolError(sender, "names a loan of other groups")
        for signed, loan in opened:
            fragments = self._machine.config.fragments
            until, sign = loan.until(header.group, fragments), loan.sign_for(header.group)
            self._admit(header.round, mix_id(signed.body), signed, until, sign)

    def _admit(self, number: int, mix: MixId, signed: Signed, until: int, sign: int) -> None:
        old = [m for m, known in self._admitted.items() if known[0] < number - 1]
        for past in old:
            del self._admitted[past]
        if len(self._admitted) < ADMITTED_MAX:
            self._admitted[mix] = (number, signed, until, sign)

    def check(self, unit: int, payload: bytes) -> bytes:
        """In the codec thread: the mean's part of a contributed unit, once what rides along was
        looked over.

        Raises:
            ValueError: it is no unit with mixes that its sender has named.
        """
        mean, mixes = split(payload)
        for mix in mixes:
            known = self._admitted.get(mix.id)
            if known is None or known[2:] != (mix.until, mix.sign):
                raise ValueError("a mix whose loan its sender has not shown")
            self._mixer.check(unit, mix.payload)
        return mean

    # ── reduction ────────────────────────────────────────────────────────────────────────
    def board(self, number: int, start: int, stop: int) -> Board:
        """For the reduction of a span."""
        loans = {mix: (known[1], known[2], known[3]) for mix, known in self._admitted.items()}
        return Board(number, self.table.copy(slice(start, stop)), start, loans)

    # ── outcomes ─────────────────────────────────────────────────────────────────────────
    def keep(self, mix: MixId, loan: Loan, units: Iterable[tuple[int, bytes]]) -> None:
        """Hold the payload of a mix."""
        held = self.payloads.setdefault(mix, {})
        held.update((unit, d) for unit, d in units if loan.start <= unit < loan.stop)


def notes_of(
    board: Board, units: Sequence[bytes], digest_of: Callable[[Sequence[bytes]], Digest]
) -> tuple[MixNote, ...]:
    """What an outcome's header says of the mixes in its units; `digest_of` hashes payloads."""
    found = []
    for mix, start, stop in board.runs:
        inside = [payload_of(units[unit - board.start], mix) for unit in range(start, stop)]
        found.append(MixNote(board.loans[mix][0], start, stop, digest_of(inside)))
    return tuple(found)


def payload_of(unit: bytes, mix: MixId) -> bytes:
    """The coded d of a mix in a unit that has it; nothing where it has not."""
    return next((m.payload for m in split(unit)[1] if m.id == mix), b"")
