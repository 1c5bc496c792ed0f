"""How `peer status` and `peer leave` talk to the peer that runs: a socket in its seat.

One connection, one JSON line each way: `{"verb": ..., "args": {...}}`, then `{"ok": {...}}` or
`{"error": text, "exit_code": n}`. Only the owner of the seat can open the socket (mode 0600 in a
folder of mode 0700), so whoever asks may.

A socket's path fits in about 100 bytes and a home folder's may not: then the socket lies in a
private temporary folder, and a symbolic link in the seat says where.
"""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import socket
import tempfile
import time
from collections.abc import Awaitable, Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, Final

from peer.errors import NetworkError, NotRunningError, PeerError, StorageError

SOCKET_PATH_BYTES_MAX: Final = 100  # sun_path has 108 on Linux and 104 on macOS, with its end
REQUEST_BYTES_MAX: Final = 64 * 2**10
REPLY_BYTES_MAX: Final = 4 * 2**20  # a status with 4096 known peers is about 1 MiB
CONNECTIONS_MAX: Final = 16  # the owner's shells and scripts; more is a runaway loop
REQUEST_TIMEOUT_S: Final = 5.0  # whoever connects knows what to ask
HANDLER_TIMEOUT_S: Final = 120.0  # an export may take a while
FAREWELL_TIMEOUT_S: Final = 1.0  # the last replies at the end: "leaving" is one of them
_ROOM: Final = "murmuration-"

Handler = Callable[[dict[str, Any]], Awaitable[dict[str, Any]]]
"""Arguments -> answer, both JSON. A PeerError reaches the asker with its exit code."""


class ControlServer:
    """Answers `ask` while its `async with` block lasts."""

    def __init__(self, path: Path, handlers: Mapping[str, Handler]) -> None:
        """`path`: the seat's `control_path`; whatever lies there is a dead peer's."""
        self.path = path
        self._handlers = dict(handlers)
        self._server: asyncio.Server | None = None
        self._tasks: set[asyncio.Task[Any]] = set()
        self._room: Path | None = None

    async def __aenter__(self) -> ControlServer:
        """Listen.

        Raises:
            StorageError: the socket cannot be made.
        """
        try:
            listener = await asyncio.to_thread(self._bind)
        except OSError as error:
            raise StorageError(
                f"cannot listen on {self.path}: {error.strerror or error}; choose another home"
                " with MURMURATION_HOME, on a disk that knows sockets"
            ) from error
        self._server = await asyncio.start_unix_server(
            self._serve, sock=listener, limit=REQUEST_BYTES_MAX
        )
        return self

    async def __aexit__(self, *exc: object) -> None:
        if self._server is not None:
            self._server.close()
        if self._tasks:
            await asyncio.wait(self._tasks, timeout=FAREWELL_TIMEOUT_S)
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await asyncio.to_thread(self._remove)

    def _bind(self) -> socket.socket:
        self._remove()
        place = self.path
        if len(os.fsencode(place)) > SOCKET_PATH_BYTES_MAX:
            self._room = _short_folder()
            place = self._room / "control.sock"
            self.path.symlink_to(place)
        listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            listener.bind(str(place))
            place.chmod(0o600)
            listener.setblocking(False)
        except OSError:
            listener.close()
            raise
        return listener

    def _remove(self) -> None:
        """Take away the socket, ours or a dead peer's, and the folder it may lie in."""
        if self.path.is_symlink():
            room = self.path.readlink().parent
            if room.name.startswith(_ROOM):
                shutil.rmtree(room, ignore_errors=True)
        self.path.unlink(missing_ok=True)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._tasks.add(task)
        try:
            line = await _hear(reader) if len(self._tasks) <= CONNECTIONS_MAX else b""
            if not line:
                return
            reply = json.dumps(await self._answer(line), default=str).encode()
            if len(reply) >= REPLY_BYTES_MAX:
                reply = json.dumps({"error": "the answer is too long"}).encode()
            writer.write(reply + b"\n")
            with suppress(TimeoutError, ConnectionError):  # the asker's loss
                async with asyncio.timeout(REQUEST_TIMEOUT_S):
                    await writer.drain()
        finally:
            self._tasks.discard(task)
            writer.close()

    async def _answer(self, line: bytes) -> dict[str, Any]:
        try:
            request = json.loads(line)
            verb, args = request["verb"], request.get("args", {})
            handler = self._handlers.get(verb) if isinstance(verb, str) else None
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
            return {"error": "not a request of this program", "exit_code": 2}
        if handler is None or not isinstance(args, dict):
            known = ", ".join(sorted(self._handlers))
            return {"error": f"no such request: {verb!r}; there are {known}", "exit_code": 2}
        try:
            async with asyncio.timeout(HANDLER_TIMEOUT_S):
                return {"ok": await handler(args)}
        except PeerError as error:
            return {"error": str(error), "exit_code": error.exit_code}
        except TimeoutError:
            return {"error": f"{verb} took longer than {HANDLER_TIMEOUT_S:.0f} s; try again"}


def ask(
    path: Path, verb: str, args: Mapping[str, Any] | None = None, timeout_s: float = 10.0
) -> dict[str, Any]:
    """Ask the running peer whose seat holds the socket `path`; blocks for at most `timeout_s`.

    Raises:
        NotRunningError: no peer listens there.
        NetworkError: it listens, but did not answer in time.
        PeerError: the peer's own refusal, with the exit code of its kind.
    """
    request = json.dumps({"verb": verb, "args": dict(args or {})}).encode() + b"\n"
    silent = NetworkError(
        f"the peer in {path.parent} did not answer within {timeout_s:.0f} s; try again, and if"
        " it stays silent, end its process: it resumes from its last round"
    )
    deadline_s = time.monotonic() + timeout_s
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as wire:
        wire.settimeout(timeout_s)
        try:
            wire.connect(str(path.readlink() if path.is_symlink() else path))
        except TimeoutError:
            raise silent from None
        except OSError:
            raise NotRunningError(
                f"no peer is running in {path.parent}; start one with `python -m peer join`"
            ) from None
        reply = bytearray()
        try:
            wire.sendall(request)
            while not reply.endswith(b"\n"):
                wire.settimeout(max(0.001, deadline_s - time.monotonic()))
                piece = wire.recv(2**16)
                reply += piece
                if not piece or len(reply) > REPLY_BYTES_MAX:
                    break
        except TimeoutError:
            raise silent from None
        except OSError:
            reply.clear()
    return _unwrap(bytes(reply), path)


async def _hear(reader: asyncio.StreamReader) -> bytes:
    """The request's line; empty where there is none in time, or none that ends."""
    try:
        async with asyncio.timeout(REQUEST_TIMEOUT_S):
            line = await reader.readline()
    except (TimeoutError, ConnectionError, ValueError):  # ValueError: longer than the limit
        return b""
    return line if line.endswith(b"\n") else b""


def _unwrap(reply: bytes, path: Path) -> dict[str, Any]:
    try:
        answer = json.loads(reply)
        if "ok" in answer:
            return dict(answer["ok"])
        text, code = str(answer["error"]), int(answer.get("exit_code", 1))
    except (ValueError, KeyError, TypeError):
        raise NetworkError(
            f"the peer in {path.parent} hung up without an answer; its log.jsonl may say why"
        ) from None
    kinds = {kind.exit_code: kind for kind in PeerError.__subclasses__()}
    raise kinds.get(code, PeerError)(text)


def _short_folder() -> Path:
    """A new private folder (0700) with a short path.

    Raises:
        OSError: none can be made.
    """
    places = [os.environ.get("XDG_RUNTIME_DIR", ""), tempfile.gettempdir(), "/tmp"]
    for place in places:
        if place and len(os.fsencode(place)) < SOCKET_PATH_BYTES_MAX - 40:
            with suppress(OSError):
                return Path(tempfile.mkdtemp(prefix=_ROOM, dir=place))
    raise OSError(f"no folder with a short path can be written ({', '.join(places)})")
