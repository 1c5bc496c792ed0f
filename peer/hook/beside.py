"""A peer beside a script: its own thread, its own event loop, the script's parameters."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import os
import threading
import weakref
from collections import deque
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

import torch

from peer.config import PeerConfig
from peer.errors import PeerError, flattened
from peer.hook.fit import check_kind, fitting_parameters
from peer.hook.training import FROZEN_KEPT, NoBlocks, ScriptTrainer
from peer.hook.values import ScriptValues
from peer.manifest import Manifest
from peer.observe import events as ev
from peer.observe.hub import Hub
from peer.observe.words import Teller
from peer.peer import NetworkFactory, Peer, open_peer
from peer.train.method import DataSource, Method

LEAVE_S_MAX: Final = 90.0  # goodbye, a last evaluation and a checkpoint; see `peer.peer`
LOOK_S: Final = 0.5  # between two looks whether the peer is still there

Say = Callable[[str], None]


class PeerBeside:
    """Joins a run for one model of the script's. Made, started and ended in the script's thread."""

    def __init__(
        self,
        config: PeerConfig,
        model: torch.nn.Module,
        say: Say,
        network: NetworkFactory | None = None,
    ) -> None:
        self.model = model
        self.hub = Hub()
        self.peer: Peer | None = None
        self.failure: BaseException | None = None
        """Why the peer ended, if not because it was told to."""
        self._config = config
        self._say = say
        self._network = network
        self._teller = Teller()
        self._trainer: ScriptTrainer | None = None
        self._inside: deque[int] = deque(maxlen=FROZEN_KEPT)
        """Rounds whose means hold all of what this peer sent."""
        self._loop: asyncio.AbstractEventLoop | None = None
        self._task: asyncio.Task[Any] | None = None
        self._changed = threading.Condition()
        self._over = False
        self._leaving = False
        self._process = os.getpid()
        self._thread = threading.Thread(target=self._main, name="peer", daemon=True)

    # ── the script's thread ──────────────────────────────────────────────────────────────
    @property
    def is_ours(self) -> bool:
        """Whether the peer lives in this process: a data loader's workers are forked from it, with
        a copy of all this and none of its threads."""
        return self._process == os.getpid()

    @property
    def over(self) -> bool:
        """Whether the peer has ended."""
        return self._over

    @property
    def trainer(self) -> ScriptTrainer:
        assert self._trainer is not None, "join() first"
        return self._trainer

    @property
    def values(self) -> ScriptValues:
        return self.trainer.values

    @property
    def manifest(self) -> Manifest:
        assert self.peer is not None, "join() first"
        return self.peer.manifest

    def join(self) -> None:
        """Start, and wait until the run's state is here: minutes, for a large one. Like
        `peer join` this ends by success, by a failure, or by Ctrl-C.

        Raises:
            PeerError: the model does not fit the run, or the run can't be joined.
        """
        _say_goodbye_at_exit(self)
        self._thread.start()
        try:
            while not self._over and not (self._trainer and self._trainer.ready.is_set()):
                with self._changed:
                    self._changed.wait(LOOK_S)
        except BaseException:  # Ctrl-C: the script ends, and nobody is waited for
            self.leave()
            raise
        self.raise_failure()

    def raise_failure(self) -> None:
        """Raises what ended the peer."""
        if self.failure is not None:
            raise self.failure

    def start_over(self) -> None:
        """The script begins anew: what its parameters hold by now is not work for the run."""
        loop = self._loop
        if loop is not None and not self._over:
            asked = asyncio.run_coroutine_threadsafe(
                self.trainer.run(lambda _: self.trainer.start_over()), loop
            )
            self._wait(lambda: asked.done(), None)

    def hand_over(self, within_s: float) -> bool:
        """Wait until all of the script's work is inside a mean; False if it is not by then."""
        return self._wait(self._all_inside, within_s)

    def leave(self) -> None:
        """Say goodbye, save, end the thread. Does nothing the second time."""
        loop, self._leaving = self._loop, True
        if loop is not None:
            with contextlib.suppress(RuntimeError):  # the loop is closed
                loop.call_soon_threadsafe(self._leave)
        if self._thread.ident is not None:
            self._thread.join(LEAVE_S_MAX)
            if self._thread.is_alive():
                self._say(f"the peer did not end in {LEAVE_S_MAX:.0f} s; it is left behind")
        if self._trainer is not None and self._trainer.ready.is_set():
            self.values.close()

    def _wait(self, done: Callable[[], bool], within_s: float | None) -> bool:
        with self._changed:
            while not done() and not self._over:
                step_s = LOOK_S if within_s is None else min(LOOK_S, within_s)
                if step_s <= 0:
                    return False
                self._changed.wait(step_s)
                within_s = None if within_s is None else within_s - step_s
        return done()

    def _all_inside(self) -> bool:
        """Whether every fragment has been in a mean since the last step was made."""
        trainer = self.trainer
        if trainer.told == 0:
            return not trainer.values.waiting
        cut = trainer.method.fragments
        inside = set(self._inside)
        whole = {
            cut.of(n) for n, told in list(trainer.frozen) if told == trainer.told and n in inside
        }
        return not trainer.values.waiting and len(whole) == cut.count

    # ── the peer's thread ────────────────────────────────────────────────────────────────
    def _main(self) -> None:
        factory: Callable[[], asyncio.AbstractEventLoop] | None = None
        with contextlib.suppress(ImportError):
            import uvloop

            factory = uvloop.new_event_loop
        try:
            with asyncio.Runner(loop_factory=factory) as runner:
                runner.run(self._live())
        except asyncio.CancelledError:
            pass  # told to leave before it had joined
        except BaseException as error:  # the script's thread raises it, or says so
            self.failure = _plainest(error)
        finally:
            if self._trainer is not None and self._trainer.ready.is_set():
                self.values.close()
            with self._changed:
                self._over = True
                self._changed.notify_all()

    async def _live(self) -> None:
        self._loop, self._task = asyncio.get_running_loop(), asyncio.current_task()
        self.hub.listen(self._heard)
        async with open_peer(
            self._config,
            hub=self.hub,
            build=self._build,
            network=self._network,
            training=self._training,
        ) as peer:
            self.peer = peer
            if self._leaving:  # while it was still joining
                peer.leave()
            await peer.wait_left()

    def _leave(self) -> None:
        if self.peer is not None:
            self.peer.leave()
        elif self._task is not None:
            self._task.cancel()  # still looking for the others, or loading

    def _training(self, build: Any, *, threads: int | None) -> ScriptTrainer:
        self._trainer = ScriptTrainer(build, threads=threads)
        return self._trainer

    def _build(self, manifest: Manifest, assets: Path) -> tuple[Method, DataSource]:
        from peer.train import build_method

        check_kind(manifest)
        rebuild = functools.partial(_run_model, manifest, assets)

        def local(run_model: torch.nn.Module) -> ScriptValues:
            found = fitting_parameters(manifest, run_model, self.model, self._say)
            return ScriptValues(run_model, found, self.model, rebuild)

        return build_method(manifest, assets, "cpu", local=local), NoBlocks()

    def _heard(self, event: ev.Event) -> None:
        if isinstance(event, ev.RoundFinished) and event.included > 0.9995:
            self._inside.append(event.round)
        if isinstance(event, ev.Started):
            self._say(f"others join with: {event.join_command}")
        if (line := self._teller.tell(event)) is not None:
            self._say(line.text)
        with self._changed:
            self._changed.notify_all()


_running: weakref.WeakSet[PeerBeside] = weakref.WeakSet()


def _say_goodbye_at_exit(beside: PeerBeside) -> None:
    """A script that ends in any way but by a signal leaves its runs politely."""
    if not _running:
        # Before any thread pool's own: those can do nothing any more once theirs has run, and a
        # goodbye needs them. The interpreter has no public way to say so.
        register = getattr(threading, "_register_atexit", None)
        if register is not None:
            register(_leave_all)
    _running.add(beside)


def _leave_all() -> None:
    for beside in list(_running):
        if beside.is_ours:
            beside.leave()


def _run_model(manifest: Manifest, assets: Path) -> torch.nn.Module:
    """The manifest's model, with the adapters that it asks for."""
    from peer.train.lora import with_adapters
    from peer.train.models import build_model

    model = build_model(manifest, assets)
    if manifest.method.kind == "lora":
        model = with_adapters(model, manifest.method, manifest.model.seed)
    return model


def _plainest(error: BaseException) -> BaseException:
    """The one error that says what to do, if a group holds nothing else."""
    causes = list(flattened(error))
    first = causes[0] if causes else error
    return first if all(isinstance(cause, PeerError) for cause in causes) else error
