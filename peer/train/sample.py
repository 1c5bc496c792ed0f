"""What the model says: text from a prompt, token by token."""

from __future__ import annotations

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
    device = next(model.parameters()).device
    generator = torch.Generator().manual_seed(seed)
    positions = int(getattr(model.config, "max_position_embeddings", 0) or 2**31)
    start = [tokenizer.end] if tokenizer.end is not None else []
    ids = (start + tokenizer.encode(prompt))[-max(1, positions - tokens) :] or [0]
    said: list[int] = []
    past = None
    was_training = model.training
    model.eval()
    try:
        with torch.no_grad():
            step = torch.tensor([ids], device=device)
            while len(said) < tokens and len(ids) + len(said) <= positions:
                out = model(input_ids=step, past_key_values=past, use_cache=True)
                past = out.past_key_values
                chosen = _choose(out.logits[0, -1, : tokenizer.size], temperature, generator)
                if chosen == tokenizer.end:
                    break
                said.append(chosen)
                step = torch.tensor([[chosen]], device=device)
    finally:
        model.train(was_training)
    return tokenizer.decode(said)


def _choose(logits_V: torch.Tensor, temperature: float, generator: torch.Generator) -> int:
    logits_V = logits_V.float().cpu()
    if temperature == 0:
        return int(logits_V.argmax())
    odds_V = torch.softmax(logits_V / temperature, -1)
    return int(torch.multinomial(odds_V, 1, generator=generator))
