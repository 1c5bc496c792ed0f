"""A worker that trains: one trial at a time, on one thread."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

import torch

from tests.bench.trial import Size, Trial, train
from tests.bench.worker import Reply, serve


def start(index: int, size: int, via: list[str]) -> Reply:
    """Workers do not know each other."""
    torch.set_num_threads(1)
    return {"addresses": []}


def run(trial: dict[str, Any]) -> Reply:
    """The outcome's fields."""
    size = Size(**trial.pop("size"))
    return asdict(train(Trial(size=size, **trial)))


if __name__ == "__main__":
    serve({"start": start, "train": run})
