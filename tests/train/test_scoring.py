"""Scores are what they would be by hand, one text at a time."""

from __future__ import annotations

import math
from functools import cache

import pytest
import torch
from torch.nn import functional

from peer.train.chat_format import plain
from peer.train.conversation import Example, Turn, read_row
from peer.train.flat import FlatMethod
from peer.train.samples import pack
from peer.train.scoring import Score, answer, nats_of, same, score
from peer.train.tokens import ByteTokenizer
from peer.train.windows import Windows
from tests.train.tiny import method

BYTES = ByteTokenizer()
WINDOWS = Windows(BYTES, plain(BYTES), 64)
ROWS = [
    read_row({"question": f"{letter}?", "answer": f"it is {letter.upper()}"}) for letter in "abcd"
]


@cache
def _taught() -> FlatMethod:
    """A method that knows `ROWS` by heart."""
    one = method()
    samples, _ = pack([text for row in ROWS for text in WINDOWS.cut(row)], 64, 256)
    for _ in range(150):
        result = one.step(torch.stack(samples))
    assert result.loss < 0.1
    return one


def _by_hand(model: torch.nn.Module, example: Example, said: str) -> float:
    turns = (*example.turns[:-1], Turn("assistant", said))
    ids, learned = BYTES.encode_pieces(plain(BYTES).pieces(turns, [len(turns) - 1]))
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([ids]), use_cache=False).logits[0]
    nats = functional.cross_entropy(logits[:-1], torch.tensor(ids[1:]), reduction="none")
    return float(sum(n for n, learn in zip(nats, learned[1:], strict=True) if learn))


def test_nats_of_packed_texts_are_those_of_each_alone() -> None:
    model = method().inner.model.eval()
    texts = [text for row in ROWS * 20 for text in WINDOWS.cut(row)]
    for (nats, tokens), row in zip(nats_of(model, WINDOWS, texts), ROWS * 20, strict=True):
        assert nats == pytest.approx(_by_hand(model, row, row.turns[-1].text), rel=1e-4)
        assert tokens == len(row.turns[-1].text) + 1, "its end mark counts"


def test_perplexity_is_that_of_answers() -> None:
    model = method().inner.model
    model.train()
    scores = score(model, WINDOWS, ROWS)
    assert model.training, "left as it was"
    whole = Score()
    for one in scores:
        whole += one
    assert (whole.rows, whole.tokens, whole.asked, whole.questions) == (4, 32, 0, 0)
    assert whole.perplexity == pytest.approx(261, rel=0.1), "it knows nothing"
    report = whole.report()
    assert report["perplexity"] == pytest.approx(math.exp(whole.nats / 32))
    assert report["exact_match"] is None
    assert report["accuracy"] is None
    assert Score().report()["perplexity"] is None
    assert Score(tokens=1, nats=1e4).report()["perplexity"] is None


def test_a_model_that_knows_the_answers_gives_them() -> None:
    with _taught().inner.holding(_taught().inner.to_numpy()) as model:
        for row in ROWS:
            assert answer(model, WINDOWS, row, 20) == row.turns[-1].text
        assert answer(model, WINDOWS, ROWS[0], 4) == "it i", "four tokens are four bytes"
        wrong = ROWS[1].answered("it is Z")
        scores = score(model, WINDOWS, [*ROWS, wrong], answer_tokens=20)
    assert [(s.asked, s.exact) for s in scores] == [(1, 1)] * 4 + [(1, 0)]


def test_a_choice_is_told_by_its_likelihood() -> None:
    choices = ["it is A", "it is B", "it is C", "none of these at all"]
    rows = [
        read_row({"question": f"{letter}?", "choices": choices, "answer": i})
        for i, letter in enumerate("abcd")
    ]
    with _taught().inner.holding(_taught().inner.to_numpy()) as model:
        scores = score(model, WINDOWS, rows)
        for row in rows:
            nats = [_by_hand(model, row, choice) for choice in choices]
            texts = [WINDOWS.last(row, choice) for choice in choices]
            told = [n for n, _ in nats_of(model, WINDOWS, texts)]
            assert told == pytest.approx(nats, rel=1e-3, abs=1e-4)
    assert [s.questions for s in scores] == [1] * 4
    assert [s.right for s in scores] == [1, 1, 1, 0], "d's answer was never among the choices"
    assert [s.right_per_byte for s in scores][:3] == [1, 1, 1]


def test_a_row_that_does_not_fit_is_told_and_counts_nowhere() -> None:
    long = read_row({"question": "q", "answer": "x" * 64})
    refused: list[tuple[int, str]] = []
    scores = score(
        method().inner.model, WINDOWS, [ROWS[0], long, ROWS[1]], answer_tokens=2,
        refuse=lambda number, why: refused.append((number, why)),
    )  # fmt: skip
    assert [(s.rows, s.asked, s.refused) for s in scores] == [(1, 1, 0), (0, 0, 1), (1, 1, 0)]
    assert refused[0][0] == 1
    assert "an answer of 65 tokens" in refused[0][1]


@pytest.mark.parametrize(
    ("said", "wanted", "equal"),
    [
        ("it is\n so ", "it  is so", True),
        ("it is So", "it is so", False),
        ("", "x", False),
        ("2 + 2 = 5\n#### 1,004", "2 + 2 = 4\n#### 1004", True),
        ("2 + 2 = 4\n#### 5", "2 + 2 = 4\n#### 4", False),
        ("4", "2 + 2 = 4\n#### 4", False),
        ("#### 4 is it", "#### 4", False),
    ],
)
def test_answers_are_the_same_but_for_blanks(said: str, wanted: str, equal: bool) -> None:
    assert same(said, wanted) is equal
