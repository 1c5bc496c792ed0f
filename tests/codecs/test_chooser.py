"""The chooser keeps its rule, is monotone, explains itself, and its table is true."""

from __future__ import annotations

import itertools
import math
import random
from dataclasses import replace

import numpy as np
import pytest

from tensorcodecs import CHUNK_VALUES, CODEC_NAMES, get_codec
from tensorcodecs.chooser import CANDIDATES, Candidate, Choice, choose, snr_db_of
from tensorcodecs.feedback import decay_of
from tests.codecs.samples import bell


def of(
    numel: int = 10_000_000,
    *,
    bandwidth_bps: float = 20e6,
    budget_s: float = 30.0,
    snr_wished_db: float = 15.0,
    snr_min_db: float = 0.1,
    speed: float = 1.0,
) -> Choice:
    return choose(
        numel,
        bandwidth_bps=bandwidth_bps,
        budget_s=budget_s,
        snr_wished_db=snr_wished_db,
        snr_min_db=snr_min_db,
        speed=speed,
    )


# ── the table ────────────────────────────────────────────────────────────────────────────
@pytest.mark.parametrize("candidate", CANDIDATES, ids=lambda c: c.codec)
def test_the_table_tells_what_the_codecs_do(candidate: Candidate) -> None:
    codec, x = get_codec(candidate.codec), bell(2 * CHUNK_VALUES, 7)
    frames = codec.encode_many(x)
    out = np.empty_like(x)
    codec.decode_many(frames, out)
    bits = 8 * (sum(map(len, frames)) - 24 * len(frames)) / len(x)
    assert bits == pytest.approx(candidate.bits, rel=0.03)
    error = float(np.linalg.norm(out - x) / np.linalg.norm(x))
    # Another source than the table's, which rounds: 0.009 is 40.4 to 41.4 dB.
    assert snr_db_of(error) == pytest.approx(candidate.snr_db, abs=0.7)


def test_every_named_codec_is_a_candidate() -> None:
    assert set(CODEC_NAMES) <= {c.codec for c in CANDIDATES}


def test_more_bits_are_never_less_accurate() -> None:
    for one, other in itertools.pairwise(CANDIDATES):
        assert one.bits <= other.bits
        assert one.snr_db <= other.snr_db


# ── the rule ─────────────────────────────────────────────────────────────────────────────
def test_a_fast_link_gets_the_quickest_codec_that_is_accurate_enough() -> None:
    choice = of(bandwidth_bps=100e6, snr_wished_db=16)
    assert choice.codec == "q4"
    assert choice.fits
    assert not choice.feedback
    assert choice.bytes == pytest.approx(10e6 * 3.13 / 8, rel=0.01)
    assert choice.seconds == pytest.approx(8 * choice.bytes / 100e6, rel=0.1)


def test_a_slow_link_gets_the_best_that_is_in_time() -> None:
    choice = of(bandwidth_bps=0.75e6, budget_s=30.0, snr_wished_db=16)
    assert choice.codec == "low"
    assert choice.fits
    assert choice.snr_db == pytest.approx(11.1, abs=0.1)


def test_a_very_slow_link_gets_top_k_with_feedback() -> None:
    choice = of(bandwidth_bps=60e3)
    assert choice.codec == "sparse"
    assert choice.fits
    assert choice.feedback


def test_where_nothing_is_in_time_the_quickest_allowed_says_so() -> None:
    choice = of(bandwidth_bps=1e3)
    assert (choice.codec, choice.fits) == ("sparse:16", False)
    choice = of(bandwidth_bps=1e3, snr_min_db=5)
    assert (choice.codec, choice.fits) == ("min", False)
    assert choice.seconds > 30
    assert "too slow" in choice.reason


def test_an_idle_fat_link_gets_the_codec_that_costs_the_least_computing() -> None:
    assert of(bandwidth_bps=400e9).codec == "int8-raw"
    assert of(bandwidth_bps=400e9, speed=1e6).codec != "int8-raw"


def test_only_an_exact_codec_is_exact() -> None:
    assert of(snr_wished_db=math.inf).codec == "fp32"
    slow = of(bandwidth_bps=1e3, snr_wished_db=math.inf, snr_min_db=math.inf)
    assert (slow.codec, slow.fits) == ("fp32", False)


def test_it_keeps_its_rule_whatever_it_is_asked() -> None:
    for seed in range(3000):
        rng = random.Random(seed)
        wished = rng.choice([rng.uniform(0, 60), math.inf])
        least = min(wished, rng.uniform(-1, 30))
        numel, speed = int(10 ** rng.uniform(0, 11)), 10 ** rng.uniform(-2, 2)
        bandwidth, budget = 10 ** rng.uniform(3, 12), 10 ** rng.uniform(-2, 4)
        choice = of(
            numel,
            bandwidth_bps=bandwidth,
            budget_s=budget,
            snr_wished_db=wished,
            snr_min_db=least,
            speed=speed,
        )
        seconds = {}
        for c in CANDIDATES:
            size = math.ceil(numel * c.bits / 8) + 24 * math.ceil(numel / CHUNK_VALUES)
            computing = 4 * numel / speed / c.encode_bps + 4 * numel / speed / c.decode_bps
            seconds[c.codec] = computing + 8 * size / bandwidth
        row = next(c for c in CANDIDATES if c.codec == choice.codec)
        told = f"seed {seed}: {choice}"
        assert choice.snr_db == row.snr_db >= least, told
        assert math.isclose(choice.seconds, seconds[row.codec], rel_tol=1e-9), told
        assert choice.fits == (choice.seconds <= budget), told
        assert choice.feedback == (decay_of(row.codec) is not None), told
        allowed = [c for c in CANDIDATES if c.snr_db >= least]
        wanted = [c for c in allowed if c.snr_db >= wished]
        if any(seconds[c.codec] <= budget * (1 - 1e-9) for c in wanted):
            assert choice.snr_db >= wished, told
            assert choice.seconds <= 1.000001 * min(seconds[c.codec] for c in wanted), told
        elif choice.fits:
            for c in allowed:
                assert c.snr_db <= choice.snr_db or seconds[c.codec] > budget * (1 - 1e-9), told
        else:
            assert choice.seconds <= 1.000001 * min(seconds[c.codec] for c in allowed), told


def test_more_bandwidth_is_never_answered_with_less_accuracy() -> None:
    bandwidths = [10 ** (3 + step / 25) for step in range(230)]
    grid = itertools.product(
        (1, 1000, 10**6, 10**9), (0.01, 1.0, 60.0), (5.0, 15.0, 50.0), (0.1, 4.0), (0.1, 1.0)
    )
    seen = set()
    for numel, budget, wished, least, speed in grid:
        before = -math.inf
        for bandwidth in bandwidths:
            choice = of(
                numel,
                bandwidth_bps=bandwidth,
                budget_s=budget,
                snr_wished_db=wished,
                snr_min_db=least,
                speed=speed,
            )
            told = f"{numel} values, {budget} s, {wished} dB, {least} dB, {speed}: {choice.reason}"
            assert choice.snr_db >= before, told
            before = choice.snr_db
            seen.add(choice.codec)
    assert len(seen) > 8, "the grid no longer reaches different codecs"


def test_more_time_is_never_answered_with_less_accuracy_below_the_wish() -> None:
    for bandwidth in (1e4, 1e5, 1e6, 1e7):
        snrs = [of(bandwidth_bps=bandwidth, budget_s=1.1**t).snr_db for t in range(-40, 100)]
        below = [min(snr, 15.0) for snr in snrs]
        assert below == sorted(below)


def test_the_same_question_has_the_same_answer() -> None:
    assert of() == of()


# ── people and mistakes ──────────────────────────────────────────────────────────────────
def test_the_reason_names_the_numbers() -> None:
    assert of(bandwidth_bps=100e6, snr_wished_db=16).reason == (
        "q4: 3.91 MB in 0.321 s of 30 s at 100 Mbit/s, 16.9 dB: the quickest with the wished"
        " 16.0 dB."
    )
    slow = of(bandwidth_bps=60e3).reason
    assert slow.startswith("sparse: 192 kB in 25.")
    assert "at 60 kbit/s, 0.4 dB: the most accurate in time; the quickest with the wished" in slow
    for bandwidth in (1e3, 1e6, 1e12):
        for wished in (0.1, 15.0, 1000.0, math.inf):
            reason = of(bandwidth_bps=bandwidth, snr_wished_db=wished).reason
            assert reason.endswith(".")
            assert "bit/s" in reason


@pytest.mark.parametrize("bad", [0.0, -1.0, math.nan, math.inf])
@pytest.mark.parametrize("field", ["bandwidth_bps", "budget_s", "speed"])
def test_a_measurement_that_makes_no_sense_is_refused(field: str, bad: float) -> None:
    named = {"bandwidth_bps": "bandwidth", "budget_s": "budget", "speed": "speed"}[field]
    with pytest.raises(ValueError, match=rf"a {named} of {bad}.*must be positive"):
        of(**{field: bad})  # type: ignore[arg-type]


def test_other_questions_that_make_no_sense_are_refused() -> None:
    with pytest.raises(ValueError, match="0 values"):
        of(0)
    for field in ("snr_wished_db", "snr_min_db"):
        with pytest.raises(ValueError, match="must be a number"):
            of(**{field: math.nan})  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="at least 20 dB, but only 15"):
        of(snr_wished_db=15, snr_min_db=20)


def ask(*codecs: str, snr_min_db: float = 0.1) -> Choice:
    rows = {c.codec: c for c in CANDIDATES}
    return choose(
        10**6,
        bandwidth_bps=1e6,
        budget_s=1e3,
        snr_wished_db=20,
        snr_min_db=snr_min_db,
        candidates=[rows[codec] for codec in codecs],
    )


def test_the_caller_may_bring_candidates_of_its_own() -> None:
    assert ask("min", "q4").codec == "q4"
    assert "no candidate has" in ask("min", "q4").reason
    with pytest.raises(ValueError, match=r"no candidate reaches 20 dB; the best has 16\.9 dB"):
        ask("min", "q4", snr_min_db=20)
    with pytest.raises(ValueError, match="no candidate reaches"):
        ask()
    with pytest.raises(ValueError, match="q4 and min: more bits must not be less accurate"):
        ask("q4", "min")
    slow = [replace(c, encode_bps=0.0) for c in CANDIDATES]
    with pytest.raises(ValueError, match="positive numbers"):
        choose(1, bandwidth_bps=1, budget_s=1, snr_wished_db=1, snr_min_db=1, candidates=slow)
