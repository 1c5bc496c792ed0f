"""`peer export` and `peer sample`: what was trained, from this machine's newest checkpoint.

The model is built anew and loaded here, so a running peer only has to save first and is not
disturbed while text is sampled.
"""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Final

from peer.cli.ending import say
from peer.control import ask
from peer.errors import NotRunningError, RunNotFoundError, StorageError, UsageError
from peer.home import SeatInfo, complain, control_path, home_folder, read_memory, seats

if TYPE_CHECKING:
    from peer.manifest import Manifest
    from peer.train.method import ModelMethod

SAVE_TIMEOUT_S: Final = 120.0
NOTHING_YET: Final = (
    "nothing was trained here yet; start with `python -m peer join` and let it finish a round"
)


@dataclass(frozen=True, slots=True)
class Place:
    """One seat's part in one run."""

    seat: SeatInfo
    run: str
    folder: Path

    @property
    def checkpoints(self) -> Path:
        return self.folder / "checkpoints"

    @property
    def assets(self) -> Path:
        return self.folder / "assets"


def export(target: Path, home: Path | None, seat: str | None, run: str | None) -> int:
    """Write the trained model to `target` for `transformers.AutoModelForCausalLM`.

    Raises:
        UsageError: `target` is there and not empty.
        StorageError: nothing was trained yet, or the disk is full.
        RunNotFoundError: this machine has no such run.
    """
    _must_be_empty(target)
    place = find(home, seat, run)
    manifest, method, number = load(place)
    from safetensors import SafetensorError

    from peer.train import build_tokenizer

    # Written beside and then moved, so that a model folder is whole or not there.
    partial = target.absolute().with_name(f".{target.absolute().name}.partial-{os.getpid()}")
    try:
        partial.mkdir(parents=True)
        method.export(str(partial))
        build_tokenizer(manifest, place.assets).save(partial)
        partial.rename(target)
    except OSError as error:
        complain(error, target, "write")
    except SafetensorError as error:
        raise StorageError(f"cannot write {target}: {error}; free some space there") from None
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    sys.stdout.write(
        f"wrote {manifest.name} after round {number} to {target}\n"
        f'load it with transformers.AutoModelForCausalLM.from_pretrained("{target}")\n'
    )
    return 0


def sample(
    text: str, home: Path | None, seat: str | None, run: str | None,
    *, tokens: int, temperature: float, seed: int,
) -> int:  # fmt: skip
    """Print `text` and what the model makes of it.

    Raises:
        StorageError: nothing was trained yet.
        RunNotFoundError: this machine has no such run.
    """
    place = find(home, seat, run)
    manifest, method, number = load(place)
    from peer.train import build_tokenizer
    from peer.train.sample import sample as continue_text

    tokenizer = build_tokenizer(manifest, place.assets)
    with method.outer_model() as model:
        said = continue_text(model, tokenizer, text, tokens, temperature, seed)
    say(f"{manifest.name}, round {number}:")
    sys.stdout.write(_printable(text + said) + "\n")
    return 0


# ── which state ──────────────────────────────────────────────────────────────────────────
def find(home: Path | None, seat: str | None, run: str | None) -> Place:
    """Where to read: the peer that runs here (after it has saved), else whoever saved last.

    Raises:
        UsageError: there is no such seat.
        RunNotFoundError: nobody here took part in `run`.
        StorageError: nothing was trained yet.
    """
    known = seats(home)
    if seat is not None and seat not in {info.name for info in known}:
        names = ", ".join(info.name for info in known) or "none"
        raise UsageError(
            f"there is no seat {seat[:40]!r} in {home_folder(home)}; there are {names}"
        )
    places = [p for info in known if seat in (None, info.name) for p in _places(info, run)]
    if run is not None and not places:
        raise RunNotFoundError(
            f"no peer on this machine took part in a run {run[:64]!r}; `python -m peer join --run`"
            " takes part in it"
        )
    places.sort(key=lambda place: (place.seat.running, _saved_s(place)), reverse=True)
    for place in places:
        if place.seat.running:
            _save(place)
        if _saved_s(place) > 0:
            return place
    raise StorageError(NOTHING_YET)


def _places(info: SeatInfo, run: str | None) -> Iterator[Place]:
    """The runs of a seat: those whose id begins with `run`, or the one it trained last."""
    if run is None:
        memory, _ = read_memory(info.folder)
        names = [memory.run] if memory.run is not None else []
    else:
        names = [f.name for f in sorted((info.folder / "runs").glob("*")) if run and f.is_dir()]
        names = [name for name in names if name.startswith(run)]
    for name in names:
        yield Place(info, name, info.folder / "runs" / name)


def _saved_s(place: Place) -> float:
    """When the newest checkpoint was written; 0: never."""
    times = [f.stat().st_mtime for f in place.checkpoints.glob("checkpoint-*.safetensors")]
    return max(times, default=0.0)


def _save(place: Place) -> None:
    """Have the running peer write down where it is, if it trains this run and has got anywhere."""
    path = control_path(place.seat.folder)
    try:
        status = ask(path, "status")
        if status.get("run") == place.run and status.get("round"):
            ask(path, "save", timeout_s=SAVE_TIMEOUT_S)
    except NotRunningError:
        pass  # it is only just starting; what it saved before will do


# ── loading ──────────────────────────────────────────────────────────────────────────────
def load(place: Place) -> tuple[Manifest, ModelMethod, int]:
    """The run's manifest, and its method with the newest state; and that state's round.

    Raises:
        StorageError: nothing valid is there.
    """
    import numpy as np

    from peer.checkpoint import CheckpointStore
    from peer.finding import saved_manifest
    from peer.train import build_method

    manifest = saved_manifest(place.folder)
    if manifest is None:
        raise StorageError(
            f"{place.folder / 'manifest.json'} is missing; `python -m peer join --run"
            f" {place.run[:12]}` fetches it again"
        )
    loaded = CheckpointStore(place.checkpoints, read_only=True)
    state = loaded.load()
    for reason in loaded.skipped:
        say(f"warning: passed over a damaged file: {reason}")
    if state is None:
        raise StorageError(
            f"no checkpoint in {place.checkpoints} can be read; `python -m peer join` fetches the"
            " state from another peer"
        )
    method = build_method(manifest, place.assets, "cpu", say=say)
    number = state.round
    try:
        method.load_state(state.arrays)
    except ValueError as error:
        raise StorageError(f"{state.path} is not a state of this run ({error}); join it") from None
    for entry in state.journal:
        nobody = np.zeros(len(entry.units), np.bool_)
        method.apply(entry.units, nobody, method.fragments.of(entry.round).start)
        number += 1
        if entry.digest and method.digest() != entry.digest:
            raise StorageError(
                f"round {entry.round} of the journal in {place.checkpoints} does not lead to the"
                " state that it should; move the journal files away and try again"
            )
    return manifest, method, number


def _must_be_empty(target: Path) -> None:
    try:
        if target.exists() and (not target.is_dir() or any(target.iterdir())):
            raise UsageError(f"{target} is not empty; name a new folder")
    except OSError as error:
        complain(error, target, "read")


def _printable(text: str) -> str:
    """Without control characters: a model says whatever strangers taught it."""
    return "".join(c if c.isprintable() or c in "\n\t" else "�" for c in text)
