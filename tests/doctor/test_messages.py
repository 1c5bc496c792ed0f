"""Probes are hostile bytes: bounded, typed, refused with their sender's name."""

from __future__ import annotations

import contextlib
import random

import pytest

from peer.doctor import messages as m
from protocols.errors import RemoteProtocolError
from protocols.limits import CONTROL_BYTES_MAX
from protocols.schema import pack
from protocols.types import PeerId

WHO = PeerId("12D3KooWstranger")
REQUESTS: list[m.Request] = [
    m.Hello(),
    m.DialMe(31337, b"n" * 16),
    m.Exchange(b"x" * 100, 200),
    m.Path(),
]
ANSWERS: list[m.Answer] = [
    m.HelloAnswer(1_700_000_000_000, ("/ip4/45.9.0.7/tcp/1",), 3),
    m.DialAnswer(m.Dialled.SILENT, "45.9.0.7"),
    m.ExchangeAnswer(b"y" * 50),
    m.PathAnswer(500, 15, 20_000, 1500),
]


@pytest.mark.parametrize("request_", REQUESTS, ids=lambda r: type(r).__name__)
def test_a_request_comes_back_as_it_was(request_: m.Request) -> None:
    assert m.read_request(WHO, m.write_request(request_)) == request_


@pytest.mark.parametrize("answer", ANSWERS, ids=lambda a: type(a).__name__)
def test_an_answer_comes_back_as_it_was_and_as_no_other_kind(answer: m.Answer) -> None:
    data = m.write_answer(answer)
    assert m.read_answer(WHO, type(answer), data) == answer  # type: ignore[type-var]
    other = m.DialAnswer if not isinstance(answer, m.DialAnswer) else m.PathAnswer
    with pytest.raises(RemoteProtocolError):
        m.read_answer(WHO, other, data)
    assert m.read_answer(WHO, other, m.write_answer(m.Wait(7))) == m.Wait(7)


def test_the_largest_exchange_fits_into_a_call() -> None:
    largest = m.Exchange(bytes(m.PIECE_BYTES_MAX), m.PIECE_BYTES_MAX)
    assert len(m.write_request(largest)) <= CONTROL_BYTES_MAX
    assert len(m.write_answer(m.ExchangeAnswer(bytes(m.PIECE_BYTES_MAX)))) <= CONTROL_BYTES_MAX


@pytest.mark.parametrize(
    "body",
    [
        b"", b"\x00", b"\x09" + pack(m.Hello()), b"\x01", b"\x02" + pack(m.Hello()),
        b"\x02" + pack(m.DialMe(70_000, b"n" * 16)), b"\x02" + pack(m.DialMe(-1, b"n" * 16)),
        b"\x02" + pack(m.DialMe(80, b"n" * 15)),
        b"\x03" + pack(m.Exchange(b"", m.PIECE_BYTES_MAX + 1)),
        b"\x03" + pack(m.Exchange(bytes(m.PIECE_BYTES_MAX + 1), 0)),
        b"\x03" + pack(m.Exchange(b"", -1)),
    ],
)  # fmt: skip
def test_what_is_no_probe_is_refused_by_name(body: bytes) -> None:
    with pytest.raises(RemoteProtocolError) as caught:
        m.read_request(WHO, m.PREFIX + body)
    assert caught.value.peer == WHO


@pytest.mark.parametrize("seed", range(20))
def test_damaged_bytes_are_refused_or_are_another_good_message(seed: int) -> None:
    rng = random.Random(seed)
    for message in REQUESTS:
        data = bytearray(m.write_request(message))
        for _ in range(50):
            broken = data[: rng.randrange(len(m.PREFIX), len(data) + 1)]
            if len(broken) > len(m.PREFIX):
                broken[rng.randrange(len(m.PREFIX), len(broken))] = rng.randrange(256)
            with contextlib.suppress(RemoteProtocolError):
                assert type(m.read_request(WHO, bytes(broken))) in m.REQUESTS.values()


@pytest.mark.parametrize(
    ("address", "place"),
    [
        ("/ip4/45.9.0.7/tcp/31337", m.Place("45.9.0.7", 31337)),
        ("/ip4/45.9.0.7/tcp/31337/p2p/12D3KooWx", m.Place("45.9.0.7", 31337)),
        ("/ip6/2a00::1/tcp/1", m.Place("2a00::1", 1)),
        ("/ip4/45.9.0.7/tcp/1/p2p/12D3KooWx/p2p-circuit", None),
        ("/ip4/224.0.0.1/tcp/1", None),
        ("/ip4/0.0.0.0/tcp/1", None),
        ("/ip4/45.9.0.7/udp/1/quic", None),
        ("/ip4/45.9.0.7/tcp/0", None),
        ("/ip4/45.9.0.7/tcp/65536", None),
        ("/ip4/45.9.0.7/tcp/٣", None),
        ("/ip6/fe80::1%eth0/tcp/1", None),
        ("/dns4/example.org/tcp/1", None),
        ("nonsense", None),
        ("/ip4/45.9.0.7/tcp/1/" + "x" * 1000, None),
    ],
)
def test_a_place_is_one_hosts_address_and_port(address: str, place: m.Place | None) -> None:
    assert m.place_of(address) == place
