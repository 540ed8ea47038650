"""What a user may ask for, the workers can do: one refusal of theirs would end a step of everybody."""

import itertools
import math
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from colrow.errors import InvalidArgument
from coordinator.convert import workers
from coordinator.request import (
    MAX_BIAS,
    MAX_LOGPROBS,
    MAX_PENALTY,
    MAX_REPETITION_PENALTY,
    MAX_SEED,
    MAX_TEMPERATURE,
    ModelLimits,
    Request,
    SamplingRequest,
)
from coordinator.scheduler import NewSequence, Step
from coordinator.sequence import Sequence
from shard_worker import convert as worker_convert
from shard_worker.sampling import Sampling

CONTEXT = 32
LIMITS = ModelLimits(
    vocab_size=50, context_length=CONTEXT, eos_token_ids=(7, 50, 10**6), cache_tokens=128
)


def sent(request: Request, limits: ModelLimits) -> list[Sampling]:
    """How each continuation samples, as a worker reads it off the wire."""
    new = tuple(
        NewSequence(Sequence(index, request.prompt, sampling, 1, frozenset()), request.prompt, ())
        for index, sampling in enumerate(request.samplings(limits))
    )
    message = workers.step_request(1, Step(1, (), new, ()))
    read = type(message).FromString(message.SerializeToString())
    return [sequence.sampling for sequence in worker_convert.step(read).new_sequences]


def numbers(least: float, most: float) -> st.SearchStrategy[float]:
    """Mostly within a range, and at its borders as close as float64 comes to them, and beyond."""
    near = [math.nextafter(at, way) for at in (least, 0.0, most) for way in (-math.inf, math.inf)]
    tiny = st.floats(-1e-30, 1e-30)
    return st.floats(least, most) | tiny | st.sampled_from([*near, least, most, math.nan, math.inf])


SAMPLINGS = st.fixed_dictionaries(
    {},
    optional={
        "temperature": numbers(0, MAX_TEMPERATURE),
        "top_k": st.integers(-1, 2**32),
        "top_p": numbers(0, 1),
        "min_p": numbers(0, 1),
        "repetition_penalty": numbers(0, MAX_REPETITION_PENALTY),
        "presence_penalty": numbers(-MAX_PENALTY, MAX_PENALTY),
        "frequency_penalty": numbers(-MAX_PENALTY, MAX_PENALTY),
        "logit_bias": st.dictionaries(
            st.integers(-1, 60), numbers(-MAX_BIAS, MAX_BIAS), max_size=3
        ),
        "seed": st.integers(-1, MAX_SEED + 1),
    },
)
REQUESTS = st.fixed_dictionaries(
    {"prompt": st.lists(st.integers(-1, 50), max_size=4).map(tuple)},
    optional={
        "max_tokens": st.integers(-1, CONTEXT + 1),
        "min_tokens": st.integers(-1, CONTEXT + 1),
        "ignore_eos": st.booleans(),
        "stop_token_ids": st.lists(st.integers(-1, 50), max_size=3).map(tuple),
        "n": st.integers(0, 4),
        "logprobs": st.integers(-1, MAX_LOGPROBS + 1),
        "prompt_logprobs": st.integers(-1, MAX_LOGPROBS + 1),
        "priority": st.integers(-1, 1),
    },
)
VOCAB_SIZES = st.integers(1, 120)


@settings(deadline=None, max_examples=1000)
@given(sampling=SAMPLINGS, asked=REQUESTS, vocab_size=VOCAB_SIZES)
def test_what_the_coordinator_accepts_the_workers_accept(
    sampling: dict[str, Any], asked: dict[str, Any], vocab_size: int
) -> None:
    limits = replace(LIMITS, vocab_size=vocab_size)
    try:
        request = Request("r", sampling=SamplingRequest(**sampling), **asked)
        request.check(limits)
    except InvalidArgument:
        return
    for read in sent(request, limits):
        read.check("sampling", vocab_size)


WITHIN = [
    *({"sampling": SamplingRequest(top_p=p)} for p in (5e-324, 1e-50, 2.0**-150, 2.0**-149, 1e-9)),
    *({"sampling": SamplingRequest(repetition_penalty=p)} for p in (5e-324, 1e-50, 1e-40)),
    {"min_tokens": 2},
    {"min_tokens": 2, "stop_token_ids": (49,)},
    {"logprobs": 50, "prompt_logprobs": 50},
    {"max_tokens": 0, "prompt_logprobs": 50},
]


@pytest.mark.parametrize("asked", WITHIN)
def test_the_edges_of_what_is_accepted_are_served(asked: dict[str, Any]) -> None:
    request = Request("r", (1, 2), **asked)
    request.check(LIMITS)
    for read in sent(request, LIMITS):
        read.check("sampling", LIMITS.vocab_size)


def test_a_number_too_small_for_the_wire_keeps_its_meaning() -> None:
    """A tiny top-p is one that keeps the likeliest token alone; 0 would be none."""
    sampling = SamplingRequest(top_p=1e-50, repetition_penalty=1e-50)
    (read,) = sent(Request("r", (1, 2), sampling=sampling), LIMITS)
    assert 0 < read.top_p < 1e-30
    assert 0 < read.repetition_penalty < 1e-30


def test_only_ends_that_the_vocabulary_has_are_put_off() -> None:
    request = Request("r", (1, 2), min_tokens=2, stop_token_ids=(9,))
    assert request.stop_ids(LIMITS) == {7, 9}
    (read,) = sent(request, LIMITS)
    assert set(read.stop_token_ids) == {7, 9}


@pytest.mark.parametrize(
    ("name", "vocab_size"), [*itertools.product(("logprobs", "prompt_logprobs"), (1, 99))]
)
def test_more_likely_tokens_than_there_are_is_refused_by_name(name: str, vocab_size: int) -> None:
    limits = replace(LIMITS, vocab_size=vocab_size)
    request = Request("r", (0,), **{name: vocab_size + 1})  # type: ignore[arg-type]
    message = rf"^{name} = {vocab_size + 1}: the vocabulary has {vocab_size} ids$"
    with pytest.raises(InvalidArgument, match=message):
        request.check(limits)
