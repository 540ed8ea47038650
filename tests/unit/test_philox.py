"""The counter-based generator is NumPy's, bit for bit: texts of a seed stay what they are."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shard_worker.philox import uniforms

WORDS = st.integers(0, 2**64 - 1) | st.sampled_from([0, 1, 2**32 - 1, 2**32, 2**63, 2**64 - 1])


def of_numpy(key: tuple[int, int]) -> float:
    words = np.array(key, dtype=np.uint64)
    return np.random.Generator(np.random.Philox(key=words)).random()


@settings(deadline=None, max_examples=300)
@given(st.lists(st.tuples(WORDS, WORDS | st.integers(0, 10**5)), max_size=80))
def test_numbers_are_those_of_numpy(keys: list[tuple[int, int]]) -> None:
    assert uniforms(keys) == [of_numpy(key) for key in keys]


@pytest.mark.parametrize("count", [1, 15, 16, 17, 1000])
def test_a_key_draws_the_same_alone_and_among_others(count: int) -> None:
    keys = [(7 + place // 3, place) for place in range(count)]
    alone = [uniforms([key])[0] for key in keys]
    assert uniforms(keys) == alone
    assert len(set(alone)) == count
    assert all(0 <= number < 1 for number in alone)


def test_nobody_draws_nothing() -> None:
    assert uniforms([]) == []


EXPECTED = [
    "0x1.7a5d3204726c0p-7",
    "0x1.36da89edd58a0p-2",
    "0x1.a06ff187f343ap-1",
    "0x1.b51b3039c7c2ep-2",
    "0x1.d3a9526835edap-1",
]


def test_numbers_are_what_they_were() -> None:
    """Whatever NumPy does to its own."""
    keys = [(0, 0), (1, 0), (0, 1), (2**64 - 1, 2**64 - 1), (42, 123456)]
    assert [number.hex() for number in uniforms(4 * keys)] == 4 * EXPECTED
    assert [number.hex() for number in uniforms(keys)] == EXPECTED
