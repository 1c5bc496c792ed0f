"""What a method calls its digest is what a receiver makes of the chunks that a donor gives."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from peer.train.method import Method
from tests.train import hybrid_tiny, zo_tiny
from tests.train.tiny import batch, method, reduce


def check(made: Method) -> None:
    state = made.state()
    grid = made.grid
    assert made.digest() == grid.digest(grid.leaves(state))


@pytest.mark.parametrize(
    ("kind", "changes"),
    [("pretrain", {}), ("pretrain", {"fragments": 2}), ("lora", {}), ("lora", {"fragments": 2})],
)
def test_the_digest_is_that_of_the_states_chunks(kind: str, changes: dict[str, Any]) -> None:
    made = method(kind, **changes)
    check(made)
    for number in range(3):
        made.step(batch(number))
        units = made.fragments.of(number)
        outcome = reduce(made, [made.contribution(units)], units)
        before = made.digest()
        made.apply(outcome, np.full(len(units), True), units.start)
        check(made)
        assert made.digest() != before
    other = method(kind, **changes)
    other.load_state(made.state())
    check(other)
    assert other.digest() == made.digest()


@pytest.mark.parametrize(
    "build",
    [
        lambda: hybrid_tiny.peer(hybrid_tiny.LORA4),
        lambda: zo_tiny.build(zo_tiny.zo_manifest()),
    ],
)
def test_so_it_is_for_methods_with_states_of_their_own(build: Callable[[], Method]) -> None:
    check(build())
