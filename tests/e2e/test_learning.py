"""Together they learn more than one alone: the point of it all."""

from __future__ import annotations

from tests.bench.learning import race


def test_three_peers_end_below_the_loss_of_one_that_had_the_same_time_and_pace() -> None:
    alone, group = race(seed=1, group=3, seconds=20.0, whole_rounds=20, step_s=0.02, round_s=1.0)
    # Measured 0.89 to 0.94, on a quiet machine and on a full one; without the others' work, 1.
    assert group.final < 0.98 * alone.final, (alone, group)
    assert max(group.steps) < 1.2 * alone.steps[0], "it won by faster peers"
