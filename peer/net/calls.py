"""What every transport does around the handlers: caps, reasons for refusals, loud bugs.

An answer on the wire is one status byte and then the response or the reason why there is none.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from typing import Final

from peer.net.transport import CallHandler, TransportError
from protocols import limits
from protocols.errors import LocalProtocolError, RemoteProtocolError
from protocols.types import PeerId

OK: Final = b"\x00"
REFUSED: Final = b"\x01"
ABSENT: Final = b"\x02"
"""Nobody is at work here yet, or any more: as if the call had not arrived."""

CALLS_PER_PEER_MAX: Final = 64  # in progress from one stranger; group mates have a handful
CALLS_MAX: Final = 1024


class Slots:
    """How many things strangers have in progress here: in all, and each."""

    def __init__(self, total_max: int, per_peer_max: int) -> None:
        self._total_max = total_max
        self._per_peer_max = per_peer_max
        self._taken: Counter[PeerId] = Counter()
        self._total = 0

    def enter(self, peer: PeerId) -> bool:
        if self._total >= self._total_max or self._taken[peer] >= self._per_peer_max:
            return False
        self._taken[peer] += 1
        self._total += 1
        return True

    def leave(self, peer: PeerId) -> None:
        self._total -= 1
        self._taken[peer] -= 1
        if not self._taken[peer]:
            del self._taken[peer]


def check_request(request: bytes) -> None:
    """Raise LocalProtocolError if `request` is too large for a call."""
    if len(request) > limits.CONTROL_BYTES_MAX:
        raise LocalProtocolError(
            f"request of {len(request)} bytes, at most {limits.CONTROL_BYTES_MAX} fit into a call"
        )


async def answer(
    handler: CallHandler | None, slots: Slots, sender: PeerId, request: bytes
) -> bytes:
    """The coded answer to one inbound call. Never raises: a bug here must not kill a transport."""
    if handler is None:
        return absence("not ready")
    if len(request) > limits.CONTROL_BYTES_MAX:
        return refusal(f"request of {len(request)} bytes is too large")
    if not slots.enter(sender):
        return refusal("too many calls in progress")
    task = asyncio.ensure_future(handler(sender, request))
    try:
        await asyncio.wait({task})
    finally:
        task.cancel()
        slots.leave(sender)
    if task.cancelled():
        return absence("shutting down")
    error = task.exception()
    if isinstance(error, RemoteProtocolError):
        return refusal(error.reason)
    if error is None and len(task.result()) > limits.CONTROL_BYTES_MAX:
        error = LocalProtocolError(f"response of {len(task.result())} bytes is too large")
    if error is not None:
        _tell_loop(f"the handler of a call from {sender} failed", error)
        return refusal("internal error")
    return OK + task.result()


def read_answer(peer: PeerId, coded: bytes) -> bytes:
    """The response inside a coded answer.

    Raises:
        RemoteProtocolError: the far side refused, or the answer is malformed.
        TransportError: it is starting or ending: there, but not to be talked to.
    """
    if len(coded) > limits.CONTROL_BYTES_MAX + 1:
        raise RemoteProtocolError(peer, f"answer of {len(coded)} bytes is too large")
    if coded[:1] == OK:
        return coded[1:]
    text = coded[1 : limits.TEXT_CHARS_MAX + 1].decode(errors="replace")
    if coded[:1] == REFUSED:
        raise RemoteProtocolError(peer, text)
    if coded[:1] == ABSENT:
        raise TransportError(peer, text)
    raise RemoteProtocolError(peer, "malformed answer")


def report(task: asyncio.Task[None]) -> None:
    """Tell the event loop if `task` ended with an error: a bug of ours, or of a handler."""
    if not task.cancelled() and (error := task.exception()) is not None:
        _tell_loop(f"{task.get_name()}: the handler failed", error)


def gone(peer: PeerId, timeout_s: float) -> TransportError:
    return TransportError(peer, f"no answer within {timeout_s:g} s")


def _tell_loop(message: str, error: BaseException) -> None:
    asyncio.get_running_loop().call_exception_handler({"message": message, "exception": error})


def absence(reason: str) -> bytes:
    """The coded answer of a process that serves nothing now."""
    return ABSENT + reason.encode()


def refusal(reason: str) -> bytes:
    """The coded answer that says no, and why."""
    return REFUSED + reason.encode()[: limits.TEXT_CHARS_MAX]
