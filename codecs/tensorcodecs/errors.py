"""What can be wrong with bytes that came in, and with values that should go out."""

from __future__ import annotations


class DecodeError(ValueError):
    """A payload is not a frame of this codec and length; the text says what is wrong with it."""


class EncodeError(ValueError):
    """A value can't be sent: NaN, infinite, or beyond VALUE_ABS_MAX.

    `index` is the first such value's place in what was to be encoded; `Layout.name_at` names its
    tensor.
    """

    def __init__(self, index: int, value: float) -> None:
        super().__init__(f"value {index} is {value}; only finite values up to 2**64 can be sent")
        self.index = index
        self.value = value
