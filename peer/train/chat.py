"""Conversations as training blocks. Implements `DataSource`.

A row is held out by the hash of what it asks, so the split is the same on every machine and in any
order of files. The others, in their order, make the blocks: so many rows as fill about
`block_samples` samples. Where the run's files are the same everywhere, so are the blocks, and the
group's ledger shares them out; where each peer has its own folder, it numbers its own and nobody
else hears of them (`peer.train.stream`).

The rows of a block are packed into samples of T tokens; see `peer.train.samples` for what a sample
is, and `peer.train.windows` for what happens to long conversations.
"""

from __future__ import annotations

import random
from array import array
from collections.abc import Sequence
from pathlib import Path
from typing import Final

import torch

from peer.errors import DataError
from peer.train.chat_format import ChatFormat
from peer.train.conversation import RowError
from peer.train.data import BLOCKS_MAX
from peer.train.rows import ChatRows
from peer.train.samples import Piece, pack
from peer.train.tokens import Tokenizer
from peer.train.windows import Windows

BLOCKS_MIN: Final = 16  # small data is cut finer, so that several peers can share it
REFUSED_SHOWN: Final = 5
VALIDATION_ROWS: Final = 64  # read at a time, until there are enough samples


class ChatBlocks:
    """Chat rows in numbered blocks, and held-out samples."""

    def __init__(
        self,
        files: Sequence[Path],
        tokenizer: Tokenizer,
        form: ChatFormat,
        *,
        sequence_length: int,
        block_samples: int,
        validation_share: float,
        validation_samples: int,
    ) -> None:
        """Looks at every row once.

        Raises:
            DataError: a file is missing or holds no row that can be used, or there are not two
                rows with different questions, to train on one and validate on the other.
        """
        self.windows = Windows(tokenizer, form, sequence_length)
        self.rows = ChatRows(files, self.windows.check)
        self._validation_samples = validation_samples
        self.held_out = held_out(self.rows, validation_share)
        kept = set(self.held_out)
        self._train = array("q", (i for i in range(len(self.rows)) if i not in kept))
        if not self._train:
            raise DataError(
                f"{files[0]}: {len(self.rows)} usable rows, of which none is left to train on; give"
                " rows with different questions"
            )
        self._edges = self._cut_blocks(block_samples * sequence_length * tokenizer.bytes_per_token)
        self.blocks = len(self._edges) - 1
        self._validation: list[torch.Tensor] | None = None
        self._too_long = set[int]()
        if not self.validation():
            raise DataError(
                f"{files[0]}: no held-out row fits into data.sequence_length = {sequence_length};"
                " raise it, or give more rows"
            )

    @property
    def refused(self) -> list[str]:
        """The first rows that were left out, and how many there are in all, for people."""
        count, first = self.rows.refused_count, self.rows.refused[:REFUSED_SHOWN]
        more = [f"left out: {count:,} rows in all"] if count > len(first) else []
        return [*(f"left out: {line}" for line in first), *more]

    def block(self, index: int, epoch: int) -> list[torch.Tensor]:
        """The samples of a block, each (3, T) int64; `epoch` shuffles their order."""
        rows = self._train[self._edges[index] : self._edges[index + 1]]
        rng = random.Random(f"{epoch}/{index}")
        samples, _ = pack(self._texts(rows), self.windows.length, self.windows.fill)
        rng.shuffle(samples)
        return samples

    def validation(self) -> list[torch.Tensor]:
        """Held-out samples (3, T): of as many rows as fill them, by the order of their hashes."""
        if self._validation is None:
            length, found = self.windows.length, list[Piece]()
            for start in range(0, len(self.held_out), VALIDATION_ROWS):
                found += self._texts(self.held_out[start : start + VALIDATION_ROWS])
                if sum(len(text.ids) for text in found) >= self._validation_samples * length:
                    break
            samples, _ = pack(found, length, self.windows.fill)
            self._validation = samples[: self._validation_samples]
        return self._validation

    def _texts(self, rows: Sequence[int]) -> list[Piece]:
        texts = []
        for row, example in zip(rows, self.rows.read(rows), strict=True):
            try:
                texts += self.windows.cut(example)
            except RowError as error:
                if row not in self._too_long:  # told once, not in every epoch
                    self._too_long.add(row)
                    self.rows.refuse(self.rows.name(row), str(error))
        return texts

    def _cut_blocks(self, bytes_per_block: int) -> array[int]:
        """Where each block begins among the rows to train on, and where the last one ends."""
        whole = sum(self.rows.bytes_of(row) for row in self._train)
        wanted = max(min(bytes_per_block, whole / BLOCKS_MIN), whole / BLOCKS_MAX)
        edges, size = array("q", [0]), 0
        for index, row in enumerate(self._train, 1):
            size += self.rows.bytes_of(row)
            if size >= wanted or index == len(self._train):
                edges.append(index)
                size = 0
        return edges


def held_out(rows: ChatRows, share: float) -> list[int]:
    """The rows that nobody trains on, in the order of their hashes: all below `share`, or else
    the least of all (several, if they ask the same)."""
    fractions = rows.fractions
    least = max(share, min(fractions))
    held = [i for i, at in enumerate(fractions) if at < share or at == least]
    return sorted(held, key=fractions.__getitem__)
