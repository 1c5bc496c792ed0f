"""Whose fault is it? The exception's type says so, and the text says what to do next.

Ours: LocalProtocolError (a bug; crash loudly). Theirs: RemoteProtocolError (names the peer; drop
its message, count it, go on). The world's errors live in `peer.errors`, with the volunteer's next
step.
"""

from __future__ import annotations

from protocols.types import PeerId


class ProtocolError(Exception):
    """Something broke the rules of the protocol."""


class LocalProtocolError(ProtocolError):
    """We broke the rules: a bug in this program."""


class RemoteProtocolError(ProtocolError):
    """`peer` broke the rules. Raised before any state changes."""

    def __init__(self, peer: PeerId, reason: str) -> None:
        super().__init__(f"{peer}: {reason}")
        self.peer = peer
        self.reason = reason
