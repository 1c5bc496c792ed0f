"""Whatever bytes a stranger sends: an error that says why, no sum changed, nothing allocated."""

from __future__ import annotations

import random
import struct
import tracemalloc
from typing import TYPE_CHECKING

import numpy as np
import pytest
import zstandard

from tensorcodecs import (
    FRAME_VALUES_MAX,
    VALUE_ABS_MAX,
    DecodeError,
    Ecsq,
    codec_of,
    get_codec,
    plain,
)
from tensorcodecs.frame import FIXED, HEADER, OWN, RAW, ZERO, ZSTD
from tensorcodecs.plain import STEP_MAX, STEP_MIN
from tests.codecs.samples import (
    BF16,
    DENSE,
    FP32,
    INT8,
    Parts,
    bell,
    coded_int8,
    forge,
    mended,
    numpy_alone,
    own_int8,
    section_of,
)

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

SMALL = 130  # values; long enough for two blocks of 64 and for zstd to pay
ECSQ_NAMES = ("q4", "low", "min")
ECSQ = 4


def ecsq(name: str) -> Ecsq:
    codec = get_codec(name)
    assert isinstance(codec, Ecsq)
    return codec


def small_frames() -> list[tuple[str, bytes]]:
    """(codec, frame): one of each codec in each mode that it has."""
    skewed = np.zeros(SMALL, np.float32)
    skewed[::9] = bell(15)
    frames = [(name, get_codec(name).encode(x)) for name in DENSE for x in (skewed, bell(SMALL))]
    for name in ECSQ_NAMES:
        parts = Parts.of(ecsq(name), bell(SMALL))
        frames += [(name, parts.frame(mode)) for mode in (RAW, ZSTD, FIXED, OWN)]
        frames.append((name, get_codec(name).encode(np.zeros(SMALL, np.float32))))
    frames.append(("high", coded_int8(bell(SMALL), 64)))
    found = {(frame[8], frame[9]) for _, frame in frames}
    assert found >= {(ECSQ, mode) for mode in (RAW, ZSTD, FIXED, OWN, ZERO)}
    assert found >= {(INT8, RAW), (INT8, OWN), (BF16, ZSTD), (FP32, ZSTD)}
    return frames


def refused(name: str, payload: bytes, match: str, numel: int = SMALL) -> None:
    """Compiled or not, both ways of reading must fail alike and leave the caller's sum alone."""
    codec = get_codec(name)
    acc = np.full(numel, 7, np.float32)
    with pytest.raises(DecodeError, match=match):
        codec.decode_into(payload, acc.copy())
    with pytest.raises(DecodeError, match=match):
        codec.accumulate(payload, 1.0, acc)
    with numpy_alone():
        with pytest.raises(DecodeError, match=match):
            codec.decode_into(payload, acc.copy())
        with pytest.raises(DecodeError, match=match):
            codec.accumulate(payload, 1.0, acc)
    assert np.all(acc == 7)


def refused_quickly(name: str, payload: bytes, match: str) -> None:
    """Only decode_into, compiled: for thousands of frames."""
    with pytest.raises(DecodeError, match=match):
        get_codec(name).decode_into(payload, np.empty(SMALL, np.float32))


def fault_of(name: str, payload: bytes, numel: int) -> str:
    """What is said against it, or "" if it is read: to finite values, the same both ways."""
    codec = get_codec(name)
    out, acc = np.empty(numel, np.float32), np.full(numel, 7, np.float32)
    try:
        codec.accumulate(payload, 1.0, acc)
    except DecodeError as error:
        assert np.all(acc == 7)
        return str(error)
    codec.decode_into(payload, out)
    assert np.isfinite(out).all()
    assert np.array_equal(acc, out + 7)
    return ""


def changed(frame: bytes, at: int, code: int) -> bytes:
    """With another byte at `at`, and the checksum mended."""
    other = bytearray(frame)
    other[at] = code
    return mended(bytes(other))


# ── the header ───────────────────────────────────────────────────────────────────────────
def test_every_truncation_is_refused() -> None:
    for name, frame in small_frames():
        for size in range(len(frame)):
            refused_quickly(name, frame[:size], "too few|announces")


def test_every_truncation_that_the_header_admits_is_refused_too() -> None:
    for name, frame in small_frames():
        for size in range(HEADER.size, len(frame)):
            refused_quickly(
                name,
                mended(frame[:size]),
                "raw plane|broken|unpacks|side data|add up|not complete|does not end|literals",
            )


def test_every_single_flipped_bit_is_refused() -> None:
    for name, frame in small_frames():
        for bit in range(8 * len(frame)):
            flipped = bytearray(frame)
            flipped[bit // 8] ^= 1 << bit % 8
            refused_quickly(name, bytes(flipped), "frame|announces|checksum")


def test_trailing_bytes_are_refused() -> None:
    for name, frame in small_frames():
        refused(name, frame + b"\0", "announces")


def test_trailing_bytes_that_the_header_admits_are_refused_too() -> None:
    for name, frame in small_frames():
        refused(name, mended(frame + b"\0"), "raw plane|broken|add up|zero frame with a body")


@pytest.mark.parametrize("numel", [0, 1, SMALL - 1, SMALL + 1, 65_536])
def test_another_length_than_expected_is_refused(numel: int) -> None:
    for name, frame in small_frames():
        refused(name, frame, f"a frame of {SMALL} values, expected {numel}", numel)


@pytest.mark.parametrize("numel", [0, 5000, 65_536])
def test_a_header_that_lies_about_the_values_is_refused(numel: int) -> None:
    for name, frame in small_frames():
        if frame[9] == ZERO:
            continue  # that is no lie
        other = bytearray(frame)
        struct.pack_into("<I", other, 12, numel)
        refused(
            name, mended(bytes(other)),
            "raw plane|unpacks|side data|add up|does not end|literals|padding|no encoder|broken"
            "|the scale of block|not allowed|Kraft",
            numel,
        )  # fmt: skip


def test_a_frame_of_more_values_than_anybody_sends_is_refused() -> None:
    for name, frame in small_frames():
        other = bytearray(frame)
        struct.pack_into("<I", other, 12, FRAME_VALUES_MAX + 1)
        refused(name, mended(bytes(other)), f"a frame of {FRAME_VALUES_MAX + 1} values; at most")


@pytest.mark.parametrize(
    ("offset", "value", "match"),
    [
        (0, 0x54, "not a frame"),
        (3, 2, "frame version 2"),
        (8, 9, "a frame of codec 9"),
        (9, 5, "mode 5 is not known"),
        (9, 255, "mode 255 is not known"),
    ],
)
def test_a_header_from_elsewhere_is_refused(offset: int, value: int, match: str) -> None:
    for name, frame in small_frames():
        if frame[9] != ZERO:
            refused(name, changed(frame, offset, value), match)


@pytest.mark.parametrize("mode", range(8))
def test_a_body_of_another_mode_is_refused(mode: int) -> None:
    for name, frame in small_frames():
        if frame[9] not in {mode, ZERO}:
            refused(
                name, changed(frame, 9, mode),
                "mode|table|raw plane|broken|add up|does not end|literals|zero frame|no encoder",
            )  # fmt: skip


def test_bits_and_tables_where_there_are_none_are_refused() -> None:
    for name, frame in small_frames():
        if frame[8] != ECSQ:
            refused(name, changed(frame, 10, 4), "4 bits and table 0 make no sense")
            refused(name, changed(frame, 11, 1), "0 bits and table 1 make no sense")


@pytest.mark.parametrize("bits", [0, 1, 5, 8, 255])
def test_levels_of_other_bits_are_refused(bits: int) -> None:
    for name, frame in small_frames():
        if frame[8] == ECSQ and frame[9] != ZERO:
            refused(name, changed(frame, 10, bits), f"levels of {bits} bits")


def test_levels_of_the_wrong_bits_are_refused() -> None:
    for name, frame in small_frames():
        for bits in {2, 3, 4} - {frame[10]}:
            if frame[8] == ECSQ and frame[9] != ZERO:
                refused(
                    name, changed(frame, 10, bits),
                    "raw plane|unpacks|broken|add up|does not end|literals|no encoder|padding",
                )  # fmt: skip


def test_a_table_that_was_not_shipped_is_refused() -> None:
    for name in ECSQ_NAMES:
        parts = Parts.of(ecsq(name), bell(SMALL))
        for table in (len(ecsq(name).shipped.tables), 255):
            refused(name, changed(parts.frame(FIXED), 11, table), f"table {table} is not known")
        refused(name, changed(parts.frame(OWN), 11, 1), "table")
        for mode in (RAW, ZSTD):
            refused(name, changed(parts.frame(mode), 11, 1), "table 1 is not known")


def test_a_zero_frame_has_nothing_more_to_say() -> None:
    for name in ECSQ_NAMES:
        zero = get_codec(name).encode(np.zeros(SMALL, np.float32))
        refused(name, changed(zero, 11, 1), "a zero frame with a body")
        refused(name, mended(zero + b"\0"), "a zero frame with a body")


# ── scales and codebooks ─────────────────────────────────────────────────────────────────
def raw_ecsq(bits: int, peak: int, entries: Sequence[int], codes: bytes, mode: int = RAW) -> bytes:
    """SMALL zeros with this side data."""
    side = struct.pack(f"<h{len(entries)}h", peak, *entries) + codes
    if mode == RAW:
        level = plain.top_of(bits)
        digits = np.full(SMALL, level, np.uint8)
        body = plain.pack_digits(digits, bits).tobytes()
    else:
        parts = Parts.of(ecsq({4: "q4", 3: "low", 2: "min"}[bits]), bell(SMALL))
        frame = parts.frame(FIXED)
        body = frame[parts.section :]
    return forge(ECSQ, SMALL, 0, side + body, mode, bits=bits)


@pytest.mark.parametrize("mode", [RAW, FIXED])
@pytest.mark.parametrize("bits", [2, 3, 4])
def test_a_scale_that_no_encoder_sends_is_refused(bits: int, mode: int) -> None:
    name = {4: "q4", 3: "low", 2: "min"}[bits]
    entries = [0] * plain.top_of(bits)
    out = np.empty(SMALL, np.float32)
    for peak, code in ((STEP_MAX, 0), (STEP_MIN, 0), (STEP_MIN + 254, 254), (STEP_MIN, 255)):
        get_codec(name).decode_into(raw_ecsq(bits, peak, entries, bytes([code]), mode), out)
        assert np.isfinite(out).all()
    for peak, code in (
        (STEP_MAX + 1, 0), (STEP_MIN - 1, 0), (2**15 - 1, 0), (-(2**15), 255), (-(2**15), 0),
        (STEP_MIN, 1), (STEP_MIN + 253, 254), (STEP_MIN + 100, 200),
    ):  # fmt: skip
        refused(name, raw_ecsq(bits, peak, entries, bytes([code]), mode), "no encoder sends")


@pytest.mark.parametrize("mode", [RAW, FIXED])
@pytest.mark.parametrize("bits", [2, 3, 4])
def test_a_codebook_that_no_encoder_sends_is_refused(bits: int, mode: int) -> None:
    name, top = {4: "q4", 3: "low", 2: "min"}[bits], plain.top_of(bits)
    out = np.empty(SMALL, np.float32)
    for level in range(top):
        low, high = -4096 * (level + 1), min(4096 * (15 - level), 2**15 - 1)
        for entry, good in ((low, True), (low - 1, False), (high, True), (-(2**15), level == 7)):
            entries = [0] * top
            entries[level] = entry
            frame = raw_ecsq(bits, 0, entries, b"\0", mode)
            if good:
                get_codec(name).decode_into(frame, out)
            else:
                refused(name, frame, "no encoder sends")


@pytest.mark.parametrize("block", [0, 1, 63, 65, 100, 131_072, 2**31, 2**32 - 1])
def test_a_block_size_that_nobody_sends_is_refused(block: int) -> None:
    refused("high", forge(INT8, SMALL, block, bytes(4 + SMALL), RAW), "blocks of")


def test_blocks_in_a_codec_without_blocks_are_refused() -> None:
    refused("bf16", forge(BF16, SMALL, 64, bytes(2 * SMALL), RAW), "no blocks")


@pytest.mark.parametrize(
    "scale", [np.nan, np.inf, -np.inf, -1.0, 1e-45, 2.0**-110, VALUE_ABS_MAX, 3e38]
)
def test_a_scale_that_nobody_sends_is_refused(scale: float) -> None:
    body = struct.pack("<f", scale) + bytes(SMALL)
    refused("high", forge(INT8, SMALL, 4096, body, RAW), "scale of block 0")


@pytest.mark.parametrize("bits", [0x7F800000, 0xFF800000, 0x7FC00000, 0xFFFFFFFF, 0x60000000])
def test_values_that_are_not_finite_are_refused(bits: int) -> None:
    planes = [bytes([bits >> shift & 0xFF]) * SMALL for shift in (0, 8, 16, 24)]
    refused("fp32", forge(FP32, SMALL, 0, b"".join(planes), RAW), "beyond 2")
    refused("bf16", forge(BF16, SMALL, 0, b"".join(planes[2:]), RAW), "beyond 2")


@pytest.mark.parametrize(("name", "numel"), [("q4", 129), ("low", 129), ("min", 129), ("min", 131)])
def test_padding_that_is_not_zero_is_refused(name: str, numel: int) -> None:
    frame = bytearray(Parts.of(ecsq(name), bell(numel)).frame(RAW))
    frame[-1] |= 0x80
    refused(name, mended(bytes(frame)), "padding", numel)


# ── coded sections ───────────────────────────────────────────────────────────────────────
class Section:
    """A frame with a coded section whose head can be lied about."""

    def __init__(self, name: str, frame: bytes, start: int, length: int) -> None:
        self.name, self.frame, self.start = name, frame, start
        self.numel = int.from_bytes(frame[12:16], "little")
        self.each = plain.symbols_each(length)
        self.streams = plain.streams_of(length)
        *self.sizes, self.literals = struct.unpack_from(f"<{self.streams + 1}H", frame, start)
        self.rest = frame[start + 2 * self.streams + 2 :]

    def lie(self, sizes: Sequence[int], literals: int, rest: bytes) -> bytes:
        """The frame with another section, size and checksum mended."""
        return mended(self.frame[: self.start] + section_of(sizes, literals, rest))

    def refused(self, match: str, sizes: Sequence[int], literals: int, rest: bytes) -> None:
        refused(self.name, self.lie(sizes, literals, rest), match, self.numel)


def sections() -> Iterator[Section]:
    """Of one, four and sixteen streams, with literals and without, of every reader."""
    for numel in (SMALL, 5000, 20_000):
        x = np.random.default_rng(numel).standard_normal(numel).astype(np.float32)
        for name in ECSQ_NAMES:
            codec = ecsq(name)
            parts = Parts.of(codec, x)
            length = plain.length_of(numel, plain.planes_of(codec.bits))
            yield Section(name, parts.frame(FIXED), parts.section, length)
            own = parts.section + plain.top_of(codec.bits) + 1
            yield Section(name, parts.frame(OWN), own, length)
        start = HEADER.size + 4 * -(-numel // 4096) + 128
        yield Section("high", coded_int8(x), start, numel)


SECTIONS = list(sections())
each_section = pytest.mark.parametrize(
    "section", SECTIONS, ids=[f"{s.name}-{s.frame[9]}-{s.streams}" for s in SECTIONS]
)


def test_the_sections_to_lie_about_are_of_every_kind() -> None:
    assert {s.streams for s in SECTIONS} == {1, 4, 16}
    assert {s.frame[9] for s in SECTIONS} == {FIXED, OWN}
    assert {s.literals > 1 for s in SECTIONS} == {False, True}
    for s in SECTIONS:  # as they are, they are read
        get_codec(s.name).decode_into(
            s.lie(s.sizes, s.literals, s.rest), np.empty(s.numel, np.float32)
        )


@each_section
def test_a_stream_longer_or_shorter_than_its_symbols_is_refused(section: Section) -> None:
    for stream in {0, section.streams // 2, section.streams - 1}:
        for amount in (1, 2, -1, -2):
            sizes = list(section.sizes)
            sizes[stream] += amount
            section.refused("add up", sizes, section.literals, section.rest)
            end = sum(section.sizes[: stream + 1])
            if amount > 0:
                rest = section.rest[:end] + bytes(amount) + section.rest[end:]
            else:
                rest = section.rest[: end + amount] + section.rest[end:]
            section.refused("does not end|literals", sizes, section.literals, rest)


@each_section
def test_a_byte_that_moves_to_the_next_stream_is_refused(section: Section) -> None:
    for stream in range(0, section.streams - 1, 3):
        sizes = list(section.sizes)
        sizes[stream] -= 1
        sizes[stream + 1] += 1
        section.refused("does not end|literals", sizes, section.literals, section.rest)


@each_section
def test_streams_of_more_than_their_longest_codes_are_refused_unread(section: Section) -> None:
    """A reader that copied them into a buffer of its own size would write far beyond its end."""
    longest = (section.each * 13 + 7) // 8
    for size in (longest + 1, 2**15, 2**16 - 1):
        for last in (size, 1):
            sizes = [size] * (section.streams - 1) + [last]
            if max(sizes) > longest:
                rest = b"\x5a" * sum(sizes)
                section.refused("add up", sizes, 0, rest)


@each_section
def test_streams_of_nothing_are_refused(section: Section) -> None:
    section.refused("does not end", [0] * section.streams, 0, b"")
    section.refused("add up", [0] * section.streams, 0, b"\0")
    one = [1] + [0] * (section.streams - 1)
    section.refused("does not end", one, 0, b"\0")


@each_section
def test_bits_behind_the_last_symbol_are_refused(section: Section) -> None:
    end, accepted = 0, 0
    for size in section.sizes:
        end += size
        rest = bytearray(section.rest)
        rest[end - 1] ^= 0x80
        frame = section.lie(section.sizes, section.literals, bytes(rest))
        # Where the last bit belongs to a symbol, it may make another one as long.
        fault = fault_of(section.name, frame, section.numel)
        assert "does not end" in fault or "literals" in fault or not fault
        accepted += not fault
    assert accepted < section.streams or section.streams == 1


@each_section
def test_more_or_fewer_literals_than_escapes_are_refused(section: Section) -> None:
    before = (3 * section.literals + 1) // 2
    streams = section.rest[: len(section.rest) - before]
    literals = section.rest[len(streams) :]
    for count in {0, 1, 2, 3, section.literals - 1, section.literals + 1, section.literals + 2,
                  section.each * 16, 2**16 - 1}:  # fmt: skip
        if count != section.literals and count >= 0:
            size = (3 * count + 1) // 2
            rest = streams + literals[:size].ljust(size, b"\0")
            section.refused("literals", section.sizes, count, rest)
            section.refused("add up|literals", section.sizes, count, section.rest + b"\0\0")


def test_literals_of_any_value_are_harmless() -> None:
    section = next(s for s in SECTIONS if s.literals > 4)
    size = (3 * section.literals + 1) // 2
    out, codec = np.empty(section.numel, np.float32), get_codec(section.name)
    for filling in (b"\xff", b"\0", b"\x5a"):
        rest = section.rest[:-size] + filling * size
        frame = section.lie(section.sizes, section.literals, rest)
        codec.decode_into(frame, out)
        assert np.isfinite(out).all()
        compiled = out.copy()
        with numpy_alone():
            codec.decode_into(frame, out)
        assert np.array_equal(out, compiled)


@each_section
def test_a_section_that_is_cut_short_is_refused(section: Section) -> None:
    whole = section.frame
    for size in {section.start, section.start + 1, section.start + 2 * section.streams + 1,
                 len(whole) - 1, (section.start + len(whole)) // 2}:  # fmt: skip
        refused(section.name, mended(whole[:size]), "add up", section.numel)
    refused(section.name, mended(whole + b"\0"), "add up", section.numel)


@each_section
def test_random_bits_in_streams_are_refused_or_harmless(section: Section) -> None:
    """Streams that end where they should with other symbols are rare, but no fault."""
    rng = random.Random(section.start)
    for _ in range(60):
        rest = bytearray(section.rest)
        for _ in range(rng.randint(1, 3)):
            rest[rng.randrange(len(rest))] = rng.randrange(256)
        frame = section.lie(section.sizes, section.literals, bytes(rest))
        fault = fault_of(section.name, frame, section.numel)
        assert not fault or any(word in fault for word in ("does not end", "literals", "127"))


# ── own tables ───────────────────────────────────────────────────────────────────────────
def test_lengths_that_are_no_code_are_refused() -> None:
    frame = coded_int8(bell(SMALL))
    table = HEADER.size + 4
    pairs = frame[table : table + 128]
    for nibbles in (0xEE, 0xFF):
        refused("high", changed(frame, table, nibbles), "not allowed")
    for nibbles in (0x00, 0x11):
        refused("high", changed(frame, table, nibbles), "Kraft")
    refused("high", mended(frame[:table] + bytes(128) + frame[table + 128 :]), "not allowed")
    refused("high", mended(frame[:table] + b"\x88" * 127 + b"\x89" + frame[table + 128 :]), "Kraft")
    for at in range(128):
        longer = pairs[at] + (1 if pairs[at] & 15 < 13 else -1)
        refused_quickly("high", changed(frame, table + at, longer), "Kraft")
    for size in (0, 1, 127):
        refused("high", mended(frame[: table + size]), "not complete")


def test_weights_of_any_bytes_make_a_table() -> None:
    """The streams were written with another: not exactly as long, or harmless."""
    rng = random.Random(1)
    for name in ECSQ_NAMES:
        frame = Parts.of(ecsq(name), bell(SMALL)).frame(OWN)
        count = plain.top_of(frame[10]) + 1
        for _ in range(30):
            some = (0, 1, 119, 120, 121, 255, rng.randrange(256))
            weights = bytes(rng.choice(some) for _ in range(count))
            other = mended(frame[: HEADER.size] + weights + frame[HEADER.size + count :])
            fault = fault_of(name, other, SMALL)
            assert not fault or "does not end" in fault or "literals" in fault
        for size in range(count):
            refused(name, mended(frame[: HEADER.size + size]), "not complete")


def test_a_level_beyond_127_is_refused() -> None:
    scale = np.ones(1, np.float32)
    for symbol, good in ((0, True), (254, True), (255, False)):
        symbols = np.full(SMALL, 127, np.uint16)
        symbols[-1] = symbol
        frame = own_int8(scale, symbols, np.bincount(symbols, minlength=256), 4096)
        if good:
            out = np.empty(SMALL, np.float32)
            get_codec("high").decode_into(frame, out)
            assert out[-1] == symbol - 127
        else:
            refused("high", frame, "beyond 127")


# ── zstd ─────────────────────────────────────────────────────────────────────────────────
def zstd_frame(size: int, *, declared: int | None = None, window_log: int = 20) -> bytes:
    """`size` zeros, in a frame whose zstd header declares `declared` bytes, or no size at all."""
    parameters = zstandard.ZstdCompressionParameters.from_level(
        1, window_log=window_log, write_content_size=declared is not None
    )
    compressor = zstandard.ZstdCompressor(compression_params=parameters)
    stream = compressor.compressobj(-1 if declared is None else size)
    piece = bytes(2**16)
    parts = [stream.compress(piece) for _ in range(size // len(piece))]
    frame = bytearray(b"".join([*parts, stream.compress(bytes(size % len(piece))), stream.flush()]))
    if declared is not None:
        width = zstandard.frame_header_size(bytes(frame)) - 6  # magic, descriptor, window, size
        assert width in {4, 8}
        frame[6 : 6 + width] = declared.to_bytes(width, "little")
    return bytes(frame)


@pytest.mark.parametrize("declared", [2**28, 65_536, 65_535, None])
def test_a_zstd_bomb_is_refused_without_allocating(declared: int | None) -> None:
    bomb = forge(INT8, 65_536, 65_536, struct.pack("<f", 1) + zstd_frame(2**28, declared=declared))
    assert len(bomb) < 2**16
    out = np.full(65_536, 7, np.float32)
    codec = get_codec("high")
    codec.decode_into(codec.encode(out), out)  # this thread's scratch is not the bomb's doing
    tracemalloc.start()
    try:
        with pytest.raises(DecodeError, match="compressed plane"):
            codec.decode_into(bomb, out)
        _, peak_bytes = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak_bytes < 2**18


def test_zstd_frames_that_hide_more_data_are_refused() -> None:
    plane = zstandard.ZstdCompressor().compress(bytes(SMALL))
    skippable = struct.pack("<II", 0x184D2A50, 4) + b"more"
    scale = struct.pack("<f", 1)
    get_codec("high").decode_into(
        forge(INT8, SMALL, 4096, scale + plane), np.empty(SMALL, np.float32)
    )
    for body in (plane + plane, plane + skippable, skippable + plane, plane + b"\0", plane[:-1]):
        refused("high", forge(INT8, SMALL, 4096, scale + body), "compressed plane")


def test_what_a_frame_makes_python_allocate_is_bounded() -> None:
    """Huge claims in small frames; each is read once before, so that caches are warm."""
    x = bell(SMALL)
    frames = [
        forge(ECSQ, 98_304, 0, bytes(100), FIXED, bits=4),
        forge(ECSQ, 98_304, 0, bytes(100), OWN, bits=2),
        forge(ECSQ, 98_304, 0, bytes(100), ZSTD, bits=3),
        forge(INT8, 98_304, 64, bytes(100), RAW),
        forge(INT8, 98_304, 65_536, bytes(200), OWN),
        forge(FP32, FRAME_VALUES_MAX, 0, bytes(100), ZSTD),
        changed(coded_int8(x), 13, 0x7F),
    ]
    for frame in frames:
        numel = int.from_bytes(frame[12:16], "little")
        out = np.empty(numel, np.float32)
        for _ in range(2):
            tracemalloc.start()
            try:
                with pytest.raises(DecodeError):
                    codec_of(frame).decode_into(frame, out)
                _, peak_bytes = tracemalloc.get_traced_memory()
            finally:
                tracemalloc.stop()
        assert peak_bytes < 2**16
