"""Real peers to look at from outside: `python -m peer ...` as processes, their memory, their time.

    with Crew() as crew:
        first = crew.join("first")
        crew.until(lambda: first.rounds, within_s=60)

Nothing outlives the block, nor a bench that is killed inside it: a guard at the other end of a pipe
ends the whole family then. Linux only.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Final, Self
from uuid import uuid4

from tests.bench import processes
from tests.bench.machine import ROOT
from tests.bench.result import BenchError
from tests.e2e.processes import Process

_POLL_S: Final = 0.02
_GUARD: Final = """
import sys
from tests.bench import processes
sys.stdin.read()
processes.kill_family(sys.argv[1])
"""


class Peer(Process):
    """A peer and when its process was started (seconds since the epoch, as in its events)."""

    started_s: float = 0.0

    def seconds_to(self, event: dict[str, Any] | None) -> float:
        """From the start of the process until `event`."""
        if event is None:
            raise BenchError(f"an expected event never came:\n{self.story()}")
        return float(event["t"]) - self.started_s


class Crew:
    """Peers of the embedded default run, each with a home of its own in a temporary folder."""

    def __enter__(self) -> Self:
        self.family = f"crew-{uuid4()}"
        """What `processes` knows all its processes by."""
        self._folder = tempfile.TemporaryDirectory(prefix="bench-")
        self.folder = Path(self._folder.name)
        self._peers: list[Peer] = []
        self._guard = subprocess.Popen(
            [sys.executable, "-c", _GUARD, self.family],
            stdin=subprocess.PIPE,
            cwd=ROOT,
            start_new_session=True,  # a terminal's Ctrl-C must not end it before its work
        )
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        left = processes.kill_family(self.family)
        for peer in self._peers:
            peer.end()
        self._guard.communicate()
        self._folder.cleanup()
        if left:
            raise BenchError(f"these processes could not be killed: {left}; look at them with ps")

    def join(self, name: str, via: Peer | None = None, *, root: Path = ROOT) -> Peer:
        """Start a peer that joins `via`, or the first of all; `root`: the checkout it runs."""
        arguments = [
            "peer", "join", "--home", str(self.folder / name), "--host", "127.0.0.1",
            "--threads", "1", "--log-json",
        ]  # fmt: skip
        if via is not None:
            arguments += ["--via", via.address]
        started_s = time.time()
        peer = Peer(
            name, arguments, self.folder / f"{name}.err",
            root=root, environment={processes.MARK: self.family},
        )  # fmt: skip
        peer.started_s = started_s
        self._peers.append(peer)
        return peer

    def run(self, code: str, timeout_s: float) -> str:
        """What a Python program of the family prints, with the checkout on its path."""
        done = subprocess.run(
            [sys.executable, "-c", code],
            cwd=ROOT,
            env={
                **os.environ,
                processes.MARK: self.family,
                "OMP_NUM_THREADS": "1",
                "PYTHONPATH": f"{ROOT}:{ROOT / 'codecs'}",
            },
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=timeout_s,
            check=False,
        )
        if done.returncode:
            raise BenchError(f"a helper failed; it said last:\n{done.stderr[-1500:]}")
        return done.stdout

    def until(self, condition: Callable[[], Any], within_s: float) -> None:
        """Wait until `condition` holds of what the peers have said.

        Raises:
            BenchError: a peer died, or it did not come true in time; with what all did last.
        """

        def holds() -> bool:
            for peer in self._peers:
                peer.read()
            dead = [peer.name for peer in self._peers if peer.code not in (None, 0)]
            if dead:
                raise BenchError(f"{dead[0]} died:\n{self._stories()}")
            return bool(condition())

        if not processes.wait_until(holds, within_s):
            raise BenchError(f"not within {within_s:g} s:\n{self._stories()}")

    def _stories(self) -> str:
        return "\n".join(peer.story() for peer in self._peers)


# ── /proc ────────────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True, slots=True)
class Memory:
    """One process, in MiB."""

    resident: float
    """Pages in memory, those shared with others included."""
    proportional: float
    """The same, but a page that n processes share counts 1/n."""
    peak: float
    """The most that was resident so far."""


def memory(pid: int) -> Memory:
    """What a process holds now; one of this user's."""
    fields = _fields(Path(f"/proc/{pid}/smaps_rollup")) | _fields(Path(f"/proc/{pid}/status"))
    return Memory(*(fields[name] / 1024 for name in ("Rss", "Pss", "VmHWM")))


def _fields(file: Path) -> dict[str, int]:
    """Every `Name:   123 kB` in it."""
    lines = [line.split() for line in file.read_text().splitlines()]
    return {line[0][:-1]: int(line[1]) for line in lines if line[-1:] == ["kB"]}


@dataclass(frozen=True, slots=True)
class Moment:
    """What every thread of a process has had from the scheduler so far."""

    at_s: float
    threads: dict[int, tuple[float, float]]
    """Thread id -> (seconds on a core, seconds in the queue for one)."""


def moment(pid: int) -> Moment:
    threads = {}
    for task in Path(f"/proc/{pid}/task").iterdir():
        with suppress(FileNotFoundError, ProcessLookupError):  # a thread that has just ended
            ran_ns, queued_ns, _ = map(int, (task / "schedstat").read_text().split())
            threads[int(task.name)] = (ran_ns / 1e9, queued_ns / 1e9)
    return Moment(time.monotonic(), threads)


def asleep_share(before: Moment, after: Moment) -> float:
    """Share of the time in which the busiest thread neither ran nor queued for a core, 0..1.

    In a peer with one compute thread that is the training thread, and being asleep is waiting:
    for the network, for the event loop's turn in the interpreter, for a disk.
    """
    spent = {
        thread: (ran_s - before.threads.get(thread, (0.0, 0.0))[0],
                 queued_s - before.threads.get(thread, (0.0, 0.0))[1])
        for thread, (ran_s, queued_s) in after.threads.items()
    }  # fmt: skip
    ran_s, queued_s = max(spent.values())
    return max(0.0, 1.0 - (ran_s + queued_s) / (after.at_s - before.at_s))
