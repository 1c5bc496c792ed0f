"""The manifest's section on evaluating over the network: what is asked, and how much of it."""

from __future__ import annotations

from dataclasses import dataclass

from peer.manifest_checks import between, need

ROWS_MAX = 4096  # a minute of forward passes on a GPU; training stands still for that
ANSWER_TOKENS_MAX = 1024  # a forward pass each


@dataclass(frozen=True, kw_only=True, slots=True)
class EvaluationSpec:
    """What a group's peers score between them, and tell each other, every
    `schedule.evaluate_every` rounds."""

    rows: int = 0
    """At most so many questions a peer scores at a time; 0: nobody does."""
    paths: tuple[str, ...] = ()
    """Assets with questions and answers that nobody trains on, shared out among the members of a
    group. None: the rows that chat data holds out."""
    answer_tokens: int = 0
    """How long an answer of the model's own may be, to count exact matches; 0: it is not asked."""

    def __post_init__(self) -> None:
        between("evaluation.rows", self.rows, 0, ROWS_MAX)
        between("evaluation.answer_tokens", self.answer_tokens, 0, ANSWER_TOKENS_MAX)
        need(self.rows > 0 or not self.paths, "evaluation.rows",
             "must be at least 1 where there are questions", self.rows)  # fmt: skip
