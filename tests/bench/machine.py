"""Where numbers come from: without the machine, the commit and the load they mean nothing."""

from __future__ import annotations

import os
import platform
import subprocess
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Final

ROOT: Final = Path(__file__).resolve().parents[2]
"""The checkout."""

_PACKAGES: Final = ("torch", "numpy", "hivemind", "uvloop", "zstandard")


def describe() -> dict[str, str]:
    """Facts about this machine and checkout, in words, in reading order."""
    return {
        "Date": datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        "Machine": f"{_cpu()}, {os.cpu_count()} cores, {_memory_gib():.0f} GiB of memory",
        "System": f"{platform.system()} {platform.release()}, Python {platform.python_version()}",
        "Versions": ", ".join(f"{name} {_version(name)}" for name in _PACKAGES),
        "Commit": _commit(),
        "Load average before": load_average(),
    }


def load_average() -> str:
    """Processes that wanted a core over the last 1, 5 and 15 minutes: others' and our own."""
    return " / ".join(f"{load:.1f}" for load in os.getloadavg())


def _cpu() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.machine()


def _memory_gib() -> float:
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "(not installed)"


def _commit() -> str:
    head = _git("rev-parse", "--short=12", "HEAD")
    if not head:
        return "unknown: not a git checkout"
    return f"{head} with uncommitted changes" if _git("status", "--porcelain") else head


def _git(*arguments: str) -> str:
    try:
        done = subprocess.run(
            ["git", *arguments], cwd=ROOT, capture_output=True, text=True, timeout=10, check=False
        )
    except (FileNotFoundError, subprocess.TimeoutExpired):
        return ""
    return done.stdout.strip()
