"""`peer simulate`: a network that is not there yet, in virtual time."""

from __future__ import annotations

import json
import re
import secrets
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Final

from peer.cli.ending import say
from peer.errors import UsageError
from peer.home import complain

if TYPE_CHECKING:
    from peer.simulate.scenario import Scenario
    from peer.simulate.world import Progress

BROKEN: Final = 1  # exit code: a promise was broken
PEERS_MAX: Final = 20_000
_FACTORS: Final = {"": 1.0, "k": 1e3, "m": 1e6, "b": 1e9, "t": 1e12}


def parse_count(text: str) -> float:
    """A number of parameters: `8b`, `350m`, `138000`.

    Raises:
        UsageError: it is none.
    """
    match = re.fullmatch(r"(\d+(?:\.\d+)?(?:e\d+)?)\s*([kmbt]?)", text.strip().lower())
    if match is None:
        raise UsageError(f"{text!r} is no number of parameters; write it like 8b, 350m or 138000")
    return float(match[1]) * _FACTORS[match[2]]


def simulate(
    *,
    seed: int | None,
    peers: int | None,
    minutes: float | None,
    faults_per_hour: float | None,
    sites: int | None,
    parameters: str | None,
    rate: str | None,
    loss_percent: float | None,
    round_s: float | None,
    svg: Path | None,
    as_json: bool,
) -> int:
    """Draw or plan a scenario, live through it, tell what came of it.

    Raises:
        UsageError: an option makes no sense.
        StorageError: the picture can't be written.
    """
    from peer.simulate.report import to_json, to_text
    from peer.simulate.timeline import draw_timeline
    from peer.simulate.world import simulate as live_through

    if peers is not None and not 2 <= peers <= PEERS_MAX:
        raise UsageError(f"--peers must be 2 to {PEERS_MAX} (got {peers})")
    chosen = secrets.randbits(32) if seed is None else seed
    arguments = ["--seed", str(chosen)]
    for name, value in (
        ("--peers", peers), ("--minutes", minutes), ("--faults-per-hour", faults_per_hour),
        ("--sites", sites), ("--parameters", parameters), ("--rate", rate),
        ("--loss", loss_percent), ("--round", round_s),
    ):  # fmt: skip
        if value is not None:
            arguments += [name, f"{value:g}" if isinstance(value, float) else str(value)]
    scenario = _scenario(
        chosen, peers, minutes, faults_per_hour, sites, parameters, rate, loss_percent, round_s
    )
    record = live_through(scenario, _progress())
    record.arguments = arguments
    if svg is not None:
        try:
            svg.write_text(draw_timeline(record), "utf-8")
        except OSError as error:
            complain(error, svg, "write")
        say(f"drew {svg}")
    sys.stdout.write(json.dumps(to_json(record), indent=2) if as_json else to_text(record))
    sys.stdout.write("\n")
    return BROKEN if record.violations else 0


def _scenario(
    seed: int, peers: int | None, minutes: float | None, faults_per_hour: float | None,
    sites: int | None, parameters: str | None, rate: str | None, loss_percent: float | None,
    round_s: float | None,
) -> Scenario:  # fmt: skip
    from peer.net.budget import parse_rate
    from peer.simulate.planning import plan
    from peer.simulate.scenario import draw

    duration_s = None if minutes is None else 60 * minutes
    if duration_s is not None and duration_s < 30:
        raise UsageError(f"--minutes must be at least 0.5 (got {minutes:g})")
    if all(value is None for value in (sites, parameters, rate, loss_percent, round_s)):
        return draw(seed, peers=peers, duration_s=duration_s, faults_per_hour=faults_per_hour)
    if loss_percent is not None and not 0 <= loss_percent <= 50:
        raise UsageError(f"--loss must be 0 to 50 (got {loss_percent:g})")
    return plan(
        seed,
        peers=peers or 16,
        minutes=minutes or 15.0,
        sites=sites or 0,
        rate_bps=1e8 if rate is None else parse_rate(rate),
        parameters=1e7 if parameters is None else parse_count(parameters),
        loss=(loss_percent or 0.0) / 100,
        faults_per_hour=faults_per_hour or 0.0,
        round_s=round_s or 30.0,
    )


def _progress() -> Progress | None:
    """A line on the terminal that says how far it is; nothing where nobody looks."""
    if not sys.stderr.isatty():
        return None
    begun_s = time.monotonic()
    told_s = 0.0

    def progress(done_s: float, total_s: float) -> None:
        nonlocal told_s
        now_s = time.monotonic()
        if now_s - told_s > 0.2:
            told_s = now_s
            pace = done_s / max(1e-9, now_s - begun_s)
            sys.stderr.write(
                f"\r{done_s / total_s:4.0%}  {done_s / 60:.1f} of {total_s / 60:.1f} min,"
                f" {pace:.0f} times as fast as life "
            )
            sys.stderr.flush()
        if done_s >= total_s * 0.999:
            sys.stderr.write("\r\x1b[K")

    return progress
