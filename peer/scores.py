"""What a group's peers score between them: each tells the others how its share went.

Every `schedule.evaluate_every` rounds each peer scores its share of the questions on the outer
state (`peer.train.questions`) and calls its group's members with a signed report: sums, which add
up. It has nothing to do with rounds: it is a call of its own (told from the driver's messages by
its first bytes), lost reports are not sent again, and nothing waits for one. What a report claims
is one peer's word.
"""

from __future__ import annotations

import asyncio
import contextlib
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Annotated, Final

from peer.manifest_evaluation import ROWS_MAX
from peer.net.transport import CallHandler, Transport, TransportError
from peer.observe import events as ev
from peer.train.scoring import Score
from protocols import limits
from protocols.errors import RemoteProtocolError
from protocols.group import GroupMachine
from protocols.identity import Signer
from protocols.messages import open_signed
from protocols.records import RunIdField, Signed, sign
from protocols.schema import Max, SchemaError, pack, unpack
from protocols.types import PeerId, RunId

PREFIX: Final = b"\xffmurmuration/scores/1"
"""No message of the protocol begins like this: those begin with their version."""
DOMAIN: Final = "scores"
REPORT_BYTES_MAX: Final = 1024  # a report and its signature have some 350
TELL_S_MAX: Final = 10.0  # for one member; a report that comes later is of little use
AHEAD_MAX: Final = 2**20  # rounds by which a member may be ahead of us; more is nonsense
NATS_PER_TOKEN_MAX: Final = 1e4  # of the right answer: float32's softmax ends at some 1e2

_Rows = Annotated[int, Max(ROWS_MAX)]


@dataclass(frozen=True, slots=True)
class ScoreReport:
    """One peer's sums after a round; see `Score`."""

    run: RunIdField
    round: Annotated[int, Max(2**48)]
    rows: _Rows
    refused: _Rows
    tokens: Annotated[int, Max(2**40)]
    nats: float
    asked: _Rows
    exact: _Rows
    questions: _Rows
    right: _Rows
    right_per_byte: _Rows

    @property
    def score(self) -> Score:
        return Score(
            self.rows, self.tokens, self.nats, self.asked, self.exact, self.questions, self.right,
            self.right_per_byte, self.refused,
        )  # fmt: skip


def report_of(run: RunId, number: int, score: Score) -> ScoreReport:
    """What is told of it."""
    return ScoreReport(
        run, number, score.rows, score.refused, score.tokens, score.nats, score.asked, score.exact,
        score.questions, score.right, score.right_per_byte,
    )  # fmt: skip


def read_report(sender: PeerId, run: str, data: bytes) -> ScoreReport:
    """The report in a call that begins with `PREFIX`.

    Raises:
        RemoteProtocolError: it is none, or another's, or another run's, or does not add up.
    """
    if len(data) > len(PREFIX) + REPORT_BYTES_MAX:
        raise RemoteProtocolError(sender, f"scores in {len(data)} bytes")
    try:
        signed = unpack(Signed, data[len(PREFIX) :])
    except SchemaError as error:
        raise RemoteProtocolError(sender, f"scores: {error}") from None
    report = open_signed(signed, DOMAIN, ScoreReport, sender)
    if signed.signer != sender:
        raise RemoteProtocolError(sender, f"scores of {signed.signer}, not its own")
    if report.run != run:
        raise RemoteProtocolError(sender, "scores of another run")
    fine = (
        report.rows + report.refused <= ROWS_MAX
        and report.exact <= report.asked <= report.rows
        and max(report.right, report.right_per_byte) <= report.questions <= report.rows
        and math.isfinite(report.nats)
        and 0.0 <= report.nats <= NATS_PER_TOKEN_MAX * report.tokens
    )
    if not fine:
        raise RemoteProtocolError(sender, "scores that do not add up")
    return report


class ScoreBoard:
    """The latest report of each peer, and what those of one round add up to."""

    def __init__(self, peers_max: int = 2 * limits.ROSTER_MAX) -> None:
        """`peers_max`: groups change; beyond so many the oldest reports go."""
        self._peers_max = peers_max
        self._latest: dict[PeerId, ScoreReport] = {}

    def add(self, peer: PeerId, report: ScoreReport) -> bool:
        """False for one that is no newer than the peer's last."""
        known = self._latest.get(peer)
        if known is not None and known.round >= report.round:
            return False
        self._latest[peer] = report
        while len(self._latest) > self._peers_max:
            oldest = min(self._latest, key=lambda other: self._latest[other].round)
            del self._latest[oldest]
        return True

    def of(self, number: int) -> dict[PeerId, Score]:
        """Who scored what after this round."""
        return {p: r.score for p, r in self._latest.items() if r.round == number}


class Scores:
    """This peer's part: tells its own, takes in the others', announces both."""

    def __init__(
        self,
        machine: GroupMachine,
        transport: Transport,
        signer: Signer,
        run: RunId,
        emit: ev.Listener,
        refused: Callable[[RemoteProtocolError], None],
        now_s: Callable[[], float] = time.monotonic,
    ) -> None:
        """`refused` is told of members that break the rules."""
        self._machine = machine
        self._transport = transport
        self._signer = signer
        self._run = run
        self._emit = emit
        self._refused = refused
        self._now_s = now_s
        self.board = ScoreBoard()
        self._waiting: tuple[int, frozenset[PeerId]] | None = None
        """The round of our own latest report, and whose are to be added up with it."""

    def before(self, on_call: CallHandler) -> CallHandler:
        """`on_call`, for what is no report."""

        async def answered(sender: PeerId, data: bytes) -> bytes:
            if not data.startswith(PREFIX):
                return await on_call(sender, data)
            try:
                self._take(sender, data)
            except RemoteProtocolError as error:
                self._refused(error)
                raise
            return b""

        return answered

    async def tell(self, number: int, score: Score, roster: Sequence[PeerId]) -> None:
        """Our own, after round `number`, whose members are `roster`."""
        self._add_up()  # whoever has not told of the one before will not
        report = report_of(self._run, number, score)
        me = self._signer.peer_id
        self._waiting = (number, frozenset({me, *roster}))
        self._add(me, report)
        data = PREFIX + pack(sign(self._signer, DOMAIN, report))
        async with asyncio.TaskGroup() as tasks:
            for peer in self._members():
                tasks.create_task(self._call(peer, data), name=f"scores to {peer}")

    async def _call(self, peer: PeerId, data: bytes) -> None:
        # One that is away, or knows no scores, goes without.
        with contextlib.suppress(TransportError, RemoteProtocolError):
            await self._transport.call(peer, data, TELL_S_MAX)

    def _members(self) -> list[PeerId]:
        me = self._signer.peer_id
        return [peer for peer in self._machine.live_members(self._now_s()) if peer != me]

    def _take(self, sender: PeerId, data: bytes) -> None:
        if sender not in self._members():
            raise RemoteProtocolError(sender, "scores, and is no member of our group")
        report = read_report(sender, self._run, data)
        if report.round > self._machine.round + AHEAD_MAX:
            raise RemoteProtocolError(sender, f"scores of round {report.round}")
        self._add(sender, report)

    def _add(self, peer: PeerId, report: ScoreReport) -> None:
        if self.board.add(peer, report):
            self._emit(ev.Scored(peer, report.round, report.score.report()))
            if self._waiting is not None and report.round == self._waiting[0]:
                number, whose = self._waiting
                if whose <= self.board.of(number).keys():
                    self._add_up()

    def _add_up(self) -> None:
        """Say what those who told of our latest round come to together."""
        if self._waiting is None:
            return
        number, whose = self._waiting
        self._waiting = None
        found = {peer: score for peer, score in self.board.of(number).items() if peer in whose}
        total = Score()
        for score in found.values():
            total += score
        self._emit(ev.ScoredTogether(number, sorted(found), len(whose), total.report()))
