"""What a storm does, and when: faults of a Poisson process, drawn from one seed and nothing else.

A group always keeps `OUT_MAX` of its members at most from taking part, by the plan's reckoning:
what kills a whole group at once is another test. A fault that finds no room waits for it.
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Final

FAULT_EVERY_S: Final = 9.0
"""Mean time between two faults, those that are certain aside."""
OUT_S: Final = 6.0
"""Mean time until a fault is undone."""
OUT_S_MAX: Final = 20.0
RECOVERY_S: Final = 12.0
"""Importing the libraries and getting into step again, on a machine that eight of them share."""
OUT_MAX: Final = 2
"""Members of a group that are out, or on their way back, at the same time."""


class Deed(StrEnum):
    """What happens to a process."""

    kill = "kill"
    """SIGKILL, and started again from its disk."""
    wipe = "wipe"
    """SIGKILL, and a stranger with an empty disk comes in its place."""
    freeze = "freeze"
    """SIGSTOP for a while; its network daemon goes on taking messages."""
    halt = "halt"
    """The same with its daemon, as when a laptop sleeps."""
    leave = "leave"
    """SIGINT; it comes back later."""


WEIGHTS: Final = {Deed.kill: 5, Deed.wipe: 2, Deed.freeze: 2, Deed.halt: 1, Deed.leave: 2}


class Role(StrEnum):
    """Whoever has an office of a group at the moment of the fault."""

    coordinator = "coordinator"
    aggregator = "aggregator"


@dataclass(frozen=True, slots=True)
class Fault:
    at_s: float
    """Since the storm began."""
    deed: Deed
    target: str
    """A process's name; or a group's, of which `role` says who."""
    role: Role | None
    out_s: float
    """Until it is undone."""

    def __str__(self) -> str:
        whom = f"the {self.role} of {self.target}" if self.role else self.target
        return f"{self.at_s:6.1f} s: {self.deed} {whom} for {self.out_s:.1f} s"


def draw(
    seed: int, length_s: float, groups: Mapping[str, Sequence[str]], nodes: Sequence[str]
) -> list[Fault]:
    """The faults of a storm of `length_s`, in order of time: the same for the same arguments.

    Certain are: a kill of every bootstrap node, and of a coordinator and an aggregator of every
    group. All others hit a peer that the draw chooses, at times of a Poisson process.
    """
    rng = random.Random(seed)
    room = _Room(groups)
    faults = [Fault(rng.uniform(0, length_s), Deed.kill, node, None, _out_s(rng)) for node in nodes]
    certain = [(group, role) for group in groups for role in Role]
    times = sorted(rng.uniform(0, 0.7 * length_s) for _ in certain)
    rng.shuffle(certain)
    wishes: list[tuple[float, str, Role | None]] = [
        (at_s, group, role) for at_s, (group, role) in zip(times, certain, strict=True)
    ]
    at_s = rng.expovariate(1 / FAULT_EVERY_S)
    while at_s < length_s:
        wishes.append((at_s, rng.choice(list(groups)), None))
        at_s += rng.expovariate(1 / FAULT_EVERY_S)
    # The certain ones take their room first: they may not be crowded out of the storm.
    for at_s, group, role in sorted(wishes, key=lambda w: (w[2] is None, w[0])):
        out_s = _out_s(rng)
        deed = Deed.kill if role else rng.choices(list(WEIGHTS), list(WEIGHTS.values()))[0]
        begin_s, free = room.find(group, at_s, out_s + RECOVERY_S)
        target = rng.choice(free) if role is None else group
        room.hold(group, target, begin_s, begin_s + out_s + RECOVERY_S)
        if begin_s < length_s:
            faults.append(Fault(begin_s, deed, target, role, out_s))
    return sorted(faults, key=lambda fault: fault.at_s)


def _out_s(rng: random.Random) -> float:
    return min(OUT_S_MAX, 0.2 + rng.expovariate(1 / OUT_S))


class _Room:
    """Who is out when."""

    def __init__(self, groups: Mapping[str, Sequence[str]]) -> None:
        self._groups = groups
        self._out: dict[str, list[tuple[str, float, float]]] = {group: [] for group in groups}

    def find(self, group: str, at_s: float, for_s: float) -> tuple[float, list[str]]:
        """The first moment from `at_s` on at which one more may be out for `for_s`, and who."""
        spans = self._out[group]
        for begin_s in sorted({at_s, *(end_s for _, _, end_s in spans if end_s > at_s)}):
            clashing = [s for s in spans if s[1] < begin_s + for_s and begin_s < s[2]]
            # At the start of each stay, and at our own, no more may be out than allowed.
            moments = [begin_s, *(s[1] for s in clashing if s[1] > begin_s)]
            fullest = max(sum(s[1] <= m < s[2] for s in clashing) for m in moments)
            free = [n for n in self._groups[group] if n not in {s[0] for s in clashing}]
            if fullest < OUT_MAX and free:
                return begin_s, free
        raise AssertionError("after the last stay there is always room")

    def hold(self, group: str, target: str, begin_s: float, end_s: float) -> None:
        self._out[group].append((target, begin_s, end_s))
