"""A peer of the product over libp2p, slowed to an equal pace, that reports how its model does.

Several peers share one machine here, so each inner step takes at least `step_s`: then everybody
makes the same number of steps, however many run, as long as the cores are not full.
"""

from __future__ import annotations

import dataclasses
import tempfile
import time
from collections.abc import Callable
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any, Final

import torch
import uvloop

import peer.net.network  # noqa: F401 - imports hivemind: seconds, so before the clock runs
from peer.config import PeerConfig
from peer.manifest import InnerSpec, Manifest, ModelSpec, ScheduleSpec, default_manifest
from peer.observe import events as ev
from peer.observe.hub import Hub
from peer.peer import build_run, open_peer
from peer.train.method import DataSource, Method, StepResult
from tests.bench.worker import Reply, serve_async

_MODEL: Final = {
    "model_type": "llama",
    "vocab_size": 264,
    "hidden_size": 48,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
    "tie_word_embeddings": True,
}
"""60,000 parameters: a step takes a few milliseconds."""


def manifest(seed: int, round_s: float) -> Manifest:
    """The default run with a smaller model, from the first weights that `seed` gives."""
    usual = default_manifest()
    return dataclasses.replace(
        usual,
        name="learning",
        model=ModelSpec(config=dict(_MODEL), seed=seed),
        data=dataclasses.replace(usual.data, sequence_length=48, validation_samples=128),
        inner=InnerSpec(lr=3e-3, warmup_steps=5, batch_size=4),
        schedule=ScheduleSpec(round_s=round_s, exchange_s=12.0, evaluate_every=1),
    )


def paced(method: Method, step_s: float) -> Method:
    """`method`, whose every step takes at least `step_s`."""
    fast: Callable[[torch.Tensor], StepResult] = method.step

    def step(batch: torch.Tensor) -> StepResult:
        end_s = time.perf_counter() + step_s
        result = fast(batch)
        time.sleep(max(0.0, end_s - time.perf_counter()))
        return result

    method.step = step  # type: ignore[method-assign]
    return method


class Pupil:
    """The command handlers: `start`, then `report` whenever one wants to know."""

    def __init__(self) -> None:
        self._stack = AsyncExitStack()
        self._rounds: list[dict[str, Any]] = []
        self._steps = 0

    async def start(
        self, *, index: int, size: int, via: list[str], seed: int, step_s: float, round_s: float
    ) -> Reply:
        run = manifest(seed, round_s)
        self._outer = f"{run.outer.lr:g} / {run.outer.momentum:g}"
        config = PeerConfig(
            home=Path(tempfile.mkdtemp()),
            host="127.0.0.1",
            via=tuple(via),
            manifest=None if via else run,
            threads=1,
        )

        def build(run: Manifest, assets: Path) -> tuple[Method, DataSource]:
            method, data = build_run(run, assets, config)
            return paced(method, step_s), data

        hub = Hub()
        hub.listen(self._note)
        peer = await self._stack.enter_async_context(open_peer(config, hub=hub, build=build))
        self._began_s = time.time()
        return {"addresses": peer.addresses}

    def _note(self, event: ev.Event) -> None:
        match event:
            case ev.ContributionSent():
                self._steps += event.steps
            case ev.RoundFinished():
                self._rounds.append({
                    "at_s": time.time() - self._began_s,
                    "round": event.round,
                    "loss": event.validation_loss,
                    "contributors": min(len(span.contributors) for span in event.spans),
                    "steps": self._steps,
                })  # fmt: skip
            case _:
                pass

    async def report(self) -> Reply:
        """All rounds so far, at seconds since this peer was up; `steps`: of its own until then."""
        return {
            "for_s": time.time() - self._began_s,
            "rounds": self._rounds,
            "outer": self._outer,
        }


async def main() -> None:
    pupil = Pupil()
    await serve_async({"start": pupil.start, "report": pupil.report})


if __name__ == "__main__":
    torch.set_num_threads(1)
    uvloop.run(main())
