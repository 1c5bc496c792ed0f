"""What a peer says of itself in the DHT: one signed record, under 1 KiB.

Everyone computes groups, coordinators and aggregators from these, so they must be the same bytes
for everyone: signed by their subject, bounded in size and in life.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Final

from protocols import limits
from protocols.coordinates import Coordinate
from protocols.identity import SIGNATURE_BYTES, Signer, verify
from protocols.schema import Exactly, Max, SchemaError, pack, unpack
from protocols.types import GroupName, PeerId, RunId

PeerIdField = Annotated[PeerId, Max(64)]
RunIdField = Annotated[RunId, Max(64)]
GroupField = Annotated[GroupName, Max(limits.NAME_CHARS_MAX)]
NameField = Annotated[str, Max(limits.NAME_CHARS_MAX)]
TextField = Annotated[str, Max(limits.TEXT_CHARS_MAX)]
DigestField = Annotated[bytes, Max(32)]
"""32 bytes, or none where there is no state yet."""

DOMAIN: Final = "record"


@dataclass(frozen=True, slots=True)
class PeerRecord:
    """One peer's public facts. A record with a later `issued_ms` replaces an earlier one."""

    peer: PeerIdField
    run: RunIdField
    group: GroupField
    """The group it stands in by its own account; empty while it looks for one."""
    site: NameField
    """Declared label, or empty."""
    addresses: Annotated[
        tuple[Annotated[str, Max(limits.ADDRESS_CHARS_MAX)], ...], Max(limits.ADDRESSES_MAX)
    ]
    upload_kbps: Annotated[int, Max(2**31)]
    """Measured or promised upload; the weight in elections."""
    reachable: bool
    """Whether strangers can open connections to it."""
    round: Annotated[int, Max(2**48)]
    """Rounds of history that its state holds; 0 is a fresh start."""
    founded_ms: Annotated[int, Max(2**48)]
    """When it joined the run (its clock): the older one's group is the one that others join."""
    issued_ms: Annotated[int, Max(2**48)]
    """Milliseconds since 1970, the issuer's clock."""
    expires_ms: Annotated[int, Max(2**48)]
    company: Annotated[int, Max(limits.COMPANY_MAX)] = 0
    """Live members of its group by its own count, itself included: whether there is room."""
    coordinate: Coordinate | None = None
    """Where it stands in the network; none before it measured its first round trips."""

    def __post_init__(self) -> None:
        if self.expires_ms - self.issued_ms > limits.RECORD_LIFETIME_S_MAX * 1000:
            raise ValueError("lives too long")


def says_the_same(one: PeerRecord, other: PeerRecord) -> bool:
    """Whether a record says nothing that anything is decided by at once.

    Its dates and its round change all the time; coordinates, too, and they are looked at when a
    group is chosen.
    """
    return (
        one.group == other.group
        and one.company == other.company
        and one.addresses == other.addresses
        and (one.site, one.upload_kbps, one.reachable, one.founded_ms, one.run, one.peer)
        == (other.site, other.upload_kbps, other.reachable, other.founded_ms, other.run, other.peer)
    )


@dataclass(frozen=True, slots=True)
class Signed:
    """`body` as `signer` signed it for one domain; verify before unpacking."""

    body: Annotated[bytes, Max(limits.CONTROL_BYTES_MAX)]
    signer: PeerIdField
    signature: Annotated[bytes, Exactly(SIGNATURE_BYTES)]


def sign(signer: Signer, domain: str, value: object) -> Signed:
    body = pack(value)
    return Signed(body, signer.peer_id, signer.sign(domain, body))


def sign_record(signer: Signer, record: PeerRecord) -> bytes:
    """The bytes that go into the DHT."""
    return pack(sign(signer, DOMAIN, record))


def read_record(data: bytes) -> PeerRecord:
    """Verify and unpack a signed record.

    Raises:
        SchemaError: too large, malformed, wrongly signed, or signed by somebody else.
    """
    if len(data) > limits.RECORD_BYTES_MAX:
        raise SchemaError(f"record of {len(data)} bytes, at most {limits.RECORD_BYTES_MAX} allowed")
    signed = unpack(Signed, data)
    if not verify(signed.signer, DOMAIN, signed.body, signed.signature):
        raise SchemaError(f"record: wrong signature of {signed.signer}")
    record = unpack(PeerRecord, signed.body)
    if record.peer != signed.signer:
        raise SchemaError(f"record of {record.peer} signed by {signed.signer}")
    return record
