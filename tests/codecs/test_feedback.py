"""Error feedback loses nothing, hides nothing, and works with every codec."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import pytest

from tensorcodecs import CHUNK_VALUES, CODEC_NAMES, EncodeError, get_codec
from tensorcodecs.feedback import DEFAULT_DECAY, decay_of, encode_with_feedback
from tests.codecs.samples import bell

if TYPE_CHECKING:
    from tensorcodecs import Codec
    from tensorcodecs.frame import Float32

NAMES = (*CODEC_NAMES, "ecsq:0.7", "sparse:16")


def decode(codec: Codec, frames: list[bytes], numel: int) -> Float32:
    out = np.zeros(numel, np.float32)
    if frames:
        codec.decode_many(frames, out)
    return out


@pytest.mark.parametrize("name", NAMES)
def test_what_is_sent_and_what_stays_are_what_was_to_be_sent(name: str) -> None:
    codec = get_codec(name)
    for seed, numel in enumerate((0, 1, 17, 4096, 5000, CHUNK_VALUES, 2 * CHUNK_VALUES + 300)):
        residual, decay = bell(numel, seed + 50), (0.0, 0.5, 0.95, 1.0)[seed % 4]
        for step in range(3):
            x = bell(numel, 10 * seed + step)
            wanted = decay * residual.astype(np.float64) + x
            size = np.abs(residual) + np.abs(x)
            frames, residual = encode_with_feedback(codec, x, residual, decay)
            sent = decode(codec, frames, numel)
            total = sent.astype(np.float64) + residual
            rounding = 2.0**-22 * (size + np.abs(sent)) + 2.0**-149
            assert np.all(np.abs(total - wanted) <= rounding), (numel, step)


@pytest.mark.parametrize("name", NAMES)
def test_the_residual_is_the_difference_to_what_others_decode(name: str) -> None:
    codec = get_codec(name)
    x, residual = bell(CHUNK_VALUES + 999, 1), bell(CHUNK_VALUES + 999, 2)
    frames, left = encode_with_feedback(codec, x, residual, 0.5)
    error = np.float32(0.5) * residual + x
    assert frames == codec.encode_many(error)
    assert np.array_equal(left, error - decode(codec, frames, len(x)))


def test_neither_argument_is_changed_and_nothing_is_remembered() -> None:
    x, residual = bell(10_000, 1), bell(10_000, 2)
    before = x.copy(), residual.copy()
    codec = get_codec("sparse")
    frames, left = encode_with_feedback(codec, x, residual, 0.95)
    again, left_again = encode_with_feedback(codec, x, residual, 0.95)
    assert frames == again
    assert np.array_equal(left, left_again)
    assert np.array_equal(x, before[0])
    assert np.array_equal(residual, before[1])
    assert not np.shares_memory(left, x)
    assert not np.shares_memory(left, residual)


def test_an_exact_codec_leaves_nothing() -> None:
    x = bell(5000)
    _, left = encode_with_feedback(get_codec("fp32"), x, np.zeros_like(x), 1.0)
    assert not left.any()


def test_without_decay_everything_arrives_in_time() -> None:
    """The mean of what was sent nears x as 1 / rounds; without feedback it never does."""
    codec = get_codec("sparse")
    for seed in range(5):
        x = np.random.default_rng(seed).standard_normal(4096).astype(np.float32)
        residual, total = np.zeros_like(x), np.zeros(4096)
        errors = []
        for step in range(1, 401):
            frames, residual = encode_with_feedback(codec, x, residual, 1.0)
            total += decode(codec, frames, 4096)
            if step in {100, 200, 400}:
                errors.append(np.linalg.norm(total / step - x) / np.linalg.norm(x))
        assert errors[0] < 0.5, seed
        assert errors[2] < 0.55 * errors[1] < 0.55 * 0.55 * errors[0] * 1.2, seed
        once = decode(codec, codec.encode_many(x), 4096)
        assert np.linalg.norm(once - x) / np.linalg.norm(x) > 0.9, seed


def test_a_decay_keeps_the_residual_bounded() -> None:
    codec, residual = get_codec("sparse"), np.zeros(4096, np.float32)
    for step in range(300):
        x = np.random.default_rng(step).standard_normal(4096).astype(np.float32)
        _, residual = encode_with_feedback(codec, x, residual, 0.95)
    # Were nothing sent, the spread would be 1 / sqrt(1 - 0.95**2) = 3.2.
    assert residual.std() < 3.0


@pytest.mark.parametrize("name", NAMES)
def test_a_sum_that_cannot_be_sent_is_named_and_changes_nothing(name: str) -> None:
    codec, where = get_codec(name), CHUNK_VALUES + 5
    x, residual = bell(CHUNK_VALUES + 100), np.zeros(CHUNK_VALUES + 100, np.float32)
    for bad, left in ((np.nan, 0.0), (1.0, np.inf), (2.0**64, 2.0**64), (-3e38, -3e38)):
        x[where], residual[where] = bad, left
        before = residual.copy()
        with pytest.raises(EncodeError, match=f"value {where} is") as caught:
            encode_with_feedback(codec, x, residual, 1.0)
        assert caught.value.index == where
        assert np.array_equal(residual, before)


def test_arguments_that_make_no_sense_are_refused() -> None:
    codec, x = get_codec("sparse"), bell(100)
    for decay in (-0.1, 1.01, np.nan, np.inf):
        with pytest.raises(ValueError, match="decay"):
            encode_with_feedback(codec, x, x, decay)
    with pytest.raises(ValueError, match="residual of 99 values for 100"):
        encode_with_feedback(codec, x, x[:99], 1.0)
    with pytest.raises(ValueError, match="float32 vector"):
        encode_with_feedback(codec, x, x.astype(np.float64), 1.0)
    with pytest.raises(ValueError, match="float32 vector"):
        encode_with_feedback(codec, x[::2], x[::2].copy(), 1.0)


def test_every_codec_has_a_default_decay_or_none() -> None:
    assert {*CODEC_NAMES, "ecsq"} == set(DEFAULT_DECAY)
    for decay in DEFAULT_DECAY.values():
        assert decay is None or 0 < decay <= 1
    assert DEFAULT_DECAY["sparse"] is not None
    assert decay_of("sparse:16") == decay_of("sparse") == DEFAULT_DECAY["sparse"]
    assert decay_of("ecsq:0.7") == DEFAULT_DECAY["ecsq"]
    assert decay_of("fp32") is None
    assert decay_of("unheard-of") is None
