"""Real processes over libp2p on loopback: a node, a peer that joins through it, and their ends."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from peer.__main__ import main
from tests.cli.manifests import write

ROOT = Path(__file__).parents[2]
LOCAL = ("--host", "127.0.0.1", "--log-json")
PATIENCE_S = 90.0  # importing torch on a busy machine takes most of it
POLL_S = 0.02

Json = dict[str, Any]


class Program:
    """A child process and the events on its stdout."""

    def __init__(self, *argv: str) -> None:
        path = os.pathsep.join([str(ROOT), str(ROOT / "codecs")])
        self.process = subprocess.Popen(
            [sys.executable, "-m", *argv],
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=ROOT,
            env={**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"},
        )  # fmt: skip
        self.events: list[Json] = []
        self.errors: list[str] = []
        for target in (self._read_events, self._read_errors):
            threading.Thread(target=target, daemon=True).start()

    def _read_events(self) -> None:
        assert self.process.stdout
        for line in self.process.stdout:
            self.events.append(json.loads(line))

    def _read_errors(self) -> None:
        assert self.process.stderr
        self.errors += list(self.process.stderr)

    def wait_for(self, name: str, that: Callable[[Json], bool] = lambda _: True) -> Json:
        """The first event of that name (from now or before) of which `that` holds."""
        deadline_s = time.monotonic() + PATIENCE_S
        while time.monotonic() < deadline_s and self.process.poll() is None:
            for event in list(self.events):
                if event["event"] == name and that(event):
                    return event
            time.sleep(POLL_S)
        seen = [event["event"] for event in self.events]
        raise AssertionError(f"no {name}; seen {seen}, said {''.join(self.errors)}")

    def daemons(self) -> list[int]:
        """Its p2pd children."""
        pid = self.process.pid
        children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
        return [int(child) for child in children if "p2pd" in _command(int(child))]

    def end(self, number: int) -> int:
        with suppress(ProcessLookupError):
            self.process.send_signal(number)
        code = self.process.wait(PATIENCE_S)
        return code


def _command(pid: int) -> str:
    with suppress(OSError):
        return Path(f"/proc/{pid}/cmdline").read_text()
    return ""


@pytest.fixture
def start() -> Iterator[Callable[..., Program]]:
    programs: list[Program] = []

    def begin(*argv: str) -> Program:
        programs.append(Program(*argv))
        return programs[-1]

    yield begin
    for program in programs:
        if program.process.poll() is None:
            program.process.kill()
        program.process.wait()
        for pipe in (program.process.stdout, program.process.stderr):
            if pipe is not None:
                pipe.close()


def test_a_peer_outlives_the_node_it_came_through(
    start: Callable[..., Program], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    node_argv = (
        "bootstrap", "run", *LOCAL, "--home", str(tmp_path / "node"), "--port", "0",
        "--metrics-port", "0",
    )  # fmt: skip
    home = ("--home", str(tmp_path / "peer"))
    node = start(*node_argv)
    address = node.wait_for("Started")["addresses"][0]
    peer = start(
        "peer", "run", "start", str(write(tmp_path)), *LOCAL, *home, "--via", address,
        "--threads", "1",
    )  # fmt: skip
    assert peer.wait_for("ViaAnswered")["address"] == address
    first = peer.wait_for("RoundFinished")

    # Other commands, while it trains.
    assert main(["status", *home, "--format", "json"]) == 0
    (status,) = json.loads(capsys.readouterr().out)["peers"]
    assert status["round"] > first["round"]
    assert status["dht_nodes"] == 1
    assert main(["status", *home]) == 0
    assert "tiny" in capsys.readouterr().out
    assert main(["sample", "line 1", "--tokens", "5", *home]) == 0
    said = capsys.readouterr()
    assert said.out.startswith("line 1")
    assert int(said.err.removeprefix("tiny, round ").rstrip(":\n")) >= status["round"], (
        "the peer saved what it had before it was sampled"
    )

    # The node dies at once; its daemon goes with it, and the peer goes on.
    daemons = node.daemons()
    assert len(daemons) == 1
    assert node.end(signal.SIGKILL) == -signal.SIGKILL
    number = status["round"]
    peer.wait_for("RoundFinished", lambda e: e["round"] > number + 2)
    deadline_s = time.monotonic() + PATIENCE_S
    while any("p2pd" in _command(pid) for pid in daemons) and time.monotonic() < deadline_s:
        time.sleep(POLL_S)
    assert not any("p2pd" in _command(pid) for pid in daemons)

    # It comes back where it was, and is told to stop politely.
    again = start(*node_argv)
    assert again.wait_for("Started")["addresses"][0] == address
    assert again.end(signal.SIGTERM) == 0
    assert again.events[-1]["event"] == "Left"

    # The peer is asked to leave, and leaves its work behind.
    assert main(["leave", *home]) == 0
    assert peer.process.wait(PATIENCE_S) == 0
    assert [event["event"] for event in peer.events][-1] == "Left"
    assert peer.errors == node.errors == again.errors == []
    capsys.readouterr()
    assert main(["export", str(tmp_path / "model"), *home]) == 0
    finished = [event["round"] for event in peer.events if event["event"] == "RoundFinished"]
    match = f"tiny after round {finished[-1] + 1} "
    assert match in capsys.readouterr().out, "nothing of what was reported is lost"
