"""An adapter goes with its own base only."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from peer.errors import StorageError
from peer.train.base import FILE, base_digest
from peer.train.flat import FlatMethod
from peer.train.hybrid import HybridMethod
from peer.train.models import build_model, load_adapter, load_folder, seeded_model
from tests.train.hybrid_tiny import LORA4, close, inside, peer
from tests.train.tiny import CONFIG, batch, everywhere, manifest, method, reduce


def _trained(kind: str) -> FlatMethod | HybridMethod:
    if kind == "lora":
        lora = method("lora")
        lora.step(batch(0))
        lora.apply(reduce(lora, [lora.contribution()]), everywhere(lora, True))
        return lora
    made = peer(LORA4)
    made.step(batch(0))
    outcome, _ = close(made, [made.contribution()])
    made.apply(outcome, inside(made))
    return made


@pytest.mark.parametrize("kind", ["lora", "hybrid"])
def test_an_exported_adapter_goes_with_its_base_and_no_other(kind: str, tmp_path: Path) -> None:
    made = _trained(kind)
    made.export(str(tmp_path / "out"))
    folder = tmp_path / "out" / "adapter"
    with torch.no_grad(), made.outer_model() as model:
        own = model(input_ids=batch(9)).logits
    base = build_model(manifest(), None)
    base.save_pretrained(tmp_path / "base")  # type: ignore[operator]
    loaded = load_adapter(load_folder(tmp_path / "base"), folder).eval()
    with torch.no_grad():
        assert torch.allclose(loaded(input_ids=batch(9)).logits, own, atol=1e-5)
    with pytest.raises(StorageError, match="is no adapter of this model, whose hash"):
        load_adapter(seeded_model(CONFIG, 1), folder)
    (folder / FILE).write_text("[]")
    with pytest.raises(StorageError, match="can't be read"):
        load_adapter(base, folder)
    (folder / FILE).unlink()  # as of one that others made
    load_adapter(seeded_model(CONFIG, 1), folder)


def test_the_digest_is_of_names_shapes_and_values_whatever_their_type() -> None:
    one = seeded_model(CONFIG, 0)
    known = base_digest(one)
    assert known == base_digest(seeded_model(CONFIG, 0))
    other = seeded_model(CONFIG, 0)
    with torch.no_grad():
        next(other.parameters())[0, 0] += 1e-3
    assert base_digest(other) != known
    rounded = seeded_model(CONFIG, 0).to(torch.bfloat16)
    assert base_digest(rounded) == base_digest(rounded.to(torch.float32))
