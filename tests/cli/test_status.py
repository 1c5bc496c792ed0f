"""`status`, `identity` and `leave`, against peers that hold a seat and answer its socket."""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from peer.control import ControlServer
from peer.home import open_seat, seats
from peer.observe import events as ev
from peer.observe.hub import Hub
from tests.cli.conftest import Cli

ME, OTHER = "12D3KooWAAAAAAme", "12D3KooWBBBBBother"


def report() -> dict[str, Any]:
    """What a peer in the middle of round 41 answers."""
    hub = Hub()
    hub.emit(ev.Started(ME, "ab" * 32, "my run", ["/ip4/127.0.0.1/tcp/1/p2p/" + ME],
                        "python -m peer join --via X", "cpu", 3_250_000, "/seat"))  # fmt: skip
    hub.emit(ev.ViaFailed("/ip4/192.0.2.7/tcp/1/p2p/" + OTHER, "\x1b[2Jdead", 4))
    hub.emit(ev.Progress(41, 3, 2.5, 1234, 10, 1, "training", "near:" + ME, [ME, OTHER],
                         [ME], OTHER, 1_200_000, 3400, 0.01))  # fmt: skip
    member = {
        "peer": OTHER, "group": "near:" + ME, "round": 40, "ready": True, "suspected": True,
        "heard_s_ago": 4.2, "rtt_ms": 12.5,
    }  # fmt: skip
    stranger = {**member, "peer": "12D3KooWCCCfar", "group": "site:[bold]\x1b[2Jx", "ready": False}
    return {
        **hub.snapshot(), "group_members": [ME, OTHER], "coordinator": OTHER, "dht_nodes": 2,
        "network": [member, stranger],
        "method": {"does": "LoRA of rank 4", "why": "as its owner wishes", "tail": 0.125},
    }  # fmt: skip


class Resident:
    """A peer in a seat, in a thread of its own, until `gone`."""

    def __init__(self, home: Path, name: str, *, answers: bool = True) -> None:
        self.gone = threading.Event()
        self._ready = threading.Event()
        self._thread = threading.Thread(target=lambda: asyncio.run(self._live(home, name, answers)))
        self._thread.start()
        assert self._ready.wait(5)

    async def _live(self, home: Path, name: str, answers: bool) -> None:
        async def status(_: dict[str, Any]) -> dict[str, Any]:
            return report()

        async def leave(_: dict[str, Any]) -> dict[str, Any]:
            self.gone.set()
            return {}

        with open_seat(home, name) as seat:
            seat.identity()
            verbs = {"status": status, "leave": leave} if answers else {}
            if not answers:
                self._ready.set()
                await asyncio.to_thread(self.gone.wait)
                return
            async with ControlServer(seat.control_path, verbs):
                self._ready.set()
                await asyncio.to_thread(self.gone.wait)

    def end(self) -> None:
        self.gone.set()
        self._thread.join()


@pytest.fixture
def resident(tmp_path: Path) -> Iterator[Callable[..., Resident]]:
    everyone: list[Resident] = []

    def move_in(name: str = "seat-1", *, answers: bool = True) -> Resident:
        everyone.append(Resident(tmp_path / "home", name, answers=answers))
        return everyone[-1]

    yield move_in
    for one in everyone:
        one.end()


def test_nobody_runs_here(cli: Cli) -> None:
    for command in ("status", "leave"):
        said = cli(command)
        assert said.code == 9
        assert "python -m peer join" in said.err
    cli("identity")
    assert cli("status").code == 9, "a seat alone is no peer"


def test_status_for_people(cli: Cli, resident: Callable[..., Resident]) -> None:
    resident()
    said = cli("status")
    assert said.code == 0, said.err
    for text in (
        "seat-1 · my run · 3.25 M parameters on cpu", "training, round 41, epoch 3", "2.500",
        "LoRA of rank 4 (as its owner wishes); the rank of the last mean cut off 0.125",
        "2 members", "up 1.2 MB", "python -m peer join --via X",
    ):  # fmt: skip
        assert text in said.out
    rows = [line.split() for line in said.out.splitlines()]
    mine = next(row for row in rows if "this" in row)
    assert {"aggregator", "41"} <= set(mine)
    other = next(row for row in rows if "…Bother" in row)
    assert {"coordinator,", "silent", "40", "12.5"} <= set(other)
    assert "syncing" in next(row for row in rows if "…CCCfar" in row)[-8:]
    assert "\x1b[2J" not in said.out, "a stranger's words can't draw on this terminal"
    assert "[bold]" in said.out, "nor are they markup"


def test_status_for_scripts(cli: Cli, resident: Callable[..., Resident]) -> None:
    resident()
    resident("seat-2", answers=False)
    peers = json.loads(cli("status", "--format", "json").out)["peers"]
    assert [peer["name"] for peer in peers] == ["seat-1", "seat-2"]
    assert peers[0]["round"] == 41
    assert peers[0]["members"] == [ME, OTHER]
    assert peers[1]["phase"] == "starting", "its seat is taken, and nobody answers yet"
    only = json.loads(cli("status", "--format", "json", "--seat", "seat-2").out)["peers"]
    assert only == [peers[1]]
    assert "starting" in cli("status", "--seat", "seat-2").out
    assert cli("status", "--seat", "seat-3").code == 9
    early = cli("leave", "--seat", "seat-2")
    assert early.code == 5
    assert "only just starting" in early.err


def test_leave_waits_until_the_peer_has_left(
    cli: Cli, resident: Callable[..., Resident], tmp_path: Path
) -> None:
    resident()
    said = cli("leave")
    assert (said.code, said.out) == (0, "seat-1 has left\n")
    assert [info.running for info in seats(tmp_path / "home")] == [False]


def test_leave_asks_which_one(cli: Cli, resident: Callable[..., Resident]) -> None:
    one, two, node = resident("one"), resident("two"), resident("bootstrap")
    said = cli("leave")
    assert said.code == 2
    assert "one, two" in said.err, "a bootstrap node is only meant where it is named"
    assert cli("leave", "--seat", "two").code == 0
    assert (one.gone.is_set(), two.gone.is_set()) == (False, True)
    assert cli("leave").code == 0
    assert (one.gone.is_set(), node.gone.is_set()) == (True, False)
    assert cli("leave", "--all").out == "bootstrap has left\n"


def test_an_identity_is_made_once_and_shown_while_it_is_in_use(
    cli: Cli, resident: Callable[..., Resident], tmp_path: Path
) -> None:
    first = cli("identity", "--format", "json")
    assert first.code == 0
    (facts,) = json.loads(first.out)["identities"]
    assert facts["peer"].startswith("12D3KooW")
    assert Path(facts["key"]).stat().st_mode & 0o777 == 0o600
    assert facts["seat"] == "seat-1"
    resident()
    said = cli("identity")
    assert f"peer  {facts['peer']}\n" in said.out
    assert "seat-1, running now" in said.out
    cli("identity", "--seat", "second")
    assert len(json.loads(cli("identity", "--format", "json").out)["identities"]) == 2
    Path(facts["key"]).write_bytes(b"short")
    broken = cli("identity", "--seat", "second")
    assert broken.code == 0
