"""`peer status`, `peer identity` and `peer leave`: about the peers on this machine."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

from peer.cli.ending import say
from peer.control import ask
from peer.errors import NetworkError, NotRunningError, UsageError
from peer.home import SeatInfo, control_path, home_folder, open_seat, seats
from peer.observe import words

LEAVE_TIMEOUT_S: Final = 60.0  # a large model's checkpoint takes a while to write
LEAVE_POLL_S: Final = 0.1
BOOTSTRAP: Final = "bootstrap"


def status(home: Path | None, seat: str | None, as_json: bool) -> int:
    """Every running peer's own view.

    Raises:
        NotRunningError: none runs.
    """
    reports = [_ask_status(info) for info in running(home, seat)]
    if as_json:
        sys.stdout.write(json.dumps({"peers": reports}, indent=1) + "\n")
        return 0
    from peer.cli.table import show

    for number, report in enumerate(reports):
        if number:
            sys.stdout.write("\n")
        show(report)
    return 0


def identity(home: Path | None, seat: str | None, as_json: bool) -> int:
    """Who this machine's peers are; the first seat is made if there is none."""
    known = [info for info in seats(home) if seat is None or info.name == seat]
    if not known:
        with open_seat(home, seat) as made:
            made.identity()
            known = [SeatInfo(made.name, made.folder, False)]
    found = []
    for info in known:
        key = info.folder / "identity.key"
        if not info.running or not key.exists():
            with open_seat(home, info.name) as held:
                peer = held.identity().peer_id
                for notice in held.notices:
                    say(f"warning: {notice}")
        else:
            from protocols.identity import Signer

            peer = Signer(key.read_bytes()).peer_id
        found.append({"peer": peer, "key": str(key), "seat": info.name, "running": info.running})
    if as_json:
        sys.stdout.write(json.dumps({"identities": found}, indent=1) + "\n")
        return 0
    for facts in found:
        running_now = ", running now" if facts["running"] else ""
        sys.stdout.write(
            f"peer  {facts['peer']}\nkey   {facts['key']}\nseat  {facts['seat']}{running_now}\n"
        )
    return 0


def leave(home: Path | None, seat: str | None, everyone: bool) -> int:
    """Ask a running peer to leave, and wait until it has.

    Raises:
        NotRunningError: none runs.
        UsageError: several do, and none was chosen.
        NetworkError: it does not end.
    """
    chosen = running(home, seat)
    if seat is None and not everyone:
        chosen = [info for info in chosen if info.name != BOOTSTRAP] or chosen
        if len(chosen) > 1:
            names = ", ".join(info.name for info in chosen)
            raise UsageError(f"several run here ({names}); choose one with --seat NAME, or --all")
    for info in chosen:
        _ask_to_leave(info)
    deadline_s = time.monotonic() + LEAVE_TIMEOUT_S
    for info in chosen:
        while _is_running(home, info.name):
            if time.monotonic() > deadline_s:
                raise NetworkError(
                    f"the peer in {info.folder} was asked and is still there after"
                    f" {LEAVE_TIMEOUT_S:.0f} s; its log.jsonl says why, or end its process"
                )
            time.sleep(LEAVE_POLL_S)
        sys.stdout.write(f"{info.name} has left\n")
    return 0


def _ask_to_leave(info: SeatInfo) -> None:
    try:
        ask(control_path(info.folder), "leave")
    except NotRunningError:
        raise NetworkError(
            f"the peer in {info.folder} is only just starting and does not listen yet; try again"
            " in a few seconds, or press Ctrl-C where it runs"
        ) from None


def running(home: Path | None, seat: str | None) -> list[SeatInfo]:
    """The seats in which a peer runs; with `seat`, only that one.

    Raises:
        NotRunningError: none.
    """
    found = [info for info in seats(home) if info.running and seat in (None, info.name)]
    if not found:
        where = home_folder(home) / (seat or "")
        raise NotRunningError(
            f"no peer is running in {where}; start one with `python -m peer join`"
        )
    return found


def _is_running(home: Path | None, name: str) -> bool:
    return any(info.name == name and info.running for info in seats(home))


def _ask_status(info: SeatInfo) -> Mapping[str, Any]:
    """A peer's view; a peer that is only just starting has none."""
    try:
        return {"name": info.name, **ask(control_path(info.folder), "status")}
    except NotRunningError:
        return {"name": info.name, "seat": str(info.folder), "phase": "starting"}
    except NetworkError as error:
        return {
            "name": info.name, "seat": str(info.folder), "phase": "silent",
            "notices": [{"level": "warning", "text": words.clean(str(error))}],
        }  # fmt: skip
