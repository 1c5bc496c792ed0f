"""In a simulation equal bytes are read once, and outside of it nothing has changed."""

from __future__ import annotations

import pytest

from peer.simulate.sharing import PLACES, shared_reading
from protocols.records import PeerRecord, read_record, sign_record
from protocols.schema import SchemaError
from tests.protocols.samples import record
from tests.sim.world import signer


def signed(index: int) -> tuple[bytes, PeerRecord]:
    who = signer(index)
    plain = record(index)
    mine = PeerRecord(
        who.peer_id, plain.run, plain.group, plain.site, plain.addresses, plain.upload_kbps,
        plain.reachable, plain.round, plain.founded_ms, plain.issued_ms, plain.expires_ms,
    )  # fmt: skip
    return sign_record(who, mine), mine


def here() -> list[object]:
    """What each module calls by the shared names now."""
    return [getattr(place, name) for name, places in PLACES.items() for place in places]


def test_equal_bytes_give_the_same_object_and_refusals_stay() -> None:
    data, mine = signed(1)
    before = here()
    with shared_reading():
        first = read_record(data)
        assert first == mine
        assert read_record(bytes(bytearray(data))) is first
        for _ in range(2):
            with pytest.raises(SchemaError, match="wrong signature"):
                read_record(data[:-1] + bytes([data[-1] ^ 1]))
    assert here() == before
    assert read_record(data) is not first
