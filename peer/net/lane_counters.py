"""What the bulk lane carries, and what came in its way: for metrics and `peer status`."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import Any, Final

CARRIERS: Final = ("lane", "libp2p")
FAILURES: Final = {
    "offer": "the peer has no lane, or can't be asked",
    "dial": "nobody answers at its addresses, or nobody with TLS",
    "identity": "somebody else is at its addresses",
    "greeting": "it turned us away",
    "broke": "a lane broke or stood still while a stream was open",
}
REFUSALS: Final = {
    "crowd": "too many handshakes or lanes at once",
    "handshake": "no TLS 1.3, no certificate, or not in time",
    "identity": "a certificate that is no peer's",
    "unknown": "a peer that has not asked for a lane",
    "protocol": "a peer that broke the rules",
}


@dataclass(slots=True)
class LaneCounters:
    """What went where since the start."""

    opened: Counter[str] = field(default_factory=Counter)
    """Streams opened here, by who carries them: one of `CARRIERS`."""
    accepted: int = 0
    """Streams that others opened over a lane."""
    bytes_up: int = 0
    """Of streams over lanes that have ended, headers included."""
    bytes_down: int = 0
    failed: Counter[str] = field(default_factory=Counter)
    """Lanes that did not come about, or broke: one of `FAILURES`."""
    refused: Counter[str] = field(default_factory=Counter)
    """Connections turned away: one of `REFUSALS`."""
    connections: int = 0
    """Open now, both those dialled and those accepted."""

    def plain(self) -> dict[str, Any]:
        """As JSON values."""
        return {
            "opened": dict(self.opened),
            "accepted": self.accepted,
            "failed": dict(self.failed),
            "refused": dict(self.refused),
            "connections": self.connections,
        }
