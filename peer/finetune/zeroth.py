"""A zeroth-order peer: a model, the log that its values follow, and the scalars that it adds.

    peer.measure(losses, tokens)  ->  entry      to whoever closes the round
    log.append(sender, record)                   what the round came to
    peer.follow()                                the same values as everybody who has the same log

There is no network here, and no aggregation but the log's own; `peer/train/zeroth.py` has rounds
carry it. Touched by one thread.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence

import numpy as np
import torch

from peer.finetune import decomfl, kseed, scalars
from peer.finetune.local_work import LocalWork, Loss
from peer.finetune.mezo import Measured
from peer.finetune.perturb import Noise
from peer.finetune.seedlog import SeedLog
from peer.finetune.tensors import Weights
from protocols.identity import Signer


class ZerothPeer:
    """One replica of a run's values, on any device."""

    def __init__(
        self,
        model: torch.nn.Module,
        log: SeedLog,
        signer: Signer | None,
        compute: torch.dtype | None = None,
        base: Mapping[str, torch.Tensor] | None = None,
    ) -> None:
        """Takes `model`, with the run's base values in its trainable tensors, over, and brings it
        to where `log` is.

        `signer`: None for a replica that never sends anything.

        `base`: those values once more, memory-mapped if you like; kseed goes back to them after
        each round, and decomfl when somebody is banned. Without them kseed keeps a copy in memory,
        and decomfl can't follow a ban.

        Raises:
            ValueError: the model is not the base that the log starts from.
        """
        rules = log.rules
        noise: Noise = "rademacher" if rules.noise == "rademacher" else "gaussian"
        self.weights = Weights(model, rules.master, noise, compute)
        if self.weights.digest() != rules.base:
            raise ValueError(
                "the model's trainable values are not those that the run's seed log starts from; "
                "load the run's base"
            )
        self.log = log
        self.number = 0
        """Rounds that are in the values."""
        self.last: Measured | None = None
        """What the last local step measured."""
        self._signer = signer
        if base is None and rules.method == "kseed":
            base = self.weights.state()
        self._base = base
        self._sums = np.zeros(rules.pool)
        self._pool = kseed.pool_of(rules)
        self._counted = log.banned
        self.follow()

    # ── the run's values ─────────────────────────────────────────────────────────────────────
    def follow(self, on_round: Callable[[int, int], None] = lambda *_: None) -> None:
        """Bring the values to where the log is: by what is new, or from the base if somebody was
        banned since. `on_round`: told how many of how many rounds are done, one after another.

        Raises:
            ValueError: a ban reaches into the log's summary (`SeedLog`), or needs the base that
                is not here; nothing has changed.
        """
        log, rules = self.log, self.log.rules
        anew = log.banned != self._counted
        if rules.method == "kseed":
            since = None if anew or self.number < log.first else (self.number, self._sums)
            sums_K = log.sums(since=since)
            if anew or self.number != log.next:
                self._sums = sums_K
                self._rebuild()
        else:
            if anew and self._base is None:
                raise ValueError("a peer was banned: give the base, to replay the log from it")
            start = 0 if anew else self.number
            steps = [(n, log.factors(n)) for n in range(start, log.next)]
            if anew and self._base is not None:
                self.weights.load(self._base)
            for done, (number, factors) in enumerate(steps, 1):
                step = decomfl.step_of(rules, number, factors)
                self.weights.apply(step, decomfl.dither_of(rules, number))
                on_round(done, len(steps))
        self.number = log.next
        self._counted = log.banned

    def change(
        self, log: SeedLog, *, extends: bool, on_round: Callable[[int, int], None] = lambda *_: None
    ) -> None:
        """Follow another log of the same rules from now on. `extends`: the rounds that are in the
        values are its first ones, with the same scalars; else it is replayed from the base.

        Raises:
            ValueError: the base is needed and not here, or the log can't be read; nothing has
                changed.
        """
        if log.rules != self.log.rules:
            raise ValueError("the log is of another run")
        if not extends:
            if self._base is None:
                raise ValueError("give the base, to follow another log from it")
            self.weights.load(self._base)
            self.number = 0
            self._sums = np.zeros(log.rules.pool)
            self._counted = log.banned
        self.log = log
        self.follow(on_round)

    def digest(self) -> bytes:
        """SHA-256 of the values: equal on all peers that follow the same log."""
        return self.weights.digest()

    # ── this peer's own work ─────────────────────────────────────────────────────────────────
    def begin(self) -> LocalWork:
        """Work for the next round; `close` it before anything else changes the values."""
        rules = self.log.rules
        if self.number != self.log.next or self._counted != self.log.banned:
            raise ValueError("follow the log first: scalars belong to the values they come from")
        rebuild = self._rebuild if rules.method == "kseed" else None
        return LocalWork(self.weights, rules, self.number, rebuild)

    def sign(self, work: LocalWork, tokens: float | None = None) -> bytes | None:
        """This peer's entry for the next round; None where nothing was found, or more than the
        rules allow. `tokens`: what it weighs; those of the work, if not given."""
        weight = work.tokens if tokens is None else tokens
        found = work.found()
        if not found or weight < 1 or self._signer is None:
            return None
        try:
            sent = scalars.quantise(found)
            return scalars.encode(
                self.log.rules, self._signer, self.log.head, self.number, weight, sent
            )
        except ValueError:  # larger than the rules allow: a batch gone wrong
            return None

    def measure(
        self,
        losses: Sequence[Loss],
        tokens: float,
        rng: random.Random | None = None,
        odds: Sequence[float] | None = None,
    ) -> bytes | None:
        """This peer's entry for the next round, all at once: None where a loss was not finite.

        `losses`: one for each local step; decomfl: as many as the rules say; kseed: any number,
        and `rng` draws their directions, by `odds` if given (`kseed.probabilities`). `tokens`: what
        the entry weighs. The values are the log's again afterwards, to the last bit.
        """
        rules = self.log.rules
        work = self.begin()
        if rules.method == "decomfl" and len(losses) != rules.steps:
            raise ValueError(f"{len(losses)} batches for {rules.steps} local steps")
        chosen = rng or random.Random()
        try:
            for loss in losses:
                if not work.step(loss, 1, chosen, odds):
                    return None
        finally:
            self.last = work.last
            work.close()
        return self.sign(work, tokens)

    def _rebuild(self) -> None:
        """kseed: base and sums are the values."""
        assert self._base is not None
        self.weights.rebuild(self._base, kseed.step_of(self.log.rules, self._pool, self._sums))
