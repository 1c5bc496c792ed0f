"""A state's digest vouches for every chunk of it, and costs a round only what it changed."""

from __future__ import annotations

import hashlib
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from peer import state_chunks
from peer.state_chunks import ChunkHashes, StateGrid, leaf_of

Arrays = dict[str, npt.NDArray[Any]]


def sample(seed: int = 0) -> Arrays:
    rng = np.random.default_rng(seed)
    return {
        "theta": rng.random(1000).astype(np.float32),
        "momentum": rng.random(1000).astype(np.float32),
        "mixes": rng.integers(0, 9, (7, 3, 2)).astype(np.uint64),
        "none": np.zeros((0, 4), np.float32),
    }


def digest_of(arrays: Arrays, layout: bytes = b"", chunk_bytes: int = 256) -> bytes:
    grid = StateGrid(arrays, layout, chunk_bytes)
    return grid.digest(grid.leaves(arrays))


def test_chunks_cover_every_byte_once_and_in_order() -> None:
    arrays = sample()
    grid = StateGrid(arrays, chunk_bytes=256)
    whole = b"".join(arrays[name].tobytes() for name in sorted(arrays))
    assert b"".join(grid.view(arrays, i) for i in range(grid.count)) == whole
    assert [c.offset for c in grid.chunks] == list(
        np.cumsum([0, *(len(c) for c in grid.chunks[:-1])])
    )
    assert grid.bytes == len(whole)
    assert grid.leaves(arrays)[3] == leaf_of(grid.view(arrays, 3))


def test_another_value_name_shape_type_layout_or_size_of_chunk_is_another_digest() -> None:
    digest = digest_of(sample())
    assert digest == digest_of(sample())
    flipped = sample()
    flipped["momentum"].view(np.uint8)[-1] ^= 1
    renamed = sample()
    renamed["psi"] = renamed.pop("theta")
    reshaped = sample()
    reshaped["theta"] = reshaped["theta"].reshape(10, 100)
    retyped = sample()
    retyped["theta"] = retyped["theta"].view(np.int32)
    others = [digest_of(arrays) for arrays in (flipped, renamed, reshaped, retyped)]
    others += [digest_of(sample(), b"x"), digest_of(sample(), chunk_bytes=512)]
    assert len({digest, *others}) == 1 + len(others)


def test_leaves_that_are_too_few_too_many_or_none_have_no_digest() -> None:
    arrays = sample()
    grid = StateGrid(arrays, chunk_bytes=256)
    leaves = grid.leaves(arrays)
    for wrong in ((), leaves[:-1], (*leaves, leaves[0]), (*leaves[:-1], b"short")):
        with pytest.raises(ValueError, match="leaves where"):
            grid.digest(wrong)
    assert grid.split(b"".join(leaves)) == leaves
    assert grid.digest((*leaves[1:], leaves[0])) != grid.digest(leaves)


def test_only_what_changed_is_hashed_again(monkeypatch: pytest.MonkeyPatch) -> None:
    arrays = sample()
    grid = StateGrid(arrays, chunk_bytes=256)
    hashes = ChunkHashes(grid)
    hashed: list[int] = []

    def watched(chunk: bytes | memoryview) -> bytes:
        hashed.append(len(chunk))
        return hashlib.sha256(chunk).digest()

    monkeypatch.setattr(state_chunks, "leaf_of", watched)
    assert hashes.digest(arrays) == digest_of(sample())
    hashed.clear()
    arrays["theta"][100:130] += 1.0  # bytes 400 to 520: the second and the third chunk
    hashes.changed("theta", 400, 520)
    hashes.changed("theta", 0, 0)
    changed = hashes.digest(arrays)
    assert hashed == [256, 256]
    assert changed == StateGrid(arrays, chunk_bytes=256).digest(grid.leaves(arrays))
    arrays["mixes"] += np.uint64(1)
    hashes.replaced()
    assert hashes.digest(arrays) == grid.digest(grid.leaves(arrays))


def test_the_order_in_which_arrays_were_made_does_not_matter() -> None:
    arrays = sample()
    assert digest_of(arrays) == digest_of(dict(reversed(arrays.items())))
