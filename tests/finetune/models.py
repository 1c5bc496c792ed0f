"""Small models and what tests measure of them."""

from __future__ import annotations

import weakref
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from peer.manifest import MethodSpec
from peer.train import lora
from peer.train.models import seeded_model
from tests.train.tiny import CONFIG


def tiny_gpt(seed: int = 0, **changes: Any) -> torch.nn.Module:
    """A llama with tied embeddings, the same on every machine."""
    return seeded_model(CONFIG | changes, seed).eval()


def tiny_lora(seed: int = 0) -> torch.nn.Module:
    """The same, frozen, with adapters of rank 4 on attention."""
    torch.manual_seed(seed)
    return lora.adapt_by_peft(tiny_gpt(seed), MethodSpec(kind="lora", rank=4, alpha=8)).eval()


def counting(seed: int, samples: int = 4) -> torch.Tensor:
    """(samples, 16) ids that count up from a random byte: easy to learn."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 200, (samples, 1), generator=generator) + torch.arange(16)


def next_token_loss(model: torch.nn.Module, ids: torch.Tensor) -> torch.Tensor:
    logits = model(input_ids=ids).logits[:, :-1].float()
    loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten())
    return loss


class PeakBytes(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """The most bytes of tensors made inside the block that lived at once."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.now = self.peak = 0
        self._known: set[int] = set()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        given = {
            leaf.untyped_storage().data_ptr()
            for leaf in tree_leaves((args, kwargs))
            if isinstance(leaf, torch.Tensor)
        }
        for leaf in tree_leaves(out):
            if not isinstance(leaf, torch.Tensor):
                continue
            storage = leaf.untyped_storage()
            if storage.data_ptr() in given | self._known or not storage.nbytes():
                continue
            self._known.add(storage.data_ptr())
            self.now += storage.nbytes()
            self.peak = max(self.peak, self.now)
            weakref.finalize(storage, self._freed, storage.data_ptr(), storage.nbytes())
        return out

    def _freed(self, pointer: int, size: int) -> None:
        self._known.discard(pointer)
        self.now -= size
