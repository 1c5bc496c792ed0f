"""Which base an adapter was made for: a hash beside it, compared before the two are put together.

An adapter fits any model of its base's shapes, and on the wrong one it says nothing but nonsense.
So an export writes SHA-256 over the base's names, shapes and float32 values to `FILE` in the
adapter's folder. Adapters of others, which have none, are taken as they are.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Final

import torch

from peer.errors import StorageError

FILE: Final = "base.json"
_KEY: Final = "base_sha256"
_BYTES_MAX: Final = 4096  # it holds one hash


def base_digest(model: torch.nn.Module) -> str:
    """In hex, of a model as it is, or in peft's hands: what belongs to adapters is left out."""
    sha = hashlib.sha256()
    tensors = {
        name.removeprefix("base_model.model.").replace(".base_layer.", "."): tensor
        for name, tensor in model.state_dict().items()
        if ".lora_" not in name
    }
    for name in sorted(tensors, key=str.encode):
        values = tensors[name].detach().to("cpu", torch.float32).contiguous()
        sha.update(json.dumps([name, list(values.shape)]).encode())
        sha.update(values.numpy().tobytes())
    return sha.hexdigest()


def note_base(folder: Path, digest: str) -> None:
    """Write it to an adapter's folder.

    Raises:
        StorageError: the disk is full or not writable.
    """
    try:
        (folder / FILE).write_text(json.dumps({_KEY: digest}) + "\n", "ascii")
    except OSError as error:
        raise StorageError(f"can't write {folder} ({error}); free some space there") from None


def check_base(folder: Path, model: torch.nn.Module) -> None:
    """Whether the adapter in `folder` was made for `model`, if it says for which.

    Raises:
        StorageError: for another one; or what it says can't be read.
    """
    file = folder / FILE
    if not file.is_file():
        return
    try:
        with file.open("rb") as source:
            noted = json.loads(source.read(_BYTES_MAX))
        wanted = noted[_KEY]
    except (OSError, ValueError, RecursionError, LookupError, TypeError) as error:
        raise StorageError(f"{file}: can't be read ({error}); export the adapter again") from None
    have = base_digest(model)
    if wanted != have:
        raise StorageError(
            f"{folder}: is no adapter of this model, whose hash is {have[:12]}: it was made for"
            f" {str(wanted)[:12]}; name that one"
        )
