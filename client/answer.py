"""Text on its way from the cluster to the terminal."""

import contextlib
import math
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Unpack

from rich.markup import escape
from rich.table import Table

from client.grpc_client import Colrow, Piece, Prompt, Settings, TokenLogprobs
from client.views import new_table

INTERRUPTED = "interrupted"


@dataclass(frozen=True, slots=True)
class Answer:
    """A text that was streamed, its counts and its times.

    `first_s` and `last_s`, of the first and the last piece with tokens, count from the call, as
    `total_s` does. With several continuations `texts`, `finish_reasons` and `logprobs` have one entry
    each and counts are of all together. Prompt tokens are not known of an answer that was interrupted.
    """

    texts: tuple[str, ...]
    finish_reasons: tuple[str, ...]
    logprobs: tuple[tuple[TokenLogprobs, ...], ...]
    prompt_tokens: int
    cached_prompt_tokens: int
    completion_tokens: int
    first_tokens: int
    first_s: float
    last_s: float
    total_s: float

    @property
    def text(self) -> str:
        return self.texts[0]

    @property
    def finish_reason(self) -> str:
        return ", ".join(dict.fromkeys(self.finish_reasons))

    @property
    def interrupted(self) -> bool:
        return INTERRUPTED in self.finish_reasons

    @property
    def tokens_per_s(self) -> float | None:
        """Of the tokens after those that came first; None where there are none."""
        later = self.completion_tokens - self.first_tokens
        return (
            later / (self.last_s - self.first_s) if later and self.last_s > self.first_s else None
        )

    @property
    def summary(self) -> str:
        """One line."""
        line = f"{self.completion_tokens} tokens in {self.total_s:.2f} s ({self.finish_reason})"
        if self.completion_tokens:
            line += f", the first after {self.first_s:.2f} s"
        if self.prompt_tokens:
            cached = f", {self.cached_prompt_tokens} cached" if self.cached_prompt_tokens else ""
            line += f" ({self.prompt_tokens} prompt tokens{cached})"
        if self.tokens_per_s is not None:
            line += f", then {self.tokens_per_s:.1f} tokens/s"
        return line


def stream_answer(
    colrow: Colrow, prompt: Prompt, *, interruptible: bool = False, **settings: Unpack[Settings]
) -> Answer:
    """Prints the text as it comes; several continuations one after another.

    Where `interruptible`, Ctrl-C ends the answer, and what came until then is returned.
    """
    n = settings.get("n") or 1
    printer = _Printer(n)
    pieces: list[Piece] = []
    started = time.monotonic()
    token_times: list[float] = []
    with printer, contextlib.closing(colrow.generate(prompt, **settings)) as stream:
        try:
            for piece in stream:
                if piece.token_ids:
                    token_times.append(time.monotonic())
                pieces.append(piece)
                printer.take(piece)
        except KeyboardInterrupt:
            if not interruptible:
                raise
    ended = time.monotonic()
    last = pieces[-1] if pieces else Piece("", ())
    reasons = {piece.index: piece.finish_reason for piece in pieces}
    return Answer(
        texts=tuple(printer.texts),
        finish_reasons=tuple(reasons.get(index) or INTERRUPTED for index in range(n)),
        logprobs=tuple(
            tuple(item for piece in pieces if piece.index == index for item in piece.logprobs)
            for index in range(n)
        ),
        prompt_tokens=last.prompt_tokens,
        cached_prompt_tokens=last.cached_prompt_tokens,
        completion_tokens=sum(len(piece.token_ids) for piece in pieces),
        first_tokens=next((len(piece.token_ids) for piece in pieces if piece.token_ids), 0),
        first_s=(token_times[0] if token_times else ended) - started,
        last_s=(token_times[-1] if token_times else ended) - started,
        total_s=ended - started,
    )


class _Printer:
    """Shows the first continuation that has not ended as it comes, and keeps the others for later."""

    def __init__(self, n: int) -> None:
        self.texts = [""] * n
        self._ended = [False] * n
        self._current = 0
        self._line_open = False

    def __enter__(self) -> "_Printer":
        self._title()
        return self

    def __exit__(self, *details: object) -> None:
        # Whatever comes next, an error too, begins on a line of its own.
        self._end_line()

    def take(self, piece: Piece) -> None:
        self.texts[piece.index] += piece.text
        self._ended[piece.index] = piece.finish_reason is not None
        if piece.index == self._current:
            self._write(piece.text)
        while self._ended[self._current] and self._current + 1 < len(self.texts):
            self._end_line()
            self._current += 1
            self._title()
            self._write(self.texts[self._current])

    def _title(self) -> None:
        if len(self.texts) > 1:
            self._write(f"--- {self._current + 1} of {len(self.texts)} ---")
            self._end_line()

    def _write(self, text: str) -> None:
        sys.stdout.write(text)
        sys.stdout.flush()
        self._line_open = self._line_open or bool(text)

    def _end_line(self) -> None:
        if self._line_open:
            self._write("\n")
        self._line_open = False


def logprobs_table(
    title: str, logprobs: tuple[TokenLogprobs, ...], text_of: Callable[[int], str]
) -> Table:
    """How likely the model held each token, and what it held likeliest instead."""

    def shown(token_id: int) -> str:
        return escape(repr(text_of(token_id)))

    table = new_table(title, "token")
    for column in ("id", "log-probability", "probability", "rank"):
        table.add_column(column, justify="right")
    has_top = any(item.top for item in logprobs)
    if has_top:
        table.add_column("likeliest")
    for item in logprobs:
        top = "  ".join(f"{shown(token)} {logprob:.3f}" for token, logprob in item.top)
        table.add_row(
            shown(item.token_id),
            str(item.token_id),
            f"{item.logprob:.4f}",
            f"{math.exp(item.logprob):.2%}",
            str(item.rank),
            *((top,) if has_top else ()),
        )
    return table
