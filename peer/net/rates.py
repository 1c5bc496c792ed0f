"""How often strangers may ask for something: so many at once, and then so many per second."""

from __future__ import annotations

from collections import OrderedDict
from typing import Final

from protocols.types import PeerId

PEERS_MAX: Final = 1024  # remembered; the longest silent one is forgotten, and starts afresh


class Rates:
    """Token buckets, one for each peer and one for all. Time is handed in."""

    def __init__(self, burst: int, each_s: float, all_burst: int, all_each_s: float) -> None:
        """`each_s` seconds give back one of `burst` to a peer; likewise for all together."""
        self._burst, self._each_s = burst, each_s
        self._all_burst, self._all_each_s = all_burst, all_each_s
        self._peers: OrderedDict[PeerId, float] = OrderedDict()
        """When each peer's bucket is full again."""
        self._all_full_s = 0.0

    def take(self, peer: PeerId, now_s: float) -> bool:
        """Whether `peer` may, now; then it counts."""
        full_s = max(self._peers.pop(peer, 0.0), now_s) + self._each_s
        all_full_s = max(self._all_full_s, now_s) + self._all_each_s
        may = (
            full_s <= now_s + self._burst * self._each_s
            and all_full_s <= now_s + self._all_burst * self._all_each_s
        )
        self._peers[peer] = full_s if may else full_s - self._each_s
        if may:
            self._all_full_s = all_full_s
        while len(self._peers) > PEERS_MAX:
            self._peers.popitem(last=False)
        return may
