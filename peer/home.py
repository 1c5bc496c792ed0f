"""Where a peer keeps its things: one home folder, and in it a *seat* for each identity.

A seat is a folder with a key, a memory, checkpoints and a log; whoever sits in it holds a lock
that the kernel takes back when the process ends, however it ends. So the second `peer join` on a
machine takes the second seat, and a peer that was killed finds its old seat, and with it its
identity, free.
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
import re
import secrets
import shutil
import tempfile
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, Final, NoReturn

from peer.errors import StorageError, UsageError
from protocols.identity import Signer
from protocols.limits import ADDRESS_CHARS_MAX

if TYPE_CHECKING:
    from collections.abc import Iterator

SEATS_MAX: Final = 256  # more peers than that on one machine is a mistake in a script
VIA_MAX: Final = 32  # addresses remembered; the newest are worth the most
MEMORY_BYTES_MAX: Final = 64 * 2**10  # 32 addresses of 256 characters, eight times over
SEED_BYTES: Final = 32
TEMPORARY: Final = ".tmp-"  # how every unfinished file's name starts

_NAME: Final = re.compile(r"[a-z0-9][a-z0-9._-]{0,31}")
_RUN: Final = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True, slots=True, kw_only=True)
class Memory:
    """What a seat remembers between two lives of its peer."""

    via: tuple[str, ...] = ()
    """Addresses through which the network was found, the latest first."""
    port: int | None = None
    """The port it listened on, so that its address stays good over a restart."""
    run: str | None = None
    """The run it trained last."""
    founded_ms: int | None = None
    """When it joined that run (`PeerRecord.founded_ms`)."""


@dataclass(frozen=True, slots=True)
class SeatInfo:
    """A seat as `peer status` sees it, without sitting down."""

    name: str
    folder: Path
    running: bool


class Seat:
    """One identity's folder, held by this process until `close`. Made by `open_seat`."""

    def __init__(self, folder: Path, lock: int) -> None:
        self.folder = folder
        self.name = folder.name
        self.log_path = folder / "log.jsonl"
        self.control_path = control_path(folder)
        self.notices: list[str] = []
        """What the owner should hear about how the seat was found."""
        self._lock: int | None = lock
        remove_temporaries(folder)
        self.memory, complaint = read_memory(folder)
        if complaint:
            self.notices.append(complaint)

    def identity(self) -> Signer:
        """The seat's key, made on first use.

        Raises:
            StorageError: the key file is not 32 bytes or cannot be read.
        """
        path = self.folder / "identity.key"
        try:
            seed = path.read_bytes()
            if os.name == "posix" and path.stat().st_mode & 0o077:
                path.chmod(0o600)
                self.notices.append(f"{path} was open to other users; its mode is 0600 again")
        except FileNotFoundError:
            seed = secrets.token_bytes(SEED_BYTES)
            write_atomic(path, seed)
        except OSError as error:
            complain(error, path, "read")
        if len(seed) != SEED_BYTES:
            raise StorageError(
                f"{path} holds {len(seed)} bytes and not the {SEED_BYTES} of a key; put back a copy"
                " of it, or move it away and this seat gets a new identity"
            )
        return Signer(seed)

    def remember(self, **changes: Any) -> None:
        """Change fields of the seat's `Memory` and write it down.

        Raises:
            StorageError: it could not be written; what was written before is intact.
        """
        memory = replace(self.memory, **changes)
        memory = replace(memory, via=tuple(dict.fromkeys(memory.via))[:VIA_MAX])
        if memory != self.memory:
            text = json.dumps(asdict(memory), indent=1)
            write_atomic(self.folder / "memory.json", text.encode() + b"\n")
            self.memory = memory

    def run_folder(self, run: str) -> Path:
        """The folder of one run's checkpoints, made if need be."""
        if not _RUN.fullmatch(run):
            raise UsageError(f"not a run id: {run[:80]!r}; it is 64 hexadecimal characters")
        folder = self.folder / "runs" / run
        make_folder(folder)
        return folder

    def close(self) -> None:
        """Stand up: the seat is free for the next process."""
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None

    def __enter__(self) -> Seat:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()


def home_folder(chosen: Path | None = None) -> Path:
    """`chosen`, or $MURMURATION_HOME, $XDG_DATA_HOME/murmuration, ~/.local/share/murmuration."""
    if chosen is not None:
        return chosen.expanduser().absolute()
    if own := os.environ.get("MURMURATION_HOME"):
        return Path(own).expanduser().absolute()
    data = os.environ.get("XDG_DATA_HOME")
    base = Path(data) if data and Path(data).is_absolute() else Path.home() / ".local" / "share"
    return base / "murmuration"


def open_seat(home: Path | None = None, name: str | None = None) -> Seat:
    """Sit down: in the seat called `name`, or in the lowest numbered one that is free.

    Raises:
        UsageError: `name` is no name for a folder, or somebody sits there.
        StorageError: the home folder cannot be written.
    """
    if name is not None and not _NAME.fullmatch(name):
        raise UsageError(f"{name[:80]!r} is no name for a seat; use letters, digits and dashes")
    home = home_folder(home)
    make_folder(home)
    with _choosing(home):
        for candidate in [name] if name else [f"seat-{n}" for n in range(1, SEATS_MAX + 1)]:
            folder = home / candidate
            make_folder(folder)
            lock = _lock(folder / "lock")
            if lock is not None:
                return Seat(folder, lock)
    if name:
        raise UsageError(
            f"a peer is already running in {home / name}; stop it with `python -m peer leave`, or"
            " choose another name for this one"
        )
    raise StorageError(f"all {SEATS_MAX} seats in {home} are taken; choose another home folder")


def seats(home: Path | None = None) -> list[SeatInfo]:
    """All seats in a home folder, `seat-2` before `seat-10`; none if there is no such folder."""
    home = home_folder(home)
    try:
        folders = [path.parent for path in home.glob("*/lock")]
        if not folders:
            return []
        with _choosing(home):
            found = [SeatInfo(folder.name, folder, _held(folder / "lock")) for folder in folders]
    except OSError as error:
        complain(error, home, "read")
    return sorted(found, key=lambda seat: (len(seat.name), seat.name))


def control_path(folder: Path) -> Path:
    """Where the peer in a seat listens for `peer status` and its kind."""
    return folder / "control.sock"


def read_memory(folder: Path) -> tuple[Memory, str | None]:
    """A seat's memory, and a complaint if it could not be used (then it starts afresh)."""
    path = folder / "memory.json"
    try:
        with path.open("rb") as file:
            raw = json.loads(file.read(MEMORY_BYTES_MAX))
        if not isinstance(raw, dict):
            raise TypeError("not a table")
        via = raw.get("via") or []
        if not isinstance(via, list) or not all(isinstance(x, str) for x in via):
            raise TypeError("via")
        return Memory(
            via=tuple(x for x in via if len(x) <= ADDRESS_CHARS_MAX)[:VIA_MAX],
            port=_integer(raw.get("port"), 65535),
            run=_text(raw.get("run")),
            founded_ms=_integer(raw.get("founded_ms"), 2**48),
        ), None
    except FileNotFoundError:
        return Memory(), None
    except (ValueError, TypeError, OSError, RecursionError) as error:
        return Memory(), (
            f"{path} could not be read ({error}): addresses and run are forgotten; give --via again"
        )


# ── files ────────────────────────────────────────────────────────────────────────────────


def write_atomic(path: Path, data: bytes) -> None:
    """Replace `path` by `data`, wholly or not at all, also when power fails. Mode 0600.

    Raises:
        StorageError: no room or no permission; what was there before is intact.
    """
    with atomic_file(path) as file:
        file.write(data)


@contextmanager
def atomic_file(path: Path) -> Iterator[BinaryIO]:
    """A file that takes the name `path` at the end of the block, once it is safely on disk.

    Raises:
        StorageError: no room or no permission; what was there before is intact.
    """
    try:
        handle, name = tempfile.mkstemp(prefix=TEMPORARY, dir=path.parent)
    except OSError as error:
        complain(error, path, "write")
    temporary = Path(name)
    try:
        with os.fdopen(handle, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        settle(temporary, path)
    except OSError as error:
        complain(error, path, "write")
    finally:
        with suppress(OSError):  # gone already if all went well
            temporary.unlink()


def settle(temporary: Path, path: Path) -> None:
    """Give a finished, synced file its name, and make the name last."""
    temporary.replace(path)
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def remove_temporaries(folder: Path) -> None:
    """Remove what a killed process left half written. Only the seat's holder may."""
    for path in folder.glob(TEMPORARY + "*"):
        if path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
        else:
            with suppress(OSError):
                path.unlink()


def make_folder(folder: Path) -> None:
    """Make `folder` (mode 0700) and its parents.

    Raises:
        StorageError: it cannot be made.
    """
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    except OSError as error:
        complain(error, folder, "make")


def complain(error: OSError, path: Path, deed: str) -> NoReturn:
    """Say in the owner's words what the disk refused, and what to do.

    Raises:
        StorageError: always.
    """
    reason = error.strerror or str(error)
    raise StorageError(f"cannot {deed} {path}: {reason}; {_next_step(error)}") from error


def _next_step(error: OSError) -> str:
    if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        return "free some space on that disk, or choose another home with MURMURATION_HOME"
    if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
        return "make it yours and writable, or choose another home with MURMURATION_HOME"
    return "check that disk, or choose another home with MURMURATION_HOME"


# ── locks ────────────────────────────────────────────────────────────────────────────────


@contextmanager
def _choosing(home: Path) -> Iterator[None]:
    """One process at a time looks which seats are free, or a look would pass for a sitter."""
    try:
        handle = os.open(home / ".choosing", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    except OSError as error:
        complain(error, home, "write")
    try:
        fcntl.flock(handle, fcntl.LOCK_EX)  # held for microseconds, and never beyond a process
        yield
    finally:
        os.close(handle)


def _lock(path: Path) -> int | None:
    """Hold a lock file: its handle, or None where another process holds it."""
    try:
        handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    except OSError as error:
        complain(error, path, "write")
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(handle)
        return None
    except OSError as error:
        os.close(handle)
        complain(error, path, "lock")
    return handle


def _held(path: Path) -> bool:
    handle = _lock(path)
    if handle is not None:
        os.close(handle)
    return handle is None


def _integer(value: object, most: int) -> int | None:
    if value is None or (type(value) is int and 0 <= value <= most):
        return value
    raise TypeError("not a number where one is due")


def _text(value: object) -> str | None:
    if value is None or (isinstance(value, str) and len(value) <= ADDRESS_CHARS_MAX):
        return value
    raise TypeError("not a text where one is due")
