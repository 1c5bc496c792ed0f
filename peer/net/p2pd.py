"""The network daemon as a file: its binary, the key and the port that it is given."""

from __future__ import annotations

import errno
import hashlib
import importlib.util
import os
import platform
import socket
import sys
import tempfile
from contextlib import suppress
from pathlib import Path
from typing import Final

from peer.errors import NetworkError, StorageError
from protocols.identity import Signer

P2PD_SHA256_LINUX_AMD64: Final = "42f8f48e62583b97cdba3c31439c08029fb2b9fc506b5bdd82c46b7cc1d279d8"
"""The daemon inside hivemind 1.1.12's wheel."""

_KEY_PREFIX: Final = bytes([0x08, 0x01, 0x12, 0x40])  # protobuf PrivateKey: Ed25519, 64 bytes
_KEY_FILE: Final = "libp2p.key"
_PORT_FILE: Final = "port"
_SOCKETS: Final = "murmuration-"


def daemon_path() -> Path:
    spec = importlib.util.find_spec("hivemind")
    if spec is None or spec.origin is None:
        raise NetworkError("hivemind is not installed; install this program again")
    return Path(spec.origin).parent / "hivemind_cli" / "p2pd"


def p2pd_sha256() -> str:
    """SHA-256 of the daemon's binary, hex; reads 9 MB."""
    return hashlib.sha256(daemon_path().read_bytes()).hexdigest()


def unknown_daemon() -> str | None:
    """A notice for the owner if the daemon is not the one that we know, else None."""
    if sys.platform != "linux" or platform.machine() not in ("x86_64", "AMD64"):
        return None
    found = p2pd_sha256()
    if found == P2PD_SHA256_LINUX_AMD64:
        return None
    return f"the network daemon {daemon_path()} is not hivemind 1.1.12's (SHA-256 {found})"


def write_key(folder: Path, signer: Signer) -> Path:
    """Write the daemon's key file (mode 0600) from ours and say where it is.

    Raises:
        StorageError: `folder` can't be written.
    """
    path = folder / _KEY_FILE
    try:
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        path.unlink(missing_ok=True)
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL
        with os.fdopen(os.open(path, flags, 0o600), "wb") as file:
            file.write(_KEY_PREFIX + signer.seed + signer.public_key)
    except OSError as error:
        raise StorageError(
            f"can't keep the network key in {folder} ({error.strerror}); choose another folder"
        ) from None
    return path


def remembered_port(folder: Path, name: str = _PORT_FILE) -> int:
    """The port of last time, or 0."""
    with suppress(OSError, ValueError):
        port = int((folder / name).read_text().strip())
        return port if 0 < port < 2**16 else 0
    return 0


def remember_port(folder: Path, port: int, name: str = _PORT_FILE) -> None:
    with suppress(OSError):  # a full disk costs the port, not the peer
        (folder / name).write_text(f"{port}\n")


def socket_prefix() -> str:
    """The start of the names of this process's sockets to the daemon."""
    return f"{tempfile.gettempdir()}/{_SOCKETS}{os.getpid()}-"


def sweep_sockets() -> None:
    """Remove sockets that killed peers of this user left behind: nobody listens there."""
    for path in Path(tempfile.gettempdir()).glob(f"{_SOCKETS}*-*.sock"):
        pid = path.name.removeprefix(_SOCKETS).partition("-")[0]
        with suppress(OSError, ValueError):
            if path.stat().st_uid == os.getuid() and not _is_alive(int(pid)):
                with socket.socket(socket.AF_UNIX) as probe:
                    try:
                        probe.connect(str(path))  # a process of another container may
                    except ConnectionRefusedError:
                        path.unlink()


def port_is_free(host: str, port: int) -> bool:
    """Ask the kernel ourselves: libp2p sets SO_REUSEPORT and would share the port silently."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            if error.errno == errno.EADDRINUSE:
                return False
            raise
    return True


def _is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    return True
