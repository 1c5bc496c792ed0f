"""The local-update family on quadratics, where everything is known beforehand.

Peer i minimises sum h_i (x - c_i)^2 / 2, value by value; w_i are the peers' weights.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from peer.finetune.anarchic import Anarchic, Move, Pushed, make_push, mean_gradient
from peer.finetune.updates import RULES, RULES_KNOWN, Common, Local, Rule, RuleName, Work
from protocols.identity import Signer
from tensorcodecs import Layout

Float32 = npt.NDArray[np.float32]
Float64 = npt.NDArray[np.float64]

N, PEERS = 6, 4


@dataclass
class Swarm:
    """Peers that drift: what is curved for one is flat for another, and they want other things."""

    rule: Rule
    lr: float = 0.05
    steps: int = 20
    noise: float = 0.0
    seed: int = 0
    alike: bool = False

    def __post_init__(self) -> None:
        self.dice = np.random.default_rng(self.seed)
        rng = np.random.default_rng(42)
        shape = (PEERS, N)
        self.h = np.ones(shape) if self.alike else rng.uniform(0.1, 4.0, shape)
        self.c = np.ones(shape) if self.alike else rng.standard_normal(shape)
        self.weights = np.array([0.1, 0.2, 0.3, 0.4])
        self.locals = [Local(self.rule, N) for _ in range(PEERS)]
        self.common = Common(self.rule, N)
        self.theta = np.zeros(N, np.float32)

    def work(self, i: int) -> Work:
        local, x = self.locals[i], self.theta.copy()
        local.begin(self.theta, self.common.control_N)
        for _ in range(self.steps):
            g = (self.h[i] * (x - self.c[i])).astype(np.float32)
            g += self.noise * self.dice.standard_normal(N).astype(np.float32)
            local.correct(g, x)
            x -= np.float32(self.lr) * g
        return local.finish(x, steps=self.steps, lr=self.lr)

    def round(self, present: list[int] | None = None) -> None:
        who = list(range(PEERS)) if present is None else present
        works = {i: self.work(i) for i in range(PEERS)}
        share = float(self.weights[who].sum())
        p = {i: np.float32(self.weights[i] / share) for i in who}
        delta = sum(p[i] * works[i].delta_N for i in who)
        controls = [(p[i], works[i].control_N) for i in who]
        control = None
        if self.rule.controlled:
            control = np.asarray(sum(q * c for q, c in controls if c is not None))
        self.common.apply(self.theta, Work(np.asarray(delta), control), share=share)
        for i, local in enumerate(self.locals):
            local.settled(i in who)

    def optimum(self) -> Float64:
        w = self.weights[:, None]
        return np.asarray((w * self.h * self.c).sum(0) / (w * self.h).sum(0))

    def fedavgs(self, mu: float = 0.0) -> Float64:
        """Where local steps lead if nothing corrects them: sum w a c' / sum w a, with a = 1 -
        (1 - lr (h + mu))^K of the way to c', which lies between c and theta."""
        reach = 1 - (1 - self.lr * (self.h + mu)) ** self.steps
        pull = self.weights[:, None] * reach * self.h / (self.h + mu)
        return np.asarray((pull * self.c).sum(0) / pull.sum(0))


def settle(swarm: Swarm, rounds: int) -> Float64:
    for _ in range(rounds):
        swarm.round()
    return swarm.theta.astype(np.float64)


def off(one: npt.NDArray[Any], other: npt.NDArray[Any]) -> float:
    return float(np.abs(np.asarray(one) - np.asarray(other)).max())


SGD: list[Rule] = [
    Rule(name="fedavg"),
    Rule(name="fedprox", proximal=0.5),
    Rule(name="scaffold"),
    Rule(name="fedavgm", momentum=0.0),
    Rule(name="diloco", momentum=0.0),
]


@pytest.mark.parametrize("rule", SGD, ids=lambda rule: rule.name)
def test_one_local_step_is_a_step_of_the_whole(rule: Rule) -> None:
    swarm = Swarm(rule, steps=1)
    theta = np.zeros(N)
    w = swarm.weights[:, None]
    for _ in range(30):
        swarm.round()
        theta -= swarm.lr * (w * swarm.h * (theta - swarm.c)).sum(0)
        assert off(swarm.theta, theta) <= 1e-5


def test_fedavg_drifts_to_where_theory_says() -> None:
    swarm = Swarm(RULES["fedavg"])
    x = settle(swarm, 400)
    assert off(x, swarm.fedavgs()) <= 1e-5
    assert off(x, swarm.optimum()) > 0.1


def test_scaffold_finds_the_optimum_that_fedavg_misses() -> None:
    swarm = Swarm(RULES["scaffold"])
    assert off(settle(swarm, 400), swarm.optimum()) <= 1e-4
    noisy = [Swarm(RULES[name], noise=0.3, seed=1) for name in ("fedavg", "scaffold")]
    drifted, corrected = (
        np.mean([settle(swarm, 1) for _ in range(400)][200:], axis=0) for swarm in noisy
    )
    assert off(corrected, swarm.optimum()) < 0.2 * off(drifted, swarm.optimum())


def test_scaffolds_c_stays_the_mean_of_all_whoever_is_missing() -> None:
    swarm = Swarm(RULES["scaffold"], steps=5)
    dice = np.random.default_rng(0)
    for _ in range(600):
        present = sorted(dice.choice(PEERS, size=int(dice.integers(1, 5)), replace=False).tolist())
        swarm.round(present)
        mean = (swarm.weights[:, None] * np.array([p.control_N for p in swarm.locals])).sum(0)
        assert swarm.common.control_N is not None
        assert off(swarm.common.control_N, mean) <= 1e-4
    for _ in range(300):
        swarm.round()
    assert off(swarm.theta, swarm.optimum()) <= 1e-3


def test_work_settled_while_the_next_round_runs_counts_once() -> None:
    early, late = (Swarm(RULES["scaffold"], steps=3) for _ in range(2))
    one, other = early.locals[0], late.locals[0]
    c = np.ones(N, np.float32)
    works = []
    for local, before in ((one, True), (other, False)):
        local.begin(early.theta, c)
        local.finish(early.theta - 1, steps=3, lr=0.1)
        if before:
            local.settled(True)
        local.begin(early.theta, c)
        if not before:
            local.settled(True)
        work = local.finish(early.theta - 2, steps=3, lr=0.1)
        assert work.control_N is not None
        local.settled(True)
        works.append(local.control_N.copy())
    # What the gradients were, less the correction that each round began with.
    assert np.allclose(works[0], 2 / 0.3 - (c - (1 / 0.3 - c)), atol=1e-4)
    assert np.allclose(works[1], 2 / 0.3 - c, atol=1e-4)


def test_lost_work_leaves_no_trace_in_the_peers_memory() -> None:
    local = Local(RULES["scaffold"], N)
    local.begin(np.zeros(N, np.float32), np.zeros(N, np.float32))
    local.finish(np.ones(N, np.float32), steps=1, lr=0.1)
    local.settled(False)
    assert not local.control_N.any()
    local.settled(True)
    assert not local.control_N.any()


@pytest.mark.parametrize("mu", [0.1, 1.0, 10.0])
def test_fedprox_settles_where_theory_says_and_the_drift_fades_with_mu(mu: float) -> None:
    swarm = Swarm(Rule(name="fedprox", proximal=mu))
    assert off(settle(swarm, 3000), swarm.fedavgs(mu)) <= 1e-4


def test_fedproxs_limits() -> None:
    plain, none = Swarm(RULES["fedavg"]), Swarm(Rule(name="fedprox", proximal=0.0))
    settle(plain, 20)
    settle(none, 20)
    assert plain.theta.tobytes() == none.theta.tobytes()  # mu = 0 is FedAvg
    moved = []
    for mu in (0.0, 0.3, 3.0, 19.0):
        swarm = Swarm(Rule(name="fedprox", proximal=mu))
        swarm.round()
        moved.append(float(np.linalg.norm(swarm.theta)))
    assert moved == sorted(moved, reverse=True)  # the larger mu, the nearer to where it began
    distances = [off(Swarm(SGD[1]).fedavgs(mu), Swarm(SGD[1]).optimum()) for mu in (0, 1, 1e6)]
    assert distances[0] > distances[1] > distances[2]
    assert distances[2] <= 1e-5


def test_momentum_of_zero_is_fedavg() -> None:
    states = []
    for rule in (
        Rule(name="fedavg", outer_lr=0.7),
        Rule(name="fedavgm", outer_lr=0.7),
        Rule(name="diloco", outer_lr=0.7),
    ):
        swarm = Swarm(rule)
        settle(swarm, 30)
        states.append(swarm.theta.copy())
    assert off(states[0], states[1]) <= 1e-6
    assert off(states[0], states[2]) <= 1e-6


def test_momentum_gets_there_sooner_where_progress_is_slow() -> None:
    steps: dict[RuleName, float] = {}
    plain: Rule = RULES["fedavg"]
    for base in (plain, RULES["fedavgm"], RULES["diloco"]):
        rule, name = replace(base, outer_lr=0.2), base.name
        swarm = Swarm(rule, steps=2, lr=0.02)
        steps[name] = off(settle(swarm, 100), swarm.fedavgs())
    assert steps["fedavgm"] < 0.5 * steps["fedavg"]
    assert steps["diloco"] < 0.5 * steps["fedavg"]


def test_the_outer_steps_are_their_formulas() -> None:
    rng = np.random.default_rng(5)
    means = [rng.standard_normal(10).astype(np.float32) for _ in range(7)]
    for rule in (RULES["fedavgm"], RULES["fedadam"], RULES["diloco"]):
        m, v, expected = np.zeros(10), np.zeros(10), np.ones(10)
        for D in means:
            if rule.name == "fedadam":
                m, v = 0.9 * m + 0.1 * D, 0.99 * v + 0.01 * D**2
                expected = expected - 1e-3 * m / (np.sqrt(v) + 1e-3)
            elif rule.name == "fedavgm":
                m = 0.9 * m + D
                expected = expected - m
            else:
                m = 0.9 * m + D
                expected = expected - 0.7 * (D + 0.9 * m)
        common, theta = Common(rule, 10), np.ones(10, np.float32)
        for D in means:
            common.apply(theta, Work(D.copy(), None))
        assert np.allclose(theta, expected, atol=1e-5), rule.name


def test_fedadams_steps_do_not_depend_on_the_unit_of_the_loss() -> None:
    rule = replace(RULES["fedadam"], tau=1e-9)
    thetas = []
    for unit in (1.0, 1e4):
        common, theta = Common(rule, N), np.zeros(N, np.float32)
        rng = np.random.default_rng(6)
        for _ in range(10):
            D = np.float32(unit) * rng.standard_normal(N).astype(np.float32)
            common.apply(theta, Work(D, None))
        thetas.append(theta)
    assert off(*thetas) <= 1e-6


@pytest.mark.parametrize("name", RULES_KNOWN)
def test_unit_by_unit_is_the_same_to_the_last_bit(name: RuleName) -> None:
    rng = np.random.default_rng(7)
    rule = RULES[name]
    whole, pieces = Common(rule, 10), Common(rule, 10, largest=4)
    one, other = np.ones(10, np.float32), np.ones(10, np.float32)
    for _ in range(5):
        D, C = (rng.standard_normal(10).astype(np.float32) for _ in range(2))
        control = C if rule.controlled else None
        whole.apply(one, Work(D.copy(), None if control is None else C.copy()), share=0.3)
        for unit, start in enumerate(range(0, 10, 4)):
            where = slice(start, min(start + 4, 10))
            part = Work(D[where].copy(), None if control is None else C[where].copy())
            pieces.apply(other[where], part, share=0.3, unit=unit, where=where)
    assert one.tobytes() == other.tobytes()
    assert set(whole.arrays) == set(pieces.arrays)
    for key, values in whole.arrays.items():
        assert values.tobytes() == pieces.arrays[key].tobytes()


@pytest.mark.parametrize("name", RULES_KNOWN)
def test_every_rule_gets_closer_and_says_the_same_twice(name: RuleName) -> None:
    rule = RULES[name] if name != "fedadam" else replace(RULES[name], outer_lr=0.05)
    swarms = [Swarm(rule, steps=5) for _ in range(2)]
    for swarm in swarms:
        settle(swarm, 60)
    assert swarms[0].theta.tobytes() == swarms[1].theta.tobytes()
    assert off(swarms[0].theta, swarms[0].optimum()) < 0.5 * off(0.0, swarms[0].optimum())  # type: ignore[arg-type]


def test_anarchic_cd_with_equal_steps_and_no_delay_is_fedavg() -> None:
    """With eta = eta_local K eta_outer."""
    layout = Layout.of([("x", (N,))])
    workers = [Signer(bytes([i + 1]) * 32) for i in range(PEERS)]
    swarm = Swarm(Rule(name="fedavg", outer_lr=0.8))
    swarm.weights = np.full(PEERS, 1 / PEERS)
    machine = Anarchic(
        "cd", bytes(32), layout, per_step=PEERS, versions_behind_max=0, memory_versions=9
    )
    x = np.zeros(N, np.float32)
    for version in range(40):
        for i, worker in enumerate(workers):
            end = x.copy()
            for _ in range(swarm.steps):
                end -= np.float32(swarm.lr) * (swarm.h[i] * (end - swarm.c[i])).astype(np.float32)
            push = make_push(
                worker, bytes(32), layout, mean_gradient(x, end, swarm.lr, swarm.steps),
                sequence=version, version=version, steps=swarm.steps,
            )  # fmt: skip
            for effect in machine.handle(Pushed(worker.peer_id, push), 0.0):
                assert isinstance(effect, Move)
                x = x - np.float32(swarm.lr * swarm.steps * 0.8) * effect.direction_N
        swarm.round()
        assert off(x, swarm.theta) <= 0.02  # 8 bits per value
    assert off(x, swarm.fedavgs()) <= 0.02


def test_settings_and_calls_without_meaning_are_refused() -> None:
    for settings in (
        {"name": "fedsgd"},
        {"name": "fedavg", "outer_lr": 0.0},
        {"name": "fedavg", "outer_lr": float("nan")},
        {"name": "fedavgm", "momentum": 1.0},
        {"name": "fedadam", "beta2": -0.1},
        {"name": "fedadam", "tau": 0.0},
        {"name": "fedprox", "proximal": -1.0},
        {"name": "fedavg", "proximal": 0.1},
        {"name": "scaffold", "momentum": 0.9},
    ):
        made: dict[str, Any] = dict(settings)
        with pytest.raises(ValueError, match=r"\w"):
            Rule(**made)
    zeros = np.zeros(N, np.float32)
    with pytest.raises(ValueError, match="control"):
        Local(RULES["scaffold"], N).begin(zeros)
    with pytest.raises(ValueError, match="control"):
        Local(RULES["fedavg"], N).begin(zeros, zeros)
    for steps, lr in ((0, 0.1), (1, 0.0), (1, float("inf"))):
        with pytest.raises(ValueError, match="steps of length"):
            Local(RULES["fedavg"], N).finish(zeros, steps=steps, lr=lr)
    for name, control, share in (
        ("scaffold", None, 1.0),
        ("fedavg", zeros, 1.0),
        ("scaffold", zeros, 1.1),
    ):
        common, theta = Common(RULES[name], N), np.ones(N, np.float32)  # type: ignore[index]
        with pytest.raises(ValueError, match=r"control|share"):
            common.apply(theta, Work(theta.copy(), control), share=share)
        assert (theta == 1.0).all()
