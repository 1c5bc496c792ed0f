"""Peers as real processes: start them, read their events, kill them, end them all.

A process's events are its JSON log; `until` waits for a condition on them and, when it does not
come true in time, says what every process last did.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

Fact = dict[str, Any]

ROOT = Path(__file__).parents[2]

MANIFEST = """
name = "e2e"

[model.config]
model_type = "llama"
vocab_size = 264
hidden_size = 48
intermediate_size = 96
num_hidden_layers = 2
num_attention_heads = 4
max_position_embeddings = 64
tie_word_embeddings = true

[data]
source = "stdlib"
sequence_length = 48

[inner]
lr = 3e-3
batch_size = 4
warmup_steps = 5

[schedule]
round_s = 2.0
exchange_s = 12.0
evaluate_every = 1
checkpoint_every = 4
"""


class Process:
    """One `python -m peer ...` and what it said."""

    def __init__(
        self,
        name: str,
        arguments: list[str],
        log: Path,
        *,
        root: Path = ROOT,
        environment: Mapping[str, str] | None = None,
        within: Sequence[str] = (),
    ) -> None:
        """`root`: the checkout that it runs; `environment`: variables beside this process's own;
        `within`: a command that makes itself the one that follows, somewhere else or with less."""
        self.name = name
        self.log = log
        self.events: list[Fact] = []
        own = {"OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1", **(environment or {})}
        self._stderr = log.open("wb")
        self._process = subprocess.Popen(
            [*within, sys.executable, "-m", *arguments],
            cwd=root,
            env=os.environ | own | {"PYTHONPATH": f"{root}:{root / 'codecs'}"},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=self._stderr,
            start_new_session=True,
        )
        assert self._process.stdout is not None
        os.set_blocking(self._process.stdout.fileno(), False)
        self._rest = b""

    @property
    def pid(self) -> int:
        return self._process.pid

    @property
    def code(self) -> int | None:
        return self._process.poll()

    def read(self) -> None:
        """Take in what was said since the last time."""
        assert self._process.stdout is not None
        while chunk := self._process.stdout.read():
            *lines, self._rest = (self._rest + chunk).split(b"\n")
            self.events += [json.loads(line) for line in lines if line.strip()]

    def all(self, kind: str) -> list[Fact]:
        return [event for event in self.events if event["event"] == kind]

    def last(self, kind: str) -> Fact | None:
        return next((e for e in reversed(self.events) if e["event"] == kind), None)

    @property
    def id(self) -> str:
        return str(self.all("Started")[0]["peer"])

    @property
    def address(self) -> str:
        return str(self.all("Started")[0]["addresses"][0])

    @property
    def rounds(self) -> list[Fact]:
        return self.all("RoundFinished")

    def children(self) -> list[int]:
        """Pids of the process's children (its p2pd)."""
        found = subprocess.run(
            ["pgrep", "-P", str(self.pid)], capture_output=True, text=True, check=False
        )
        return [int(pid) for pid in found.stdout.split()]

    def signal(self, number: signal.Signals) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.pid, number)

    def end(self) -> None:
        """Kill it and whatever it started."""
        if self.code is None:  # a reaped process's number may be somebody else's by now
            for pid in [*self.children(), self.pid]:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
        self._process.wait()
        if self._process.stdout is not None:
            self._process.stdout.close()
        self._stderr.close()

    def story(self) -> str:
        """What it last did, for a failure's message."""
        notable = [e for e in self.events if e["event"] not in ("Progress", "RoundFinished")]
        lines = [json.dumps(event)[:220] for event in notable[-8:]]
        errors = self.log.read_text(errors="replace")[-1500:]
        return f"--- {self.name} (exit {self.code}, {len(self.rounds)} rounds)\n" + "\n".join(
            [*lines, errors]
        )


class Fleet:
    """All the processes of a test."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.processes: dict[str, Process] = {}
        self.manifest = folder / "run.toml"
        self.manifest.write_text(MANIFEST)

    def start(
        self,
        name: str,
        *more: str,
        via: str | None = None,
        founder: bool = False,
        host: str = "127.0.0.1",
        within: Sequence[str] = (),
    ) -> Process:
        """`name` has its own home; started again under the same name it takes its seat back.

        All are at one site unless `more` says otherwise: on a busy machine some look far away.
        """
        verb = ["run", "start", str(self.manifest)] if founder else ["join"]
        arguments = [
            "peer", *verb, "--home", str(self.folder / name), "--host", host,
            "--threads", "1", "--log-json", *more,
        ]  # fmt: skip
        if "--site" not in more:
            arguments += ["--site", "here"]
        if via is not None:
            arguments += ["--via", self.processes[via].address]
        count = len(list(self.folder.glob(f"{name}-*.err")))
        if name in self.processes:
            self.processes[name].end()
        process = Process(name, arguments, self.folder / f"{name}-{count}.err", within=within)
        self.processes[name] = process
        return process

    async def until(self, condition: Callable[[], Any], within_s: float = 60.0) -> None:
        """Wait until `condition` holds."""
        end_s = time.monotonic() + within_s
        while True:
            for process in self.processes.values():
                process.read()
            if condition():
                return
            dead = [p for p in self.processes.values() if p.code not in (None, 0, -9)]
            if dead or time.monotonic() > end_s:
                stories = "\n".join(p.story() for p in self.processes.values())
                raise AssertionError(f"not within {within_s} s:\n{stories}")
            await asyncio.sleep(0.02)

    async def started(self, *names: str, within_s: float = 60.0) -> None:
        await self.until(lambda: all(self[n].all("Started") for n in names), within_s)

    async def together(self, *names: str, within_s: float = 90.0) -> None:
        """Until a round held everybody's work, on every one of them."""
        await self.started(*names, within_s=within_s)
        ids = {self[n].id for n in names}

        def complete(name: str) -> bool:
            last = self[name].last("RoundFinished")
            return last is not None and all(
                set(span["contributors"]) == ids for span in last["spans"]
            )

        await self.until(lambda: all(complete(n) for n in names), within_s)

    def __getitem__(self, name: str) -> Process:
        return self.processes[name]


@contextlib.asynccontextmanager
async def fleet(folder: Path) -> AsyncIterator[Fleet]:
    """A fleet of which nothing outlives the block."""
    it = Fleet(folder)
    try:
        yield it
    finally:
        for process in it.processes.values():
            process.end()


def check_agreement(processes: list[Process], since: int = 0) -> None:
    """Digests are equal for every round that several of them finished, from round `since` on."""
    seen: dict[int, dict[str, str]] = {}
    for process in processes:
        for fact in process.rounds:
            if fact["round"] >= since:
                seen.setdefault(fact["round"], {})[process.name] = fact["digest"]
    assert seen, "no rounds to compare"
    for number, digests in seen.items():
        assert len(set(digests.values())) == 1, f"round {number}: {digests}"


def check_once(processes: list[Process]) -> None:
    """Nobody applied a round twice, skipped one that it did not catch up, or went back."""
    for process in processes:
        numbers = [fact["round"] for fact in process.rounds]
        assert numbers == sorted(set(numbers)), f"{process.name}: {numbers}"


def check_ledgers(one: Process, other: Process) -> None:
    """Both have the same account of the data after every round that both finished."""
    mine, theirs = (
        {(fact["group"], fact["round"]): fact for fact in p.all("BlocksCounted")}
        for p in (one, other)
    )
    common = mine.keys() & theirs.keys()
    assert common, f"{one.name} and {other.name} have no round in common"
    for key in common:
        a, b = ({k: v for k, v in fact.items() if k != "t"} for fact in (mine[key], theirs[key]))
        assert a == b, f"{one.name} and {other.name} count blocks differently after {key}"
        assert a["trained"] + a["lost"] + a["elsewhere"] >= a["floor"]
