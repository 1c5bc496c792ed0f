"""Text to token ids and back: plain bytes, or a tokenizer.json.

Only the declarative tokenizer.json is read (by the `tokenizers` library); it holds no code.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final, NamedTuple, Protocol

from peer.errors import ManifestError

BYTES_END: Final = 256  # the id after the 256 bytes

BESIDE: Final = ("tokenizer_config.json", "chat_template.jinja", "chat_format.json")
"""What may lie beside a tokenizer.json: the library's two files, and `peer.train.chat_format`'s."""

_END_NAMES: Final = ("</s>", "<|endoftext|>", "<|end_of_text|>", "<eos>", "<|im_end|>")


class Piece(NamedTuple):
    """A stretch of a text of which some parts are learned and others only read."""

    text: str | None
    """None: the mark that ends a document; nothing where a tokenizer has none."""
    learned: bool = False


class Tokenizer(Protocol):
    """Text to ids and back. Adds no special tokens by itself."""

    size: int
    """Ids are 0..size-1."""
    end: int | None
    """The id that ends a document, if there is one."""
    bytes_per_token: int
    """Roughly, for cutting text into blocks; the same on every peer."""
    marks: re.Pattern[str] | None
    """Finds what this tokenizer reads as control marks, not as text; None: nothing is."""

    def encode(self, text: str) -> list[int]:
        """The ids of `text`."""

    def encode_pieces(self, pieces: Sequence[Piece]) -> tuple[list[int], list[bool]]:
        """The ids of all the pieces as one text, and which of them hold any of a learned piece."""

    def decode(self, ids: list[int]) -> str:
        """The text of `ids`; ids that are no text are left out or shown as a replacement mark."""

    def save(self, folder: Path) -> None:
        """Write what `transformers.AutoTokenizer.from_pretrained(folder)` needs."""


class ByteTokenizer:
    """Ids are the bytes of UTF-8; 256 ends a document. Never fails, knows every language."""

    size = 257
    end: int | None = BYTES_END
    bytes_per_token = 1
    marks: re.Pattern[str] | None = None

    def encode(self, text: str) -> list[int]:
        return list(text.encode("utf-8", "surrogatepass"))

    def encode_pieces(self, pieces: Sequence[Piece]) -> tuple[list[int], list[bool]]:
        ids: list[int] = []
        learned: list[bool] = []
        for text, learn in pieces:
            ids += [BYTES_END] if text is None else self.encode(text)
            learned += [learn] * (len(ids) - len(learned))
        return ids, learned

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
        added = self._tokenizer.get_added_tokens_decoder().values()
        # The longest first, or `<|end|>` would be found inside of `<|end|>x`.
        special = sorted((t.content for t in added if t.special and t.content), key=len)[::-1]
        self.marks: re.Pattern[str] | None = None
        if special:
            self.marks = re.compile("|".join(map(re.escape, special)))

    def encode(self, text: str) -> list[int]:
        ids: list[int] = self._tokenizer.encode(_clean(text), add_special_tokens=False).ids
        return ids

    def encode_pieces(self, pieces: Sequence[Piece]) -> tuple[list[int], list[bool]]:
        # As one text, since a tokenizer treats the beginning of a text differently, and joins
        # letters across pieces; the library tells where in the text each token comes from.
        end: str = self._tokenizer.id_to_token(self.end) or "" if self.end is not None else ""
        texts = [end if text is None else _clean(text) for text, _ in pieces]
        flags: list[bool] = []
        for text, (_, learn) in zip(texts, pieces, strict=True):
            flags += [learn] * len(text)
        coded = self._tokenizer.encode("".join(texts), add_special_tokens=False)
        return coded.ids, [any(flags[a : max(b, a + 1)]) for a, b in coded.offsets]

    def decode(self, ids: list[int]) -> str:
        text: str = self._tokenizer.decode([i for i in ids if 0 <= i < self.size])
        return text

    def save(self, folder: Path) -> None:
        for name in (self._path.name, *BESIDE):
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


def _clean(text: str) -> str:
    """Without lone surrogates, which the library refuses."""
    return text.encode("utf-8", "replace").decode()


def _byte_letters() -> list[str]:
    """The printable stand-in of each byte that byte-level BPE uses (GPT-2's table)."""
    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = iter(range(256, 512))
    return [chr(byte if byte in plain else next(others)) for byte in range(256)]
