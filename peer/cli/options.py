"""What a volunteer decides, as the options of `join` and `run start`: one dataclass, told once."""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any, TypeVar, get_type_hints

import typer

T = TypeVar("T")


class Format(StrEnum):
    """For people or for scripts."""

    text = "text"
    json = "json"


Home = Annotated[
    Path | None,
    typer.Option(
        "--home",
        metavar="DIR",
        help="Where identities, checkpoints and logs live.",
        show_default="$MURMURATION_HOME or ~/.local/share/murmuration",
    ),
]
SeatName = Annotated[
    str | None,
    typer.Option(
        "--seat",
        metavar="NAME",
        help="Which identity in there.",
        show_default="the first that is free",
    ),
]
WhichSeat = Annotated[
    str | None, typer.Option("--seat", metavar="NAME", help="Only the peer in this seat.")
]
Output = Annotated[Format, typer.Option("--format", help="For people, or for a script.")]
Prefix = Annotated[
    str | None,
    typer.Option("--run", metavar="ID", help="Run to take (its id, or how that begins)."),
]

_NETWORK = "Network"
_MACHINE = "This machine"
_TELLING = "What is shown"


def _option(name: str, panel: str, help_text: str, **more: Any) -> Any:
    return typer.Option(name, rich_help_panel=panel, help=help_text, **more)


@dataclass(kw_only=True)
class JoinOptions:
    """See `peer.config.PeerConfig` for what the fields mean."""

    via: Annotated[
        list[str],
        _option(
            "--via", _NETWORK,
            "Address of any peer or bootstrap node; may be given several times, and is remembered.",
            metavar="ADDR",
        ),
    ] = field(default_factory=list)  # fmt: skip
    run: Annotated[
        str | None,
        _option(
            "--run", _NETWORK, "Run to join (its id, or how that begins).",
            metavar="ID", show_default="the one that is found",
        ),
    ] = None  # fmt: skip
    site: Annotated[
        str,
        _option(
            "--site", _NETWORK, "Peers with the same label form a group.",
            metavar="LABEL", show_default=False,
        ),
    ] = ""  # fmt: skip
    upload: Annotated[
        str | None,
        _option(
            "--upload", _NETWORK, "Upload at most this fast, e.g. 20mbit.",
            metavar="RATE", show_default="as fast as the line goes",
        ),
    ] = None  # fmt: skip
    host: Annotated[str, _option("--host", _NETWORK, "Address to listen on.", metavar="ADDR")] = (
        "0.0.0.0"
    )
    port: Annotated[
        int,
        _option(
            "--port", _NETWORK, "Port to listen on; 0: any free one, kept over restarts.",
            min=0, max=65535, metavar="PORT",
        ),
    ] = 0  # fmt: skip
    lane: Annotated[
        bool,
        _option(
            "--lane/--no-lane", _NETWORK,
            "Send bulk over TLS connections of its own where that is possible.",
        ),
    ] = True  # fmt: skip
    lane_port: Annotated[
        int,
        _option(
            "--lane-port", _NETWORK, "Port to listen on for these; 0: any, kept over restarts.",
            min=0, max=65535, metavar="PORT",
        ),
    ] = 0  # fmt: skip
    relay: Annotated[
        bool,
        _option(
            "--relay/--no-relay", _NETWORK,
            "Forward for peers that nobody can reach; best with --port 443.",
        ),
    ] = False  # fmt: skip
    announce: Annotated[
        list[str],
        _option(
            "--announce", _NETWORK, "Address to tell others, behind a forwarded port.",
            metavar="ADDR",
        ),
    ] = field(default_factory=list)  # fmt: skip
    data: Annotated[
        list[Path],
        _option(
            "--data", _MACHINE, "Own files or folders to train on, where the run leaves that open.",
            metavar="PATH",
        ),
    ] = field(default_factory=list)  # fmt: skip
    device: Annotated[
        str | None,
        _option(
            "--device", _MACHINE, "cpu, cuda, cuda:1, ...",
            metavar="NAME", show_default="a GPU if there is one",
        ),
    ] = None  # fmt: skip
    method: Annotated[
        str,
        _option(
            "--method", _MACHINE,
            "In a hybrid run: lora:RANK, zo:P (no gradients), full, full:K, or what it can afford.",
            metavar="HOW",
        ),
    ] = "auto"  # fmt: skip
    threads: Annotated[
        int | None,
        _option(
            "--threads", _MACHINE, "CPU cores that training may use.",
            metavar="N", min=1, max=4096, show_default="all",
        ),
    ] = None  # fmt: skip
    home: Annotated[
        Path | None,
        _option(
            "--home", _MACHINE, "Where identities, checkpoints and logs live.",
            metavar="DIR", show_default="$MURMURATION_HOME or ~/.local/share/murmuration",
        ),
    ] = None  # fmt: skip
    seat: Annotated[
        str | None,
        _option(
            "--seat", _MACHINE, "Which identity in there.",
            metavar="NAME", show_default="the first that is free",
        ),
    ] = None  # fmt: skip
    metrics_port: Annotated[
        int | None,
        _option(
            "--metrics-port", _TELLING, "Serve /metrics and /healthz on this local port; 0: any.",
            metavar="PORT", min=0, max=65535, show_default="off",
        ),
    ] = None  # fmt: skip
    log_json: Annotated[
        bool,
        _option("--log-json", _TELLING, "Every event as a JSON line on stdout, nothing else."),
    ] = False
    verbose: Annotated[
        bool, _option("-v", _TELLING, "Say more: plans, contributions, checkpoints.")
    ] = False


def takes(options: type[T]) -> Callable[[Callable[..., int]], Callable[..., int]]:
    """Give a command the fields of a dataclass as options; it gets them as one `options`."""

    def decorate(command: Callable[..., int]) -> Callable[..., int]:
        hints = get_type_hints(options, include_extras=True)
        own_hints = get_type_hints(command, include_extras=True)
        own = [
            parameter.replace(annotation=own_hints[parameter.name])
            for parameter in inspect.signature(command).parameters.values()
            if parameter.name != "options"
        ]
        added = [
            inspect.Parameter(
                f.name,
                inspect.Parameter.KEYWORD_ONLY,
                default=f.default_factory() if callable(f.default_factory) else f.default,
                annotation=hints[f.name],
            )
            for f in dataclasses.fields(options)  # type: ignore[arg-type]
        ]
        names = [parameter.name for parameter in added]

        def run(**values: Any) -> int:
            chosen = options(**{name: values.pop(name) for name in names})
            return command(**values, options=chosen)

        signature = inspect.Signature([*own, *added])
        vars(run)["__signature__"] = signature
        run.__annotations__ = {p.name: p.annotation for p in signature.parameters.values()}
        run.__name__, run.__doc__ = command.__name__, command.__doc__
        return run

    return decorate
