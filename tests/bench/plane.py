"""Bits per value against error of every codec, on a small model's pseudo-gradients.

The vectors are what the workers of `swarm` send after 50 inner steps in their second round. Each
is coded by itself; bits are those of whole frames, errors are |x - y| / |x|, both averaged over
the vectors (errors: rms). The bound is Shannon's for a normal source: log2(1 / error) bits.

A full run also draws docs/results/rate-distortion.svg.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from tensorcodecs import CHUNK_VALUES, CODEC_NAMES, Ecsq, get_codec
from tensorcodecs.frame import HEADER
from tensorcodecs.plain import blocks_of, top_of
from tests.bench import machine, svg
from tests.bench.result import Bar, BenchError, Cell, Progress, Result
from tests.bench.swarm import Plan, Swarm

Float32 = npt.NDArray[np.float32]

Trip = Callable[[Float32], tuple[int, Float32]]
"""A vector (N,) -> (bytes that travel, what arrives)."""

_PLAN: Final = Plan(
    hidden=256, layers=4, workers=2, warmup_steps=300, rounds=2, steps=50, lr=2e-3,
    validation_samples=64,
)  # fmt: skip
_QUICK: Final = Plan(workers=2, warmup_steps=40, rounds=2, steps=10, validation_samples=64)

_SWEEP: Final = (0.45, 0.56, 0.63, 0.71, 0.8, 0.94, 1.19, 1.41, 1.7, 1.75, 2.4, 2.8, 3.4, 4.0)
"""Steps in rms, besides q4's, low's and min's; 0.95 and 1.75 are where levels become fewer."""

_SPARSER: Final = ("sparse:16", "sparse:256")
"""Of 4096 values, besides sparse's 64."""

_PART: Final = 2**17  # values in what hivemind sends at once (its default 512 KiB)
_GAP_MAX: Final = 0.30
_PICTURE: Final = "rate-distortion.svg"
_THEIRS: Final = "Uniform8BitQuantization"


@dataclass(frozen=True, slots=True)
class Point:
    """Where a codec lies."""

    name: str
    whose: str
    bits: float
    """Per value."""
    error: float
    """Relative to the vector's norm."""
    side: float = 0.0
    """Bits per value of it that are no levels: headers, scales, codebooks, sizes."""

    @property
    def bound(self) -> float | None:
        """The least bits for such an error, if there is one."""
        return -math.log2(self.error) if self.error > 0 else None

    @property
    def above(self) -> float | None:
        """Bits above the bound."""
        return None if self.bound is None else self.bits - self.bound


def run(quick: bool, seed: int, progress: Progress) -> Result:
    """See `registry.Measurement`."""
    import torch

    torch.set_num_threads(1)
    vectors = _pseudo_gradients(quick, seed, progress)
    progress(f"{len(vectors)} pseudo-gradients of {len(vectors[0]):,} values")
    ours = [measure(name, "ours", _trip(name), vectors, side_bits(name)) for name in _names()]
    references = [
        measure(f"int4 absmax {block}, zstd", "reference", _int4(block), vectors)
        for block in (64, 256)
    ]
    theirs = [measure(name, "hivemind", trip, vectors) for name, trip in _hivemind(progress)]
    points = sorted([*ours, *references, *theirs], key=lambda point: point.bits)
    if not quick:
        page = machine.ROOT / "docs" / "results" / _PICTURE
        page.write_text(picture(points, _what(vectors, seed)))
        progress(f"Drew {page.relative_to(machine.ROOT)}")
    return Result([_row(point) for point in points], _bars(points), _notes(vectors, seed))


def measure(
    name: str, whose: str, trip: Trip, vectors: Sequence[Float32], side: float = 0.0
) -> Point:
    """The codec's point.

    Raises:
        BenchError: what arrives is not finite.
    """
    size = numel = 0
    squares = []
    for x_N in vectors:
        sent, y_N = trip(x_N)
        size += sent
        numel += len(x_N)
        error_N = x_N.astype(np.float64) - y_N
        squares.append(float(error_N @ error_N) / float(np.square(x_N, dtype=np.float64).sum()))
    error = math.sqrt(sum(squares) / len(squares))
    if not math.isfinite(error):
        raise BenchError(f"{name} gave values that are not finite; it can't be compared")
    return Point(name, whose, 8 * size / numel, error, side)


def side_bits(name: str) -> float:
    """Bits per value of an ecsq frame that are no levels, as `tensorcodecs.ecsq` lays it out: the
    header, the largest step, the codebook, a byte per block, 16 streams' sizes, the literals'.
    0 of another codec.
    """
    codec = get_codec(name)
    if not isinstance(codec, Ecsq):
        return 0.0
    side = HEADER.size + 2 + 2 * top_of(codec.bits) + blocks_of(CHUNK_VALUES) + 2 * 16 + 2
    return 8 * side / CHUNK_VALUES


def picture(points: Sequence[Point], what: str) -> str:
    """The plane as SVG. Exact codecs have no place on it."""
    lossy = [point for point in points if point.error > 0]
    sweep = [p for p in lossy if p.whose == "ours" and p.side]
    others = [p for p in lossy if p.whose == "ours" and not p.side]
    bits = (0.05, 0.1, 0.2, 0.5, 1, 2, 4, 8, 16, 32)
    errors = (1e-4, 1e-3, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1)
    x = svg.Axis("bits per value on the wire (log scale)", 0.03, 32.0, bits, log=True)
    y = svg.Axis("relative error (log scale)", 1e-4, 1.5, errors, log=True)
    rates = [x.low * (x.high / x.low) ** (step / 200) for step in range(201)]
    series = [
        svg.Series("Shannon bound, normal source", [(r, 2.0**-r) for r in rates], "#57606a",
                   line=True, dashed=True, dots=False),
        svg.Series("ecsq:A (q4, low, min)", [(p.bits, p.error) for p in sweep], "#0969da",
                   line=True, labels=[_label(p) for p in sweep]),
        svg.Series("our other codecs", [(p.bits, p.error) for p in others], "#1a7f37",
                   labels=[p.name for p in others]),
        _dots("hivemind's", "#bc4c00", [p for p in lossy if p.whose == "hivemind"]),
        _dots("int4 absmax, then zstd", "#8250df", [p for p in lossy if p.whose == "reference"]),
    ]  # fmt: skip
    return svg.chart("Bits against error", what, x, y, series)


def _dots(name: str, colour: str, points: Sequence[Point]) -> svg.Series:
    short = [p.name.partition(", ")[0].removesuffix("Quantization").removesuffix("Compression")
             for p in points]  # fmt: skip
    return svg.Series(name, [(p.bits, p.error) for p in points], colour, labels=short)


def _label(point: Point) -> str:
    ends = {
        f"ecsq:{_SWEEP[0]:g}": f"A = {_SWEEP[0]:g}",
        f"ecsq:{_SWEEP[-1]:g}": f"A = {_SWEEP[-1]:g}",
    }
    return ends.get(point.name, "" if ":" in point.name else point.name)


def _pseudo_gradients(quick: bool, seed: int, progress: Progress) -> list[Float32]:
    plan = _QUICK if quick else _PLAN
    found: list[Float32] = []

    def keep(sent: Float32) -> Float32:
        found.append(sent.copy())
        return sent

    for number in range(1 if quick else 3):
        loss = Swarm(seed + number, plan).learn([keep] * plan.workers, lambda mean: mean)
        progress(f"seed {seed + number}: validation loss {loss:.3f}")
        # The first round's only come before the outer step's first jolt.
        del found[plan.workers * number : plan.workers * (number + 1)]
    return found


def _names() -> list[str]:
    steps = [f"ecsq:{a:g}" for a in _SWEEP]
    return list(dict.fromkeys([*CODEC_NAMES, *_SPARSER, *steps]))


def _trip(name: str) -> Trip:
    codec = get_codec(name)

    def trip(vector: Float32) -> tuple[int, Float32]:
        frames = codec.encode_many(vector)
        y_N = np.empty_like(vector)
        codec.decode_many(frames, y_N)
        return sum(map(len, frames)), y_N

    return trip


def _int4(block: int) -> Trip:
    """Each block over its largest magnitude / 7, two levels a byte, zstd over them; half-precision
    scales."""
    import zstandard

    def trip(vector: Float32) -> tuple[int, Float32]:
        x_BK = np.pad(vector, (0, -len(vector) % block)).reshape(-1, block)
        scale_B = (np.abs(x_BK).max(axis=1) / 7).astype(np.float16)
        step_B1 = np.where(scale_B == 0, 1, scale_B).astype(np.float32)[:, None]
        level_BK = np.clip(np.rint(x_BK / step_B1), -7, 7)
        digit_N = (level_BK.ravel() + 7).astype(np.uint8)
        packed = zstandard.compress((digit_N[0::2] | digit_N[1::2] << 4).tobytes(), 1)
        y_N = (level_BK * scale_B[:, None].astype(np.float32)).ravel()[: len(vector)]
        return len(packed) + scale_B.nbytes, y_N.astype(np.float32)

    return trip


def _hivemind(progress: Progress) -> Iterator[tuple[str, Trip]]:
    """Its codecs, as it uses them: on parts of 512 KiB of one flat vector."""
    import torch
    from hivemind import compression
    from hivemind.compression import CompressionInfo, quantization

    # Its int(array of one value) is a TypeError with numpy >= 2.4.
    quantization.int = lambda array: array.item()

    def trip_of(codec: Any) -> Trip:
        def trip(vector: Float32) -> tuple[int, Float32]:
            size = 0
            parts = []
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", UserWarning)  # torch's, about quint8
                for part in torch.split(torch.from_numpy(vector), _PART):
                    sent = codec.compress(part, CompressionInfo.from_tensor(part))
                    size += len(sent.buffer)
                    parts.append(codec.extract(sent).numpy().reshape(-1))
            return size, np.concatenate(parts)

        return trip

    for name in ("Float16Compression", _THEIRS, "BlockwiseQuantization"):
        trip = trip_of(getattr(compression, name)())
        try:
            trip(np.ones(8192, np.float32))
        except ImportError:
            progress(f"hivemind's {name} needs bitsandbytes; left out")
        else:
            yield name, trip


def _bars(points: Sequence[Point]) -> list[Bar]:
    named = {point.name: point for point in points}
    sweep = [point for point in points if point.side]
    above = {point.name: point.above or 0.0 for point in points}
    beyond = {p.name: above[p.name] - p.side for p in sweep if p.name in CODEC_NAMES}
    worst = max(beyond, key=lambda name: beyond[name])
    theirs, q4 = named[_THEIRS], named["q4"]
    equal = [p for p in points if p.whose == "ours" and p.error <= theirs.error]
    best = min(equal, key=lambda p: p.bits)
    return [
        Bar.at_least(
            "plane: bits above the bound, the least of all ecsq:A",
            min(above[p.name] for p in sweep), 0.0, "Shannon's log2(1 / error); less can't be",
        ),
        Bar.at_most(
            f"plane: bits above the bound and side information, the most of {', '.join(beyond)}",
            beyond[worst], _GAP_MAX,
            f"a uniform step, ideally coded: 0.25; here {worst}, {sweep[0].side:.3f} bits aside",
        ),
        Bar.at_most(
            f"plane: bits, ours / hivemind's {_THEIRS}",
            best.bits / theirs.bits, 1.0,
            f"{best.name}, error {best.error:.3g}, against {theirs.bits:.3g} bits, "
            f"error {theirs.error:.3g}",
        ),
        Bar.at_most(
            f"plane: bits above the bound, q4 / hivemind's {_THEIRS}",
            above["q4"] / above[_THEIRS], 0.5,
            f"{q4.bits:.3g} bits, error {q4.error:.3g}, against {theirs.bits:.3g}, "
            f"error {theirs.error:.3g}: the bound makes them comparable",
        ),
    ]  # fmt: skip


def _bitsandbytes() -> str:
    try:
        return version("bitsandbytes")
    except PackageNotFoundError:
        return "not installed"


def _what(vectors: Sequence[Float32], seed: int) -> str:
    size = f"{len(vectors[0]) / 1e6:.1f} M values"
    return (
        f"{len(vectors)} pseudo-gradients of a byte-level language model, {size} each, seed {seed}"
    )


def _row(point: Point) -> dict[str, Cell]:
    return {
        "codec": point.name,
        "whose": point.whose,
        "bits per value": f"{point.bits:.3f}",
        "error": f"{point.error:.5f}",
        "bound": None if point.bound is None else f"{point.bound:.3f}",
        "above it": None if point.above is None else f"{point.above:.3f}",
    }


def _notes(vectors: Sequence[Float32], seed: int) -> list[str]:
    x_N = np.concatenate(vectors).astype(np.float64)
    square = float(np.square(x_N).mean())
    kurtosis = float((x_N**4).mean()) / square**2
    data = (
        f"Seeds from {seed}. {len(vectors)} vectors of {len(vectors[0]):,} values, rms "
        f"{math.sqrt(square):.2g}, kurtosis {kurtosis:.1f} (normal: 3): a byte-level model on the "
        "standard library's text, 50 AdamW steps."
    )
    theirs = (
        "hivemind 1.1.12 codes flat parts of 2^17 values, with one scale each; its 8-bit codecs "
        "need a patch for numpy >= 2.4, and BlockwiseQuantization also bitsandbytes "
        f"({_bitsandbytes()})."
    )
    picture = f"![Bits per value against error]({_PICTURE})"
    return [data, theirs, picture]
