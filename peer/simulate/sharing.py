"""One process, many peers: what all of them read is read once.

Each of sixteen members verifies and decodes the same signed plan, heartbeat or record, and in a
simulation they all do it here. Both are pure functions of bytes whose results nobody can change,
so within `shared_reading` equal bytes give the same object. A refusal is worked out each time.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from typing import Any, Final

import dht.rules
import peer.exchange
import peer.mixing
import protocols.loans
import protocols.messages
import protocols.records

KEPT: Final = 4096  # results of each kind, the latest used: some MiB
PLACES: Final[dict[str, tuple[Any, ...]]] = {
    "unpack": (
        dht.rules,
        peer.exchange,
        peer.mixing,
        protocols.loans,
        protocols.messages,
        protocols.records,
    ),
    "verify": (dht.rules, protocols.loans, protocols.messages, protocols.records),
}
"""A function, and the modules that call it, each by its own name for it."""


@contextmanager
def shared_reading() -> Iterator[None]:
    """Within the block, this process decodes equal bytes and verifies equal signatures once.

    Inside of `fast_signatures`, if that is used as well.
    """
    before = {name: [getattr(place, name) for place in places] for name, places in PLACES.items()}
    for name, places in PLACES.items():
        shared = {original: lru_cache(maxsize=KEPT)(original) for original in before[name]}
        for place, original in zip(places, before[name], strict=True):
            setattr(place, name, shared[original])
    try:
        yield
    finally:
        for name, places in PLACES.items():
            for place, original in zip(places, before[name], strict=True):
                setattr(place, name, original)
