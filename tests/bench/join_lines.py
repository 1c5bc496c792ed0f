"""A state of 100 MB over lines of 20 Mbit/s, from two donors, one of which dies.

Three hosts of the network laboratory: two donors and a newcomer, 80 ms apart, cubic, no loss. What
runs is what a peer runs: the transports with the bulk lane, the donors' snapshots, the receiver
with its copy on disk. No rounds go on meanwhile. The clock starts when the newcomer asks, connected
already, and stops when it holds all chunks, checked.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Final

from tests.bench.fleet import Fleet
from tests.bench.result import Bar, BenchError, Cell, Progress, Result
from tests.netlab import Lab, requirements
from tests.netlab.spec import Host, Line, Route, Spec

_MBPS: Final = 20.0
_WIDE_MBPS: Final = 100.0
_RTT_MS: Final = 80.0
_BYTES: Final = 100_000_000
_QUICK_BYTES: Final = 10_000_000
_TIMES_MAX: Final = 1.2
_ADDED_S_MAX: Final = 5.0


@dataclass(frozen=True, slots=True)
class _Setting:
    name: str
    donors: int
    down_mbps: float
    """The newcomer's line."""
    fate: str = ""
    """Of the first donor, when a quarter of the state came from it."""

    @property
    def mbps(self) -> float:
        """The most that the lines let through while all donors live."""
        return min(self.down_mbps, self.donors * _MBPS)


_PLAIN: Final = _Setting("two donors", 2, _MBPS)
_KILLED: Final = _Setting("two donors, one killed", 2, _MBPS, "killed")
_FROZEN: Final = _Setting("two donors, one frozen", 2, _MBPS, "frozen")
_ONE: Final = _Setting("one donor, newcomer at 100 Mbit/s", 1, _WIDE_MBPS)
_WIDE: Final = _Setting("two donors, newcomer at 100 Mbit/s", 2, _WIDE_MBPS)
_SETTINGS: Final = (_PLAIN, _KILLED, _FROZEN, _ONE, _WIDE)


def run(quick: bool, seed: int, progress: Progress) -> Result:
    """See `registry.Measurement`. Five minutes, most of them spent waiting for the lines."""
    lack = requirements.missing()
    if lack is not None:
        raise BenchError(lack)
    total = _QUICK_BYTES if quick else _BYTES
    told: dict[_Setting, dict[str, Any]] = {}
    for setting in _SETTINGS:
        told[setting] = _get(setting, total, seed)
        progress(f"{setting.name}: {told[setting]['seconds']:.1f} s")
    rows = [_row(setting, total, told[setting]) for setting in _SETTINGS]
    seconds = {setting: float(told[setting]["seconds"]) for setting in _SETTINGS}
    ideal = {setting: total * 8 / (setting.mbps * 1e6) for setting in _SETTINGS}
    bars = [
        Bar.at_most(
            "two donors: time, x size / the newcomer's line",
            seconds[_PLAIN] / ideal[_PLAIN], _TIMES_MAX, f"{ideal[_PLAIN]:.1f} s",
        ),
        Bar.at_most(
            "a killed donor: seconds more", seconds[_KILLED] - seconds[_PLAIN], _ADDED_S_MAX,
            "the same without, in the same run",
        ),
        Bar.at_most(
            "a frozen donor: seconds more", seconds[_FROZEN] - seconds[_PLAIN], _ADDED_S_MAX,
            "the same without, in the same run",
        ),
        Bar.at_most(
            "two donors, wide newcomer: time, x size / both donors' lines",
            seconds[_WIDE] / ideal[_WIDE], _TIMES_MAX, f"{ideal[_WIDE]:.1f} s",
        ),
    ]  # fmt: skip
    lines = (
        f"Seed {seed}; {total / 1e6:.0f} MB of float32 in two arrays, once each; each line "
        f"{_MBPS:g} Mbit/s of IP packets each way (TCP's payload is at most 0.965 of that), "
        f"{_RTT_MS:g} ms there and back."
    )
    fates = (
        "Whoever is killed or frozen (SIGKILL, SIGSTOP; its network daemon too) has sent a quarter "
        "of the state by then. The other's line alone fills the newcomer's."
    )
    notes = [
        lines,
        fates,
        "`received`: everything that came to the newcomer, so also what came twice.",
        "Donors exchange no rounds here; where they do, rounds come first on their lines.",
    ]
    return Result(rows=rows, bars=bars, notes=notes)


def _get(setting: _Setting, total: int, seed: int) -> dict[str, Any]:
    spec = Spec(
        hosts=(
            Host("new", "b", Line(up_mbps=_MBPS, down_mbps=setting.down_mbps)),
            *(Host(f"d{i}", "a", Line(up_mbps=_MBPS, down_mbps=_MBPS))
              for i in range(setting.donors)),
        ),
        routes=(Route(a="a", b="a", rtt_ms=4.0), Route(a="a", b="b", rtt_ms=_RTT_MS)),
    )  # fmt: skip
    with (
        Lab(spec, seed=seed, mover_nice=-10) as lab,
        Fleet(
            "join-lines", "tests.bench.join_lines_worker", 1 + setting.donors,
            places=[host.command([]) for host in lab.hosts],
        ) as fleet,
    ):  # fmt: skip
        fleet.start(seed=seed, total=total)
        met = fleet.ask("meet", 30.0)[1:]
        replies = fleet.ask(
            "get", 60.0 + 20 * total * 8 / (_MBPS * 1e6),
            donors=[reply["peer"] for reply in met],
            addresses=[reply["addresses"] for reply in met],
            fate=setting.fate, after=total // 4,
        )  # fmt: skip
    facts = replies[0]
    if facts["digest"] != met[0]["digest"]:
        raise BenchError(f"{setting.name}: the state that came is not the one that was sent")
    facts["shares"] = [facts["given"].get(reply["peer"], 0) / total for reply in met]
    return facts


def _row(setting: _Setting, total: int, facts: dict[str, Any]) -> dict[str, Cell]:
    return {
        "from": setting.name,
        "s": facts["seconds"],
        "x size / lines": facts["seconds"] * setting.mbps * 1e6 / (total * 8),
        "share of each donor": " ".join(f"{share:.2f}" for share in facts["shares"]),
        "received / size": facts["received"] / total,
    }
