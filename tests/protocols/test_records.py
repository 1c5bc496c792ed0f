"""Identities and what they say of themselves: nobody can say it for them, nor at any length."""

from __future__ import annotations

import random
import typing

import base58
import pytest

from protocols import limits
from protocols.identity import Signer, peer_id_of, public_key_of, verify
from protocols.records import DOMAIN, PeerRecord, Signed, read_record, sign, sign_record
from protocols.schema import SchemaError, pack
from protocols.types import PeerId
from tests.protocols.samples import peer, record, sample, signer

# The Ed25519 key of the test vectors in libp2p's specs (peer-ids), and the id it has there.
SPEC_PUBLIC_KEY = bytes.fromhex("1ed1e8fae2c4a144b8be8fd4b47bf3d3b34b871c3cacf6010f0e42d474fce27e")
SPEC_PEER_ID = "12D3KooWBtg3aaRMjxwedh83aGiUkwSxDwUZkzuJcfaqUmo7R3pq"


def test_a_peer_id_is_the_key() -> None:
    assert peer_id_of(SPEC_PUBLIC_KEY) == SPEC_PEER_ID
    assert public_key_of(PeerId(SPEC_PEER_ID)) == SPEC_PUBLIC_KEY
    for index in range(300):
        key = random.Random(index).randbytes(32)
        assert public_key_of(peer_id_of(key)) == key
    again = Signer(signer(5).seed)
    assert again.peer_id == peer(5)


GOOD = peer(1)
NO_IDS = [
    "", " ", "x", "1" * 52, "z" * 64, "z" * 65, "12D3KooW", GOOD[:-1], GOOD + "1", "1" + GOOD,
    GOOD + " ", GOOD + "\n", GOOD + "\t\r\n", GOOD + "\u2003", " " + GOOD, "\x00" + GOOD[1:],
    GOOD[:-1] + "0", GOOD[:-1] + "O", GOOD[:-1] + "I", GOOD[:-1] + "l", GOOD[:-1] + "é",
    GOOD[:-1] + "\ud800", "漢" * 52, "🐦" * 52, GOOD.lower(), GOOD.upper(), GOOD * 1000,
    "1" * 10**6, "\x00" * 52, "QmYyQSo1c1Ym7orWxLYvCrM2EmxFTANf8wXmmE7DWjhx5N",
    base58.b58encode(b"\x00\x24\x08\x00\x12\x20" + bytes(32)).decode(),  # an RSA key
    base58.b58encode(b"\x12\x20" + bytes(36)).decode(),
    base58.b58encode(b"\x00" + b"\x00\x24\x08\x01\x12\x20" + bytes(31)).decode(),
]  # fmt: skip


@pytest.mark.parametrize("text", NO_IDS, ids=range(len(NO_IDS)))
def test_a_key_has_one_spelling_and_nothing_else_is_a_peer(text: str) -> None:
    with pytest.raises(ValueError, match=r"(?s).*") as caught:
        public_key_of(PeerId(text))
    assert len(str(caught.value)) < 500
    assert not verify(PeerId(text), DOMAIN, b"body", signer(1).sign(DOMAIN, b"body"))


@pytest.mark.parametrize("size", [0, 31, 33, 64])
def test_a_public_key_has_32_bytes(size: int) -> None:
    with pytest.raises(ValueError, match="32 bytes"):
        peer_id_of(bytes(size))


@pytest.mark.parametrize("signature", [b"", b"\x00", bytes(63), bytes(64), bytes(65), bytes(10**5)])
def test_verifying_anything_is_an_answer_not_an_accident(signature: bytes) -> None:
    assert not verify(peer(1), DOMAIN, b"body", signature)


def test_a_signature_is_for_one_domain_and_one_body() -> None:
    good = signer(1).sign("record", b"body")
    assert verify(peer(1), "record", b"body", good)
    for domain in ("plan", "", "recor", "record\x00", "record\x00b"):
        assert not verify(peer(1), domain, b"body", good)
    # Where the domain ends and the body begins is part of what is signed.
    assert not verify(peer(1), "recor", b"d\x00body", good)
    assert not verify(peer(1), "record\x00b", b"ody", good)


def test_a_record_comes_back_as_it_was() -> None:
    hints = typing.get_type_hints(PeerRecord, include_extras=True)
    free = ["run", "group", "site", "addresses", "upload_kbps", "reachable", "round", "founded_ms"]
    for seed in range(300):
        rng = random.Random(seed)
        made = record(seed % 5, **{name: sample(hints[name], rng) for name in free})
        assert read_record(sign_record(signer(seed % 5), made)) == made, f"seed {seed}"


def test_any_flipped_bit_is_refused() -> None:
    good = sign_record(signer(1), record(1))
    for bit in range(8 * len(good)):
        bad = bytearray(good)
        bad[bit // 8] ^= 1 << bit % 8
        with pytest.raises(SchemaError):
            read_record(bytes(bad))


def test_every_truncation_and_extension_is_refused() -> None:
    good = sign_record(signer(1), record(1))
    for length in range(len(good)):
        with pytest.raises(SchemaError):
            read_record(good[:length])
    with pytest.raises(SchemaError):
        read_record(good + b"\x00")


def test_nobody_speaks_for_another() -> None:
    with pytest.raises(SchemaError, match="signed by"):
        read_record(sign_record(signer(2), record(1)))


def test_a_record_signed_as_something_else_is_none() -> None:
    with pytest.raises(SchemaError, match="wrong signature"):
        read_record(pack(sign(signer(1), "plan", record(1))))


@pytest.mark.parametrize("size", [limits.RECORD_BYTES_MAX + 1, 10 * limits.RECORD_BYTES_MAX])
def test_a_record_is_never_longer_than_a_kilobyte(size: int) -> None:
    with pytest.raises(SchemaError, match="at most"):
        read_record(bytes(size))
    long = record(1, addresses=("/x" * 120,) * limits.ADDRESSES_MAX)
    with pytest.raises(SchemaError, match="at most"):
        read_record(sign_record(signer(1), long))


def test_a_record_lives_an_hour_at_the_most() -> None:
    most_ms = int(limits.RECORD_LIFETIME_S_MAX * 1000)
    read_record(sign_record(signer(1), record(1, issued_ms=5, expires_ms=5 + most_ms)))
    with pytest.raises(ValueError, match="too long"):
        record(1, issued_ms=5, expires_ms=6 + most_ms)
    # Nor when the bytes are made by hand.
    plain = record(1, issued_ms=5, expires_ms=5 + most_ms)
    body = pack(plain)
    end_ms = int.from_bytes(body[-6:-2], "big") + 1  # two short fields come after it
    late = body[:-6] + end_ms.to_bytes(4, "big") + body[-2:]
    forged = pack(Signed(late, peer(1), signer(1).sign(DOMAIN, late)))
    with pytest.raises(SchemaError, match="too long"):
        read_record(forged)
