"""`python -m tests.fuzz codecs [--frames N] [--seed S] [--coverage | --checked] [--save]`.

Breaks valid frames of every codec in every way that came to mind and reads them, in a process of
its own: nothing but `DecodeError` may come of it, in bounded time and memory. `--coverage` lets
atheris choose the mutations (pip install atheris); `--checked` compiles the loops with bounds
checks, into a cache of its own, and is slower.

Exit codes: 0 nothing was found, 1 something was, 2 a wrong flag, 3 it could not be run, 130
interrupted. Progress goes to stderr, the result to stdout.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import secrets
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Final

from rich.console import Console

from tests.bench import machine, report
from tests.bench.result import Bar, Result
from tests.fuzz.child import ALLOCATION_CAP, FINDINGS_MAX, GROWTH_CAP, Report
from tests.fuzz.judge import (
    ACCEPTED,
    COMPARED_EVERY,
    MEASURED_EVERY,
    MEMORY_CAP_FIXED,
    MEMORY_CAP_PER_BYTE,
    MEMORY_CAP_PER_VALUE,
    TIME_CAP_S,
)
from tests.fuzz.mutate import READERS
from tests.fuzz.room import Journal

_TITLE: Final = "Broken frames: what becomes of them"
_WIDTH: Final = 160
_CHILD: Final = ("-m", "tests.fuzz.child")
_STUCK_S: Final = 60.0  # no frame takes so long
_START_S: Final = 600.0  # compiling with bounds checks, on a busy machine
_TELL_S: Final = 15.0


def main(argv: Sequence[str] | None = None) -> int:
    """Run what the command line asks for; see the module's docstring for the exit codes."""
    options = _parser().parse_args(argv)
    if options.coverage and importlib.util.find_spec("atheris") is None:
        print("--coverage needs atheris: pip install atheris", file=sys.stderr)
        return 3
    seed = secrets.randbits(32) if options.seed is None else options.seed
    command = f"python -m tests.fuzz codecs --frames {options.frames} --seed {seed}"
    command += " --coverage" * options.coverage + " --checked" * options.checked
    command += " --save" * options.save
    errors = Console(stderr=True, highlight=False)
    errors.print(command, soft_wrap=True)
    facts = machine.describe()
    try:
        found = fuzz(
            options.frames, seed, options.keep, coverage=options.coverage, checked=options.checked,
            tell=lambda line: errors.print(line, markup=False, soft_wrap=True),
        )  # fmt: skip
    except KeyboardInterrupt:
        print("Interrupted; nothing was saved.", file=sys.stderr)
        return 130
    facts["Load average after"] = machine.load_average()
    result = as_result(found, options.frames)
    report.show(_TITLE, result, Console(highlight=False, width=_WIDTH))
    if options.save:
        page = machine.ROOT / "docs" / "results" / "fuzz-codecs.md"
        page.write_text(report.to_markdown(_TITLE, command, facts, result))
        errors.print(f"Saved {page.relative_to(machine.ROOT)}")
    return 0 if all(bar.holds for bar in result.bars) else 1


def fuzz(
    frames: int, seed: int, keep: Path, *, coverage: bool = False, checked: bool = False,
    tell: Callable[[str], None] = lambda line: None,
) -> Report:  # fmt: skip
    """Have `frames` broken frames read by another process; what broke a promise goes to `keep`.

    A crash and a standstill of that process are findings like any other.
    """
    with tempfile.TemporaryDirectory(prefix="fuzz-") as name:
        folder = Path(name)
        options = {"frames": frames, "seed": seed, "coverage": coverage, "folder": name}
        environment = os.environ | {
            "PYTHONPATH": os.pathsep.join([str(machine.ROOT), str(machine.ROOT / "codecs")])
        }
        if checked:
            environment |= {"NUMBA_BOUNDSCHECK": "1", "NUMBA_CACHE_DIR": str(folder / "numba")}
        process = subprocess.Popen(
            [sys.executable, *_CHILD, json.dumps(options)],
            cwd=machine.ROOT, env=environment, stdout=subprocess.DEVNULL,
        )  # fmt: skip
        try:
            trouble = _watch(process, folder / "journal", frames, tell)
        finally:
            process.kill()
            process.wait()
        found = Report()
        with suppress(FileNotFoundError):
            found = Report(**json.loads((folder / "report.json").read_text()))
        if trouble:
            found.findings.append(_last_words(folder, seed, trouble))
        for saved in folder.glob("*.frame"):
            keep.mkdir(parents=True, exist_ok=True)
            shutil.copy(saved, keep)
            tell(f"Saved {keep / saved.name}")
        return found


def _watch(
    process: subprocess.Popen[bytes], journal: Path, frames: int, tell: Callable[[str], None]
) -> str:
    """Wait for the end; "" if it was a good one, else what happened."""
    count, moved_s = 0, time.monotonic()
    told_s = moved_s
    while True:
        with suppress(subprocess.TimeoutExpired):
            status = process.wait(0.2)
            if status == 0:
                return ""
            name = signal.Signals(-status).name if status < 0 else f"status {status}"
            return f"the process died: {name}"
        now_s = time.monotonic()
        before, count = count, Journal.read(journal).number if journal.exists() else 0
        if count != before:
            moved_s = now_s
        elif now_s - moved_s > (_STUCK_S if count else _START_S):
            return "no answer"
        if now_s - told_s > _TELL_S:
            told_s = now_s
            tell(f"{count:,} of {frames:,}")


def _last_words(folder: Path, seed: int, trouble: str) -> str:
    """The finding that is the end of the process, with the frame that it read then."""
    if not (folder / "journal").exists():
        return f"before the first frame: {trouble}"
    entry = Journal.read(folder / "journal")
    name = f"{seed}-{entry.number}-end.frame"
    (folder / name).write_bytes(entry.frame)
    return f"{entry.codec}, {entry.numel} values: {trouble} ({name})"


def as_result(found: Report, frames: int) -> Result:
    """A row per outcome, a column per codec."""
    totals: dict[str, int] = {}
    for counts in found.outcomes.values():
        for outcome, count in counts.items():
            totals[outcome] = totals.get(outcome, 0) + count
    rows: list[dict[str, str | int | float | None]] = []
    for outcome in sorted(totals, key=lambda name: (name != ACCEPTED, -totals[name])):
        per_codec = {name: found.outcomes.get(name, {}).get(outcome, 0) for name in READERS}
        rows.append({"outcome": outcome, "frames": totals[outcome], **per_codec})
    bars = [
        Bar.at_least("frames read", found.frames, frames, "what was asked for"),
        Bar.at_most("frames that broke a promise", len(found.findings), 0, "see the notes"),
        Bar.at_most("slowest frame, ms", 1e3 * found.slowest_s, 1e3 * TIME_CAP_S, "read twice"),
    ]
    if found.growth_bytes is not None:
        growth_mib, cap_mib = found.growth_bytes / 2**20, GROWTH_CAP / 2**20
        where = "resident, after the first frames"
        bars.append(Bar.at_most("growth of the process, MiB", growth_mib, cap_mib, where))
    pace = found.frames / found.seconds if found.seconds else 0.0
    pace_note = (
        f"{found.seconds:.0f} s on one core: {pace:,.0f} frames a second, each by decode_into and "
        "by accumulate. Accepted frames gave finite values up to 2**70, the same both ways; "
        "refused ones left the accumulator as it was."
    )
    memory_note = (
        f"The largest memory that Python asked for, in a sample of 1 in {MEASURED_EVERY} frames: "
        f"{found.largest_bytes >> 10} KiB; allowed are {MEMORY_CAP_FIXED >> 10} KiB and "
        f"{MEMORY_CAP_PER_BYTE} bytes per byte and {MEMORY_CAP_PER_VALUE} per value. No frame "
        f"could ask for more than {ALLOCATION_CAP >> 20} MiB of address space."
    )
    walls_note = (
        "Frames and outputs ended at a page that nobody may touch. One frame in "
        f"{COMPARED_EVERY} was read by the numpy twin too: the same outcome, the same values."
    )
    notes = [pace_note, memory_note, walls_note, *found.findings[:FINDINGS_MAX]]
    return Result(rows, bars, notes)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("what", choices=["codecs"])
    parser.add_argument("--frames", type=int, default=300_000, help="how many (default 300,000)")
    parser.add_argument("--seed", type=int, help="default: a fresh one, which is printed")
    how = parser.add_mutually_exclusive_group()
    how.add_argument("--coverage", action="store_true", help="guided by atheris")
    how.add_argument("--checked", action="store_true", help="with bounds checks in compiled loops")
    parser.add_argument("--save", action="store_true", help="write docs/results/fuzz-codecs.md")
    parser.add_argument(
        "--keep", type=Path, default=Path(tempfile.gettempdir()) / "murmuration-fuzz",
        help="folder for frames that broke a promise",
    )  # fmt: skip
    return parser


if __name__ == "__main__":
    sys.exit(main())
