"""A peer goes through its own blocks once per epoch, whatever happens to the set."""

from __future__ import annotations

import random

import pytest
import torch

from peer.errors import DataError
from peer.train.stream import BlockStream


class Numbered:
    """Block b holds `per_block` samples (b, i)."""

    def __init__(self, blocks: int, per_block: int = 3) -> None:
        self.blocks = blocks
        self._per_block = per_block

    def block(self, index: int, epoch: int) -> list[torch.Tensor]:
        return [torch.tensor([index, i]) for i in range(self._per_block)]

    def validation(self) -> list[torch.Tensor]:
        return []


def _stream(blocks: int = 12, peer: str = "a", batch_size: int = 3) -> BlockStream:
    return BlockStream(Numbered(blocks), batch_size=batch_size, seed=1, peer=peer)


def _epoch(stream: BlockStream) -> list[int]:
    """Blocks in the order in which they come up in what is left of this epoch."""
    epoch, found = stream.epoch, list[int]()
    while True:
        batch = stream.next_batch()
        if stream.epoch != epoch:
            return found
        found.append(int(batch[0, 0]))


def test_each_own_block_comes_once_per_epoch_in_an_order_of_its_own() -> None:
    stream = _stream()
    first = _epoch(stream)
    assert sorted(first) == list(range(12))
    assert first == _epoch(_stream())
    assert first != _epoch(_stream(peer="b"))


def test_peers_with_disjoint_blocks_use_disjoint_samples() -> None:
    streams = [_stream(peer=p) for p in "abc"]
    for i, stream in enumerate(streams):
        stream.set_blocks(lambda block, i=i: block % 3 == i)  # type: ignore[misc]
    used = [set(s.drain_used()) for s in streams if [s.next_batch() for _ in range(4)]]
    assert [len(blocks) for blocks in used] == [4, 4, 4]
    assert len(set.union(*used)) == 12


def test_a_changed_set_keeps_the_epoch_and_what_is_done_in_it() -> None:
    for seed in range(200):
        rng = random.Random(seed)
        stream = _stream()
        done: list[int] = []
        while stream.epoch == 0:
            if rng.random() < 0.3:
                stream.set_blocks(set(rng.sample(range(12), rng.randint(1, 12))))
            batch = stream.next_batch()
            if stream.epoch == 0:
                done.append(int(batch[0, 0]))
        assert len(done) == len(set(done)), f"seed {seed}"


def test_a_block_that_is_no_longer_ours_is_dropped_at_once() -> None:
    stream = _stream(batch_size=1)
    mine = int(stream.next_batch()[0, 0])
    stream.set_blocks(lambda block: block != mine)
    assert mine not in [int(stream.next_batch()[0, 0]) for _ in range(33)]


def test_used_blocks_are_told_once_and_again_when_used_again() -> None:
    stream = _stream(batch_size=2)
    first = int(stream.next_batch()[0, 0])
    assert stream.drain_used() == [(0, first)]
    assert stream.drain_used() == []
    second = int(stream.next_batch()[1, 0])
    assert stream.drain_used() == [(0, first), (0, second)]


def test_without_a_block_of_its_own_a_peer_goes_on_with_all() -> None:
    stream = _stream()
    stream.set_blocks(lambda block: False)
    assert sorted(_epoch(stream)) == list(range(12))


def test_a_restored_stream_goes_on_with_what_was_left() -> None:
    stream = _stream()
    done = [int(stream.next_batch()[0, 0]) for _ in range(5)]
    restored = _stream()
    restored.load_state(stream.state())
    assert sorted(done + _epoch(restored)) == list(range(12))
    other = _stream(blocks=20)
    other.load_state(stream.state())
    assert sorted(_epoch(other)) == list(range(20))
    for bad in ({}, {"epoch": -1, "done": ""}, {"epoch": 0, "done": "xy"}):
        with pytest.raises(ValueError, match=r"state|hexadecimal"):
            restored.load_state(bad)


def test_blocks_without_samples_are_passed_over_and_all_empty_is_an_error() -> None:
    class Sparse(Numbered):
        def block(self, index: int, epoch: int) -> list[torch.Tensor]:
            return super().block(index, epoch) if index == 7 else []

    stream = BlockStream(Sparse(12), batch_size=3, seed=0, peer="a")
    assert {int(stream.next_batch()[0, 0]) for _ in range(3)} == {7}
    stream.set_blocks({1, 2})
    with pytest.raises(DataError, match="sequence_length"):
        stream.next_batch()
