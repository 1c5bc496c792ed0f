"""A peer's local values, as the methods need them, wherever they are trained.

`peer.train.inner.Inner` trains them itself; `peer.hook.values.ScriptValues` are the parameters of
somebody's own script, which trains them in a thread of its own.

Shapes: N = trainable values, in the layout's canonical order.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from contextlib import AbstractContextManager
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import torch

from peer.train.method import ArrayMap, StepResult
from tensorcodecs import Layout

Float32 = npt.NDArray[np.float32]


class LocalValues(Protocol):
    """Touched by the training thread only, as the method is."""

    @property
    def model(self) -> torch.nn.Module: ...

    @property
    def device(self) -> torch.device: ...

    @property
    def layout(self) -> Layout: ...

    def step(self, batch: torch.Tensor) -> StepResult:
        """One inner step, or the news of one."""

    def shift(self, where: slice, shift_N: Float32) -> None:
        """Add to the values at `where`."""

    def to_numpy(self, where: slice = slice(None)) -> Float32:
        """A copy of the values, or of those at `where`, on the CPU."""

    def load(self, values_N: Float32) -> None:
        """Replace the values."""

    def holding(self, values_N: Float32) -> AbstractContextManager[torch.nn.Module]:
        """The run's model with these values, without dropout."""

    def evaluate(self, values_N: Float32, batches: Iterable[torch.Tensor]) -> float:
        """Mean loss (nats per learned token) with these values; NaN without batches."""

    def forget(self, where: slice) -> None:
        """Drop the optimiser's moments there."""

    def state(self) -> ArrayMap:
        """The optimiser's memory; may be empty."""

    def load_state(self, arrays: Mapping[str, npt.NDArray[Any]]) -> None:
        """Restore `state`; what does not fit is left as it is."""
