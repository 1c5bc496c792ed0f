"""What an exchange keeps of past rounds is bounded, however its peer got from one to the next."""

from __future__ import annotations

import random

from peer.exchange import ROUNDS_HELD_MORE, Exchange, Outcome
from peer.net.budget import UploadBudget
from peer.net.memory import MemoryNetwork
from peer.train.pretrain import MeanReducer
from protocols.messages import OUTCOME_DOMAIN, OutcomeHeader
from protocols.records import sign
from tensorcodecs import CHUNK_VALUES, get_codec
from tests.protocols.samples import GROUP, RUN, signer


def outcome(number: int, start: int = 0) -> Outcome:
    header = OutcomeHeader(
        RUN, GROUP, number, 3, start, start, start + 1, (), bytes(32), 1, 0.1, b""
    )
    return Outcome(header, sign(signer(0), OUTCOME_DOMAIN, header), (b"",))


async def test_leaps_over_rounds_leave_no_heap_behind() -> None:
    transport = MemoryNetwork().transport(signer(0).peer_id, UploadBudget())
    exchange = Exchange(transport, signer(0), MeanReducer([CHUNK_VALUES], get_codec("q4")))
    rng = random.Random(4)
    number = 0
    held: set[int] = set()
    for _ in range(200):
        number += rng.choice((1, 1, 2, 30))
        fresh = [outcome(number, start) for start in range(2)]
        for one in fresh:
            exchange.hold(one)
        held.add(number)
        late = outcome(max(0, number - 60))
        exchange.hold(late)
        kept = sorted(n for n in held if exchange.find(outcome(n).header))
        assert len(kept) <= exchange.rounds_kept + ROUNDS_HELD_MORE
        assert number in kept, "the latest round stays"
        if rng.random() < 0.3:
            exchange.settle(number, fresh)
            assert exchange.find(outcome(number, 1).header)
    assert exchange.find(outcome(number).header)
    await exchange.close()
