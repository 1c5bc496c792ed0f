"""Packed texts don't see each other, and plain batches are what they were."""

from __future__ import annotations

import random
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch.nn import functional

from peer.manifest import MODEL_TYPES
from peer.train.models import seeded_model
from peer.train.samples import IGNORED, Piece, learned_tokens, pack, parts_of
from tests.train.tiny import batch, built, inner_of, manifest, method

SIZES = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2,
         "num_attention_heads": 2, "num_key_value_heads": 2,
         "max_position_embeddings": 64}  # fmt: skip
OTHERS: dict[str, dict[str, Any]] = {
    "gpt2": {"n_embd": 32, "n_layer": 2, "n_head": 2, "n_positions": 64, "vocab_size": 64},
    "gemma": {"head_dim": 16}, "gemma2": {"head_dim": 16, "sliding_window": 4},
    "qwen3": {"head_dim": 16}, "mistral": {"sliding_window": 4}, "phi3": {"sliding_window": 4},
}  # fmt: skip


def _texts(sizes: list[int], seed: int = 0) -> list[Piece]:
    rng = random.Random(seed)
    return [
        Piece([rng.randrange(1, 60) for _ in range(n)], [rng.random() < 0.5 for _ in range(n)])
        for n in sizes
    ]


@pytest.mark.parametrize("kind", MODEL_TYPES)
def test_no_text_looks_at_another(kind: str) -> None:
    config = {**(SIZES if kind != "gpt2" else {}), "model_type": kind, "pad_token_id": 63}
    model = seeded_model({**config, **OTHERS.get(kind, {})}, 0).eval()
    texts = _texts([9, 7, 6, 1, 3])
    (sample,), spots = pack(texts, 32, 0)
    ids, _, positions = parts_of(sample[None])
    with torch.no_grad():
        packed = model(input_ids=ids, position_ids=positions, use_cache=False).logits[0]
        for text, spot in zip(texts, spots, strict=True):
            alone = model(input_ids=torch.tensor([text.ids]), use_cache=False).logits[0]
            torch.testing.assert_close(packed[spot.start : spot.stop], alone, rtol=0, atol=1e-5)


@pytest.mark.parametrize("seed", range(20))
def test_every_text_is_whole_and_in_one_place(seed: int) -> None:
    rng = random.Random(seed)
    texts = _texts([rng.randrange(1, 33) for _ in range(rng.randrange(1, 60))], seed)
    samples, spots = pack(texts, 32, 63)
    seen = torch.zeros(len(samples), 32, dtype=torch.int64)
    for text, spot in zip(texts, spots, strict=True):
        ids, labels, positions = samples[spot.sample][:, spot.start : spot.stop]
        assert ids.tolist() == list(text.ids)
        assert positions.tolist() == list(range(len(text.ids)))
        wanted = [t if m else IGNORED for t, m in zip(text.ids, text.learned, strict=True)]
        assert labels.tolist() == [IGNORED, *wanted[1:]], "the first has nothing to be told from"
        seen[spot.sample, spot.start : spot.stop] += 1
    assert int(seen.max()) == 1
    filling = torch.stack(samples)[:, 0][seen == 0]
    assert (filling == 63).all()
    assert (torch.stack(samples)[:, 1][seen == 0] == IGNORED).all()
    whole = sum(len(text.ids) for text in texts)
    assert len(samples) <= 11 / 9 * max(1, -(-whole // 32)) + 1 + sum(
        len(text.ids) > 16 for text in texts
    )


def test_a_text_that_is_too_long_is_a_bug() -> None:
    with pytest.raises(ValueError, match="33 tokens in samples of 32"):
        pack(_texts([33]), 32, 0)


@pytest.mark.parametrize("kind", ["pretrain", "lora"])
def test_only_what_is_learned_counts_in_loss_gradient_and_weight(kind: str) -> None:
    one = method(kind)
    texts = [Piece(list(range(7)), [False] * 4 + [True] * 3), Piece([9, 8, 7], [True] * 3)]
    samples, _ = pack(texts, 16, 256)
    made = torch.stack(samples)
    assert learned_tokens(made) == 3 + 2
    with torch.no_grad():
        nats = []
        for text in texts:
            logits = one.inner.model(input_ids=torch.tensor([text.ids]), use_cache=False).logits[0]
            told = functional.cross_entropy(
                logits[:-1], torch.tensor(text.ids[1:]), reduction="none"
            )
            nats += [n for n, learn in zip(told.tolist(), text.learned[1:], strict=True) if learn]
    assert one.evaluate([made]) == pytest.approx(sum(nats) / 5, rel=1e-5)
    result = one.step(made)
    assert result.loss == pytest.approx(sum(nats) / 5, rel=1e-5)
    assert result.tokens == 5
    assert one.contribution().weight == 5
    other = made.clone()
    other[0, 0, -3:] = 5  # what fills a sample
    again = method(kind)
    assert again.step(other).loss == result.loss
    assert (inner_of(again).flat == inner_of(one).flat).all()


def test_evaluation_weighs_batches_by_what_is_learned() -> None:
    one = method()
    few, _ = pack([Piece([1, 2, 3], [False, False, True])], 16, 0)
    many, _ = pack([Piece(list(range(16)), [True] * 16)], 16, 0)
    a, b = one.evaluate([torch.stack(few)]), one.evaluate([torch.stack(many)])
    assert one.evaluate([torch.stack(few), torch.stack(many)]) == pytest.approx((a + 15 * b) / 16)
    nothing = torch.stack(few)
    nothing[:, 1] = IGNORED
    assert one.evaluate([torch.stack(few), nothing]) == pytest.approx(a)


def test_a_batch_of_nothing_learned_changes_nothing() -> None:
    one = method()
    before = one.inner.to_numpy()
    made = torch.zeros(2, 3, 16, dtype=torch.int64)
    made[:, 1] = IGNORED
    assert one.step(made).tokens == 0
    assert (one.inner.to_numpy() == before).all()


def test_a_plain_batch_is_learned_as_ever() -> None:
    one, other = method(), method()
    plain = batch(0)
    labelled = torch.stack([plain, plain, torch.arange(16).expand(4, 16)], 1)
    assert one.step(plain).tokens == 64
    assert other.step(labelled).tokens == 60, "the first token of a text is never learned"
    torch.testing.assert_close(inner_of(one).flat, inner_of(other).flat, rtol=0, atol=1e-6)
    with pytest.raises(ValueError, match="a batch of shape"):
        parts_of(torch.zeros(2, 4, 8))
    tiny = built(replace(manifest(), name="again"))
    tiny.step(plain)
    assert (inner_of(tiny).flat == inner_of(one).flat).all()
