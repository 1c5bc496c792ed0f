"""What a peer's address looks like, checked before anything starts."""

from __future__ import annotations

from collections.abc import Iterable

from peer.errors import UsageError
from protocols.identity import public_key_of
from protocols.types import PeerId


def check_addresses(addresses: Iterable[str]) -> None:
    """Refuse what can never be a peer's address; what is merely unreachable is tried.

    Raises:
        UsageError: names the address and says what one looks like.
    """
    for address in addresses:
        place, mark, peer = address.rpartition("/p2p/")
        try:
            if not mark or not place.startswith("/"):
                raise ValueError("it has no /p2p/ with a peer's id")
            public_key_of(PeerId(peer))
        except ValueError as error:
            raise UsageError(
                f"--via {address[:120]!r} is no peer's address ({error}); one looks like"
                " /ip4/203.0.113.7/tcp/31337/p2p/12D3KooW... (a peer prints its own at start)"
            ) from None
