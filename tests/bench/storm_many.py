"""Thousands of random scenarios over a few processes; goes on where it was broken off.

    python -m tests.bench.storm_many SEED

puts on record (`docs/results/storm-scenarios.json`) what `bench storm --seed SEED` has lived
through so far, in whole hundreds. As long as the simulated code stays the same they are not run
again, on whatever machine.
"""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass, field
from multiprocessing import get_context
from pathlib import Path
from typing import Any, Final

from tests.bench.machine import ROOT
from tests.bench.result import BenchError, Progress

PROCESSES: Final = 2
SOURCES: Final = ("peer", "protocols", "dht")
RECORD: Final = ROOT / "docs" / "results" / "storm-scenarios.json"
BLOCK: Final = 100
SIZES: Final = ((2, 4), (5, 12), (13, 32), (33, 64))


@dataclass
class Tally:
    """What became of some scenarios."""

    scenarios: int = 0
    broken: list[int] = field(default_factory=list)
    """Seeds with a broken promise, or of a crash of the simulation."""
    sizes: list[list[int]] = field(default_factory=lambda: [[0, 0, 0] for _ in SIZES])
    """For each of `SIZES`: scenarios, faults, rounds of single peers."""

    def add(self, result: dict[str, Any]) -> None:
        self.scenarios += 1
        if _is_broken(result):
            self.broken.append(result["seed"])
        facts = (1, result.get("faults", 0), result.get("rounds", 0))
        for (low, high), row in zip(SIZES, self.sizes, strict=True):
            if low <= result["peers"] <= high:
                row[:] = [a + b for a, b in zip(row, facts, strict=True)]

    def merge(self, other: Tally) -> None:
        self.scenarios += other.scenarios
        self.broken += other.broken
        for row, more in zip(self.sizes, other.sizes, strict=True):
            row[:] = [a + b for a, b in zip(row, more, strict=True)]


def _is_broken(result: dict[str, Any]) -> bool:
    return bool(result.get("violations") or result.get("error"))


def live_through(seed: int) -> dict[str, Any]:
    """One random scenario, in a worker."""
    from peer.simulate.report import figures
    from peer.simulate.scenario import draw
    from peer.simulate.world import simulate

    scenario = draw(seed)
    begun_s = time.process_time()
    try:
        record = simulate(scenario)
    except Exception as error:  # a bug that no judge was asked about: it counts, with its seed
        return {"seed": seed, "peers": len(scenario.peers), "error": repr(error)[:500]}
    total = figures(record)
    return {
        "seed": seed,
        "peers": total.peers,
        "faults": total.faults,
        "rounds": total.peer_rounds,
        "participation": total.participation,
        "cpu_s": time.process_time() - begun_s,
        "violations": [f"{v.promise}: {v.what}" for v in record.violations],
    }


def many(seed: int, count: int, progress: Progress) -> Tally:
    """Lives through the scenarios of seeds `seed`, `seed` + 1, ...; those on record or in the
    temporary file are not run again."""
    code = fingerprint()
    path = _path(seed, code)
    total = Tally()
    kept = {
        first: t for first, t in on_record(code).items() if seed <= first <= seed + count - BLOCK
    }
    for tally in kept.values():
        total.merge(tally)
    wanted = [s for s in range(seed, seed + count) if s - s % BLOCK not in kept]
    done = {line["seed"]: line for line in _lines(path)}
    todo = [s for s in wanted if s not in done]
    if len(todo) < count:
        progress(f"{count - len(todo)} of {count} scenarios are in {RECORD.name} or {path} already")
    begun_s = told_s = time.monotonic()
    for line in done.values():
        if line["seed"] in wanted:
            total.add(line)
    with (
        path.open("a") as out,
        ProcessPoolExecutor(PROCESSES, mp_context=get_context("spawn")) as pool,
    ):
        futures = [pool.submit(live_through, s) for s in todo]
        for number, future in enumerate(as_completed(futures), 1):
            result = future.result()
            total.add(result)
            out.write(json.dumps(result) + "\n")
            out.flush()
            if _is_broken(result):
                what = result.get("error") or result["violations"][0]
                progress(f"seed {result['seed']}: {what}")
                progress(f"  python -m peer simulate --seed {result['seed']}")
            now_s = time.monotonic()
            if now_s - told_s > 10 or number == len(todo):
                told_s = now_s
                rate = number / (now_s - begun_s)
                left_s = (len(todo) - number) / rate
                progress(
                    f"{number} of {len(todo)} scenarios, {60 * rate:.0f} a minute,"
                    f" {len(total.broken)} broken, {left_s / 60:.0f} min to go"
                )
    return total


def on_record(code: str) -> dict[int, Tally]:
    """First seed -> what became of the hundred scenarios from there, with this code."""
    if not RECORD.exists():
        return {}
    record = json.loads(RECORD.read_text())
    if record["code"] != code:
        return {}
    return {int(first): Tally(**tally) for first, tally in record["hundreds"].items()}


def put_on_record(seed: int) -> int:
    """Every whole hundred in the temporary file; how many scenarios are on record now."""
    code = fingerprint()
    hundreds = on_record(code)
    done = {line["seed"]: line for line in _lines(_path(seed, code))}
    for first in sorted({s - s % BLOCK for s in done}):
        seeds = range(first, first + BLOCK)
        if first not in hundreds and all(s in done for s in seeds):
            hundreds[first] = Tally()
            for s in seeds:
                hundreds[first].add(done[s])
    lines = [f'"{first}": {json.dumps(asdict(hundreds[first]))}' for first in sorted(hundreds)]
    body = ",\n".join(lines)
    RECORD.write_text(f'{{"code": "{code}", "hundreds": {{\n{body}\n}}}}\n')
    return BLOCK * len(hundreds)


def _path(seed: int, code: str) -> Path:
    return Path(tempfile.gettempdir()) / f"murmuration-storm-{seed}-{code}.jsonl"


def _lines(path: Path) -> Iterator[dict[str, Any]]:
    if not path.exists():
        return
    for line in path.read_text().splitlines():
        try:
            yield json.loads(line)
        except json.JSONDecodeError:  # the last one, of a run that was broken off
            return


def fingerprint() -> str:
    """Of the code under test, which is what a simulation imports: other code's results are not
    mixed in."""
    listing = (
        "import sys, peer.simulate.world, peer.simulate.report;"
        "print(*(m.__file__ for n, m in sys.modules.items()"
        f" if n.split('.')[0] in {SOURCES} and m.__file__), sep='\\n')"
    )
    environment = dict(os.environ, PYTHONPATH=os.pathsep.join(sys.path))
    run = subprocess.run(
        [sys.executable, "-c", listing], env=environment, cwd=ROOT, capture_output=True, text=True
    )
    if run.returncode:
        raise BenchError(f"the simulator can't be imported: {run.stderr.strip()[-500:]}")
    total = hashlib.sha256()
    for path in sorted(Path(name) for name in run.stdout.splitlines()):
        total.update(str(path.relative_to(ROOT)).encode())
        total.update(path.read_bytes())
    return total.hexdigest()[:12]


if __name__ == "__main__":
    print(f"{put_on_record(int(sys.argv[1])):,} scenarios are in {RECORD.relative_to(ROOT)}")
