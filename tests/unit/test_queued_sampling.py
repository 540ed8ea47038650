"""Sampling asks nothing of the device: a GPU can be given a step before it has done the one before.

Tensors of the meta device have no numbers, so whatever would wait for one fails. What copies from the
host would wait too, unless its memory is pinned.
"""

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

from shard_worker.sampler import Draw, Sampler
from shard_worker.sampling import Sampling
from shard_worker.tensor_parallel import TensorParallel
from shard_worker.transfer import to_device
from tests.unit.thread_ranks import run_ranks

META = torch.device("meta")


FACTORIES = (torch.empty, torch.zeros, torch.full, torch.arange)


class Queue(TorchFunctionMode):
    """The meta device as a GPU whose stream is only added to. AssertionError where a copy would wait."""

    def __init__(self) -> None:
        super().__init__()
        self._pinned: list[Tensor] = []

    def __torch_function__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        given = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
        if func is Tensor.pin_memory:  # which takes a GPU
            self._pinned += given
            return given[0]
        result = func(*args, **kwargs)
        on_device = [x for x in (*given, result) if isinstance(x, Tensor) and x.is_meta]
        from_host: list[Any] = [x for x in given if not x.is_meta]
        if func in (Tensor.__getitem__, Tensor.__setitem__):
            index = args[1] if isinstance(args[1], tuple) else (args[1],)
            from_host += [x for x in index if isinstance(x, list)]
        elif func is Tensor.new_tensor or (not given and func not in FACTORIES):
            from_host += args  # numbers that become a tensor
        if on_device and from_host:
            pinned = [x for x in from_host if any(x is y for y in self._pinned)]
            assert len(pinned) == len(from_host), f"{func.__name__} copies from memory not pinned"
            assert kwargs.get("non_blocking"), f"{func.__name__} waits for its copy"
        return result


def sampling(temperature: float = 0.8, **fields: Any) -> Sampling:
    return Sampling(**{"temperature": temperature, "top_k": 0, "top_p": 1.0, "seed": 7} | fields)


GREEDY = sampling(0.0)
WAYS = [
    sampling(),
    sampling(top_k=5),
    sampling(top_k=200),
    sampling(top_p=0.9),
    sampling(min_p=0.1),
    sampling(top_k=100, top_p=0.9, min_p=0.01),
]


@pytest.mark.parametrize("num_ranks", [1, 2])
@pytest.mark.parametrize(
    "ways",
    [[GREEDY], *([way] * 2 for way in WAYS), WAYS, [*WAYS, GREEDY], [GREEDY, sampling(top_p=0.5)]],
    ids=lambda ways: f"{len(ways)} rows",
)
def test_no_way_of_sampling_waits(ways: list[Sampling], num_ranks: int) -> None:
    def one(tp: TensorParallel) -> Tensor:
        sampler = Sampler(tp, [300] * num_ranks, 300 * tp.rank, META)
        logits = torch.empty(len(ways), 300, device=META)
        draws = [Draw(way, 3, sampler.adjustment(way, (1, 2, 3), 3)) for way in ways]
        with Queue():
            return sampler(logits, draws)

    for tokens in run_ranks(num_ranks, one):
        assert (tokens.device, tokens.dtype, tokens.shape) == (META, torch.int64, (len(ways),))


@pytest.mark.parametrize(
    "wait",
    [
        lambda x: x[0].item(),
        lambda x: x.tolist(),
        lambda x: bool(x.any()),
        lambda x: float(x[0]),
        lambda x: x.cpu(),
        lambda x: x.nonzero(),
        lambda x: x[x > 0],
        lambda x: x[[0, 1]],
        lambda x: x.__setitem__([0, 1], 1.0),
        lambda x: x[torch.tensor([0, 1])],
        lambda x: x.new_tensor([1.0]),
        lambda x: torch.tensor([1.0], device=x.device),
        lambda x: torch.tensor([1.0]).to(x.device, non_blocking=True),
        lambda x: torch.tensor([1.0]).pin_memory().to(x.device),
        lambda x: x.repeat_interleave(x.long()),
    ],
)
def test_what_would_wait_is_noticed(wait: Callable[[Tensor], Any]) -> None:
    x = torch.empty(4, device=META)
    with Queue():
        to_device([0, 1], META)
        with pytest.raises((AssertionError, RuntimeError, NotImplementedError)):
            wait(x)
