"""Against the group's machine: strangers, forgers and former friends change nothing, by name.

The machines come out of the simulated world in the middle of real rounds, so that there is
something to lose; a picture of everything inside them is compared before and after.
"""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Callable
from typing import Any

import pytest

from protocols import limits
from protocols.election import revise_plan
from protocols.errors import RemoteProtocolError
from protocols.events import (
    ContributionOffered,
    Event,
    OutcomeOffered,
    PlanAdopted,
    Received,
    RecordSeen,
    Send,
    SignPlan,
    Tick,
)
from protocols.group import GroupMachine
from protocols.identity import SIGNATURE_BYTES, Signer
from protocols.messages import (
    OUTCOME_DOMAIN,
    PLAN_DOMAIN,
    ContributionHeader,
    Goodbye,
    Heartbeat,
    Hello,
    OutcomeHeader,
    OutcomePush,
    Plan,
    PlanIssued,
    PlanRefused,
    Seat,
    Span,
    SpanHeld,
)
from protocols.records import PeerRecord, Signed, sign, sign_record
from protocols.round import Round
from protocols.types import Digest, PeerId, RunId
from tests.protocols.samples import MESSAGES, sample
from tests.sim.world import RUN, UNITS, Peer, World, group_name
from tests.sim.world import signer as world_signer

FOREIGN_RUN = RunId("cd" * 32)
HERE, THERE = group_name("a"), group_name("b")
LIVENESS = {"heard_s", "next_s", "sweep_s", "hailed_s", "failures", "suspected", "left"}
"""Whoever speaks lives, also when it speaks nonsense."""
WORKED_OUT = {"version", "_view", "_outlook", "_compared", "_rounds_s", "_rounds_of"}
"""What a machine remembers of its own conclusions: all of it follows from the rest."""


def picture(value: Any, without: frozenset[str] = frozenset()) -> Any:
    """Everything inside a machine, as plain values."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        names = [f.name for f in dataclasses.fields(value)]
    elif isinstance(value, dict):
        return {repr(k): picture(v, without) for k, v in value.items()}
    elif isinstance(value, list | tuple):
        return [picture(v, without) for v in value]
    elif isinstance(value, set | frozenset):
        return sorted(repr(v) for v in value)
    elif type(value).__module__.startswith("protocols."):
        names = list(vars(value))
    else:
        return value
    names = [name for name in names if name not in without and name not in WORKED_OUT]
    return {name: picture(getattr(value, name), without) for name in names}


class Scene:
    """Four peers at one site in the middle of a round, two at another; we look at one of them."""

    def __init__(self, seed: int, *, exchanging: bool = False) -> None:
        self.world = World(seed)
        self.peers = [self.world.add(i, site="a") for i in range(4)]
        self.others = [self.world.add(i, site="b") for i in range(10, 12)]
        self.world.run(21.0)
        assert self.world.run_until(self._ready(exchanging), 30.0), f"seed {seed}: no such moment"
        self.victim = next(p for p in self.peers if p.id != self.plan.spans[0].aggregator)
        self.aggregator = self.world.peers[self.plan.spans[0].aggregator]
        self.member = next(p for p in self.peers if p not in (self.victim, self.aggregator))
        self.stranger = world_signer(66)
        self._quiet()

    def _ready(self, exchanging: bool) -> Callable[[], bool]:
        def ready() -> bool:
            rounds = [p.machine.current for p in self.peers]
            return len({r.number for r in rounds if r is not None}) == 1 and all(
                r is not None and r.training is not exchanging and not r.applying for r in rounds
            )

        return ready

    def _quiet(self) -> None:
        """Let the machines do what is due, so that what follows is the attack's doing alone."""
        for peer in self.peers:
            for _ in range(2):
                peer.machine.handle(Tick(), self.world.now_s)

    @property
    def plan(self) -> Plan:
        current = self.peers[0].machine.current
        assert current is not None
        return current.plan

    def see(self, machine: GroupMachine, *, alive: bool = True) -> Any:
        return picture(machine, frozenset() if alive else frozenset(LIVENESS))

    def in_step(self) -> bool:
        """All four hold the same history, at some instant soon."""
        return self.world.run_until(lambda: len({p.history for p in self.peers}) == 1, 5.0)

    def attack(self, target: Peer, event: Event) -> RemoteProtocolError | list[Any]:
        """What the machine makes of it: its refusal, or its effects."""
        try:
            return target.machine.handle(event, self.world.now_s)
        except RemoteProtocolError as error:
            return error


Attack = Callable[[Scene], tuple[Peer, PeerId, Event]]
"""Who is attacked, who is to blame, and what they get."""


def says(message: Any, by: Signer | Peer) -> Received:
    return Received(by.peer_id if isinstance(by, Signer) else by.id, message)


def issue(by: Signer, plan: Plan, domain: str = PLAN_DOMAIN) -> Received:
    return says(PlanIssued(sign(by, domain, plan)), by)


def record_of(signer: Signer, **changes: Any) -> PeerRecord:
    plain = PeerRecord(
        signer.peer_id, RUN, HERE, "a", (), 10_000, True, 0, 1000, 10**6, 10**6 + 60_000
    )
    return dataclasses.replace(plain, **changes)


def hello(record: bytes, **changes: Any) -> Hello:
    plain = Hello(limits.PROTOCOL_VERSION, RUN, record, 5, b"", True, True, 0)
    return dataclasses.replace(plain, **changes)


def usurp(plan: Plan, usurper: PeerId, **changes: Any) -> Plan:
    """The next epoch of a plan, with everything in one peer's hands."""
    seat = Seat(usurper, 10_000)
    roster = tuple(sorted({*plan.roster, seat}, key=lambda s: s.peer))
    if usurper in plan.peers:
        roster = plan.roster
    epoch = plan.epoch + 1
    coup = dataclasses.replace(
        plan, epoch=epoch, roster=roster, spans=(Span(0, UNITS, usurper, epoch),)
    )
    return dataclasses.replace(coup, **changes)


def member_plan(**changes: Any) -> Callable[[Scene], tuple[Peer, PeerId, Event]]:
    """A well-made successor of the plan in force, signed by a member, with `changes`."""

    def make(s: Scene) -> tuple[Peer, PeerId, Event]:
        fresh = dataclasses.replace(s.plan, epoch=s.plan.epoch + 1, **changes)
        return s.victim, s.member.id, issue(s.member.signer, fresh)

    return make


def contribution(**changes: Any) -> Attack:
    def make(s: Scene) -> tuple[Peer, PeerId, Event]:
        plan = s.plan
        target = s.aggregator
        span = plan.spans[0]
        header = ContributionHeader(
            RUN, HERE, plan.round, plan.epoch, 0, span.start, span.stop, 1.0
        )
        sender = s.stranger.peer_id if changes.get("by") == "stranger" else s.member.id
        fields = {k: v(plan) if callable(v) else v for k, v in changes.items() if k != "by"}
        event = ContributionOffered(sender, dataclasses.replace(header, **fields))
        return target, sender, event

    return make


def pushed(**changes: Any) -> Attack:
    def make(s: Scene) -> tuple[Peer, PeerId, Event]:
        plan = s.plan
        by = {"stranger": s.stranger, "member": s.member.signer}.get(
            changes.get("by", ""), s.aggregator.signer
        )
        span = plan.spans[0]
        header = OutcomeHeader(
            RUN, HERE, plan.round, plan.epoch, 0, span.start, span.stop, (), bytes(32), 1, 0.1
        )
        fields = {
            k: v(plan) if callable(v) else v
            for k, v in changes.items()
            if k not in ("by", "push_epoch")
        }
        header = dataclasses.replace(header, **fields)
        epoch = changes["push_epoch"](plan) if "push_epoch" in changes else plan.epoch
        push = OutcomePush(epoch, sign(by, OUTCOME_DOMAIN, header))
        return s.victim, by.peer_id, OutcomeOffered(by.peer_id, push, header)

    return make


def stranger_says(message: Callable[[Scene], Any]) -> Attack:
    return lambda s: (s.victim, s.stranger.peer_id, says(message(s), s.stranger))


def member_says(message: Callable[[Scene], Any]) -> Attack:
    return lambda s: (s.victim, s.member.id, says(message(s), s.member))


NOTHING_SIGNED = Signed(b"", PeerId("x" * 50), bytes(SIGNATURE_BYTES))

REFUSED: dict[str, Attack] = {
    # First words.
    "hello of another run": stranger_says(
        lambda s: hello(sign_record(s.stranger, record_of(s.stranger)), run=FOREIGN_RUN)
    ),
    "hello of another version": stranger_says(
        lambda s: hello(sign_record(s.stranger, record_of(s.stranger)), version=2)
    ),
    "hello with garbage for a record": stranger_says(lambda _: hello(b"\xff" * 99)),
    "hello with no record": stranger_says(lambda _: hello(b"")),
    "hello with a member's record": stranger_says(
        lambda s: hello(sign_record(s.member.signer, record_of(s.member.signer)))
    ),
    "hello with a record signed by oneself about a member": stranger_says(
        lambda s: hello(sign_record(s.stranger, record_of(s.member.signer)))
    ),
    "hello with a record for another run": stranger_says(
        lambda s: hello(sign_record(s.stranger, record_of(s.stranger, run=FOREIGN_RUN)))
    ),
    # Words of another run.
    "heartbeat of another run": stranger_says(
        lambda _: Heartbeat(FOREIGN_RUN, HERE, 99, 99, b"", True, 0)
    ),
    "a member's heartbeat of another run": member_says(
        lambda _: Heartbeat(FOREIGN_RUN, HERE, 99, 99, b"", True, 0)
    ),
    "refusal of another run": stranger_says(lambda _: PlanRefused(FOREIGN_RUN, HERE, 1, 99, "")),
    "hand-over of another run": stranger_says(
        lambda s: SpanHeld(FOREIGN_RUN, HERE, s.plan.round, 0, NOTHING_SIGNED)
    ),
    "a hand-over without a proof": member_says(
        lambda s: SpanHeld(RUN, HERE, s.plan.round, 0, NOTHING_SIGNED)
    ),
    "a hand-over of a span that isn't": member_says(
        lambda s: SpanHeld(RUN, HERE, s.plan.round, 16, NOTHING_SIGNED)
    ),
    # Plans.
    "a stranger's coup": lambda s: (
        s.victim, s.stranger.peer_id, issue(s.stranger, usurp(s.plan, s.stranger.peer_id))
    ),
    "a stranger's plan for the others": lambda s: (
        s.victim, s.stranger.peer_id,
        issue(s.stranger, dataclasses.replace(s.plan, epoch=s.plan.epoch + 1)),
    ),
    "another group's member plans ours": lambda s: (
        s.victim, s.others[0].id, issue(s.others[0].signer, usurp(s.plan, s.others[0].id))
    ),
    "another group's plan": lambda s: (
        s.victim, s.others[0].id,
        issue(s.others[0].signer, usurp(s.plan, s.others[0].id, group=THERE)),
    ),
    "a member's plan for another group": member_plan(group=THERE),
    "a plan of another run": member_plan(run=FOREIGN_RUN),
    "a plan without its coordinator": lambda s: (
        s.victim, s.member.id,
        issue(s.member.signer, revise_plan(
            s.plan, epoch=s.plan.epoch + 1, benched=(), train_ms=0, exchange_ms=1,
            seats=[x for x in s.plan.roster if x.peer != s.member.id],
        )),
    ),
    "a member appoints itself": lambda s: (
        s.victim, s.member.id,
        issue(s.member.signer, usurp(s.plan, s.member.id, round=s.plan.round + 1)),
    ),
    "a plan with a hole": member_plan(spans=(Span(1, UNITS, world_signer(0).peer_id, 0),)),
    "a plan for nobody": member_plan(roster=()),
    "a plan with strange aggregators": member_plan(
        spans=(Span(0, UNITS, world_signer(66).peer_id, 0),)
    ),
    "a plan passed on": lambda s: (
        s.victim, s.member.id,
        says(PlanIssued(sign(s.aggregator.signer, PLAN_DOMAIN, s.plan)), s.member),
    ),
    "a plan signed as something else": lambda s: (
        s.victim, s.member.id, issue(s.member.signer, s.plan, OUTCOME_DOMAIN)
    ),
    "a plan with a forged signature": lambda s: (
        s.victim, s.member.id,
        says(
            PlanIssued(dataclasses.replace(
                sign(s.stranger, PLAN_DOMAIN, s.plan), signer=s.member.id
            )),
            s.member,
        ),
    ),
    "a signed lump": lambda s: (
        s.victim, s.member.id,
        says(PlanIssued(sign(s.member.signer, PLAN_DOMAIN, Goodbye(RUN, ""))), s.member),
    ),
    # Streams.
    "a stranger's contribution": contribution(by="stranger"),
    "a contribution to another group": contribution(group=THERE),
    "a contribution to the last round": contribution(round=lambda p: p.round - 1),
    "a contribution to the next round": contribution(round=lambda p: p.round + 1),
    "a contribution of an old epoch": contribution(epoch=0),
    "a contribution of an epoch to come": contribution(epoch=lambda p: p.epoch + 1),
    "a contribution to nowhere": contribution(span=16),
    "a contribution to another's span": contribution(span=1),
    "a contribution with other bounds": contribution(stop=lambda p: p.spans[0].stop + 1),
    "a stranger's outcome": pushed(by="stranger"),
    "a member's outcome for another's span": pushed(by="member"),
    "an outcome for another group": pushed(group=THERE),
    "an outcome of the last round": pushed(round=lambda p: p.round - 1),
    "an outcome of the next round": pushed(round=lambda p: p.round + 1),
    "an outcome of an old epoch": pushed(push_epoch=lambda _: 0),
    "an outcome of an epoch to come": pushed(push_epoch=lambda p: p.epoch + 1),
    "an outcome for another's span": pushed(span=1),
    "an outcome for nowhere": pushed(span=16),
    "an outcome with other bounds": pushed(stop=lambda p: p.spans[0].stop + 1),
}  # fmt: skip


@pytest.fixture(scope="module", params=["training", "exchanging"])
def scene(request: pytest.FixtureRequest) -> Scene:
    return Scene(1, exchanging=request.param == "exchanging")


@pytest.mark.parametrize("name", REFUSED)
def test_it_is_refused_by_name_and_changes_nothing(scene: Scene, name: str) -> None:
    target, liar, event = REFUSED[name](scene)
    alive = liar == scene.stranger.peer_id or not isinstance(
        event, ContributionOffered | OutcomeOffered
    )
    before = scene.see(target.machine, alive=alive)
    answer = scene.attack(target, event)
    assert isinstance(answer, RemoteProtocolError), f"it was taken: {answer}"
    assert answer.peer == liar
    assert scene.see(target.machine, alive=alive) == before


def replay(epochs_back: int, rounds_back: int) -> Attack:
    """A plan that was once in force, word for word."""

    def make(s: Scene) -> tuple[Peer, PeerId, Event]:
        epoch = s.plan.epoch - epochs_back
        spans = tuple(dataclasses.replace(x, since_epoch=epoch) for x in s.plan.spans)
        old = dataclasses.replace(
            s.plan, epoch=epoch, round=s.plan.round - rounds_back, spans=spans
        )
        return s.victim, s.aggregator.id, issue(s.aggregator.signer, old)

    return make


OVERRULED: dict[str, Attack] = {
    "the last round's plan again": replay(0, 1),
    "the last round's plan, of an epoch gone by": replay(1, 1),
    "this round's plan, of an epoch gone by": replay(1, 0),
    "the plan in force, rearranged": lambda s: (
        s.victim, s.member.id,
        issue(s.member.signer, dataclasses.replace(s.plan, train_ms=s.plan.train_ms + 1)),
    ),
    "the plan in force for fewer": lambda s: (
        s.victim, s.aggregator.id,
        issue(s.aggregator.signer, revise_plan(
            s.plan, epoch=s.plan.epoch, benched=(), train_ms=0, exchange_ms=1,
            seats=[x for x in s.plan.roster if x.peer != s.victim.id],
        )),
    ),
    "from another state": lambda s: (
        s.victim, s.member.id,
        issue(s.member.signer, dataclasses.replace(
            s.plan, epoch=s.plan.epoch + 1, digest=Digest(b"x" * 32)
        )),
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", OVERRULED)
def test_a_plan_that_is_overruled_is_answered_and_not_followed(scene: Scene, name: str) -> None:
    target, sender, event = OVERRULED[name](scene)
    before = scene.see(target.machine, alive=False)
    answer = scene.attack(target, event)
    assert isinstance(answer, list), str(answer)
    refusals = [e for e in answer if isinstance(e, Send) and isinstance(e.message, PlanRefused)]
    assert [e.peer for e in refusals] == [sender]
    assert not any(isinstance(e, PlanAdopted | SignPlan) for e in answer)
    assert scene.see(target.machine, alive=False) == before


IGNORED: dict[str, Attack] = {
    "a stranger says goodbye": stranger_says(lambda _: Goodbye(RUN, "bye")),
    "a record of another run": lambda s: (
        s.victim, s.stranger.peer_id, RecordSeen(record_of(s.stranger, run=FOREIGN_RUN))
    ),
    "one's own record from elsewhere": lambda s: (
        s.victim, s.victim.id, RecordSeen(record_of(s.victim.signer, group=THERE))
    ),
    "a hand-over for another round": member_says(
        lambda s: SpanHeld(RUN, HERE, s.plan.round + 1, 0, NOTHING_SIGNED)
    ),
    "a refusal in another group": stranger_says(lambda _: PlanRefused(RUN, THERE, 1, 99, "")),
}  # fmt: skip


@pytest.mark.parametrize("name", IGNORED)
def test_it_is_ignored(scene: Scene, name: str) -> None:
    target, _, event = IGNORED[name](scene)
    before = scene.see(target.machine, alive=False)
    answer = scene.attack(target, event)
    assert isinstance(answer, list), str(answer)
    assert scene.see(target.machine, alive=False) == before


def test_a_group_under_all_of_this_goes_on_averaging() -> None:
    for seed in range(2):
        scene = Scene(seed, exchanging=seed % 2 == 1)
        before = scene.victim.machine.round
        for name, attack in {**REFUSED, **OVERRULED, **IGNORED}.items():
            target, _, event = attack(scene)
            answer = scene.attack(target, event)
            assert name in REFUSED or isinstance(answer, list), f"{name}: {answer}"
        scene.world.run(scene.world.now_s + 20.0)
        assert all(p.machine.round >= before + 3 for p in scene.peers), f"seed {seed}"
        assert scene.in_step(), f"seed {seed}"
        assert all(len(inside) == 4 for _, _, inside in scene.peers[0].history[-2].inside), seed


def test_anything_well_formed_gets_an_answer_or_a_refusal_never_a_crash() -> None:
    """Random valid messages with our run and group in them, from strangers and members."""
    first = random.SystemRandom().randrange(2**31)
    for seed in [*range(4), *range(first, first + 2)]:
        rng = random.Random(seed)
        scene = Scene(seed, exchanging=rng.random() < 0.5)
        for _ in range(300):
            message = sample(rng.choice(MESSAGES), rng)
            changes = {"run": RUN, "group": HERE, "round": scene.plan.round}
            names = {f.name for f in dataclasses.fields(message)}
            message = dataclasses.replace(
                message, **{k: v for k, v in changes.items() if k in names and rng.random() < 0.9}
            )
            target = rng.choice(scene.peers)
            by = rng.choice([scene.stranger.peer_id, scene.member.id, scene.others[0].id])
            answer = scene.attack(target, Received(by, message))
            if isinstance(answer, RemoteProtocolError):
                assert answer.peer == by, f"seed {seed}"
            target.machine.handle(Tick(), scene.world.now_s)
            assert target.machine.deadline_s > scene.world.now_s, f"seed {seed}"


def test_strangers_cannot_make_a_machine_grow_without_end() -> None:
    scene = Scene(2)
    machine, now_s = scene.victim.machine, scene.world.now_s
    for index in range(limits.KNOWN_PEERS_MAX + 100):
        name = PeerId(f"s{index}")
        machine.members.saw(dataclasses.replace(record_of(scene.stranger), peer=name), now_s)
        machine.members.heard(name, now_s - 5.0)
    for index in range(20):
        newcomer = dataclasses.replace(record_of(scene.stranger), peer=PeerId(f"t{index}"))
        machine.handle(RecordSeen(newcomer), now_s)
    assert len(machine.members.everybody()) == limits.KNOWN_PEERS_MAX
    assert isinstance(machine.current, Round)
    assert set(machine.live_members(now_s)) == {p.id for p in scene.peers}
