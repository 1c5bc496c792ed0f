"""How a conversation is written down for a model: what stands around its turns.

Tokenizers say it by a *template*, a small program (Jinja). A run's peers never execute one: it
comes from strangers, and some look at the calendar, so that peers would differ. What a template
does with the turns is read off it once, by whoever starts the run (`peer.train.template`), and
travels as the texts between the turns, which is data:

    before_user  USER  before_answer [lead_in] ANSWER stop  before_next  USER  before_answer ...

`lead_in`, the answer and its stop are learned, the rest is only read. Where a tokenizer has no
template, `plain` is used:

    ### User:
    How many legs has a spider?

    ### Assistant:
    Eight<end of document>
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Self

from peer.errors import ManifestError
from peer.train.conversation import Turn
from peer.train.tokens import Piece, Tokenizer

FILE_NAME: Final = "chat_format.json"  # beside a tokenizer.json
FILE_BYTES_MAX: Final = 2**16  # system prompts with tools are a few KiB
PARTS_MAX: Final = 16  # of one text: marks and what lies between them

Text = tuple[str | None, ...]
"""Texts end to end; None: the mark that ends a document."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ChatFormat:
    """The texts around turns. Learned are `lead_in`, answers and `stop`."""

    name: str
    """For people."""
    before_system: Text | None
    """None: no system turns; what they say begins the first user turn, over a blank line."""
    after_system: Text
    """Between a system turn and the first user turn."""
    before_user: Text
    """At the start, where there is no system turn: with a default one in some models."""
    before_answer: Text
    """Between a question and its answer; a model that is asked sees this last."""
    lead_in: Text = ()
    """What an answer begins with if it is the last (an empty thought, in some models) ..."""
    lead_in_earlier: Text = ()
    """... and what if it is not."""
    stop: Text
    """Ends an answer. The model has to say it."""
    before_next: Text
    """Between that and the next question."""
    trimmed: bool = False
    """Whether turns lose the blanks around them."""

    def pieces(self, turns: Sequence[Turn], learned: Collection[int] | None = None) -> list[Piece]:
        """The conversation, ready for a tokenizer; one that ends with a question goes on to where
        the model answers. `learned`: only these of its answers (numbers of turns) are."""
        told = list(turns)
        if told[0].role == "system" and self.before_system is None:
            merged = f"{told[0].text.strip()}\n\n{told[1].text}"
            told[:2] = [Turn("user", merged)]
        gone = len(turns) - len(told)
        found: list[Piece] = []

        def say(text: Text, learn: bool = False) -> None:
            found.extend(Piece(part, learn) for part in text)

        for number, turn in enumerate(told):
            text = turn.text.strip() if self.trimmed else turn.text
            if turn.role == "system":
                say(self.before_system or ())
                say((text,))
            elif turn.role == "user":
                first = self.before_user if number == 0 else self.before_next
                say(self.after_system if number and told[number - 1].role == "system" else first)
                say((text,))
                say(self.before_answer)
            else:
                learn = learned is None or number + gone in learned
                last = number == len(told) - 1
                say(self.lead_in if last else self.lead_in_earlier, learn)
                say((text,), learn)
                say(self.stop, learn)
        return found

    def stopping(self) -> list[Piece]:
        """What ends an answer, for a tokenizer."""
        return [Piece(part) for part in self.stop]

    def to_json(self) -> bytes:
        """The same on every machine."""
        return json.dumps(
            dataclasses.asdict(self), sort_keys=True, indent=1, ensure_ascii=False
        ).encode()

    @classmethod
    def from_json(cls, data: bytes, where: str) -> Self:
        """Read `to_json`, perhaps a stranger's.

        Raises:
            ManifestError: it is something else; `where` it came from is said.
        """
        try:
            if len(data) > FILE_BYTES_MAX:
                raise ValueError(f"more than {FILE_BYTES_MAX} bytes")
            raw = json.loads(data.decode("utf-8"))
            if not isinstance(raw, dict):
                raise ValueError("no JSON object")
            fields = {f.name: f for f in dataclasses.fields(cls)}
            for key in raw:
                if key not in fields:
                    raise ValueError(f"unknown key {key[:40]!r}")
            for key, field in fields.items():
                if field.default is dataclasses.MISSING and key not in raw:
                    raise ValueError(f"{key} is missing")
            return cls(**{key: _read(key, value) for key, value in raw.items()})
        except (ValueError, RecursionError) as error:
            raise ManifestError(
                f"{where}: is no chat format ({error}); correct it, or take it away"
            ) from None


def _read(key: str, value: Any) -> Any:
    if key == "trimmed":
        if type(value) is not bool:
            raise ValueError("trimmed must be true or false")
        return value
    if key == "name":
        if not isinstance(value, str) or len(value) > 80 or not value.isprintable():
            raise ValueError("name must be a short text")
        return value
    if key == "before_system" and value is None:
        return None
    good = isinstance(value, list) and len(value) <= PARTS_MAX
    if not good or not all(part is None or isinstance(part, str) for part in value):
        raise ValueError(f"{key} must be a list of at most {PARTS_MAX} texts (null: the end mark)")
    return tuple(part if part is None else _no_surrogates(part) for part in value)


def _no_surrogates(text: str) -> str:
    return text.encode("utf-8", "replace").decode()


def plain(tokenizer: Tokenizer) -> ChatFormat:
    """What is used where a tokenizer says nothing. Begins with the end mark, as every document
    that a model was pretrained on here follows one."""
    ends = tokenizer.end is not None
    user = "### User:\n"
    return ChatFormat(
        name="plain",
        before_system=(None, "### System:\n"),
        after_system=("\n\n" + user,),
        before_user=(None, user),
        before_answer=("\n\n### Assistant:\n",),
        stop=(None,) if ends else ("\n\n### End",),
        before_next=("\n\n" + user,),
    )


def format_beside(tokenizer_file: Path) -> ChatFormat | None:
    """The format in the file beside a tokenizer.json, if there is one.

    Raises:
        ManifestError: it is damaged.
    """
    file = tokenizer_file.with_name(FILE_NAME)
    if not file.is_file():
        return None
    with file.open("rb") as opened:
        data = opened.read(FILE_BYTES_MAX + 1)
    return ChatFormat.from_json(data, str(file))
