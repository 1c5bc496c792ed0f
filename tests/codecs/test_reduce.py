"""The weighted mean: right, deterministic, and untouched by what fails."""

from __future__ import annotations

import numpy as np
import pytest

from tensorcodecs import (
    CHUNK_VALUES,
    VALUE_ABS_MAX,
    WEIGHT_MAX,
    WEIGHT_MIN,
    DecodeError,
    Layout,
    WeightedMean,
    get_codec,
)
from tensorcodecs.frame import RAW
from tensorcodecs.plain import STEP_MAX
from tensorcodecs.reduce import Reduced, reduce_unit
from tests.codecs.samples import DENSE, EVERY, bell, forge

FP32 = get_codec("fp32")


def decoded(frame: bytes, numel: int, name: str = "fp32") -> np.ndarray[tuple[int], np.dtype]:
    out = np.empty(numel, np.float32)
    get_codec(name).decode_into(frame, out)
    return out


@pytest.mark.parametrize("name", DENSE)
def test_the_mean_is_weighted(name: str) -> None:
    codec = get_codec(name)
    inputs = [bell(10_000, seed) for seed in range(4)]
    weights = [1.0, 250.0, 31_000.5, 4096.0]
    mean = WeightedMean([10_000], codec)
    for x, weight in zip(inputs, weights, strict=True):
        mean.fold(0, weight, codec.encode(x))
    assert mean.totals == (sum(weights),)
    out = decoded(mean.finish()[0], 10_000, name)
    expected = np.average(inputs, axis=0, weights=weights)
    error = np.linalg.norm(out - expected) / np.linalg.norm(expected)
    # Twice: of the contributions (one of them weighs most), and of their mean.
    once = {"fp32": 1e-6, "bf16": 3e-3, "q4": 0.15, "low": 0.28, "min": 0.52}.get(name, 2e-2)
    assert error < 1.41 * once


def test_one_contribution_of_any_weight_comes_back() -> None:
    x = bell(1000)
    for weight in (WEIGHT_MIN, 1.0, 3.0, WEIGHT_MAX):
        mean = WeightedMean([1000], FP32)
        mean.fold(0, weight, FP32.encode(x))
        assert np.allclose(decoded(mean.finish()[0], 1000), x, rtol=3e-7, atol=0)


def test_every_unit_has_its_own_contributors() -> None:
    mean = WeightedMean([5, 5, 3], FP32)
    ones, twos = np.ones(5, np.float32), np.full(5, 2, np.float32)
    mean.fold(0, 1.0, FP32.encode(ones))
    mean.fold(0, 3.0, FP32.encode(twos))
    mean.fold(2, 7.0, FP32.encode(twos[:3]))
    first, second, third = mean.finish()
    assert decoded(first, 5).tolist() == [1.75] * 5
    assert second == b""
    assert decoded(third, 3).tolist() == [2.0] * 3


def test_finishing_empties_the_reducer() -> None:
    mean = WeightedMean([5], FP32)
    mean.fold(0, 1.0, FP32.encode(np.ones(5, np.float32)))
    assert mean.finish() != [b""]
    assert mean.finish() == [b""]
    assert mean.totals == (0.0,)


def test_a_span_speaks_the_layout_s_own_unit_numbers() -> None:
    layout = Layout.of([("w", (3 * CHUNK_VALUES + 11,))])
    mean = WeightedMean.of_span(layout, 2, 4, FP32)
    mean.fold(3, 1.0, FP32.encode(np.ones(11, np.float32)))
    assert mean.totals == (0.0, 1.0)
    for unit in (-1, 1, 4):
        with pytest.raises(ValueError, match=f"unit {unit} is outside the span 2..3"):
            mean.fold(unit, 1.0, FP32.encode(np.ones(11, np.float32)))
    assert [len(frame) > 0 for frame in mean.finish()] == [False, True]


@pytest.mark.parametrize("name", DENSE)
def test_the_same_order_gives_the_same_bytes(name: str) -> None:
    codec = get_codec(name)
    frames = [codec.encode(bell(65_536, seed)) for seed in range(5)]
    outcomes = []
    for _ in range(2):
        mean = WeightedMean([65_536], codec)
        for weight, frame in enumerate(frames, start=1):
            mean.fold(0, weight / 3, frame)
        outcomes.append(mean.finish())
    assert outcomes[0] == outcomes[1]


@pytest.mark.parametrize("name", DENSE)
def test_a_bad_payload_changes_nothing(name: str) -> None:
    codec = get_codec(name)
    good = codec.encode(bell(9000))
    alone = WeightedMean([9000], codec)
    alone.fold(0, 2.0, good)
    mean = WeightedMean([9000], codec)
    for bad in (b"", good[:-1], good[:-1] + bytes([good[-1] ^ 1]), codec.encode(bell(8999))):
        with pytest.raises(DecodeError):
            mean.fold(0, 5.0, bad)
        assert mean.totals == (0.0,)
    mean.fold(0, 2.0, good)
    with pytest.raises(DecodeError):
        mean.fold(0, 5.0, good[:-1])
    assert mean.totals == (2.0,)
    assert mean.finish() == alone.finish()


@pytest.mark.parametrize("weight", [0.0, -1.0, np.nan, np.inf, 1e-300, 2 * WEIGHT_MAX])
def test_a_weight_out_of_range_is_refused(weight: float) -> None:
    mean = WeightedMean([5], FP32)
    with pytest.raises(ValueError, match="weight"):
        mean.fold(0, weight, FP32.encode(np.ones(5, np.float32)))
    assert mean.finish() == [b""]


@pytest.mark.parametrize("name", ["q4", "min", "high", "bf16", "fp32"])
def test_the_largest_hostile_values_cannot_spoil_the_outcome(name: str) -> None:
    """Frames at the very edge of what is accepted, at the largest weight: still a finite mean."""
    peak = STEP_MAX.to_bytes(2, "little")
    edge = {
        # The largest step, levels that stand for as many as they can, and only the last.
        "q4": forge(4, 64, 0, peak + b"\xff\x7f" * 7 + b"\0" + b"\xee" * 32, RAW, bits=4),
        "min": forge(4, 64, 0, peak + b"\xff\x7f" + b"\0" + b"\xaa" * 16, RAW, bits=2),
        "high": forge(1, 64, 4096, np.float32(VALUE_ABS_MAX / 127).tobytes() + b"\x80" * 64, 0),
        "bf16": forge(2, 64, 0, b"\xff" * 64 + b"\x5f" * 64, 0),
        "fp32": forge(3, 64, 0, b"\xff" * 192 + b"\x5f" * 64, 0),
    }[name]
    assert np.abs(decoded(edge, 64, name)).max() > VALUE_ABS_MAX
    mean = WeightedMean([64], get_codec(name))
    for _ in range(64):
        mean.fold(0, WEIGHT_MAX, edge)
    out = decoded(mean.finish()[0], 64, name)
    if name == "min":  # half a step everywhere
        assert not out.any()
    else:
        assert np.allclose(np.abs(out), VALUE_ABS_MAX, rtol=0.05 if name == "q4" else 1e-6)


# ── one unit, in an order that the caller fixes ──────────────────────────────────────────────
@pytest.mark.parametrize("name", EVERY)
def test_a_unit_reduced_in_one_go_is_the_same_to_the_byte(name: str) -> None:
    codec = get_codec(name)
    frames = [codec.encode(bell(20_000, seed)) for seed in range(4)]
    weights = [1.0, 3.5, 2.0**-16, 1000.0]
    mean = WeightedMean([20_000], codec)
    for weight, frame in zip(weights, frames, strict=True):
        mean.fold(0, weight, frame)
    reduced = reduce_unit(list(zip(weights, frames, strict=True)), 20_000, codec)
    assert reduced == Reduced(mean.finish()[0], ())


def test_contributions_may_come_by_different_codecs() -> None:
    x = bell(5000)
    parts = [(1.0, get_codec(name).encode(x)) for name in EVERY if name != "sparse"]
    out = decoded(reduce_unit(parts, 5000, FP32).payload, 5000)
    assert np.linalg.norm(out - x) < 0.2 * np.linalg.norm(x)


def test_what_is_no_frame_is_left_out_and_said() -> None:
    frames = [FP32.encode(np.full(10, value, np.float32)) for value in (1, 2, 6)]
    parts = [(1.0, frames[0]), (5.0, b"?"), (1.0, frames[1][:-1]), (3.0, frames[2])]
    payload, refused = (got := reduce_unit(parts, 10, FP32)).payload, got.refused
    assert decoded(payload, 10).tolist() == [(1 + 18) / 4] * 10
    assert [index for index, _ in refused] == [1, 2]
    assert "too few" in refused[0][1]
    assert "announces" in refused[1][1]


def test_nothing_makes_no_frame() -> None:
    assert reduce_unit([], 10, FP32) == Reduced(b"", ())
    assert reduce_unit([(1.0, b"")], 10, FP32).payload == b""


def test_a_unit_larger_than_a_chunk_is_refused() -> None:
    with pytest.raises(ValueError, match=f"at most {CHUNK_VALUES}"):
        reduce_unit([], CHUNK_VALUES + 1, FP32)
    with pytest.raises(ValueError, match="weight nan"):
        reduce_unit([(np.nan, b"")], 10, FP32)
