"""From `join` to the first contribution; a peer's memory; training that waits for the network.

The embedded default run between real processes over libp2p on loopback, one compute thread each.

- Join: from the start of the process until work of weight > 0 goes out that is then inside a
  round. Fresh: into a checkout that was never run (no bytecode of ours) and a home that does not
  exist, installation aside; first of all, so that nobody has warmed anything but the peer that is
  joined. Warm: the usual checkout, a new home each time.
- Memory: of a peer and its network daemon, against a process that builds the same model with
  transformers, the same optimiser with torch, and takes one step.
- Waiting: what the peer itself says, and, independently, how long its training thread was asleep.
"""

from __future__ import annotations

import json
import shutil
import signal
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Any, Final

from tests.bench import machine, peers
from tests.bench.machine import ROOT
from tests.bench.peers import Crew, Memory, Peer
from tests.bench.result import Bar, BenchError, Cell, Progress, Result

_WARM_S_MAX: Final = 15.0
_FRESH_S_MAX: Final = 60.0
_WAITED_MAX: Final = 0.05

_START_S: Final = 60.0
_JOIN_S: Final = 120.0
_PACKAGES: Final = ("peer", "dht", "protocols", "bootstrap", "codecs")

_BARE: Final = """
import dataclasses
import json
import os
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from peer.manifest import default_manifest  # imports no more than NumPy
from tests.bench import peers

manifest = default_manifest()
torch.set_num_threads(1)
model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**manifest.model.config))
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, fused=True)
ids = torch.randint(256, (manifest.inner.batch_size, manifest.data.sequence_length))
logits = model(input_ids=ids[:, :-1], use_cache=False).logits
torch.nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten()).backward()
optimizer.step()
print(json.dumps(dataclasses.asdict(peers.memory(os.getpid()))))
"""


@dataclass(frozen=True, slots=True)
class _Scale:
    warm: int
    """Joins into a network of one."""
    crowd: int
    """Peers in the larger network that is joined, 0 for none, and ..."""
    crowd_joins: int
    rounds: int
    """Over which waiting is measured."""


_FULL: Final = _Scale(warm=5, crowd=3, crowd_joins=3, rounds=12)
_QUICK: Final = _Scale(warm=1, crowd=0, crowd_joins=0, rounds=2)


@dataclass(frozen=True, slots=True)
class _Join:
    """Seconds from the start of the process until ..."""

    started: float
    """... libraries, network, run and model are there;"""
    received: float
    """... the state is there;"""
    contributed: float
    """... work went out that a round holds;"""
    applied: float
    """... that round was applied."""
    queued: float
    """Of these seconds, how many its main thread was kept waiting for a core."""


def run(quick: bool, seed: int, progress: Progress) -> Result:
    """See `registry.Measurement`. Five minutes; quick: one. There is nothing to seed."""
    scale = _QUICK if quick else _FULL
    load_before = machine.load_average()
    with Crew() as crew:
        progress("starting the peer that is joined")
        first = crew.join("first")
        crew.until(lambda: first.rounds, _START_S)
        _, fresh = _join(crew, "fresh", first, root=_fresh_checkout(crew.folder / "checkout"))
        progress(f"fresh join: {_story(fresh)}")
        second = first
        warm = []
        for number in range(scale.warm):
            last = number == scale.warm - 1
            second, join = _join(crew, f"warm-{number}", first, leave=not last)
            warm.append(join)
            progress(f"warm join: {_story(join)}")
        waiting = _waiting(crew, [first, second], scale.rounds, progress)
        table = _memory(crew, first)
        crowd: list[_Join] = []
        if scale.crowd:
            others = [first, second, *(crew.join(f"p{n}", first) for n in range(2, scale.crowd))]
            crew.until(lambda: all(_members(peer) == scale.crowd for peer in others), _JOIN_S)
            for number in range(scale.crowd_joins):
                _, join = _join(crew, f"late-{number}", first)
                crowd.append(join)
                progress(f"warm join into {scale.crowd}: {_story(join)}")
    rows = [
        *_join_rows("warm join into 1", warm),
        *_join_rows("fresh join into 1", [fresh]),
        *_join_rows(f"warm join into {scale.crowd}", crowd),
        *_memory_rows(table),
        *_waiting_rows(waiting),
    ]
    load = f"{load_before}, {machine.load_average()}"
    return Result(rows, _bars(warm, fresh, waiting), _notes(load))


# ── joining ──────────────────────────────────────────────────────────────────────────────


def _join(
    crew: Crew, name: str, via: Peer, *, root: Path = ROOT, leave: bool = True
) -> tuple[Peer, _Join]:
    """Join and contribute; then leave politely, until the others go on without it."""
    before = _members(via)
    peer = crew.join(name, via, root=root)
    crew.until(lambda: _counted(peer) is not None, _JOIN_S)
    queued_s = peers.moment(peer.pid).threads[peer.pid][1]
    sent, finished = _counted(peer) or (None, None)
    took = _Join(
        peer.seconds_to(peer.last("Started")),
        peer.seconds_to(peer.last("StateReceived")),
        peer.seconds_to(sent),
        peer.seconds_to(finished),
        queued_s,
    )
    if leave:
        peer.signal(signal.SIGINT)
        crew.until(lambda: peer.code == 0 and _members(via) == before, _JOIN_S)
    return peer, took


def _counted(peer: Peer) -> tuple[dict[str, Any], dict[str, Any]] | None:
    """The first contribution with work in it that a round holds, and that round."""
    sent = {fact["round"]: fact for fact in peer.all("ContributionSent") if fact["weight"] > 0}
    for fact in peer.rounds:
        if fact["included"] > 0 and fact["round"] in sent:
            return sent[fact["round"]], fact
    return None


def _members(peer: Peer) -> int:
    """How many were in its last round."""
    last = peer.last("RoundFinished")
    return len(last["roster"]) if last is not None else 0


def _fresh_checkout(folder: Path) -> Path:
    """A copy of our packages that nobody has run."""
    for package in _PACKAGES:
        shutil.copytree(
            ROOT / package, folder / package, ignore=shutil.ignore_patterns("__pycache__")
        )
    return folder


def _story(join: _Join) -> str:
    return (
        f"{join.started:.1f} s until it was up, {join.received:.1f} s until it had the state, "
        f"{join.contributed:.1f} s until its work went out, {join.applied:.1f} s until it counted; "
        f"{join.queued:.1f} s queued for a core"
    )


# ── memory ───────────────────────────────────────────────────────────────────────────────


def _memory(crew: Crew, peer: Peer) -> dict[str, Memory]:
    """The peer's processes, and a bare one beside them: proportional shares compare only so."""
    bare = Memory(**json.loads(crew.run(_BARE, _START_S)))
    daemons = [peers.memory(pid) for pid in peer.children()]
    if len(daemons) != 1:
        raise BenchError(f"expected one network daemon under a peer, found {len(daemons)}")
    python = peers.memory(peer.pid)
    beyond = {
        name: asdict(python)[name] + asdict(daemons[0])[name] - value
        for name, value in asdict(bare).items()
    }
    return {
        "peer, Python process": python,
        "peer, p2pd": daemons[0],
        "bare: torch, transformers, model, AdamW": bare,
        "peer beyond bare": Memory(**beyond),
    }


# ── waiting ──────────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True, slots=True)
class _Waiting:
    """One peer over some rounds."""

    said: float
    """`Progress.waited_share`: share of the time that training stood still, by its own account."""
    asleep: float
    """Share of the time that its training thread neither ran nor queued for a core."""
    rounds: int
    whole: int
    """Of these rounds, how many held both peers' work."""
    steps: int
    exchange_s: float
    """Median seconds from contributions due to outcome applied."""


def _waiting(
    crew: Crew, pair: Sequence[Peer], rounds: int, progress: Progress
) -> Mapping[str, _Waiting]:
    crew.until(lambda: all(_members(peer) == len(pair) for peer in pair), _JOIN_S)
    progress(f"two peers average {rounds} rounds")
    begun = {peer.name: len(peer.rounds) for peer in pair}
    sent = {peer.name: len(peer.all("ContributionSent")) for peer in pair}
    before = {peer.name: peers.moment(peer.pid) for peer in pair}
    crew.until(
        lambda: all(len(peer.rounds) >= begun[peer.name] + rounds for peer in pair),
        _JOIN_S + rounds * 10,
    )
    found = {}
    for peer in pair:
        asleep = peers.asleep_share(before[peer.name], peers.moment(peer.pid))
        facts = peer.rounds[begun[peer.name] :]
        progress_now = peer.last("Progress")
        if progress_now is None:
            raise BenchError(f"{peer.name} never told of its progress")
        found[peer.name] = _Waiting(
            said=progress_now["waited_share"],
            asleep=asleep,
            rounds=len(facts),
            whole=sum(_whole(fact, len(pair)) for fact in facts),
            steps=sum(fact["steps"] for fact in peer.all("ContributionSent")[sent[peer.name] :]),
            exchange_s=median(fact["seconds"] for fact in facts),
        )
    return found


def _whole(fact: Mapping[str, Any], members: int) -> bool:
    return all(
        len(span["contributors"]) == members and span["coverage"] == 1.0 for span in fact["spans"]
    )


# ── the page ─────────────────────────────────────────────────────────────────────────────


def _row(what: str, unit: str, values: Sequence[float]) -> dict[str, Cell]:
    return {
        "what": what,
        "unit": unit,
        "median": float(median(values)),
        "least": float(min(values)),
        "most": float(max(values)),
        "n": len(values),
    }


def _join_rows(label: str, joins: Sequence[_Join]) -> list[dict[str, Cell]]:
    if not joins:
        return []
    stages = {
        "libraries, network, run, model": [join.started for join in joins],
        "state received": [join.received for join in joins],
        "first contribution": [join.contributed for join in joins],
        "its round applied": [join.applied for join in joins],
        "of this queued for a core": [join.queued for join in joins],
    }
    return [_row(f"{label}: {stage}", "s", values) for stage, values in stages.items()]


def _memory_rows(table: Mapping[str, Memory]) -> list[dict[str, Cell]]:
    return [
        _row(f"{who}: {what}", "MiB", [value])
        for who, memory in table.items()
        for what, value in (
            ("resident", memory.resident),
            ("proportional", memory.proportional),
            ("peak resident", memory.peak),
        )
    ]


def _waiting_rows(waiting: Mapping[str, _Waiting]) -> list[dict[str, Cell]]:
    both = list(waiting.values())
    return [
        _row("waited, as the peer says", "%", [100 * one.said for one in both]),
        _row("training thread asleep", "%", [100 * one.asleep for one in both]),
        _row("inner steps in a round", "", [one.steps / one.rounds for one in both]),
        _row("due until applied", "s", [one.exchange_s for one in both]),
    ]


def _bars(warm: Sequence[_Join], fresh: _Join, waiting: Mapping[str, _Waiting]) -> list[Bar]:
    both = list(waiting.values())
    return [
        Bar.at_most(
            "join: seconds to the first contribution, warm",
            median(join.contributed for join in warm),
            _WARM_S_MAX,
            f"a stopwatch, median of {len(warm)}; the worst took "
            f"{max(join.contributed for join in warm):.1f} s",
        ),
        Bar.at_most(
            "join: seconds to the first contribution, fresh",
            fresh.contributed,
            _FRESH_S_MAX,
            "a stopwatch, once, installation aside",
        ),
        Bar.at_most(
            "join: share of time that training waited, as the peer says",
            max(one.said for one in both),
            _WAITED_MAX,
            "the worse of two peers, over its whole life",
        ),
        Bar.at_most(
            "join: share of time that the training thread was asleep",
            max(one.asleep for one in both),
            _WAITED_MAX,
            f"the kernel's account, the worse of two peers, {both[0].rounds} rounds",
        ),
        Bar.at_least(
            "join: rounds meanwhile that held both peers' whole work",
            sum(one.whole for one in both) / sum(one.rounds for one in both),
            1.0,
            "what is averaged with nobody needs no waiting",
        ),
    ]


def _notes(load: str) -> list[str]:
    setting = (
        "Every peer runs `python -m peer join --host 127.0.0.1 --threads 1 --log-json` with a home "
        "of its own. They share this machine's cores with each other and with whatever else runs; "
        f"load average before and after: {load}."
    )
    clock = (
        "Times are the events' own, minus the moment before the process was started; up to one "
        "round of 5 s of them is training. Queued: for so long of that time the main thread was "
        "ready to run and got no core; on an idle machine the joins would be shorter by about this."
    )
    fresh = (
        "Fresh: a copy of the packages without any bytecode of ours; the libraries' bytecode is "
        "there (pip compiles it), and files may be in the system's cache."
    )
    sizes = (
        "Memory: of the first peer, after the joins and rounds above. Proportional: a page shared "
        "with others counts in part; all were measured side by side with two peers running."
    )
    asleep = (
        "Asleep is an upper bound of waiting for the network: it also counts the interpreter's "
        "lock and page faults. It is measured from outside, on the thread that ran most."
    )
    return [setting, clock, fresh, sizes, asleep]
