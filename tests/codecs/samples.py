"""Chunks that codecs must survive, and frames built by hand to lie about themselves."""

from __future__ import annotations

import zlib
from typing import TYPE_CHECKING

import numpy as np

from tensorcodecs.frame import HEADER, MAGIC, VERSION, ZSTD

if TYPE_CHECKING:
    from collections.abc import Iterator

    from tensorcodecs.frame import Float32

LENGTHS = (0, 1, 3, 5, 63, 64, 65, 4095, 4096, 4097, 10_001, 65_535, 65_536, 65_537, 200_003)


def bell(numel: int, seed: int = 0) -> Float32:
    """Like a pseudo-gradient: Gaussian, with another spread in each block of 4096."""
    rng = np.random.default_rng(seed)
    spread = np.exp(rng.standard_normal(numel // 4096 + 1)).repeat(4096)[:numel]
    return (4e-3 * spread * rng.standard_normal(numel)).astype(np.float32)


def chunks(numel: int, seed: int) -> Iterator[tuple[str, Float32]]:
    """(what it is, chunk) of every kind, `numel` values each."""
    rng = np.random.default_rng(seed)
    sign = rng.choice(np.array([-1, 1], np.float32), numel)
    yield "bell", bell(numel, seed)
    yield "zeros", np.zeros(numel, np.float32)
    yield "minus zeros", np.full(numel, -0.0, np.float32)
    yield "constant", np.full(numel, -3.25, np.float32)
    yield "noise", rng.uniform(-1, 1, numel).astype(np.float32)
    yield "subnormal", (sign * rng.integers(0, 2**23, numel) * 2.0**-149).astype(np.float32)
    yield "wide", (sign * np.exp2(rng.uniform(-149, 63.9, numel))).astype(np.float32)
    yield "largest", (sign * 2.0**64).astype(np.float32)
    rare = np.zeros(numel, np.float32)
    rare[:: max(1, numel // 7)] = 1.5
    yield "rare", rare


def forge(codec: int, numel: int, block: int, body: bytes, mode: int = ZSTD) -> bytes:
    """A frame with a valid checksum, whatever it says."""
    head = HEADER.pack(MAGIC, VERSION, codec, mode, 0, numel, block, len(body), 0)
    return seal(head + body)


def seal(frame: bytes) -> bytes:
    """The same bytes with the right checksum."""
    checksum = zlib.crc32(frame[24:], zlib.crc32(frame[:20]))
    return frame[:20] + checksum.to_bytes(4, "little") + frame[24:]
