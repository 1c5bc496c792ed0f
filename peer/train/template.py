"""What a tokenizer's chat template does with turns, read off it by trying it.

This executes the template, in transformers' sandbox: only ever on the machine of whoever names the
folder it lies in, never on a joiner's. Conversations of words that occur nowhere else go in, and
what comes out around the words is the format. It is then tried on longer conversations: a template
that does more than put texts around turns is refused rather than approximated.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from itertools import takewhile
from pathlib import Path
from typing import Any, Final

from peer.errors import ManifestError
from peer.train.chat_format import FILE_NAME, ChatFormat, Text, format_beside, plain
from peer.train.conversation import Role, Turn
from peer.train.tokens import FileTokenizer

TEMPLATE_BYTES_MAX: Final = 2**18  # the largest real ones, with tools and documents, are 20 KiB
_SPECIAL: Final = ("bos_token", "eos_token", "unk_token", "pad_token")
_S, _U, _A = "Qsystemq", "Quserq", "Qanswerq"
_TALK: Final[Sequence[tuple[Role, str]]] = (
    ("user", _U + "1"), ("assistant", _A + "1"), ("user", _U + "2"), ("assistant", _A + "2"),
    ("user", _U + "3"), ("assistant", _A + "3"),
)  # fmt: skip


class TemplateError(ValueError):
    """A template that is no texts around turns; says in which way."""


def format_of(tokenizer_file: Path, tokenizer: FileTokenizer) -> ChatFormat:
    """How a tokenizer on this machine writes conversations: its chat_format.json, what its
    template does, or plain.

    Raises:
        ManifestError: the template does more than put texts around turns, or can't be read.
    """
    known = format_beside(tokenizer_file)
    if known is not None:
        return known
    template, special = _find(tokenizer_file)
    if template is None:
        return plain(tokenizer)
    try:
        return derive(template, special, tokenizer.marks)
    except TemplateError as error:
        raise ManifestError(
            f"model.tokenizer: the chat template beside {tokenizer_file} {error}; write what it"
            f" should do into {FILE_NAME} beside it"
        ) from None


def derive(template: str, special: Mapping[str, str], marks: re.Pattern[str] | None) -> ChatFormat:
    """The format that `template` amounts to. `special`: the texts it may name, such as bos_token.

    Raises:
        TemplateError: it amounts to none.
    """

    def render(turns: Sequence[tuple[Role, str]], asking: bool = False) -> str:
        return _render(template, special, turns, asking)

    pair = _TALK[:2]
    before_user, between, tail = _around(render(pair), _U + "1", _A + "1")
    opening, before_answer = _around(render(_TALK[:1], asking=True), _U + "1")
    if opening != before_user:
        raise TemplateError("begins otherwise where no answer is given")
    _, earlier, middle, last, tail_2 = _around(render(_TALK[:4]), *(t for _, t in _TALK[:4]))
    if last != between or tail_2 != tail:
        raise TemplateError("writes a second answer differently from a first one")
    if not between.startswith(before_answer) or not earlier.startswith(before_answer):
        before_answer = _common(between, earlier)
    stop, before_next = _cut_stop(middle, tail, marks)
    system = _system(render, between)
    trimmed = _trims(render)
    found = ChatFormat(
        name="the tokenizer's",
        before_system=system[0] if system else None,
        after_system=system[1] if system else (),
        before_user=(before_user,),
        before_answer=(before_answer,),
        lead_in=_some(between[len(before_answer) :]),
        lead_in_earlier=_some(earlier[len(before_answer) :]),
        stop=(stop,),
        before_next=(before_next,),
        trimmed=trimmed,
    )
    _compare(found, render, _TALK)
    if system:
        _compare(found, render, [("system", _S), *_TALK])
    return found


def _find(tokenizer_file: Path) -> tuple[str | None, dict[str, str]]:
    """(the template, its special texts) beside a tokenizer.json."""
    about: Any = {}
    config = tokenizer_file.with_name("tokenizer_config.json")
    file = tokenizer_file.with_name("chat_template.jinja")
    try:
        if config.is_file():
            about = json.loads(config.read_text("utf-8"))
        template = file.read_text("utf-8") if file.is_file() else None
    except (OSError, ValueError) as error:
        raise ManifestError(f"model.tokenizer: {tokenizer_file.parent}: {error}; mend it") from None
    if not isinstance(about, dict):
        about = {}
    if template is None:
        template = about.get("chat_template")
    if isinstance(template, list):  # several, by name
        named = {t.get("name"): t.get("template") for t in template if isinstance(t, dict)}
        template = named.get("default")
    special = {}
    for key in _SPECIAL:
        value = about.get(key)
        value = value.get("content") if isinstance(value, dict) else value
        if isinstance(value, str):
            special[key] = value
    return (template if isinstance(template, str) else None), special


def _render(
    template: str, special: Mapping[str, str], turns: Sequence[tuple[Role, str]], asking: bool
) -> str:
    from jinja2 import TemplateError as JinjaError
    from transformers.utils.chat_template_utils import render_jinja_template

    if len(template) > TEMPLATE_BYTES_MAX:
        raise TemplateError(f"is longer than {TEMPLATE_BYTES_MAX} characters")
    messages = [{"role": role, "content": text} for role, text in turns]
    try:
        texts, _ = render_jinja_template(
            conversations=[messages], chat_template=template, add_generation_prompt=asking,
            **special,
        )  # fmt: skip
    except (JinjaError, ValueError, TypeError, LookupError, AttributeError) as error:
        raise TemplateError(f"fails ({' '.join(str(error).split())[:200]})") from None
    return str(texts[0])


def _around(text: str, *words: str) -> list[str]:
    """What stands before, between and after the words, each of which occurs once, in order."""
    found = []
    for word in words:
        before, there, text = text.partition(word)
        if not there:
            raise TemplateError("leaves out a turn, or changes their order")
        found.append(before)
    if any(word in text for word in words):
        raise TemplateError("repeats a turn")
    return [*found, text]


def _cut_stop(middle: str, tail: str, marks: re.Pattern[str] | None) -> tuple[str, str]:
    """(what ends every answer, what follows before the next question): up to the first mark that
    follows an answer in the middle of a talk and at its end alike."""
    a, b = _atoms(middle, marks), _atoms(tail, marks)
    common = 0
    while common < min(len(a), len(b)) and a[common] == b[common]:
        common += 1
    for index in range(common):
        if marks is not None and marks.fullmatch(a[index]):
            stop = "".join(a[: index + 1])
            return stop, middle[len(stop) :]
    stop = "".join(a[:common])
    if common < min(len(a), len(b)) and not any(
        marks is not None and marks.fullmatch(x) for x in (a[common], b[common])
    ):
        stop += _common(a[common], b[common])
    if not stop:
        raise TemplateError("has nothing that ends an answer")
    return stop, middle[len(stop) :]


def _atoms(text: str, marks: re.Pattern[str] | None) -> list[str]:
    """Marks and what lies between them."""
    if marks is None:
        return [text] if text else []
    return [part for part in re.split(f"({marks.pattern})", text) if part]


def _system(render: Any, between: str) -> tuple[Text, Text] | None:
    """(before, after) a system turn; None where the template takes none, or moves it about."""
    talk = [("system", _S), *_TALK[:4]]
    try:
        before, after, *rest = _around(render(talk), *(text for _, text in talk))
    except TemplateError:
        return None
    if _S in "".join(rest) or rest[2] != between:
        return None
    return (before,), (after,)


def _trims(render: Any) -> bool:
    padded = [(role, f"  {text}  ") for role, text in _TALK[:4]]
    text = render(padded)
    kept = [f"  {word}  " in text for _, word in _TALK[:4]]
    return not all(kept)


def _common(a: str, b: str) -> str:
    """How both begin."""
    same = takewhile(lambda pair: pair[0] == pair[1], zip(a, b, strict=False))
    return "".join(letter for letter, _ in same)


def _some(text: str) -> Text:
    return (text,) if text else ()


def _compare(found: ChatFormat, render: Any, talk: Sequence[tuple[Role, str]]) -> None:
    """Every beginning of the talk that ends with an answer, as both write it."""
    for stop in range(2, len(talk) + 1):
        if talk[stop - 1][0] != "assistant":
            continue
        turns = [Turn(role, text) for role, text in talk[:stop]]
        ours = "".join(piece.text or "" for piece in found.pieces(turns))
        if not render(talk[:stop]).startswith(ours):
            raise TemplateError("does more than put texts around turns")
