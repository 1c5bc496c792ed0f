"""A worker that finetunes: one trial at a time, on one thread."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict
from functools import partial
from typing import Any, Final

import torch

from peer.train.means import Means
from tests.bench import finetune_others as others
from tests.bench import finetune_trial as trials
from tests.bench.finetune_trial import Outcome, Size, Trial
from tests.bench.worker import Reply, serve

RANKS: Final = (2, 4, 8, 16, 2, 4, 8, 16)
"""Of the clients in order, where ranks are mixed."""
SPREAD: Final = {"spectrum": 0.4, "step": 1.3}
"""Against drift: what a round's mean change is spread by (`method.spectrum`, `method.step`)."""
ROOM: Final = 16
"""The common state's rank / the peers' then, as what is lifted takes room."""
STRONG: Final = (0, 1, 2, 3)
RANK_4: Final = (4, 5)
ZEROTH: Final = (6, 7)
"""Which clients have gradients at rank 16, at rank 4, and none, where kinds are mixed."""


def _kinds(trial: Trial, weak: bool) -> dict[int, Means]:
    found = {client: Means("lora", 16) for client in STRONG}
    if weak:
        found |= {client: Means("lora", 4) for client in RANK_4}
        found |= {client: Means("zo", 2, trial.size.perturbations) for client in ZEROTH}
    return found


def _ranks(ranks: tuple[int, ...]) -> dict[int, Means]:
    return {client: Means("lora", rank) for client, rank in enumerate(ranks)}


WAYS: Final[Mapping[str, Callable[[Trial], Outcome]]] = {
    "untrained": trials.untrained,
    "pooled": trials.pooled,
    "fedit": partial(trials.lora, aggregate="fedit"),
    "exact": partial(trials.lora, aggregate="exact"),
    "exact, whole": lambda trial: trials.hybrid(trial, _ranks((trial.size.rank // 8,) * 8)),
    "exact, spread": lambda trial: trials.hybrid(
        trial, _ranks((trial.size.rank // ROOM,) * 8), spread=SPREAD
    ),
    "mixed ranks": partial(trials.hybrid, means=_ranks(RANKS)),
    "mixed ranks, q4": partial(trials.hybrid, means=_ranks(RANKS), codec="q4"),
    "all rank 2": partial(trials.hybrid, means=_ranks((2,) * 8)),
    "hetlora": partial(others.hetlora_rounds, ranks=RANKS),
    "three kinds": lambda trial: trials.hybrid(trial, _kinds(trial, weak=True)),
    "rank 16 alone": lambda trial: trials.hybrid(trial, _kinds(trial, weak=False)),
    "pooled mezo": others.mezo_pooled,
    "pooled mezo, P = 1": others.mezo_pooled,
    "decomfl": partial(others.zeroth, estimator="decomfl"),
    "kseed": partial(others.zeroth, estimator="kseed"),
    "kseed, several": partial(others.zeroth, estimator="kseed"),
    "afa-cd": partial(others.anarchic, rule="cd"),
    "afa-cs": partial(others.anarchic, rule="cs"),
}
"""By what a trial's `way` says."""


def start(index: int, size: int, via: list[str]) -> Reply:
    """Workers do not know each other."""
    torch.set_num_threads(1)
    return {"addresses": []}


def train(trial: Trial) -> Outcome:
    """The whole trial, in this thread."""
    return WAYS[trial.way](trial)


def run(trial: dict[str, Any]) -> Reply:
    """The outcome's fields."""
    size = trial.pop("size")
    size["targets"] = tuple(size["targets"])
    return asdict(train(Trial(size=Size(**size), **trial)))


if __name__ == "__main__":
    serve({"start": start, "train": run})
