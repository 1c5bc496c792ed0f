"""Chat data and tokenizers that are small and still like real ones."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from peer.train.tokens import FileTokenizer

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
MARKS = ("<|im_start|>", "<|im_end|>", "<s>", "</s>")


def tokenizer(
    folder: Path, template: str = "", marks: Iterable[str] = MARKS, **about: Any
) -> FileTokenizer:
    """A byte-level BPE with some merges and control marks, saved as transformers would."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers

    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    text = "user assistant system the answer is a question of how many legs has one of them"
    made.train_from_iterator([text] * 8, trainer)
    made.add_special_tokens([AddedToken(mark, special=True) for mark in marks])
    folder.mkdir(parents=True, exist_ok=True)
    made.save(str(folder / "tokenizer.json"))
    config = {"eos_token": "</s>", "bos_token": "<s>", **about}
    config["tokenizer_class"] = "PreTrainedTokenizerFast"
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    if template:
        (folder / "chat_template.jinja").write_text(template)
    return FileTokenizer(folder / "tokenizer.json")


def lines(file: Path, rows: Iterable[object]) -> Path:
    """A JSONL file of the rows; texts are written as they are."""
    text = "".join(f"{r if isinstance(r, str) else json.dumps(r)}\n" for r in rows)
    file.write_text(text, "utf-8")
    return file


def sums(count: int, first: int = 0) -> list[dict[str, str]]:
    """Questions with answers that can be learned: the letter after a letter."""
    found = []
    for n in range(first, first + count):
        letter = chr(ord("a") + n % 25)
        found.append({"question": f"{n}: after {letter}?", "answer": chr(ord(letter) + 1)})
    return found
