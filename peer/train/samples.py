"""What a sample may carry beside its ids: which tokens are learned, and where each one stands.

A plain sample is (T,) ids: every token is learned, and it is one text. A sample of conversations is
(3, T): ids, labels and positions. A label is the id itself, or IGNORED where a token is only read.
Positions count from 0 in each of the texts that lie end to end in the sample: transformers' models
take a position that does not follow on for the beginning of another text, and let no text look at
another. Both kinds are stacked to batches: (B, T) or (B, 3, T) int64.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final, NamedTuple

import torch

IGNORED: Final = -100
"""The label of a token that is read and not learned (transformers' and torch's convention)."""


class Labelled(NamedTuple):
    """A batch by its parts, each (B, T)."""

    ids: torch.Tensor
    labels: torch.Tensor
    positions: torch.Tensor | None
    """None: 0 to T-1 in every row."""


def parts_of(batch: torch.Tensor) -> Labelled:
    """Take a batch apart.

    Raises:
        ValueError: it is neither (B, T) nor (B, 3, T).
    """
    if batch.dim() == 2:
        return Labelled(batch, batch, None)
    if batch.dim() != 3 or batch.shape[1] != 3:
        raise ValueError(f"a batch of shape {tuple(batch.shape)}, not (B, T) or (B, 3, T)")
    return Labelled(*batch.unbind(1))


def learned_tokens(batch: torch.Tensor) -> int:
    """How many tokens a step on it learns: what its loss is a mean of, and what its work weighs.

    All of a plain batch, by convention its first tokens too.
    """
    if batch.dim() == 2:
        return batch.numel()
    return int((parts_of(batch).labels[:, 1:] != IGNORED).sum())


class Piece(NamedTuple):
    """A text to pack: its ids, and which of them are learned (never the first: it has nothing to
    be told from)."""

    ids: Sequence[int]
    learned: Sequence[bool]


class Spot(NamedTuple):
    """Where a text went."""

    sample: int
    start: int
    stop: int


def pack(texts: Sequence[Piece], length: int, fill: int) -> tuple[list[torch.Tensor], list[Spot]]:
    """(samples (3, T) with T = `length`, where each text is): the longest texts first, each into
    the first sample with room (first-fit decreasing: at most 11/9 of the fewest samples, plus one).

    No text is cut, so none may be longer than T. What stays empty is filled with `fill`, not
    learned and out of sight.
    """
    order = sorted(range(len(texts)), key=lambda i: -len(texts[i].ids))
    bins: list[list[int]] = []
    room: list[int] = []
    spots = [Spot(0, 0, 0)] * len(texts)
    open_from = 0  # before it all are full
    for i in order:
        size = len(texts[i].ids)
        if size > length:
            raise ValueError(f"a text of {size} tokens in samples of {length}")
        index = next((k for k in range(open_from, len(bins)) if room[k] >= size), len(bins))
        if index == len(bins):
            bins.append([])
            room.append(length)
        spots[i] = Spot(index, length - room[index], length - room[index] + size)
        bins[index].append(i)
        room[index] -= size
        while open_from < len(bins) and room[open_from] == 0:
            open_from += 1
    samples = []
    for members, left in zip(bins, room, strict=True):
        ids: list[int] = []
        labels: list[int] = []
        positions: list[int] = []
        for i in members:
            text = texts[i]
            ids += text.ids
            labels.append(IGNORED)
            labels += [
                token if learn else IGNORED
                for token, learn in zip(text.ids[1:], text.learned[1:], strict=True)
            ]
            positions += range(len(text.ids))
        ids += [fill] * left
        labels += [IGNORED] * left
        positions += range(left)
        samples.append(torch.tensor([ids, labels, positions], dtype=torch.int64))
    return samples, spots
