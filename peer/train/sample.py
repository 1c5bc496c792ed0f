"""What the model says: text from a prompt, token by token."""

from __future__ import annotations

from collections.abc import Callable

import torch

from peer.train.tokens import Tokenizer

TOKENS_MAX = 65536  # of one answer; nobody reads more


def sample(
    model: torch.nn.Module,
    tokenizer: Tokenizer,
    prompt: str,
    tokens: int,
    temperature: float = 0.8,
    seed: int = 0,
) -> str:
    """Continue `prompt` by at most `tokens` tokens and return the continuation.

    `temperature` 0 always takes the likeliest token; otherwise equal seeds give equal texts. Stops
    at the end of a document, and where the model has no more positions.

    Raises:
        ValueError: `tokens` or `temperature` is out of range.
    """
    if not 0 < tokens <= TOKENS_MAX:
        raise ValueError(f"tokens must be 1 to {TOKENS_MAX} (got {tokens})")
    if not 0 <= temperature <= 100:
        raise ValueError(f"temperature must be 0 to 100 (got {temperature})")
    generator = torch.Generator().manual_seed(seed)
    start = [tokenizer.end] if tokenizer.end is not None else []
    ids = (start + tokenizer.encode(prompt))[-max(1, positions_of(model) - tokens) :] or [0]
    said = go_on(
        model, ids, tokens, tokenizer.size,
        lambda logits_V: _choose(logits_V, temperature, generator),
        lambda said: said[-1] == tokenizer.end,
    )  # fmt: skip
    if said and said[-1] == tokenizer.end:
        said.pop()
    return tokenizer.decode(said)


def positions_of(model: torch.nn.Module) -> int:
    """How many tokens the model can tell apart by their place."""
    return int(getattr(model.config, "max_position_embeddings", 0) or 2**31)


def go_on(
    model: torch.nn.Module,
    ids: list[int],
    tokens: int,
    size: int,
    choose: Callable[[torch.Tensor], int],
    done: Callable[[list[int]], bool],
) -> list[int]:
    """At most `tokens` ids after `ids`: those that `choose` takes by the logits (V,) of the first
    `size` ids, until what was said is `done`, or the model has no more positions."""
    device = next(model.parameters()).device
    said: list[int] = []
    past = None
    was_training = model.training
    model.eval()
    try:
        with torch.no_grad():
            step = torch.tensor([ids], device=device)
            while len(said) < tokens and len(ids) + len(said) <= positions_of(model):
                out = model(input_ids=step, past_key_values=past, use_cache=True)
                past = out.past_key_values
                said.append(choose(out.logits[0, -1, :size]))
                if done(said):
                    break
                step = torch.tensor([[said[-1]]], device=device)
    finally:
        model.train(was_training)
    return said


def _choose(logits_V: torch.Tensor, temperature: float, generator: torch.Generator) -> int:
    logits_V = logits_V.float().cpu()
    if temperature == 0:
        return int(logits_V.argmax())
    odds_V = torch.softmax(logits_V / temperature, -1)
    return int(torch.multinomial(odds_V, 1, generator=generator))
