"""`python -m tests.bench [NAME] [--part PART] [--scenarios N] [--data DIR] [--format json]
[--quick] [--seed N] [--save]`.

Exit codes: 0 every bar holds, 1 a bar falls short, 2 no such measurement (or a wrong flag), 3 it
could not be measured, 130 interrupted. Progress goes to stderr, the result to stdout.
"""

from __future__ import annotations

import argparse
import inspect
import secrets
import signal
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any, Final

from rich.console import Console

from tests.bench import machine, registry, report
from tests.bench.result import BenchError

_WIDTH: Final = 120


def main(argv: Sequence[str] | None = None) -> int:
    """Run what the command line asks for; see the module's docstring for the exit codes."""
    parser = _parser()
    options = parser.parse_args(argv)
    if options.quick and options.save:
        parser.error("a --quick result is not for the record; leave out --quick or --save")
    errors = Console(stderr=True, highlight=False)
    if options.name is not None and options.part is not None:
        options.name = f"{options.name}-{options.part}"
    if options.name is None:
        for name in registry.MEASUREMENTS:
            print(f"{name:16} {registry.title(name)}")
        return 0
    if options.name not in registry.MEASUREMENTS:
        known = ", ".join(registry.MEASUREMENTS)
        print(f"No measurement is called {options.name!r}; choose one of: {known}", file=sys.stderr)
        return 2
    measurement, title = registry.load(options.name), registry.title(options.name)
    seed = secrets.randbits(32) if options.seed is None else options.seed
    command = f"python -m tests.bench {options.name} --seed {seed}"
    command += f" --scenarios {options.scenarios}" if options.scenarios is not None else ""
    command += " --data DIR" * (options.data is not None)  # where it lies is nobody's business
    command += " --quick" * options.quick or " --save" * options.save
    errors.print(command, soft_wrap=True)
    extra: dict[str, Any] = {
        name: value
        for name in ("scenarios", "data")
        if (value := getattr(options, name)) is not None
    }
    for name in extra.keys() - inspect.signature(measurement.run).parameters.keys():
        parser.error(f"{options.name} has no --{name}")
    facts = machine.describe()
    try:
        with _politely_terminated():
            result = measurement.run(
                options.quick,
                seed,
                lambda line: errors.print(line, markup=False, soft_wrap=True),
                **extra,
            )
    except BenchError as error:
        print(f"Could not measure {options.name}: {error}", file=sys.stderr)
        return 3
    except KeyboardInterrupt:
        print("Interrupted; nothing was saved.", file=sys.stderr)
        return 130
    facts["Load average after"] = machine.load_average()
    if options.format == "json":
        print(report.to_json(result))
    else:
        # A file or a pipe has no width; a table squeezed into 80 columns can't be read.
        width = None if sys.stdout.isatty() else _WIDTH
        report.show(title, result, Console(highlight=False, width=width))
    if options.save:
        page = machine.ROOT / "docs" / "results" / f"{options.name}.md"
        page.parent.mkdir(parents=True, exist_ok=True)
        page.write_text(report.to_markdown(title, command, facts, result))
        errors.print(f"Saved {page.relative_to(machine.ROOT)}")
    return 0 if all(bar.holds for bar in result.bars) else 1


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m tests.bench", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("name", nargs="?", help="which measurement; without it they are listed")
    parser.add_argument("--part", help="`learning --part groups` is `learning-groups`")
    parser.add_argument("--format", choices=["table", "json"], default="table")
    parser.add_argument("--quick", action="store_true", help="small and rough: does it work?")
    parser.add_argument("--seed", type=int, help="default: a fresh one, which is printed")
    parser.add_argument("--scenarios", type=int, help="storm: how many random ones")
    parser.add_argument("--data", type=Path, metavar="DIR", help="finetune: texts and tasks")
    parser.add_argument("--save", action="store_true", help="write docs/results/NAME.md")
    return parser


@contextmanager
def _politely_terminated() -> Iterator[None]:
    """SIGTERM unwinds like Ctrl-C meanwhile, so that every worker is ended first."""

    def leave(signum: int, frame: FrameType | None) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, leave)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


if __name__ == "__main__":
    sys.exit(main())
