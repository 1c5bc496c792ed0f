"""How good a model's answers are: perplexity, exact matches and multiple choice.

Perplexity: exp of the mean nats per token of the right answers, with what leads into them and what
ends them. Exact match: the model answers by itself, always by the likeliest token, and says
the same as the row but for blanks; where the row's answer ends in `#### X` (as in grade-school
maths sets), X alone counts. Multiple choice: the answer is the choice that the model finds
likeliest, as a whole (`right`) or per byte of its text (`right_per_byte`), so that long choices
have a chance.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Final

import torch

from peer.train.conversation import Example, RowError
from peer.train.sample import go_on
from peer.train.samples import IGNORED, Piece, pack
from peer.train.windows import Windows

TOKENS_AT_ONCE: Final = 2048  # in one forward pass: with 150,000 ids, 1.2 GB of logits
ROWS_AT_ONCE: Final = 64  # packed together
_FINAL: Final = "####"


@dataclass(slots=True)
class Score:
    """Sums over rows; add two with `+=`."""

    rows: int = 0
    tokens: int = 0
    """Of the right answers."""
    nats: float = 0.0
    """All they took."""
    asked: int = 0
    """Rows that the model answered by itself ..."""
    exact: int = 0
    """... and of them the right ones."""
    questions: int = 0
    """Rows with choices ..."""
    right: int = 0
    """... in which the right one was the likeliest ..."""
    right_per_byte: int = 0
    """... or the likeliest per byte."""
    refused: int = 0
    """Rows whose answer is longer than a sample; in no other count."""

    def __iadd__(self, other: Score) -> Score:
        for name in self.__slots__:
            setattr(self, name, getattr(self, name) + getattr(other, name))
        return self

    @property
    def loss(self) -> float:
        """Nats per token; NaN without any."""
        return self.nats / self.tokens if self.tokens else math.nan

    @property
    def perplexity(self) -> float:
        """exp of `loss`; infinite beyond what a float holds."""
        return math.exp(self.loss) if not self.loss > 700 else math.inf

    def report(self) -> dict[str, Any]:
        """Counts and what follows from them; None where there is nothing to tell from."""

        def share(part: int, whole: int) -> float | None:
            return part / whole if whole else None

        told = self.tokens > 0
        return {
            "rows": self.rows, "refused": self.refused, "tokens": self.tokens,
            "loss": self.loss if told else None,
            "perplexity": self.perplexity if told and math.isfinite(self.perplexity) else None,
            "asked": self.asked, "exact_match": share(self.exact, self.asked),
            "questions": self.questions, "accuracy": share(self.right, self.questions),
            "accuracy_per_byte": share(self.right_per_byte, self.questions),
        }  # fmt: skip


def score(
    model: torch.nn.Module,
    windows: Windows,
    examples: Sequence[Example],
    *,
    answer_tokens: int = 0,
    refuse: Callable[[int, str], None] | None = None,
) -> list[Score]:
    """What the model scores in each of the examples. It is left in the mode it was in.

    `answer_tokens`: at most so many of an answer of its own; 0: it is not asked. `refuse` is told
    the number of an example whose answer is longer than a sample, and why.
    """
    scores = [Score() for _ in examples]
    was_training = model.training
    model.eval()
    try:
        for start in range(0, len(examples), ROWS_AT_ONCE):
            chunk = range(start, min(start + ROWS_AT_ONCE, len(examples)))
            _likelihoods(model, windows, examples, chunk, scores, refuse)
        if answer_tokens:
            for example, found in zip(examples, scores, strict=True):
                if found.rows:
                    found.asked = 1
                    said = answer(model, windows, example, answer_tokens)
                    found.exact = int(same(said, example.turns[-1].text))
    finally:
        model.train(was_training)
    return scores


def _likelihoods(
    model: torch.nn.Module,
    windows: Windows,
    examples: Sequence[Example],
    chunk: range,
    scores: list[Score],
    refuse: Callable[[int, str], None] | None,
) -> None:
    texts: list[Piece] = []
    owners: list[tuple[int, int]] = []  # (example, choice; -1: its own answers)
    for number in chunk:
        example = examples[number]
        try:
            found = [(text, -1) for text in windows.cut(example)]
            found += [(windows.last(example, c), i) for i, c in enumerate(example.choices)]
        except RowError as error:
            scores[number].refused = 1
            if refuse is not None:
                refuse(number, str(error))
            continue
        scores[number].rows = 1
        texts += [text for text, _ in found]
        owners += [(number, choice) for _, choice in found]
    choices: dict[int, list[float]] = {}
    for (number, choice), (nats, tokens) in zip(
        owners, nats_of(model, windows, texts), strict=True
    ):
        if choice >= 0:
            choices.setdefault(number, []).append(nats)
        else:
            scores[number].nats += nats
            scores[number].tokens += tokens
    for number, nats_of_choices in choices.items():
        example, found_score = examples[number], scores[number]
        sizes = [len(choice.encode()) for choice in example.choices]
        per_byte = [nats / size for nats, size in zip(nats_of_choices, sizes, strict=True)]
        found_score.questions = 1
        found_score.right = int(_least(nats_of_choices) == example.right)
        found_score.right_per_byte = int(_least(per_byte) == example.right)


def nats_of(
    model: torch.nn.Module, windows: Windows, texts: Sequence[Piece]
) -> list[tuple[float, int]]:
    """(nats, tokens) of what is learned in each text."""
    device = next(model.parameters()).device
    samples, spots = pack(texts, windows.length, windows.fill)
    at_once = max(1, TOKENS_AT_ONCE // windows.length)
    told: list[torch.Tensor] = []  # (T,) nats of each token of a sample; 0 where not learned
    for start in range(0, len(samples), at_once):
        batch = torch.stack(samples[start : start + at_once]).to(device)
        ids_BT, labels_BT, positions_BT = batch.unbind(1)
        with torch.no_grad():
            logits_BTV = model(
                input_ids=ids_BT[:, :-1], position_ids=positions_BT[:, :-1], use_cache=False
            ).logits
            learned_BT = labels_BT[:, 1:] != IGNORED
            log_LV = torch.log_softmax(logits_BTV[learned_BT].float(), -1)
            wanted_L1 = labels_BT[:, 1:][learned_BT].unsqueeze(1)
            nats_BT = torch.zeros(ids_BT.shape, dtype=torch.float64)
            nats_BT[:, 1:][learned_BT.cpu()] = -log_LV.gather(1, wanted_L1)[:, 0].double().cpu()
        told += nats_BT.unbind()
    return [
        (float(told[spot.sample][spot.start : spot.stop].sum()), sum(text.learned[1:]))
        for text, spot in zip(texts, spots, strict=True)
    ]


# ── answers of its own ───────────────────────────────────────────────────────────────────
def answer(model: torch.nn.Module, windows: Windows, example: Example, tokens: int) -> str:
    """What the model answers to the example's last question, in at most `tokens` tokens."""
    tokenizer, form = windows.tokenizer, windows.form
    stop, _ = tokenizer.encode_pieces(form.stopping())
    stop_text = tokenizer.decode(stop).strip()  # empty where it is a mark

    def done(said: list[int]) -> bool:
        if said[-1] == tokenizer.end or said[-len(stop) :] == stop:
            return True
        return bool(stop_text) and stop_text in tokenizer.decode(said[-len(stop) - 8 :])

    asked = windows.question(example, tokens)
    said = go_on(
        model, asked, tokens, tokenizer.size, lambda logits_V: int(logits_V.argmax()), done
    )
    if said[-len(stop) :] == stop:
        del said[-len(stop) :]
    text = tokenizer.decode([i for i in said if i != tokenizer.end]).strip()
    if stop_text and stop_text in text:
        text = text.partition(stop_text)[0]
    lead_in = "".join(part or "" for part in form.lead_in).strip()
    return text.removeprefix(lead_in).strip() if lead_in else text.strip()


def same(said: str, wanted: str) -> bool:
    """Whether both say the same, blanks aside; of `#### X`, X alone counts, commas in it aside."""
    if _FINAL in wanted:
        ends = [text.rpartition(_FINAL)[2].replace(",", "").split() for text in (said, wanted)]
        return _FINAL in said and ends[0] == ends[1]
    return said.split() == wanted.split()


def _least(values: Sequence[float]) -> int:
    return min(range(len(values)), key=values.__getitem__)
