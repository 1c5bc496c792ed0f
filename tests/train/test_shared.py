"""Samples come from the blocks that the ledger gives; a block counts when its last is taken."""

from __future__ import annotations

import pytest
import torch

from peer.errors import DataError
from peer.train.shared import SharedStream
from protocols.fragments import Fragments
from protocols.ledger import Entry
from protocols.schema import SchemaError
from protocols.sharding import Shares, block_of
from protocols.types import GroupName, PeerId, RunId
from tests.train.test_stream import Numbered

RUN = RunId("ab" * 32)
WHOLE = Fragments((0, 2))


def stream(blocks: int = 40, peer: str = "a", batch_size: int = 3) -> SharedStream:
    return SharedStream(Numbered(blocks), RUN, PeerId(peer), WHOLE, batch_size=batch_size)


def round_of(number: int, streams: list[SharedStream]) -> None:
    entries = [Entry(s.work.me, s.report(number), 0b11) for s in streams]
    for s in streams:
        s.apply(number, entries)


def test_a_block_counts_as_trained_once_its_last_sample_is_out() -> None:
    one = stream(batch_size=2)
    one.next_batch()
    assert (len(one.work.in_flight), one.work.open is not None) == (0, True)
    assert one.report(0).begun
    assert not one.report(0).trained
    one.next_batch()
    assert (len(one.work.in_flight), one.work.open is not None) == (1, True)
    assert [r.stop - r.start for r in one.report(0).trained] == [1]


def test_alone_every_block_comes_once_per_epoch() -> None:
    one = stream()
    for number in range(8):
        for _ in range(20):
            one.next_batch()
        round_of(number, [one])
    used = one.drain_used()
    assert len(used) == len(set(used)) == 160
    assert one.work.ledger.totals().trained == 160
    done = {block_of(RUN, 40, n) for n in range(one.work.ledger.floor)}
    assert done <= set(used)


def test_peers_of_a_group_never_train_on_the_same_block() -> None:
    streams = [stream(peer=p) for p in "abc"]
    for s in streams:
        s.share(Shares(RUN, s.work.me, [x.work.me for x in streams], GroupName("g")))
    for number in range(30):
        for i, s in enumerate(streams):
            for _ in range(1 + 4 * i):
                s.next_batch()
        round_of(number, streams)
    used = [s.drain_used() for s in streams]
    assert len({x for blocks in used for x in blocks}) == sum(map(len, used)) == 30 * (1 + 5 + 9)
    assert streams[0].work.ledger.totals().repeated == 0


def test_the_rest_of_a_block_that_another_has_trained_is_dropped() -> None:
    one, other = stream(batch_size=1), stream(peer="b", batch_size=3)
    one.next_batch()
    assert one.work.open is not None
    mine = one.drain_used()[0]
    other.work.open = one.work.open
    other.work.finished()
    one.apply(0, [Entry(other.work.me, other.report(0), 0b11)])
    one.next_batch()
    assert one.drain_used() != [mine]


def test_a_restored_stream_goes_on_with_what_the_ledger_says() -> None:
    one = stream()
    for _ in range(5):
        one.next_batch()
    round_of(0, [one])
    again = stream()
    again.adopt(one.ledger())
    used = set(one.drain_used())
    for _ in range(30):
        again.next_batch()
    assert not used & set(again.drain_used())
    with pytest.raises(SchemaError):
        stream(blocks=41).adopt(one.ledger())


def test_who_leaves_begins_nothing_and_says_so() -> None:
    one = stream(batch_size=2)
    one.next_batch()
    one.leave()
    report = one.report(0)
    assert (report.final, report.held, len(report.begun)) == (True, (), 1)
    one.apply(0, [Entry(one.work.me, report, 0b11)])
    assert one.work.ledger.totals().reissued == 1
    assert not one.work.ledger.holders


def test_blocks_without_samples_are_passed_over_and_all_empty_is_an_error() -> None:
    class Sparse(Numbered):
        def block(self, index: int, epoch: int) -> list[torch.Tensor]:
            return super().block(index, epoch) if index == 7 else []

    some = SharedStream(Sparse(12), RUN, PeerId("a"), WHOLE, batch_size=3)
    assert {int(some.next_batch()[0, 0]) for _ in range(3)} == {7}
    assert len(some.work.in_flight) > 3, "the empty ones are done, too"

    class Empty(Numbered):
        def block(self, index: int, epoch: int) -> list[torch.Tensor]:
            return []

    with pytest.raises(DataError, match="sequence_length"):
        SharedStream(Empty(12), RUN, PeerId("a"), WHOLE, batch_size=3).next_batch()


def test_with_nothing_left_within_reach_a_peer_trains_on_and_says_nothing() -> None:
    one = stream()
    one.share(Shares(RUN, PeerId("a"), [], GroupName("g"), {GroupName("h"): 10**9}))
    for _ in range(3):
        one.next_batch()
    assert (one.spare_blocks, len(one.work.in_flight)) == (3, 0)
