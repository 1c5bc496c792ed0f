"""`join`: what is refused before anything begins, and how a peer ends that has begun."""

from __future__ import annotations

import os
import signal
import socket
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path
from typing import Any

import pytest

import peer.peer
from peer.errors import NetworkError, VersionError
from peer.home import open_seat
from protocols.identity import Signer
from tests.cli.conftest import Cli

SOMEBODY = Signer(bytes(32)).peer_id
LOCAL = ("--host", "127.0.0.1", "--threads", "1")
PATIENCE_S = 60.0


@pytest.mark.parametrize(
    ("argv", "code", "text"),
    [
        (["--via", "example.org:31337"], 2, "is no peer's address"),
        (["--via", "/ip4/127.0.0.1/tcp/1"], 2, "no /p2p/"),
        (["--via", "/ip4/127.0.0.1/tcp/1/p2p/12D3KooWnobody"], 2, "not a peer id"),
        (["--announce", "example.org"], 2, "--announce 'example.org' is not an address"),
        (["--upload", "fast"], 2, "fast"),
        (["--site", "my lab"], 2, "--site"),
        (["--device", "abacus"], 2, "say cpu"),
        (["--device", "cuda:99"], 2, "torch sees"),
        (["--seat", "../../etc"], 2, "no name for a seat"),
        (["--run", "deadbeef"], 6, "'deadbeef' is not on this machine"),
    ],
)
def test_what_makes_no_sense_is_refused(cli: Cli, argv: list[str], code: int, text: str) -> None:
    said = cli("join", *LOCAL, *argv)
    assert said.code == code, said.err
    assert text in said.err
    assert said.err.startswith("error: ")
    assert said.err.count("\n") == 1


def test_a_taken_port_and_a_taken_seat_are_said(cli: Cli, tmp_path: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        said = cli("join", *LOCAL, "--port", port)
        assert said.code == 5
        assert f"port {port} is taken" in said.err
        assert "--port" in said.err
    with open_seat(tmp_path / "home", "mine"):
        said = cli("join", *LOCAL, "--seat", "mine")
        assert said.code == 2
        assert "already running" in said.err


@contextmanager
def ctrl_c_after(path: Path, sign: str) -> Iterator[None]:
    """Press Ctrl-C in this process once `sign` stands in the peer's log."""

    def watch() -> None:
        deadline_s = time.monotonic() + PATIENCE_S
        while time.monotonic() < deadline_s:
            if path.exists() and sign in path.read_text():
                break
            time.sleep(0.02)
        os.kill(os.getpid(), signal.SIGINT)

    watcher = threading.Thread(target=watch)
    watcher.start()
    yield
    watcher.join()


def test_an_address_that_is_silent_is_tried_again_and_ctrl_c_ends_that(
    cli: Cli, tmp_path: Path
) -> None:
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))  # and nobody listens
        address = f"/ip4/127.0.0.1/tcp/{closed.getsockname()[1]}/p2p/{SOMEBODY}"
        with ctrl_c_after(tmp_path / "home" / "seat-1" / "log.jsonl", '"ViaFailed"'):
            said = cli("join", *LOCAL, "--via", address)
    assert said.code == 0, said.err
    assert said.err == ""
    assert said.out.startswith("starting")
    assert "does not answer" in said.out or "no answer" in said.out
    assert "again in" in said.out
    assert "leaving: saving and saying goodbye" in said.out
    assert said.out.endswith("stopped before it had joined; nothing is lost\n")


# ── how it ends ──────────────────────────────────────────────────────────────────────────


class FakePeer:
    """Runs until it is asked to leave, or until `trouble` comes up."""

    round = 12

    def __init__(self, trouble: BaseException | None) -> None:
        self.trouble = trouble

    def leave(self) -> None:
        raise AssertionError("nobody asked")

    async def wait_left(self) -> None:
        if self.trouble is not None:
            raise self.trouble


@pytest.fixture
def peer_with(monkeypatch: pytest.MonkeyPatch) -> Callable[[Exception | None], None]:
    def install(trouble: Exception | None) -> None:
        @asynccontextmanager
        async def open_fake(*_: Any, **__: Any) -> AsyncIterator[FakePeer]:
            yield FakePeer(trouble)

        monkeypatch.setattr(peer.peer, "open_peer", open_fake)

    return install


def test_a_peer_that_was_asked_over_its_socket_says_goodbye(
    cli: Cli, peer_with: Callable[[Exception | None], None]
) -> None:
    peer_with(None)
    said = cli("join", *LOCAL)
    assert (said.code, said.err) == (0, "")
    assert "leaving: saving" in said.out
    assert said.out.endswith("goodbye, after round 12; `python -m peer join` goes on from there\n")


@pytest.mark.parametrize(
    ("trouble", "code"), [(NetworkError("no net; plug it in"), 5), (VersionError("old; new"), 8)]
)
def test_trouble_while_it_runs_ends_with_its_code(
    cli: Cli, peer_with: Callable[[Exception | None], None], trouble: Exception, code: int
) -> None:
    peer_with(ExceptionGroup("tasks", [ExceptionGroup("inner", [trouble])]))
    said = cli("join", *LOCAL)
    assert said.code == code
    assert said.err == f"error: {trouble}\n"
    assert "goodbye" not in said.out


def test_a_bug_names_the_log(
    cli: Cli, tmp_path: Path, peer_with: Callable[[Exception | None], None]
) -> None:
    peer_with(ExceptionGroup("tasks", [ZeroDivisionError("oh")]))
    said = cli("join", *LOCAL, "--seat", "mine")
    assert said.code == 1
    assert "ZeroDivisionError: oh" in said.err
    assert str(tmp_path / "home" / "mine" / "log.jsonl") in said.err
    assert "please report it" in said.err


def test_log_json_says_nothing_but_events(
    cli: Cli, peer_with: Callable[[Exception | None], None]
) -> None:
    peer_with(None)
    said = cli("join", *LOCAL, "--log-json")
    assert all(line.startswith('{"t":') for line in said.out.splitlines())
    assert '"event":"Notice"' in said.out
