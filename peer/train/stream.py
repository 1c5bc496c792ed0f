"""Batches from files of the peer's own (`--data`), each block once per epoch.

Nobody else has these blocks, so there is nothing to share out and nothing to account for; what the
run's common data needs is in `peer.train.shared`. The set of blocks may change all the same: the
stream keeps its epoch and what it has done in it.
"""

from __future__ import annotations

import hashlib
import random
from collections import deque
from collections.abc import Callable, Iterable
from typing import Any

import torch

from peer.errors import DataError
from peer.train.method import DataSource
from protocols.blocks import NO_BLOCKS, BlockReport


class BlockStream:
    """An endless stream of batches (B, T). Touch it from one thread only."""

    def __init__(self, source: DataSource, *, batch_size: int, seed: int, peer: str) -> None:
        """`seed` and `peer` make the order; until `set_blocks` all blocks are its own."""
        self._source = source
        self._batch_size = batch_size
        self._key = f"{seed}/{peer}"
        self._own: frozenset[int] | None = None
        self.epoch = 0
        self._done: set[int] = set()
        self._queue: deque[int] | None = None  # own blocks still to do in this epoch, in order
        self._current = -1
        self._samples: deque[torch.Tensor] = deque()
        self._used: dict[tuple[int, int], None] = {}

    @property
    def own_blocks(self) -> int:
        """How many blocks are this peer's own."""
        return self._source.blocks if self._own is None else len(self._own)

    def set_blocks(self, owner: Callable[[int], bool] | Iterable[int]) -> None:
        """Take these blocks from now on: a predicate over block numbers, or the numbers.

        With none of its own (more peers than blocks), a peer goes on with all: better than idle.
        What is left of a block that is not its own any more is dropped.
        """
        every = range(self._source.blocks)
        own = frozenset(filter(owner, every) if callable(owner) else set(owner).intersection(every))
        self._own = own or None
        self._queue = None
        if own and self._current not in own:
            self._samples.clear()

    def next_batch(self) -> torch.Tensor:
        """The next (B, T) int64 token ids.

        Raises:
            DataError: no block of a whole epoch holds a sample, or the data can't be read.
        """
        rows: list[torch.Tensor] = []
        while len(rows) < self._batch_size:
            if not self._samples:
                self._open_next()
            rows.append(self._samples.popleft())
            self._used[self.epoch, self._current] = None
        return torch.stack(rows)

    def drain_used(self) -> list[tuple[int, int]]:
        """(epoch, block) pairs whose samples were handed out since the last call, in order."""
        used = list(self._used)
        self._used.clear()
        return used

    def report(self, number: int) -> BlockReport:
        """Nothing: nobody else could train on these."""
        return NO_BLOCKS

    def drop(self) -> None:
        """Its blocks count as done all the same; the next epoch has them again."""

    def state(self) -> dict[str, Any]:
        """What to save: plain values, two hex digits for eight blocks."""
        bits = bytearray(-(-self._source.blocks // 8))
        for block in self._done:
            bits[block // 8] |= 1 << block % 8
        return {"epoch": self.epoch, "blocks": self._source.blocks, "done": bits.hex()}

    def load_state(self, state: dict[str, Any]) -> None:
        """Go on where `state` was taken; of another data set only the epoch is kept.

        Raises:
            ValueError: not a state.
        """
        epoch, blocks, done = state.get("epoch"), state.get("blocks"), state.get("done")
        if not isinstance(epoch, int) or epoch < 0 or not isinstance(done, str):
            raise ValueError("not the state of a block stream")
        bits = bytes.fromhex(done)
        self.epoch = epoch
        self._done = set()
        if blocks == self._source.blocks and len(bits) == -(-self._source.blocks // 8):
            self._done = {b for b in range(self._source.blocks) if bits[b // 8] >> b % 8 & 1}
        self._queue = None
        self._samples.clear()

    def _open_next(self) -> None:
        """Open the next block that holds a sample."""
        epoch = self.epoch
        while not self._samples:
            if not self._remaining():
                if self.epoch - epoch >= 2:
                    raise DataError(
                        "none of this peer's blocks holds a whole sample; give it more data or "
                        "choose a smaller data.sequence_length"
                    )
                self.epoch += 1
                self._done.clear()
                self._queue = None
                continue
            assert self._queue is not None
            self._current = self._queue.popleft()
            self._done.add(self._current)
            self._samples.extend(self._source.block(self._current, self.epoch))

    def _remaining(self) -> bool:
        if self._queue is None:
            own = range(self._source.blocks) if self._own is None else self._own
            order = sorted(set(own) - self._done)
            digest = hashlib.sha256(f"{self._key}/{self.epoch}".encode()).digest()
            random.Random(digest).shuffle(order)
            self._queue = deque(order)
        return bool(self._queue)
