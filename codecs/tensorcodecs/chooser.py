"""Which codec a link deserves: the quickest that is accurate enough, or the best that is in time.

    choice = choose(
        numel, bandwidth_bps=20e6, budget_s=30, snr_wished_db=15, snr_min_db=0.1
    )
    codec = get_codec(choice.codec)

A pure function of a tensor's (or a span's) size and of what was measured on a link. Accuracy is the
signal-to-noise ratio -20 log10(|x - decoded| / |x|) on pseudo-gradients; sizes and speeds are
`CANDIDATES`', whose order is the argument why it is monotone: a candidate of more bits is never
less accurate, and more bandwidth never favours fewer bits. So with more bandwidth, all else equal,
the choice is never less accurate.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, Final

from tensorcodecs.feedback import decay_of
from tensorcodecs.frame import HEADER
from tensorcodecs.layout import CHUNK_VALUES

if TYPE_CHECKING:
    from collections.abc import Sequence


@dataclass(frozen=True, slots=True)
class Candidate:
    """What one codec does to pseudo-gradients."""

    codec: str
    """What `get_codec` calls it."""
    bits: float
    """Per value, headers not included."""
    snr_db: float
    """Of what arrives without error feedback; infinite if exact."""
    encode_bps: float
    """Bytes of float32 that a core codes in a second."""
    decode_bps: float
    """Bytes of float32 that a core decodes in a second."""


def snr_db_of(error: float) -> float:
    """Of a relative error |x - decoded| / |x|: -20 log10, infinite at 0."""
    return -20 * math.log10(error) if error > 0 else math.inf


# Bits and speeds: normal values with another spread in every 4096, one core of a 2.6 GHz EPYC,
# numba, chunk after chunk from memory. Errors of the named codecs: DiLoCo pseudo-gradients.
CANDIDATES: Final = tuple(
    Candidate(codec, bits, snr_db_of(error), 1e9 * encode, 1e9 * decode)
    for codec, bits, error, encode, decode in (
        ("sparse:16", 0.049, 0.980, 6.7, 9.6),
        ("sparse:32", 0.086, 0.966, 5.5, 9.4),
        ("sparse", 0.152, 0.950, 4.6, 8.4),
        ("sparse:128", 0.268, 0.900, 3.3, 6.4),
        ("sparse:256", 0.468, 0.825, 2.1, 4.5),
        ("sparse:512", 0.803, 0.711, 1.3, 3.0),
        ("min", 1.27, 0.513, 14.1, 12.8),
        ("ecsq:1.7", 1.49, 0.442, 12.5, 13.3),
        ("ecsq:1.4", 1.73, 0.378, 12.2, 13.1),
        ("ecsq:1.2", 1.93, 0.329, 12.1, 13.1),
        ("low", 2.17, 0.278, 11.8, 12.4),
        ("ecsq:0.84", 2.41, 0.238, 10.5, 12.6),
        ("ecsq:0.7", 2.65, 0.200, 10.3, 12.5),
        ("ecsq:0.6", 2.88, 0.172, 9.6, 11.5),
        ("q4", 3.13, 0.143, 9.3, 11.1),
        ("ecsq:0.45", 3.27, 0.129, 9.1, 10.8),
        ("high", 7.19, 0.009, 4.3, 4.1),
        ("int8-raw", 8.01, 0.009, 20.7, 18.2),
        ("bf16", 11.2, 0.0017, 2.5, 4.2),
        ("fp32", 27.2, 0.0, 2.4, 3.0),
    )
)
"""By rising bits, and so by rising accuracy. Below `min` only top-k: a coarser `ecsq` has the same
error for its bits, and is not meant to be used with feedback."""


@dataclass(frozen=True, slots=True)
class Choice:
    """A codec for one tensor on one link, and what to expect of it."""

    codec: str
    """What `get_codec` calls it."""
    bytes: int
    """Expected, of all frames with their headers."""
    seconds: float
    """Expected: encoding, then sending, then decoding; nothing overlaps."""
    snr_db: float
    """Expected, without error feedback."""
    fits: bool
    """Whether `seconds` is within the budget."""
    feedback: bool
    """Whether it is to be used with `encode_with_feedback`; see `decay_of` for the decay."""
    reason: str
    """A sentence for people."""


def choose(
    numel: int,
    *,
    bandwidth_bps: float,
    budget_s: float,
    snr_wished_db: float,
    snr_min_db: float,
    speed: float = 1.0,
    candidates: Sequence[Candidate] = CANDIDATES,
) -> Choice:
    """The codec for `numel` values over `bandwidth_bps` bits per second within `budget_s` seconds.

    Of the candidates with `snr_wished_db` or more it is the one of the fewest seconds. Where that
    is too slow, it is the most accurate in time that has `snr_min_db` (what the method still learns
    from, with error feedback). Where nothing is in time, it is the one of the fewest seconds that
    has `snr_min_db`, and `fits` is False. Of equals it is the more accurate, then the earlier.

    `speed`: how many times as fast as the candidates' core this machine codes, all its cores taken
    together. Cost: 30 microseconds.

    Raises:
        ValueError: a number makes no sense, no candidate has `snr_min_db`, or the candidates are
            not in the order of `CANDIDATES`.
    """
    if numel < 1:
        raise ValueError(f"{numel} values; there is nothing to choose a codec for")
    for what, value, unit in (
        ("a bandwidth", bandwidth_bps, " bit/s"),
        ("a budget", budget_s, " s"),
        ("a speed", speed, ""),
    ):
        if not (math.isfinite(value) and value > 0):
            raise ValueError(f"{what} of {value}{unit} makes no sense; it must be positive")
    for what, value in (("wished", snr_wished_db), ("least", snr_min_db)):
        if math.isnan(value):
            raise ValueError(f"the {what} signal-to-noise ratio is {value}; it must be a number")
    if snr_min_db > snr_wished_db:
        raise ValueError(f"at least {snr_min_db} dB, but only {snr_wished_db} dB are wished for")
    _require_order(candidates)
    size = {c: _bytes(c, numel) for c in candidates}
    taken_s = {
        c: numel * 4 / speed * (1 / c.encode_bps + 1 / c.decode_bps) + 8 * size[c] / bandwidth_bps
        for c in candidates
    }

    def quickest(some: list[Candidate]) -> Candidate:
        return min(some, key=lambda c: (taken_s[c], -c.snr_db))

    allowed = [c for c in candidates if c.snr_db >= snr_min_db]
    wished = [c for c in allowed if c.snr_db >= snr_wished_db]
    in_time = [c for c in allowed if taken_s[c] <= budget_s]
    if not allowed:
        raise ValueError(f"no candidate reaches {snr_min_db} dB; the best has {_best(candidates)}")
    exact = snr_wished_db == math.inf
    with_wish = "exact one" if exact else f"with the wished {_decibels(snr_wished_db)}"
    if wished and taken_s[quickest(wished)] <= budget_s:
        chosen = quickest(wished)
        why = f"the quickest {with_wish}"
    elif in_time:
        chosen = max(in_time, key=lambda c: (c.snr_db, -taken_s[c]))
        if wished:
            best = quickest(wished)
            miss = f"the quickest {with_wish}, {best.codec}, takes {_seconds(taken_s[best])}"
        else:
            miss = f"{_decibels(snr_wished_db)} were wished for, which no candidate has"
        why = f"the most accurate in time; {miss}"
    else:
        chosen = quickest(allowed)
        why = f"too slow, but of those with at least {_decibels(snr_min_db)} none is quicker"
    seconds = taken_s[chosen]
    reason = (
        f"{chosen.codec}: {_amount(size[chosen])} in {_seconds(seconds)} of {_seconds(budget_s)}"
        f" at {_rate(bandwidth_bps)}, {_decibels(chosen.snr_db)}: {why}."
    )
    return Choice(
        codec=chosen.codec,
        bytes=size[chosen],
        seconds=seconds,
        snr_db=chosen.snr_db,
        fits=seconds <= budget_s,
        feedback=decay_of(chosen.codec) is not None,
        reason=reason,
    )


def _bytes(candidate: Candidate, numel: int) -> int:
    return math.ceil(numel * candidate.bits / 8) + HEADER.size * -(-numel // CHUNK_VALUES)


def _require_order(candidates: Sequence[Candidate]) -> None:
    for c in candidates:
        if not (c.bits > 0 and c.encode_bps > 0 and c.decode_bps > 0) or math.isnan(c.snr_db):
            raise ValueError(f"candidate {c.codec}: bits and speeds must be positive numbers")
    for one, other in pairwise(candidates):
        if not (one.bits <= other.bits and one.snr_db <= other.snr_db):
            raise ValueError(
                f"candidates {one.codec} and {other.codec}: more bits must not be less accurate,"
                " and the fewest bits come first"
            )


def _best(candidates: Sequence[Candidate]) -> str:
    return _decibels(candidates[-1].snr_db) if candidates else "none"


# ── numbers for people ───────────────────────────────────────────────────────────────────────
def _decibels(value: float) -> str:
    return "exact" if value == math.inf else f"{value:.1f} dB"


def _seconds(value: float) -> str:
    return f"{value:.3g} s" if value < 1000 else f"{value:.0f} s"


def _amount(value: float) -> str:
    return _with_prefix(value, "B")


def _rate(value: float) -> str:
    return _with_prefix(value, "bit/s")


def _with_prefix(value: float, unit: str) -> str:
    for prefix in ("", "k", "M"):
        if value < 999.5:
            return f"{value:.3g} {prefix}{unit}"
        value /= 1000
    return f"{value:.3g} G{unit}" if value < 999.5 else f"{value:.0f} G{unit}"
