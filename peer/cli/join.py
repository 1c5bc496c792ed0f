"""`peer join` and `peer run start`: one peer, from its first sign of life to its goodbye."""

from __future__ import annotations

import asyncio
import re
import sys
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Final

from peer.addresses import check_addresses
from peer.cli.options import JoinOptions
from peer.cli.running import LEAVING, Interrupts, json_lines, logs_in, run_loop
from peer.errors import UsageError
from peer.home import home_folder
from peer.observe import events as ev
from peer.observe.hub import Hub

if TYPE_CHECKING:
    from peer.config import PeerConfig
    from peer.peer import Peer

_ADDRESS: Final = re.compile(r"/(ip4|ip6|dns|dns4|dns6|dnsaddr)/[^/\s]+/tcp/\d{1,5}(/.*)?")
_DEVICE: Final = re.compile(r"cpu|mps|xpu|cuda(:\d{1,3})?")


def join(options: JoinOptions, file: Path | None = None) -> int:
    """Train until asked to leave. `file`: the TOML of a run to start rather than to join."""
    with Interrupts() as interrupts:
        if not options.log_json:
            sys.stdout.write("starting: loading the libraries takes a few seconds ...\n")
            sys.stdout.flush()
        config = resolve(options, file)
        import peer.net.network  # noqa: F401 - seconds; not later, in the event loop

        _check_device(config.device)
        return run_loop(lambda: _train(config, options, interrupts))


def resolve(options: JoinOptions, file: Path | None) -> PeerConfig:
    """The options as a config.

    Raises:
        UsageError: an option makes no sense.
        ManifestError, DataError: `file` is no run.
    """
    from peer.cli.run import read_draft
    from peer.config import PeerConfig

    if file is not None and options.run is not None:
        raise UsageError("--run names a run to join, FILE one to start; take away one of them")
    check_addresses(options.via)
    check_announced(options.announce)
    draft = read_draft(file) if file is not None else None
    return PeerConfig(
        home=options.home,
        seat=options.seat,
        via=tuple(options.via),
        run=options.run,
        manifest=draft.manifest if draft else None,
        files=draft.files if draft else {},
        # Its owner's own paths, also where joiners get copies: errors name what the owner knows.
        data=tuple(options.data) or (draft.data if draft else ()),
        site=options.site,
        host=options.host,
        port=options.port,
        lane=options.lane,
        lane_port=options.lane_port,
        relay=options.relay,
        announce=tuple(options.announce),
        upload=options.upload,
        device=options.device,
        method=options.method,
        threads=options.threads,
        metrics_port=options.metrics_port,
    )


def check_announced(addresses: Iterable[str]) -> None:
    """Raises UsageError where one could not be dialled by anybody."""
    for address in addresses:
        if _ADDRESS.fullmatch(address) is None:
            raise UsageError(
                f"--announce {address[:120]!r} is not an address; one looks like"
                " /ip4/203.0.113.7/tcp/31337"
            )


async def _train(config: PeerConfig, options: JoinOptions, interrupts: Interrupts) -> int:
    from peer.peer import open_peer

    hub = Hub()
    me = asyncio.current_task()
    peer: Peer | None = None

    def leave() -> None:
        hub.emit(ev.Notice("info", LEAVING))
        if peer is not None:
            peer.leave()
        elif me is not None:
            me.cancel()  # still looking for the others, or loading

    with (
        _where_the_log_is(config, hub),
        _shown(hub, options),
        logs_in(hub, verbose=options.verbose),
    ):
        interrupts.politely(leave)
        try:
            async with open_peer(config, hub=hub) as peer:
                await peer.wait_left()
                if not interrupts.asked:
                    hub.emit(ev.Notice("info", LEAVING))
        except asyncio.CancelledError:
            if not interrupts.asked:
                raise
    if not options.log_json:
        _say_goodbye(peer)
    return 0


def _shown(hub: Hub, options: JoinOptions) -> AbstractContextManager[None]:
    from peer.observe.console import open_console

    if options.log_json:
        return json_lines(hub, sys.stdout)
    return open_console(hub, verbose=options.verbose)


@contextmanager
def _where_the_log_is(config: PeerConfig, hub: Hub) -> Iterator[None]:
    """A note on whatever goes wrong inside; it is shown where the error turns out to be a bug."""
    try:
        yield
    finally:
        error = sys.exception()
        if error is not None:
            started = hub.state.started
            home = home_folder(config.home)
            seat = Path(started.seat) if started else home / (config.seat or "seat-1")
            error.add_note(f"The log of what went before: {seat / 'log.jsonl'}")


def _say_goodbye(peer: Peer | None) -> None:
    if peer is None:
        line = "stopped before it had joined; nothing is lost"
    elif peer.round:
        line = f"goodbye, after round {peer.round}; `python -m peer join` goes on from there"
    else:
        line = "goodbye; no round was finished yet"
    sys.stdout.write(line + "\n")


def _check_device(device: str | None) -> None:
    """Raises UsageError where there is no such device."""
    if device is None:
        return
    import torch

    if _DEVICE.fullmatch(device) is None:
        raise UsageError(f"--device {device[:40]!r} is none; say cpu, cuda or cuda:1")
    index = int(device.partition(":")[2] or 0)
    if device.startswith("cuda") and torch.cuda.device_count() <= index:
        raise UsageError(
            f"--device {device}: torch sees {torch.cuda.device_count()} CUDA devices here; leave"
            " --device away, or check the driver with nvidia-smi"
        )
