"""Families of processes by /proc: what they have burned, and how to end them all.

A family is everything that was started with a mark in its environment, and all descendants: a
worker, its daemons, their helpers. Neither leaving the session nor losing the parent hides a
process from it. Linux only.
"""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Final

MARK: Final = "BENCH_FAMILY"
"""The environment variable; its value is the family's name, which must be unique."""

_TICKS_PER_S: Final = os.sysconf("SC_CLK_TCK")
_GONE_POLL_S: Final = 0.02
_GONE: Final = (FileNotFoundError, ProcessLookupError)


@dataclass(frozen=True, slots=True)
class Process:
    """One process, from /proc/PID/stat."""

    pid: int
    parent: int
    running: bool
    """False for a zombie: dead, not yet reaped; its CPU time still counts."""
    cpu_s: float
    """User and system time of its own and of the children it has reaped."""
    started_ticks: int
    """When it started, in clock ticks after boot."""


def family(name: str) -> list[Process]:
    """Its members now, zombies too while their parents live."""
    needle = f"{MARK}={name}".encode()
    everyone: dict[int, Process] = {}
    marked: set[int] = set()
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            with suppress(*_GONE):
                process = _parse((entry / "stat").read_text())
                everyone[process.pid] = process
                with suppress(PermissionError):  # somebody else's, so not ours
                    if needle in (entry / "environ").read_bytes().split(b"\0"):
                        marked.add(process.pid)

    def belongs(process: Process) -> bool:
        current: Process | None = process
        while current is not None:
            if current.pid in marked:
                return True
            current = everyone.get(current.parent)
        return False

    return [process for process in everyone.values() if belongs(process)]


def tree(pid: int) -> list[int]:
    """The pids of a process and of all its living descendants, the oldest generation first."""
    children: dict[int, list[int]] = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            with suppress(*_GONE):
                process = _parse((entry / "stat").read_text())
                children.setdefault(process.parent, []).append(process.pid)
    found = [pid]
    for parent in found:  # grows while it is walked
        found += children.get(parent, [])
    return found


def running(name: str) -> list[int]:
    """The pids of its living members."""
    return [process.pid for process in family(name) if process.running]


def cpu_s(name: str) -> float:
    """CPU seconds burned so far by a family, dead and reaped members included.

    A dead member's time moves to the parent that reaps it, so sums before and after can be
    subtracted. Resolution: one clock tick (10 ms) per process.
    """
    return sum(process.cpu_s for process in family(name))


def machine_cpu_s() -> float:
    """CPU seconds burned so far on this machine by everyone, stolen ones (virtual machines) too."""
    # man 5 proc: user, nice, system, idle, iowait, irq, softirq, steal; guests are inside user.
    ticks = [int(tick) for tick in Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:9]]
    return (sum(ticks) - ticks[3] - ticks[4]) / _TICKS_PER_S


def kill_family(name: str, timeout_s: float = 5.0) -> list[int]:
    """SIGKILL every member by its pid until none runs; the pids that would not die, normally none.

    The youngest go first: several members may do this at once, and must not end each other while
    their helpers live. A caller that is a member itself goes last of all. Zombies are left to
    their parents.
    """

    def none_left() -> bool:
        living = sorted(
            (process for process in family(name) if process.running),
            key=lambda process: process.started_ticks,
            reverse=True,
        )
        others = [process.pid for process in living if process.pid != os.getpid()]
        for pid in others or [process.pid for process in living]:
            with suppress(*_GONE):
                os.kill(pid, signal.SIGKILL)
        return not living

    return [] if wait_until(none_left, timeout_s) else running(name)


def wait_until(true: Callable[[], bool], timeout_s: float) -> bool:
    """Ask again and again until `true()` or `timeout_s` have passed; the last answer."""
    deadline_s = time.monotonic() + timeout_s
    while not true():
        if time.monotonic() > deadline_s:
            return False
        time.sleep(_GONE_POLL_S)
    return True


def _parse(stat: str) -> Process:
    # The name in parentheses may contain anything; what follows the last one is regular.
    fields = stat[stat.rindex(")") + 2 :].split()
    return Process(
        pid=int(stat[: stat.index(" ")]),
        parent=int(fields[1]),
        running=fields[0] not in "ZX",
        cpu_s=sum(map(int, fields[11:15])) / _TICKS_PER_S,
        started_ticks=int(fields[19]),
    )
