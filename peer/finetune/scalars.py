"""What a zeroth-order peer sends in a round: its scalars, its weight and its signature.

    weight (1 byte) | exponent (1) | round mod 2^16 (2) | scalars | Ed25519 signature (64)

Scalars share an exponent: each is m * 2^(exponent - 15) with m in -32767..32767, so the largest
has fifteen bits and all are exact. Their error, 2^-16 of the largest, is nothing beside that of a
random direction. DeComFL sends each m in two bytes: 100 bytes for 16. FedKSeed sends a bit for each
seed of the pool and then the m of those that were drawn: 8,772 bytes at most for 4096 seeds, 980
after 200 steps.

There is one spelling for each content: the exponent is the least possible, and a drawn seed's m is
not zero. The signature is over the run's rules, the state it was measured at (the log's head), the
round and the bytes before it; so it stands for nothing else.

The weight (tokens, say) is a number of three bits times a power of two, rounded down: nobody claims
more than it did.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final

from peer.finetune.seed_rules import WEIGHT_MAX, SeedRules
from protocols.errors import RemoteProtocolError
from protocols.identity import SIGNATURE_BYTES, Signer, verify
from protocols.types import PeerId

DOMAIN: Final = "seeds"
MANTISSA_MAX: Final = 2**15 - 1
EXPONENT_MIN: Final = -127
EXPONENT_MAX: Final = 127
ROUND_MAX: Final = 2**32 - 1  # a round a second for a century

_HEAD: Final = struct.Struct("<BbH")
_BOUND: Final = struct.Struct("<Q")


@dataclass(frozen=True, slots=True)
class Scalars:
    """Some scalars, exactly as they travel. Index: p + P * step (decomfl), seed number (kseed)."""

    exponent: int
    mantissas: Mapping[int, int]
    """Those that are not zero, in order of the index."""

    def values(self) -> dict[int, float]:
        """The scalars that are not zero: exact in float64."""
        return {i: math.ldexp(m, self.exponent - 15) for i, m in self.mantissas.items()}


def quantise(values: Mapping[int, float]) -> Scalars:
    """The nearest scalars that travel; ties to even, too small ones become 0.

    Raises:
        ValueError: a value is not finite, or 2^126 and more.
    """
    largest = max((abs(value) for value in values.values()), default=0.0)
    if not all(map(math.isfinite, values.values())) or largest >= 2.0 ** (EXPONENT_MAX - 1):
        raise ValueError("a scalar is no number that can be sent")
    exponent = max(math.frexp(largest)[1], EXPONENT_MIN)  # largest < 2 ** exponent
    found = {i: round(math.ldexp(value, 15 - exponent)) for i, value in sorted(values.items())}
    if any(abs(m) > MANTISSA_MAX for m in found.values()):  # rounded up to 2 ** 15
        exponent += 1
        found = {i: round(math.ldexp(value, 15 - exponent)) for i, value in sorted(values.items())}
    found = {i: m for i, m in found.items() if m}
    return Scalars(exponent if found else EXPONENT_MIN, found)


def weight_code(weight: float) -> int:
    """The largest code whose weight is not above `weight`, which is at least 1."""
    if not weight >= 1:
        raise ValueError(f"a weight is at least 1, not {weight}")
    whole = int(min(weight, WEIGHT_MAX))
    if whole < 8:
        return whole
    shift = whole.bit_length() - 4
    return 8 * (shift + 1) + (whole >> shift) - 8


def weight_of(code: int) -> int:
    """What a weight's byte says: 0..7 themselves, then (8 + low three bits) * 2^(high - 1)."""
    return code if code < 8 else (8 + code % 8) << (code // 8 - 1)


@dataclass(frozen=True, slots=True)
class Reading:
    """A peer's entry of one round, checked."""

    peer: PeerId
    weight: int
    """At most the rules' `weight_max`."""
    scalars: Mapping[int, float]
    """Those that are not zero, by index; exact."""


def encode(
    rules: SeedRules, signer: Signer, head: bytes, number: int, weight: float, scalars: Scalars
) -> bytes:
    """One entry, signed. `head`: the log's hash at which the scalars were measured; `number`: the
    round that they are for.

    Raises:
        ValueError: an index or a scalar is out of the rules' bounds.
    """
    _check(rules, scalars)
    body = _HEAD.pack(weight_code(weight), scalars.exponent, number % 2**16)
    if rules.method == "kseed":
        bits = bytearray(rules.pool // 8)
        for index in scalars.mantissas:
            bits[index // 8] |= 1 << index % 8
        body += bytes(bits) + _integers(list(scalars.mantissas.values()))
    else:
        body += _integers([scalars.mantissas.get(i, 0) for i in range(rules.scalars)])
    return body + signer.sign(DOMAIN, _signed(rules, head, number, body))


def read(rules: SeedRules, peer: PeerId, number: int, entry: bytes) -> Reading:
    """Read an entry that `peer` is said to have made, without a look at its signature.

    Raises:
        RemoteProtocolError: naming `peer`: it is of another size, round or spelling than the
            rules', or beyond their bounds.
    """
    where = f"entry of round {number}"
    if not entry_bytes_min(rules) <= len(entry) <= entry_bytes_max(rules):
        raise RemoteProtocolError(peer, f"{where}: {len(entry)} bytes")
    body = entry[:-SIGNATURE_BYTES]
    code, exponent, said = _HEAD.unpack_from(body)
    if said != number % 2**16:
        raise RemoteProtocolError(peer, f"{where}: it is for another round (...{said})")
    if code == 0:
        raise RemoteProtocolError(peer, f"{where}: it has no weight")
    if exponent < EXPONENT_MIN:
        raise RemoteProtocolError(peer, f"{where}: no such exponent")
    scalars = Scalars(exponent, _read(rules, peer, where, body[_HEAD.size :]))
    try:
        _check(rules, scalars)
    except ValueError as error:
        raise RemoteProtocolError(peer, f"{where}: {error}") from None
    return Reading(peer, min(weight_of(code), rules.weight_max), scalars.values())


def decode(rules: SeedRules, peer: PeerId, head: bytes, number: int, entry: bytes) -> Reading:
    """Read an entry and check that `peer` signed it for this run, state (`head`) and round.

    Cost: one signature's verification, some 0.1 ms; all else is checked before.

    Raises:
        RemoteProtocolError: naming `peer`: like `read`, or the signature is wrong.
    """
    reading = read(rules, peer, number, entry)
    body, signature = entry[:-SIGNATURE_BYTES], entry[-SIGNATURE_BYTES:]
    if not verify(peer, DOMAIN, _signed(rules, head, number, body), signature):
        raise RemoteProtocolError(peer, f"entry of round {number}: wrong signature")
    return reading


def entry_bytes_max(rules: SeedRules) -> int:
    """The most bytes that one peer's entry can have."""
    bits = rules.pool // 8
    return _HEAD.size + bits + 2 * rules.scalars + SIGNATURE_BYTES


def entry_bytes_min(rules: SeedRules) -> int:
    """And the fewest."""
    return entry_bytes_max(rules) - (2 * rules.pool if rules.method == "kseed" else 0)


def _read(rules: SeedRules, peer: PeerId, where: str, body: bytes) -> dict[int, int]:
    if rules.method == "decomfl":
        numbers = struct.unpack(f"<{rules.scalars}h", body)
        return {i: m for i, m in enumerate(numbers) if m}
    bits, rest = body[: rules.pool // 8], body[rules.pool // 8 :]
    drawn = [8 * at + bit for at, byte in enumerate(bits) for bit in range(8) if byte >> bit & 1]
    if len(rest) != 2 * len(drawn):
        raise RemoteProtocolError(peer, f"{where}: {len(rest)} bytes for {len(drawn)} scalars")
    numbers = struct.unpack(f"<{len(drawn)}h", rest)
    if 0 in numbers:
        raise RemoteProtocolError(peer, f"{where}: a seed was drawn for nothing")
    return dict(zip(drawn, numbers, strict=True))


def _check(rules: SeedRules, scalars: Scalars) -> None:
    """Raises ValueError: not the one spelling, or out of the rules' bounds."""
    found = scalars.mantissas
    if any(not 0 <= index < rules.scalars for index in found):
        raise ValueError("a scalar that the rules have no place for")
    if any(abs(m) > MANTISSA_MAX for m in found.values()):
        raise ValueError("a scalar beyond its fifteen bits")
    largest = max((abs(m) for m in found.values()), default=0)
    if largest < 2**14 and scalars.exponent > EXPONENT_MIN:
        raise ValueError("another spelling of its scalars")
    if math.ldexp(largest, scalars.exponent - 15) > rules.scalar_max:
        raise ValueError(f"a scalar beyond {rules.scalar_max:g}")


def _integers(values: Sequence[int]) -> bytes:
    return struct.pack(f"<{len(values)}h", *values)


def _signed(rules: SeedRules, head: bytes, number: int, body: bytes) -> bytes:
    return rules.genesis + head + _BOUND.pack(number) + body
