"""What users send as text, on its way to token ids."""

from collections.abc import Callable
from typing import TypeVar

from colrow.errors import FailedPrecondition, InvalidArgument
from coordinator.tokenizer import ChatMessage, Tokenizer, chat_length

T = TypeVar("T")

Text = str | tuple[ChatMessage, ...]
"""A text, or a conversation."""


def need(tokenizer: Tokenizer | None) -> Tokenizer:
    """The tokenizer of the model; FailedPrecondition where it has none."""
    if tokenizer is None:
        raise FailedPrecondition(
            "the model has no tokenizer: it takes and gives token ids only", reason="NO_TOKENIZER"
        )
    return tokenizer


def encode(text: Text, tokenizer: Tokenizer | None) -> list[int]:
    """Token ids. FailedPrecondition without a tokenizer, InvalidArgument for an empty conversation."""
    if isinstance(text, str):
        return need(tokenizer).encode(text)
    if not text:
        raise InvalidArgument("chat.messages", [], "is empty")
    return need(tokenizer).encode_chat(text)


async def aside(text: Text, tokenizer: Tokenizer | None, work: Callable[[], T]) -> T:
    """`work` with a text, where others don't notice; InvalidArgument if it is too long."""
    if tokenizer is None:
        return work()
    is_chat = not isinstance(text, str)
    length = len(text) if isinstance(text, str) else chat_length(text)
    tokenizer.check_length("chat" if is_chat else "text", length)
    return await tokenizer.aside(length, work)
