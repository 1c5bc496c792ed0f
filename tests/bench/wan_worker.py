"""Our side where peers fail: a peer whose work stays with it until an outcome contains it.

As `averaging_ours`, but what it contributes is local work on a vector, kept by the product's own
method of pretraining (outer learning rate 1, no momentum). Work h of peer p is a vector of normal
values that every process can compute. A contribution holds all works of its peer that no outcome
has had yet, unit by unit; outcomes say whose contribution is inside in which units. So everybody
can tell from the outcomes what each mean must be, and since which work a peer is behind; `verify`
compares, and a work that was lost or counted twice would show as a wrong mean.
"""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import numpy.typing as npt
import torch
import uvloop

from peer.capacity import Capacity
from peer.driver import AppliedFacts, Taken
from peer.exchange import Outcome, included_units
from peer.manifest import InnerSpec, OuterSpec
from peer.own_work import OwnWork
from peer.train.flat import FrozenWork
from peer.train.inner import Inner
from peer.train.pretrain import PretrainMethod
from peer.transfer import Snapshot
from protocols.blocks import NO_BLOCKS
from protocols.events import RecordSeen
from protocols.messages import Plan
from protocols.types import Digest, PeerId
from tensorcodecs import Codec
from tests.bench.averaging_ours import RUN, Murmurer, Vector, signer_of
from tests.bench.tensors import Float32
from tests.bench.worker import Reply, serve_async

_SHARES: Final = 4  # each unit is compared by two of eight peers; digests tell for the others
_NEVER: Final = -1


def work(seed: int, number: int, peer: int, unit: int, size: int) -> Float32:
    """(U,) What a peer learned before its contribution of that number, in one unit."""
    rng = np.random.Generator(np.random.SFC64([seed, number, peer, unit]))
    return rng.standard_normal(size, np.float32)


class _Walk(PretrainMethod):
    """Learns what it is told."""

    def learn(self, unit: int, work_U: Float32) -> None:
        self.inner.shift(self.inner.layout.unit_slice(unit), -work_U)

    def learned(self) -> None:
        """One work is whole; each weighs the same."""
        self._owed.add(1)


@dataclass(frozen=True, slots=True)
class _Applied:
    """What one outcome of all units said and did."""

    number: int
    inside: dict[int, tuple[float, npt.NDArray[np.bool_]]]
    """Contributor -> its weight, and for every unit whether its mean has it."""
    means: dict[int, Float32]
    """Unit -> (U,) what theta moved by, of those that this peer compares."""


class Walker(Vector):
    """`driver.Learner`: local work on theta, carried until it is inside."""

    def __init__(self, numel: int, codec: Codec, seed: int, index: int, size: int) -> None:
        super().__init__(0, codec)
        model = torch.nn.Module()
        model.register_parameter("values", torch.nn.Parameter(torch.zeros(numel)))
        inner = Inner(model, InnerSpec(), torch.device("cpu"))
        self.method = _Walk(inner, OuterSpec(lr=1.0, momentum=0.0), codec)
        self.grid = self.method.grid
        self.begun = False
        """Everybody was there once; from then on a roster may be of whoever is left."""
        self.number = _NEVER
        """Of the latest work."""
        self.froze: dict[int, int] = {}
        """Round of the group -> the latest work in its contribution."""
        self.log: list[_Applied] = []
        """Outcomes that were not verified yet."""
        self._seed, self._index = seed, index
        self._peers: dict[PeerId, int] = {signer_of(seed, i).peer_id: i for i in range(size)}
        self._me = signer_of(seed, index).peer_id
        self._own = OwnWork()
        self._asked = _NEVER
        """The latest round that a contribution was asked for."""

    @property
    def digest(self) -> Digest:
        return Digest(self.method.digest())

    def compares(self, unit: int) -> bool:
        return (unit + self._index) % _SHARES == 0

    def learn(self, number: int) -> None:
        """Do the work of that number."""
        for unit, size in enumerate(self.method.inner.layout.unit_sizes()):
            self.method.learn(unit, work(self._seed, number, self._index, unit, size))
        self.method.learned()
        self.number = number

    async def take(self, number: int) -> Taken:
        nothing = Taken(FrozenWork(0.0, lambda start, stop, codec: []), 0.0, 0, [])
        self.begun = self.begun or self.everybody
        if not self.begun:
            return nothing
        self._asked = number
        self.due.set()
        await self.go.wait()
        if number != self._asked or number < self.round:
            return nothing  # while this waited for the word, its round was over
        self.go.clear()
        self.due.clear()
        contribution = await asyncio.to_thread(self.method.contribution)
        self._own.froze(number, float(contribution.weight), NO_BLOCKS)
        self.froze[number] = self.number
        return Taken(contribution, 0.0, 1, [])

    async def apply(
        self, number: int, outcomes: list[Outcome], plan: Plan | None
    ) -> AppliedFacts | None:
        mine = self._own.inside(number, outcomes, self._me)
        digest = await asyncio.to_thread(self._apply, number, outcomes, mine)
        self.round = number + 1
        self.applied.set()
        return AppliedFacts(digest, float(mine.mean()))

    def _apply(self, number: int, outcomes: list[Outcome], mine: npt.NDArray[np.bool_]) -> Digest:
        units = [unit for outcome in outcomes for unit in outcome.units]
        compared = {
            unit: self.method.outer(unit, unit + 1)[0][0]
            for unit in range(len(units))
            if self.compares(unit) and units[unit]
        }
        self.method.apply(units, mine)
        for unit, before_U in compared.items():
            before_U -= self.method.outer(unit, unit + 1)[0][0]
        weights = {
            contributor.peer: contributor.weight
            for outcome in outcomes
            for contributor in outcome.header.contributors
        }
        inside = {
            self._peers[peer]: (weight, included_units(outcomes, peer))
            for peer, weight in weights.items()
        }
        self.log.append(_Applied(number, inside, compared))
        return self.digest

    async def snapshot(self) -> Snapshot:
        return Snapshot(self.round, self.digest, self.method.state())

    async def load(self, state: Snapshot, step_back: bool, parted: int | None = None) -> bool:
        """As a peer does that has nothing to keep: its local work is gone, and is missed."""
        self._own.forget()
        self.method.load_state(state.arrays)
        self.round = state.round
        return True


class Striver(Murmurer):
    """The command handlers: those of `averaging`, and `verify` tells more."""

    _learner: Walker

    def learner(self, numel: int, codec: Codec) -> Vector:
        self._capacity = Capacity(None)
        walker = Walker(numel, codec, self._seed, self._index, self._size)
        units = len(walker.method.inner.layout.unit_sizes())
        self._inside = np.full((self._size, units), _NEVER)
        return walker

    async def prepare(self, *, number: int) -> Reply:
        await asyncio.to_thread(self._learner.learn, number)
        await self._tell()
        return {}

    async def _tell(self) -> None:
        """What our line was seen to do, as `peer.presence` would within half a minute; and hear the
        others."""
        fellows = [record.upload_kbps for record in self._driver.records()]
        told = self._capacity.kbps(self._driver.exchange.upload.kbps, fellows)
        if told != self._upload_kbps:
            self._upload_kbps = told
            self._publish()
            await self._net.directory.publish_record(self._signed)
        for record in await self._net.directory.members(RUN):
            if record.peer != self._signer.peer_id:
                self._driver.feed(RecordSeen(record))

    async def average(self, *, number: int) -> Reply:
        return {**await super().average(number=number), "froze": self._learner.froze}

    async def check(self, *, number: int, froze: dict[str, dict[str, int]]) -> Reply:
        """Compare what was applied with what must have been.

        `froze`: worker -> round of the group -> the latest work in its contribution. Answers the
        worst `error` of any unit (see `_error`), the state's `digest`, and of each worker what
        `share` of its work of that number is inside, and the latest work that is inside with all
        before it (`whole`).
        """
        frozen = {
            int(peer): {int(n): works for n, works in rounds.items()}
            for peer, rounds in froze.items()
        }
        error = await asyncio.to_thread(self._compare, frozen)
        return {
            "error": error,
            "digest": self._learner.digest.hex(),
            "share": (self._inside >= number).mean(axis=1).tolist(),
            "whole": self._inside.min(axis=1).tolist(),
        }

    def _compare(self, froze: dict[int, dict[int, int]]) -> float:
        worst = 0.0
        log, self._learner.log = self._learner.log, []
        for applied in log:
            for unit, mean_U in applied.means.items():
                worst = max(worst, self._error(applied, unit, mean_U, froze))
            for peer, (_, units) in applied.inside.items():
                self._inside[peer, units] = froze[peer][applied.number]
        return worst

    def _error(
        self, applied: _Applied, unit: int, mean_U: Float32, froze: dict[int, dict[int, int]]
    ) -> float:
        """Of one unit's mean: how far any work's part in it is from what it must be, which is 1
        for what its peer's contribution held, and 0 for the work before, which was inside already.

        Works are nearly orthogonal, so each shows by its inner product with the mean.
        """
        worst = 0.0
        total = sum(weight for weight, units in applied.inside.values() if units[unit])
        for peer, (weight, units) in applied.inside.items():
            if units[unit]:
                since, until = int(self._inside[peer, unit]), froze[peer][applied.number]
                for number in range(max(0, since), until + 1):
                    work_U = work(self._seed, number, peer, unit, len(mean_U))
                    part = float(mean_U @ work_U) / float(work_U @ work_U) * total / weight
                    worst = max(worst, abs(part - (number > since)))
        return worst


async def main() -> None:
    peer = Striver()
    handlers: dict[str, Any] = {
        "start": peer.start,
        "prepare": peer.prepare,
        "gather": peer.gather,
        "average": peer.average,
        "check": peer.check,
    }
    await serve_async(handlers)


if __name__ == "__main__":
    torch.set_num_threads(1)
    uvloop.run(main())
