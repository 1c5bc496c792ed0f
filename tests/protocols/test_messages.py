"""Messages survive the wire; anything else is the sender's fault, by name, and nothing worse."""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from typing import Any

import msgpack
import pytest

from protocols import limits
from protocols.errors import RemoteProtocolError
from protocols.identity import SIGNATURE_BYTES
from protocols.messages import (
    OUTCOME_DOMAIN,
    PLAN_DOMAIN,
    Contributor,
    Goodbye,
    OutcomeHeader,
    Plan,
    decode,
    decode_header,
    encode,
    open_signed,
)
from protocols.records import Signed, sign
from protocols.schema import pack
from tests.protocols.samples import GROUP, HEADERS, MESSAGES, RUN, peer, sample, signer

LIAR = peer(66)
ANY = [(kind, decode) for kind in MESSAGES] + [(kind, decode_header) for kind in HEADERS]
HOSTILE: list[Any] = [
    -1, -(2**63), 2**63, 2**64 - 1, math.nan, math.inf, -math.inf, {}, {1: 2}, {"a": []},
    "x" * 600, b"x" * 70_000, [[[[]]]], [0] * 100, msgpack.ExtType(1, b""), msgpack.Timestamp(0),
]  # fmt: skip


def attempt(read: Callable[..., Any], data: bytes, hint: object = "") -> Any:
    """The message in `data`, or the error that blames its sender; nothing else may be raised."""
    try:
        return read(data, LIAR)
    except RemoteProtocolError as error:
        return error
    except Exception as error:
        error.add_note(f"{hint}: {data[:80]!r}")
        raise


def refused(read: Callable[..., Any], data: bytes, hint: object = "") -> str:
    """Why `read` does not take `data`."""
    error = attempt(read, data, hint)
    assert isinstance(error, RemoteProtocolError), f"{hint}: took {data[:80]!r} as {error}"
    assert error.peer == LIAR, hint
    return error.reason


@pytest.mark.parametrize(("kind", "read"), ANY)
def test_every_message_comes_back_as_it_was(kind: type, read: Callable[..., Any]) -> None:
    for seed in range(100):
        message = sample(kind, random.Random(seed))
        assert read(encode(message), LIAR) == message, f"seed {seed}"


@pytest.mark.parametrize(("kind", "read"), ANY)
def test_every_truncation_and_extension_is_refused(kind: type, read: Callable[..., Any]) -> None:
    for seed in range(5):
        data = encode(sample(kind, random.Random(seed)))
        for length in range(len(data)):
            refused(read, data[:length], f"seed {seed}, {length} bytes")
        for more in (b"\x00", b"\xc0", data):
            refused(read, data + more, f"seed {seed}")


@pytest.mark.parametrize(("kind", "read"), ANY)
def test_a_message_is_not_a_header_and_no_other_version_is_spoken(
    kind: type, read: Callable[..., Any]
) -> None:
    data = encode(sample(kind, random.Random(1)))
    refused(decode if read is decode_header else decode_header, data)
    for version in {*range(256)} - {limits.PROTOCOL_VERSION}:
        assert f"version {version}" in refused(read, bytes([version]) + data[1:])


@pytest.mark.parametrize(("kind", "read"), ANY)
def test_no_message_passes_for_one_of_another_shape(kind: type, read: Callable[..., Any]) -> None:
    """A swapped type byte gives either a refusal or that type; never a half-read thing."""
    data = encode(sample(kind, random.Random(2)))
    for tag in range(256):
        other = attempt(read, data[:1] + bytes([tag]) + data[2:])
        assert isinstance(other, RemoteProtocolError) or encode(other)[1] == tag


def test_oversized_messages_are_refused_before_they_are_read() -> None:
    for read, most in (
        (decode, limits.CONTROL_BYTES_MAX),
        (decode_header, limits.STREAM_HEADER_BYTES_MAX),
    ):
        assert "at most" in refused(read, bytes(most + 1))
        assert "at most" not in refused(read, bytes([limits.PROTOCOL_VERSION]) * most)


def nodes(value: Any, path: tuple[int, ...] = ()) -> list[tuple[int, ...]]:
    """Where everything inside a nested list is."""
    found = [path] if path else []
    if isinstance(value, list):
        for i, item in enumerate(value):
            found += nodes(item, (*path, i))
    return found


def replaced(value: Any, path: tuple[int, ...], new: Any) -> Any:
    if not path:
        return new
    return [replaced(v, path[1:], new) if i == path[0] else v for i, v in enumerate(value)]


@pytest.mark.parametrize(("kind", "read"), ANY)
def test_no_field_anywhere_takes_what_nobody_should_send(
    kind: type, read: Callable[..., Any]
) -> None:
    for seed in range(10):
        rng = random.Random(seed)
        data = encode(sample(kind, rng))
        body = msgpack.unpackb(data[2:], raw=False)
        for path in nodes(body):
            for hostile in HOSTILE:
                bad = data[:2] + bytes(msgpack.packb(replaced(body, path, hostile)))
                refused(read, bad, f"seed {seed}, {hostile!r:.40} at {path}")


def mutated(data: bytes, other: bytes, rng: random.Random) -> bytes:
    """`data` with one to three accidents."""
    bad = bytearray(data)
    for _ in range(rng.choice([1, 1, 2, 3])):
        at = rng.randrange(len(bad) + 1)
        match rng.randrange(7):
            case 0 if at < len(bad):
                bad[at] ^= 1 << rng.randrange(8)
            case 1 if at < len(bad):
                bad[at] = rng.choice([0x00, 0x7F, 0x80, 0x90, 0xC0, 0xC1, 0xCB, 0xDD, 0xDF, 0xFF])
            case 2:
                bad[at:at] = rng.randbytes(rng.randint(1, 9))
            case 3:
                del bad[at : at + rng.randint(1, 9)]
            case 4:
                bad = bad[: max(at, 1)]
            case 5:
                bad[at:] = other[rng.randrange(len(other)) :]
            case _:
                bad += rng.randbytes(3)
    return bytes(bad)


def test_fifty_thousand_mutants_raise_nothing_but_the_senders_fault() -> None:
    first = random.SystemRandom().randrange(2**31)
    survivors = 0
    bases = [encode(sample(kind, random.Random(i))) for i in range(8) for kind, _ in ANY]
    for seed in [*range(25_000), *range(first, first + 25_000)]:
        rng = random.Random(seed)
        data = mutated(rng.choice(bases), rng.choice(bases), rng)
        for read in (decode, decode_header):
            value = attempt(read, data, f"seed {seed}")
            if isinstance(value, RemoteProtocolError):
                assert value.peer == LIAR, f"seed {seed}"
                continue
            survivors += 1
            assert read(encode(value), LIAR) == value, f"seed {seed}"
    assert 0 < survivors < 15_000


def header(**changes: Any) -> OutcomeHeader:
    fields: dict[str, Any] = {
        "run": RUN, "group": GROUP, "round": 1, "epoch": 1, "span": 0, "start": 0, "stop": 9,
        "contributors": (Contributor(peer(0), 1.0, b""),), "content": bytes(32),
        "content_bytes": 9, "seconds": 0.5,
    }  # fmt: skip
    return OutcomeHeader(**(fields | changes))


@pytest.mark.parametrize(
    "changes",
    [
        {"stop": 0},
        {"start": 9},
        {"start": 10},
        {"seconds": -0.1},
        *(
            {"contributors": contributors}
            for contributors in (
                (Contributor(peer(0), 1.0, b"\xff"),),
                (Contributor(peer(0), 1.0, b"\xff\xff\xff"),),
                (Contributor(peer(0), 0.0, b""),),
                (Contributor(peer(0), -1.0, b""),),
                (Contributor(peer(0), 1e300, b""),),
                (Contributor(peer(0), 1.0, b""), Contributor(peer(0), 1.0, b"")),
            )
        ),
    ],
)
def test_an_outcome_that_proves_nothing_is_refused(changes: dict[str, Any]) -> None:
    header()
    with pytest.raises(ValueError, match=r"span|mask|weight|twice|duration"):
        header(**changes)


def test_a_mask_says_which_units_are_inside() -> None:
    some = Contributor(peer(0), 1.0, bytes([0b0000_0101, 0b1]))
    assert [i for i in range(9) if some.covers(i)] == [0, 2, 8]
    assert all(Contributor(peer(0), 1.0, b"").covers(i) for i in range(9))


# ── signatures ───────────────────────────────────────────────────────────────────────────
def plan(seed: int = 0) -> Plan:
    made = sample(Plan, random.Random(seed))
    assert isinstance(made, Plan)
    return made


def test_what_was_signed_is_what_is_read() -> None:
    for seed in range(100):
        value = plan(seed)
        assert open_signed(sign(signer(1), PLAN_DOMAIN, value), PLAN_DOMAIN, Plan, LIAR) == value


def test_any_flipped_bit_of_body_or_signature_is_refused() -> None:
    good = sign(signer(1), PLAN_DOMAIN, plan())
    everything = good.body + good.signature
    for bit in range(8 * len(everything)):
        bad = bytearray(everything)
        bad[bit // 8] ^= 1 << bit % 8
        body, signature = bytes(bad[:-SIGNATURE_BYTES]), bytes(bad[-SIGNATURE_BYTES:])
        signed = Signed(body, good.signer, signature)
        with pytest.raises(RemoteProtocolError, match="wrong signature") as caught:
            open_signed(signed, PLAN_DOMAIN, Plan, LIAR)
        assert caught.value.peer == LIAR


def test_nobody_signs_for_another() -> None:
    good = sign(signer(1), PLAN_DOMAIN, plan())
    for other in (peer(2), "", "x", good.signer + " ", good.signer[:-1], good.signer.lower()):
        with pytest.raises(RemoteProtocolError, match="wrong signature"):
            open_signed(Signed(good.body, other, good.signature), PLAN_DOMAIN, Plan, LIAR)  # type: ignore[arg-type]


def test_a_signature_of_one_kind_is_none_of_another() -> None:
    signed = sign(signer(1), OUTCOME_DOMAIN, plan())
    with pytest.raises(RemoteProtocolError, match="wrong signature"):
        open_signed(signed, PLAN_DOMAIN, Plan, LIAR)


def test_a_rightly_signed_lump_is_still_refused() -> None:
    body = pack(Goodbye(RUN, "not a plan"))
    signed = Signed(body, peer(1), signer(1).sign(PLAN_DOMAIN, body))
    with pytest.raises(RemoteProtocolError, match="Plan") as caught:
        open_signed(signed, PLAN_DOMAIN, Plan, LIAR)
    assert caught.value.peer == LIAR
