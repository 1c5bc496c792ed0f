"""The codec's size and speed on one core, against memcpy, zstd, entropy and hivemind's 8 bits.

Everything runs in one process, one thread and in turns, on the same 64 Mi floats; medians. The
values: blocks of 4096, 70 % normal and 30 % Laplace, scales log-normal: what pseudo-gradients of
a whole model look like. Encoding ends in frames ready to be sent; decoding starts from a container
in memory, with checksums and every check for hostile bytes on.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from statistics import median
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from tensorcodecs import CHUNK_VALUES, Codec, Container, Ecsq, Layout, get_codec, pack_vector, plain
from tensorcodecs.frame import HEADER, compressed
from tests.bench.machine import ROOT
from tests.bench.result import Bar, Cell, Progress, Result

Float32 = npt.NDArray[np.float32]

_VALUES: Final = 64 * 2**20
_QUICK_VALUES: Final = 4 * 2**20
_REPEATS: Final = 7
_UNIFORM8_REPEATS: Final = 5
_CODECS: Final = ("q4", "low", "min", "high", "int8-raw", "bf16", "fp32", "sparse")
_BLOCK: Final = 4096
_PIECE: Final = 2**20

_START: Final = """
import time
import numpy as np
begun = time.perf_counter()
from tensorcodecs import get_codec
x = np.ones(1000, np.float32)
for name in ("q4", "high"):
    codec = get_codec(name)
    codec.accumulate(codec.encode(x), 1.0, x)
print(time.perf_counter() - begun)
"""


def run(quick: bool, seed: int, progress: Progress) -> Result:
    """See `registry.Measurement`. About three minutes."""
    from tests.bench import wire_gpu

    numel = _QUICK_VALUES if quick else _VALUES
    progress(f"making {numel:,} values")
    x = values(numel, seed)
    layout = Layout.of([("update", (numel,))])
    rows, bars = _speed(x, layout, progress)
    bars = [*_size(x, layout, progress), *bars]
    theirs = _against_hivemind(x, layout, progress)
    rows += theirs[0]
    bars += theirs[1]
    bars += _two_threads(x, layout, progress)
    bars += _start_up(progress)
    notes = [
        f"Seed {seed}; {numel:,} float32 values ({numel * 4 / 2**20:.0f} MiB); GB/s of float32.",
        "x memcpy: speed over that of copying the same float32 values, in the same run.",
        "hivemind's codec is faster on pieces that fit the cache; the bars compare all at once.",
    ]
    on_gpu = wire_gpu.measure(progress)
    rows += on_gpu
    if on_gpu:
        slowest = [
            min(float(str(row[f"{what} GB/s"])) for row in on_gpu) for what in ("encode", "decode")
        ]
        bars += [
            Bar.at_least("GPU: GB/s encoded", slowest[0], 200.0, "float32; goal 550"),
            Bar.at_least("GPU: GB/s decoded", slowest[1], 200.0, "float32; goal 550"),
        ]
    else:
        notes.append("No GPU here: the kernels for one were not measured.")
    return Result(rows=rows, bars=bars, notes=notes)


def values(numel: int, seed: int) -> Float32:
    """(numel,): see the module."""
    rng = np.random.Generator(np.random.SFC64(seed))
    x = rng.standard_normal(numel, np.float32)
    for start in range(0, numel, _BLOCK):
        block = x[start : start + _BLOCK]
        if rng.random() < 0.3:
            block[:] = rng.laplace(size=len(block)).astype(np.float32) / np.float32(2**0.5)
        block *= np.float32(1e-3 * np.exp(rng.standard_normal()))
    return x


def _seconds(work: Callable[[], Any], repeats: int = _REPEATS) -> float:
    """Median, after one run that is not counted."""
    work()
    taken = []
    for _ in range(repeats):
        begun = time.perf_counter()
        work()
        taken.append(time.perf_counter() - begun)
    return median(taken)


def _speed(
    x: Float32, layout: Layout, progress: Progress
) -> tuple[list[dict[str, Cell]], list[Bar]]:
    out = np.empty_like(x)
    gigabytes = x.nbytes / 1e9
    rows: list[dict[str, Cell]] = []
    bars: list[Bar] = []
    for name in _CODECS:
        progress(f"{name}: speed")
        codec = get_codec(name)
        container = Container(pack_vector(x, layout, codec), layout)
        size = sum(len(container.chunk(i)) for i in range(container.chunks))
        container.read_into(out)
        error = _error(out, x)
        repeats = _REPEATS if name == "q4" else 3
        times: dict[str, list[float]] = {"copy": [], "encode": [], "decode": [], "add": []}
        work: dict[str, Callable[[], Any]] = {
            "copy": lambda: np.copyto(out, x),
            "encode": _encoder(codec, x),
            "decode": lambda c=container: c.read_into(out),  # type: ignore[misc]
            "add": lambda c=container: c.add_into(out, 0.5),  # type: ignore[misc]
        }
        for turn in range(repeats + 1):
            for what, do in work.items():
                begun = time.perf_counter()
                do()
                if turn:
                    times[what].append(time.perf_counter() - begun)
        copy, encode, decode, add = (median(times[what]) for what in work)
        rows.append(
            {
                "codec": name,
                "bits/value": 8 * size / len(x),
                "error": error,
                "encode GB/s": gigabytes / encode,
                "decode GB/s": gigabytes / decode,
                "decode + add GB/s": gigabytes / add,
                "encode x memcpy": copy / encode,
                "decode x memcpy": copy / decode,
                "add x memcpy": copy / add,
            }
        )
        if name == "q4":
            against = f"memcpy of the same values in turns, median of {repeats}"
            bars = [
                Bar.at_least("q4: encode, x memcpy", copy / encode, 0.45, against),
                Bar.at_least("q4: decode, x memcpy", copy / decode, 0.65, against),
                Bar.at_least("q4: decode + weighted add, x memcpy", copy / add, 0.5, against),
            ]
    return rows, bars


def _encoder(codec: Codec, x: Float32) -> Callable[[], Any]:
    """Coding `x` into frames; into memory that is there already, if the codec can do that."""
    if isinstance(codec, Ecsq):
        room = np.empty(-(-len(x) // CHUNK_VALUES) * codec.bytes_max(CHUNK_VALUES), np.uint8)
        return partial(codec.encode_into, x, room)
    return partial(codec.encode_many, x)


def _size(x: Float32, layout: Layout, progress: Progress) -> list[Bar]:
    """The frames' size against what their own indices would take."""
    progress("q4: size")
    codec = get_codec("q4")
    assert isinstance(codec, Ecsq)
    top = plain.top_of(codec.bits)
    wire = entropy = zstd = 0.0
    for start in range(0, len(x), CHUNK_VALUES):
        chunk = x[start : start + CHUNK_VALUES]
        wire += len(codec.encode(chunk))
        step_B = plain.block_steps(chunk, codec.square, codec.reach)
        _, inverse_B = plain.scale_codes(step_B, int(step_B.max()))
        digit_N = (plain.levels_of(chunk, inverse_B, top) + top).astype(np.uint8)
        side = HEADER.size + 2 + 2 * top + len(step_B)
        zstd += side + len(compressed(plain.pack_digits(digit_N, codec.bits)))
        share = np.bincount(digit_N, minlength=16) / len(digit_N)
        used = share[share > 0]
        entropy += side + len(digit_N) * float(-(used * np.log2(used)).sum()) / 8
    return [
        Bar.at_most(
            "q4: wire size / (entropy + side information)",
            wire / entropy,
            1.015,
            "order-0 entropy of each chunk's own indices; header, scales, codebook",
        ),
        Bar.at_most(
            "q4: wire size / zstd", wire / zstd, 1.01, "same indices packed, level 1, same side"
        ),
    ]


def _against_hivemind(
    x: Float32, layout: Layout, progress: Progress
) -> tuple[list[dict[str, Cell]], list[Bar]]:
    """hivemind's 8-bit codec: on all values at once, and in pieces, which suits its memory."""
    import torch
    from hivemind.compression import CompressionInfo, Uniform8BitQuantization

    torch.set_num_threads(1)
    theirs = _mended(Uniform8BitQuantization)()
    codec = get_codec("q4")
    container = Container(pack_vector(x, layout, codec), layout)
    out = np.empty_like(x)
    container.read_into(out)
    ours_error = _error(out, x)
    ours_size = sum(len(container.chunk(i)) for i in range(container.chunks))
    encode_ours = _encoder(codec, x)
    rows: list[dict[str, Cell]] = []
    bars: list[Bar] = []
    for what, piece in (("whole", len(x)), ("in pieces of 1 Mi", _PIECE)):
        progress(f"hivemind Uniform8BitQuantization, {what}")
        whole = torch.from_numpy(x)
        tensors = [whole[at : at + piece] for at in range(0, len(x), piece)]
        infos = [CompressionInfo.from_tensor(t) for t in tensors]
        pairs = list(zip(tensors, infos, strict=True))
        coded = [theirs.compress(t, info, allow_inplace=False) for t, info in pairs]
        size = sum(len(c.buffer) for c in coded)
        error = _error(torch.cat([theirs.extract(c) for c in coded]).numpy(), x)
        turns: tuple[Callable[[], Any], ...] = (
            partial(_each, lambda p: theirs.compress(*p, allow_inplace=False), pairs),
            partial(_each, theirs.extract, coded),
            encode_ours,
            partial(container.read_into, out),
        )
        times: list[list[float]] = [[] for _ in turns]
        for turn in range(_UNIFORM8_REPEATS + 1):
            for index, work in enumerate(turns):
                begun = time.perf_counter()
                work()
                if turn:
                    times[index].append(time.perf_counter() - begun)
        encode, decode, ours_encode, ours_decode = (median(t) for t in times)
        gigabytes = x.nbytes / 1e9
        rows.append(
            {
                "codec": f"hivemind Uniform8BitQuantization, {what}",
                "bits/value": 8 * size / len(x),
                "error": error,
                "encode GB/s": gigabytes / encode,
                "decode GB/s": gigabytes / decode,
            }
        )
        if what == "whole":
            against = f"Uniform8BitQuantization of the same values, {_UNIFORM8_REPEATS} times"
            faster = encode / ours_encode, decode / ours_decode
            bars = [
                Bar.at_least("q4: encode, x hivemind's 8 bits", faster[0], 12.0, against),
                Bar.at_least("q4: decode, x hivemind's 8 bits", faster[1], 10.0, against),
                Bar.at_most("q4: bytes, / hivemind's 8 bits", ours_size / size, 0.40, against),
                Bar.at_most("q4: error, / hivemind's 8 bits", ours_error / error, 1.0, against),
            ]
    return rows, bars


def _each(work: Callable[[Any], Any], things: Iterable[Any]) -> None:
    for thing in things:
        work(thing)


def _error(decoded: Float32, x: Float32) -> float:
    """Relative, of the norm."""
    return float(np.linalg.norm((decoded - x).astype(np.float64)) / np.linalg.norm(x))


def _mended(codec: Any) -> Any:
    """hivemind 1.1.12 reads its codebook's length with int() of an array, which numpy >= 2.4
    refuses; the same bytes, read without it."""
    import torch

    class Mended(codec):  # type: ignore[misc]
        def extract(self, serialized_tensor: Any) -> Any:
            (length,) = np.frombuffer(serialized_tensor.buffer, count=1, dtype=np.int64)
            codebook = np.frombuffer(
                serialized_tensor.buffer, offset=8, count=int(length), dtype=self.codebook_dtype
            )
            quantized = np.frombuffer(
                serialized_tensor.buffer,
                offset=8 + codebook.nbytes,
                dtype=self.indices_dtype,
            )
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # torch dislikes read-only memory; it is only read
                indices = torch.as_tensor(quantized, dtype=torch.int64)
                levels = torch.as_tensor(codebook)
            return levels[indices.reshape(tuple(serialized_tensor.size))]

    return Mended


def _two_threads(x: Float32, layout: Layout, progress: Progress) -> list[Bar]:
    progress("two threads")
    codec = get_codec("q4")
    half = len(x) // 2 // CHUNK_VALUES * CHUNK_VALUES
    halves = [x[:half], x[half : 2 * half]]
    layouts = Layout.of([("half", (half,))])
    outs = [np.empty(half, np.float32) for _ in halves]
    containers = [Container(pack_vector(part, layouts, codec), layouts) for part in halves]

    encoders = [_encoder(codec, part) for part in halves]

    def encode(index: int) -> None:
        encoders[index]()

    def decode(index: int) -> None:
        containers[index].read_into(outs[index])

    ratios = []
    with ThreadPoolExecutor(2) as pool:
        for work in (encode, decode):
            one, two = [], []
            for turn in range(_REPEATS + 1):
                begun = time.perf_counter()
                for index in range(2):
                    work(index)
                middle = time.perf_counter()
                list(pool.map(work, range(2)))
                if turn:
                    one.append(middle - begun)
                    two.append(time.perf_counter() - middle)
            ratios.append(median(one) / median(two))
    against = "one thread, same work, in turns; needs two free cores"
    return [
        Bar.at_least("q4: encode with two threads, x one", ratios[0], 1.5, against),
        Bar.at_least("q4: decode with two threads, x one", ratios[1], 1.5, against),
    ]


def _start_up(progress: Progress) -> list[Bar]:
    progress("start-up: compiling in a fresh cache")
    with tempfile.TemporaryDirectory() as cache:
        path = os.pathsep.join([str(ROOT / "codecs"), str(ROOT)])
        env = {**os.environ, "NUMBA_CACHE_DIR": cache, "PYTHONPATH": path}

        def once() -> float:
            done = subprocess.run(
                [sys.executable, "-c", _START], env=env, capture_output=True, text=True, check=True
            )
            return float(done.stdout)

        first = once()
        later = median(once() for _ in range(5))
    what = "q4 and high: encode and add, in a new process that has numpy"
    return [
        Bar.at_most("start-up: first use on a machine, s", first, 15.0, what),
        Bar.at_most("start-up: first use in a later process, s", later, 0.5, what),
    ]
