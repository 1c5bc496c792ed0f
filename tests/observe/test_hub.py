"""The hub: every event to every listener, in order, whatever a listener does."""

from __future__ import annotations

import io
import json
from typing import TYPE_CHECKING

from blockbuster import blockbuster_ctx

from peer.observe.console import open_console
from peer.observe.events import Notice, PeerRefused, Progress
from peer.observe.hub import Hub, as_record
from peer.observe.jsonl import JsonlLog
from peer.observe.metrics import Metrics
from tests.observe.story import ANN, JOIN, LIFE, ME, PEERS, progress

if TYPE_CHECKING:
    from pathlib import Path

    import pytest

    from peer.observe.events import Event


def test_everyone_hears_everything_in_order() -> None:
    hub = Hub()
    first: list[Event] = []
    second: list[Event] = []
    hub.listen(first.append)
    stop = hub.listen(second.append)
    for event in LIFE:
        hub.emit(event)
    stop()
    hub.emit(Notice("info", "later"))
    assert second == LIFE
    assert first == [*LIFE, Notice("info", "later")]
    assert hub.counts["Notice"] == 2


def test_what_a_listener_announces_comes_after_what_it_heard() -> None:
    hub = Hub()
    heard: list[Event] = []

    def answer(event: Event) -> None:
        if event == Notice("info", "question"):
            hub.emit(Notice("info", "answer"))

    hub.listen(answer)
    hub.listen(heard.append)
    hub.emit(Notice("info", "question"))
    assert heard == [Notice("info", "question"), Notice("info", "answer")]


def test_a_listener_that_raises_is_logged_once_and_the_others_go_on(
    caplog: pytest.LogCaptureFixture,
) -> None:
    hub = Hub()
    heard: list[Event] = []

    def broken(event: Event) -> None:
        raise KeyError("a bug")

    hub.listen(broken)
    hub.listen(heard.append)
    for event in LIFE:
        hub.emit(event)
    assert heard == LIFE
    assert len(caplog.records) == 1
    assert "a bug" in caplog.text


def test_the_past_is_bounded() -> None:
    hub = Hub(keep=10)
    for number in range(5000):
        hub.emit(progress(round=number))
        hub.emit(PeerRefused(f"12D3KooW{number:06d}", "junk"))
    assert len(hub.recent()) == 10
    assert hub.recent()[-2]["round"] == 4999
    assert len(json.dumps(hub.snapshot())) < 20_000


def test_a_snapshot_is_json_and_says_where_we_are() -> None:
    hub = Hub(wall=lambda: 1000.0)
    assert hub.snapshot()["phase"] == "starting"
    for event in LIFE[:-1]:
        hub.emit(event)
    now = json.loads(json.dumps(hub.snapshot(), allow_nan=False))
    assert (now["peer"], now["round"], now["epoch"], now["phase"]) == (ME, 41, 3, "training")
    assert (now["members"], now["coordinator"], now["join_command"]) == (PEERS, ANN, JOIN)
    assert now["last_round"]["spans"][0]["coverage"] == 0.66
    assert now["digests_agreed"]["peers"] == PEERS
    assert now["checkpoint_round"] == 42
    assert sorted(now["via"].values()) == ["answers", "connection refused"]
    assert now["notices"][0]["t"] == 1000.0
    assert now["counts"]["PeerRefused"] == 1
    hub.emit(LIFE[-1])
    assert hub.snapshot()["phase"] == "left"


def test_numbers_that_json_does_not_know_become_null() -> None:
    record = as_record(progress(loss=float("nan"), due_s=float("inf")), 1.0)
    assert (record["event"], record["loss"], record["due_s"]) == (Progress.__name__, None, None)
    json.dumps(record, allow_nan=False)


def test_rates_are_taken_over_the_last_seconds() -> None:
    hub = Hub()
    now_s = 0.0
    hub.state.clock = lambda: now_s
    for second in range(30):
        now_s = float(second)
        hub.emit(progress(bytes_up=second * 100, bytes_down=max(0, second - 20) * 7))
    up, down = hub.state.rates()
    assert round(up) == 100
    assert round(down) == 7
    now_s += 1.5
    assert hub.state.due_s() == 2.5


async def test_no_listener_ever_blocks_the_loop(tmp_path: Path) -> None:
    hub = Hub()
    with (
        JsonlLog(tmp_path / "log.jsonl", announce=hub.emit) as log,
        open_console(hub, stream=io.StringIO()),
    ):
        hub.listen(log)
        hub.listen(Metrics())
        with blockbuster_ctx():
            for event in LIFE:
                hub.emit(event)
    assert set(hub.counts.values()) == {1}
