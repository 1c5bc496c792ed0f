"""Thousands of random scenarios over a few processes; goes on where it was broken off."""

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
from multiprocessing import get_context
from pathlib import Path
from typing import Any, Final

from tests.bench.machine import ROOT
from tests.bench.result import BenchError, Progress

PROCESSES: Final = 2
SOURCES: Final = ("peer", "protocols", "dht")


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


def many(seed: int, count: int, progress: Progress) -> list[dict[str, Any]]:
    """The results of scenarios `seed`, `seed` + 1, ...; those already on disk are not run again."""
    path = Path(tempfile.gettempdir()) / f"murmuration-storm-{seed}-{_fingerprint()}.jsonl"
    done = {line["seed"]: line for line in _lines(path)}
    todo = [s for s in range(seed, seed + count) if s not in done]
    if len(todo) < count:
        progress(f"{count - len(todo)} of {count} scenarios are in {path} already")
    begun_s = told_s = time.monotonic()
    broken = sum(bool(r.get("violations") or r.get("error")) for r in done.values())
    with (
        path.open("a") as out,
        ProcessPoolExecutor(PROCESSES, mp_context=get_context("spawn")) as pool,
    ):
        futures = {pool.submit(live_through, s): s for s in todo}
        for number, future in enumerate(as_completed(futures), 1):
            result = future.result()
            done[result["seed"]] = result
            out.write(json.dumps(result) + "\n")
            out.flush()
            if result.get("violations") or result.get("error"):
                broken += 1
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
                    f" {broken} broken, {left_s / 60:.0f} min to go"
                )
    return [done[s] for s in range(seed, seed + count) if s in done]


def _lines(path: Path) -> Iterator[dict[str, Any]]:
    if not path.exists():
        return
    for line in path.read_text().splitlines():
        try:
            yield json.loads(line)
        except json.JSONDecodeError:  # the last one, of a run that was broken off
            return


def _fingerprint() -> str:
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
