"""The measurements by name. To add one: write the module, name it here."""

from __future__ import annotations

import importlib
from typing import Final, Protocol, cast

from tests.bench.result import Progress, Result

MEASUREMENTS: Final[dict[str, str]] = {
    "averaging": "tests.bench.averaging",
    "cells": "tests.bench.cells",
    "consensus": "tests.bench.consensus",
    "control": "tests.bench.control",
    "finetune": "tests.bench.finetune",
    "finetune-anarchic": "tests.bench.finetune_anarchic",
    "finetune-exact": "tests.bench.finetune_exact",
    "finetune-kinds": "tests.bench.finetune_kinds",
    "finetune-ranks": "tests.bench.finetune_ranks",
    "finetune-zeroth": "tests.bench.finetune_zeroth",
    "join": "tests.bench.join",
    "join-lines": "tests.bench.join_lines",
    "ladder": "tests.bench.ladder",
    "lane": "tests.bench.lane",
    "lane-wan": "tests.bench.lane_wan",
    "learning": "tests.bench.learning",
    "learning-groups": "tests.bench.learning_groups",
    "learning-tuning": "tests.bench.learning_tuning",
    "parity": "tests.bench.parity",
    "plane": "tests.bench.plane",
    "scale": "tests.bench.scale",
    "storm": "tests.bench.storm",
    "wan": "tests.bench.wan",
    "wan-faults": "tests.bench.wan_faults",
    "wan-goodput": "tests.bench.wan_goodput",
    "wan-loss": "tests.bench.wan_loss",
    "wan-speed": "tests.bench.wan_speed",
    "wire": "tests.bench.wire",
}


class Measurement(Protocol):
    """A module with a one-line docstring that says what is measured, and this function."""

    __doc__: str | None

    def run(self, quick: bool, seed: int, progress: Progress) -> Result:
        """Measure. `quick`: small and rough, to see that it works; never a result to quote.

        Raises:
            BenchError: it could not be measured.
        """


def load(name: str) -> Measurement:
    """The measurement of that name. Heavy imports belong into its `run` or its workers.

    Raises:
        KeyError: there is none.
    """
    return cast("Measurement", importlib.import_module(MEASUREMENTS[name]))


def title(name: str) -> str:
    """The first line of the measurement's docstring."""
    return (load(name).__doc__ or name).strip().splitlines()[0]
