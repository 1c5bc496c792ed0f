"""The operators' command line: `run`, and nothing else to learn."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Annotated

import typer

from peer.addresses import check_addresses
from peer.cli.join import check_announced
from peer.cli.options import Home
from peer.cli.running import Interrupts, json_lines, logs_in, run_loop
from peer.observe import events as ev
from peer.observe.hub import Hub
from peer.observe.words import Teller, clean
from peer.observe.writer import LineWriter

if TYPE_CHECKING:
    from bootstrap.node import Node, NodeConfig

STOPPING = "stopping; Ctrl-C again to stop at once"

app = typer.Typer(
    add_completion=False,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


@app.callback()
def bootstrap() -> None:
    """A bootstrap node of Murmuration: an address that stays, through which peers find each other.

    It holds DHT records and relays, and trains nothing. Exit codes: those of `python -m peer`.
    """


@app.command(
    epilog="python -m bootstrap run --announce /dns4/node.example.org/tcp/31337\n\n"
    "python -m bootstrap run --via /ip4/203.0.113.7/tcp/31337/p2p/12D3KooW..."
)
def run(
    home: Home = None,
    host: Annotated[str, typer.Option(metavar="ADDR", help="Address to listen on.")] = "0.0.0.0",
    port: Annotated[
        int, typer.Option(metavar="PORT", min=0, max=65535, help="Port to listen on; 0: any.")
    ] = 31337,
    announce: Annotated[
        list[str] | None,
        typer.Option(metavar="ADDR", help="Address to tell others, behind a forwarded port."),
    ] = None,
    via: Annotated[
        list[str] | None,
        typer.Option(metavar="ADDR", help="Another bootstrap node or peer; it is remembered."),
    ] = None,
    relay: Annotated[
        bool, typer.Option("--relay/--no-relay", help="Forward for peers that can't be reached.")
    ] = True,
    metrics_host: Annotated[
        str, typer.Option(metavar="ADDR", help="Address for /metrics and /healthz.")
    ] = "127.0.0.1",
    metrics_port: Annotated[
        int,
        typer.Option(metavar="PORT", min=-1, max=65535, help="Port for them; 0: any; -1: off."),
    ] = 9100,
    log_json: Annotated[
        bool, typer.Option("--log-json", help="Every event as a JSON line on stdout, nothing else.")
    ] = False,
) -> int:
    """Serve until stopped. The first Ctrl-C stops politely, the second at once."""
    with Interrupts() as interrupts:
        if not log_json:
            sys.stdout.write("starting: loading the libraries takes a few seconds ...\n")
            sys.stdout.flush()
        check_addresses(via or ())
        check_announced(announce or ())
        from bootstrap.node import NodeConfig

        config = NodeConfig(
            home=home,
            host=host,
            port=port,
            announce=tuple(announce or ()),
            via=tuple(via or ()),
            relay=relay,
            metrics_host=metrics_host,
            metrics_port=None if metrics_port < 0 else metrics_port,
        )
        return run_loop(lambda: _serve(config, interrupts, log_json))


async def _serve(config: NodeConfig, interrupts: Interrupts, log_json: bool) -> int:
    from bootstrap.node import open_node

    hub = Hub()
    me = asyncio.current_task()
    node: Node | None = None

    def leave() -> None:
        hub.emit(ev.Notice("info", STOPPING))
        if node is not None:
            node.leave()
        elif me is not None:
            me.cancel()

    with json_lines(hub, sys.stdout) if log_json else _lines(hub), logs_in(hub):
        interrupts.politely(leave)
        try:
            async with open_node(config, hub) as node:
                await node.wait_left()
        except asyncio.CancelledError:
            if not interrupts.asked:
                raise
    return 0


@contextmanager
def _lines(hub: Hub) -> Iterator[None]:
    """What happens, in lines for the operator (or the system's journal)."""

    def write(line: str) -> None:
        sys.stdout.write(line + "\n")
        sys.stdout.flush()

    writer, teller = LineWriter(write, "console"), Teller()

    def tell(event: ev.Event) -> None:
        if isinstance(event, ev.Started):
            writer.put(f"this is the bootstrap node {event.peer}; hand out one of its addresses:")
            for address in event.addresses:
                writer.put(f"  {clean(address)}")
            writer.put("others join with:")
            writer.put(f"  {clean(event.join_command)}")
            return
        line = teller.tell(event)
        if line is not None:
            writer.put(line.text if line.level == "info" else f"{line.level}: {line.text}")

    stop = hub.listen(tell)
    try:
        yield
    finally:
        stop()
        writer.close()
