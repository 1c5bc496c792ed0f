"""`python -m tests.netlab`: look at a laboratory, or check it.

    verify [PART ...]   measure every setting; a table; exit code 1 if one is not as it should be
    up KIND [...]       build one (regions or zoo) and keep it until Ctrl-C
    sweep               remove what a killed owner left (every laboratory does so when it starts)

Exit codes: 0 fine, 1 a row does not hold, 2 a wrong word, 3 this machine cannot.
"""

from __future__ import annotations

import argparse
import signal
import sys
from collections.abc import Sequence

from rich.console import Console
from rich.table import Table

from tests.netlab import Lab, LabError, Spec, missing, namespaces, nat_zoo, two_regions, verify


def main(argv: Sequence[str] | None = None) -> int:
    """Run what the command line asks for; see the module's docstring for the exit codes."""
    options = _parser().parse_args(argv)
    lack = missing()
    if lack is not None:
        print(lack, file=sys.stderr)
        return 3
    try:
        if options.verb == "verify":
            return _verify(options.part or list(verify.PARTS))
        if options.verb == "sweep":
            print("\n".join(namespaces.sweep()) or "Nothing was left.")
            return 0
        return _up(_spec(options))
    except LabError as error:
        print(error, file=sys.stderr)
        return 3


def _verify(parts: list[str]) -> int:
    table = Table("setting", "from", "measured", "to", "unit", "", box=None, pad_edge=False)
    progress = Console(stderr=True)
    fine = True
    for part in parts:
        progress.print(f"{part} ...", highlight=False)
        for row in verify.PARTS[part]():
            fine &= row.holds
            numbers = (f"{x:.4g}" for x in (row.low, row.measured, row.high))
            table.add_row(row.what, *numbers, row.unit, "" if row.holds else "DOES NOT HOLD")
    Console(width=110, highlight=False).print(table)
    return 0 if fine else 1


def _up(spec: Spec) -> int:
    with Lab(spec) as lab:
        for host in lab.hosts:
            where = f"{host.facts.region}, {host.facts.nat.value}"
            print(f"{host.name:8} {host.address:15} {host.public_address:12} {where}")
            print(f"         ip netns exec {host.namespace} bash")
        try:
            print("Ctrl-C removes it.", flush=True)
            signal.pause()
        except KeyboardInterrupt:
            print()
        now = lab.counters()
    for name, found in now.hosts.items():
        sent, came, lost = found.sent(), found.arrived(), found.dropped()
        print(f"{name:8} sent {sent.bytes} B, received {came.bytes} B, dropped {lost.bytes} B")
    return 0


def _spec(options: argparse.Namespace) -> Spec:
    if options.kind == "zoo":
        return nat_zoo()
    return two_regions(
        options.size, options.size,
        inside_ms=options.inside_ms, between_ms=options.between_ms, up_mbps=options.up_mbps,
        loss=options.loss, burst=options.burst, jitter_ms=options.jitter_ms,
    )  # fmt: skip


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m tests.netlab")
    verbs = parser.add_subparsers(dest="verb", required=True)
    check = verbs.add_parser("verify", help="measure every setting")
    check.add_argument("part", nargs="*", choices=[[], *verify.PARTS], metavar="PART")
    up = verbs.add_parser("up", help="build one and keep it until Ctrl-C")
    up.add_argument("kind", choices=["regions", "zoo"])
    up.add_argument("--size", type=int, default=4, help="hosts per region")
    for name, default in (
        ("inside-ms", 4.0), ("between-ms", 80.0), ("up-mbps", 100.0), ("loss", 0.0),
        ("burst", 0.0), ("jitter-ms", 0.0),
    ):  # fmt: skip
        up.add_argument(f"--{name}", type=float, default=default, help=f"default {default:g}")
    verbs.add_parser("sweep", help="remove what a killed owner left")
    return parser


if __name__ == "__main__":
    sys.exit(main())
