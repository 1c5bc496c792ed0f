"""Batches from the blocks that the group's ledger gives this peer.

`protocols.worklist` says which block comes next and keeps the account; here blocks become samples
and batches. A block counts as trained when its last sample was handed out: the step that takes it
follows at once, and contributions are frozen between two steps.
"""

from __future__ import annotations

from collections import Counter as Tally
from collections import deque
from collections.abc import Iterable
from typing import TYPE_CHECKING, Final

from peer.errors import DataError
from peer.train.method import DataSource
from protocols.blocks import BlockRange, BlockReport, from_wire
from protocols.fragments import Fragments
from protocols.group import GroupMachine
from protocols.ledger import Counted, Entry, Ledger
from protocols.ledger_state import pack_ledger, unpack_ledger
from protocols.messages import Plan
from protocols.sharding import Shares, block_of
from protocols.types import PeerId, RunId
from protocols.worklist import Worklist

if TYPE_CHECKING:
    import torch  # only `next_batch` needs more of it than a name

EMPTY_BLOCKS_MAX: Final = 1000  # without a sample, one after another: by then few blocks came twice


def shares_now(machine: GroupMachine, plan: Plan | None) -> Shares:
    """Whose part of the data is whose, as `machine` sees the network; `plan`: the latest."""
    group = machine.group
    others = [
        n.group
        for n in machine.members.everybody()
        if n.group and n.group != group and not n.left and not n.suspected
    ]
    mates = plan.peers if plan is not None else ()
    return Shares(machine.config.run, machine.me, mates, group, Tally(others))


def departed(machine: GroupMachine) -> tuple[PeerId, ...]:
    """Who said goodbye to us."""
    return tuple(n.record.peer for n in machine.members.everybody() if n.left)


class SharedStream:
    """An endless stream of batches (B, T). Touch it from one thread only."""

    def __init__(
        self, source: DataSource, run: RunId, me: PeerId, fragments: Fragments, *, batch_size: int
    ) -> None:
        """`fragments`: of the layout; a block is trained once its work is inside all units."""
        self.work = Worklist(me, Ledger(run, source.blocks, fragments.units, fragments))
        self.spare_blocks = 0
        """Trained on although all within reach was somebody's: counted nowhere else."""
        self._source = source
        self._run = run
        self._fragments = fragments
        self._batch_size = batch_size
        self._samples: deque[torch.Tensor] = deque()
        self._block = (0, 0)
        self._ordinal: int | None = None
        self._used: dict[tuple[int, int], None] = {}
        self._left: tuple[PeerId, ...] = ()

    # ── batches ──────────────────────────────────────────────────────────────────────────
    def next_batch(self) -> torch.Tensor:
        """The next (B, T) int64 token ids; raises like `next_rows`."""
        import torch

        return torch.stack(self.next_rows())

    def next_rows(self) -> list[torch.Tensor]:
        """The next batch's samples (T,).

        Raises:
            DataError: no block after block holds a sample, or the data can't be read.
        """
        if self._ordinal != self.work.open:
            self._samples.clear()  # the block has become somebody else's
        rows: list[torch.Tensor] = []
        while len(rows) < self._batch_size:
            if not self._samples:
                self._open_next()
            rows.append(self._samples.popleft())
            self._used[self._block] = None
            if not self._samples:
                self._finish()
        return rows

    def drain_used(self) -> list[tuple[int, int]]:
        """(epoch, block) pairs whose samples were handed out since the last call, in order."""
        used = list(self._used)
        self._used.clear()
        return used

    def _open_next(self) -> None:
        for _ in range(max(EMPTY_BLOCKS_MAX, 2 * self._source.blocks)):
            self._ordinal = self.work.next()
            ordinal = self._ordinal
            if ordinal is None:  # better than idle, but no part of the account
                ordinal = self.work.ledger.floor + self.spare_blocks
                self.spare_blocks += 1
            self._block = block_of(self._run, self._source.blocks, ordinal)
            epoch, block = self._block
            self._samples.extend(self._source.block(block, epoch))
            if self._samples:
                return
            self._finish()
        raise DataError(
            "none of the run's blocks holds a whole sample; give it more data or choose a smaller"
            " data.sequence_length"
        )

    def _finish(self) -> None:
        if self._ordinal is not None:
            self.work.finished()
            self._ordinal = None

    # ── the account ──────────────────────────────────────────────────────────────────────
    def share(self, shares: Shares) -> None:
        """Whose extents are whose from now on."""
        self.work.share(shares)

    def heard_goodbye(self, peers: Iterable[PeerId]) -> None:
        """Who said goodbye; the next report passes it on."""
        self._left = tuple(peers)

    def report(self, number: int) -> BlockReport:
        """For the contribution to round `number` that was frozen in this moment."""
        return self.work.report(number, self._left)

    def leave(self) -> None:
        """Begin no further block."""
        self.work.leave()

    def drop(self) -> None:
        """The local work is gone, and so is what was trained in it."""
        self.work.drop()

    def apply(self, number: int, entries: Iterable[Entry]) -> Counted:
        """Account for an applied round."""
        return self.work.apply(number, entries)

    def ledger(self) -> bytes:
        """For checkpoints and newcomers."""
        return pack_ledger(self.work.ledger)

    def at_work(self) -> tuple[BlockRange, ...]:
        """What no outcome tells of our work yet, for a newcomer to keep off."""
        return self.work.at_work()

    def adopt(self, data: bytes, avoid: tuple[BlockRange, ...] = ()) -> None:
        """Go on with the ledger in `data`, a donor's or our own from disk.

        Raises:
            SchemaError: it is none of this run and its data.
        """
        cut = self._fragments
        ledger = unpack_ledger(data, self._run, self._source.blocks, cut.units, cut)
        self.work.adopt(ledger, from_wire(avoid))
