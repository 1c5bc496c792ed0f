"""Cheap signatures for simulations of thousands of peers.

Ed25519 costs 50 microseconds to sign and 130 to verify, most of such a simulation's time. Here a
signature is a keyed hash over signer, domain and body: it still binds who said what, a changed byte
still fails, and a simulated peer can't sign for another because it only ever holds its own signer.
It proves nothing outside the process.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import dht.rules
import protocols.loans
import protocols.messages
import protocols.records
from protocols.identity import SIGNATURE_BYTES, Signer
from protocols.types import PeerId


class FastSigner(Signer):
    """A `Signer` whose signatures only `fast_signatures` accepts."""

    def __init__(self, seed: bytes, key: bytes) -> None:
        super().__init__(seed)
        self._secret = key

    def sign(self, domain: str, body: bytes) -> bytes:
        return _mac(self._secret, self.peer_id, domain, body)


@contextmanager
def fast_signatures(seed: int) -> Iterator[bytes]:
    """Within the block, this process verifies keyed hashes in place of signatures; gives the key.

    Not for a process in which a real peer lives.
    """
    key = hashlib.sha256(f"simulation {seed}".encode()).digest()

    def verify(peer: PeerId, domain: str, body: bytes, signature: bytes) -> bool:
        return _mac(key, peer, domain, body) == signature

    # The parts that check signatures, each by its own name for `identity.verify`.
    places: list[Any] = [protocols.loans, protocols.messages, protocols.records, dht.rules]
    before = [place.verify for place in places]
    for place in places:
        place.verify = verify
    try:
        yield key
    finally:
        for place, original in zip(places, before, strict=True):
            place.verify = original


def _mac(key: bytes, peer: PeerId, domain: str, body: bytes) -> bytes:
    head = f"{peer}\x00{domain}\x00".encode()
    return hashlib.blake2b(head + body, key=key, digest_size=SIGNATURE_BYTES).digest()
