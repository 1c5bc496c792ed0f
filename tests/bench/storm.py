"""The storm: the network in virtual time, broken in every way, thousands of times.

The product's own driver, exchange and machine; machines, lines and training are simulated
(`peer/simulate`). Throughput (work that got into a state) and participation (who was inside, of
those who lived) are both told.
"""

from __future__ import annotations

import math
from typing import Final

from peer.simulate.report import figures
from tests.bench import storm_scenarios as scenes
from tests.bench.result import Bar, BenchError, Cell, Progress, Result
from tests.bench.storm_many import SIZES, Tally, many

SCENARIOS: Final = 10_000
SCENARIOS_QUICK: Final = 40


def run(quick: bool, seed: int, progress: Progress, scenarios: int | None = None) -> Result:
    """`scenarios`: how many random ones; they take most of the time, and can be broken off."""
    count = scenarios or (SCENARIOS_QUICK if quick else SCENARIOS)
    rows: list[dict[str, Cell]] = []
    bars: list[Bar] = []
    for part in (_storm, _stragglers, _loss, _utilisation):
        some, held = part(quick, seed, progress)
        rows += some
        bars += held
    progress(f"{count} random scenarios ...")
    total = many(seed, count, progress)
    if not total.scenarios:
        raise BenchError("no scenario was lived through; give at least one")
    broken = total.broken
    rows.append(
        {
            "what": f"{total.scenarios} random scenarios of 2-64 peers",
            "value": len(broken),
            "unit": "broken",
            "details": ", ".join(f"seed {s}" for s in broken[:10]) or "none",
        }
    )
    rows += _sizes(total)
    bars.insert(0, Bar.at_most("scenarios with a broken promise", len(broken), 0, "of all run"))
    bars.insert(1, Bar.at_least("random scenarios", total.scenarios, SCENARIOS, "run"))
    notes = [
        (
            "A random scenario lasts 2.5 to 4 simulated minutes, the last 90 s of which are calm."
            " Nine of ten have 2 to 12 peers, the others 2 to 64 (both log-uniform)."
        ),
        (
            f"The storm's model has {scenes.PARAMETERS:,} parameters: over a connection that loses"
            " 5 % of its packets a state of more than some megabytes does not arrive within 54 s"
            " (about 100 KB/s by PFTK at 40 ms)."
        ),
        (
            "Throughput is tokens in a group's state, against the same hour without faults; time in"
            " which killed peers are down counts against it."
        ),
        (
            "Utilisation = seconds of training / seconds alive, summed over peers; training stands"
            " still to freeze a contribution and to apply a round (8 and 24 bytes per parameter at"
            " 1 TB/s), never for the network. Rounds of 30 inner steps would need 1.5 Gbit/s: q4 is"
            " 3.1 GB, once out and once back. So the pace lengthens them until the exchange takes"
            " half of their time (`schedule.exchange_share`)."
        ),
    ]
    return Result(rows, bars, notes)


Part = tuple[list[dict[str, Cell]], list[Bar]]


def _storm(quick: bool, seed: int, progress: Progress) -> Part:
    minutes = 12.0 if quick else 62.5  # the first minute and the calm at the end are no storm
    progress(f"32 peers for {minutes:g} minutes without faults ...")
    calm, _ = scenes.observe(scenes.village(seed, minutes))
    progress("the same with 125 faults an hour ...")
    record, witness = scenes.observe(scenes.storm(seed, minutes))
    before, total = figures(calm), figures(record)
    ids = scenes.peer_ids(record)
    held_up = scenes.held_up_s(record, witness, before.exchange_s)
    rejoined = scenes.rejoined_s(record, witness, ids)
    killed = {ids[who] for _, who, _ in witness.kills}
    spared = len(witness.aggregators - killed)
    ratio = total.throughput / before.throughput
    rows: list[dict[str, Cell]] = [
        _row("storm: throughput", ratio, "x fault-free",
             f"{total.throughput:.1%} against {before.throughput:.1%} of all possible tokens"),
        _row("storm: participation", total.participation, "",
             f"{before.participation:.3f} without faults"),
        _row("storm: survivors held up", max(held_up, default=0.0), "s, longest",
             f"{len(witness.kills)} kills"),
        _row("storm: rejoin", max(rejoined, default=0.0), "s, longest",
             f"median {sorted(rejoined)[len(rejoined) // 2]:.1f} s"),
        _row("storm: all stand still", total.stood_still_s, "s, longest", ""),
        _row("storm: aggregators never killed", spared, "",
             f"of {len(witness.aggregators)}; {total.faults} faults"),
        _row("storm: promises broken", total.violations, "",
             "; ".join(v.promise for v in record.violations[:5])),
    ]  # fmt: skip
    bars = [
        Bar.at_least("storm: throughput", ratio, 0.977, "the same hour without faults"),
        Bar.at_least("storm: participation", total.participation, 0.90, "live members"),
        Bar.at_most("storm: a survivor goes on, s", max(held_up, default=0.0), 5, "after a kill"),
        Bar.at_most(
            "storm: rejoin, s", max(rejoined, default=0.0), 54, "from the new start to a roster"
        ),
        Bar.at_most("storm: all stand still, s", total.stood_still_s, 0, "samples of 3 s"),
        Bar.at_most("storm: aggregators never killed", spared, 0, "all that served"),
        Bar.at_most("storm: promises broken", total.violations, 0, "the judge"),
    ]
    return rows, bars


def _stragglers(quick: bool, seed: int, progress: Progress) -> Part:
    minutes = 5.0 if quick else 20.0
    progress("stragglers ...")
    even, _ = scenes.observe(scenes.stragglers(seed, minutes, slow=False))
    uneven, _ = scenes.observe(scenes.stragglers(seed, minutes, slow=True))
    ratio = scenes.round_s(uneven) / scenes.round_s(even)
    inside = figures(uneven).participation
    rows = [
        _row("stragglers: round time", ratio, "x without",
             f"{scenes.round_s(uneven):.2f} s; {inside:.1%} of members inside"),
    ]  # fmt: skip
    bars = [
        Bar.at_most("stragglers: round time", ratio, 1.1, "the same peers, equally fast"),
        Bar.at_least("stragglers: inside", inside, 0.95, "their work counts"),
    ]
    return rows, bars


def _loss(quick: bool, seed: int, progress: Progress) -> Part:
    minutes = 5.0 if quick else 20.0
    progress("10 % packet loss ...")
    clear, _ = scenes.observe(scenes.lossy(seed, minutes, 0.0))
    lossy, _ = scenes.observe(scenes.lossy(seed, minutes, 0.1))
    ratio = scenes.round_s(lossy) / scenes.round_s(clear)
    exchange = figures(lossy).exchange_s, figures(clear).exchange_s
    details = f"due to applied {exchange[0]:.2f} s against {exchange[1]:.2f} s (median)"
    return (
        [_row("10 % loss: round time", ratio, "x of 0 %", details)],
        [Bar.at_most("10 % loss: round time", ratio, 1.3, "no loss")],
    )


def _utilisation(quick: bool, seed: int, progress: Progress) -> Part:
    progress("8 B parameters at 500 Mbit/s ...")
    record, _ = scenes.observe(scenes.eight_billion(seed, 30.0 if quick else 90.0))
    total = figures(record)
    steps = sum(t.trained_s for t in record.tallies) / max(1, total.peer_rounds)
    details = (
        f"{steps:.0f} inner steps a round, {scenes.round_s(record):.0f} s from round to round,"
        f" exchange {total.exchange_s:.0f} s"
    )
    value = total.utilisation if math.isfinite(total.utilisation) else None
    inside = total.participation
    return (
        [
            _row("8 B, 500 Mbit/s: utilisation", total.utilisation, "", details),
            _row("8 B, 500 Mbit/s: participation", inside, "", "training that counts"),
        ],
        [
            Bar.at_least("8 B, 500 Mbit/s: utilisation", value, 0.945, "time alive"),
            Bar.at_least("8 B, 500 Mbit/s: participation", inside, 0.90, "live members"),
        ],
    )


def _sizes(total: Tally) -> list[dict[str, Cell]]:
    """What was lived through, by size."""
    return [
        _row(
            f"  of {low}-{high} peers", scenarios, "scenarios",
            f"{faults:,} faults, {rounds:,} rounds of single peers",
        )
        for (low, high), (scenarios, faults, rounds) in zip(SIZES, total.sizes, strict=True)
        if scenarios
    ]  # fmt: skip


def _row(what: str, value: float, unit: str, details: str) -> dict[str, Cell]:
    return {"what": what, "value": value, "unit": unit, "details": details}
