"""How one sequence samples, as the coordinator says it: every default resolved."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from colrow.errors import InvalidArgument


@dataclass(frozen=True, slots=True)
class Sampling:
    """`temperature` 0 is greedy, `top_k` 0 no limit, `top_p` 1 and `min_p` 0 no cut.

    `repetition_penalty` 1, `presence_penalty` 0 and `frequency_penalty` 0 change nothing. The
    `stop_token_ids` are not sampled while the output has fewer than `min_tokens` tokens. `logprobs` and
    `prompt_logprobs` are how many of the likeliest tokens are named beside each one; None asks for no
    log-probabilities at all.
    """

    temperature: float
    top_k: int
    top_p: float
    seed: int
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    min_tokens: int = 0
    stop_token_ids: Sequence[int] = ()
    logprobs: int | None = None
    prompt_logprobs: int | None = None

    def check(self, name: str, vocab_size: int) -> None:
        """InvalidArgument for what no token could be sampled with; `name` is this field's own."""
        # Said so that NaN, which compares to nothing, is refused.
        limits = (
            ("temperature", 0 <= self.temperature < math.inf, "is not in [0, ∞)"),
            ("top_p", 0 < self.top_p <= 1, "is not in (0, 1]"),
            ("min_p", 0 <= self.min_p <= 1, "is not in [0, 1]"),
            ("repetition_penalty", 0 < self.repetition_penalty < math.inf, "is not in (0, ∞)"),
            ("presence_penalty", math.isfinite(self.presence_penalty), "is not finite"),
            ("frequency_penalty", math.isfinite(self.frequency_penalty), "is not finite"),
        )
        for field_name, holds, reason in limits:
            if not holds:
                raise InvalidArgument(f"{name}.{field_name}", getattr(self, field_name), reason)
        for token, bias in self.logit_bias.items():
            if not math.isfinite(bias):
                raise InvalidArgument(f"{name}.logit_bias[{token}]", bias, "is not finite")
        for field_name, tokens in (
            ("logit_bias", self.logit_bias),
            ("stop_token_ids", self.stop_token_ids),
        ):
            for token in tokens:
                if not 0 <= token < vocab_size:
                    raise InvalidArgument(
                        f"{name}.{field_name}", token, f"the vocabulary has {vocab_size} ids"
                    )
        for field_name in ("logprobs", "prompt_logprobs"):
            count = getattr(self, field_name)
            if count is not None and not 0 <= count <= vocab_size:
                raise InvalidArgument(
                    f"{name}.{field_name}", count, f"the vocabulary has {vocab_size} ids"
                )
