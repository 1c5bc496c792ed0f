"""A run's base values once more, on the disk: read when a log is replayed from its beginning.

A peer that trains at the memory of inference can't keep two copies of its model. So the second one
is a nameless temporary file that the system reads, and drops from memory, as it likes; it is gone
with the process.
"""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Final

import numpy as np
import torch

from peer.home import complain

_VIEWS: Final = {torch.float32: torch.int32, torch.bfloat16: torch.int16}  # NumPy has no bfloat16


def mapped(values: Mapping[str, torch.Tensor], folder: Path | None) -> dict[str, torch.Tensor]:
    """The same tensors (float32 or bfloat16, on the CPU), memory-mapped from a file in `folder`.

    Raises:
        StorageError: no room or no permission.
    """
    where = folder if folder is not None and folder.is_dir() else None
    found: dict[str, torch.Tensor] = {}
    try:
        with tempfile.TemporaryFile(dir=where) as file:
            starts = {}
            for name, tensor in values.items():
                starts[name] = file.tell()
                whole = tensor.contiguous().view(-1).view(_VIEWS[tensor.dtype])
                whole.numpy().tofile(file)
            file.flush()
            for name, tensor in values.items():
                if not tensor.numel():
                    found[name] = tensor
                    continue
                # "c": nobody writes, and torch takes no array that could not be written.
                whole_N = np.memmap(
                    file, np.int32 if tensor.dtype == torch.float32 else np.int16, "c",
                    starts[name], (tensor.numel(),),
                )  # fmt: skip
                found[name] = torch.from_numpy(whole_N).view(tensor.dtype).view(tensor.shape)
    except OSError as error:
        complain(error, where or Path(tempfile.gettempdir()), "write")
    return found
