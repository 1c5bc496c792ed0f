"""What strangers may try at the bulk lane: refused, counted, and nobody else is worse off."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import socket
import ssl
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric.ec import SECP256R1, generate_private_key
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat

from peer.net import lane_server, tls
from peer.net.budget import UploadBudget
from peer.net.calls import Slots
from peer.net.framing import END, HEADER, _header
from peer.net.lane import (
    GREETING,
    OPENS,
    PROBE,
    LaneOffer,
)
from peer.net.lane_counters import LaneCounters
from peer.net.lane_dialer import LaneDialer
from peer.net.lane_server import LaneServer, listen
from peer.net.pacing import Line
from peer.net.tls_pipe import TlsPipe, tune
from protocols import limits
from protocols.identity import Signer
from protocols.schema import pack
from protocols.types import PeerId
from tests.net.peers import echo
from tests.net.test_lane import patience, talk, until

pytestmark = pytest.mark.asyncio(loop_factories=["asyncio", "uvloop"])
__all__ = ["patience"]  # for its effect

HOST = "127.0.0.1"
END_FRAME = _header(0, 0, END)
ALICE, BOB, MALLORY = (Signer(hashlib.sha256(n).digest()) for n in (b"alice", b"bob", b"mallory"))


class Bob:
    """A server, and what it said of whom."""

    def __init__(self, folder: Path) -> None:
        self.counters = LaneCounters()
        self.blamed: list[tuple[PeerId, str]] = []
        self.server = LaneServer(
            listen(HOST, 0, port_is_given=False), tls.contexts(BOB, folder)[0], UploadBudget(),
            Slots(limits.STREAMS_MAX, limits.STREAMS_PER_PEER_MAX), self.counters,
            lambda peer, reason: self.blamed.append((peer, reason)), Line(),
        )  # fmt: skip
        self.server.on_stream = echo
        self.server.admit(ALICE.peer_id)

    @property
    def port(self) -> int:
        return self.server.port


@asynccontextmanager
async def bob(folder: Path) -> AsyncIterator[Bob]:
    there = Bob(folder)
    try:
        yield there
        await welcomes(there, folder)  # whatever was tried, friends come through
    finally:
        await there.server.close()
    assert there.counters.connections == 0


@asynccontextmanager
async def alice(folder: Path, port: int, offer: bytes | None = None) -> AsyncIterator[LaneDialer]:
    async def ask(peer: PeerId, request: bytes, timeout_s: float) -> bytes:
        return offer or pack(LaneOffer(port, (HOST,)))

    dialer = LaneDialer(
        ALICE.peer_id, tls.contexts(ALICE, folder)[1], UploadBudget(), LaneCounters(), ask,
        lambda peer, reason: None, lambda peer, reason: None, Line(),
    )  # fmt: skip
    try:
        yield dialer
    finally:
        await dialer.close()


def counters_of(dialer: LaneDialer) -> LaneCounters:
    return dialer._counters


async def welcomes(there: Bob, folder: Path) -> None:
    async with alice(folder, there.port) as dialer:
        stream = await dialer.open(BOB.peer_id, 40)
        assert stream is not None
        await talk(stream)


async def connected(port: int) -> socket.socket:
    sock = socket.socket()
    tune(sock, HOST)
    await asyncio.get_running_loop().sock_connect(sock, (HOST, port))
    return sock


async def hands_shaken(port: int, context: ssl.SSLContext) -> tuple[TlsPipe, bytes | None]:
    return await TlsPipe.handshake(await connected(port), context, listens=False)


async def came_to_nothing(port: int, context: ssl.SSLContext) -> bool:
    """Whether a client with this certificate hears nothing from Bob."""
    try:
        pipe, _ = await hands_shaken(port, context)
    except OSError:
        return True
    with contextlib.suppress(OSError):
        pipe.write(OPENS)
    answer = await pipe.read(1)
    pipe.abort()
    return answer == b""


def context_of(folder: Path, secret: bytes, shown: bytes) -> ssl.SSLContext:
    """A client's context with any key and any certificate, that takes any server."""
    path = folder / "hostile.pem"
    path.write_bytes(secret + shown)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE
    context.load_cert_chain(path)
    return context


def pem_of(key: Ed25519PrivateKey) -> bytes:
    return key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())


# ── who may come in ──────────────────────────────────────────────────────────────────────
async def test_an_unknown_peer_is_refused(tmp_path: Path) -> None:
    async with bob(tmp_path) as there:
        mallory = tls.contexts(MALLORY, tmp_path)[1]
        assert await came_to_nothing(there.port, mallory)
        await until(lambda: there.counters.refused == {"unknown": 1})
        there.server.admit(MALLORY.peer_id)  # it has asked
        pipe, _ = await hands_shaken(there.port, mallory)
        assert await pipe.read(1) == GREETING
        pipe.close()


async def test_admission_ends(tmp_path: Path) -> None:
    async with bob(tmp_path) as there:
        there.server._admitted[ALICE.peer_id] = 0.0
        assert await came_to_nothing(there.port, tls.contexts(ALICE, tmp_path)[1])
        assert there.counters.refused == {"unknown": 1}
        there.server.admit(ALICE.peer_id)


async def test_the_table_of_the_admitted_is_bounded(tmp_path: Path) -> None:
    async with bob(tmp_path) as there:
        for number in range(limits.KNOWN_PEERS_MAX + 10):
            there.server.admit(PeerId(f"stranger {number}"))
        assert len(there.server._admitted) == limits.KNOWN_PEERS_MAX
        there.server.admit(ALICE.peer_id)


async def test_a_certificate_without_its_key_is_refused(tmp_path: Path) -> None:
    """Alice's certificate, seen in a handshake with her, shown by Mallory."""
    key = Ed25519PrivateKey.from_private_bytes(ALICE.seed)
    shown = tls.certificate(key.public_key(), ALICE.peer_id).public_bytes(Encoding.PEM)
    with pytest.raises(ssl.SSLError):  # our own OpenSSL does not even load it
        context_of(tmp_path, pem_of(Ed25519PrivateKey.generate()), shown)
    async with bob(tmp_path) as there:
        # So the lie is in the bytes: the certificate with Mallory's key in place of Alice's name.
        claims = tls.certificate(
            Ed25519PrivateKey.from_private_bytes(MALLORY.seed).public_key(), ALICE.peer_id
        ).public_bytes(Encoding.PEM)
        secret = pem_of(Ed25519PrivateKey.from_private_bytes(MALLORY.seed))
        assert await came_to_nothing(there.port, context_of(tmp_path, secret, claims))
        await until(lambda: there.counters.refused == {"unknown": 1})  # it is Mallory, not Alice


async def test_a_replayed_handshake_is_refused(tmp_path: Path) -> None:
    """Every byte that Alice once sent, sent again by somebody who listened."""
    async with bob(tmp_path) as there:
        said = bytearray()
        async with wiretap(there.port, said) as port:
            pipe, _ = await hands_shaken(port, tls.contexts(ALICE, tmp_path)[1])
            pipe.write(OPENS)
            assert await pipe.read(1) == GREETING
            pipe.close()
        assert len(said) > 500
        loop = asyncio.get_running_loop()
        sock = await connected(there.port)
        await loop.sock_sendall(sock, said)
        await until(lambda: there.counters.refused == {"handshake": 1})
        sock.close()


@asynccontextmanager
async def wiretap(port: int, said: bytearray) -> AsyncIterator[int]:
    """Passes everything on to `port`, and keeps what the client said."""

    async def pump(source: asyncio.StreamReader, sink: asyncio.StreamWriter, keep: bool) -> None:
        while data := await source.read(65536):
            if keep:
                said.extend(data)
            sink.write(data)
        sink.close()

    async def tap(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        there, back = await asyncio.open_connection(HOST, port)
        with contextlib.suppress(OSError):
            await asyncio.gather(pump(reader, back, True), pump(there, writer, False))

    server = await asyncio.start_server(tap, HOST, 0)
    try:
        yield server.sockets[0].getsockname()[1]
    finally:
        server.close()
        await server.wait_closed()


async def test_an_impostor_in_the_middle_is_found_out_by_both(tmp_path: Path) -> None:
    """Mallory listens where Alice looks for Bob."""
    there = Bob(tmp_path)
    there.server._context = tls.contexts(MALLORY, tmp_path)[0]
    try:
        async with alice(tmp_path, there.port) as dialer:
            assert await dialer.open(BOB.peer_id, 40) is None
            assert counters_of(dialer).failed == {"identity": 1}
            assert counters_of(dialer).connections == 0
    finally:
        await there.server.close()


@pytest.mark.parametrize("kind", ["none", "self-signed", "another kind of key"])
async def test_certificates_that_are_no_peers_are_refused(tmp_path: Path, kind: str) -> None:
    async with bob(tmp_path) as there:
        if kind == "none":
            context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
            context.check_hostname = False
            context.verify_mode = ssl.CERT_NONE
        elif kind == "self-signed":
            key = Ed25519PrivateKey.generate()
            shown = self_signed(key)
            context = context_of(tmp_path, pem_of(key), shown)
        else:
            other = generate_private_key(SECP256R1())
            shown = tls.certificate(other.public_key(), "x").public_bytes(Encoding.PEM)  # type: ignore[arg-type]
            secret = other.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
            context = context_of(tmp_path, secret, shown)
        assert await came_to_nothing(there.port, context)
        why = "identity" if kind == "another kind of key" else "handshake"
        await until(lambda: there.counters.refused == {why: 1})


def self_signed(key: Ed25519PrivateKey) -> bytes:
    from cryptography import x509

    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "murmuration lane")])
    return (
        x509.CertificateBuilder()
        .subject_name(name).issuer_name(name).public_key(key.public_key()).serial_number(3)
        .not_valid_before(tls._BEGIN).not_valid_after(tls._END)
        .sign(key, None).public_bytes(Encoding.PEM)
    )  # fmt: skip


async def test_an_older_tls_is_refused(tmp_path: Path) -> None:
    async with bob(tmp_path) as there:
        context = tls.contexts(ALICE, tmp_path)[1]
        context.minimum_version = ssl.TLSVersion.TLSv1_2
        context.maximum_version = ssl.TLSVersion.TLSv1_2
        assert await came_to_nothing(there.port, context)
        await until(lambda: there.counters.refused == {"handshake": 1})


# ── what may be sent ─────────────────────────────────────────────────────────────────────
async def test_plain_text_is_refused(tmp_path: Path) -> None:
    async with bob(tmp_path) as there:
        loop = asyncio.get_running_loop()
        for number, text in enumerate((b"GET / HTTP/1.1\r\n\r\n", bytes(4096), OPENS, b"\x16\x03")):
            sock = await connected(there.port)
            await loop.sock_sendall(sock, text)
            sock.shutdown(socket.SHUT_WR)
            await until(lambda n=number: there.counters.refused["handshake"] == n + 1)
            sock.close()


async def test_who_sends_nothing_or_a_byte_now_and_then_is_cut_off(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lane_server, "HANDSHAKE_TIMEOUT_S", 0.3)
    async with bob(tmp_path) as there:
        loop = asyncio.get_running_loop()
        silent, slow = await connected(there.port), await connected(there.port)

        async def dribble() -> None:
            with contextlib.suppress(OSError):
                for byte in bytes.fromhex("1603010200010001fc0303") + bytes(500):
                    await loop.sock_sendall(slow, bytes([byte]))
                    await asyncio.sleep(0.02)

        dribbling = asyncio.create_task(dribble())
        assert await loop.sock_recv(silent, 1) == b""
        await until(lambda: there.counters.refused == {"handshake": 2})
        monkeypatch.setattr(lane_server, "HANDSHAKE_TIMEOUT_S", 10.0)
        dribbling.cancel()
        await asyncio.wait({dribbling})
        silent.close()
        slow.close()


async def test_few_handshakes_run_at_once(tmp_path: Path) -> None:
    async with bob(tmp_path) as there:
        loop = asyncio.get_running_loop()
        most = lane_server.HANDSHAKES_PER_HOST_MAX
        crowd = [await connected(there.port) for _ in range(most + 5)]
        await until(lambda: there.counters.refused == {"crowd": 5})
        assert there.server._handshakes == {HOST: most}
        for sock in crowd[most:]:
            with contextlib.suppress(ConnectionResetError):
                assert await loop.sock_recv(sock, 1) == b""
        for sock in crowd:
            sock.close()
        await until(lambda: not there.server._handshakes)


async def test_a_stranger_holds_no_more_lanes_than_streams(tmp_path: Path) -> None:
    async with bob(tmp_path) as there:
        there.server.admit(MALLORY.peer_id)
        context = tls.contexts(MALLORY, tmp_path)[1]
        pipes = []
        for _ in range(limits.STREAMS_PER_PEER_MAX):
            pipe, _ = await hands_shaken(there.port, context)
            assert await pipe.read(1) == GREETING
            pipes.append(pipe)
        assert await came_to_nothing(there.port, context)
        assert there.counters.refused == {"crowd": 1}
        for pipe in pipes:
            pipe.close()
        await until(lambda: there.counters.connections == 0)


@pytest.mark.parametrize("first", [b"\x00", GREETING, b"\xff" * 100])
async def test_what_begins_no_stream_is_blamed(tmp_path: Path, first: bytes) -> None:
    async with bob(tmp_path) as there:
        pipe, _ = await hands_shaken(there.port, tls.contexts(ALICE, tmp_path)[1])
        assert await pipe.read(1) == GREETING
        pipe.write(first)
        assert await pipe.read(1) == b""
        assert there.counters.refused == {"protocol": 1}
        assert [peer for peer, _ in there.blamed] == [ALICE.peer_id]


async def test_broken_frames_are_refused_with_the_reason(tmp_path: Path) -> None:
    async with bob(tmp_path) as there:
        pipe, _ = await hands_shaken(there.port, tls.contexts(ALICE, tmp_path)[1])
        assert await pipe.read(1) == GREETING
        pipe.write(OPENS + bytes(13))
        assert await pipe.read(1) == b""  # framing's own checks: the connection is gone
        await until(lambda: there.counters.connections == 0)


@pytest.mark.parametrize("flood", [PROBE, OPENS + END_FRAME])
async def test_a_flood_of_small_things_holds_up_nobody(tmp_path: Path, flood: bytes) -> None:
    async with bob(tmp_path) as there:
        pipe, _ = await hands_shaken(there.port, tls.contexts(ALICE, tmp_path)[1])
        assert await pipe.read(1) == GREETING
        with contextlib.suppress(OSError):
            pipe.write(flood * 20_000)
        await welcomes(there, tmp_path)
        pipe.close()


async def test_a_lane_is_probed_once_between_two_streams(tmp_path: Path) -> None:
    async with bob(tmp_path) as there:
        pipe, _ = await hands_shaken(there.port, tls.contexts(ALICE, tmp_path)[1])
        assert await pipe.read(1) == GREETING
        pipe.write(PROBE)  # it has not been used for a while
        assert await pipe.read(1) == GREETING
        pipe.write(OPENS + END_FRAME)
        assert await pipe.read(HEADER.size) == END_FRAME
        pipe.write(PROBE)
        assert await pipe.read(1) == GREETING
        pipe.write(PROBE)
        assert await pipe.read(1) == b""
        assert there.counters.refused == {"protocol": 1}


async def test_a_quiet_lane_is_closed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async with bob(tmp_path) as there:
        monkeypatch.setattr(lane_server, "IDLE_S", 0.1)
        pipe, _ = await hands_shaken(there.port, tls.contexts(ALICE, tmp_path)[1])
        assert await pipe.read(1) == GREETING
        assert await pipe.read(1) == b""
        monkeypatch.setattr(lane_server, "IDLE_S", 10.0)


# ── offers ───────────────────────────────────────────────────────────────────────────────
@pytest.mark.parametrize(
    "offer",
    [
        b"", b"\xc1", bytes(1000), pack(LaneOffer(0, ())),
        pack(LaneOffer(1, ("localhost",))), pack(LaneOffer(1, ("224.0.0.1",))),
        pack(LaneOffer(1, ("0.0.0.0",))), pack(LaneOffer(1, ("fe80::1%lo",))),
        pack(LaneOffer(70000, (HOST,))), pack(LaneOffer(1, (HOST,) * 9)),
    ],
)  # fmt: skip
async def test_offers_that_make_no_sense_lead_nowhere(tmp_path: Path, offer: bytes) -> None:
    async with alice(tmp_path, 0, offer or b"\x00") as dialer:
        assert await dialer.open(BOB.peer_id, 40) is None
        assert counters_of(dialer).failed == {"offer": 1}


async def test_of_several_hosts_the_one_that_proves_itself_is_taken(tmp_path: Path) -> None:
    async with bob(tmp_path) as there:
        offer = pack(LaneOffer(there.port, ("127.0.0.9", "::1", "192.0.2.1", HOST)))
        async with alice(tmp_path, 0, offer) as dialer:
            stream = await dialer.open(BOB.peer_id, 60)
            await until(lambda: counters_of(dialer).connections == 1)
            if stream is not None:
                await stream.close()
