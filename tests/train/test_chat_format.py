"""What a chat template does is read off it, and then written by us alike."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from peer.errors import ManifestError
from peer.train.chat_format import FILE_BYTES_MAX, ChatFormat, format_beside, plain
from peer.train.conversation import Turn
from peer.train.template import TemplateError, derive, format_of
from peer.train.tokens import ByteTokenizer, FileTokenizer
from tests.train.chat_tiny import CHATML, tokenizer

SPECIAL = {"bos_token": "<s>", "eos_token": "</s>"}
TALK = [
    Turn("user", "One?"),
    Turn("assistant", "1."),
    Turn("user", "Two?"),
    Turn("assistant", "2."),
]
SYSTEM = Turn("system", "Count.")

# In the manner of well-known models' templates: each does something that others don't.
DEFAULT_SYSTEM = (
    "{% if messages[0]['role'] != 'system' %}<|im_start|>system\nYou help.<|im_end|>\n{% endif %}"
    + CHATML
)
HEADERS = (
    "{{ bos_token }}{% for m in messages %}<|h|>{{ m.role }}<|/h|>\n\n{{ m.content | trim }}<|eot|>"
    "{% endfor %}{% if add_generation_prompt %}<|h|>assistant<|/h|>\n\n{% endif %}"
)
NO_SYSTEM = (
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'system' %}"
    "{{ raise_exception('no system role') }}{% endif %}<turn>"
    "{{ 'model' if m.role == 'assistant' else m.role }}\n{{ m.content | trim }}<eot>\n{% endfor %}"
    "{% if add_generation_prompt %}<turn>model\n{% endif %}"
)
INSTRUCT = (
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}[INST] {{ m.content }} [/INST]"
    "{% elif m.role == 'assistant' %} {{ m.content }}{{ eos_token }}{% endif %}{% endfor %}"
)
SYSTEM_LAST = (
    "{% set ns = namespace(s='') %}{% for m in messages %}{% if m.role == 'system' %}"
    "{% set ns.s = m.content %}{% elif m.role == 'user' %}[INST]"
    "{% if loop.index0 >= messages|length - 2 and ns.s %}{{ ns.s }}\n\n{% endif %}"
    "{{ m.content }}[/INST]{% else %}{{ m.content }}</s>"
    "{% endif %}{% endfor %}"
)
THINKING = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m.role == 'assistant' and loop.last %}"
    "<think>\n\n</think>\n\n{% endif %}{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
TAILED = (
    "{% for m in messages %}<|{{ m.role }}|>\n{{ m.content }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% else %}{{ eos_token }}{% endif %}"
)
MARKED = ("<|im_start|>", "<|im_end|>", "<s>", "</s>", "<|h|>", "<|/h|>", "<|eot|>", "<turn>",
          "<eot>", "<|user|>", "<|assistant|>", "<|system|>", "<|end|>")  # fmt: skip


@pytest.fixture(scope="module")
def marked(tmp_path_factory: pytest.TempPathFactory) -> FileTokenizer:
    return tokenizer(tmp_path_factory.mktemp("tokenizer"), marks=MARKED)


def _text(form: ChatFormat, turns: list[Turn]) -> str:
    return "".join(piece.text or "" for piece in form.pieces(turns))


def _learned(form: ChatFormat, turns: list[Turn]) -> list[str]:
    return [piece.text or "" for piece in form.pieces(turns) if piece.learned]


def _rendered(template: str, turns: list[Turn], asking: bool = False) -> str:
    from transformers.utils.chat_template_utils import render_jinja_template

    said = [{"role": turn.role, "content": turn.text} for turn in turns]
    (text,), _ = render_jinja_template(
        conversations=[said], chat_template=template, add_generation_prompt=asking, **SPECIAL
    )
    return str(text)


@pytest.mark.parametrize(
    ("template", "stop", "system"),
    [
        (CHATML, "<|im_end|>", True),
        (DEFAULT_SYSTEM, "<|im_end|>", True),
        (HEADERS, "<|eot|>", True),
        (NO_SYSTEM, "<eot>", False),
        (INSTRUCT, "</s>", False),
        (SYSTEM_LAST, "</s>", False),
        (THINKING, "<|im_end|>", True),
        (TAILED, "<|end|>", True),
    ],
)
def test_a_template_is_read_off(
    template: str, stop: str, system: bool, marked: FileTokenizer
) -> None:
    form = derive(template, SPECIAL, marked.marks)
    for turns in (TALK[:2], TALK, *([[SYSTEM, *TALK]] if system else [])):
        assert _rendered(template, turns).startswith(_text(form, turns))
        assert _learned(form, turns)[-1] == stop
        asked = turns[:-1]
        assert _text(form, asked) == _rendered(template, asked, asking=True)
    assert (form.before_system is not None) == system
    if not system:
        merged = _text(form, [SYSTEM, *TALK])
        assert merged == _text(form, [Turn("user", "Count.\n\nOne?"), *TALK[1:]])
    assert ChatFormat.from_json(form.to_json(), "x") == form


def test_an_answer_is_learned_with_what_leads_in_and_ends_it(marked: FileTokenizer) -> None:
    form = derive(THINKING, SPECIAL, marked.marks)
    assert _learned(form, TALK) == [
        "1.",
        "<|im_end|>",
        "<think>\n\n</think>\n\n",
        "2.",
        "<|im_end|>",
    ]
    assert [p.text for p in form.pieces(TALK, [3]) if p.learned][-2:] == ["2.", "<|im_end|>"]
    assert "1." not in [p.text for p in form.pieces(TALK, [3]) if p.learned]
    spaced = derive(INSTRUCT, SPECIAL, marked.marks)
    assert _learned(spaced, TALK[:2]) == [" ", "1.", "</s>"], "asked, it sees no blank"


def test_trimmed_turns_are_trimmed(marked: FileTokenizer) -> None:
    padded = [Turn("user", "  One? \n"), Turn("assistant", "\n1. ")]
    assert derive(HEADERS, SPECIAL, marked.marks).trimmed
    for template in (HEADERS, CHATML):
        form = derive(template, SPECIAL, marked.marks)
        assert _rendered(template, padded).startswith(_text(form, padded))


@pytest.mark.parametrize(
    ("template", "words"),
    [
        ("{% for m in messages %}{{ m.role }}{% endfor %}", "leaves out a turn"),
        ("{% for m in messages %}{{ m.content }}{{ m.content }}\n{% endfor %}",
         "leaves out|repeats"),
        ("{% for m in messages %}[{{ loop.index }}]{{ m.content }}</s>{% endfor %}",
         "differently|more than"),
        ("{% for m in messages %}{{ m.content }}{% endfor %}", "nothing that ends an answer"),
        ("{{ messages | length }}{% for m in messages %}[{{ m.content }}]{% endfor %}",
         "begins|more"),
        ("{{ nonsense( }}", "fails"),
        ("{{ raise_exception('never') }}", r"fails \(never"),
        ("x" * (2**18 + 1), "longer than"),
    ],
)  # fmt: skip
def test_a_template_that_does_more_is_refused(
    template: str, words: str, marked: FileTokenizer
) -> None:
    with pytest.raises(TemplateError, match=words):
        derive(template, SPECIAL, marked.marks)


def test_a_folder_says_how_it_writes(tmp_path: Path) -> None:
    bare = tokenizer(tmp_path / "bare")
    assert format_of(tmp_path / "bare/tokenizer.json", bare) == plain(bare)
    for name, place in (
        ("file", {"template": CHATML}), ("field", {"chat_template": CHATML}),
        ("list", {"chat_template": [{"name": "tool_use", "template": "x"},
                                    {"name": "default", "template": CHATML}]}),
    ):  # fmt: skip
        made = tokenizer(tmp_path / name, **place)
        assert format_of(tmp_path / name / "tokenizer.json", made).stop == ("<|im_end|>",), name
    own = plain(bare)
    (tmp_path / "file/chat_format.json").write_bytes(own.to_json())
    assert format_of(tmp_path / "file/tokenizer.json", bare) == own, "the owner's word comes first"
    (tmp_path / "field/tokenizer_config.json").write_text('{"chat_template": "{{ oh( }}"}')
    with pytest.raises(ManifestError, match=r"chat template beside .* fails .*chat_format\.json"):
        format_of(tmp_path / "field/tokenizer.json", bare)
    (tmp_path / "field/tokenizer_config.json").write_text("{")
    with pytest.raises(ManifestError, match="mend it"):
        format_of(tmp_path / "field/tokenizer.json", bare)


def _broken(**changes: Any) -> bytes:
    return json.dumps({**json.loads(plain(ByteTokenizer()).to_json()), **changes}).encode()


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (b"{", "Expecting"),
        (b"[]", "no JSON object"),
        (b"{}", "is missing"),
        (_broken(extra=1), "unknown key 'extra'"),
        (_broken(stop="x"), "stop must be a list"),
        (_broken(stop=[1]), "stop must be a list"),
        (_broken(stop=["x"] * 17), "stop must be a list"),
        (_broken(before_user=None), "before_user must be"),
        (_broken(trimmed=1), "trimmed must be true"),
        (_broken(name="\x1b"), "name must be"),
        (_broken(stop=["x" * FILE_BYTES_MAX]), "more than"),
        (b"[" * 60_000, "no chat format"),
        (b"\xff", "no chat format"),
    ],
)
def test_a_strangers_format_is_looked_over(tmp_path: Path, data: bytes, words: str) -> None:
    (tmp_path / "chat_format.json").write_bytes(data)
    with pytest.raises(ManifestError, match=words):
        format_beside(tmp_path / "tokenizer.json")


def test_a_joiner_executes_no_template(tmp_path: Path) -> None:
    tokenizer(tmp_path, "{{ cycler.__init__.__globals__ }}")
    assert format_beside(tmp_path / "tokenizer.json") is None


# ── through tokenizers ───────────────────────────────────────────────────────────────────
def test_the_plain_format_in_bytes() -> None:
    bytes_ = ByteTokenizer()
    ids, learned = bytes_.encode_pieces(plain(bytes_).pieces(TALK))
    assert ids[0] == ids[-1] == 256
    assert bytes_.decode(ids) == (
        "### User:\nOne?\n\n### Assistant:\n1.\n\n### User:\nTwo?\n\n### Assistant:\n2."
    )
    told = [i for i, learn in zip(ids, learned, strict=True) if learn]
    assert told == [*b"1.", 256, *b"2.", 256]
    asked, _ = bytes_.encode_pieces(plain(bytes_).pieces(TALK[:1]))
    assert ids[: len(asked)] == asked


def test_ids_are_those_of_the_whole_text_and_learned_where_they_should(
    marked: FileTokenizer,
) -> None:
    form = derive(CHATML, SPECIAL, marked.marks)
    talk = [Turn("user", "How many? 漢😀"), Turn("assistant", "eight 😀 legs")]
    ids, learned = marked.encode_pieces(form.pieces(talk))
    assert ids == marked.encode(_text(form, talk))
    told = [i for i, learn in zip(ids, learned, strict=True) if learn]
    stop = marked.encode("<|im_end|>")
    assert told == [*marked.encode("eight 😀 legs"), *stop]
    assert len(stop) == 1


def test_a_token_that_holds_any_of_an_answer_is_learned(tmp_path: Path) -> None:
    made = tokenizer(tmp_path)
    ids, learned = made.encode_pieces(
        plain(made).pieces([Turn("user", "x"), Turn("assistant", "y")])
    )
    assert made.marks is not None
    assert ids[0] == ids[-1] == made.end
    assert learned[-2:] == [True, True]
    assert not any(learned[:-2])
