"""The two-level codec on a GPU (Triton): the frames of `Ecsq.encode_many`, byte for byte.

Only coded bytes cross between GPU and host. A vector is cut into chunks as everywhere; whole chunks
are quantised, coded, decoded and added up where they are. The host writes and checks headers and
checksums. What is rare goes by way of the host's own code: a last short chunk, chunks that want a
code table of their own or are smaller raw, and received raw and zstd planes.

`gpu_levels` and `gpu_streams` are what the device runs. Nothing is written to the caller's tensor
before all frames of a call were found good.

Shape suffixes: N = values, U = chunks, G = received chunks of one width, B = blocks of 256,
T = symbols (or tables), L = magnitudes, S = streams.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache, partial
from typing import TYPE_CHECKING, Any, Final

import numpy as np
import numpy.typing as npt

try:
    import torch
    import triton  # type: ignore[import-untyped, unused-ignore]
except ImportError as error:
    raise ImportError(
        f"tensorcodecs.gpu needs torch and triton ({error}): "
        "pip install torch triton, or use the codecs on the CPU"
    ) from error

from tensorcodecs import plain
from tensorcodecs.ecsq import CODEC_ID, Ecsq, kind_of, shipped_tables
from tensorcodecs.errors import DecodeError, EncodeError
from tensorcodecs.frame import (
    COMPILED_FROM,
    FIXED,
    HEADER,
    OWN,
    ZERO,
    Frame,
    Payload,
    refuse_values,
    seal,
)
from tensorcodecs.gpu_host import receive, seal_all
from tensorcodecs.gpu_levels import describe_kernel, expand_kernel, quantise_kernel, scale_kernel
from tensorcodecs.gpu_streams import (
    NO_FAULT,
    check_kernel,
    decode_kernel,
    encode_kernel,
    join_kernel,
)
from tensorcodecs.huffman import LENGTH_MAX, Table, level_table, shown_weights
from tensorcodecs.layout import CHUNK_VALUES

if TYPE_CHECKING:
    from collections.abc import Sequence

CHUNK_STEP: Final = 3072
"""What a chunk's size must be a multiple of here: all widths then pack into whole blocks."""

_SLAB: Final = 1024  # chunks coded at a time: 400 MB of values, 160 MB of scratch
_LANES: Final = 32  # streams of one program
_ROWS: Final = 4  # blocks per plane that one program quantises or expands
_SUM_ROWS: Final = 16  # blocks that one program sums up
_INFO: Final = 12  # per chunk: peak, table, cost, bytes, eight counts
_WIDTHS: Final = (2, 3, 4)
_PRECISE: Final[dict[str, Any]] = {"enable_fp_fusion": False}  # no fused multiply-add


# ── encoding ─────────────────────────────────────────────────────────────────────────────────
@dataclass(frozen=True, slots=True)
class Coded:
    """Bodies of frames on the device, with room for a header before each."""

    packed: torch.Tensor
    start_U: torch.Tensor
    """Where each body starts in `packed`."""
    info_U: torch.Tensor
    """Peak, table, cost of the sample, bytes; then the sample's counts of eight magnitudes."""


def encode_many(codec: Ecsq, x_N: torch.Tensor, *, chunk: int = CHUNK_VALUES) -> list[bytes]:
    """What `codec.encode_many` would give for these values (N,): a frame for every `chunk` of them.

    `chunk` is `CHUNK_VALUES` for everything that others should read; tests take smaller ones.

    Raises:
        EncodeError: a value is NaN, infinite or beyond `VALUE_ABS_MAX`; says which.
        ValueError: not a contiguous float32 vector on a GPU.
    """
    _require(x_N, chunk)
    frames: list[bytes] = []
    whole = len(x_N) // chunk
    for first in range(0, whole, _SLAB):
        units = min(_SLAB, whole - first)
        piece = x_N[first * chunk : (first + units) * chunk]
        frames += _frames_of(codec, code(codec, piece, chunk=chunk), piece, first * chunk, chunk)
    if whole * chunk < len(x_N):
        frames.append(_encode_on_host(codec, x_N[whole * chunk :], whole * chunk))
    return frames


def code(codec: Ecsq, x_N: torch.Tensor, *, chunk: int = CHUNK_VALUES) -> Coded:
    """The device's part of `encode_many`, without waiting for it: whole chunks, at most 1024.

    A chunk that must be refused (its peak says so) has a body of nonsense.
    """
    bits = codec.bits
    blocks, units = chunk // plain.BLOCK, len(x_N) // chunk
    length = chunk // plain.planes_of(bits)
    streams, each = plain.streams_of(length), plain.symbols_each(length)
    side = 2 + 2 * plain.top_of(bits) + blocks
    pitch = (each * LENGTH_MAX + 31) // 32
    most = side + 2 * streams + 2 + 4 * pitch * streams + 2 * length
    constants = _constants(bits, x_N.device)
    tables = len(constants.cost_TL)
    empty = partial(torch.empty, device=x_N.device)
    step_B = empty(units * blocks, dtype=torch.int32)
    inverse_B = empty(units * blocks, dtype=torch.float32)
    side_U = empty(units * side, dtype=torch.uint8)
    info_U = torch.zeros((units, _INFO), dtype=torch.int32, device=x_N.device)
    symbol_T = empty(units * length, dtype=torch.int16)
    word_S = empty(units * streams * pitch, dtype=torch.int32)
    bits_S = empty(units * streams, dtype=torch.int32)
    literals_S = empty(units * streams, dtype=torch.int32)
    packed = empty(units * (HEADER.size + most), dtype=torch.uint8)
    with torch.cuda.device_of(x_N):  # type: ignore[no-untyped-call]
        scale_kernel[(triton.cdiv(units * blocks, _SUM_ROWS),)](
            x_N, step_B, units, float(codec.square / np.float32(plain.BLOCK)), float(codec.reach),
            blocks, _SUM_ROWS, num_warps=4, **_PRECISE,
        )  # fmt: skip
        describe_kernel[(units,)](
            x_N, step_B, constants.cost_TL, inverse_B, side_U, info_U, chunk, bits,
            tables, triton.next_power_of_2(tables), triton.next_power_of_2(blocks),
            triton.next_power_of_2(-(-blocks // plain.SAMPLE)), _INFO, num_warps=8, **_PRECISE,
        )  # fmt: skip
        quantise_kernel[(units * triton.cdiv(length // plain.BLOCK, _ROWS),)](
            x_N, inverse_B, symbol_T, chunk, bits, _ROWS, num_warps=4, **_PRECISE
        )
        encode_kernel[(triton.cdiv(units * streams, _LANES),)](
            symbol_T.view(torch.int64), symbol_T, constants.entry_TS, info_U, word_S, bits_S,
            literals_S, units, each, streams, pitch, _INFO, _LANES, num_warps=1, **_PRECISE,
        )  # fmt: skip
        bytes_US = (bits_S.view(units, streams) + 7) >> 3
        literal_bytes_U = (literals_S.view(units, streams).sum(1) * 3 + 1) >> 1
        size_U = bytes_US.sum(1) + literal_bytes_U + (side + 2 * streams + 2)
        start_U = (size_U + HEADER.size).cumsum(0) - size_U
        info_U[:, 3] = size_U
        join_kernel[(units * (streams + 1),)](
            side_U, word_S.view(torch.uint8), bits_S, symbol_T, literals_S, start_U, packed,
            side, triton.next_power_of_2(side), each, streams, pitch, 256, num_warps=4, **_PRECISE,
        )  # fmt: skip
    return Coded(packed, start_U, info_U)


def _frames_of(codec: Ecsq, coded: Coded, x_N: torch.Tensor, first: int, chunk: int) -> list[bytes]:
    """Headers and checksums; unusual chunks coded anew by the host. `first`: of x_N's values."""
    info_U = coded.info_U.cpu().numpy()
    refused_U = np.flatnonzero(info_U[:, 0] == plain.REFUSED)
    if len(refused_U):
        at = int(refused_U[0]) * chunk
        error = refuse_values(x_N[at : at + chunk].cpu().numpy())
        raise EncodeError(first + at + error.index, error.value)
    stop_U = np.cumsum(info_U[:, 3].astype(np.int64) + HEADER.size)
    data = torch.empty(int(stop_U[-1]), dtype=torch.uint8, pin_memory=x_N.is_cuda)
    data.copy_(coded.packed[: len(data)])
    array = data.numpy()
    chosen_U = np.stack([info_U[:, 3], info_U[:, 1], info_U[:, 2]], 1).astype(np.int64)
    own_U = codec.wants_own(info_U[:, 4:].astype(np.int64), chosen_U)
    most = codec.bytes_max(chunk)
    start_U = stop_U - info_U[:, 3] - HEADER.size
    kind = kind_of(codec.bits)
    sealed = seal_all(
        array, start_U, stop_U, info_U[:, 1].astype(np.int64), kind, chunk, codec.parameter
    )
    frames = []
    for unit, (start, stop) in enumerate(zip(start_U.tolist(), stop_U.tolist(), strict=True)):
        peak, table, _, size = (int(v) for v in info_U[unit, :4])
        if peak == plain.NO_SCALE:
            frames.append(codec.zero_frame(chunk))
        elif own_U[unit] or HEADER.size + size >= most:
            at = unit * chunk
            frames.append(_encode_on_host(codec, x_N[at : at + chunk], first + at))
        else:
            if not sealed or stop - start < COMPILED_FROM:
                seal(
                    array[start:], size, CODEC_ID, FIXED, chunk, codec.parameter,
                    bits=codec.bits, table=table,
                )  # fmt: skip
            frames.append(array[start:stop].tobytes())
    return frames


def _encode_on_host(codec: Ecsq, x_N: torch.Tensor, at: int) -> bytes:
    """One chunk whose first value is the `at`-th of all."""
    try:
        return codec.encode(x_N.cpu().numpy())
    except EncodeError as error:
        raise EncodeError(at + error.index, error.value) from None


# ── decoding ─────────────────────────────────────────────────────────────────────────────────
def decode_many(
    payloads: Sequence[Payload], out_N: torch.Tensor, *, chunk: int = CHUNK_VALUES
) -> None:
    """The frames of `encode_many` into `out_N` (N,), bit for bit as the CPU reads them.

    Returns when they are known to be good; the device may still be writing, in order with whatever
    is asked of it next. On an error `out_N` is untouched.

    Raises:
        DecodeError: one is not an intact frame of its chunk.
        ValueError: not a contiguous float32 vector on a GPU.
    """
    _require(out_N, chunk)
    Received(payloads, out_N, chunk=chunk).write(out_N, add=False)


def accumulate(
    payloads: Sequence[Payload], weight: float, acc_N: torch.Tensor, *, chunk: int = CHUNK_VALUES
) -> None:
    """acc_N += weight * the frames' values, bit for bit as the CPU adds them.

    `weight` is rounded to float32 and is the caller's to check. On an error `acc_N` is untouched;
    otherwise as `decode_many`. Needs 0.7 to 1.3 bytes of the device's memory per value meanwhile.

    Raises:
        DecodeError: one is not an intact frame of its chunk.
        ValueError: not a contiguous float32 vector on a GPU.
    """
    _require(acc_N, chunk)
    Received(payloads, acc_N, np.float32(weight), chunk=chunk).write(acc_N, add=True)


class Received:
    """Frames for a vector like `like_N`: headers checked, unusual ones decoded, others uploaded.

    `decode`, `check`, `expand` are what the device does, for those who measure it.
    """

    def __init__(
        self,
        payloads: Sequence[Payload],
        like_N: torch.Tensor,
        weight: np.float32 = np.float32(1),  # noqa: B008
        *,
        chunk: int = CHUNK_VALUES,
    ) -> None:
        """
        Raises:
            DecodeError: one is not an intact frame of its chunk, as far as the host can see.
        """
        if len(payloads) != -(-len(like_N) // chunk):
            raise DecodeError(f"{len(payloads)} frames for {len(like_N)} values")
        self._chunk = chunk
        self._zero_U: list[int] = []
        self._odd_U: list[tuple[int, torch.Tensor]] = []
        found: dict[int, _Group] = {}
        size = sum(map(len, payloads))
        host = torch.empty((size + 11) // 8 * 8, dtype=torch.uint8, pin_memory=like_N.is_cuda)
        array = host.numpy()
        array[size:] = 0
        left = len(like_N) - chunk * np.arange(len(payloads), dtype=np.int64)
        stop_U, intact_U = receive(payloads, array, np.minimum(left, chunk), CODEC_ID)
        for unit, payload in enumerate(payloads):
            numel = min(chunk, len(like_N) - unit * chunk)
            frame = Frame.parse(payload, CODEC_ID, numel, intact=bool(intact_U[unit]))
            if frame.mode == ZERO:
                if len(frame.body) or frame.table:
                    raise DecodeError("a zero frame with a body")
                self._zero_U.append(unit)
            elif numel == chunk and frame.mode in (FIXED, OWN) and frame.bits in _WIDTHS:
                if frame.bits not in found:
                    found[frame.bits] = _Group(frame.bits, chunk)
                found[frame.bits].add(unit, frame, int(stop_U[unit]) - len(frame.body))
            else:
                self._odd_U.append((unit, _decode_on_host(payload, numel, weight)))
        data = host.to(like_N.device, non_blocking=True)
        self._staged = [group.upload(data) for group in found.values()]
        self._weight = float(weight)

    def decode(self) -> None:
        """Symbols, scales and codebooks of all frames; starts it and doesn't wait."""
        for staged in self._staged:
            staged.decode(self._weight)

    def check(self) -> None:
        """Wait for `decode`.

        Raises:
            DecodeError: a frame is not what an encoder sends.
        """
        for staged in self._staged:
            staged.check()

    def expand(self, out_N: torch.Tensor, *, add: bool) -> None:
        """The values, written or added."""
        for staged in self._staged:
            staged.expand(out_N, add=add)

    def write(self, out_N: torch.Tensor, *, add: bool) -> None:
        """All of it, to a vector like the one it was made for. On an error it is untouched.

        Raises:
            DecodeError: a frame is not what an encoder sends.
        """
        with torch.cuda.device_of(out_N):  # type: ignore[no-untyped-call]
            self.decode()
            self.check()
            self.expand(out_N, add=add)
            for unit, value_N in self._odd_U:
                piece = out_N[unit * self._chunk :][: len(value_N)]
                if add:
                    piece += value_N.to(out_N.device)
                else:
                    piece.copy_(value_N)
            for unit in self._zero_U:
                if not add:
                    out_N[unit * self._chunk :][: self._chunk].zero_()


def _decode_on_host(payload: Payload, numel: int, weight: np.float32) -> torch.Tensor:
    """The weighted values of a frame of any mode."""
    value_N = np.empty(numel, np.float32)
    start_U, stop_U = np.array([0]), np.array([len(payload)])
    _ANY.decode_packed(payload, start_U, stop_U, value_N, weight)
    return torch.from_numpy(value_N)


class _Group:
    """Frames of one width: where in the upload each body, its coded section and its end are."""

    def __init__(self, bits: int, chunk: int) -> None:
        self.bits = bits
        self.chunk = chunk
        self._place: list[tuple[int, int, int]] = []
        self._which: list[tuple[int, int]] = []
        self._own: dict[bytes, int] = {}
        self._tables = list(shipped_tables(bits).tables)

    def add(self, unit: int, frame: Frame, place: int) -> None:
        """
        Raises:
            DecodeError: its code table is not known, or its body is too short to hold anything.
        """
        top = plain.top_of(self.bits)
        side = 2 + 2 * top + plain.blocks_of(self.chunk)
        table, start = frame.table, 0
        if frame.mode == OWN:
            start = top + 1
            shown = bytes(frame.body[:start])
            if table or len(shown) < start:
                raise DecodeError("a code table that is not complete")
            if shown not in self._own:
                self._own[shown] = len(self._tables)
                self._tables.append(level_table(self.bits, shown_weights(shown)))
            table = self._own[shown]
        elif table >= len(shipped_tables(self.bits).tables):
            raise DecodeError(f"table {table} is not known")
        streams = plain.streams_of(self.chunk // plain.planes_of(self.bits))
        if len(frame.body) < start + side + 2 * streams + 2:
            raise DecodeError(plain.FAULTS[1])
        body = place + start
        self._place.append((body, body + side, place + len(frame.body)))
        self._which.append((unit, table))

    def upload(self, data: torch.Tensor) -> _Staged:
        device = data.device
        place = torch.from_numpy(np.array(self._place, np.int64).T.copy()).to(device)
        which = torch.from_numpy(np.array(self._which, np.int32).T.copy()).to(device)
        lookup_TW = _constants(self.bits, device).lookup_TW
        if self._own:
            own = self._tables[-len(self._own) :]
            lookup_TW = torch.cat([lookup_TW, _lookups(own).to(device)])
        return _Staged(self.bits, self.chunk, data, place, which, lookup_TW)


class _Staged:
    """Bodies of one width on the device, and what they decode to."""

    def __init__(
        self, bits: int, chunk: int, data: torch.Tensor, place: torch.Tensor, which: torch.Tensor,
        lookup_TW: torch.Tensor,
    ) -> None:  # fmt: skip
        self._bits, self._chunk = bits, chunk
        self._length = chunk // plain.planes_of(bits)
        self._data = data
        self._body_G, self._section_G, self._stop_G = place
        self._unit_G, self._table_G = which
        self._lookup_TW = lookup_TW
        self._units = len(self._unit_G)
        empty = partial(torch.empty, device=data.device)
        self._symbol_T = empty(self._units * self._length, dtype=torch.int16)
        self._book_G = empty(self._units * 16, dtype=torch.float32)
        self._scale_B = empty(self._units * (chunk // plain.BLOCK), dtype=torch.float32)
        self._fault = torch.full((1,), NO_FAULT, dtype=torch.int32, device=data.device)

    def decode(self, weight: float) -> None:
        streams, each = plain.streams_of(self._length), plain.symbols_each(self._length)
        decode_kernel[(triton.cdiv(self._units * streams, _LANES),)](
            self._data, self._data.view(torch.int32), self._section_G, self._stop_G, self._table_G,
            self._unit_G, self._lookup_TW, self._symbol_T.view(torch.int64), self._fault,
            self._units, len(self._data) // 4, each, streams, _LANES, num_warps=1, **_PRECISE,
        )  # fmt: skip
        check_kernel[(self._units,)](
            self._data, self._body_G, self._section_G, self._stop_G, self._unit_G, self._symbol_T,
            self._book_G, self._scale_B, weight, self._fault, self._chunk, self._bits, streams,
            triton.next_power_of_2(self._chunk // plain.BLOCK), 2048, num_warps=4, **_PRECISE,
        )  # fmt: skip

    def check(self) -> None:
        fault = int(self._fault.item())
        if fault != NO_FAULT:
            raise DecodeError(plain.FAULTS[fault % 16])

    def expand(self, out_N: torch.Tensor, *, add: bool) -> None:
        tiles = triton.cdiv(self._length // plain.BLOCK, _ROWS)
        expand_kernel[(self._units * tiles,)](
            self._symbol_T, self._book_G, self._scale_B, self._unit_G, out_N, add, self._chunk,
            self._bits, _ROWS, num_warps=4, **_PRECISE,
        )  # fmt: skip


# ── what both need ───────────────────────────────────────────────────────────────────────────
_ANY: Final = Ecsq(1.0)  # reads the frames of all


@dataclass(frozen=True, slots=True)
class _Constants:
    """The shipped tables of one width, on one device."""

    cost_TL: torch.Tensor
    entry_TS: torch.Tensor
    lookup_TW: torch.Tensor


@lru_cache(maxsize=24)
def _constants(bits: int, device: torch.device) -> _Constants:
    shipped = shipped_tables(bits)
    return _Constants(
        torch.from_numpy(shipped.cost_TL.astype(np.int32)).to(device),
        torch.from_numpy(shipped.entry_TS.astype(np.int32)).to(device),
        _lookups(shipped.tables).to(device),
    )


def _lookups(tables: Sequence[Table]) -> torch.Tensor:
    """(tables, 8192)"""
    lookup_TW: npt.NDArray[np.uint16] = np.stack([table.lookup_W for table in tables])
    return torch.from_numpy(lookup_TW.view(np.int16))


def _require(x_N: torch.Tensor, chunk: int) -> None:
    """Refuse what our own caller must not pass."""
    if x_N.dtype != torch.float32 or x_N.ndim != 1 or not x_N.is_contiguous():
        raise ValueError(
            f"need a contiguous float32 vector, got {x_N.dtype} {tuple(x_N.shape)} "
            f"with strides {x_N.stride()}"
        )
    if not x_N.is_cuda and not triton.knobs.runtime.interpret:
        raise ValueError(f"need a vector on a GPU, got one on {x_N.device}; Ecsq codes those")
    if not 0 < chunk <= CHUNK_VALUES or chunk % CHUNK_STEP:
        raise ValueError(f"chunks of {chunk} values; need a multiple of {CHUNK_STEP}")
