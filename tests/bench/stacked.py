"""Many small Llamas trained at once in one process, as many times faster as their matrices are
small: peer i's step is what `peer.train.inner.Inner` does with peer i's batch, to rounding
(tests/test_bench_groups.py compares them).

Every parameter is one tensor (P, ...) of all peers' copies. The loss is the sum of the peers' own
mean losses, so that each gets its own gradient and nothing of the others'; clipping, warm-up and
AdamW follow `Inner`, peer by peer.

Shapes: P = peers, N = parameters of one, B = samples, T = tokens in a sample, H = heads, K = width
of a head, D = width of the model, V = vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, Final

import numpy as np
import numpy.typing as npt
import torch
from torch.nn import functional

from peer.manifest import InnerSpec
from peer.train.method import StepResult
from tensorcodecs import Layout
from tests.bench.result import BenchError

Float32 = npt.NDArray[np.float32]

_EPSILON: Final = 1e-6  # of the norms; transformers' default, like the rotation's base
_ROTARY_BASE: Final = 10000.0
_EVALUATED: Final = 16  # samples at a time: what the core's caches hold


class Stack:
    """`peers` Llamas from the same first weights, each with an AdamW of its own."""

    def __init__(
        self,
        config: Mapping[str, Any],
        layout: Layout,
        first_N: Float32,
        spec: InnerSpec,
        peers: int,
    ) -> None:
        """`config`: of a transformers Llama with tied embeddings, and as many heads for keys and
        values as for queries; `layout`: of its parameters.

        Raises:
            ValueError: another kind of model.
        """
        if config["model_type"] != "llama" or not config["tie_word_embeddings"]:
            raise ValueError("only Llamas with tied embeddings can be stacked")
        self.layout = layout
        self.peers = peers
        self.losses = [math.nan] * peers
        """Each peer's, in the last step."""
        self.rate = 1.0
        """Share of the learning rate that counts: `InnerSpec.rate_at`."""
        self._layers = int(config["num_hidden_layers"])
        self._heads = int(config["num_attention_heads"])
        self._spec = spec
        self._sizes = [math.prod(shape) for shape in layout.shapes]
        self._stacked = [torch.empty(peers, *shape, requires_grad=True) for shape in layout.shapes]
        self._named = dict(zip(layout.names, self._stacked, strict=True))
        for peer in range(peers):
            self.put(peer, first_N)
        matrices = [t for t in self._stacked if t.dim() >= 3]
        vectors = [t for t in self._stacked if t.dim() < 3]
        self._optimizer = torch.optim.AdamW(
            [
                {"params": matrices, "weight_decay": spec.weight_decay},
                {"params": vectors, "weight_decay": 0.0},
            ],
            lr=spec.lr, betas=(spec.betas[0], spec.betas[1]), fused=True,
        )  # fmt: skip
        self._steps = 0
        tokens, width = int(config["max_position_embeddings"]), layout.shapes[0][1]
        self._cos_TK, self._sin_TK = _rotation(tokens, width // self._heads)

    def step(self, batch_PBT: torch.Tensor) -> None:
        """One AdamW step of every peer, on a batch of each.

        Raises:
            BenchError: a loss or a gradient is not finite.
        """
        self._optimizer.zero_grad(set_to_none=True)
        losses_P = self._losses(batch_PBT)
        losses_P.sum().backward()  # type: ignore[no-untyped-call]
        with torch.no_grad():
            gradients = [t.grad for t in self._stacked if t.grad is not None]
            squares_P = sum((g.flatten(1).square().sum(1) for g in gradients), torch.zeros(()))
            shrink_P = (self._spec.grad_clip / squares_P.sqrt()).clamp(max=1.0)
            if not bool(torch.isfinite(shrink_P).all() and torch.isfinite(losses_P).all()):
                raise BenchError("a peer's loss is not finite; choose a smaller inner rate")
            if bool((shrink_P < 1).any()):
                for gradient in gradients:
                    gradient.mul_(shrink_P.view(-1, *[1] * (gradient.dim() - 1)))
        self._steps += 1
        warmup = min(1.0, self._steps / max(1, self._spec.warmup_steps))
        for group in self._optimizer.param_groups:
            group["lr"] = self._spec.lr * warmup * self.rate
        self._optimizer.step()
        self.losses = losses_P.tolist()

    def take(self, peer: int) -> Float32:
        """A copy of one peer's parameters (N,)."""
        with torch.no_grad():
            flat: Float32 = torch.cat([t[peer].flatten() for t in self._stacked]).numpy()
        return flat

    def put(self, peer: int, values_N: Float32) -> None:
        """Replace one peer's parameters; its optimiser's memory stays."""
        with torch.no_grad():
            parts = torch.split(torch.from_numpy(values_N), self._sizes)
            for tensor, part in zip(self._stacked, parts, strict=True):
                tensor[peer].copy_(part.view(tensor.shape[1:]))

    def evaluate(self, validation_BT: torch.Tensor) -> Float32:
        """(P,): every peer's mean loss on the same samples, nats per token."""
        with torch.no_grad():
            pieces = torch.split(validation_BT, _EVALUATED)
            sums_P = torch.zeros(self.peers)
            for piece_BT in pieces:
                batch_PBT = piece_BT.expand(self.peers, *piece_BT.shape)
                sums_P += self._losses(batch_PBT) * len(piece_BT)
            found: Float32 = (sums_P / len(validation_BT)).numpy()
        return found

    def _losses(self, batch_PBT: torch.Tensor) -> torch.Tensor:
        """(P,): the mean over each peer's tokens."""
        peers, samples, length = batch_PBT.shape
        length -= 1
        ids_PBT, next_PBT = batch_PBT[:, :, :-1], batch_PBT[:, :, 1:]
        table_PVD = self._named["model.embed_tokens.weight"]
        vocabulary, width = table_PVD.shape[1:]
        first_P = torch.arange(peers).view(-1, 1, 1) * vocabulary
        x_PRD = functional.embedding(  # R = B * T: rows
            (ids_PBT + first_P).reshape(peers, -1), table_PVD.view(-1, width)
        )
        for layer in range(self._layers):
            x_PRD = x_PRD + self._attention(layer, x_PRD, samples, length)
            x_PRD = x_PRD + self._feed_forward(layer, x_PRD)
        x_PRD = self._norm("model.norm", x_PRD)
        logits_PRV = x_PRD @ table_PVD.transpose(1, 2)
        losses = functional.cross_entropy(
            logits_PRV.view(-1, vocabulary), next_PBT.reshape(-1), reduction="none"
        )
        return losses.view(peers, -1).mean(1)

    def _attention(
        self, layer: int, x_PRD: torch.Tensor, samples: int, length: int
    ) -> torch.Tensor:
        name = f"model.layers.{layer}"
        x_PRD = self._norm(f"{name}.input_layernorm", x_PRD)

        def heads(which: str) -> torch.Tensor:  # (P * B, H, T, K)
            y_PRD = self._linear(f"{name}.self_attn.{which}_proj", x_PRD)
            y = y_PRD.view(self.peers * samples, length, self._heads, -1)
            return y.transpose(1, 2)

        cos_TK, sin_TK = self._cos_TK[:length], self._sin_TK[:length]
        query, key, value = heads("q"), heads("k"), heads("v")
        query, key = (y * cos_TK + _half_turned(y) * sin_TK for y in (query, key))
        mixed = functional.scaled_dot_product_attention(query, key, value, is_causal=True)
        mixed_PRD = mixed.transpose(1, 2).reshape(x_PRD.shape)
        return self._linear(f"{name}.self_attn.o_proj", mixed_PRD)

    def _feed_forward(self, layer: int, x_PRD: torch.Tensor) -> torch.Tensor:
        name = f"model.layers.{layer}"
        x_PRD = self._norm(f"{name}.post_attention_layernorm", x_PRD)
        gate = functional.silu(self._linear(f"{name}.mlp.gate_proj", x_PRD))
        return self._linear(
            f"{name}.mlp.down_proj", gate * self._linear(f"{name}.mlp.up_proj", x_PRD)
        )

    def _linear(self, name: str, x_PRD: torch.Tensor) -> torch.Tensor:
        return x_PRD @ self._named[f"{name}.weight"].transpose(1, 2)

    def _norm(self, name: str, x_PRD: torch.Tensor) -> torch.Tensor:
        scale = torch.rsqrt(x_PRD.square().mean(-1, keepdim=True) + _EPSILON)
        return self._named[f"{name}.weight"].unsqueeze(1) * (x_PRD * scale)


class Seat:
    """One peer of a stack, as far as a `FlatMethod` needs to know its `Inner`."""

    def __init__(self, stack: Stack, peer: int) -> None:
        self.layout = stack.layout
        self._stack = stack
        self._peer = peer

    def step(self, batch_BT: torch.Tensor) -> StepResult:
        """Says what this peer did in the stack's last step, which was on `batch_BT` too."""
        return StepResult(loss=self._stack.losses[self._peer], tokens=batch_BT.numel())

    def to_numpy(self, where: slice = slice(None)) -> Float32:
        """See `Inner.to_numpy`."""
        return self._stack.take(self._peer)[where]

    def load(self, values_N: Float32) -> None:
        """See `Inner.load`."""
        self._stack.put(self._peer, values_N)

    def shift(self, where: slice, shift_N: Float32) -> None:
        """See `Inner.shift`."""
        values_N = self.to_numpy()
        values_N[where] += shift_N
        self.load(values_N)


def _rotation(tokens: int, width: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Cosines and sines (T, K) of rotary position embeddings."""
    rates = 1.0 / _ROTARY_BASE ** (torch.arange(0, width, 2).float() / width)
    angles = torch.outer(torch.arange(tokens).float(), rates)
    angles_TK = torch.cat((angles, angles), dim=-1)
    return angles_TK.cos(), angles_TK.sin()


def _half_turned(y: torch.Tensor) -> torch.Tensor:
    half = y.shape[-1] // 2
    return torch.cat((-y[..., half:], y[..., :half]), dim=-1)
