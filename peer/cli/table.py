"""A peer's status as a person reads it. Strangers' words are cleaned, and never taken as markup."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any, Final

from rich.console import Console
from rich.table import Table
from rich.text import Text

from peer.observe import words

OTHERS_SHOWN: Final = 32
_PHASES: Final = {
    "starting": "starting: looking for the network, or loading",
    "silent": "not answering",
    "looking": "looking for other peers",
    "syncing": "getting the run's state",
    "training": "training",
    "exchanging": "averaging with the group",
}


def show(report: Mapping[str, Any]) -> None:
    """Print one peer's status on stdout."""
    console = Console(highlight=False)
    console.print(Text(_title(report), "bold"), soft_wrap=True)
    for name, text in _facts(report):
        line = Text.assemble((f"  {name:<11}", "dim"), words.clean(text))
        console.print(line, soft_wrap=True)  # never folded: commands are there to be copied
    if report.get("group_members"):
        console.print(_members(report))
    for notice in report.get("notices", [])[-3:]:
        if notice["level"] != "info":
            console.print(Text(f"  {notice['level']}: {words.clean(notice['text'])}", "yellow"))


def _title(report: Mapping[str, Any]) -> str:
    parts = [words.clean(report["name"])]
    if report.get("run_name"):
        parts.append(words.clean(report["run_name"]))
    if report.get("parameters"):
        parts.append(f"{words.count(report['parameters'])} parameters on {report.get('device')}")
    return " · ".join(parts)


def _facts(report: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    phase = str(report.get("phase"))
    now = _PHASES.get(phase, phase)
    if report.get("role") == "bootstrap":
        yield from _node(report)
        return
    if "group" not in report:
        yield "now", now
        return
    yield "peer", report["peer"]
    yield "run", report["run"]
    yield "now", f"{now}, round {report['round']}, epoch {report['epoch']}"
    yield "loss", _loss(report)
    if facts := report.get("method"):
        lost = f"the rank of the last mean cut off {facts['tail']:.3g}"
        yield "trains", f"{facts['does']} ({facts['why']}); {lost}"
    members = words.plural(len(report["group_members"]), "member")
    yield "group", f"{words.group(report['group'] or 'none yet')}, {members}"
    if report.get("blocks") is not None:
        yield "blocks", words.account(report["blocks"])
    if (together := report.get("scores", {}).get("overall")) is not None:
        told = f"{len(together['peers'])} of {words.plural(together['members'], 'peer')}"
        yield "answers", f"{words.scores(together['sums'])} (round {together['round']}, {told})"
    for peer, told_by in report.get("scores", {}).get("peers", {}).items():
        yield "", f"{words.short(peer)}  {words.scores(told_by['sums'])}"
    yield "network", _network(report)
    yield "dht", words.plural(report["dht_nodes"], "node")
    if report.get("checkpoint_round") is not None:
        full = f"round {report['checkpoint_round']}, {report['checkpoint_age_s']:.0f} s ago"
        yield "saved", f"after every round; the last full checkpoint: {full}"
    for address, how in report.get("via", {}).items():
        yield "via", f"{words.address(address)} {how}"
    if report.get("join_command"):
        yield "join with", report["join_command"]


def _node(report: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    yield "peer", report["peer"]
    yield "now", "a bootstrap node: holds records and relays, trains nothing"
    connected = words.plural(report["peers_connected"], "peer")
    yield "network", f"{connected} connected, {words.plural(report['dht_nodes'], 'DHT node')}"
    for run in report.get("runs", []):
        yield "run", f"{run['run'][:12]} {run['name']} ({words.plural(run['peers'], 'peer')})"
    for address in report.get("addresses", [])[:1]:
        yield "address", address


def _loss(report: Mapping[str, Any]) -> str:
    loss, validation = report.get("loss"), report.get("validation_loss")
    parts = [f"{loss:.3f}" if loss is not None and math.isfinite(loss) else "no step yet"]
    if validation is not None:
        parts.append(f"validation {validation:.3f}")
    parts.append(f"{report['tokens_per_s']:,.0f} tokens/s")
    return "  ".join(parts)


def _network(report: Mapping[str, Any]) -> str:
    up, down = (
        f"{way} {words.size(report[f'bytes_{way}'])} ({words.size(report[f'bytes_{way}_per_s'])}/s)"
        for way in ("up", "down")
    )
    return f"{up}  {down}  training waited {report['waited_share']:.1%}"


def _members(report: Mapping[str, Any]) -> Table:
    """This peer's group first, then whom else it knows of."""
    others = {other["peer"]: other for other in report["network"]}
    group = report["group_members"]
    rest = [peer for peer in others if peer not in group]
    table = Table(box=None, padding=(0, 2, 0, 0), pad_edge=False)
    for name in ("  member", "group", "role", "round", "heard", "round trip"):
        table.add_column(name, header_style="dim", no_wrap=True)
    for peer in [*group, *rest][:OTHERS_SHOWN]:
        table.add_row(*map(Text, _row(peer, others.get(peer, {}), report)))
    hidden = len(group) + len(rest) - OTHERS_SHOWN
    if hidden > 0:
        table.add_row(Text(f"  and {hidden} more"))
    return table


def _row(peer: str, facts: Mapping[str, Any], report: Mapping[str, Any]) -> list[str]:
    me = peer == report["peer"]
    roles = [
        word
        for word, holds in (
            ("this peer", me),
            ("coordinator", peer == report["coordinator"]),
            ("aggregator", peer in report["aggregators"]),
            ("silent", facts.get("suspected", False)),
            ("syncing", not facts.get("ready", True)),
        )
        if holds
    ]
    heard, rtt = facts.get("heard_s_ago"), facts.get("rtt_ms")
    return [
        f"  {words.short(peer)}",
        words.group(facts.get("group") or (report["group"] if me else "") or "-"),
        ", ".join(roles),
        str(report["round"] if me else facts.get("round", "-")),
        f"{heard:.0f} s ago" if heard is not None else "-",
        f"{rtt:.1f} ms" if rtt is not None else "-",
    ]
