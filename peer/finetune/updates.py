"""Local training and averaging: one family, one interface, for finetuning and pretraining alike.

A peer starts a round from the common theta, makes K local steps from x = theta with gradients that
a rule may correct, and contributes delta = theta - x. The mean D of the deltas moves theta.

| rule | the gradient becomes | theta moves by (`peer/train/outer.py`) |
|---|---|---|
| `fedavg` (arXiv 1602.05629) | g | - eta D |
| `fedprox` (1812.06127) | g + mu (x - theta) | - eta D |
| `scaffold` (1910.06378) | g - c_i + c | - eta D |
| `fedavgm` (1909.06335) | g | heavy-ball momentum |
| `fedadam` (2003.00295) | g | Adam |
| `diloco` (2311.08105) | g | Nesterov |

SCAFFOLD's control variates say how a peer's gradient differs from everybody's: c_i is the mean of
the gradients that peer i saw in its last round (option II), c their mean over all peers:

    c_i' = c_i - c + (theta - x) / (K eta_local),      c <- c + share * mean(c_i' - c_i)

It sends c_i' - c_i beside delta, twice the bytes, and needs inner steps of plain SGD, of which
(theta - x) / (K eta_local) is the mean. Peers come and go: c_i becomes c_i' only once the round's
outcome is known to contain the contribution (`Local.settled`), so c stays the mean of all c_i
whatever gets lost.

In float32 with separate NumPy operations: the same bits on every machine.

Shapes: N = all parameters, U = values of one unit.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Final, Literal, assert_never

import numpy as np

from peer.train.outer import FedAdam, FedAvg, FedAvgM, Float32, Nesterov, Outer

RuleName = Literal["fedavg", "fedprox", "scaffold", "fedavgm", "fedadam", "diloco"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Rule:
    """One of the family, with its settings; `RULES` has them as published.

    Raises (on construction):
        ValueError: a setting outside its range; says which.
    """

    name: RuleName
    outer_lr: float = 1.0
    """eta."""
    momentum: float = 0.0
    """beta: fedavgm, fedadam and diloco."""
    beta2: float = 0.99
    """fedadam."""
    tau: float = 1e-3
    """fedadam: what keeps steps of tiny D small."""
    proximal: float = 0.0
    """mu: fedprox."""

    def __post_init__(self) -> None:
        if self.name not in RULES_KNOWN:
            raise ValueError(f"no rule {self.name!r}: {', '.join(RULES_KNOWN)}")
        for what, value, top in (
            ("outer_lr", self.outer_lr, math.inf),
            ("momentum", self.momentum, 1.0),
            ("beta2", self.beta2, 1.0),
            ("tau", self.tau, math.inf),
            ("proximal", self.proximal, math.inf),
        ):
            if not 0.0 <= value < top:
                raise ValueError(f"{what}: {value} is not in 0..{top}")
        if self.outer_lr == 0.0 or self.tau == 0.0:
            raise ValueError("outer_lr and tau: 0 moves nothing, or divides by it")
        if self.proximal and self.name != "fedprox":
            raise ValueError(f"proximal: {self.name} has no such term")
        if self.momentum and self.name in ("fedavg", "fedprox", "scaffold"):
            raise ValueError(f"momentum: {self.name} has none")

    @property
    def controlled(self) -> bool:
        """Whether control variates go beside every difference."""
        return self.name == "scaffold"

    def outer(self, numel: int, largest: int) -> Outer:
        """What moves theta. `largest`: values in the largest unit."""
        match self.name:
            case "fedavg" | "fedprox" | "scaffold":
                return FedAvg(self.outer_lr)
            case "fedavgm":
                return FedAvgM(numel, self.outer_lr, self.momentum)
            case "fedadam":
                return FedAdam(numel, largest, self.outer_lr, self.momentum, self.beta2, self.tau)
            case "diloco":
                return Nesterov(numel, largest, self.outer_lr, self.momentum)
            case _:
                assert_never(self.name)


RULES_KNOWN: Final = ("fedavg", "fedprox", "scaffold", "fedavgm", "fedadam", "diloco")
RULES: Final[dict[RuleName, Rule]] = {
    "fedavg": Rule(name="fedavg"),
    "fedprox": Rule(name="fedprox", proximal=0.01),
    "scaffold": Rule(name="scaffold"),
    "fedavgm": Rule(name="fedavgm", momentum=0.9),
    "fedadam": Rule(name="fedadam", outer_lr=1e-3, momentum=0.9),
    "diloco": Rule(name="diloco", outer_lr=0.7, momentum=0.9),
}
"""With the settings of their papers or, for fedprox and fedadam, of published finetuning code."""


@dataclass(frozen=True, slots=True, eq=False)
class Work:
    """What a round of local steps contributes; both averaged with the same weights."""

    delta_N: Float32
    """theta - x."""
    control_N: Float32 | None
    """c_i' - c_i, of a rule with control variates."""


class Local:
    """A peer's side: corrects gradients, and says what came of a round.

    Memory: one vector; of a rule with control variates four.
    """

    def __init__(self, rule: Rule, numel: int) -> None:
        self._rule = rule
        self._mu = np.float32(rule.proximal)
        self._start_N = np.zeros(numel, np.float32)
        self.control_N: Float32 = np.zeros(numel if rule.controlled else 0, np.float32)
        """c_i: this peer's own, to be kept with its checkpoint; empty if the rule has none."""
        self._shift_N = np.zeros_like(self.control_N)
        self._next_N: Float32 | None = None

    def begin(self, theta_N: Float32, control_N: Float32 | None = None) -> None:
        """A round starts at theta. `control_N`: c, where the rule has control variates.

        Raises:
            ValueError: c is missing, or there and not wanted.
        """
        if (control_N is not None) != self._rule.controlled:
            raise ValueError(f"{self._rule.name} and control variates: {control_N is not None}")
        self._start_N[:] = theta_N
        if control_N is not None:
            np.subtract(control_N, self.control_N, out=self._shift_N)

    def correct(self, gradient_N: Float32, x_N: Float32) -> None:
        """Make the gradient at x, in place, into what the rule wants of it."""
        if self._rule.controlled:
            np.add(gradient_N, self._shift_N, out=gradient_N)
        elif self._mu != 0.0:
            pull_N = x_N - self._start_N
            np.multiply(pull_N, self._mu, out=pull_N)
            np.add(gradient_N, pull_N, out=gradient_N)

    def finish(self, x_N: Float32, *, steps: int, lr: float) -> Work:
        """The round's work after `steps` local steps of length `lr` that ended at x.

        Nothing is taken for granted until `settled`, which may come after the next `begin` but not
        after the next `finish`: work that is not settled by then counts as lost.

        Raises:
            ValueError: no step, or a length that is not positive.
        """
        if steps < 1 or not 0.0 < lr < math.inf:
            raise ValueError(f"{steps} steps of length {lr}")
        delta_N = np.subtract(self._start_N, x_N, dtype=np.float32)
        if not self._rule.controlled:
            return Work(delta_N, None)
        # c_i' - c_i = (theta - x) / (K eta) - c, and c - c_i is what we have.
        mean_N = delta_N * np.float32(1.0 / (steps * lr))
        self._next_N = mean_N - self._shift_N
        return Work(delta_N, self._next_N - self.control_N)

    def settled(self, inside: bool) -> None:
        """The outcome for the work that was last finished: whether it is inside."""
        if inside and self._next_N is not None:
            self.control_N[:] = self._next_N
        self._next_N = None


class Common:
    """Everybody's side: theta's optimiser and the common control variate, the same on all peers."""

    def __init__(self, rule: Rule, numel: int, largest: int | None = None) -> None:
        """`largest`: values in the largest unit; by default there is one, of all values."""
        self._outer = rule.outer(numel, numel if largest is None else largest)
        self.control_N: Float32 | None = None
        """c."""
        self.arrays: dict[str, Float32] = dict(self._outer.arrays)
        """Its memory: part of the outer state."""
        if rule.controlled:
            self.control_N = self.arrays["control"] = np.zeros(numel, np.float32)

    def apply(
        self,
        theta_U: Float32,
        mean: Work,
        *,
        share: float = 1.0,
        unit: int = 0,
        where: slice = slice(None),
    ) -> None:
        """Move theta[where], one unit or all of it, by the mean of the works; overwrites the mean.

        `share`: the contributors' part of all peers' weight, 0 to 1: c is a mean over all.

        Raises:
            ValueError: control variates are missing or not wanted, or a share that is none. Nothing
                has changed then.
        """
        if (mean.control_N is not None) != (self.control_N is not None):
            raise ValueError("a mean with control variates where the rule has none, or without")
        if not 0.0 <= share <= 1.0:
            raise ValueError(f"a share of {share}")
        if mean.control_N is not None and self.control_N is not None:
            c_U = self.control_N[where]
            np.multiply(mean.control_N, np.float32(share), out=mean.control_N)
            np.add(c_U, mean.control_N, out=c_U)
        self._outer.step(unit, where, theta_U, mean.delta_N)
