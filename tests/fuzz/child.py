"""The process that reads broken frames; a crash of it is a finding, not the end of the test.

    python -m tests.fuzz.child '{"frames": ..., "seed": ..., "coverage": ..., "folder": ...}'

Everything it leaves is in the folder: `journal` (the frame at hand), `report.json`, and a file for
every frame that broke a promise. Only tests/fuzz/__main__.py starts it.
"""

from __future__ import annotations

import importlib
import json
import resource
import sys
import time
from collections import Counter
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Final

GROWTH_CAP: Final = 64 * 2**20
"""Resident memory that reading any number of frames may add."""
ALLOCATION_CAP: Final = 256 * 2**20
"""Address space that one frame may ask for; more is a MemoryError."""
FINDINGS_MAX: Final = 20


@dataclass
class Report:
    """What came out."""

    frames: int = 0
    seconds: float = 0.0
    slowest_s: float = 0.0
    largest_bytes: int = 0
    growth_bytes: int | None = None
    """Resident memory that came to it; not measured where a corpus grows too."""
    outcomes: dict[str, dict[str, int]] = field(default_factory=dict)
    """Codec -> what became of its frames -> how many."""
    findings: list[str] = field(default_factory=list)


class Record:
    """Judges frames and keeps the report, on disk too."""

    def __init__(self, folder: Path, seed: int) -> None:
        from tests.fuzz.judge import Judge

        self._folder, self._seed = folder, seed
        self._judge = Judge(folder / "journal")
        self._counts: dict[str, Counter[str]] = {}
        self._findings: list[str] = []
        self._began_s = time.monotonic()
        self._first = 0
        self._base_bytes = _resident()

    def begin(self, warm_up: list[tuple[str, int, bytes]]) -> None:
        """Read good frames, then take note of time and memory, and start counting."""
        from tests.fuzz.judge import ACCEPTED

        for frame in warm_up:
            self.read(*frame)
        for name, counts in self._counts.items():
            if counts.keys() != {ACCEPTED}:
                self._findings.append(f"{name}: frames as they were written: {dict(counts)}")
        self._counts.clear()
        self._began_s = time.monotonic()
        self._first = self._judge.frames
        self._base_bytes = _resident()

    @property
    def frames(self) -> int:
        """Read since the warm-up."""
        return self._judge.frames - self._first

    @property
    def full(self) -> bool:
        """So many findings that the next would say nothing new."""
        return len(self._findings) >= FINDINGS_MAX

    def read(self, codec: str, numel: int, frame: bytes) -> None:
        """Count what becomes of it."""
        from tests.fuzz.judge import Finding

        try:
            verdict = self._judge.judge(codec, numel, frame)
        except Finding as finding:
            verdict = "broke a promise"
            name = f"{self._seed}-{self._judge.frames}.frame"
            (self._folder / name).write_bytes(frame)
            self._findings.append(f"{codec}, {numel} values: {finding} ({name})")
            self.write()  # the next may be a crash
        counts = self._counts.get(codec)
        if counts is None:
            counts = self._counts[codec] = Counter()
        counts[verdict] += 1

    def write(self, *, grown: bool = False) -> None:
        """Put the report where the parent looks for it; `grown`: with the memory it took."""
        report = Report(
            self.frames, time.monotonic() - self._began_s, self._judge.slowest_s,
            self._judge.largest_bytes, _resident() - self._base_bytes if grown else None,
            {name: dict(counts) for name, counts in self._counts.items()}, self._findings,
        )  # fmt: skip
        fresh = self._folder / "report.new"
        fresh.write_text(json.dumps(asdict(report)))
        fresh.replace(self._folder / "report.json")


def _resident() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def _limit_memory() -> None:
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    limit = pages * resource.getpagesize() + ALLOCATION_CAP
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))


def random_frames(frames: int, seed: int, folder: Path) -> None:
    """Mutations by chance alone: fast, and the same for the same seed."""
    from tests.fuzz.mutate import Mutator

    record = Record(folder, seed)
    mutator = Mutator(seed, small_only=frames < 20_000)
    record.begin(list(mutator.seeds()))
    _limit_memory()
    while record.frames < frames and not record.full:
        record.read(*mutator.frame())
    record.write(grown=True)


def guided_frames(frames: int, seed: int, folder: Path) -> None:
    """Mutations that reached a new line of Python are mutated further (atheris, libFuzzer)."""
    atheris = importlib.import_module("atheris")
    with atheris.instrument_imports(include=["tensorcodecs"]):
        import tensorcodecs  # noqa: F401

    from tensorcodecs import CHUNK_VALUES
    from tests.codecs.samples import mended
    from tests.fuzz.mutate import READERS, Mutator

    record = Record(folder, seed)
    good = list(Mutator(seed, small_only=True).seeds())
    record.begin(good)
    corpus = folder / "corpus"
    corpus.mkdir()
    for number, (codec, _, frame) in enumerate(good):
        if len(frame) < 4000:
            (corpus / str(number)).write_bytes(bytes([READERS.index(codec)]) + frame[8:])

    def attack(data: bytes) -> None:
        frame = mended(b"MTC\1????" + data[1:]) if len(data) > 16 else data
        numel = int.from_bytes(frame[12:16], "little")
        codec = READERS[sum(data[:1]) % len(READERS)]
        record.read(codec, min(numel, CHUNK_VALUES), frame)
        if record.frames % 1000 == 0 or record.frames >= frames or record.full:
            record.write()

    # libFuzzer reads every seed once before it counts.
    flags = [f"-runs={frames}", f"-seed={seed % 2**32 or 1}", "-max_len=4096", "-verbosity=0"]
    atheris.Setup([sys.argv[0], *flags, "-len_control=0", str(corpus)], attack)
    atheris.Fuzz()


def main() -> None:
    """See the module's docstring."""
    options: dict[str, Any] = json.loads(sys.argv[1])
    run = guided_frames if options["coverage"] else random_frames
    run(options["frames"], options["seed"], Path(options["folder"]))


if __name__ == "__main__":
    main()
