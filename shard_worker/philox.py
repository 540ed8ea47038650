"""Philox4x64-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011), of many keys.

A counter-based generator: a key alone says what it draws, and there is no state to keep. NumPy has it
too, as an object of one key that takes many times longer to make than to draw from.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np

Words = np.ndarray[Any, np.dtype[np.uint64]]

# With fewer keys NumPy's own objects take less time.
_FEW = 16
_ROUNDS = 10
_LOW, _HALF = np.uint64(2**32 - 1), np.uint64(32)
# The paper's, for the first and the third word of the counter, and for the two words of the key.
_FACTORS = np.array([[0xD2E7470EE14C6C93], [0xCA5A826395121157]], dtype=np.uint64)
_FACTORS_LOW, _FACTORS_HIGH = _FACTORS & _LOW, _FACTORS >> _HALF
_WEYL = np.array([[0x9E3779B97F4A7C15], [0xBB67AE8584CAA73B]], dtype=np.uint64)
_STEPS = _WEYL * np.arange(_ROUNDS, dtype=np.uint64)[:, None, None]


def uniforms(keys: Sequence[tuple[int, int]]) -> list[float]:
    """The first number that each key draws, in [0, 1). A key is two words of 64 bits.

    Those of `numpy.random.Generator(numpy.random.Philox(key=key)).random()`, to the bit.
    """
    words = np.array(keys, dtype=np.uint64)
    if len(keys) < _FEW:
        return [np.random.Generator(np.random.Philox(key=key)).random() for key in words]
    # 53 bits of the first word.
    return ((_first_words(words.T) >> np.uint64(11)) * 2.0**-53).tolist()


def _first_words(keys: Words) -> Words:
    """[2, n] -> [n], the first word of each key's first block"""
    # Its counter is 1. Kept apart, [2, n] each: the first and the third word, the second and the fourth.
    even, odd = np.zeros_like(keys), np.zeros_like(keys)
    even[0] = 1
    for round_keys in keys + _STEPS:
        # What comes of one word of a pair goes to the other's place.
        even, odd = _high_product(even)[::-1] ^ odd ^ round_keys, (even * _FACTORS)[::-1]
    return even[0]


def _high_product(words: Words) -> Words:
    """The upper 64 bits of the words, [2, n], times their factors: by halves of 32 bits each"""
    low, high = words & _LOW, words >> _HALF
    middle = high * _FACTORS_LOW + (low * _FACTORS_LOW >> _HALF)
    carry = low * _FACTORS_HIGH + (middle & _LOW)
    return high * _FACTORS_HIGH + (middle >> _HALF) + (carry >> _HALF)
