"""Streaming to the terminal: one text as it comes, several one after another, and what is counted."""

import io
from collections.abc import Generator, Sequence

import pytest
from rich.console import Console

from client.answer import logprobs_table, stream_answer
from client.grpc_client import Colrow, Piece, TokenLogprobs
from colrow.errors import Unavailable


class FakeColrow:
    def __init__(self, *pieces: Piece | BaseException) -> None:
        self._pieces: Sequence[Piece | BaseException] = pieces

    def generate(self, prompt: object, **settings: object) -> Generator[Piece, None, None]:
        for piece in self._pieces:
            if isinstance(piece, BaseException):
                raise piece
            yield piece


def fake(*pieces: Piece | BaseException) -> Colrow:
    return FakeColrow(*pieces)  # type: ignore[return-value]


def test_one_text_is_printed_as_it_is_with_a_line_end(capsys: pytest.CaptureFixture[str]) -> None:
    answer = stream_answer(
        fake(Piece("To", (1, 2)), Piece("kyo", (3,)), Piece("", (4,), "stop", 9, 4, 8)), "hi"
    )
    assert capsys.readouterr().out == "Tokyo\n"
    assert (answer.text, answer.finish_reason, answer.completion_tokens) == ("Tokyo", "stop", 4)
    assert answer.first_tokens == 2
    assert answer.summary.startswith("4 tokens in ")
    assert "(9 prompt tokens, 8 cached)" in answer.summary
    assert "tokens/s" in answer.summary


def test_several_texts_are_printed_one_after_another_though_they_come_together(
    capsys: pytest.CaptureFixture[str],
) -> None:
    answer = stream_answer(
        fake(
            Piece("b1", (1,), index=1),
            Piece("a1", (2,), index=0),
            Piece("c1", (3,), index=2),
            Piece("b2", (4,), "length", index=1),
            Piece("a2", (5,), "stop", index=0),
            Piece("c2", (6,), "stop", 7, 6, index=2),
        ),
        "hi",
        n=3,
    )
    shown = "--- 1 of 3 ---\na1a2\n--- 2 of 3 ---\nb1b2\n--- 3 of 3 ---\nc1c2\n"
    assert capsys.readouterr().out == shown
    assert answer.texts == ("a1a2", "b1b2", "c1c2")
    assert answer.finish_reason == "stop, length"
    assert (answer.prompt_tokens, answer.completion_tokens) == (7, 6)


def test_an_error_begins_on_a_line_of_its_own(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(Unavailable):
        stream_answer(fake(Piece("To", (1,)), Unavailable("gone")), "hi")
    assert capsys.readouterr().out == "To\n"


def test_an_interrupt_ends_the_answer_only_where_that_is_wanted(
    capsys: pytest.CaptureFixture[str],
) -> None:
    with pytest.raises(KeyboardInterrupt):
        stream_answer(fake(Piece("To", (1,)), KeyboardInterrupt()), "hi")
    answer = stream_answer(fake(Piece("To", (1,)), KeyboardInterrupt()), "hi", interruptible=True)
    assert answer.interrupted
    assert answer.text == "To"
    assert answer.summary.startswith("1 tokens in ")
    assert "(interrupted)" in answer.summary
    assert "prompt tokens" not in answer.summary, "nobody said how many"
    assert capsys.readouterr().out == "To\nTo\n"


def test_logprobs_are_kept_by_continuation_and_shown_with_their_texts() -> None:
    a, b = (
        TokenLogprobs(1, -0.5, 1, ((1, -0.5), (2, -1.0))),
        TokenLogprobs(2, -1.0, 2, ((1, -0.5),)),
    )
    answer = stream_answer(
        fake(
            Piece("", (1,), index=1, logprobs=(a,)),
            Piece("", (2,), "stop", index=0, logprobs=(b,)),
            Piece("", (1,), "stop", index=1, logprobs=(a,)),
        ),
        "hi",
        n=2,
    )
    assert answer.logprobs == ((b,), (a, a))
    file = io.StringIO()
    table = logprobs_table("Tokens", answer.logprobs[1], {1: "[red]\n", 2: " b"}.__getitem__)
    Console(file=file, width=120).print(table)
    shown = " ".join(file.getvalue().split())
    assert r"'[red]\n' 1 -0.5000 60.65% 1 '[red]\n' -0.500 ' b' -1.000" in shown
