"""One Ed25519 key is a peer: for libp2p, for DHT records and for signed messages.

A libp2p peer id of an Ed25519 key is the identity multihash of the protobuf-coded public key, so
the id alone is enough to verify whatever its owner signed (libp2p specs, peer-ids).
"""

from __future__ import annotations

from typing import Final

import base58
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    PublicFormat,
)

from protocols.types import PeerId

_PREFIX: Final = bytes([0x00, 0x24, 0x08, 0x01, 0x12, 0x20])  # identity hash, 36 B, Ed25519, 32 B
SIGNATURE_BYTES: Final = 64


def peer_id_of(public_key: bytes) -> PeerId:
    """The libp2p peer id of a raw 32-byte Ed25519 public key."""
    if len(public_key) != 32:
        raise ValueError(f"an Ed25519 public key has 32 bytes, not {len(public_key)}")
    return PeerId(base58.b58encode(_PREFIX + public_key).decode())


def public_key_of(peer: PeerId) -> bytes:
    """The raw public key inside a peer id.

    Raises:
        ValueError: the id is not that of an Ed25519 key, or not its one spelling.
    """
    if not 40 <= len(peer) <= 64:
        raise ValueError(f"not a peer id: {peer[:64]!r}")
    raw = base58.b58decode(peer)
    if len(raw) != 38 or raw[:6] != _PREFIX:
        raise ValueError(f"not the peer id of an Ed25519 key: {peer[:64]!r}")
    if peer_id_of(raw[6:]) != peer:  # base58 ignores white space at the end
        raise ValueError(f"another spelling of a peer id: {peer[:64]!r}")
    return bytes(raw[6:])


class Signer:
    """A private key. Signatures are bound to a `domain`: none can be replayed as another kind."""

    def __init__(self, seed: bytes) -> None:
        """`seed`: 32 bytes from a cryptographic source."""
        self._key = Ed25519PrivateKey.from_private_bytes(seed)
        self.public_key = self._key.public_key().public_bytes(Encoding.Raw, PublicFormat.Raw)
        self.peer_id = peer_id_of(self.public_key)

    @property
    def seed(self) -> bytes:
        return self._key.private_bytes(Encoding.Raw, PrivateFormat.Raw, NoEncryption())

    def sign(self, domain: str, body: bytes) -> bytes:
        return self._key.sign(_bound(domain, body))


def verify(peer: PeerId, domain: str, body: bytes, signature: bytes) -> bool:
    """Whether `peer` signed `body` for `domain`. Never raises on hostile input."""
    try:
        key = Ed25519PublicKey.from_public_bytes(public_key_of(peer))
        key.verify(signature, _bound(domain, body))
    except (ValueError, InvalidSignature):
        return False
    return True


def _bound(domain: str, body: bytes) -> bytes:
    return b"murmuration/1/" + domain.encode() + b"\x00" + body
