"""The commands and their help. Each imports what it needs when it is called, and no earlier."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Final

import typer
from typer.core import TyperGroup

from peer.cli.doctor import DoctorOptions
from peer.cli.ending import EXIT_CODES
from peer.cli.options import Format, Home, JoinOptions, Output, Prefix, SeatName, WhichSeat, takes
from peer.cli.run import Kind

_EXAMPLES: Final = (
    ("join", "train with whoever is there, or begin alone"),
    ("join --via ADDRESS", "ADDRESS: what another peer printed"),
    ("status", "what it is doing now"),
    ('sample "def main"', "what the model says so far"),
    ("doctor", "what is wrong with the network, and what to do"),
    ("leave", "politely; a join later goes on from there"),
    ("simulate", "a network that is not there yet"),
)


class _Teaching(TyperGroup):
    """Help that goes on with examples and exit codes; typer's own epilog folds lines together."""

    def format_help(self, ctx: Any, formatter: Any) -> None:
        super().format_help(ctx, formatter)
        lines = ["Examples", *(f"  {ctx.command_path} {do:<20}{why}" for do, why in _EXAMPLES)]
        lines += ["", "Exit codes", *(f"{code:>5}  {what}" for code, what in EXIT_CODES)]
        typer.echo("\n".join(f" {line}".rstrip() for line in lines))


app = typer.Typer(
    cls=_Teaching,
    add_completion=False,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    help="Train a language model together with others, over the internet, with nobody in charge.",
)
runs = typer.Typer(help="Write, check and start a run of your own.", rich_markup_mode="rich")

File = Annotated[Path, typer.Argument(metavar="FILE.toml", help="The run's manifest.")]


@app.command(
    rich_help_panel="Take part",
    epilog="python -m peer join --via /ip4/203.0.113.7/tcp/31337/p2p/12D3KooW...\n\n"
    "python -m peer join --site lab --upload 20mbit\n\n"
    "The first Ctrl-C leaves politely, the second at once.",
)
@takes(JoinOptions)
def join(options: JoinOptions) -> int:
    """Join a run and train; with nobody there, begin the default run."""
    from peer.cli.join import join

    return join(options)


@app.command(rich_help_panel="Take part")
def leave(
    home: Home = None,
    seat: WhichSeat = None,
    everyone: Annotated[bool, typer.Option("--all", help="All that run here.")] = False,
) -> int:
    """Ask the running peer to save, say goodbye and end."""
    from peer.cli.status import leave

    return leave(home, seat, everyone)


@app.command(rich_help_panel="Look")
def status(home: Home = None, seat: WhichSeat = None, output: Output = Format.text) -> int:
    """Show what the running peers do, and what they see of the network."""
    from peer.cli.status import status

    return status(home, seat, output is Format.json)


@app.command(
    rich_help_panel="Look",
    epilog="python -m peer doctor --via /ip4/203.0.113.7/tcp/31337/p2p/12D3KooW...\n\n"
    "It takes up to a minute and some 15 MB each way; --quick much less."
    " Exit code: 0, or that of the first error.",
)
@takes(DoctorOptions)
def doctor(options: DoctorOptions) -> int:
    """Measure and explain clock, ports, NAT, reachability and line, and say what to change."""
    from peer.cli.doctor import doctor

    return doctor(options)


@app.command(rich_help_panel="Look")
def ledger(home: Home = None, seat: WhichSeat = None, output: Output = Format.text) -> int:
    """Show what became of the run's blocks of data, and go over the sums; 1 if they are wrong."""
    from peer.cli.account import ledger

    return ledger(home, seat, output is Format.json)


@app.command(rich_help_panel="Look")
def identity(home: Home = None, seat: SeatName = None, output: Output = Format.text) -> int:
    """Show who this machine's peers are; make an identity if there is none."""
    from peer.cli.status import identity

    return identity(home, seat, output is Format.json)


@app.command(rich_help_panel="Use the model")
def sample(
    text: Annotated[str, typer.Argument(help="What the model goes on from.")],
    tokens: Annotated[int, typer.Option(min=1, max=65536, help="At most so many.")] = 200,
    temperature: Annotated[
        float, typer.Option(min=0, max=100, help="0: always the likeliest token.")
    ] = 0.8,
    seed: Annotated[int, typer.Option(min=0, help="Equal seeds say equal things.")] = 0,
    run: Prefix = None,
    home: Home = None,
    seat: WhichSeat = None,
) -> int:
    """Show what the model says so far."""
    from peer.cli.offline import sample

    return sample(text, home, seat, run, tokens=tokens, temperature=temperature, seed=seed)


@app.command(rich_help_panel="Use the model")
def export(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="New or empty.")],
    run: Prefix = None,
    home: Home = None,
    seat: WhichSeat = None,
) -> int:
    """Write the model for `transformers.AutoModelForCausalLM.from_pretrained(DIR)`."""
    from peer.cli.offline import export

    return export(folder, home, seat, run)


@app.command(
    rich_help_panel="Use the model",
    epilog="python -m peer evaluate questions.jsonl --held-out 0.02\n\n"
    "python -m peer evaluate tasks/ --model exported --tokens 64 --format json\n\n"
    "docs/finetuning-data.md says which files are read.",
)
def evaluate(
    data: Annotated[list[Path], typer.Argument(metavar="PATH...", help="Files or folders.")],
    model: Annotated[
        Path | None,
        typer.Option(
            metavar="DIR", help="An exported model.", show_default="the newest checkpoint here"
        ),
    ] = None,
    adapter: Annotated[
        Path | None,
        typer.Option(metavar="DIR", help="An adapter for it, from peft.", show_default=False),
    ] = None,
    rows: Annotated[
        int | None, typer.Option(min=1, help="At most so many of a file.", show_default="all")
    ] = None,
    held_out: Annotated[
        float | None,
        typer.Option(
            min=0, max=1, metavar="SHARE", help="Only rows that a run with this"
            " data.validation_share does not train on.", show_default="all",
        ),
    ] = None,
    tokens: Annotated[
        int,
        typer.Option(
            min=0, max=65536, help="Let it answer, in at most so many, and count exact matches."
        ),
    ] = 0,
    length: Annotated[
        int | None,
        typer.Option(
            min=8, help="Tokens in a sample.", show_default="1024, or what the model has room for"
        ),
    ] = None,
    run: Prefix = None,
    home: Home = None,
    seat: WhichSeat = None,
    output: Output = Format.text,
) -> int:  # fmt: skip
    """Score the model's answers on files of questions: perplexity, exact matches, choices."""
    from peer.cli.evaluate import What, evaluate

    what = What(
        data=tuple(data), model=model, adapter=adapter, rows=rows, held_out=held_out,
        tokens=tokens, length=length, home=home, seat=seat, run=run,
    )  # fmt: skip
    return evaluate(what, output is Format.json)


@runs.command()
def new(
    file: File,
    method: Annotated[
        Kind, typer.Option(help="All weights, adapters on frozen ones, or by each peer's means.")
    ] = (Kind.pretrain),
) -> int:
    """Write a commented manifest to edit."""
    from peer.cli.run import new

    return new(file, method)


@runs.command()
def check(file: File) -> int:
    """Say what a manifest would start, or which field is wrong."""
    from peer.cli.run import check

    return check(file)


@runs.command()
@takes(JoinOptions)
def start(file: File, options: JoinOptions) -> int:
    """Start the run and train; takes the same options as join."""
    from peer.cli.join import join

    return join(options, file)


@app.command(
    rich_help_panel="Plan",
    epilog="python -m peer simulate --seed 7 --svg storm.svg\n\n"
    "python -m peer simulate --peers 32 --faults-per-hour 125 --loss 5 --minutes 60\n\n"
    "python -m peer simulate --peers 16 --parameters 8b --rate 500mbit --round 30\n\n"
    "The peers run this program's own protocol code; machines, lines and training are simulated."
    " Equal options give equal histories. Exit code 1: a promise was broken; the replay command is"
    " shown.",
)
def simulate(
    seed: Annotated[
        int | None, typer.Option(min=0, help="Draws the scenario.", show_default="a fresh one")
    ] = None,
    peers: Annotated[
        int | None, typer.Option(help="How many.", show_default="2 to 64, drawn")
    ] = None,
    minutes: Annotated[
        float | None, typer.Option(help="Simulated time.", show_default="2.5 to 4, drawn")
    ] = None,
    faults_per_hour: Annotated[
        float | None,
        typer.Option(
            min=0, help="Crashes, outages, freezes, partitions ...", show_default="drawn"
        ),
    ] = None,
    sites: Annotated[
        int | None, typer.Option(min=1, help="Places.", show_default="drawn, or peers / 8")
    ] = None,
    parameters: Annotated[
        str | None,
        typer.Option(metavar="N", help="Of the model, e.g. 8b.", show_default="drawn, or 10m"),
    ] = None,
    rate: Annotated[
        str | None,
        typer.Option(
            metavar="RATE", help="Of every line, both ways.", show_default="drawn, or 100mbit"
        ),
    ] = None,
    loss: Annotated[
        float | None,
        typer.Option(metavar="PERCENT", help="Of packets.", show_default="drawn, or 0"),
    ] = None,
    round_s: Annotated[
        float | None,
        typer.Option(
            "--round", min=1, metavar="SECONDS", help="From one round to the next.",
            show_default="drawn, or 30",
        ),
    ] = None,
    svg: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Draw peers by time.", show_default=False)
    ] = None,
    output: Output = Format.text,
) -> int:  # fmt: skip
    """See what a network would do, before there is one: in virtual time."""
    from peer.cli.simulate import simulate

    return simulate(
        seed=seed, peers=peers, minutes=minutes, faults_per_hour=faults_per_hour, sites=sites,
        parameters=parameters, rate=rate, loss_percent=loss, round_s=round_s, svg=svg,
        as_json=output is Format.json,
    )  # fmt: skip


app.add_typer(runs, name="run", rich_help_panel="Take part")
