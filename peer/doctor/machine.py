"""This machine: disk, memory, processor, device. Blocks for a moment: call it in a thread."""

from __future__ import annotations

import os
import shutil
from contextlib import suppress
from pathlib import Path

from peer.doctor.facts import MachineFacts


def look(home: Path, device: str | None, threads: int | None) -> MachineFacts:
    """What there is for training; imports torch, which takes seconds the first time."""
    place = next(p for p in (home, *home.parents) if p.exists())
    total, free = _memory()
    name, device_memory = _device(device)
    return MachineFacts(
        home=str(home),
        disk_free=shutil.disk_usage(place).free,
        writable=os.access(place, os.W_OK | os.X_OK),
        memory_total=total,
        memory_free=free,
        threads=threads or len(os.sched_getaffinity(0)),
        device=name,
        device_memory=device_memory,
    )


def _memory() -> tuple[int, int]:
    """(bytes in all, bytes free), by the kernel and by the control group; 0: unknown."""
    found: dict[str, int] = {}
    with suppress(OSError, ValueError, IndexError):
        for line in Path("/proc/meminfo").read_text().splitlines():
            name, _, rest = line.partition(":")
            found[name] = int(rest.split()[0]) * 1024
    total, free = found.get("MemTotal", 0), found.get("MemAvailable", 0)
    with suppress(OSError, ValueError):  # "max" is no number: no limit
        limit = int(Path("/sys/fs/cgroup/memory.max").read_text())
        used = int(Path("/sys/fs/cgroup/memory.current").read_text())
        total, free = min(total, limit), min(free, max(0, limit - used))
    return total, free


def _device(wanted: str | None) -> tuple[str, int]:
    import torch

    name = wanted or ("cuda" if torch.cuda.is_available() else "cpu")
    if not name.startswith("cuda"):
        return name, 0
    with suppress(RuntimeError, ValueError, AssertionError):
        free, _ = torch.cuda.mem_get_info(name)
        return name, int(free)
    return name, 0
