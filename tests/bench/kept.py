"""Trials in worker processes, one for each core, and their results kept in a file each.

A bench that was killed goes on where it was: what it had finished lies under `.bench/` in the
checkout, by a hash of the trial and of all sources that its result depends on. A table that is
complete is forgotten, so that the next run measures anew.
"""

from __future__ import annotations

import hashlib
import json
import os
import queue
import shutil
import threading
import time
from collections.abc import Sequence
from dataclasses import asdict
from functools import cache
from pathlib import Path
from typing import Any, Final

from tests.bench.fleet import Fleet
from tests.bench.machine import ROOT
from tests.bench.result import BenchError, Progress
from tests.bench.trial import Outcome, Trial

_WORKER: Final = "tests.bench.trial_worker"
_TRIAL_S: Final = 3600.0  # half a minute on an idle core; machines are shared
_SOURCES: Final = (
    "codecs/tensorcodecs", "peer/train", "tests/bench/mixing.py", "tests/bench/stacked.py",
    "tests/bench/trial.py",
)  # fmt: skip


class Kept:
    """Outcomes by trial, below `folder`."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def get(self, trial: Trial) -> Outcome | None:
        """None if there is none, or only half of one."""
        try:
            facts = json.loads(self._file(trial).read_text("utf-8"))
            curve = [(int(step), float(loss)) for step, loss in facts.pop("curve")]
            return Outcome(curve=curve, **facts)
        except (FileNotFoundError, ValueError, TypeError, KeyError):
            return None

    def put(self, trial: Trial, facts: dict[str, Any]) -> None:
        """Whole or not at all."""
        file = self._file(trial)
        file.parent.mkdir(parents=True, exist_ok=True)
        new = file.with_suffix(".new")
        new.write_text(json.dumps(facts), "utf-8")
        new.replace(file)

    def forget(self) -> None:
        """Everything."""
        shutil.rmtree(self._folder, ignore_errors=True)

    def _file(self, trial: Trial) -> Path:
        text = json.dumps([asdict(trial), _sources()])
        return self._folder / f"{hashlib.sha256(text.encode()).hexdigest()[:24]}.json"


@cache
def _sources() -> str:
    sha = hashlib.sha256()
    for name in _SOURCES:
        path = ROOT / name
        for file in sorted(path.rglob("*.py")) if path.is_dir() else [path]:
            sha.update(file.read_bytes())
    return sha.hexdigest()


def cores() -> int:
    """How many this process may use."""
    return len(os.sched_getaffinity(0))


def run_all(trials: Sequence[Trial], kept: Kept, progress: Progress) -> dict[Trial, Outcome]:
    """The outcome of every trial, those that are kept without running them again.

    Raises:
        BenchError: a trial failed; the finished ones are kept.
    """
    found = {trial: outcome for trial in trials if (outcome := kept.get(trial)) is not None}
    missing = [trial for trial in dict.fromkeys(trials) if trial not in found]
    if found:
        progress(f"{len(found)} of {len(trials)} trials were done before, with the same sources")
    workers = min(cores(), len(missing))
    todo: queue.SimpleQueue[Trial] = queue.SimpleQueue()
    done: queue.SimpleQueue[tuple[Trial, dict[str, Any] | BaseException]] = queue.SimpleQueue()
    for trial in missing:
        todo.put(trial)
    for number in range(workers):
        threading.Thread(
            target=_work, args=(todo, done), name=f"trials-{number}", daemon=True
        ).start()
    started_s = time.monotonic()
    for count in range(1, len(missing) + 1):
        trial, facts = done.get()
        if isinstance(facts, BaseException):
            while not todo.empty():
                todo.get()
            raise BenchError(f"{words(trial)}: {facts}; run it again to go on") from facts
        kept.put(trial, facts)
        outcome = kept.get(trial)
        assert outcome is not None
        found[trial] = outcome
        left_s = (time.monotonic() - started_s) / count * (len(missing) - count)
        progress(
            f"{len(found)} of {len(trials)}: {words(trial)}: {outcome.loss:.4f}"
            f" ({outcome.seconds:.0f} s; about {left_s / 60:.0f} min left)"
        )
    return found


def _work(
    todo: queue.SimpleQueue[Trial],
    done: queue.SimpleQueue[tuple[Trial, dict[str, Any] | BaseException]],
) -> None:
    """One worker process, until nothing is left to do."""
    trial = todo.get()
    try:
        with Fleet("trials", _WORKER, 1) as fleet:
            fleet.start()
            while True:
                (facts,) = fleet.ask("train", _TRIAL_S, trial=asdict(trial))
                done.put((trial, facts))
                try:
                    trial = todo.get(block=False)
                except queue.Empty:
                    return
    except Exception as error:  # the thread that waits tells it
        done.put((trial, error))


def words(trial: Trial) -> str:
    """A trial in a few words."""
    parts = [trial.way, f"seed {trial.seed}", f"inner {trial.inner_lr:g}"]
    if trial.h:
        parts[1:1] = [f"H = {trial.h}"]
        parts.append(f"outer {trial.outer_lr:g} / {trial.momentum:g}")
    if trial.shards != "iid":
        parts.append(f"shards by {trial.shards}")
    return ", ".join(parts)
