"""A request inside the engine: its tokens, how far they are computed, and where its cache lies."""

import enum
from dataclasses import dataclass, field


class FinishReason(enum.Enum):
    STOP = "stop"
    LENGTH = "length"


@dataclass(frozen=True, slots=True)
class Sampling:
    """How to choose tokens, with every default resolved. `temperature` 0 is greedy, `top_k` 0 is all."""

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int = 0


@dataclass(slots=True, eq=False)
class Sequence:
    """A prompt and what was generated from it.

    The engine schedules ahead of the tokens it has read: `num_pending` tokens are sampled or about to
    be, in steps that were sent, and their ids are known only to the workers so far.
    """

    sequence_id: int
    prompt: tuple[int, ...]
    sampling: Sampling
    max_tokens: int
    stop_token_ids: frozenset[int]
    output: list[int] = field(default_factory=list)
    block_ids: list[int] = field(default_factory=list)
    num_scheduled: int = 0
    """Tokens whose keys and values are in the cache, or will be by steps that were sent."""
    num_pending: int = 0
    is_known_to_workers: bool = False
    finish_reason: FinishReason | None = None

    def __len__(self) -> int:
        """Tokens in all, those included that are still to be read."""
        return len(self.prompt) + len(self.output) + self.num_pending

    @property
    def num_unscheduled(self) -> int:
        """Tokens that a next step could compute."""
        return len(self) - self.num_scheduled

    @property
    def wants_step(self) -> bool:
        """Whether another step could give it a token it may still have."""
        return (
            self.finish_reason is None
            and len(self.output) + self.num_pending < self.max_tokens
            # One that the workers don't know is sent with its tokens, so all of them must be read.
            and (self.is_known_to_workers or self.num_pending == 0)
        )

    def append(self, token_id: int) -> None:
        """Takes a token that was pending and sees whether the sequence ends with it."""
        self.num_pending -= 1
        self.output.append(token_id)
        if token_id in self.stop_token_ids:
            self.finish_reason = FinishReason.STOP
        elif len(self.output) >= self.max_tokens:
            self.finish_reason = FinishReason.LENGTH
