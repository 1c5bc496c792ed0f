"""Finding the others: addresses that are tried until they answer, and the run that is joined.

An address that does not answer is retried and reported and never fatal while another answers, or
while this peer has the run's state on its own disk. Nothing is believed without a check: a
manifest is its hash, a file is its hash, a record is signed.
"""

from __future__ import annotations

import asyncio
import contextlib
import random
import shutil
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Final, Protocol

from dht.directory import Directory, RunNotice
from dht.rules import NOTICE_REFRESH_S
from peer.errors import ManifestError, NetworkError, RunNotFoundError, StorageError
from peer.exchange import RefusedError
from peer.home import Seat, make_folder, write_atomic
from peer.manifest import Manifest
from peer.net.transport import Transport, TransportError
from peer.observe import events as ev
from peer.transfer import fetch_asset
from protocols import limits
from protocols.errors import RemoteProtocolError
from protocols.types import PeerId, RunId

RETRY_S_MIN: Final = 1.0
RETRY_S_MAX: Final = 30.0
RECHECK_S: Final = 20.0  # an entrance that came back is met before newcomers give up (EMPTY_S)
EMPTY_S: Final = 1.5 * NOTICE_REFRESH_S
"""A node answers and knows no run: we may be the first. Or it has just come back, and those who
train have not announced their run there again; who starts one now is on his own for ever."""
FIND_RUN_S: Final = EMPTY_S + 5.0  # an answer was had, but nobody there knows (this) run
TOLD_AFTER_S: Final = 4.0
FIND_ASSETS_S: Final = 300.0


class Joinable(Protocol):
    """A directory that has to be told whom to ask first."""

    async def join(self, peers: Iterable[PeerId]) -> bool: ...


class Connector:
    """Keeps trying the given addresses, each in a task of its own."""

    def __init__(
        self, transport: Transport, directory: Directory, emit: ev.Listener,
        remember: Callable[[str], None],
    ) -> None:  # fmt: skip
        self._transport = transport
        self._directory = directory
        self._emit = emit
        self._remember = remember
        self.answered = asyncio.Event()
        """Set once anybody answered."""
        self.failures: dict[str, str] = {}

    async def keep(self, address: str) -> None:
        """Connect to `address`, again and again, until cancelled."""
        wait_s = RETRY_S_MIN
        known = False
        while True:
            try:
                peer = await self._transport.connect(address, limits.CONNECT_TIMEOUT_S)
            except (TransportError, ValueError) as error:
                reason = error.reason if isinstance(error, TransportError) else str(error)
                self.failures[address] = reason
                if not known or wait_s == RETRY_S_MAX:
                    self._emit(ev.ViaFailed(address, reason, wait_s))
                await asyncio.sleep(wait_s * random.uniform(0.8, 1.2))
                wait_s = min(RETRY_S_MAX, wait_s * 2)
                continue
            self.failures.pop(address, None)
            if not known:
                known = True
                self._emit(ev.ViaAnswered(address, peer))
                self._remember(address)
            join = getattr(self._directory, "join", None)
            if join is not None and self._directory.size() == 0:
                await join([peer])
            self.answered.set()
            wait_s = RETRY_S_MIN
            await asyncio.sleep(RECHECK_S)


async def find_manifest(
    directory: Directory, wanted: str | None, default: Callable[[], Manifest],
    emit: ev.Listener, remembered: Manifest | None = None,
    *, find_s: float = FIND_RUN_S, empty_s: float = EMPTY_S,
) -> tuple[Manifest, bool]:  # fmt: skip
    """The manifest of the run to join: `wanted` (an id or its beginning), or the only one there.

    Where several are there, or none is, `remembered` is meant: the run that this seat was in last.
    Where nobody announces any run and none is remembered, `default()` is started: the flag says so.

    Raises:
        RunNotFoundError: nobody knows `wanted`; or several runs exist and none was chosen.
    """
    begun_s = empty_since_s = time.monotonic()
    own = None if remembered is None or wanted is not None else remembered.run_id()
    found: list[RunNotice] = []
    told = False
    while True:
        spent_s = time.monotonic() - begun_s
        found = await directory.runs()
        if found:
            empty_since_s = time.monotonic()
        if remembered is not None and any(notice.run == own for notice in found):
            return remembered, False
        # Ours may be announced again in a moment, and others just be there, too.
        choice = _choose(found, wanted) if own is None or spent_s > empty_s else None
        if choice is not None:
            data = await directory.manifest(choice)
            if data is not None:
                return Manifest.from_canonical(data), False
        if wanted is None and time.monotonic() - empty_since_s > empty_s:
            if remembered is not None:
                emit(ev.Notice("info", f"nobody trains here: going on with {remembered.name!r}"))
                return remembered, False
            emit(ev.Notice("info", "nobody trains here yet: starting the default run"))
            return default(), True
        if spent_s > find_s:
            break
        if not told and spent_s > TOLD_AFTER_S:
            told = True
            missed = repr(remembered.name) if own and remembered is not None else "the run"
            emit(
                ev.Notice(
                    "info",
                    f"{missed} is not announced here yet; looking for {empty_s:g} s, as those who"
                    f" train announce theirs every {NOTICE_REFRESH_S:g} s",
                )
            )
        await asyncio.sleep(0.3)
    known = ", ".join(f"{n.run[:12]} ({n.name}, {n.peers} peers)" for n in found) or "none"
    if wanted is None:
        raise RunNotFoundError(
            f"a run is announced, but nobody who answered holds its manifest (known: {known});"
            " try another --via, or again in a minute"
        )
    raise RunNotFoundError(
        f"nobody who answered knows a run {wanted[:64]!r} (known: {known});"
        " check the id, or try another --via"
    )


def _choose(found: list[RunNotice], wanted: str | None) -> RunId | None:
    """The run that is meant.

    Raises:
        RunNotFoundError: several fit.
    """
    if wanted is not None:
        if len(wanted) == 64:
            return RunId(wanted)
        fitting = [n for n in found if n.run.startswith(wanted)]
    else:
        fitting = list(found)
    if len(fitting) > 1:
        listing = ", ".join(f"{n.run[:12]} ({n.name}, {n.peers} peers)" for n in fitting)
        raise RunNotFoundError(f"several runs are here: {listing}; choose one with --run ID")
    return fitting[0].run if fitting else None


def check_room(manifest: Manifest, folder: Path) -> None:
    """Refuse a run whose files would not fit, before the first byte is fetched.

    Raises:
        StorageError: says how much is needed.
    """
    make_folder(folder)
    missing = sum(a.bytes for a in manifest.assets if not (folder / a.name).exists())
    free = shutil.disk_usage(folder).free
    if missing > free:
        raise StorageError(
            f"the run's files need {missing / 1e9:.1f} GB and the disk of {folder} has"
            f" {free / 1e9:.1f} GB left; free some space, or choose another home with --home"
        )


async def fetch_assets(
    manifest: Manifest, folder: Path, transport: Transport, directory: Directory,
    emit: ev.Listener, *, give_up_s: float = FIND_ASSETS_S,
) -> None:  # fmt: skip
    """Bring every file that the manifest names into `folder`, from whoever has it.

    Raises:
        NetworkError: nobody had a file in time.
        StorageError: the disk is full, or would be.
    """
    run = manifest.run_id()
    check_room(manifest, folder)
    deadline_s = time.monotonic() + give_up_s
    for asset in manifest.assets:
        path = folder / asset.name
        if path.exists() and path.stat().st_size == asset.bytes:
            continue
        emit(ev.Notice("info", f"fetching {asset.name} ({asset.bytes / 1e6:.1f} MB)"))
        reasons: dict[PeerId, str] = {}
        while not path.exists():
            for record in await directory.members(run):
                remember = getattr(transport, "remember", None)
                if remember is not None:
                    remember(record.peer, record.addresses)
                try:
                    await fetch_asset(
                        transport, record.peer, run, asset.name, asset.bytes, asset.sha256, path
                    )
                    break
                except (TransportError, RefusedError) as error:
                    reasons[record.peer] = str(error)
                except RemoteProtocolError as error:
                    reasons[record.peer] = error.reason
                    emit(ev.PeerRefused(error.peer, error.reason))
            else:
                if time.monotonic() > deadline_s:
                    said = "; ".join(f"{p[-6:]}: {r}" for p, r in list(reasons.items())[:3])
                    raise NetworkError(
                        f"nobody gave us {asset.name} ({said or 'no member was found'});"
                        " try again when a member with the file is online"
                    )
                await asyncio.sleep(1.0)


def save_manifest(folder: Path, manifest: Manifest) -> None:
    write_atomic(folder / "manifest.json", manifest.to_canonical())


def saved_manifest(folder: Path) -> Manifest | None:
    """The manifest of a run that this seat took part in before."""
    try:
        data = (folder / "manifest.json").read_bytes()
    except OSError:
        return None
    return Manifest.from_canonical(data)


def readable_manifest(seat: Seat, run: RunId) -> Manifest | None:
    """`saved_manifest`, or None where another version wrote it: who looks for a run needs none."""
    with contextlib.suppress(ManifestError):
        manifest = saved_manifest(seat.run_folder(run))
        if manifest is not None and manifest.run_id() == run:
            return manifest
    return None
