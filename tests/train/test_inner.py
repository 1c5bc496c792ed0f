"""The inner optimiser's learning rate: warm-up by steps, and the end by the calendar."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta

import numpy as np
import pytest
import torch

from peer.errors import ManifestError
from peer.manifest import InnerSpec
from peer.train.inner import Inner
from peer.train.models import seeded_model
from tests.test_bench_groups import CONFIG

END = datetime(2027, 1, 31, tzinfo=UTC)
END_S = END.timestamp()


def test_the_rate_falls_in_a_straight_line_to_the_end() -> None:
    spec = InnerSpec(ends=END.isoformat(), cooldown_s=1000.0)
    assert spec.rate_at(END_S - 5000) == 1.0
    assert spec.rate_at(END_S - 1000) == 1.0
    assert spec.rate_at(END_S - 250) == pytest.approx(0.25)
    assert spec.rate_at(END_S) == 0.0
    assert spec.rate_at(END_S + 1e9) == 0.0


def test_a_run_without_an_end_learns_for_ever_and_one_without_a_cooldown_stops_at_once() -> None:
    assert InnerSpec().rate_at(1e12) == 1.0
    spec = InnerSpec(ends="2027-01-31T00:00:00Z")
    assert (spec.rate_at(END_S - 1), spec.rate_at(END_S)) == (1.0, 0.0)


def test_the_zone_counts() -> None:
    spec = InnerSpec(ends="2027-01-31T02:00:00+02:00", cooldown_s=10.0)
    assert spec.rate_at(END_S - 5) == pytest.approx(0.5)


@pytest.mark.parametrize("ends", ["soon", "2027-01-31T00:00:00", "2027-13-01T00:00:00Z", "9" * 99])
def test_an_end_that_means_something_else_elsewhere_is_refused(ends: str) -> None:
    with pytest.raises(ManifestError, match=r"inner\.ends"):
        InnerSpec(ends=ends)


def test_a_cooldown_needs_an_end() -> None:
    with pytest.raises(ManifestError, match=r"inner\.cooldown_s"):
        InnerSpec(cooldown_s=60.0)


def test_steps_shrink_with_the_calendar_and_change_nothing_after_the_end() -> None:
    moved = {}
    for before_s in (1000, 100, -1):
        now = END - timedelta(seconds=before_s)
        spec = InnerSpec(ends=END.isoformat(), cooldown_s=1000.0, warmup_steps=0)
        inner = Inner(seeded_model(CONFIG, 1), spec, torch.device("cpu"), now.timestamp)
        first_N = inner.to_numpy()
        inner.step(torch.arange(64).reshape(2, 32) % 264)
        moved[before_s] = float(np.abs(inner.to_numpy() - first_N).max())
    assert moved[-1] == 0.0
    assert moved[100] == pytest.approx(moved[1000] / 10, rel=0.01)
