"""The judge of the ledger of blocks: what is counted as trained is in the state, and all adds up.

It knows which samples went into whose work, and whose work is in every state. So it can ask of each
group's ledger: do its sums add up, do all members at one state have the same one, and is all of a
block's work inside when the ledger says so?
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from peer.simulate.books import History
from peer.simulate.learner import BLOCK_SAMPLES
from protocols.ledger import Counted, Ledger
from protocols.ledger_state import pack_ledger
from protocols.sharding import block_of
from protocols.types import Digest, GroupName

if TYPE_CHECKING:
    from peer.simulate.nodes import Node
    from peer.simulate.world import World

LEDGER: Final = "the ledger adds up"
LEDGERS_KEPT: Final = 512  # states whose members may still be counting
Blame = Callable[[str, "Node | None", str], None]


@dataclass(frozen=True, kw_only=True)
class LedgerFigures:
    """What became of the blocks, summed over the groups that there are at the end."""

    trained: int = 0
    """In a group's state, each counted once there."""
    repeated: int = 0
    """Trained once more than that."""
    reissued: int = 0
    """Taken back from somebody who held them."""
    lost: int = 0
    elsewhere: int = 0
    """Left to other groups."""
    held: int = 0
    """Somebody's, trained in part or not yet."""


class LedgerJudge:
    """One per simulation; part of `Judge`."""

    def __init__(self, world: World, blame: Blame) -> None:
        self._world = world
        self._blame = blame
        self._seen: dict[Digest, bytes] = {}
        """State -> the ledger of whoever reached it first."""

    def counted(self, node: Node, after: History, counted: Counted, ledger: Ledger) -> None:
        """`node` accounts for the round that led to `after`."""
        packed = pack_ledger(ledger)
        known = self._seen.get(after.digest)
        if known is not None:
            if packed != known:
                self._blame(LEDGER, node, f"another ledger at the same state {after.round}")
                self._seen[after.digest] = packed
            return
        self._seen[after.digest] = packed
        if len(self._seen) > LEDGERS_KEPT:
            del self._seen[next(iter(self._seen))]
        if fault := ledger.fault():
            self._blame(LEDGER, node, f"round {counted.round}: {fault}")
        indices = {other.id: other.index for other in self._world.nodes}
        for peer, ranges in counted.trained.items():
            if self._world.is_liar(peer) or peer not in indices:
                continue
            for ordinal in (n for start, stop in ranges for n in range(start, stop)):
                inside = self._inside(after, indices[peer], ordinal)
                if inside < BLOCK_SAMPLES:
                    what = f"block {ordinal} of peer {indices[peer]} counts as trained with"
                    self._blame(LEDGER, node, f"{what} {inside} of {BLOCK_SAMPLES} samples inside")

    def _inside(self, state: History, machine: int, ordinal: int) -> int:
        scenario = self._world.scenario
        block = block_of(self._world.run_id, scenario.blocks, ordinal)
        return self._world.books.holds(state, machine, block)

    def final(self) -> LedgerFigures:
        """After the calm at the end."""
        ledgers: dict[GroupName, tuple[int, Ledger]] = {}
        for node in self._world.nodes:
            stream = node.learner.stream if node.learner is not None else None
            if stream is None or node.group is None or not node.group.ready or node.spec.lie:
                continue
            best = ledgers.get(node.group.group)
            if best is None or best[0] < node.group.round:
                ledgers[node.group.group] = (node.group.round, stream.work.ledger)
        count = dict.fromkeys(("trained", "repeated", "reissued", "lost", "elsewhere", "held"), 0)
        for group, (_, ledger) in ledgers.items():
            total = ledger.totals()
            if fault := ledger.fault():
                self._blame(LEDGER, None, f"{group}: {fault}")
            for name in count:
                count[name] += getattr(total, name)
            count["held"] += total.in_flight
        return LedgerFigures(**count)
