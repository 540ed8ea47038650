"""A continuation of a prompt inside the engine: its tokens, how far they are computed, its blocks."""

import enum
from dataclasses import dataclass, field

from coordinator.block_manager import BlockTable


class FinishReason(enum.Enum):
    STOP = "stop"
    LENGTH = "length"


@dataclass(frozen=True, slots=True)
class Sampling:
    """How to choose tokens, with every default resolved.

    `temperature` 0 is greedy, `top_k` 0 is all. `logit_bias` is by token id. `suppressed` tokens are not
    sampled while there are fewer than `min_tokens`. `logprobs` and `prompt_logprobs` are how many of the
    likeliest tokens to name, None for no log-probabilities at all.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: tuple[tuple[int, float], ...] = ()
    seed: int = 0
    min_tokens: int = 0
    suppressed: tuple[int, ...] = ()
    logprobs: int | None = None
    prompt_logprobs: int | None = None


@dataclass(frozen=True, slots=True)
class TokenLogprobs:
    """One token and how likely the model held it; `rank` 1 is the likeliest, `top` is best first.

    Natural logarithms of the model's own distribution, before temperature, penalties and bias.
    """

    token_id: int
    logprob: float
    rank: int
    top: tuple[tuple[int, float], ...]


@dataclass(slots=True, eq=False)
class Sequence:
    """A prompt and what was generated from it.

    The engine schedules ahead of the tokens it has read: `num_pending` of `num_tokens` are sampled or
    about to be, in steps that were sent, and their ids are known only to the workers so far.

    `rank` orders sequences: lower is served earlier and preempted later.
    """

    sequence_id: int
    prompt: tuple[int, ...]
    sampling: Sampling
    max_tokens: int
    stop_token_ids: frozenset[int]
    min_tokens: int = 0
    priority: int = 0
    output: list[int] = field(default_factory=list)
    table: BlockTable = field(default_factory=BlockTable)
    num_scheduled: int = 0
    """Tokens whose keys and values are in the cache, or will be by steps that were sent."""
    num_prefix_hits: int = 0
    """Tokens of the prompt that were in the prefix cache when the sequence was first admitted."""
    is_known_to_workers: bool = False
    was_admitted: bool = False
    finish_reason: FinishReason | None = None
    num_tokens: int = field(init=False)
    """Tokens in all, those included that are still to be read."""
    max_num_tokens: int = field(init=False)
    rank: tuple[int, int] = field(init=False)

    def __post_init__(self) -> None:
        self.num_tokens = self.num_known
        self.max_num_tokens = len(self.prompt) + self.max_tokens
        self.rank = (self.priority, self.sequence_id)

    @property
    def num_pending(self) -> int:
        """Tokens that steps which were sent sample, still to be read."""
        return self.num_tokens - self.num_known

    @property
    def num_unscheduled(self) -> int:
        """Tokens that a next step could compute."""
        return self.num_tokens - self.num_scheduled

    @property
    def known_tokens(self) -> tuple[int, ...]:
        """Prompt and output, without what is still to be read. A copy: contexts are long."""
        return self.prompt + tuple(self.output)

    @property
    def num_known(self) -> int:
        """How many `known_tokens` are."""
        return len(self.prompt) + len(self.output)

    def tokens(self, start: int, stop: int) -> tuple[int, ...]:
        """`known_tokens[start:stop]`, without the rest."""
        num_prompt = len(self.prompt)
        if stop <= num_prompt:
            return self.prompt[start:stop]
        return (*self.prompt[start:], *self.output[max(start - num_prompt, 0) : stop - num_prompt])

    @property
    def wants_step(self) -> bool:
        """Whether another step could give it a token it may still have."""
        return (
            self.finish_reason is None
            and self.num_tokens < self.max_num_tokens
            # One that the workers don't know is sent with its tokens, so all of them must be read.
            and (self.is_known_to_workers or self.num_pending == 0)
        )

    def restart(self) -> None:
        """Nothing of it is computed any more, and what was still to be read never comes."""
        self.table = BlockTable()
        self.num_scheduled = 0
        self.num_tokens = self.num_known
        self.is_known_to_workers = False

    def append(self, token_id: int) -> None:
        """Takes a token that was pending and sees whether the sequence ends with it."""
        self.output.append(token_id)
        if token_id in self.stop_token_ids and len(self.output) > self.min_tokens:
            self.finish_reason = FinishReason.STOP
        elif len(self.output) >= self.max_tokens:
            self.finish_reason = FinishReason.LENGTH
