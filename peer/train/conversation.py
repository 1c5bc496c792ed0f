"""Rows of chat and instruction data in the shapes that people have them, as one: turns.

    {"messages": [{"role": "user", "content": ...}, {"role": "assistant", ...}, ...]}
    {"conversations": [{"from": "human", "value": ...}, {"from": "gpt", ...}, ...]}
    {"instruction": ..., "input": ..., "output": ...}        (input may be missing or empty)
    {"prompt": ..., "completion": ...}                       (two texts, or two lists of messages)
    {"question": ..., "answer": ...}

The shape is told by a row's keys, row by row, in this order. Any row may have a `system` text, a
`task` or `category` to be counted under, and `choices` of which its answer is one.

What is learned are the answers, so a row without one is refused, by its name and alone.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, Final, Literal

Role = Literal["system", "user", "assistant"]

TURNS_MAX: Final = 1024  # of one conversation; what is longer is a log, not a lesson
CHOICES_MAX: Final = 64  # one forward pass each
TASK_CHARS_MAX: Final = 80  # a column of a table

_ROLES: Final[Mapping[str, Role]] = {
    "system": "system", "developer": "system",
    "user": "user", "human": "user", "prompter": "user",
    "assistant": "assistant", "gpt": "assistant", "chatgpt": "assistant", "model": "assistant",
    "bot": "assistant", "ai": "assistant",
}  # fmt: skip


class RowError(ValueError):
    """A row that nothing can be learned from; the text says why, without its name."""


@dataclass(frozen=True, slots=True)
class Turn:
    """What one side said."""

    role: Role
    text: str


@dataclass(frozen=True, slots=True)
class Example:
    """A conversation: perhaps a system turn, then user and assistant in turn; the assistant's is
    the last."""

    turns: tuple[Turn, ...]
    task: str = ""
    """What to count it under; "": its file."""
    choices: tuple[str, ...] = ()
    """Of a multiple-choice question: all answers that there are."""
    right: int = -1
    """Which of them is the last turn's."""

    @property
    def answers(self) -> list[int]:
        """The numbers of the turns that are learned."""
        return [i for i, turn in enumerate(self.turns) if turn.role == "assistant"]

    def answered(self, text: str) -> Example:
        """The same with another last answer."""
        return replace(self, turns=(*self.turns[:-1], Turn("assistant", text)))

    def fraction(self) -> float:
        """0..1 by what is asked (all before the first answer): the same everywhere, whatever file
        it stands in and whatever the answer; so no question is both trained on and held out."""
        asked = [(turn.role, turn.text) for turn in self.turns[: self.answers[0]]]
        digest = hashlib.sha256(json.dumps(asked).encode()).digest()
        return int.from_bytes(digest[:8], "little") / 2**64


def read_row(record: object) -> Example:
    """The conversation in a row.

    Raises:
        RowError: it has none of the shapes, no answer, or turns that don't alternate.
    """
    if not isinstance(record, dict):
        raise RowError("is no JSON object")
    for key, read in _SHAPES.items():
        if key in record:
            turns = read(record)
            break
    else:
        some = ", ".join(_printable(name, 40) for name in list(record)[:8]) or "nothing"
        raise RowError(
            f"has {some}; it needs messages, conversations, instruction and output, prompt and"
            " completion, or question and answer"
        )
    system = record.get("system")
    if system is not None and turns[:1] and turns[0].role != "system":
        turns.insert(0, Turn("system", _text(system, "system")))
    task = record.get("task", record.get("category", ""))
    name = _printable(task.strip(), TASK_CHARS_MAX) if isinstance(task, str) else ""
    choices, right = _choices(record, turns)
    example = Example(_in_turn(turns), name)
    return replace(example, choices=choices, right=right)


# ── shapes ───────────────────────────────────────────────────────────────────────────────
def _messages(record: dict[str, Any]) -> list[Turn]:
    return _said(record["messages"], "messages")


def _conversations(record: dict[str, Any]) -> list[Turn]:
    return _said(record["conversations"], "conversations")


def _instruction(record: dict[str, Any]) -> list[Turn]:
    parts = [_text(record["instruction"], "instruction")]
    more = [_text(record[k], k) for k in ("input", "context") if record.get(k) is not None]
    parts += [text for text in more if text.strip()]
    return [Turn("user", "\n\n".join(parts)), _answer(record, "output", "response")]


def _prompt(record: dict[str, Any]) -> list[Turn]:
    prompt, completion = record["prompt"], record.get("completion")
    if isinstance(prompt, list) and isinstance(completion, list):
        return _said([*prompt, *completion], "prompt and completion")
    if isinstance(prompt, list):
        return [*_said(prompt, "prompt"), _answer(record, "completion", "response")]
    return [Turn("user", _text(prompt, "prompt")), _answer(record, "completion", "response")]


def _question(record: dict[str, Any]) -> list[Turn]:
    asked = Turn("user", _text(record["question"], "question"))
    if "choices" in record:
        choices, labels = _listed(record["choices"])
        given = next((record[k] for k in ("answer", "answerKey", "label") if k in record), None)
        return [asked, Turn("assistant", choices[_which(given, choices, labels)])]
    return [asked, _answer(record, "answer")]


_SHAPES: Final[Mapping[str, Callable[[dict[str, Any]], list[Turn]]]] = {
    "messages": _messages, "conversations": _conversations, "instruction": _instruction,
    "prompt": _prompt, "question": _question,
}  # fmt: skip


def _answer(record: dict[str, Any], *keys: str) -> Turn:
    for key in keys:
        if record.get(key) is not None:
            return Turn("assistant", _text(record[key], key))
    raise RowError(f"has no answer: {keys[0]} is missing")


def _said(turns: object, where: str) -> list[Turn]:
    if not isinstance(turns, list) or not turns:
        raise RowError(f"{where} must be a list of turns")
    if len(turns) > TURNS_MAX:
        raise RowError(f"{where} has {len(turns)} turns, and at most {TURNS_MAX} are taken")
    found = []
    for number, turn in enumerate(turns, 1):
        if not isinstance(turn, dict):
            raise RowError(f"turn {number} of {where} is no JSON object")
        name = turn.get("role", turn.get("from"))
        role = _ROLES.get(name) if isinstance(name, str) else None
        if role is None:
            raise RowError(
                f"turn {number} of {where} is of the role {str(name)[:40]!r}, not system, user or"
                " assistant"
            )
        content = turn.get("content", turn.get("value"))
        if isinstance(content, list):  # OpenAI's parts
            parts = [p.get("text") if isinstance(p, dict) else p for p in content]
            texts = [part for part in parts if isinstance(part, str)]
            if len(texts) < len(parts):
                raise RowError(f"turn {number} of {where} holds more than text")
            content = "".join(texts)
        if content is None and turn.get("tool_calls"):
            raise RowError(f"turn {number} of {where} calls a tool, which can't be learned here")
        found.append(Turn(role, _text(content, f"turn {number} of {where}")))
    return found


def _text(value: object, where: str) -> str:
    """A field's text, without lone surrogates, which no tokenizer takes."""
    if isinstance(value, int | float) and not isinstance(value, bool):
        value = str(value)
    if not isinstance(value, str):
        raise RowError(f"{where} is no text")
    return value.encode("utf-8", "replace").decode()


def _printable(text: str, size: int) -> str:
    """The beginning of a text that may be shown on a terminal."""
    return "".join(c if c.isprintable() else "?" for c in text[:size])


def _in_turn(turns: list[Turn]) -> tuple[Turn, ...]:
    """One turn for each change of sides, up to the last answer."""
    found: list[Turn] = []
    for turn in turns:
        if found and found[-1].role == turn.role:
            found[-1] = Turn(turn.role, f"{found[-1].text}\n\n{turn.text}")
        elif turn.role == "system" and found:
            raise RowError("has a system turn after the first turn")
        else:
            found.append(turn)
    while found and found[-1].role != "assistant":
        found.pop()  # asked and not answered: nothing to learn there
    if not found:
        raise RowError("has no answer")
    first = found[1] if found[0].role == "system" else found[0]
    if first.role == "assistant":
        raise RowError("begins with an answer to nothing")
    if any(turn.role == "assistant" and not turn.text.strip() for turn in found):
        raise RowError("has an answer without text")
    return tuple(found)


# ── multiple choice ──────────────────────────────────────────────────────────────────────
def _choices(record: dict[str, Any], turns: list[Turn]) -> tuple[tuple[str, ...], int]:
    if "choices" not in record:
        return (), -1
    choices, _ = _listed(record["choices"])
    if not turns or turns[-1].text not in choices:
        raise RowError("its answer is none of its choices")
    return choices, choices.index(turns[-1].text)


def _listed(raw: object) -> tuple[tuple[str, ...], list[str]]:
    """(texts, labels) of a list, or of ARC's {"text": [...], "label": [...]}."""
    labels: list[str] = []
    if isinstance(raw, dict):
        given = raw.get("label")
        labels = [str(label) for label in given] if isinstance(given, list) else []
        raw = raw.get("text")
    if not isinstance(raw, list) or not 2 <= len(raw) <= CHOICES_MAX:
        raise RowError(f"choices must be a list of 2 to {CHOICES_MAX} answers")
    texts = tuple(_text(choice, "a choice") for choice in raw)
    if len(set(texts)) < len(texts) or not all(text.strip() for text in texts):
        raise RowError("choices must be different texts, none empty")
    if len(labels) != len(texts):
        labels = [chr(ord("A") + i) for i in range(len(texts))]
    return texts, labels


def _which(given: object, choices: tuple[str, ...], labels: list[str]) -> int:
    """The choice that a number (from 0), a label or the choice's own text means."""
    if type(given) is int and 0 <= given < len(choices):
        return given
    for known in (list(choices), labels):
        if isinstance(given, str) and given.strip() in known:
            return known.index(given.strip())
    if given is None:
        raise RowError("has no answer: answer is missing")
    raise RowError(f"its answer {str(given)[:40]!r} is none of its choices")
