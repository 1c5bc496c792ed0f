"""Valid frames of every codec, mode and size, and what a liar may make of them.

Mostly the size and the checksum are put right again: what lies behind them is the target.
"""

from __future__ import annotations

import random
import struct
from collections.abc import Callable, Iterator, Sequence
from typing import Final, NamedTuple

import numpy as np

from tensorcodecs import CHUNK_VALUES, CODEC_NAMES, get_codec, plain
from tensorcodecs.ecsq import CODEC_ID as ECSQ
from tensorcodecs.ecsq import Ecsq
from tensorcodecs.frame import FIXED, HEADER, OWN, RAW, ZSTD, Float32, checksum_of
from tensorcodecs.int8 import Int8
from tests.codecs.samples import INT8, Parts, chunks, coded_int8

SMALL: Final = (
    0, 1, 2, 3, 31, 32, 33, 40, 63, 64, 65, 95, 96, 97, 100, 130, 192, 193, 200, 255, 256, 257,
    300, 383, 384, 385, 400, 511, 512, 513, 600, 700, 767, 768, 769, 1000, 1023, 1024, 1025, 1500,
    1535, 1536, 1537, 2000, 3000, 4095, 4096, 4097,
)  # fmt: skip
LARGE: Final = (5000, 8191, 8192, 12_287, 12_288, 12_289, 16_384, 20_000, 24_576, 24_577)
WHOLE: Final = (49_153, CHUNK_VALUES - 1, CHUNK_VALUES)

READERS: Final = CODEC_NAMES
"""Who reads what comes: every codec that a frame can name."""

_SIZE: Final = struct.Struct("<I")
_PAIR: Final = struct.Struct("<H")
_NUMEL_AT: Final = 12
_SIZE_AT: Final = 20
_CODES: Final = bytes([0, 1, 2, 3, 4, 7, 15, 16, 64, 119, 120, 121, 127, 128, 254, 255])
_WORDS: Final = (0, 1, 2, 3, 31, 32, 255, 256, 4095, 4096, 0x7FFF, 0x8000, 0xFFFE, 0xFFFF)


class Seed(NamedTuple):
    """A frame that its codec accepts, and where its parts are."""

    codec: str
    numel: int
    frame: bytes
    side: int
    """Scales, codebook: from here ..."""
    section: int
    """... to here, where the coded section starts (0: there is none): its stream sizes."""
    streams: int
    """How many; the number of literals follows them."""


def _seed(codec: str, numel: int, frame: bytes) -> Seed:
    """Where the parts of this frame are."""
    number, mode, bits = frame[8:11]
    side = section = HEADER.size
    length = 0
    if number == ECSQ and bits in (2, 3, 4) and mode in (RAW, ZSTD, FIXED, OWN):
        top = plain.top_of(bits)
        side += top + 1 if mode == OWN else 0
        section = side + 2 + 2 * top + plain.blocks_of(numel)
        length = plain.length_of(numel, plain.planes_of(bits))
    elif number == INT8:
        block = int.from_bytes(frame[16:20], "little")
        section += 4 * -(-numel // block) + (128 if mode == OWN else 0)
        length = numel
    coded = mode in (FIXED, OWN) and number in (ECSQ, INT8)
    streams = plain.streams_of(length)
    return Seed(codec, numel, frame, side, section if coded else 0, streams if coded else 0)


def _frames(name: str, x: Float32, extra: random.Random) -> Iterator[bytes]:
    codec = get_codec(name)
    yield codec.encode(x)
    if not len(x) or not np.abs(x).max() >= 2.0**-60:
        return
    if isinstance(codec, Ecsq):
        parts = Parts.of(codec, x)
        yield parts.frame(FIXED, extra.randrange(len(codec.shipped.tables)))
        yield parts.frame(extra.choice((RAW, ZSTD, OWN, OWN)))
        other = Ecsq(extra.choice((0.45, 0.7, 1.2, 3.0)))
        yield other.encode(x, seed=extra.choice((None, 1)))
    elif name == "sparse":
        yield get_codec(f"sparse:{extra.choice((1, 7, 300, 1024))}").encode(x)
    elif name == "high":
        yield coded_int8(x, extra.choice((64, 1024, 4096)))
        yield Int8(block=extra.choice((64, 256, 65_536))).encode(x)


def _seeds(rng: random.Random, sizes: Sequence[int], kinds: int) -> list[Seed]:
    """Frames of these many values: of `kinds` kinds of data, by every codec."""
    found = []
    for numel in sizes:
        for _, x in rng.sample(list(chunks(numel, seed=rng.randrange(2**32))), kinds):
            for name in READERS:
                found += [_seed(name, numel, frame) for frame in _frames(name, x, rng)]
    return found


class Mutator:
    """An endless supply of broken frames, the same for the same seed."""

    def __init__(self, seed: int, *, small_only: bool = False) -> None:
        self._rng = random.Random(seed)
        self._random = self._rng.random
        self._small = _seeds(self._rng, SMALL, kinds=5)
        large = () if small_only else LARGE
        whole = () if small_only else WHOLE
        self._large = _seeds(self._rng, large, kinds=2) or self._small
        self._whole = _seeds(self._rng, whole, kinds=1) or self._small
        self._readers: dict[int, list[str]] = {}
        for name in READERS:
            self._readers.setdefault(get_codec(name).codec_id, []).append(name)

    def seeds(self) -> Iterator[tuple[str, int, bytes]]:
        """The frames that it breaks, whole: their reader, their values, their bytes."""
        for seed in (*self._small, *self._large, *self._whole):
            yield seed.codec, seed.numel, seed.frame

    def frame(self) -> tuple[str, int, bytes]:
        """(who shall read it, how many values it should hold, the frame)."""
        random = self._random
        dice = random()
        of_size = self._small if dice < 0.97 else self._large if dice < 0.9985 else self._whole
        seed = of_size[int(random() * len(of_size))]
        broken = bytearray(seed.frame)
        for _ in range(1 + (random() < 0.4) + (random() < 0.15)):
            _TRICKS[int(random() * len(_TRICKS))](self, broken, seed)
        if len(broken) < HEADER.size:
            return seed.codec, seed.numel, bytes(broken)
        dice = random()
        if dice < 0.97:
            _SIZE.pack_into(broken, _SIZE_AT, len(broken) - HEADER.size)
        if dice < 0.95:
            _SIZE.pack_into(broken, 4, checksum_of(memoryview(broken)[8:]))
        numel = seed.numel
        (claimed,) = _SIZE.unpack_from(broken, _NUMEL_AT)
        if claimed <= CHUNK_VALUES and random() < 0.95:
            numel = claimed
        reader = seed.codec
        if broken[8] != seed.frame[8] and broken[8] in self._readers and random() < 0.9:
            names = self._readers[broken[8]]
            reader = names[int(random() * len(names))]
        return reader, numel, bytes(broken)

    def below(self, limit: int) -> int:
        """0 .. limit - 1."""
        return int(self._random() * limit)

    def other(self) -> Seed:
        """Any small frame."""
        return self._small[self.below(len(self._small))]


def _place(mutator: Mutator, broken: bytearray) -> int:
    """Anywhere, but the body's start more often than its size says."""
    if mutator.below(3) == 0:
        return mutator.below(min(len(broken), 64))
    return mutator.below(len(broken))


def _flip(mutator: Mutator, broken: bytearray, seed: Seed) -> None:
    if broken:
        broken[_place(mutator, broken)] ^= 1 << mutator.below(8)


def _replace(mutator: Mutator, broken: bytearray, seed: Seed) -> None:
    if broken:
        code = _CODES[mutator.below(len(_CODES))] if mutator.below(2) else mutator.below(256)
        broken[_place(mutator, broken)] = code


def _header(mutator: Mutator, broken: bytearray, seed: Seed) -> None:
    """Codec, mode, bits or table of another kind; or a whole header of another frame."""
    if len(broken) < HEADER.size:
        return
    if mutator.below(4) == 0:
        broken[8:20] = mutator.other().frame[8:20]
        if mutator.below(2):
            broken[_NUMEL_AT:16] = seed.frame[_NUMEL_AT:16]
    else:
        broken[8 + mutator.below(4)] = mutator.below(8)


def _numel(mutator: Mutator, broken: bytearray, seed: Seed) -> None:
    """A neighbouring or quite another number of values."""
    if len(broken) < HEADER.size:
        return
    dice = mutator.below(16)
    if dice < 8:
        numel = max(0, seed.numel + (-257, -33, -32, -1, 1, 32, 33, 257)[dice])
    elif dice < 15:
        numel = mutator.other().numel
    else:
        numel = mutator.below(2**17 if mutator.below(2) else 2**32)
    _SIZE.pack_into(broken, _NUMEL_AT, numel)


def _resize(mutator: Mutator, broken: bytearray, seed: Seed) -> None:
    """Something missing or left over at the end."""
    if mutator.below(2):
        del broken[max(0, len(broken) - 1 - mutator.below(1 + mutator.below(64))) :]
    elif mutator.below(8):
        broken += mutator.other().frame[-1 - mutator.below(1 + mutator.below(64)) :]
    else:
        del broken[mutator.below(len(broken) + 1) :]


def _splice(mutator: Mutator, broken: bytearray, seed: Seed) -> None:
    """Another frame's bytes over our own, or its end as ours."""
    other = mutator.other().frame
    if mutator.below(2):
        start, count = mutator.below(len(other)), 1 + mutator.below(64)
        at = mutator.below(len(broken) + 1)
        piece = other[start : start + count]
        broken[at : at + len(piece)] = piece
    else:
        cut = HEADER.size + mutator.below(max(1, min(len(broken), len(other)) - HEADER.size))
        broken[cut:] = other[cut:]


def _insert(mutator: Mutator, broken: bytearray, seed: Seed) -> None:
    """Bytes in between, too many or too few."""
    at, count = mutator.below(len(broken) + 1), 1 + mutator.below(8)
    if mutator.below(2):
        broken[at:at] = bytes([mutator.below(256)]) * count
    else:
        del broken[at : at + count]


def _side(mutator: Mutator, broken: bytearray, seed: Seed) -> None:
    """A scale, a codebook entry."""
    stop = min(len(broken), seed.section or seed.side + 40)
    if stop - 1 <= seed.side:
        _flip(mutator, broken, seed)
        return
    at = seed.side + mutator.below(stop - seed.side - 1)
    _PAIR.pack_into(broken, at, _WORDS[mutator.below(len(_WORDS))])


def _heads(broken: bytearray, seed: Seed) -> list[int] | None:
    """Sizes of streams and number of literals."""
    count = seed.streams + 1
    if not seed.section or len(broken) < seed.section + 2 * count:
        return None
    return list(struct.unpack_from(f"<{count}H", broken, seed.section))


def _put_heads(broken: bytearray, seed: Seed, heads: Sequence[int]) -> None:
    if len(broken) >= seed.section + 2 * len(heads):
        words = (head & 0xFFFF for head in heads)
        struct.pack_into(f"<{len(heads)}H", broken, seed.section, *words)


def _sizes(mutator: Mutator, broken: bytearray, seed: Seed) -> None:
    """Streams of other sizes: with the same sum, or with the bytes to make it right."""
    heads = _heads(broken, seed)
    if heads is None:
        _flip(mutator, broken, seed)
        return
    one = mutator.below(seed.streams)
    dice = mutator.below(8)
    if dice < 4 and seed.streams > 1:
        other = mutator.below(seed.streams)
        amount = 1 + mutator.below(1 + mutator.below(heads[one] + 1))
        heads[one] -= amount
        heads[other] += amount
    elif dice < 7:
        size = _WORDS[mutator.below(len(_WORDS))] if dice == 6 else heads[one] + mutator.below(40)
        missing = size - heads[one]
        heads[one] = size
        if missing > 0:
            end = len(broken)
            broken[end:end] = bytes([mutator.below(256)]) * missing
        elif len(broken) + missing > seed.section:
            del broken[len(broken) + missing :]
    else:
        heads[one] = _WORDS[mutator.below(len(_WORDS))]
    _put_heads(broken, seed, heads)


def _shift(mutator: Mutator, broken: bytearray, seed: Seed) -> None:
    """Random bits where the streams are."""
    start = seed.section + 2 * seed.streams + 2
    if not seed.section or len(broken) <= start:
        _flip(mutator, broken, seed)
        return
    for _ in range(1 + mutator.below(3)):
        broken[start + mutator.below(len(broken) - start)] = mutator.below(256)


def _literals(mutator: Mutator, broken: bytearray, seed: Seed) -> None:
    """More or fewer literals, mostly with the bytes that they take."""
    heads = _heads(broken, seed)
    if heads is None:
        _flip(mutator, broken, seed)
        return
    before = heads[-1]
    if mutator.below(4):
        heads[-1] = max(0, before + mutator.below(7) - 3)
    else:
        heads[-1] = _WORDS[mutator.below(len(_WORDS))]
    more = (3 * heads[-1] + 1) // 2 - (3 * before + 1) // 2
    if more > 0 and mutator.below(8):
        broken += bytes([mutator.below(256)]) * more
    elif more < 0 and len(broken) + more > seed.section:
        del broken[more:]
    _put_heads(broken, seed, heads)


def _table(mutator: Mutator, broken: bytearray, seed: Seed) -> None:
    """Another shipped table."""
    if len(broken) > 11:
        broken[11] = mutator.below(8)


def _own_table(mutator: Mutator, broken: bytearray, seed: Seed) -> None:
    """Other lengths or weights in a table that the body describes."""
    if not seed.section or broken[9:10] != bytes([OWN]) or len(broken) < seed.section:
        _flip(mutator, broken, seed)
        return
    if seed.frame[8] == INT8:
        count, start = 128, seed.section - 128
    else:
        count, start = seed.side - HEADER.size, HEADER.size
    one, other = start + mutator.below(count), start + mutator.below(count)
    if mutator.below(2):  # Kraft's sum stays
        broken[one], broken[other] = broken[other], broken[one]
    else:
        broken[one] = mutator.below(256)


# What a frame has no streams or table for becomes a flipped bit. Those named twice are twice as
# frequent.
_TRICKS: Final[tuple[Callable[[Mutator, bytearray, Seed], None], ...]] = (
    _flip, _flip, _replace, _replace, _header, _resize, _splice, _insert, _numel, _side, _side,
    _sizes, _sizes, _shift, _literals, _table, _own_table,
)  # fmt: skip
