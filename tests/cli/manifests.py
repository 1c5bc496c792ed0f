"""Small runs, written as their owners would."""

from __future__ import annotations

from pathlib import Path

TINY = """
name = "tiny"
[model.config]
model_type = "llama"
vocab_size = 257
hidden_size = 16
intermediate_size = 32
num_hidden_layers = 1
num_attention_heads = 2
max_position_embeddings = 128
[data]
source = "text"
paths = ["text.txt"]
sequence_length = 32
[inner]
batch_size = 4
[schedule]
round_s = 0.5
exchange_s = 5.0
checkpoint_every = 2
"""


def write(folder: Path, toml: str = TINY, text: bytes | None = None) -> Path:
    """A manifest and its data in `folder`."""
    poem = b"".join(b"line %d of a text that is long enough to train on.\n" % n for n in range(500))
    (folder / "text.txt").write_bytes(poem if text is None else text)
    path = folder / "run.toml"
    path.write_text(toml)
    return path
