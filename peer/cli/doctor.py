"""`peer doctor`: what this machine and its line can do, and what to change."""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import typer

from peer.addresses import check_addresses
from peer.cli.ending import say
from peer.cli.join import check_announced
from peer.cli.options import Format
from peer.cli.running import run_loop


@dataclass(kw_only=True)
class DoctorOptions:
    """As for `join`: what the peer would be started with."""

    via: Annotated[
        list[str],
        typer.Option("--via", metavar="ADDR", help="Address of a peer or bootstrap node to ask."),
    ] = field(default_factory=list)
    run: Annotated[
        str | None,
        typer.Option(
            "--run", metavar="ID", help="Run that is to fit.", show_default="the last or only one"
        ),
    ] = None
    host: Annotated[str, typer.Option(metavar="ADDR", help="Address to listen on.")] = "0.0.0.0"
    port: Annotated[
        int,
        typer.Option(metavar="PORT", min=0, max=65535, help="Port to listen on; 0: as last time."),
    ] = 0
    lane_port: Annotated[
        int, typer.Option(metavar="PORT", min=0, max=65535, help="Port of the bulk lane, likewise.")
    ] = 0
    announce: Annotated[
        list[str],
        typer.Option("--announce", metavar="ADDR", help="Address that others are to be told."),
    ] = field(default_factory=list)
    upload: Annotated[
        str | None,
        typer.Option(metavar="RATE", help="Upload budget to reckon with.", show_default="none"),
    ] = None
    device: Annotated[
        str | None,
        typer.Option(metavar="NAME", help="cpu, cuda, ...", show_default="a GPU if there is one"),
    ] = None
    threads: Annotated[
        int | None, typer.Option(metavar="N", min=1, max=4096, help="CPU cores for training.")
    ] = None
    home: Annotated[
        Path | None,
        typer.Option(
            metavar="DIR", help="Where identities live.",
            show_default="$MURMURATION_HOME or ~/.local/share/murmuration",
        ),
    ] = None  # fmt: skip
    seat: Annotated[
        str | None, typer.Option(metavar="NAME", help="Which peer.", show_default="the first")
    ] = None
    quick: Annotated[
        bool, typer.Option("--quick", help="Leave out loss and bandwidth: ten seconds, few bytes.")
    ] = False
    output: Annotated[Format, typer.Option("--format", help="For people, or for a script.")] = (
        Format.text
    )


def doctor(options: DoctorOptions) -> int:
    """Examine, explain, and return the exit code of the worst.

    Raises:
        UsageError: an option makes no sense.
        StorageError: the folder can't be read.
    """
    check_addresses(options.via)
    check_announced(options.announce)
    as_json = options.output is Format.json

    def told(text: str) -> None:
        if not as_json:
            say(text)

    told("examining: loading the libraries takes a few seconds ...")
    from peer.doctor import report
    from peer.doctor.conclude import conclude
    from peer.doctor.examine import Question, examine
    from peer.doctor.explain import exit_code, explain
    from peer.net.budget import parse_rate

    question = Question(
        home=options.home,
        seat=options.seat,
        via=tuple(options.via),
        run=options.run,
        host=options.host,
        port=options.port,
        lane_port=options.lane_port,
        announce=tuple(options.announce),
        upload_bps=parse_rate(options.upload) if options.upload is not None else None,
        device=options.device,
        threads=options.threads,
        quick=options.quick,
    )
    facts: Any = None

    async def main() -> int:
        nonlocal facts
        facts = await examine(question, told)
        return 0

    run_loop(main)
    found = conclude(facts)
    findings = explain(facts, found)
    if as_json:
        sys.stdout.write(json.dumps(report.as_json(facts, found, findings), indent=1) + "\n")
    else:
        sys.stdout.write("\n".join(report.lines(findings)) + "\n")
    return exit_code(findings)
