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
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Final, Generic, Protocol, TypeVar

from tests.bench.fleet import Fleet
from tests.bench.machine import ROOT
from tests.bench.result import BenchError, Progress
from tests.bench.trial import Outcome, Trial

if TYPE_CHECKING:
    from dataclasses import Field

_TRIAL_S: Final = 3600.0  # half a minute on an idle core; machines are shared


class AnyTrial(Protocol):
    """A frozen dataclass that says everything that an outcome depends on."""

    __dataclass_fields__: ClassVar[dict[str, Field[Any]]]

    def __hash__(self) -> int: ...


class AnyOutcome(Protocol):
    """What came of a trial."""

    @property
    def seconds(self) -> float: ...


T = TypeVar("T", bound=AnyTrial)
R = TypeVar("R", bound=AnyOutcome)


@dataclass(frozen=True, slots=True)
class Kind(Generic[T, R]):
    """How trials of a kind are run, kept and told."""

    worker: str
    """A module for `worker.serve`, whose command `train` takes a trial as plain values."""
    sources: tuple[str, ...]
    """Files and folders in the checkout that outcomes depend on."""
    read: Callable[[dict[str, Any]], R]
    """Of what the worker replied. Raises ValueError, TypeError or KeyError: it is none."""
    words: Callable[[T], str]
    """A trial in a few words."""
    loss: Callable[[R], float]
    """What people want to see of an outcome."""


class Kept(Generic[T, R]):
    """Outcomes by trial, below `folder`."""

    def __init__(self, folder: Path, kind: Kind[T, R]) -> None:
        self.kind = kind
        self._folder = folder

    def get(self, trial: T) -> R | None:
        """None if there is none, or only half of one."""
        try:
            return self.kind.read(json.loads(self._file(trial).read_text("utf-8")))
        except (FileNotFoundError, ValueError, TypeError, KeyError):
            return None

    def put(self, trial: T, facts: dict[str, Any]) -> None:
        """Whole or not at all."""
        file = self._file(trial)
        file.parent.mkdir(parents=True, exist_ok=True)
        new = file.with_suffix(".new")
        new.write_text(json.dumps(facts), "utf-8")
        new.replace(file)

    def forget(self) -> None:
        """Everything."""
        shutil.rmtree(self._folder, ignore_errors=True)

    def _file(self, trial: T) -> Path:
        text = json.dumps([asdict(trial), _sources(self.kind.sources)])
        return self._folder / f"{hashlib.sha256(text.encode()).hexdigest()[:24]}.json"


@cache
def _sources(names: tuple[str, ...]) -> str:
    sha = hashlib.sha256()
    for name in names:
        path = ROOT / name
        for file in sorted(path.rglob("*.py")) if path.is_dir() else [path]:
            sha.update(file.read_bytes())
    return sha.hexdigest()


def cores() -> int:
    """How many this process may use."""
    return len(os.sched_getaffinity(0))


def run_all(trials: Sequence[T], kept: Kept[T, R], progress: Progress) -> dict[T, R]:
    """The outcome of every trial, those that are kept without running them again.

    Raises:
        BenchError: a trial failed; the finished ones are kept.
    """
    found = {trial: outcome for trial in trials if (outcome := kept.get(trial)) is not None}
    missing = [trial for trial in dict.fromkeys(trials) if trial not in found]
    if found:
        progress(f"{len(found)} of {len(trials)} trials were done before, with the same sources")
    workers = min(cores(), len(missing))
    words = kept.kind.words
    todo: queue.SimpleQueue[T] = queue.SimpleQueue()
    done: queue.SimpleQueue[tuple[T, dict[str, Any] | BaseException]] = queue.SimpleQueue()
    for trial in missing:
        todo.put(trial)
    for number in range(workers):
        threading.Thread(
            target=_work, args=(kept.kind.worker, todo, done), name=f"trials-{number}", daemon=True
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
            f"{len(found)} of {len(trials)}: {words(trial)}: {kept.kind.loss(outcome):.4f}"
            f" ({outcome.seconds:.0f} s; about {left_s / 60:.0f} min left)"
        )
    return found


def _work(
    worker: str,
    todo: queue.SimpleQueue[T],
    done: queue.SimpleQueue[tuple[T, dict[str, Any] | BaseException]],
) -> None:
    """One worker process, until nothing is left to do."""
    trial = todo.get()
    try:
        with Fleet("trials", worker, 1) as fleet:
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


def _read(facts: dict[str, Any]) -> Outcome:
    curve = [(int(step), float(loss)) for step, loss in facts.pop("curve")]
    return Outcome(curve=curve, **facts)


def words(trial: Trial) -> str:
    """A trial in a few words."""
    parts = [trial.way, f"seed {trial.seed}", f"inner {trial.inner_lr:g}"]
    if trial.h:
        parts[1:1] = [f"H = {trial.h}"]
        parts.append(f"outer {trial.outer_lr:g} / {trial.momentum:g}")
    if trial.shards != "iid":
        parts.append(f"shards by {trial.shards}")
    return ", ".join(parts)


LEARNING: Final[Kind[Trial, Outcome]] = Kind(
    worker="tests.bench.trial_worker",
    sources=(
        "codecs/tensorcodecs", "peer/train", "tests/bench/mixing.py", "tests/bench/stacked.py",
        "tests/bench/trial.py",
    ),
    read=_read,
    words=words,
    loss=lambda outcome: outcome.loss,
)  # fmt: skip
"""Of `learning_groups` and `learning_tuning`."""
