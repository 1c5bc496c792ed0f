"""What all parts of `finetune` do alike: tune each way's rate, train it with three seeds, tell it.

A way's rate is the best of its grid after half of the rounds, on one seed that is not in the table;
everybody's grid has three rates, a factor of about 3 apart. What was finished is kept on disk
(`kept`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import fmean, stdev
from typing import Any, Final

from tests.bench import machine
from tests.bench.finetune_base import Base, BaseSize, prepare
from tests.bench.finetune_trial import Outcome, Size, Trial
from tests.bench.kept import Kept, Kind, run_all
from tests.bench.result import BenchError, Cell, Progress

SEEDS: Final = 3
TUNING: Final = 1000
"""The seed that rates are chosen on is so much larger than the table's first."""
FOLDER: Final = machine.ROOT / ".bench" / "finetune"
QUICK_BASE: Final = BaseSize(
    vocabulary=320, hidden=32, intermediate=64, layers=1, batch=8, steps=20
)


@dataclass(frozen=True, kw_only=True, slots=True)
class Arm:
    """A row of a part's table."""

    way: str
    """A key of `finetune_worker.WAYS`."""
    title: str
    rates: tuple[float, ...] = ()
    """To choose from; empty: of `rate_of`."""
    size: Size
    rate_of: str = ""
    """The way whose rate this one takes."""
    tuned_on: tuple[int, ...] | None = None
    """Clients whose loss the rate is chosen by; None: all."""


@dataclass(frozen=True, slots=True)
class Row:
    """How an arm did."""

    arm: Arm
    rate: float
    outcomes: Sequence[Outcome]
    """By seed."""

    def losses(self, of: Sequence[int] | None = None) -> list[float]:
        """Nats per token of these clients' answers, by seed."""
        return [outcome.loss(of) for outcome in self.outcomes]

    def cells(self, groups: Mapping[str, Sequence[int]]) -> dict[str, Cell]:
        """The row of a table. `groups`: column -> clients, besides all of them."""
        losses = self.losses()
        kib = [max(outcome.sent_bytes, default=0) / 1024 for outcome in self.outcomes]
        found: dict[str, Cell] = {
            "way": self.arm.title,
            "rate": f"{self.rate:g}",
            "loss": f"{fmean(losses):.4f}",
            "± seeds": f"{stdev(losses):.4f}" if len(losses) > 1 else "-",
        }
        for name in groups:
            found[name] = f"{fmean(self.losses(groups[name])):.4f}"
        found["KiB up"] = f"{max(kib):.2f}" if any(kib) else "-"
        return found


def _read(facts: dict[str, Any]) -> Outcome:
    return Outcome(**facts)


def _words(trial: Trial) -> str:
    return f"{trial.way}, seed {trial.seed}, rate {trial.lr:g}"


FINETUNE: Final[Kind[Trial, Outcome]] = Kind(
    worker="tests.bench.finetune_worker",
    sources=(
        "codecs/tensorcodecs", "peer/train", "peer/finetune", "tests/bench/finetune_trial.py",
        "tests/bench/finetune_others.py", "tests/bench/finetune_worker.py",
    ),
    read=_read,
    words=_words,
    loss=Outcome.loss,
)  # fmt: skip


def kept_of(part: str, quick: bool) -> Kept[Trial, Outcome]:
    """Where a part's outcomes are kept."""
    return Kept(FOLDER / (f"{part}-quick" if quick else part), FINETUNE)


def base_of(data: Path | None, quick: bool, progress: Progress) -> Base:
    """The base that all parts share.

    Raises:
        BenchError: data are missing.
    """
    return prepare(data, FOLDER / "base", QUICK_BASE if quick else BaseSize(), progress)


def train_all(
    arms: Sequence[Arm], base: Base, seed: int, quick: bool, kept: Kept[Trial, Outcome],
    progress: Progress,
) -> dict[str, Row]:  # fmt: skip
    """Every arm's row, by its way. Quick: the middle rate, and two seeds.

    Raises:
        BenchError: a trial failed; the finished ones are kept.
    """
    plain = {
        arm.way: Trial(way=arm.way, base=str(base.folder), seed=seed, lr=1.0, size=arm.size)
        for arm in arms
    }
    rates = {arm.way: arm.rates[len(arm.rates) // 2] for arm in arms if arm.rates}
    if not quick:
        tries = [
            replace(
                plain[arm.way],
                lr=rate,
                seed=seed + TUNING,
                size=replace(arm.size, rounds=max(1, arm.size.rounds // 2)),
            )
            for arm in arms
            for rate in (arm.rates if len(arm.rates) > 1 else ())
        ]
        tried = run_all(tries, kept, progress)
        for arm in arms:
            own = [trial for trial in tries if trial.way == arm.way]
            if own:
                on = arm.tuned_on
                rates[arm.way] = min(own, key=lambda t, on=on: tried[t].loss(on)).lr  # type: ignore[misc]
    for arm in arms:
        if arm.rate_of:
            rates[arm.way] = rates[arm.rate_of]
    seeds = range(seed, seed + (2 if quick else SEEDS))
    wanted = {
        arm.way: [replace(plain[arm.way], lr=rates[arm.way], seed=each) for each in seeds]
        for arm in arms
    }
    found = run_all(
        [t for each in zip(*wanted.values(), strict=True) for t in each], kept, progress
    )
    for outcome in found.values():
        if not all(tokens > 0 for tokens in outcome.tokens):
            raise BenchError("a client has no held-out answer; give more rows")
    return {
        arm.way: Row(arm, rates[arm.way], [found[trial] for trial in wanted[arm.way]])
        for arm in arms
    }


def by_seed(values: Sequence[float]) -> str:
    """For a bar's reference: every seed's value, and how far they spread."""
    each = ", ".join(f"{value:.4g}" for value in values)
    spread = f" (± {stdev(values):.2g})" if len(values) > 1 else ""
    return f"by seed {each}{spread}"
