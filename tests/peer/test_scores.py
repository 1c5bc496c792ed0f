"""What peers tell each other of their scores: signed, bounded, added up; and what liars get."""

from __future__ import annotations

import asyncio
import dataclasses
import hashlib
import math
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from peer.config import PeerConfig
from peer.manifest import Asset, CodecSpec, DataSpec, InnerSpec, Manifest, OuterSpec
from peer.manifest_evaluation import ROWS_MAX, EvaluationSpec
from peer.manifest_toml import Content
from peer.net.transport import TransportError
from peer.observe import events as ev
from peer.observe.state import State
from peer.peer import build_run
from peer.scores import DOMAIN, PREFIX, ScoreBoard, Scores, read_report, report_of
from peer.train.method import DataSource, Method
from peer.train.scoring import Score
from protocols.errors import RemoteProtocolError
from protocols.identity import Signer
from protocols.records import sign
from protocols.schema import pack
from protocols.types import PeerId, RunId
from tests.peer.swarm import Swarm, toy_manifest
from tests.train.chat_tiny import lines
from tests.train.tiny import manifest

RUN = RunId("ab" * 32)
ANN, BOB, EVE = (Signer(bytes([n]) * 32) for n in (1, 2, 3))
SCORE = Score(
    rows=8, tokens=80, nats=160.0, asked=8, exact=2, questions=4, right=3, right_per_byte=1
)


def _told(signer: Signer, report: object) -> bytes:
    return PREFIX + pack(sign(signer, DOMAIN, report))


def test_a_report_comes_back_as_it_was_told() -> None:
    report = report_of(RUN, 40, SCORE)
    data = _told(ANN, report)
    assert read_report(ANN.peer_id, RUN, data) == report
    assert report.score == SCORE
    assert len(data) < 400


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"exact": 9}, "add up"),
        ({"asked": 9}, "add up"),
        ({"right": 5}, "add up"),
        ({"right_per_byte": 5}, "add up"),
        ({"questions": 9}, "add up"),
        ({"refused": ROWS_MAX}, "add up"),
        ({"nats": -1.0}, "add up"),
        ({"nats": math.inf}, "nats"),
        ({"nats": math.nan}, "nats"),
        ({"nats": 1e300}, "add up"),
        ({"rows": ROWS_MAX + 1}, "rows"),
        ({"rows": -1}, "rows"),
        ({"run": RunId("cd" * 32)}, "another run"),
    ],
)
def test_a_report_that_can_not_be_is_refused_in_its_authors_name(
    changes: dict[str, Any], says: str
) -> None:
    data = _told(EVE, dataclasses.replace(report_of(RUN, 40, SCORE), **changes))
    with pytest.raises(RemoteProtocolError, match=says) as refused:
        read_report(EVE.peer_id, RUN, data)
    assert refused.value.peer == EVE.peer_id


def test_another_ones_report_and_damaged_ones_are_refused() -> None:
    good = _told(ANN, report_of(RUN, 40, SCORE))
    with pytest.raises(RemoteProtocolError, match="not its own"):
        read_report(EVE.peer_id, RUN, good)
    for size in range(len(PREFIX), len(good)):
        with pytest.raises(RemoteProtocolError):
            read_report(ANN.peer_id, RUN, good[:size])
    for place in range(len(PREFIX), len(good)):
        bent = bytearray(good)
        bent[place] ^= 1
        with pytest.raises(RemoteProtocolError):
            read_report(ANN.peer_id, RUN, bytes(bent))
    with pytest.raises(RemoteProtocolError, match="bytes"):
        read_report(ANN.peer_id, RUN, good + bytes(5000))


def test_the_board_keeps_the_latest_of_so_many() -> None:
    board = ScoreBoard(peers_max=2)
    for number, signer in enumerate((ANN, BOB, EVE), 1):
        assert board.add(signer.peer_id, report_of(RUN, number, SCORE))
    assert board.of(1) == {}
    assert board.of(3) == {EVE.peer_id: SCORE}
    assert not board.add(EVE.peer_id, report_of(RUN, 3, SCORE))
    assert not board.add(EVE.peer_id, report_of(RUN, 2, SCORE))


class Group:
    """Scores of one peer among some, whose calls are noted."""

    def __init__(self, *members: Signer, away: tuple[Signer, ...] = ()) -> None:
        self.events: list[ev.Event] = []
        self.refusals: list[RemoteProtocolError] = []
        self.calls: list[tuple[PeerId, bytes]] = []
        ids = [ANN.peer_id, *(m.peer_id for m in members)]
        gone = {m.peer_id for m in away}
        machine: Any = SimpleNamespace(live_members=lambda now_s: ids, round=40)

        async def call(peer: PeerId, data: bytes, timeout_s: float) -> bytes:
            if peer in gone:
                raise TransportError(peer, "away")
            self.calls.append((peer, data))
            return b""

        transport: Any = SimpleNamespace(call=call)
        self.scores = Scores(
            machine, transport, ANN, RUN, self.events.append, self.refusals.append, lambda: 0.0
        )

        async def other(sender: PeerId, data: bytes) -> bytes:
            return b"the driver's"

        self.hear = self.scores.before(other)

    @property
    def together(self) -> list[ev.ScoredTogether]:
        return [event for event in self.events if isinstance(event, ev.ScoredTogether)]


async def test_what_all_told_is_added_up_once() -> None:
    it = Group(BOB, EVE, away=(EVE,))
    await it.hear(BOB.peer_id, _told(BOB, report_of(RUN, 40, SCORE)))  # before we were done
    roster = [s.peer_id for s in (ANN, BOB, EVE)]
    await it.scores.tell(40, SCORE, roster)
    assert [peer for peer, _ in it.calls] == [BOB.peer_id]
    read_report(ANN.peer_id, RUN, it.calls[0][1])
    assert not it.together
    await it.hear(EVE.peer_id, _told(EVE, report_of(RUN, 40, SCORE)))
    (event,) = it.together
    assert (event.round, event.members, event.peers) == (40, 3, sorted(roster))
    assert event.sums["rows"] == 24
    assert event.sums["exact_match"] == 0.25
    assert event.sums["accuracy"] == 0.75
    assert math.isclose(event.sums["perplexity"], math.exp(2.0))
    await it.hear(EVE.peer_id, _told(EVE, report_of(RUN, 40, SCORE)))
    assert len(it.together) == 1


async def test_who_does_not_tell_is_left_out_when_the_next_are_due() -> None:
    it = Group(BOB)
    roster = [ANN.peer_id, BOB.peer_id]
    await it.scores.tell(40, SCORE, roster)
    await it.scores.tell(50, SCORE, roster)
    (event,) = it.together
    assert (event.round, event.peers, event.members) == (40, [ANN.peer_id], 2)


async def test_strangers_and_liars_change_nothing_and_other_calls_pass() -> None:
    it = Group(BOB)
    assert await it.hear(BOB.peer_id, b"\x01anything") == b"the driver's"
    with pytest.raises(RemoteProtocolError, match="no member"):
        await it.hear(EVE.peer_id, _told(EVE, report_of(RUN, 40, SCORE)))
    with pytest.raises(RemoteProtocolError, match="round"):
        await it.hear(BOB.peer_id, _told(BOB, report_of(RUN, 2**40, SCORE)))
    assert not it.events
    assert [error.peer for error in it.refusals] == [EVE.peer_id, BOB.peer_id]


def test_the_status_shows_each_peer_of_the_latest_round_and_all_together() -> None:
    state = State(clock=lambda: 0.0)
    for event in (
        ev.Scored("a", 40, SCORE.report()),
        ev.Scored("b", 40, SCORE.report()),
        ev.ScoredTogether(40, ["a", "b"], 2, SCORE.report()),
        ev.Scored("b", 50, SCORE.report()),
        ev.Scored("c", 40, SCORE.report()),  # late
    ):
        state.apply(event, 0.0)
    told = state.summary()["scores"]
    assert set(told["peers"]) == {"b"}
    assert told["overall"].round == 40


# ── whole peers ──────────────────────────────────────────────────────────────────────────
class Examined(Swarm):
    """Peers with rows of their own, in a run that scores answers."""

    questions: Path | None = None

    def _data(self, name: str) -> tuple[Path, ...]:
        return (self.folder / f"{name}.jsonl",)

    def _files(self, name: str) -> dict[str, Content]:
        return {} if self.questions is None else {"data/questions-000": self.questions}

    def _build(self, name: str) -> Callable[[Manifest, Path], tuple[Method, DataSource]]:
        config = PeerConfig(data=self._data(name), device="cpu", threads=1)
        return lambda manifest, assets: build_run(manifest, assets, config)


def _run(**changes: Any) -> Manifest:
    return dataclasses.replace(
        manifest(),
        data=DataSpec(source="chat", sequence_length=48, block_samples=4, validation_share=0.2),
        inner=InnerSpec(lr=2e-2, warmup_steps=2, batch_size=4),
        outer=OuterSpec(lr=1.0, momentum=0.0),
        codec=CodecSpec(name="fp32"),
        schedule=dataclasses.replace(toy_manifest(round_s=0.6).schedule, evaluate_every=2),
        **{"evaluation": EvaluationSpec(rows=16, answer_tokens=4), **changes},
    )


async def _both_told(it: Examined, rows: int) -> list[ev.ScoredTogether]:
    """Until both have added up a round with so many rows, the same on both sides."""

    def found() -> list[list[ev.ScoredTogether]]:
        told = [
            {e.round: e for e in it.all(n, ev.ScoredTogether) if len(e.peers) == 2} for n in "ab"
        ]
        common = sorted(told[0].keys() & told[1].keys())
        return [[t[number] for t in told] for number in common]

    await it.until(lambda: bool(found()), 90)
    one, other = found()[-1]
    assert one == other
    assert one.sums["rows"] == rows
    return [one, other]


async def _started(it: Examined) -> None:
    for name in "ab":
        rows = [{"question": f"{name}{n}?", "answer": "six"} for n in range(40)]
        lines(it.folder / f"{name}.jsonl", rows)
    await it.start("a")
    await it.start("b", via="a")


async def test_each_scores_what_it_holds_out_and_both_know_the_sum(tmp_path: Path) -> None:
    it = Examined(tmp_path, _run())
    try:
        await _started(it)
        await it.until(lambda: all(it.all(n, ev.ScoredTogether) for n in "ab"), 60)
        own = [e.sums["rows"] for e in it.all("a", ev.Scored) if e.peer == it.peers["a"].id]
        others = [e.sums["rows"] for e in it.all("b", ev.Scored) if e.peer == it.peers["b"].id]
        (event, _) = await _both_told(it, own[0] + others[0])
        assert event.sums["asked"] == event.sums["rows"]
        status = it.peers["a"].status()["scores"]
        assert status["overall"]["sums"]["perplexity"] > 1
        assert it.peers["a"].id in status["peers"]
        assert not it.all("a", ev.PeerRefused)
    finally:
        await _stop(it)


async def test_the_runs_questions_are_shared_out(tmp_path: Path) -> None:
    file = tmp_path / "questions.jsonl"
    lines(
        file,
        [
            {"question": f"c{n}?", "answer": "six", "choices": ["six", "ten"]}
            for n in range(11)
        ],
    )  # fmt: skip
    content = file.read_bytes()
    digest = hashlib.sha256(content).hexdigest()
    asset = Asset(name="data/questions-000", sha256=digest, bytes=len(content))
    it = Examined(
        tmp_path,
        _run(
            assets=(asset,),
            evaluation=EvaluationSpec(rows=16, paths=("data/questions-000",)),
        ),
    )
    it.questions = file
    try:
        await _started(it)
        (event, _) = await _both_told(it, 11)
        assert event.sums["questions"] == 11
        assert event.sums["asked"] == 0
    finally:
        await _stop(it)


async def _stop(it: Examined) -> None:
    for name in list(it.peers):
        await it.stop(name)
    await asyncio.sleep(0)
