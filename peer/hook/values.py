"""The parameters of somebody's own training script, as a peer's local values.

Two threads meet here. The *script's* moves the parameters (its optimiser's step) and is the only
one that writes them; the *peer's* wants to read them when a round freezes a contribution, and to
move them when an outcome comes. Neither waits for more than the other's shortest task:

- reading happens at any time but in the optimiser's step itself, under the lock that the step
  takes; forward and backward passes go on meanwhile, as they change nothing;
- what the peer wants changed is noted, counts as done for the peer, and is written by the script's
  thread after its next step (`settle`). Outcomes are decoded and applied to the outer state in the
  peer's thread, so all that the script does is this one addition.

With parameters of 16 bits an addition is rounded. What the rounding took stays here, as the
difference between what the peer believes and what the parameters hold: no outcome is lost to
it, and no rounding error is sent to others as work.

Shapes: N = trainable values, in the layout's order.
"""

from __future__ import annotations

import math
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import numpy.typing as npt
import torch

from peer.errors import PeerError
from peer.train.inner import mean_loss
from peer.train.local import Float32
from peer.train.method import ArrayMap, StepResult
from tensorcodecs import Layout

UPDATE_S_MAX: Final = 120.0  # of one step of an optimiser; beyond that the script has failed in it
FINISHED_MAX: Final = 4096  # steps that the peer has not heard of; more of them are told as one


@dataclass(frozen=True, slots=True)
class Finished:
    """A step that the script has made. Tensors, where counting would make it wait for a GPU."""

    tokens: torch.Tensor | int
    """Learned ones."""
    nats: torch.Tensor | float
    """Loss, summed over them."""
    seconds: float

    def __add__(self, other: Finished) -> Finished:
        return Finished(
            self.tokens + other.tokens, self.nats + other.nats, self.seconds + other.seconds
        )


class ScriptValues:
    """See the module. `LocalValues` for the method, and the script's side below."""

    def __init__(
        self,
        run_model: torch.nn.Module,
        parameters: Mapping[str, torch.nn.Parameter],
        script_model: torch.nn.Module,
        rebuild: Callable[[], torch.nn.Module],
    ) -> None:
        """The values begin as those of `run_model`, the manifest's; `parameters` are the script's
        with the same names and shapes. `rebuild` makes the manifest's model again."""
        wanted = {name: p for name, p in run_model.named_parameters() if p.requires_grad}
        self.layout = Layout.of((name, tuple(p.shape)) for name, p in wanted.items())
        self.model = script_model
        self._parameters = [parameters[name] for name in self.layout.names]
        self.device = self._parameters[0].device if self._parameters else torch.device("cpu")
        self._places = [
            slice(start, start + p.numel())
            for start, p in zip(self.layout.offsets, self._parameters, strict=True)
        ]
        self._rebuild = rebuild
        self._lock = threading.Condition()
        self._updating = False
        self._closed = False
        start_N = np.empty(self.layout.numel, np.float32)
        for name, place in zip(self.layout.names, self._places, strict=True):
            start_N[place] = wanted[name].detach().float().numpy().ravel()
        self._replace_N: Float32 | None = start_N
        """What the parameters are to become, before `_shift_N`."""
        self._shift_N: Float32 | None = None
        rounded = any(p.dtype != torch.float32 for p in self._parameters)
        self._carry_N = np.zeros(self.layout.numel if rounded else 0, np.float32)
        self._forget: list[slice] = []
        self._still_N: Float32 | None = None
        self._finished: deque[Finished] = deque()
        self._counted: deque[Finished] = deque()
        """Finished steps that the peer's thread has taken, and will hear of next."""
        self.step_s = 0.0
        """How long the step that `step` told of last took."""
        self.on_finished: Callable[[], None] = lambda: None
        """Called in the script's thread after each step."""

    # ── the script's thread ──────────────────────────────────────────────────────────────
    def begin_update(self) -> None:
        """The optimiser's step comes next: nobody reads until `end_update`."""
        with self._lock:
            self._updating = True

    def end_update(self, finished: Finished, optimizer: Any = None) -> None:
        """The step is done; what the peer wants changed is changed."""
        with self._lock:
            self._updating = False
            if (
                self._replace_N is None and not self._closed
            ):  # else the step's work goes with what it was done on
                self._finished.append(finished)
                if len(self._finished) > FINISHED_MAX:
                    self._finished.append(self._finished.pop() + self._finished.pop())
            self._settle(optimizer)
            self._lock.notify_all()
        self.on_finished()

    def settle(self, optimizer: Any = None) -> None:
        """Outside of a step: what the peer wants changed is changed."""
        with self._lock:
            self._updating = False  # one that raised has not come to its end
            self._settle(optimizer)
            self._lock.notify_all()

    def close(self) -> None:
        """Nothing is read or written any more; who waits goes on."""
        with self._lock:
            self._closed = True
            self._lock.notify_all()

    def _settle(self, optimizer: Any) -> None:
        replaced, shifted = self._replace_N, self._shift_N
        if replaced is not None or shifted is not None:
            for parameter, place in zip(self._parameters, self._places, strict=True):
                self._write(parameter, place, replaced, shifted)
            self._replace_N = self._shift_N = None
        moments = getattr(optimizer, "state", None)
        if moments is not None:
            for where in self._forget:
                self._clear(moments, where)
        self._forget.clear()

    def _write(
        self,
        parameter: torch.nn.Parameter,
        place: slice,
        replaced: Float32 | None,
        shifted: Float32 | None,
    ) -> None:
        with torch.no_grad():
            if parameter.dtype == torch.float32:
                if replaced is not None:
                    parameter.copy_(_shaped(replaced[place], parameter))
                if shifted is not None:
                    parameter.add_(_shaped(shifted[place], parameter).to(parameter.device))
                return
            wished = self._read(parameter, place) if replaced is None else replaced[place].copy()
            if shifted is not None:
                wished += shifted[place]
            parameter.copy_(_shaped(wished, parameter))
            self._carry_N[place] = wished - _values(parameter)

    def _clear(self, moments: Any, where: slice) -> None:
        """Whatever an optimiser remembers of these values in tensors of their parameter's shape."""
        for parameter, place in zip(self._parameters, self._places, strict=True):
            start, stop = max(place.start, where.start), min(place.stop, where.stop)
            if start >= stop:
                continue
            for value in moments.get(parameter, {}).values():
                if isinstance(value, torch.Tensor) and value.shape == parameter.shape:
                    flat = value.detach().reshape(-1)
                    flat[start - place.start : stop - place.start] = 0
                    value.detach().copy_(flat.view_as(value))

    def _read(self, parameter: torch.nn.Parameter, place: slice) -> Float32:
        """What the peer believes the parameter holds."""
        values: Float32 = _values(parameter)
        if len(self._carry_N):
            values += self._carry_N[place]
        return values

    # ── the peer's training thread ───────────────────────────────────────────────────────
    @property
    def waiting(self) -> bool:
        """Whether there is a step to be told of."""
        return bool(self._counted or self._finished)

    def step(self, batch: torch.Tensor) -> StepResult:
        """The oldest step of the script's that was not told yet; `batch` is nothing to it."""
        if not self._counted:
            self._take_finished()
        told = self._counted.popleft()
        self.step_s = told.seconds
        tokens, nats = int(told.tokens), float(told.nats)
        return StepResult(loss=nats / tokens if tokens else math.nan, tokens=tokens)

    @contextmanager
    def still(self) -> Iterator[deque[Finished]]:
        """For the block's length values are those of one moment between two updates, with the steps
        that had been made by then and that nobody was told of."""
        with self._between_updates():
            self._take_finished()
            self._still_N = self._all()
        try:
            yield self._counted
        finally:
            self._still_N = None

    def to_numpy(self, where: slice = slice(None)) -> Float32:
        if self._still_N is not None:
            return self._still_N[where].copy()
        with self._between_updates():
            return self._all()[where]

    def shift(self, where: slice, shift_N: Float32) -> None:
        with self._lock:
            if self._shift_N is None:
                self._shift_N = np.zeros(self.layout.numel, np.float32)
            self._shift_N[where] += shift_N
            if self._still_N is not None:
                self._still_N[where] += shift_N

    def load(self, values_N: Float32) -> None:
        with self._lock:
            self._replace_N, self._shift_N = values_N.copy(), None
            if self._still_N is not None:
                self._still_N = values_N.copy()
            self._finished.clear()
            self._counted.clear()

    def forget(self, where: slice) -> None:
        with self._lock:
            start, stop, _ = where.indices(self.layout.numel)
            if (known := slice(start, stop)) not in self._forget:
                self._forget.append(known)

    @contextmanager
    def holding(self, values_N: Float32) -> Iterator[torch.nn.Module]:
        """Another model than the script's, which goes on meanwhile."""
        model = self._rebuild()
        named = dict(model.named_parameters())
        with torch.no_grad():
            for name, place in zip(self.layout.names, self._places, strict=True):
                named[name].copy_(_shaped(values_N[place], named[name]))
        yield model.eval()

    def evaluate(self, values_N: Float32, batches: Iterable[torch.Tensor]) -> float:
        looked_at = list(batches)
        if not looked_at:
            return math.nan
        with self.holding(values_N) as model:
            return mean_loss(model, looked_at, torch.device("cpu"))

    def state(self) -> ArrayMap:
        """Nothing: the script saves its optimiser itself."""
        return {}

    def load_state(self, arrays: Mapping[str, npt.NDArray[Any]]) -> None:
        """Nothing: see `state`."""

    @contextmanager
    def _between_updates(self) -> Iterator[None]:
        with self._lock:
            if not self._lock.wait_for(lambda: self._closed or not self._updating, UPDATE_S_MAX):
                raise PeerError(
                    f"the script's optimiser did not end its step in {UPDATE_S_MAX:.0f} s; it may"
                    " have failed there: call train() again"
                )
            yield

    def _take_finished(self) -> None:
        with self._lock:
            self._counted.extend(self._finished)
            self._finished.clear()

    def _all(self) -> Float32:
        """All values as the peer believes them, with what is not written yet."""
        if self._replace_N is not None:
            values_N = self._replace_N.copy()
        else:
            values_N = np.empty(self.layout.numel, np.float32)
            for parameter, place in zip(self._parameters, self._places, strict=True):
                values_N[place] = self._read(parameter, place)
        if self._shift_N is not None:
            values_N += self._shift_N
        return values_N


def _values(parameter: torch.nn.Parameter) -> Float32:
    """A flat float32 copy on the CPU."""
    copied: Float32 = parameter.detach().to("cpu", torch.float32, copy=True).numpy().ravel()
    return copied


def _shaped(values: Float32, like: torch.Tensor) -> torch.Tensor:
    return torch.from_numpy(np.ascontiguousarray(values)).view(like.shape)
