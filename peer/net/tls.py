"""TLS 1.3 between peers: a certificate is an Ed25519 identity, and nothing else about it counts.

A peer's certificate holds its identity's public key, so TLS itself proves who is there: to end a
handshake both sides sign its transcript with the key of the certificate they showed. Whose key it
is, `peer_behind` says after the handshake; whoever calls it decides before any byte is passed up.

Python's `ssl` can't be told to ask for certificates and take unknown ones. So all of them are
issued by one authority, whose private key stands below for everybody to read: that a certificate
was issued by it proves nothing, and is checked only because OpenSSL insists.

The same key signs records and messages elsewhere. That is safe: what TLS 1.3 signs begins with 64
spaces (RFC 8446, 4.4.3), and everything that `Signer` signs with the name of this protocol.
"""

from __future__ import annotations

import hashlib
import os
import ssl
from datetime import datetime
from pathlib import Path
from typing import Final

from cryptography import x509
from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    PublicFormat,
)
from cryptography.x509.oid import NameOID

from peer.errors import StorageError
from protocols.identity import Signer, peer_id_of
from protocols.types import PeerId

ALPN: Final = "murmuration/lane/1"
CERTIFICATE_BYTES_MAX: Final = 2048  # ours have some 230

_AUTHORITY: Final = Ed25519PrivateKey.from_private_bytes(
    hashlib.sha256(b"murmuration/lane: everybody's authority, which proves nothing").digest()
)
_AUTHORITY_NAME: Final = "murmuration lane"
_BEGIN: Final = datetime(2020, 1, 1)  # clocks and dates prove nothing either
_END: Final = datetime(9999, 12, 31, 23, 59, 59)  # "no well-defined expiration", RFC 5280, 4.1.2.5
_KEY_FILE: Final = "lane.pem"


def contexts(signer: Signer, folder: Path) -> tuple[ssl.SSLContext, ssl.SSLContext]:
    """(for the side that listens, for the side that dials).

    OpenSSL reads keys from files only: for a moment there is one in `folder`, mode 0600.

    Raises:
        StorageError: `folder` can't be written.
    """
    key = Ed25519PrivateKey.from_private_bytes(signer.seed)
    secret = key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
    shown = certificate(key.public_key(), str(signer.peer_id)).public_bytes(Encoding.PEM)
    path = folder / _KEY_FILE
    try:
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        path.unlink(missing_ok=True)
        try:
            with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as f:
                f.write(secret + shown)
            return _context(ssl.PROTOCOL_TLS_SERVER, path), _context(ssl.PROTOCOL_TLS_CLIENT, path)
        finally:
            path.unlink(missing_ok=True)
    except OSError as error:
        raise StorageError(
            f"can't write to {folder} ({error.strerror or error}); choose another folder"
        ) from None


def peer_behind(certificate_der: bytes | None) -> PeerId:
    """Whose certificate the far side showed, in a handshake that has ended well.

    Raises:
        ValueError: none, or not one of an Ed25519 identity.
    """
    if not certificate_der or len(certificate_der) > CERTIFICATE_BYTES_MAX:
        raise ValueError(f"a certificate of {len(certificate_der or b'')} bytes")
    try:
        key = x509.load_der_x509_certificate(certificate_der).public_key()
    except (ValueError, UnsupportedAlgorithm) as error:
        raise ValueError(f"not a certificate that can be read ({error})") from None
    if not isinstance(key, Ed25519PublicKey):
        raise ValueError("a certificate of another kind of key than Ed25519")
    return peer_id_of(key.public_bytes(Encoding.Raw, PublicFormat.Raw))


def certificate(key: Ed25519PublicKey, name: str, *, authority: bool = False) -> x509.Certificate:
    """A certificate of `key` by everybody's authority."""
    builder = (
        x509.CertificateBuilder()
        .subject_name(_name(name))
        .issuer_name(_name(_AUTHORITY_NAME))
        .public_key(key)
        .serial_number(1 if authority else 2)
        .not_valid_before(_BEGIN)
        .not_valid_after(_END)
        # Nothing may stand between the authority and a peer: no chains to go through.
        .add_extension(x509.BasicConstraints(authority, 0 if authority else None), critical=True)
    )
    return builder.sign(_AUTHORITY, None)


def _context(protocol: ssl._SSLMethod, own: Path) -> ssl.SSLContext:
    context = ssl.SSLContext(protocol)
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    context.check_hostname = False
    context.verify_mode = ssl.CERT_REQUIRED  # of both sides
    root = certificate(_AUTHORITY.public_key(), _AUTHORITY_NAME, authority=True)
    context.load_verify_locations(cadata=root.public_bytes(Encoding.DER))
    context.load_cert_chain(own)
    context.set_alpn_protocols([ALPN])
    if protocol == ssl.PROTOCOL_TLS_SERVER:
        context.num_tickets = 0  # every connection proves who is there
    return context


def _name(text: str) -> x509.Name:
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, text)])
