"""Text to token ids and back: plain bytes, or a tokenizer.json.

Only the declarative tokenizer.json is read (by the `tokenizers` library); it holds no code.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any, Final, Protocol

from peer.errors import ManifestError

BYTES_END: Final = 256  # the id after the 256 bytes

_END_NAMES: Final = ("</s>", "<|endoftext|>", "<|end_of_text|>", "<eos>", "<|im_end|>")


class Tokenizer(Protocol):
    """Text to ids and back. Adds no special tokens by itself."""

    size: int
    """Ids are 0..size-1."""
    end: int | None
    """The id that ends a document, if there is one."""
    bytes_per_token: int
    """Roughly, for cutting text into blocks; the same on every peer."""

    def encode(self, text: str) -> list[int]:
        """The ids of `text`."""

    def decode(self, ids: list[int]) -> str:
        """The text of `ids`; ids that are no text are left out or shown as a replacement mark."""

    def save(self, folder: Path) -> None:
        """Write what `transformers.AutoTokenizer.from_pretrained(folder)` needs."""


class ByteTokenizer:
    """Ids are the bytes of UTF-8; 256 ends a document. Never fails, knows every language."""

    size = 257
    end: int | None = BYTES_END
    bytes_per_token = 1

    def encode(self, text: str) -> list[int]:
        return list(text.encode("utf-8", "surrogatepass"))

    def decode(self, ids: list[int]) -> str:
        return bytes(i for i in ids if 0 <= i < 256).decode("utf-8", "replace")

    def save(self, folder: Path) -> None:
        """A byte-level BPE without merges is the same thing in the library's terms."""
        from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

        vocabulary = {letter: byte for byte, letter in enumerate(_byte_letters())}
        made = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
        made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        made.decoder = decoders.ByteLevel()
        made.add_special_tokens([AddedToken("<|end|>", special=True)])
        made.save(str(folder / "tokenizer.json"))
        about = {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "eos_token": "<|end|>",
            "clean_up_tokenization_spaces": False,
        }
        (folder / "tokenizer_config.json").write_text(json.dumps(about, indent=2), "utf-8")


class FileTokenizer:
    """A tokenizer.json, with its tokenizer_config.json beside it where there is one."""

    bytes_per_token = 4

    def __init__(self, path: Path) -> None:
        """Read it.

        Raises:
            ManifestError: it can't be read.
        """
        import tokenizers

        self._path = path
        # The library raises plain Exception, so there is nothing narrower to catch.
        try:
            self._tokenizer = tokenizers.Tokenizer.from_file(str(path))
        except Exception as error:
            raise ManifestError(
                f"model.tokenizer: {path} can't be read ({error}); name a tokenizer.json"
            ) from None
        self._tokenizer.no_padding()
        self._tokenizer.no_truncation()
        self.size = max(self._tokenizer.get_vocab(with_added_tokens=True).values(), default=-1) + 1
        self.end = self._find_end()

    def encode(self, text: str) -> list[int]:
        clean = text.encode("utf-8", "replace").decode()  # the library refuses lone surrogates
        ids: list[int] = self._tokenizer.encode(clean, add_special_tokens=False).ids
        return ids

    def decode(self, ids: list[int]) -> str:
        text: str = self._tokenizer.decode([i for i in ids if 0 <= i < self.size])
        return text

    def save(self, folder: Path) -> None:
        for name in (self._path.name, "tokenizer_config.json"):
            if self._path.with_name(name).is_file():
                shutil.copyfile(self._path.with_name(name), folder / name)

    def _find_end(self) -> int | None:
        names = list(_END_NAMES)
        about = self._path.with_name("tokenizer_config.json")
        if about.is_file():
            try:
                raw: Any = json.loads(about.read_text("utf-8"))
            except ValueError:
                raise ManifestError(f"model.tokenizer: {about} is not JSON; mend it") from None
            token = raw.get("eos_token") if isinstance(raw, dict) else None
            name = token.get("content") if isinstance(token, dict) else token
            if isinstance(name, str):
                names.insert(0, name)
        ids = (self._tokenizer.token_to_id(name) for name in names)
        return next((i for i in ids if i is not None), None)


def _byte_letters() -> list[str]:
    """The printable stand-in of each byte that byte-level BPE uses (GPT-2's table)."""
    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = iter(range(256, 512))
    return [chr(byte if byte in plain else next(others)) for byte in range(256)]
