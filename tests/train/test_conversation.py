"""Every common shape becomes the same turns, and a row without an answer says so."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from peer.train.conversation import Example, RowError, Turn, read_row

ASKED = Turn("user", "How many legs?")
TOLD = Turn("assistant", "Eight.")


@pytest.mark.parametrize(
    "row",
    [
        {"instruction": "How many legs?", "input": "", "output": "Eight."},
        {"instruction": "How many legs?", "output": "Eight."},
        {"instruction": "How many legs?", "context": None, "response": "Eight."},
        {"prompt": "How many legs?", "completion": "Eight."},
        {"question": "How many legs?", "answer": "Eight."},
        {"messages": [{"role": "user", "content": "How many legs?"},
                      {"role": "assistant", "content": "Eight."}]},
        {"messages": [{"role": "user", "content": [{"type": "text", "text": "How many "},
                                                   {"type": "text", "text": "legs?"}]},
                      {"role": "assistant", "content": "Eight."},
                      {"role": "user", "content": "never answered"}]},
        {"conversations": [{"from": "human", "value": "How many legs?"},
                           {"from": "gpt", "value": "Eight."}]},
        {"prompt": [{"role": "user", "content": "How many legs?"}],
         "completion": [{"role": "assistant", "content": "Eight."}]},
        {"prompt": [{"role": "user", "content": "How many legs?"}], "completion": "Eight."},
    ],
)  # fmt: skip
def test_every_shape_is_told_by_its_keys(row: dict[str, Any]) -> None:
    assert read_row(row) == Example((ASKED, TOLD))


def test_an_input_follows_the_instruction() -> None:
    example = read_row({"instruction": "Add.", "input": "1 + 1", "output": 2, "category": "sums"})
    assert example.turns == (Turn("user", "Add.\n\n1 + 1"), Turn("assistant", "2"))
    assert example.task == "sums"


def test_a_conversation_keeps_its_turns_and_joins_those_of_one_side() -> None:
    said = [("system", "Be kind."), ("user", "a"), ("user", "b"), ("assistant", "c"), ("user", "d"),
            ("assistant", "e")]  # fmt: skip
    example = read_row({"messages": [{"role": r, "content": t} for r, t in said]})
    assert example.turns == (
        Turn("system", "Be kind."), Turn("user", "a\n\nb"), Turn("assistant", "c"),
        Turn("user", "d"), Turn("assistant", "e"),
    )  # fmt: skip
    assert example.answers == [2, 4]
    with_text = read_row({"system": "Be kind.", "question": "a", "answer": "c"})
    assert with_text.turns[0] == Turn("system", "Be kind.")


def _messages(*said: tuple[str, Any]) -> dict[str, Any]:
    return {"messages": [{"role": role, "content": text} for role, text in said]}


@pytest.mark.parametrize(
    ("row", "words"),
    [
        ({"instruction": "x", "input": ""}, "no answer: output is missing"),
        ({"prompt": "x", "chosen": "a", "rejected": "b"}, "no answer: completion is missing"),
        ({"question": "x", "answer": None}, "no answer: answer is missing"),
        ({"question": "x", "answer": " \n"}, "an answer without text"),
        ({"question": "x", "answer": ["y"]}, "answer is no text"),
        ({"question": "x", "answer": True}, "answer is no text"),
        ({"question": None, "answer": "y"}, "question is no text"),
        ({"text": "just text"}, "has text; it needs messages"),
        ({}, "has nothing; it needs messages"),
        ([1], "no JSON object"),
        (_messages(("user", "x")), "no answer"),
        (_messages(("assistant", "x")), "an answer to nothing"),
        (_messages(("system", "s"), ("assistant", "x")), "an answer to nothing"),
        (_messages(("user", "x"), ("tool", "y")), "turn 2 of messages is of the role 'tool'"),
        (_messages(("user", "x"), ("system", "s"), ("assistant", "y")), "system turn after"),
        (_messages(("user", [{"type": "image"}]), ("assistant", "y")), "more than text"),
        ({"messages": []}, "list of turns"),
        ({"messages": "x"}, "list of turns"),
        ({"messages": ["x"]}, "turn 1 of messages is no JSON object"),
        ({"messages": [{"role": "user", "content": "x"}] * 1025}, "1025 turns"),
        ({"messages": [{"role": "assistant", "content": None, "tool_calls": [1]}]}, "calls a tool"),
        ({"question": "x", "choices": ["a", "b"]}, "no answer: answer is missing"),
        ({"question": "x", "choices": ["a", "b"], "answer": "c"}, "'c' is none of its choices"),
        ({"question": "x", "choices": ["a", "b"], "answer": 2}, "'2' is none of its choices"),
        ({"question": "x", "choices": ["a", "a"], "answer": 0}, "different texts"),
        ({"question": "x", "choices": ["a"], "answer": 0}, "2 to 64"),
        ({"prompt": "x", "completion": "c", "choices": ["a", "b"]}, "none of its choices"),
    ],
)  # fmt: skip
def test_what_cannot_be_learned_from_says_why(row: object, words: str) -> None:
    with pytest.raises(RowError, match=words):
        read_row(row)


@pytest.mark.parametrize(
    "row",
    [
        {"choices": ["six", "eight"], "answer": 1},
        {"choices": ["six", "eight"], "answer": "B"},
        {"choices": ["six", "eight"], "answer": "eight"},
        {"choices": {"text": ["six", "eight"], "label": ["1", "2"]}, "answerKey": "2"},
    ],
)
def test_the_right_choice_is_a_number_a_label_or_itself(row: dict[str, Any]) -> None:
    example = read_row({"question": "How many?", **row})
    assert (example.choices, example.right) == (("six", "eight"), 1)
    assert example.turns[-1] == Turn("assistant", "eight")
    assert example.answered("six").turns == (Turn("user", "How many?"), Turn("assistant", "six"))


def test_a_question_has_one_place_in_the_split_whatever_its_answer_and_its_shape() -> None:
    one = read_row({"question": "x", "answer": "y"})
    other = read_row({"messages": [{"role": "user", "content": "x"},
                                   {"role": "assistant", "content": "z"},
                                   {"role": "user", "content": "more"},
                                   {"role": "assistant", "content": "w"}]})  # fmt: skip
    assert one.fraction() == other.fraction() == pytest.approx(0.7756, abs=1e-4)
    assert one.fraction() != read_row({"question": "x ", "answer": "y"}).fraction()
    placed = [read_row({"question": str(n), "answer": "y"}).fraction() for n in range(2000)]
    assert sum(at < 0.1 for at in placed) == pytest.approx(200, abs=45)


def test_lone_surrogates_and_control_characters_do_no_harm() -> None:
    example = read_row({"question": "\ud800", "answer": "\udfff y", "task": "a\x1b[2Jb"})
    assert example.turns[0].text == "?"
    assert example.task == "a?[2Jb"
    example.fraction()


JUNK = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(
        st.sampled_from(["role", "from", "content", "value", "text", "label", "x"]), inner,
        max_size=3,
    ),
    max_leaves=12,
)  # fmt: skip
KEYS = ["messages", "conversations", "instruction", "input", "output", "prompt", "completion",
        "question", "answer", "choices", "answerKey", "label", "system", "task",
        "\x1b[2J"]  # fmt: skip


@given(st.dictionaries(st.sampled_from(KEYS), JUNK, max_size=5) | JUNK)
@settings(max_examples=1000, deadline=None)
def test_whatever_a_row_is_it_is_a_conversation_or_refused_in_printable_words(row: object) -> None:
    try:
        example = read_row(row)
    except RowError as error:
        said = str(error)
    else:
        said = example.turns[-1].role
        assert 0 <= example.fraction() < 1
    assert said.isprintable()
