"""Conversations as texts of at most T tokens.

A conversation that is longer goes over several texts: each begins at the beginning as long as that
fits, later ones lose the oldest tokens of what is only read. Every answer is learned once and
whole. One that is longer than a sample by itself can't be, and is refused.
"""

from __future__ import annotations

from peer.train.chat_format import ChatFormat
from peer.train.conversation import Example, RowError
from peer.train.samples import Piece
from peer.train.tokens import Tokenizer


class Windows:
    """Cuts conversations for one tokenizer, format and length."""

    def __init__(self, tokenizer: Tokenizer, form: ChatFormat, length: int) -> None:
        self.length = length
        self.tokenizer = tokenizer
        self.form = form
        self.fill = tokenizer.end if tokenizer.end is not None else 0

    def check(self, example: Example) -> None:
        """Raises RowError where a text holds what the tokenizer would take for control marks."""
        marks = self.tokenizer.marks
        for turn in example.turns if marks is not None else ():
            found = marks.search(turn.text) if marks is not None else None
            if found is not None:
                raise RowError(f"holds the tokenizer's control mark {found[0]!r}")

    def cut(self, example: Example) -> list[Piece]:
        """The texts of a conversation.

        Raises:
            RowError: an answer with the mark that ends it is as long as a sample, or longer.
        """
        answers, found, first = example.answers, list[Piece](), 0
        while first < len(answers):
            last = first
            text = self._text(example, answers[first:])
            if len(text.ids) <= self.length:  # nearly always
                return [*found, text]
            text = self._text(example, answers[first : first + 1])
            low, high = first, len(answers) - 1
            while low < high and len(text.ids) <= self.length:  # the most answers that fit
                last = (low + high + 1) // 2
                more = self._text(example, answers[first : last + 1])
                if len(more.ids) <= self.length:
                    low, text = last, more
                else:
                    high = last - 1
            found.append(self._shortened(text))
            first = low + 1
        return found

    def last(self, example: Example, text: str) -> Piece:
        """The conversation with `text` for its last answer, of which alone is learned.

        Raises:
            RowError: see `cut`.
        """
        return self._shortened(self._text(example.answered(text), example.answers[-1:]))

    def question(self, example: Example, room: int) -> list[int]:
        """The ids before the last answer, `room` tokens short of a sample at the most; the oldest
        are left out where there are more."""
        ids, _ = self.tokenizer.encode_pieces(self.form.pieces(example.turns[:-1]))
        keep = max(1, self.length - room)
        return ids[-keep:]

    def _text(self, example: Example, answers: list[int]) -> Piece:
        """The conversation up to the last of the answers, of which these are learned."""
        pieces = self.form.pieces(example.turns[: answers[-1] + 1], answers)
        return Piece(*self.tokenizer.encode_pieces(pieces))

    def _shortened(self, text: Piece) -> Piece:
        """Without the oldest tokens, but for the first, where there are too many; never without
        one that is learned."""
        over = len(text.ids) - self.length
        if over <= 0:
            return text
        first = list(text.learned).index(True)
        if first <= over:
            size = len(text.ids) - first
            raise RowError(
                f"has an answer of {size:,} tokens, and with something before it that is more than"
                f" a sample's {self.length:,}"
            )
        return Piece([text.ids[0], *text.ids[over + 1 :]], [False, *text.learned[over + 1 :]])
