"""The questions that a group scores between its peers, and this peer's share of them.

Files that the run brings are the same everywhere: in the order of their rows' hashes, which is as
good as drawn, the n-th of m peers takes every m-th row from the n-th on. What each peer holds out
of files of its own nobody else has, so there it scores its own, up to the manifest's limit.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch

from peer.manifest import Manifest
from peer.train.chat import ChatBlocks
from peer.train.chat_format import format_beside, plain
from peer.train.method import DataSource
from peer.train.models import require_asset
from peer.train.rows import ChatRows
from peer.train.scoring import Score, score
from peer.train.windows import Windows


class Questions:
    """Rows to be scored. Touch it in the training thread only."""

    def __init__(
        self,
        windows: Windows,
        rows: ChatRows,
        chosen: Sequence[int],
        *,
        shared: bool,
        rows_max: int,
        answer_tokens: int,
    ) -> None:
        """`chosen`: row numbers, in the same order wherever the rows are; `shared`: others have
        them too."""
        self._windows = windows
        self._rows = rows
        self._chosen = list(chosen)
        self._shared = shared
        self._rows_max = rows_max
        self._answer_tokens = answer_tokens

    def share(self, index: int, count: int) -> list[int]:
        """The rows of the peer with this index of so many."""
        mine = self._chosen[index::count] if self._shared else self._chosen
        return mine[: self._rows_max]

    def score(self, model: torch.nn.Module, index: int, count: int) -> Score:
        """What the model scores in this peer's share.

        Raises:
            DataError: a file has changed.
        """
        total = Score()
        examples = self._rows.read(self.share(index, count))
        for found in score(model, self._windows, examples, answer_tokens=self._answer_tokens):
            total += found
        return total


def build_questions(
    manifest: Manifest, assets: Path | None, source: DataSource | None, *, own_data: bool
) -> Questions | None:
    """The run's questions, or what `source` holds out; None where there are neither.

    Raises:
        DataError: the run's question files hold no row that can be used.
        ManifestError: the run's chat format is damaged.
        StorageError: one of its files is missing.
    """
    spec = manifest.evaluation
    if not spec.rows:
        return None
    limits = {"rows_max": spec.rows, "answer_tokens": spec.answer_tokens}
    if spec.paths:
        from peer.train import build_tokenizer

        tokenizer = build_tokenizer(manifest, assets)
        form = None if assets is None else format_beside(assets / "tokenizer" / "tokenizer.json")
        windows = Windows(tokenizer, form or plain(tokenizer), manifest.data.sequence_length)
        rows = ChatRows([require_asset(assets, name) for name in spec.paths], windows.check)
        order = sorted(range(len(rows)), key=rows.fractions.__getitem__)
        return Questions(windows, rows, order, shared=True, **limits)
    if isinstance(source, ChatBlocks):
        shared = not own_data and bool(manifest.data.paths)
        return Questions(source.windows, source.rows, source.held_out, shared=shared, **limits)
    return None
