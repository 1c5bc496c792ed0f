"""A step weighs the tokens that it learned, and no others."""

from __future__ import annotations

import copy
import math
from typing import Any

import torch

from peer.hook.counting import TokenCounter, learned
from tests.hook.script import collate, model, rows


def _batch(count: int = 4) -> dict[str, torch.Tensor]:
    return collate(rows(0, count))


def test_learned_are_labels_that_something_predicts() -> None:
    labels = torch.full((2, 5), -100)
    labels[:, 0] = 7  # nothing comes before them
    labels[0, 3:] = 7
    assert int(learned((), {"labels": labels})) == 2
    mask = torch.tensor([[1, 1, 0], [1, 0, 0]])
    ids = torch.zeros(2, 3, dtype=torch.int64)
    assert int(learned((), {"input_ids": ids, "attention_mask": mask})) == 3
    assert learned((ids,), {}) == 6
    assert learned((), {"pixels": 1}) == 0


def test_batches_add_up_until_they_are_taken() -> None:
    made = model(1).train()
    counter = TokenCounter(made)
    losses = [float(made(**_batch(n)).loss.detach()) for n in (2, 4)]
    step = counter.take(0.5)
    assert int(step.tokens) == 6 * 12
    assert math.isclose(float(step.nats), 24 * losses[0] + 48 * losses[1], rel_tol=1e-5)
    assert counter.take(0.5).tokens == 0


def test_shares_of_a_mean_over_accumulated_batches_are_not_means() -> None:
    made = model(1).train()
    counter = TokenCounter(made)
    total = torch.tensor(72)
    for n in (2, 4):
        made(**_batch(n), num_items_in_batch=total)
    step = counter.take(0.5)
    whole = (
        float(made(**_batch(2)).loss.detach()) * 24 + float(made(**_batch(4)).loss.detach()) * 48
    )
    assert math.isclose(float(step.nats), whole, rel_tol=1e-4)


def test_evaluation_and_generation_count_nothing() -> None:
    made = model(1)
    counter = TokenCounter(made)
    with torch.no_grad():
        made.train()(**_batch())
    made.eval()(**_batch())
    assert counter.take(0.5).tokens == 0


def test_a_step_that_the_optimiser_refused_learned_nothing() -> None:
    made = model(1).train()
    counter = TokenCounter(made)
    made(**_batch())
    step = counter.take(0.5, skipped=True)
    assert (step.tokens, step.nats) == (0, 0.0)
    assert counter.take(0.5).tokens == 0


def test_a_copy_of_the_model_and_a_watch_that_ended_count_nothing() -> None:
    made = model(1).train()
    counter = TokenCounter(made)
    copied: Any = copy.deepcopy(made)
    assert copied(**_batch()).loss > 0
    assert counter.take(0.1).tokens == 0
    counter.close()
    made(**_batch())
    assert counter.take(0.1).tokens == 0


def test_losses_of_the_scripts_own_are_unknown_and_tokens_are_not() -> None:
    made = model(1).train()
    counter = TokenCounter(made)
    batch = _batch()
    labels = batch.pop("labels")
    made(**batch)
    step = counter.take(0.5)
    assert step.tokens == labels.numel()
    assert math.isnan(float(step.nats))


def test_compiled_code_counts_every_pass() -> None:
    made = model(1).train()
    compiled: Any = torch.compile(made, backend="eager")
    counter = TokenCounter(made)
    for _ in range(3):
        compiled(**_batch())
    assert int(counter.take(0.5).tokens) == 3 * 48
