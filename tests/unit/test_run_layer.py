"""RunLayer stays within what a message carries, and says so before more is computed than need be."""

import numpy as np
import pytest

from colrow.errors import AnswerTooLarge, InvalidArgument, ResourceExhausted
from coordinator import run_layer
from coordinator.families import model_spec
from coordinator.model_spec import Combine
from coordinator.shard_group import Partial
from tests.unit.test_cluster import CONFIG

SPEC = model_spec(CONFIG)
NUM_TOKENS, HIDDEN = 4, 8
TENSOR = NUM_TOKENS * HIDDEN * 4  # bytes


class Ranks:
    """Two that give as many columns as the input has, each within what it may."""

    def __init__(self) -> None:
        self.limits: list[int] = []

    async def compute_partial(self, module: str, x: np.ndarray, max_bytes: int) -> list[Partial]:
        self.limits.append(max_bytes)
        if x.nbytes > max_bytes:
            raise AnswerTooLarge(max_bytes)
        combine = Combine.REPLICATE if module.endswith("norm") else Combine.SUM
        return [Partial(rank, x, combine, ()) for rank in range(2)]

    async def run(self, max_bytes: int, module: str = "") -> run_layer.LayerRun:
        return await run_layer.run(
            SPEC,
            self.compute_partial,
            layer=0,
            module=module,
            activation=None,
            num_tokens=NUM_TOKENS,
            max_bytes=max_bytes,
        )


async def test_all_tensors_of_the_answer_count() -> None:
    # Each of the four modules has an input, two partial outputs and a whole one; then the layer has one.
    assert (await Ranks().run(17 * TENSOR)).num_bytes == 17 * TENSOR
    with pytest.raises(AnswerTooLarge, match=f"over {17 * TENSOR - 1} bytes; send fewer tokens"):
        await Ranks().run(17 * TENSOR - 1)
    assert (await Ranks().run(5 * TENSOR, "input_layernorm")).num_bytes == 5 * TENSOR
    with pytest.raises(AnswerTooLarge):
        await Ranks().run(5 * TENSOR - 1, "input_layernorm")


async def test_each_module_gets_what_those_before_it_have_left() -> None:
    ranks = Ranks()
    await ranks.run(20 * TENSOR)
    assert ranks.limits == [left * TENSOR // 3 for left in (19, 15, 11, 7)]


async def test_nothing_is_asked_for_that_could_not_be_sent() -> None:
    ranks = Ranks()
    with pytest.raises(AnswerTooLarge):
        await ranks.run(TENSOR - 1)
    assert not ranks.limits
    with pytest.raises(AnswerTooLarge, match=f"over {3 * TENSOR} bytes"):
        await ranks.run(3 * TENSOR)
    assert len(ranks.limits) == 1, "the first rank that refuses ends it, in the words of the whole"


@pytest.mark.parametrize(
    "error", [InvalidArgument("module", "x", "is none"), ResourceExhausted("no memory")]
)
async def test_other_errors_are_the_workers_own(error: Exception) -> None:
    async def refuse(module: str, x: np.ndarray, max_bytes: int) -> list[Partial]:
        raise error

    with pytest.raises(type(error)) as raised:
        await run_layer.run(SPEC, refuse, layer=0, module="", activation=None, max_bytes=2**20)
    assert raised.value is error
