"""The worker's end of a fleet: one JSON object per line in, one out.

A command is `{"do": NAME, ...arguments}`, its reply `{...facts}`. Commands come one at a time. A
worker that fails simply crashes: its traceback goes to stderr, which the fleet keeps and shows.
When the fleet's end of the pipe closes, for whatever reason, the workers kill the whole family at
once, so nothing outlives a fleet, not even one that was killed itself.
"""

from __future__ import annotations

import asyncio
import json
import os
import queue
import threading
from collections.abc import Awaitable, Callable, Mapping
from typing import Any

from tests.bench import processes

Reply = Mapping[str, Any]
"""Facts for the fleet, as JSON values."""


class _Link:
    """Owns the pipes; nothing else in this process may read 0 or write 1 by accident."""

    def __init__(self) -> None:
        self._commands = os.fdopen(os.dup(0), "rb")
        self._replies = os.fdopen(os.dup(1), "wb")
        # Libraries print; forked children close their stdin: neither may touch the protocol.
        nothing = os.open(os.devnull, os.O_RDONLY)
        os.dup2(nothing, 0)
        os.dup2(2, 1)
        os.close(nothing)
        self._inbox: queue.SimpleQueue[bytes] = queue.SimpleQueue()
        threading.Thread(target=self._listen, name="commands", daemon=True).start()

    def _listen(self) -> None:
        for line in self._commands:
            self._inbox.put(line)
        processes.kill_family(os.environ[processes.MARK])

    def receive(self) -> tuple[str, dict[str, Any]]:
        """The next command and its arguments; waits for as long as the fleet lives."""
        arguments: dict[str, Any] = json.loads(self._inbox.get())
        return arguments.pop("do"), arguments

    def reply(self, facts: Reply) -> None:
        self._replies.write(json.dumps(dict(facts)).encode() + b"\n")
        self._replies.flush()


def serve(handlers: Mapping[str, Callable[..., Reply]]) -> None:
    """Answer with `handlers[do](**arguments)` until the fleet goes away. For blocking code."""
    link = _Link()
    while True:
        do, arguments = link.receive()
        link.reply(handlers[do](**arguments))


async def serve_async(handlers: Mapping[str, Callable[..., Awaitable[Reply]]]) -> None:
    """The same in an event loop, which runs on between commands (heartbeats and such)."""
    link = _Link()
    while True:
        do, arguments = await asyncio.to_thread(link.receive)
        link.reply(await handlers[do](**arguments))
