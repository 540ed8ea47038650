"""Text on its way from the cluster to the terminal."""

import sys
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from client.grpc_client import Colrow

Prompt = str | Iterable[Mapping[str, str]]


@dataclass(frozen=True, slots=True)
class Answer:
    """Counts and times of a text that was streamed; `first_s` and `total_s` count from the call."""

    prompt_tokens: int
    completion_tokens: int
    finish_reason: str | None
    first_s: float
    total_s: float

    @property
    def summary(self) -> str:
        """One line; the rate is that of the tokens after the first."""
        line = (
            f"{self.completion_tokens} tokens in {self.total_s:.2f} s ({self.finish_reason}), "
            f"the first after {self.first_s:.2f} s ({self.prompt_tokens} prompt tokens)"
        )
        if self.completion_tokens > 1 and self.total_s > self.first_s:
            rate = (self.completion_tokens - 1) / (self.total_s - self.first_s)
            line += f", then {rate:.1f} tokens/s"
        return line


def stream_answer(colrow: Colrow, prompt: Prompt, **settings: Any) -> Answer:
    """Prints the text as it comes. `settings` are those of `Colrow.generate`."""
    started = time.monotonic()
    first: float | None = None
    piece = None
    printed = False
    try:
        for piece in colrow.generate(prompt, **settings):
            if first is None and piece.token_ids:
                first = time.monotonic()
            printed = printed or bool(piece.text)
            sys.stdout.write(piece.text)
            sys.stdout.flush()
    finally:
        if printed:  # whatever comes next, an error too, begins on a line of its own
            print(flush=True)
    ended = time.monotonic()
    return Answer(
        prompt_tokens=piece.prompt_tokens if piece else 0,
        completion_tokens=piece.completion_tokens if piece else 0,
        finish_reason=piece.finish_reason if piece else None,
        first_s=(first or ended) - started,
        total_s=ended - started,
    )
