"""What `transformers.Trainer` calls, and what it means for the peer beside it.

    on_train_begin          join; the model's parameters become the run's
    on_pre_optimizer_step   parameters are about to move: nobody reads them
    on_step_end             they have: the step is counted, and what outcomes changed is added
    on_train_end            the last work gets inside, the peer leaves, the model is the run's

Between these the Trainer does as it likes: gradient accumulation, evaluation, saving and logging
change no trainable parameter.
"""

from __future__ import annotations

import dataclasses
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

from transformers import TrainerCallback

from peer.config import PeerConfig
from peer.errors import PeerError, UsageError
from peer.hook.beside import PeerBeside, Say
from peer.hook.counting import TokenCounter
from peer.peer import NetworkFactory, Peer

HAND_OVER_S: Final = 120.0  # two rounds of most runs


def join_run(
    run: str | Path | None = None,
    *,
    via: str | Sequence[str] = (),
    hand_over_s: float = HAND_OVER_S,
    say: Say | None = None,
    network: NetworkFactory | None = None,
    **options: Any,
) -> RunCallback:
    """A callback with which a `transformers.Trainer` (or trl's `SFTTrainer`) joins a run.

    `run`: the id of a run to join or its first characters, or the TOML file of one to start; None:
    the one that `via` leads to. `via`: addresses of peers. `hand_over_s`: how long to wait at the
    end until the last work is inside a mean. `say`: told in words what happens; by default stderr.
    `options`: further fields of `PeerConfig` (`seat`, `home`, `site`, `upload`, `port`, ...).

    Raises:
        UsageError, ManifestError, DataError: what was given makes no sense.
    """
    fields = {field.name for field in dataclasses.fields(PeerConfig)}
    own = {"run", "via", "manifest", "files", "data", "device", "method"}
    if unknown := sorted(set(options) - (fields - own)):
        raise UsageError(
            f"join_run has no option {unknown[0]!r}; it takes {', '.join(sorted(fields - own))}"
        )
    options["via"] = (via,) if isinstance(via, str) else tuple(via)
    if run is not None and (isinstance(run, Path) or run.endswith(".toml")):
        from peer.cli.run import read_draft

        draft = read_draft(Path(run))
        options |= {"manifest": draft.manifest, "files": draft.files}
    elif run is not None:
        options["run"] = run
    return RunCallback(PeerConfig(**options), hand_over_s, say or _on_stderr, network)


class RunCallback(TrainerCallback):  # type: ignore[misc]  # transformers has no types for us
    """See the module. A Trainer may call it for several `train()`, one after another."""

    def __init__(
        self,
        config: PeerConfig,
        hand_over_s: float,
        say: Say,
        network: NetworkFactory | None = None,
    ) -> None:
        self._config = config
        self._hand_over_s = hand_over_s
        self._say = say
        self._network = network
        self._beside: PeerBeside | None = None
        self._counter: TokenCounter | None = None
        self._begun_s = 0.0
        self._told: set[str] = set()

    @property
    def peer(self) -> Peer | None:
        """The running peer, whose thread it belongs to: read from it, no more."""
        beside = self._beside
        return beside.peer if beside is not None and not beside.over else None

    def leave(self) -> None:
        """Leave the run now, without waiting for the last work; the script may go on alone. For
        scripts whose `train()` has raised and that do not end."""
        if self._beside is not None:
            self._beside.leave()
        self._unwatch()

    # ── what the Trainer calls ───────────────────────────────────────────────────────────
    def on_train_begin(self, args: Any, state: Any, control: Any, **more: Any) -> None:
        check_arguments(args)
        self._told.clear()
        model, beside = more["model"], self._beside
        if beside is not None and (beside.over or beside.model is not model):
            self.leave()
            beside = None
        if beside is None:
            beside = self._beside = PeerBeside(self._config, model, self._say, self._network)
            beside.join()
        else:
            beside.start_over()
        self._unwatch()
        self._counter = TokenCounter(model)
        beside.values.settle(more.get("optimizer"))

    def on_step_begin(self, args: Any, state: Any, control: Any, **more: Any) -> None:
        self._begun_s = time.perf_counter()

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **more: Any) -> None:
        if (beside := self._at_work()) is not None:
            beside.values.begin_update()

    def on_step_end(self, args: Any, state: Any, control: Any, **more: Any) -> Any:
        if (beside := self._at_work()) is None or self._counter is None:
            return control
        optimizer = more.get("optimizer")
        finished = self._counter.take(
            time.perf_counter() - self._begun_s,
            skipped=bool(getattr(optimizer, "step_was_skipped", False)),
        )
        beside.values.end_update(finished, optimizer)
        if isinstance(finished.tokens, int) and finished.tokens == 0:
            self._once("a step learned no token that this peer can see, and so weighs nothing")
        if beside.manifest.inner.rate_at(time.time()) == 0:
            self._once(f"this run's learning ended at {beside.manifest.inner.ends}: training stops")
            control.should_training_stop = True
        return control

    def on_train_end(self, args: Any, state: Any, control: Any, **more: Any) -> None:
        if (beside := self._at_work()) is None:
            self._unwatch()
            return
        if self._hand_over_s > 0 and not beside.hand_over(self._hand_over_s):
            self._say("leaving before the last work was inside a mean: that is lost")
        self.leave()
        if self._at_work() is not None or beside.failure is not None:
            return
        if not getattr(args, "load_best_model_at_end", False):
            beside.trainer.start_over()  # its thread has ended
            beside.values.settle(more.get("optimizer"))

    # ── the small things ─────────────────────────────────────────────────────────────────
    def _at_work(self) -> PeerBeside | None:
        """The peer, if there still is one; its failure is said once."""
        beside = self._beside
        if beside is None or not beside.over:
            return beside
        if beside.failure is not None:
            text = str(beside.failure)
            if not isinstance(beside.failure, PeerError):
                text = f"{beside.failure!r}; this is a bug, please report it"
            self._once(f"the peer has ended, and training goes on alone: {text}")
        return None

    def _once(self, text: str) -> None:
        if text not in self._told:
            self._told.add(text)
            self._say(text)

    def _unwatch(self) -> None:
        if self._counter is not None:
            self._counter.close()
            self._counter = None


def check_arguments(args: Any) -> None:
    """Raises UsageError where the Trainer would share the model out among devices."""
    if getattr(args, "world_size", 1) > 1 or getattr(args, "n_gpu", 0) > 1:
        raise UsageError(
            "join_run works with one process and one device; start the script without torchrun,"
            " with CUDA_VISIBLE_DEVICES=0, and one more script (another seat) for each further GPU"
        )
    for name in ("deepspeed", "fsdp"):
        if getattr(args, name, None):
            raise UsageError(f"join_run does not work with {name}; leave that argument away")


def _on_stderr(text: str) -> None:
    sys.stderr.write(f"murmuration: {text}\n")
    sys.stderr.flush()
