"""A fleet: the same worker program in several processes, told what to do in step.

    with Fleet("hivemind", "tests.bench.averaging_hivemind", 4) as fleet:
        fleet.start(numel=25_000_000)
        took = fleet.timed("average", timeout_s=60, round=1)

Everything that the workers start belongs to the fleet's family of processes and is counted and
ended with it. Leaving the `with` block kills them all, whatever happened inside: workers keep no
state worth a goodbye.
"""

from __future__ import annotations

import json
import os
import queue
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Final, Self
from uuid import uuid4

from tests.bench import processes
from tests.bench.machine import ROOT
from tests.bench.result import BenchError

_START_TIMEOUT_S: Final = 120.0  # imports alone take 3 s on an idle machine
_DEATH_POLL_S: Final = 0.2
_LOG_LINES_SHOWN: Final = 15

_ONE_THREAD: Final = dict.fromkeys(
    ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"), "1"
)
"""One compute thread per process: several peers share one machine."""


class FleetError(BenchError):
    """A worker died or did not answer in time; the text ends with what it said last."""


@dataclass(frozen=True, slots=True)
class Took:
    """One command, given to all workers at once, until the last of them had answered."""

    seconds: float
    cpu_s: float
    """Burned meanwhile by the whole family: workers and everything they have started."""
    others: float
    """Share of this machine's cores that anyone else used meanwhile, 0..1: was it a quiet time?"""
    replies: list[dict[str, Any]]
    each_s: dict[int, float]
    """Until that worker had answered, by its index."""


class _Worker:
    """One process and the thread that reads what it answers."""

    def __init__(self, name: str, family: str, command: Sequence[str], log: Path) -> None:
        self.name = name
        self._log = log
        path = os.pathsep.join([str(ROOT), str(ROOT / "codecs")])
        with log.open("wb") as stderr:
            self.process = subprocess.Popen(
                command,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=stderr,
                cwd=ROOT,
                env={
                    **os.environ,
                    **_ONE_THREAD,
                    processes.MARK: family,
                    "PYTHONPATH": path,
                    "TMPDIR": str(log.parent),  # removed with the fleet
                },
                start_new_session=True,  # a terminal's Ctrl-C is for the bench alone
            )
        self._answers: queue.SimpleQueue[tuple[float, bytes]] = queue.SimpleQueue()
        threading.Thread(target=self._listen, name=name, daemon=True).start()

    def _listen(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self._answers.put((time.monotonic(), line))

    def tell(self, command: bytes) -> None:
        assert self.process.stdin is not None
        try:
            self.process.stdin.write(command)
            self.process.stdin.flush()
        except BrokenPipeError:
            raise self._error("died") from None

    def answer(self, deadline_s: float) -> tuple[float, dict[str, Any]]:
        """When the next answer came (monotonic seconds), and the answer."""
        while True:
            # A dead worker's children may hold its end of the pipe open: no end of file then.
            dead = self.process.poll() is not None
            with suppress(queue.Empty):
                came_s, line = self._answers.get(timeout=_DEATH_POLL_S)
                return came_s, json.loads(line)
            if dead:
                raise self._error(f"died with status {self.process.returncode}")
            if time.monotonic() > deadline_s:
                raise self._error("did not answer in time")

    def close(self) -> None:
        """Reap it and close the pipes; it must have been killed."""
        self.process.wait()
        for pipe in (self.process.stdin, self.process.stdout):
            if pipe is not None:
                with suppress(BrokenPipeError):
                    pipe.close()

    def _error(self, what: str) -> FleetError:
        said = self._log.read_text(errors="replace").splitlines()[-_LOG_LINES_SHOWN:]
        return FleetError("\n    ".join([f"worker {self.name} {what}; it said last:", *said]))


class Fleet:
    """`size` processes of `python -m module` (or of any `command`), from `with` to its end."""

    def __init__(
        self,
        name: str,
        module: str,
        size: int,
        *,
        command: Sequence[str] | None = None,
        places: Sequence[Sequence[str]] = (),
    ) -> None:
        """`places`: for each worker the words before its command, which run it somewhere else
        (`ip netns exec NAME`)."""
        self.family = f"{name}-{uuid4()}"
        """What `processes` knows all its processes by."""
        self._name = name
        self._size = size
        self._command = command or [sys.executable, "-m", module]
        self._places = places or [()] * size
        self._workers: list[_Worker] = []
        self._hurt: set[int] = set()

    def __enter__(self) -> Self:
        self._folder = tempfile.TemporaryDirectory(prefix="bench-")
        try:
            for index in range(self._size):
                name = f"{self._name}-{index}"
                log = Path(self._folder.name, f"{name}.log")
                command = [*self._places[index], *self._command]
                self._workers.append(_Worker(name, self.family, command, log))
        except BaseException:
            self._end()
            raise
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._end()

    def start(self, each: Sequence[dict[str, Any]] = (), /, **arguments: Any) -> None:
        """`start` all: worker 0 alone, then the others with the `addresses` that it answered.

        Every worker gets its `index` in 0..size-1, the fleet's `size`, and `via`: addresses; and
        what stands at its index in `each`.
        """
        via: list[str] = []
        for crew in (self._workers[:1], self._workers[1:]):
            for worker in crew:
                index = self._workers.index(worker)
                placed = {"index": index, "size": self._size, "via": via}
                placed |= each[index] if each else {}
                worker.tell(_line("start", {**arguments, **placed}))
            deadline_s = time.monotonic() + _START_TIMEOUT_S
            for worker in crew:
                _, reply = worker.answer(deadline_s)
                via = via or reply["addresses"]

    def hurt(self, index: int, how: signal.Signals) -> None:
        """Send a signal to a worker and to all that it has started, and leave it out from now on.

        SIGKILL or SIGSTOP: nothing of it may be asked any more, nor answer.
        """
        self._hurt.add(index)
        for pid in processes.tree(self._workers[index].process.pid):
            with suppress(ProcessLookupError):
                os.kill(pid, how)

    @property
    def present(self) -> list[int]:
        """The indexes of the workers that were not `hurt`."""
        return [index for index in range(self._size) if index not in self._hurt]

    def ask(self, do: str, timeout_s: float, **arguments: Any) -> list[dict[str, Any]]:
        """All workers that are present, at once; their answers in order of index.

        Raises:
            FleetError: one of them died, or had not answered after `timeout_s`.
        """
        return [reply for _, reply in self._ask(do, timeout_s, arguments).values()]

    def timed(
        self, do: str, timeout_s: float, *,
        meanwhile: Callable[[], None] = lambda: None, **arguments: Any,
    ) -> Took:  # fmt: skip
        """`ask`, with the time until the last answer came and the CPU time of the whole family.

        `meanwhile` is called once all were told; whoever it hurts need not answer.
        """
        before_s, all_before_s = processes.cpu_s(self.family), processes.machine_cpu_s()
        started_s = time.monotonic()
        answers = self._ask(do, timeout_s, arguments, meanwhile)
        cores_s = (time.monotonic() - started_s) * (os.cpu_count() or 1)
        burned_s = processes.cpu_s(self.family) - before_s
        all_burned_s = processes.machine_cpu_s() - all_before_s
        each_s = {index: came_s - started_s for index, (came_s, _) in answers.items()}
        return Took(
            seconds=max(each_s.values()),
            cpu_s=burned_s,
            others=max(0.0, all_burned_s - burned_s) / cores_s,
            replies=[reply for _, reply in answers.values()],
            each_s=each_s,
        )

    def _ask(
        self, do: str, timeout_s: float, arguments: dict[str, Any],
        meanwhile: Callable[[], None] = lambda: None,
    ) -> dict[int, tuple[float, dict[str, Any]]]:  # fmt: skip
        deadline_s = time.monotonic() + timeout_s
        line = _line(do, arguments)
        for index in self.present:
            self._workers[index].tell(line)
        meanwhile()
        return {index: self._workers[index].answer(deadline_s) for index in self.present}

    def _end(self) -> None:
        left = processes.kill_family(self.family)
        for worker in self._workers:
            worker.close()
        self._folder.cleanup()
        if left:
            raise FleetError(f"these processes could not be killed: {left}; look at them with ps")


def _line(do: str, arguments: dict[str, Any]) -> bytes:
    return json.dumps({"do": do, **arguments}).encode() + b"\n"
