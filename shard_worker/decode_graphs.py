"""Whole decode steps as CUDA graphs: from the last tokens to the next, one launch a step.

A graph replays fixed kernels on fixed memory. So there is one for each batch size of a few (`_BUCKETS`),
a step takes the next larger one, and its inputs are copied to where that graph reads them. The rows that
are left over have no context and write nothing that counts. A graph is captured when it is first needed.
"""

import logging
import time
from bisect import bisect_left
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from shard_worker.forward_batch import DecodeSpan, ForwardBatch
from shard_worker.kv_cache import KvCache

log = logging.getLogger(__name__)

_BUCKETS = (1, 2, 4, 8, *range(16, 257, 16))
_STAGES = 4  # more than steps that are in flight

# The rows of the inputs, each of one number a sequence; below them its block table, a row a block.
_ROW, _POSITION, _SLOT, _LENGTH, _TABLE = range(5)


@dataclass(frozen=True, slots=True)
class DecodeInputs:
    """A decode step's inputs, int32 [4 + blocks, num_sequences] in host memory.

    Of each sequence: where its last token is, that token's position and cache slot, the length of its
    context with it, and the blocks of that context.
    """

    array: np.ndarray

    @classmethod
    def empty(cls, num_sequences: int, num_blocks: int) -> "DecodeInputs":
        return cls(np.zeros((_TABLE + num_blocks, num_sequences), dtype=np.int32))

    def put(self, column: int, *, row: int, position: int, slot: int, block_ids: object) -> None:
        """One sequence. `block_ids` may be fewer than there are rows."""
        array = self.array
        array[:_TABLE, column] = (row, position, slot, position + 1)
        count = len(block_ids)  # type: ignore[arg-type]
        array[_TABLE : _TABLE + count, column] = block_ids


@dataclass(slots=True)
class _Graph:
    graph: torch.cuda.CUDAGraph
    inputs: Tensor  # int32 [4 + most blocks, bucket]
    logits: Tensor
    tokens: Tensor


@dataclass(slots=True)
class _Stage:
    """Host memory that a copy to the device reads from, and when it has done so."""

    memory: Tensor
    copied: torch.cuda.Event


Forward = Callable[[ForwardBatch], Tensor]
"""Tokens of the batch -> float32 logits [num_tokens, vocabulary of this rank]"""
Greedy = Callable[[Tensor], Tensor]
"""Logits -> int64 [num_tokens]"""


class DecodeGraphs:
    """Runs decode steps of up to `max_sequences` sequences of up to `max_blocks` blocks.

    `last_tokens` is where sampled tokens stay, int64 [rows + 1]; the last one is for rows that pad.
    """

    def __init__(
        self,
        forward: Forward,
        greedy: Greedy,
        kv_cache: KvCache,
        last_tokens: Tensor,
        *,
        max_blocks: int,
    ) -> None:
        self.max_sequences = _BUCKETS[-1]
        self.max_blocks = max_blocks
        self._forward, self._greedy = forward, greedy
        self._kv_cache = kv_cache
        self._last_tokens = last_tokens
        self._graphs: dict[int, _Graph] = {}
        self._pool: Any = None
        self._stages: list[_Stage] = []
        self._next_stage = 0

    def run(self, inputs: DecodeInputs) -> tuple[Tensor, Tensor]:
        """Queues a step -> its logits [n, vocabulary of this rank], which the next one overwrites, and
        the likeliest tokens, int64 [n], which are now in `last_tokens`."""
        height, count = inputs.array.shape
        bucket = _BUCKETS[bisect_left(_BUCKETS, count)]
        graph = self._graphs.get(bucket)
        if graph is None:
            graph = self._graphs[bucket] = self._capture(bucket)
        # The rows that pad: no context, no slot, and a place of their own for a token.
        stage = self._stage()
        staged = stage.memory[: height * bucket].view(height, bucket)
        array = staged.numpy()
        array[:, :count] = inputs.array
        array[:, count:] = 0
        array[_ROW, count:] = len(self._last_tokens) - 1
        array[_SLOT, count:] = -1
        graph.inputs[:height].copy_(staged, non_blocking=True)
        stage.copied.record()
        graph.graph.replay()
        return graph.logits[:count], graph.tokens[:count]

    def _stage(self) -> _Stage:
        if len(self._stages) < _STAGES:
            size = (_TABLE + self.max_blocks) * self.max_sequences
            memory = torch.empty(size, dtype=torch.int32, pin_memory=True)
            self._stages.append(_Stage(memory, torch.cuda.Event()))
        stage = self._stages[self._next_stage % len(self._stages)]
        self._next_stage += 1
        stage.copied.synchronize()
        return stage

    def _capture(self, bucket: int) -> _Graph:
        began = time.monotonic()
        device = self._last_tokens.device
        inputs = torch.zeros((_TABLE + self.max_blocks, bucket), dtype=torch.int32, device=device)
        inputs[_ROW] = len(self._last_tokens) - 1
        inputs[_SLOT] = -1

        def step() -> tuple[Tensor, Tensor]:
            rows = inputs[_ROW].long()
            batch = ForwardBatch(
                token_ids=self._last_tokens[rows],
                positions=inputs[_POSITION].long(),
                slot_mapping=inputs[_SLOT],
                decode=DecodeSpan(
                    start=0,
                    block_ids=inputs[_TABLE:].t(),
                    context_lens=inputs[_LENGTH],
                    block_size=self._kv_cache.block_size,
                ),
                kv_cache=self._kv_cache,
            )
            logits = self._forward(batch)
            tokens = self._greedy(logits)
            self._last_tokens[rows] = tokens
            return logits, tokens

        # Once outside: kernels are compiled and libraries set up by their first call.
        side = torch.cuda.Stream(device)
        side.wait_stream(torch.cuda.current_stream(device))
        with torch.cuda.stream(side):
            step()
        torch.cuda.current_stream(device).wait_stream(side)
        torch.cuda.synchronize(device)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._pool):
            logits, tokens = step()
        self._pool = graph.pool()
        log.info("captured a step of %d sequences in %.2f s", bucket, time.monotonic() - began)
        return _Graph(graph, inputs, logits, tokens)
