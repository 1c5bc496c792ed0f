"""Peers with folders of their own, which nobody else has seen, learn each other's answers."""

from __future__ import annotations

import asyncio
import dataclasses
import functools
from collections.abc import Callable
from pathlib import Path

from peer.checkpoint import CheckpointStore
from peer.config import PeerConfig
from peer.home import seats
from peer.manifest import CodecSpec, DataSpec, InnerSpec, Manifest, OuterSpec
from peer.observe import events as ev
from peer.peer import build_run
from peer.train import build_method
from peer.train.chat_format import plain
from peer.train.conversation import read_row
from peer.train.method import ArrayMap, DataSource, Method
from peer.train.scoring import score
from peer.train.tokens import ByteTokenizer
from peer.train.windows import Windows
from tests.peer.swarm import Swarm, toy_manifest
from tests.train.chat_tiny import lines
from tests.train.tiny import CONFIG, manifest

ANSWERS = {"a": "six", "b": "ten"}


def _rows(name: str) -> list[dict[str, str]]:
    return [{"question": f"{name}{n}?", "answer": ANSWERS[name]} for n in range(40)]


class Folders(Swarm):
    """Peers that train the manifest's method, each on its own folder (`--data`)."""

    def _data(self, name: str) -> tuple[Path, ...]:
        return (self.folder / f"{name}.jsonl",)

    def _build(self, name: str) -> Callable[[Manifest, Path], tuple[Method, DataSource]]:
        config = PeerConfig(data=self._data(name), device="cpu", threads=1)
        return lambda manifest, assets: build_run(manifest, assets, config)


async def test_what_one_was_told_the_other_knows(tmp_path: Path) -> None:
    for name in "ab":
        lines(tmp_path / f"{name}.jsonl", _rows(name))
    run = dataclasses.replace(
        manifest(),
        data=DataSpec(source="chat", sequence_length=48, block_samples=4, validation_share=0.1),
        inner=InnerSpec(lr=2e-2, warmup_steps=2, batch_size=4),
        outer=OuterSpec(lr=1.0, momentum=0.0),
        codec=CodecSpec(name="fp32"),
        schedule=toy_manifest(round_s=0.6).schedule,
    )
    assert run.model.config == CONFIG
    it = Folders(tmp_path, run)
    windows = Windows(ByteTokenizer(), plain(ByteTokenizer()), 48)
    told = [read_row(row) for row in _rows("b")]
    fresh = build_method(run, None, "cpu", 1)

    def ask(state: ArrayMap) -> int:
        fresh.load_state(state)
        with fresh.outer_model() as model:
            return sum(s.exact for s in score(model, windows, told, answer_tokens=5))

    async def known() -> int:
        """To how many of b's questions a's newest state has the answer."""
        await it.peers["a"].save()
        (seat,) = seats(tmp_path / "a")
        state = CheckpointStore(
            seat.folder / "runs" / run.run_id() / "checkpoints", read_only=True
        ).load()
        assert state is not None
        return await asyncio.to_thread(ask, state.arrays)  # its own thread: the peers go on

    try:
        await it.start("a")
        await it.start("b", via="a")
        await it.until(lambda: any(len(e.roster) == 2 for e in it.finished("a")), 60)
        async with asyncio.timeout(180):
            while await known() <= 30:  # of 40 answers that only the other one was told
                target = len(it.finished("a")) + 5
                await it.until(functools.partial(_at_least, it, target), 60)
        for name in "ab":
            assert not it.all(name, ev.BlocksCounted), "private blocks are in no account"
            assert it.finished(name)[-1].validation_loss is not None
    finally:
        for name in list(it.peers):
            await it.stop(name)


def _at_least(it: Swarm, target: int) -> bool:
    return len(it.finished("a")) >= target
