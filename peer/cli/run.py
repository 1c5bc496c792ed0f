"""`peer run new` and `peer run check`: from an idea to a manifest that others can trust."""

from __future__ import annotations

import sys
import tempfile
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Final

from peer.errors import UsageError
from peer.home import complain

if TYPE_CHECKING:
    from peer.manifest import Manifest
    from peer.manifest_toml import Draft

FILE_BYTES_MAX: Final = 2**20  # a manifest people write is a few KiB


class Kind(StrEnum):
    """A method that a manifest can begin with."""

    pretrain = "pretrain"
    lora = "lora"
    hybrid = "hybrid"
    zo = "zo"


def new(file: Path, kind: Kind) -> int:
    """Write a commented manifest; never over another file."""
    from peer.manifest_templates import HYBRID_TEMPLATE, LORA_TEMPLATE, TEMPLATE, ZO_TEMPLATE

    texts = {
        Kind.pretrain: TEMPLATE, Kind.lora: LORA_TEMPLATE, Kind.hybrid: HYBRID_TEMPLATE,
        Kind.zo: ZO_TEMPLATE,
    }  # fmt: skip
    more = " --data FILES" if kind in (Kind.lora, Kind.hybrid) else ""
    try:
        with file.open("x", encoding="utf-8") as out:
            out.write(texts[kind])
    except FileExistsError:
        raise UsageError(f"{file} is there already; choose another name") from None
    except FileNotFoundError:
        raise UsageError(f"there is no folder {file.parent}; make it first") from None
    except OSError as error:
        complain(error, file, "write")
    sys.stdout.write(
        f"wrote {file}\n"
        f"edit it, then:  python -m peer run check {file}\n"
        f"and start it:   python -m peer run start {file}{more}\n"
    )
    return 0


def _rounds(manifest: Manifest) -> str:
    schedule = manifest.schedule
    if schedule.fragments == 1:
        return f"rounds of {schedule.round_s:g} s"
    return f"{schedule.round_s:g} s for a turn of {schedule.fragments} fragments"


def _method(manifest: Manifest) -> str:
    spec = manifest.zeroth
    if manifest.method.kind != "zo":
        return manifest.method.kind
    what = "adapters" if spec.adapters else "all weights"
    if spec.estimator == "kseed":
        return f"zo: kseed on {what}, {spec.pool:,} directions"
    return f"zo: decomfl on {what}, {spec.steps} x {spec.perturbations} scalars a round"


def check(file: Path) -> int:
    """Say what a manifest would start, or what is wrong with it."""
    draft = read_draft(file)
    from peer.observe.words import count, size
    from peer.train.flat import check_fragments
    from peer.train.models import parameters_of
    from tensorcodecs import CHUNK_VALUES

    manifest = draft.manifest
    parameters = parameters_of(manifest.model.config)
    if manifest.method.kind == "pretrain":
        check_fragments(manifest.schedule.fragments, -(-parameters // CHUNK_VALUES))
    lines = {
        "run": f"{manifest.run_id()}  {manifest.name}",
        "model": f"{manifest.model.config['model_type']}, {count(parameters)} parameters",
        "method": f"{_method(manifest)}, {_rounds(manifest)}, groups of up"
        f" to {manifest.group.members_max}",
        "data": _data(draft),
    }
    if manifest.assets:
        total = size(sum(asset.bytes for asset in manifest.assets))
        lines["files"] = f"{len(manifest.assets)} ({total}) that joiners fetch from peers"
    for name, text in lines.items():
        sys.stdout.write(f"{name:<8}{text}\n")
    spec = manifest.data
    more = "" if spec.source in ("stdlib", "hf") or spec.paths or draft.data else " --data FILES"
    sys.stdout.write(f"start it with:  python -m peer run start {file}{more}\n")
    return 0


def read_draft(file: Path) -> Draft:
    """A run from its owner's TOML.

    Raises:
        UsageError: there is no such file.
        ManifestError: names the field.
        DataError: a data file is missing or empty.
        VersionError: it asks for a newer program.
    """
    from peer.errors import ManifestError
    from peer.manifest_toml import read_toml

    try:
        with file.open("rb") as source:
            text = source.read(FILE_BYTES_MAX + 1)
        if len(text) > FILE_BYTES_MAX:
            raise ManifestError(f"{file}: longer than {FILE_BYTES_MAX} bytes; is that a manifest?")
        return read_toml(text.decode("utf-8"), file.absolute().parent)
    except UnicodeDecodeError:
        raise ManifestError(f"{file}: not text in UTF-8; is that a manifest?") from None
    except (FileNotFoundError, IsADirectoryError):
        raise UsageError(
            f"{file}: no such file; write one with `python -m peer run new {file}`"
        ) from None
    except OSError as error:
        complain(error, file, "read")


def _data(draft: Draft) -> str:
    """Open the data as a peer would, and say how much there is.

    Raises:
        DataError: it is not text, or too little.
    """
    from peer.manifest_toml import stage_assets
    from peer.observe.words import plural
    from peer.train import build_data, build_tokenizer
    from peer.train.chat import ChatBlocks

    spec = draft.manifest.data
    if spec.source == "hf":
        return f"{spec.dataset} on the Hugging Face hub (not looked at)"
    if spec.source != "stdlib" and not spec.paths and not draft.data:
        return f"{spec.source}: each peer brings its own (--data)"
    with tempfile.TemporaryDirectory(prefix="murmuration-check-") as room:
        assets = Path(room)
        stage_assets({n: c for n, c in draft.files.items() if n.startswith("tokenizer/")}, assets)
        tokenizer = build_tokenizer(draft.manifest, assets)
        data = build_data(draft.manifest, assets, tokenizer, draft.data)
    whose = (
        "this Python's own modules" if spec.source == "stdlib" else plural(len(draft.data), "file")
    )
    found = (
        f"{spec.source} ({whose}): {data.blocks:,} blocks to share out;"
        f" {len(data.validation())} samples of {spec.sequence_length} tokens held out"
    )
    refused = data.refused if isinstance(data, ChatBlocks) else []
    return "\n".join((found, *(f"{'':<8}{line}" for line in refused)))
