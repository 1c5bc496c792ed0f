"""Network namespaces: making them, standing inside one, and leaving none behind.

Their names say who owns them: `mlab-PID-START-N-HOST`, where START is the owner's start time (a pid
is used again). Whoever finds namespaces of a dead owner removes them, with every process in them.
Nothing but the standard library is imported: the mover runs this file as a program when its
controller is gone.
"""

from __future__ import annotations

import ctypes
import os
import re
import select
import signal
import subprocess
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Final

FOLDER: Final = Path("/run/netns")  # where iproute2 keeps them
MOVER: Final = "netlab-mover"  # how the mover's program is called
_PREFIX: Final = "mlab"
_NAME: Final = re.compile(rf"({_PREFIX}-(\d+)-(\d+)-\d+)-[a-z0-9-]+")
_CLONE_NEWNET: Final = 0x40000000
_IP_S_MAX: Final = 60  # it takes milliseconds
_KILL_ROUNDS: Final = 5  # what is killed may have forked meanwhile
_DIE_S_MAX: Final = 5.0  # a killed process ends at once, unless the kernel holds it
_LIBC: Final = ctypes.CDLL(None, use_errno=True)


class LabError(Exception):
    """The laboratory could not be built, or the machine did not do what it was asked."""


def start_time(pid: int) -> int | None:
    """When a process started, in clock ticks since boot; None if there is none."""
    with suppress(OSError, IndexError, ValueError):
        facts = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        return None if facts[0] in "ZX" else int(facts[19])
    return None


def new_prefix(number: int) -> str:
    """For the `number`-th laboratory of this process."""
    pid = os.getpid()
    return f"{_PREFIX}-{pid}-{start_time(pid)}-{number}"


def ip(commands: Iterable[str], namespace: str | None = None) -> None:
    """Run many `ip` commands in one process; the first failure ends it.

    Raises:
        LabError: one of them failed.
    """
    inside = ["-n", namespace] if namespace else []
    done = subprocess.run(
        ["ip", *inside, "-batch", "-"],
        input="".join(f"{line}\n" for line in commands),
        capture_output=True, text=True, timeout=_IP_S_MAX, check=False,
    )  # fmt: skip
    if done.returncode:
        raise LabError(f"ip says: {done.stderr.strip()}")


@contextmanager
def inside(namespace: str) -> Iterator[None]:
    """The calling thread's network is that of the namespace, until it leaves the block.

    Sockets that it opens and processes that it starts there stay there. Do not await inside.
    """
    with Path("/proc/thread-self/ns/net").open("rb") as home:
        _enter(FOLDER / namespace)
        try:
            yield
        finally:
            _setns(home.fileno())


def _enter(path: Path) -> None:
    with path.open("rb") as there:
        _setns(there.fileno())


def _setns(fd: int) -> None:
    if _LIBC.setns(fd, _CLONE_NEWNET):
        error = ctypes.get_errno()
        raise OSError(error, f"setns: {os.strerror(error)}")


def known() -> list[str]:
    """Every namespace of every laboratory on this machine."""
    if not FOLDER.is_dir():
        return []
    return sorted(x.name for x in FOLDER.iterdir() if _NAME.fullmatch(x.name))


def processes(namespaces: Iterable[str]) -> list[int]:
    """Who is inside."""
    inodes = set()
    for name in namespaces:
        with suppress(OSError):
            inodes.add((FOLDER / name).stat().st_ino)
    found = []
    for folder in Path("/proc").iterdir():
        if folder.name.isdigit() and int(folder.name) != os.getpid():
            with suppress(OSError):  # it is gone
                if (folder / "ns/net").stat().st_ino in inodes:
                    found.append(int(folder.name))
    return found


def remove(prefix: str) -> None:
    """Kill everything in the namespaces of one laboratory, and remove them."""
    names = [name for name in known() if name.startswith(f"{prefix}-")]
    for _ in range(_KILL_ROUNDS):
        pids = [pid for pid in processes(names) if start_time(pid) is not None]
        if not pids:
            break
        _kill(pids)
    for name in names:  # one by one: another sweeper may be at it
        with suppress(LabError):
            ip([f"netns del {name}"])


def _kill(pids: list[int]) -> None:
    for pid in pids:
        with suppress(ProcessLookupError):
            handle = os.pidfd_open(pid)
            try:
                signal.pidfd_send_signal(handle, signal.SIGKILL)
                select.select([handle], [], [], _DIE_S_MAX)
            finally:
                os.close(handle)


def sweep() -> list[str]:
    """Remove what dead owners left, and end their movers; what was removed."""
    dead: dict[str, list[str]] = {}
    for name in known():
        match = _NAME.fullmatch(name)
        if match and start_time(int(match[2])) != int(match[3]):
            dead.setdefault(match[1], []).append(name)
    for prefix in dead:
        _kill(list(_movers(prefix)))
        remove(prefix)
    return [name for names in dead.values() for name in names]


def _movers(prefix: str) -> Iterator[int]:
    """A mover outlives its owner if a forked child still holds the owner's end of the line."""
    for folder in Path("/proc").iterdir():
        if folder.name.isdigit():
            with suppress(OSError):
                words = (folder / "cmdline").read_bytes().decode(errors="replace").split("\0")
                if Path(words[0]).name.startswith(MOVER) and prefix in words:
                    yield int(folder.name)


if __name__ == "__main__":
    remove(sys.argv[1])
