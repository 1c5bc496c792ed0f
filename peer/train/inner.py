"""The inner loop: one model, AdamW, and all trainable values as one flat vector.

Parameters are views into `flat` (and their gradients into another vector), in the canonical order
of `tensorcodecs.Layout`, so that a round reads and shifts them without gathering anything.

Shapes: N = trainable values, B = samples, T = tokens in a sample, V = vocabulary.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch.nn import functional

from peer.errors import StorageError
from peer.manifest import InnerSpec
from peer.train.local import Float32
from peer.train.method import ArrayMap, StepResult
from peer.train.models import quiet_library
from peer.train.samples import IGNORED, learned_tokens, parts_of
from tensorcodecs import Layout


class Inner:
    """A model with its inner optimiser on one device.

    Memory: 16 bytes per trainable value on the device. On CUDA the arithmetic runs in bfloat16
    (autocast); weights and moments stay float32.
    """

    def __init__(
        self,
        model: torch.nn.Module,
        spec: InnerSpec,
        device: torch.device,
        clock: Callable[[], float] = time.time,
    ) -> None:
        """Takes `model` over. What requires no gradient stays as it is. `clock`: the calendar's
        seconds since 1970, which `InnerSpec.ends` goes by."""
        self.model = model.to(device)
        self.device = device
        self.skipped_steps = 0
        """Steps left out because loss or gradient was not finite."""
        self._spec = spec
        self._clock = clock
        named = {name: p for name, p in self.model.named_parameters() if p.requires_grad}
        self.layout = Layout.of((name, tuple(p.shape)) for name, p in named.items())
        self.flat = torch.empty(self.layout.numel, device=device)
        self._gradient = torch.zeros_like(self.flat)
        self._exp_avg = torch.zeros_like(self.flat)
        self._exp_avg_sq = torch.zeros_like(self.flat)
        ordered = [named[name] for name in self.layout.names]
        states = []
        for parameter, offset in zip(ordered, self.layout.offsets, strict=True):

            def view(whole: torch.Tensor, offset: int = offset, p: torch.Tensor = parameter) -> Any:
                return whole[offset : offset + p.numel()].view(p.shape)

            view(self.flat).copy_(parameter.detach())
            parameter.data = view(self.flat)
            parameter.grad = view(self._gradient)
            # Each has a step counter of its own: the optimiser counts each of them up.
            states.append({
                "step": torch.zeros((), device=device),
                "exp_avg": view(self._exp_avg),
                "exp_avg_sq": view(self._exp_avg_sq),
            })  # fmt: skip
        self._steps = [state["step"] for state in states]
        self._optimizer = torch.optim.AdamW(
            [
                {"params": [p for p in ordered if p.dim() >= 2], "weight_decay": spec.weight_decay},
                {"params": [p for p in ordered if p.dim() < 2], "weight_decay": 0.0},
            ],
            lr=spec.lr, betas=(spec.betas[0], spec.betas[1]), fused=True,
        )  # fmt: skip
        self._optimizer.state.update(zip(ordered, states, strict=True))
        self.model.train()

    def step(self, batch: torch.Tensor) -> StepResult:
        """One AdamW step on a batch (B, T) or (B, 3, T), see `peer.train.samples`. A loss or
        gradient that is not finite changes nothing: 0 tokens."""
        self._gradient.zero_()
        loss = self._loss(batch)
        loss.backward()  # type: ignore[no-untyped-call]
        norm = float(torch.linalg.vector_norm(self._gradient))
        value = loss.item()
        if not math.isfinite(value) or not math.isfinite(norm):
            self.skipped_steps += 1
            return StepResult(loss=math.nan, tokens=0)
        if norm > self._spec.grad_clip:
            self._gradient.mul_(self._spec.grad_clip / norm)
        warmup = min(1.0, (float(self._steps[0]) + 1) / max(1, self._spec.warmup_steps))
        for group in self._optimizer.param_groups:
            group["lr"] = self._spec.lr * warmup * self._spec.rate_at(self._clock())
        self._optimizer.step()
        return StepResult(loss=value, tokens=learned_tokens(batch))

    def shift(self, where: slice, shift_N: Float32) -> None:
        """Add to the trainable values at `where`."""
        self.flat[where].add_(torch.from_numpy(shift_N).to(self.device))

    def to_numpy(self, where: slice = slice(None)) -> Float32:
        """A copy of the trainable values, or of those at `where`, on the CPU."""
        copied: Float32 = self.flat[where].detach().to("cpu", copy=True).numpy()
        return copied

    def load(self, values_N: Float32) -> None:
        """Replace the trainable values."""
        self.flat.copy_(torch.from_numpy(values_N))

    @contextmanager
    def holding(self, values_N: Float32) -> Iterator[torch.nn.Module]:
        """The model with other trainable values, without dropout; its own come back after."""
        own = self.flat.clone()
        self.load(values_N)
        self.model.eval()
        try:
            yield self.model
        finally:
            self.flat.copy_(own)
            self.model.train()

    def evaluate(self, values_N: Float32, batches: Iterable[torch.Tensor]) -> float:
        """Mean loss (nats per learned token) with other trainable values; NaN without batches."""
        with self.holding(values_N):
            return mean_loss(self.model, batches, self.device)

    def forget(self, where: slice) -> None:
        """Drop the optimiser's moments there."""
        self._exp_avg[where] = 0
        self._exp_avg_sq[where] = 0

    def state(self) -> ArrayMap:
        """The optimiser's memory: two moments (N,) and the step count (1,)."""
        return {
            "exp_avg": self._exp_avg.to("cpu", copy=True).numpy(),
            "exp_avg_sq": self._exp_avg_sq.to("cpu", copy=True).numpy(),
            "steps": np.array([float(self._steps[0])], np.float32),
        }

    def load_state(self, arrays: Mapping[str, npt.NDArray[Any]]) -> None:
        """Restore `state`; what is missing, damaged or of another shape is left as it is."""
        for name, own in (("exp_avg", self._exp_avg), ("exp_avg_sq", self._exp_avg_sq)):
            if (values := fitting(arrays.get(name), own.numel())) is not None:
                own.copy_(torch.from_numpy(values))
        if (steps := fitting(arrays.get("steps"), 1)) is not None and 0 <= steps[0] < 1e9:
            for step in self._steps:
                step.fill_(float(steps[0]))

    def _loss(self, batch: torch.Tensor) -> torch.Tensor:
        return next_token_loss(self.model, batch, self.device)


def next_token_loss(
    model: torch.nn.Module, batch: torch.Tensor, device: torch.device, half: bool | None = None
) -> torch.Tensor:
    """Mean over the learned tokens of a batch (B, T) or (B, 3, T), nats per token. `half`: whether
    the arithmetic runs in bfloat16 (autocast); None: on CUDA."""
    ids_BT, labels_BT, positions_BT = parts_of(batch.to(device, non_blocking=True))
    # Positions tell the model where texts begin; without them there is one text a row.
    texts = {} if positions_BT is None else {"position_ids": positions_BT[:, :-1]}
    enabled = device.type == "cuda" if half is None else half
    with torch.autocast(device.type, dtype=torch.bfloat16, enabled=enabled):
        logits_BTV = model(input_ids=ids_BT[:, :-1], use_cache=False, **texts).logits
    return functional.cross_entropy(
        logits_BTV.float().flatten(0, 1), labels_BT[:, 1:].flatten(), ignore_index=IGNORED
    )


def mean_loss(
    model: torch.nn.Module, batches: Iterable[torch.Tensor], device: torch.device,
    half: bool | None = None,
) -> float:  # fmt: skip
    """Mean loss over all learned tokens of the batches, nats per token; NaN without any. `half`:
    see `next_token_loss`."""
    total = 0.0
    tokens = 0
    with torch.no_grad():
        for batch in batches:
            learned = learned_tokens(batch)
            if learned:  # or its mean is not a number
                total += float(next_token_loss(model, batch, device, half)) * learned
                tokens += learned
    return total / tokens if tokens else math.nan


def fitting(values: npt.NDArray[Any] | None, numel: int) -> Float32 | None:
    """`values` if they are (numel,) finite float32, else None."""
    if values is None or values.shape != (numel,) or values.dtype != np.float32:
        return None
    return np.ascontiguousarray(values) if numel == 0 or np.isfinite(values).all() else None


def save_model(model: torch.nn.Module, folder: Path) -> None:
    """Write a transformers folder (safetensors). Tied weights are written once.

    Raises:
        StorageError: the disk is full or not writable.
    """
    copies: dict[tuple[int, torch.Size], torch.Tensor] = {}
    state = {}
    for name, tensor in model.state_dict().items():
        key = (tensor.data_ptr(), tensor.shape)
        if key not in copies:
            # All are views into one vector, which the library would take for one shared tensor.
            copies[key] = tensor.detach().to("cpu", copy=True).contiguous()
        state[name] = copies[key]
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with quiet_library():
            model.save_pretrained(folder, state_dict=state)  # type: ignore[operator]
    except OSError as error:
        raise StorageError(f"can't write {folder} ({error}); free some space there") from None
