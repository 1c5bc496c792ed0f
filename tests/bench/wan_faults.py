"""Averaging among 8 peers on two continents while one of them is killed, frozen, or very slow.

100 Mbit/s between the regions. One of the peers, in the middle of a round (it has sent a quarter of
what it sends in one): is killed with its daemon (SIGKILL), or stands still with it (SIGSTOP); or
its line has 5 Mbit/s each way from one round to the next. The reference's peers are killed and
slowed in the same way. Ours keep their work as `wan_worker` describes.
"""

from __future__ import annotations

import signal
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from statistics import mean, median
from typing import Any, Final

from tests.bench import wan_rounds as rounds
from tests.bench.averaging import Round
from tests.bench.fleet import Took
from tests.bench.processes import wait_until
from tests.bench.result import Bar, BenchError, Cell, Progress, Result
from tests.bench.wan_rounds import OURS, REFERENCE, SYSTEMS, Played

_MBPS: Final = 100.0
_SLOW_MBPS: Final = 5.0
_VICTIM: Final = 5  # in the second region; the first peer is where others enter the network
_EXCHANGE_S: Final = 20.0  # a manifest's default: the deadline of a round's exchange
_STEP_S: Final = 120.0
_MIDDLE: Final = 0.25  # of what the victim sends in a round: half of its contributions
_PART_OFF_MAX: Final = 0.25  # what q4 takes from a work or adds to it; one that is lost is off by 1
_SLOWER_MAX: Final = 1.1
_BEHIND_MAX: Final = 8.0  # its line carries a seventh of a contribution in the time of a round
_WORKER: Final = "tests.bench.wan_worker"

_CLEAN: Final = f"{_MBPS:g} Mbit/s"
_KILLED: Final = f"{_MBPS:g} Mbit/s, one of {rounds.PEERS} killed"
_FROZEN: Final = f"{_MBPS:g} Mbit/s, one of {rounds.PEERS} frozen"
_SLOW: Final = f"{_MBPS:g} Mbit/s, one of {rounds.PEERS} at {_SLOW_MBPS:g}"
_HOW: Final = {_KILLED: signal.SIGKILL, _FROZEN: signal.SIGSTOP}


@dataclass(frozen=True, slots=True)
class _Scale:
    numel: int
    clean: int
    """Rounds before anything happens, after those that warm up."""
    after: int
    """Rounds after a peer has failed."""
    slow: dict[str, int]
    settings: tuple[str, ...]


_WARM_UP: Final = 2
_FULL: Final = _Scale(
    5_000_000, 5, 3, {REFERENCE: 3, OURS: 12}, (_KILLED, _FROZEN, _SLOW)
)  # fmt: skip
_QUICK: Final = _Scale(500_000, 2, 1, {REFERENCE: 1, OURS: 3}, (_KILLED, _SLOW))
_NOT_FOR_THE_REFERENCE: Final = (_FROZEN,)  # it has no deadline for that but the step's own


@dataclass(slots=True)
class _Done:
    """One round."""

    played: Played
    hurt: int | None = None
    """Who failed in it, or is slow."""
    errors: list[float] = field(default_factory=list)
    """Of each peer that is left."""
    digests: list[str] = field(default_factory=list)
    share: list[list[float]] = field(default_factory=list)
    """As each peer that is left sees it: of each peer's work of this round, what is inside."""
    whole: list[list[int]] = field(default_factory=list)
    """Likewise: the latest work that is inside with all before it."""

    @property
    def number(self) -> int:
        return self.played.round.round

    @property
    def seconds(self) -> float:
        """Until the last of those had answered to whom nothing has happened."""
        took = self.played.round.average
        assert took is not None
        each_s = (s for index, s in took.each_s.items() if index != self.hurt)
        return self.played.round.gather.seconds + max(each_s)

    @property
    def right(self) -> int:
        """How many peers that are left hold what they should."""
        name = self.played.system
        error_max = _PART_OFF_MAX if name == OURS else SYSTEMS[name].error_max
        return sum(error <= error_max for error in self.errors)

    @property
    def agreed(self) -> float:
        """The share of those that are left with what most of them have, to the last bit."""
        return max(map(self.digests.count, self.digests)) / len(self.digests)

    def inside(self, number: int, peers: Sequence[int]) -> float:
        """The share of these peers whose work up to that number is all inside, whoever looks."""
        return min(mean(whole[peer] >= number for peer in peers) for whole in self.whole)


def run(quick: bool, seed: int, progress: Progress) -> Result:
    """See `registry.Measurement`. Some eight minutes, most of them the reference's."""
    scale = _QUICK if quick else _FULL
    done: list[_Done] = []
    for setting in scale.settings:
        for name in SYSTEMS:
            if not (name == REFERENCE and setting in _NOT_FOR_THE_REFERENCE):
                done += _Course(name, setting, scale, seed, progress).run()
    return Result(
        rows=_rows(done),
        bars=[bar for setting in scale.settings for bar in _bars(setting, done)],
        notes=[rounds.lines(scale.numel, seed), rounds.COLUMNS, *_notes(done)],
    )


class _Course:
    """A fresh fleet of one system: some rounds as they should be, then what happens to one."""

    def __init__(
        self, name: str, setting: str, scale: _Scale, seed: int, progress: Progress
    ) -> None:
        self._name, self._setting, self._scale, self._seed = name, setting, scale, seed
        self._progress = progress
        self._froze: dict[int, dict[str, int]] = {}
        """Worker -> round of the group -> the latest work in its contribution."""

    def run(self) -> list[_Done]:
        system, scale = SYSTEMS[self._name], self._scale
        start: dict[str, Any] = {**system.start, "numel": scale.numel, "seed": self._seed}
        ours = self._name == OURS
        if ours:
            start["exchange_s"] = _EXCHANGE_S
        with (
            rounds.laboratory(_MBPS, self._seed) as lab,
            rounds.crew(
                lab, self._name, _WORKER if ours else system.module, self._progress, **start
            ) as fleet,
        ):
            self._lab, self._fleet = lab, fleet
            fault = _WARM_UP + scale.clean
            done = [self._round(number, _CLEAN) for number in range(fault)][_WARM_UP:]
            if self._setting == _SLOW:
                slow = dict.fromkeys(("up_mbps", "down_mbps"), _SLOW_MBPS)
                lab.set(lab.hosts[_VICTIM].name, **slow)
                for number in range(fault, fault + scale.slow[self._name]):
                    done.append(self._round(number, self._setting, slow=True))
            else:
                usual_mb = mean(one.played.sent_mb for one in done)
                done.append(self._round(fault, self._setting, usual_mb=usual_mb))
                for number in range(fault + 1, fault + 1 + scale.after * ours):
                    done.append(self._round(number, f"{self._setting}, afterwards"))
        return done

    def _round(
        self, number: int, setting: str, *, usual_mb: float | None = None, slow: bool = False
    ) -> _Done:
        """One round; `usual_mb`: the victim fails when it has sent `_MIDDLE` of that."""
        fleet, lab = self._fleet, self._lab
        fleet.ask("prepare", _STEP_S, number=number)
        before = lab.counters()
        gather = fleet.timed("gather", _STEP_S, number=number)
        if any(reply.get("failure") for reply in gather.replies):
            raise BenchError(f"{self._name} found no group of all: try again")
        meanwhile = (lambda: None) if usual_mb is None else self._fail(usual_mb)
        took = fleet.timed("average", _STEP_S, number=number, meanwhile=meanwhile)
        failure = "; ".join(
            f"peer {index}: {reply['failure']}"
            for index, reply in zip(fleet.present, took.replies, strict=True)
            if reply.get("failure")
        )
        round_ = Round(number, gather, took, [], failure)
        played = rounds.facts(setting, self._name, round_, before, lab.counters())
        done = _Done(played, _VICTIM if usual_mb is not None or slow else None)
        if self._name == OURS:
            self._check_ours(done, took)
        else:
            self._check_theirs(done)
        self._progress(
            f"{setting}, {self._name}, round {number}: {done.seconds:.2f} s; {done.right} of "
            f"{len(done.errors)} right"
        )
        return done

    def _fail(self, usual_mb: float) -> Callable[[], None]:
        """What makes the victim fail in the middle of the round that begins now."""
        host = self._lab.hosts[_VICTIM].name
        enough = self._lab.counters()[host].sent().bytes + _MIDDLE * usual_mb * 1e6

        def fail() -> None:
            def there() -> bool:
                return self._lab.counters()[host].sent().bytes >= enough

            if not wait_until(there, _STEP_S):
                raise BenchError(f"{host} did not get to the middle of its round")
            self._fleet.hurt(_VICTIM, _HOW[self._setting])

        return fail

    def _check_ours(self, done: _Done, took: Took) -> None:
        for index, reply in zip(self._fleet.present, took.replies, strict=True):
            self._froze[index] = reply["froze"]
        told = {n: number for frozen in self._froze.values() for n, number in frozen.items()}
        # Who is gone has not said what it contributed; if it did, it was what everybody did.
        froze = {
            index: self._froze[index]
            if index in self._fleet.present
            else {**told, **self._froze.get(index, {})}
            for index in range(rounds.PEERS)
        }
        for check in self._fleet.ask("check", _STEP_S, number=done.number, froze=froze):
            done.errors.append(check["error"])
            done.digests.append(check["digest"])
            done.share.append(check["share"])
            done.whole.append(check["whole"])

    def _check_theirs(self, done: _Done) -> None:
        whose = [None, *([] if _VICTIM in self._fleet.present else [_VICTIM])]
        asked = [
            self._fleet.ask("verify", _STEP_S, number=done.number, without=one) for one in whose
        ]
        for checks in zip(*asked, strict=True):
            done.errors.append(min(check["error"] for check in checks))
            done.digests.append(checks[0]["digest"])


def _settings(done: Sequence[_Done]) -> list[str]:
    return list(dict.fromkeys(one.played.setting for one in done))


def _of(done: Sequence[_Done], setting: str, name: str) -> list[_Done]:
    return [one for one in done if (one.played.setting, one.played.system) == (setting, name)]


def _rows(done: Sequence[_Done]) -> list[dict[str, Cell]]:
    return [
        _row(ones)
        for setting in _settings(done)
        for name in SYSTEMS
        if (ones := _of(done, setting, name))
    ]


def _row(ones: Sequence[_Done]) -> dict[str, Cell]:
    """The columns are those of `wan_rounds.row`; here right counts peers, not rounds."""
    cpu_s = [one.played.round.cpu_s for one in ones]
    whole = sum(len(one.errors) for one in ones)
    return rounds.row([one.played for one in ones]) | {
        "s, all": median(one.seconds for one in ones),
        "s": median(one.seconds - one.played.round.gather.seconds for one in ones),
        "slowest": max(one.seconds for one in ones),
        # Who is killed takes its count along.
        "CPU-s": median(cpu_s) if min(cpu_s) > 0 else None,
        "right": f"{sum(one.right for one in ones)} of {whole} peers",
        "error": max(error for one in ones for error in one.errors),
    }


def _bars(setting: str, done: Sequence[_Done]) -> list[Bar]:
    ours, theirs = (_of(done, setting, name) for name in (OURS, REFERENCE))
    against = "every work that outcomes say is inside, and those before, found in the means"
    if theirs:
        wrong = sum(len(one.errors) - one.right for one in theirs)
        against += (
            f"; {REFERENCE}: {median(one.seconds for one in theirs):.3g} s, "
            f"{wrong} of {sum(len(one.errors) for one in theirs)} peers wrong"
        )
    return [
        Bar.at_least(
            f"{setting}: peers left that hold the mean of what is inside",
            min(one.right / len(one.errors) for one in ours), 1.0, against,
        ),
        Bar.at_least(
            f"{setting}: peers left that agree to the last bit",
            min(one.agreed for one in ours), 1.0, "digests of their states",
        ),
        *(_slow_bars(ours, done) if setting == _SLOW else _failed_bars(setting, ours[0], done)),
    ]  # fmt: skip


def _failed_bars(setting: str, one: _Done, done: Sequence[_Done]) -> list[Bar]:
    left = [peer for peer in range(rounds.PEERS) if peer != _VICTIM]
    after = _of(done, f"{setting}, afterwards", OURS)
    now = min(share[peer] for share in one.share for peer in left)
    return [
        Bar.at_most(
            f"{setting}: seconds of the round / until its deadline",
            one.seconds / _EXCHANGE_S, 1.0, f"{_EXCHANGE_S:g} s for the exchange",
        ),
        Bar.at_least(
            f"{setting}: survivors whose work of the round is all inside a round later",
            after[0].inside(one.number, left), 1.0,
            f"in the round itself {now:.0%} of the work of the one with least of it",
        ),
    ]  # fmt: skip


def _slow_bars(slow: Sequence[_Done], done: Sequence[_Done]) -> list[Bar]:
    numbers = [one.number for one in slow]
    before = [one for one in _of(done, _CLEAN, OURS) if one.number in range(numbers[0])]
    others = [peer for peer in range(rounds.PEERS) if peer != _VICTIM]
    last = slow[-1]
    behind = last.number - min(whole[_VICTIM] for whole in last.whole)
    return [
        Bar.at_most(
            f"{_SLOW}: our time for the others / without it",
            median(one.seconds for one in slow) / median(one.seconds for one in before),
            _SLOWER_MAX, "same run",
        ),
        Bar.at_least(
            f"{_SLOW}: others whose work is all inside at once",
            mean(one.inside(one.number, others) for one in slow), 1.0, "mean over rounds",
        ),
        Bar.at_most(
            f"{_SLOW}: rounds that its work waits before all of it is inside",
            behind, _BEHIND_MAX, f"at the last of {len(slow)} rounds",
        ),
    ]  # fmt: skip


def _notes(done: Sequence[_Done]) -> list[str]:
    inside = (
        "Ours with a fault: right is who holds the mean of what the outcomes say is inside, of all "
        "peers that were left, over the rounds; what the killed one had sent may be inside. error: "
        "how far any work's part in a mean is from 1 (inside) or 0 (inside before)."
    )
    clock = (
        "s of a round with a slow peer: until the last of the others had the result. The next one "
        "began when the slow one had it too."
    )
    notes = [inside, clock]
    slow = _of(done, _SLOW, OURS)
    if slow:
        shares = [min(share[_VICTIM] for share in one.share) for one in slow]
        notes.append(
            f"Of the slow peer's work of a round {mean(shares):.0%} was inside the same round, on "
            "average; the rest came with its next contributions."
        )
    return notes + rounds.troubles([one.played for one in done])
