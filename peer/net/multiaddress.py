"""Multiaddresses as the network daemon and strangers write them.

/ip4/203.0.113.7/tcp/31337/p2p/12D3KooW...                             where a peer listens
/ip4/198.51.100.1/tcp/443/p2p/12D3KooR.../p2p-circuit/p2p/12D3KooW...  the same through a relay
"""

from __future__ import annotations

import ipaddress
import re
from typing import Any, Final

from hivemind.p2p import PeerID
from hivemind.utils.multiaddr import Multiaddr

from protocols import limits
from protocols.identity import public_key_of
from protocols.types import PeerId

CIRCUIT: Final = "/p2p-circuit"

_PLACE: Final = re.compile(r"/(?:ip4|ip6)/([0-9a-fA-F:.]+)/tcp/(\d{1,5})(?:/|$)")


def is_relayed(address: str) -> bool:
    return CIRCUIT in address


def relay_in(address: str) -> str | None:
    """The address of the relay in a relayed one, or None."""
    before, mark, _ = address.partition(CIRCUIT)
    return before if mark else None


def place_of(address: str) -> tuple[str, int] | None:
    """IP address and TCP port of a multiaddress that is not relayed, or None."""
    found = _PLACE.match(address)
    if found is None or is_relayed(address):
        return None
    try:
        host = ipaddress.ip_address(found[1])
    except ValueError:
        return None
    return (str(host), int(found[2])) if 0 < int(found[2]) < 2**16 else None


def at(place: tuple[str, int]) -> str:
    """The multiaddress of an IP address and a TCP port."""
    host, port = place
    return f"/{'ip6' if ':' in host else 'ip4'}/{host}/tcp/{port}"


def read(raw: bytes) -> str:
    """A binary multiaddress from the daemon as text; what we can't spell is left away."""
    try:
        return str(Multiaddr(raw))
    except (ValueError, LookupError, TypeError, OSError):
        return ""


def peer_of(address: str) -> PeerId:
    """The peer id at the end of a multiaddress.

    Raises:
        ValueError: not a multiaddress that ends in /p2p/ID with an Ed25519 peer's id.
    """
    where, mark, name = address.rpartition("/p2p/")
    if not mark or not where.startswith("/") or len(address) > limits.ADDRESS_CHARS_MAX:
        raise ValueError(f"{address!r} is not an address like /ip4/192.0.2.7/tcp/31337/p2p/12D3...")
    peer = PeerId(name)
    public_key_of(peer)
    dial_bytes(address)
    return peer


def is_address_of(address: str, peer: PeerId) -> bool:
    try:
        return peer_of(address) == peer
    except ValueError:
        return False


def dial_bytes(address: str) -> bytes:
    """The binary multiaddress without the last /p2p/ID.

    hivemind's own `Multiaddr.to_bytes` codes /p2p/ID as a CID where libp2p wants a multihash.
    """
    where, _, _ = address.rpartition("/p2p/")
    coded = b""
    for index, part in enumerate(re.split(r"/p2p/([^/]+)", where)):
        try:
            if index % 2:
                multihash = libp2p_id(PeerId(part)).to_bytes()
                coded += b"\xa5\x03" + bytes([len(multihash)]) + multihash
            elif part:
                coded += Multiaddr(part).to_bytes()
        except (ValueError, LookupError, TypeError, OSError) as error:
            raise ValueError(f"{address!r} is not a multiaddress ({error})") from None
    return coded


def libp2p_id(peer: PeerId) -> Any:
    return PeerID.from_base58(peer)
