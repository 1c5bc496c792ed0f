"""One unit's coded bytes where mixes with other groups ride along with the mean.

    b"MIX1"  u32 bytes of the mean  u8 mixes
    per mix: u64 id  u64 until  i8 sign  u32 bytes
    the mean (or nothing: no change), then each mix's payload

All little-endian. A unit without mixes is its mean and nothing else, so a reader who has never
heard of gossip reads those. Contributions and outcomes use the same form; content digests, pushes,
fetches and journals need not know.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from protocols import limits
from tensorcodecs import DecodeError

MAGIC: Final = b"MIX1"
_HEAD: Final = struct.Struct("<4sIB")
_ENTRY: Final = struct.Struct("<QQbI")


@dataclass(frozen=True, slots=True)
class Mix:
    """A mix's part of one unit: what it adds (sign 1) or takes away (-1)."""

    id: int
    until: int
    """The last round whose outcome may contain it."""
    sign: int
    payload: bytes


def compose(mean: bytes, mixes: Sequence[Mix]) -> bytes:
    """The unit's bytes; `mean` itself where nothing rides along."""
    if not mixes:
        return mean
    if len(mixes) > limits.MIXES_PER_UNIT_MAX:
        raise ValueError(f"{len(mixes)} mixes in a unit")
    entries = [_ENTRY.pack(m.id, m.until, m.sign, len(m.payload)) for m in mixes]
    head = _HEAD.pack(MAGIC, len(mean), len(mixes))
    return b"".join([head, *entries, mean, *(m.payload for m in mixes)])


def split(payload: bytes) -> tuple[bytes, tuple[Mix, ...]]:
    """(mean, mixes) of a unit's bytes.

    Raises:
        DecodeError: lengths that don't add up, too many mixes, one twice, or nonsense in them.
    """
    if payload[:4] != MAGIC:
        return payload, ()
    if len(payload) < _HEAD.size:
        raise DecodeError("a unit with mixes that is cut short")
    _, size, count = _HEAD.unpack_from(payload)
    at = _HEAD.size + count * _ENTRY.size
    if not 1 <= count <= limits.MIXES_PER_UNIT_MAX or len(payload) < at + size:
        raise DecodeError(f"{count} mixes and a mean of {size} bytes in {len(payload)}")
    mean = payload[at : at + size]
    at += size
    found: list[Mix] = []
    for index in range(count):
        entry = _ENTRY.unpack_from(payload, _HEAD.size + index * _ENTRY.size)
        number, until, sign, length = entry
        if sign not in (1, -1) or not 0 < number < 2**63 or not 0 < until < 2**63:
            raise DecodeError(f"a mix {number} of sign {sign} until round {until}")
        if len(payload) - at < length:
            raise DecodeError("a mix that is cut short")
        found.append(Mix(number, until, sign, payload[at : at + length]))
        at += length
    if at != len(payload):
        raise DecodeError("bytes left over after the last mix")
    if len({mix.id for mix in found}) != count or mean[:4] == MAGIC:
        raise DecodeError("a mix that is there twice, or within another")
    return mean, tuple(found)


def has_mixes(payload: bytes) -> bool:
    return payload[:4] == MAGIC
