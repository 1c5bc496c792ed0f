"""How many tokens a script's step learns, and at which loss: what its work weighs.

A callback never sees the batches, so the model's own forward pass is watched. Counted are labels
that are not -100, but for each row's first, which nothing predicts; where labels don't reach the
model (label smoothing, a loss of the script's own, preference pairs), the tokens that the attention
mask lets through. Evaluation, generation and passes without gradients count nothing, and
accumulated batches add up.

Counts stay on the model's device until the peer's thread asks: no step waits for a GPU.
"""

from __future__ import annotations

import math
import weakref
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from peer.hook.values import Finished
from peer.train.samples import IGNORED


class TokenCounter:
    """Watches a model; `take` says what was learned since the last call."""

    def __init__(self, model: torch.nn.Module) -> None:
        self._model = weakref.ref(model)
        self._tokens: torch.Tensor | int = 0
        self._nats: torch.Tensor | float = 0.0
        # Compiled code would count once.
        watch = torch.compiler.disable(self._watch)  # type: ignore[no-untyped-call]
        self._hook = model.register_forward_hook(watch, with_kwargs=True)

    def close(self) -> None:
        """Watch no more."""
        self._hook.remove()

    def take(self, seconds: float, *, skipped: bool = False) -> Finished:
        """The step that just ended. `skipped`: its optimiser refused it, so it learned nothing."""
        tokens, nats = self._tokens, self._nats
        self._tokens, self._nats = 0, 0.0
        return Finished(0, 0.0, seconds) if skipped else Finished(tokens, nats, seconds)

    def _watch(
        self, module: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any
    ) -> None:
        if module is not self._model():
            return  # a copy, which has the hook too
        if not module.training or not torch.is_grad_enabled():
            return
        tokens = learned(args, kwargs)
        loss = getattr(output, "loss", None)
        if loss is None and isinstance(output, Mapping):
            loss = output.get("loss")
        # With num_items_in_batch the loss is this batch's share of a mean over all that accumulate.
        whole = kwargs.get("num_items_in_batch")
        of = tokens if whole is None else whole
        self._tokens = self._tokens + tokens
        self._nats = self._nats + (
            loss.detach().float().mean() * of if isinstance(loss, torch.Tensor) else math.nan
        )


def learned(args: Sequence[Any], kwargs: Mapping[str, Any]) -> torch.Tensor | int:
    """Tokens that a forward pass with these arguments is about."""
    labels = kwargs.get("labels")
    if isinstance(labels, torch.Tensor):
        return (labels[..., 1:] != IGNORED).sum()
    mask = kwargs.get("attention_mask")
    if isinstance(mask, torch.Tensor) and mask.dim() == 2:
        return mask.sum()
    ids = kwargs.get("input_ids", args[0] if args else None)
    return ids.numel() if isinstance(ids, torch.Tensor) else 0
