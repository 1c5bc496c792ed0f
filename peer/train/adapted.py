"""A linear layer with a round's common change beside it, and a peer's own work on top.

    y = base(x) + x A^T B^T                      the outer state, the same on every peer
      + sum of s x A_k^T B_k^T                   kept: own work that no outcome contains yet
      + own                                      s x A^T B^T, or x D^T for a full change

The state is beside the frozen weight, not added into it: adding and taking away in float32 would
move the base a little in every round, and the layer may store its weight either way round (GPT-2's
`Conv1D`), which nobody has to know here. It costs R (m + n) multiplications a token.

Shapes: m x n = the layer (outputs x inputs), R = rank of the state, r = rank of the own part.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Final, Literal

import torch
from torch.nn import functional

from peer.errors import ManifestError
from peer.finetune.changes import LowRank
from peer.finetune.coded import Layer


class Adapted(torch.nn.Module):
    """Takes the place of one linear layer. See the module."""

    def __init__(self, base: torch.nn.Module, layer: Layer, dropout: float) -> None:
        super().__init__()
        self.base = base
        self.layer: Final = layer
        self.own_work = True
        """Whether own work counts; without it this is what the swarm has."""
        self.scale = 1.0
        self.dropout = dropout
        self.state: tuple[torch.Tensor, torch.Tensor] | None = None
        self.kept: list[tuple[torch.Tensor, torch.Tensor]] = []
        """(A, B), scales in B; oldest first."""
        self.own: Literal["nothing", "factors", "values"] = "nothing"

    A: torch.nn.Parameter
    """(r, n), of own factors."""
    B: torch.nn.Parameter
    """(m, r), of own factors."""
    D: torch.nn.Parameter
    """(m, n), of own values."""

    def with_factors(self, rank: int, scale: float, *, train_A: bool = True) -> None:
        """Own work is scale B A, of zeros."""
        m, n = self.layer.shape
        self.own, self.scale = "factors", scale
        self.A = torch.nn.Parameter(torch.zeros(rank, n), requires_grad=train_A)
        self.B = torch.nn.Parameter(torch.zeros(m, rank))

    def with_values(self) -> None:
        """Own work is all of D, of zeros."""
        self.own = "values"
        self.D = torch.nn.Parameter(torch.zeros(self.layer.shape))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = self.base(x)
        if self.state is not None:
            y = y + _through(x, *self.state)
        if not self.own_work:
            return y
        for A_rn, B_mr in self.kept:
            y = y + _through(x, A_rn, B_mr)
        if self.own == "values":
            y = y + functional.linear(x, self.D)
        elif self.own == "factors":
            seen = functional.dropout(x, self.dropout, self.training) if self.dropout else x
            y = y + self.scale * _through(seen, self.A, self.B)
        return y

    def on_device(self, change: LowRank) -> tuple[torch.Tensor, torch.Tensor]:
        """(A, B) in float32 where the layer is, the scale in B."""
        where = next(self.base.parameters()).device
        A_rn = torch.tensor(change.A, dtype=torch.float32, device=where)
        return A_rn, torch.tensor(change.scale * change.B, dtype=torch.float32, device=where)


def _through(x: torch.Tensor, A_rn: torch.Tensor, B_mr: torch.Tensor) -> torch.Tensor:
    return functional.linear(functional.linear(x, A_rn), B_mr)


def layers_of(model: torch.nn.Module, targets: Sequence[str]) -> dict[str, Layer]:
    """The layers that a target is the end of the name of (none: every linear layer but the head, as
    peft's "all-linear"), in the order of their names' bytes.

    Raises:
        ManifestError: the targets fit no layer.
    """
    from transformers.pytorch_utils import Conv1D

    head = getattr(model, "get_output_embeddings", lambda: None)()
    found: dict[str, Layer] = {}
    for name, module in sorted(model.named_modules(), key=lambda item: item[0].encode()):
        if not isinstance(module, torch.nn.Linear | Conv1D):
            continue
        m, n = module.weight.shape
        if isinstance(module, Conv1D):
            m, n = n, m
        if any(name == t or name.endswith("." + t) for t in targets) or (
            not targets and module is not head
        ):
            found[name] = Layer(name, int(m), int(n))
    if not found:
        raise ManifestError(
            f"method.targets: {', '.join(targets) or 'all linear layers'} fit no layer of this"
            " model; correct them"
        )
    return found


def adapt(
    model: torch.nn.Module, targets: Sequence[str], dropout: float = 0.0
) -> dict[str, Adapted]:
    """Freeze `model` and put an `Adapted` in the place of each of `layers_of`.

    Raises: like `layers_of`.
    """
    layers = layers_of(model, targets)
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    found = {
        name: Adapted(model.get_submodule(name), layer, dropout) for name, layer in layers.items()
    }
    for name, adapted in found.items():
        _put(model, name, adapted)
    return found


@contextmanager
def plain(model: torch.nn.Module, adapted: dict[str, Adapted]) -> Iterator[torch.nn.Module]:
    """The model with its own layers, as it was before `adapt`."""
    try:
        for name, module in adapted.items():
            _put(model, name, module.base)
        yield model
    finally:
        for name, module in adapted.items():
            _put(model, name, module)


def _put(model: torch.nn.Module, name: str, module: Any) -> None:
    parent, _, last = name.rpartition(".")
    setattr(model.get_submodule(parent), last, module)
