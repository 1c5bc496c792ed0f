"""Contributions that every process can recompute, and the proof that a mean is the true one.

Contribution (seed, round, peer) is standard normal float32, independent of all others: nothing can
be cached between rounds, and an average that never happened is off by 100 %.

Shapes: (N,) is a contribution; the suffix K marks one piece of it.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any, Final

import numpy as np
import numpy.typing as npt

Float32 = npt.NDArray[np.float32]

PIECE_VALUES: Final = 65536
"""The error is taken piece by piece, so that one small hole in a large tensor can't hide."""


@dataclass(frozen=True, slots=True)
class Check:
    """How far a result is from the true mean."""

    error: float
    """Of the worst piece: rms of (result - mean) / rms of the contributions."""
    error_of_mean: float
    """All pieces together: rms of (result - mean) / rms of the mean."""
    error_max: float
    """The single worst value: |result - mean| / rms of the mean."""
    digest: str
    """SHA-256 of the result's bytes, hex: do peers agree to the last bit?"""

    def facts(self) -> dict[str, Any]:
        """As a worker's reply; `Check(**facts)` is the way back."""
        return asdict(self)


def contribution(seed: int, round_: int, peer: int, out: Float32) -> None:
    """Overwrite `out` (N,) with this peer's tensor of this round."""
    pieces = _pieces(seed, round_, peer, len(out))
    for start, piece_K in zip(range(0, len(out), PIECE_VALUES), pieces, strict=True):
        out[start : start + len(piece_K)] = piece_K


def check(
    seed: int, round_: int, size: int, result: Float32, without: int | None = None
) -> Check:  # fmt: skip
    """Compare `result` (N,) with the mean of the `size` peers' contributions, in float64; `without`
    one of them."""
    worst = peak = error_sum = mean_sum = 0.0
    there = [peer for peer in range(size) if peer != without]
    peers = [_pieces(seed, round_, peer, len(result)) for peer in there]
    for start, pieces in zip(
        range(0, len(result), PIECE_VALUES), zip(*peers, strict=True), strict=True
    ):
        stacked = np.stack(pieces).astype(np.float64)
        mean_K = stacked.mean(axis=0)
        error_K = result[start : start + len(mean_K)] - mean_K
        squares = float(error_K @ error_K)
        if not math.isfinite(squares):
            worst = peak = squares = math.inf
        rms = math.sqrt(float(np.mean(stacked * stacked)))
        worst = max(worst, math.sqrt(squares / len(mean_K)) / rms)
        peak = max(peak, float(np.abs(error_K).max()))
        error_sum += squares
        mean_sum += float(mean_K @ mean_K)
    mean_rms = math.sqrt(mean_sum / len(result))
    return Check(
        error=worst,
        error_of_mean=math.sqrt(error_sum / mean_sum),
        error_max=peak / mean_rms,
        digest=hashlib.sha256(result.tobytes()).hexdigest(),
    )


def _pieces(seed: int, round_: int, peer: int, numel: int) -> Iterator[Float32]:
    rng = np.random.Generator(np.random.SFC64([seed, round_, peer]))
    for start in range(0, numel, PIECE_VALUES):
        yield rng.standard_normal(min(PIECE_VALUES, numel - start), np.float32)
