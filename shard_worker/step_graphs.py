"""Whole steps as CUDA graphs: from the last tokens to the next, one launch a step.

A graph replays fixed kernels on fixed memory. So there is one for each of a few sizes, a step takes the
next larger one, and its inputs, which are one array of int32, are copied to where that graph reads them.
What is left over of the size has no context and writes nothing that counts. A graph is captured when it
is first needed.

There are two kinds: for steps that only decode, and for those with prompts in them. What the latter save
is Python: an operation takes longer to launch than to run where tokens are few.
"""

from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from colrow.memory import GraphSizes, StepSize
from shard_worker.block_tables import BlockTables
from shard_worker.draw_graphs import MAX_DRAWS, DrawGraphs
from shard_worker.forward_batch import DecodeSpan, ForwardBatch, PackedSpan
from shard_worker.graph_capture import Graph, GraphCapture
from shard_worker.kv_cache import KvCache
from shard_worker.memory_meter import MemoryMeter
from shard_worker.models import Model
from shard_worker.sampler import Draw, Sampler
from shard_worker.staging import Staging

_DECODE_SIZES = (1, 2, 4, 8, *range(16, 257, 16))
# With more tokens the device takes longer than Python, and torch's attention is the faster one.
_PREFILL_SIZES = (16, 32, 64, 128, 256, 512)
_MAX_SEQUENCES = _DECODE_SIZES[-1]
# Beyond this context torch's attention, launched alone, makes up for the Python that it costs.
_MAX_PREFILL_CONTEXT = 2048

# A decode step's inputs, [4 + blocks, sequences]: of each sequence where its last token is, that token's
# position and cache slot, its context with it; below them its blocks, a row each.
_ROW, _POSITION, _SLOT, _LENGTH, _TABLE = range(5)


@dataclass(frozen=True, slots=True)
class GraphChunk:
    """Tokens [start, stop) of one sequence, whose last token is or comes to `last_tokens[row]`.

    Without `token_ids` the chunk is that token; else they are the sequence's, from 0 on. `block_ids` is
    the same object in all of a sequence's chunks, and is only ever appended to.
    """

    row: int
    start: int
    stop: int
    token_ids: Sequence[int] | None
    block_ids: Sequence[int]


@dataclass(frozen=True, slots=True)
class _PrefillLayout:
    """Where what is in the inputs of a step of up to `size` tokens."""

    size: int

    @property
    def sequences(self) -> int:
        return min(self.size, _MAX_SEQUENCES)

    @property
    def tiles(self) -> int:
        return self.size // PackedSpan.TILE + self.sequences

    def split(self, flat: Any) -> tuple[Any, Any, Any, Any]:
        """Of a tensor or an array: tokens [4, size] (id or -1, row, position, slot), sequences
        [5, sequences] (first token, tokens, context, last token, row), tiles [2, tiles], the rest."""
        ends = np.cumsum([4 * self.size, 5 * self.sequences, 2 * self.tiles]).tolist()
        tokens, sequences = flat[: ends[0]], flat[ends[0] : ends[1]]
        return (
            tokens.reshape(4, -1),
            sequences.reshape(5, -1),
            flat[ends[1] : ends[2]].reshape(2, -1),
            flat[ends[2] :],
        )

    @property
    def num_inputs(self) -> int:
        """Without block tables."""
        return 4 * self.size + 5 * self.sequences + 2 * self.tiles


class StepGraphs:
    """Runs steps of up to `max_blocks` blocks a sequence.

    `last_tokens` is where sampled tokens stay, int64 [rows + 1]; the last one is for what pads.
    """

    def __init__(
        self,
        model: Model,
        sampler: Sampler,
        kv_cache: KvCache,
        last_tokens: Tensor,
        *,
        max_blocks: int,
        meter: MemoryMeter,
    ) -> None:
        self._model, self._sampler = model, sampler
        self._kv_cache = kv_cache
        self._last_tokens = last_tokens
        self._max_blocks = max_blocks
        self._max_context_blocks = min(max_blocks, -(-_MAX_PREFILL_CONTEXT // kv_cache.block_size))
        self._nobody = len(last_tokens) - 1
        self._graphs: dict[tuple[str, int], Graph] = {}
        self._capture = GraphCapture(last_tokens.device, sampler.tp, meter)
        most = _PrefillLayout(_PREFILL_SIZES[-1])
        capacity = max(
            (_TABLE + max_blocks) * _MAX_SEQUENCES,
            most.num_inputs + self._max_context_blocks * most.sequences,
        )
        self._tables = BlockTables(max_blocks)
        # All graphs read from the beginning of this.
        self._inputs = torch.zeros(capacity, dtype=torch.int32, device=last_tokens.device)
        self._staging = Staging(capacity, torch.int32)
        # And all write to the beginning of this.
        vocabulary = sampler.rank_sizes[sampler.tp.rank]
        self._logits = torch.zeros(_MAX_SEQUENCES, vocabulary, device=last_tokens.device)
        self._draws = DrawGraphs(sampler, self._logits, last_tokens, self._capture)

    def fit(self, chunks: Sequence[GraphChunk]) -> bool:
        """There is a graph for such a step."""
        if all(chunk.token_ids is None for chunk in chunks):
            return len(chunks) <= _MAX_SEQUENCES
        num_tokens = sum(chunk.stop - chunk.start for chunk in chunks)
        if num_tokens > _PREFILL_SIZES[-1]:
            return False
        layout = _prefill_layout(num_tokens)
        longest = max(chunk.stop for chunk in chunks)
        return (
            len(chunks) <= layout.sequences
            and longest <= self._max_context_blocks * self._kv_cache.block_size
        )

    def run(self, chunks: Sequence[GraphChunk]) -> tuple[Tensor, Tensor]:
        """Queues a step -> the logits after each chunk [n, vocabulary of this rank], which the next step
        overwrites, and the likeliest tokens, int64 [n], which are in `last_tokens` then."""
        if all(chunk.token_ids is None for chunk in chunks):
            return self._run_decode(chunks)
        return self._run_prefill(chunks)

    def draw(self, draws: Sequence[Draw], rows: Sequence[int]) -> Tensor | None:
        """Queues draws from the logits of the step that was run last, one after each chunk -> tokens,
        int64 [n], which are in `last_tokens[rows]` then. None, and nothing done, for draws that there is
        no graph for."""
        return self._draws.run(draws, rows) if self._draws.fit(draws) else None

    def _run_decode(self, chunks: Sequence[GraphChunk]) -> tuple[Tensor, Tensor]:
        size = self._kv_cache.block_size
        count = len(chunks)
        bucket = _DECODE_SIZES[bisect_left(_DECODE_SIZES, count)]
        graph = self._graph("decode", bucket)
        rows = np.zeros(bucket, dtype=np.int64)
        rows[:count] = [chunk.row for chunk in chunks]
        for chunk in chunks:
            self._tables.update(chunk.row, chunk.block_ids, chunk.start // size + 1)
        height = _TABLE + (max(chunk.start for chunk in chunks) // size + 1)
        with self._staging.take(height * bucket) as flat:
            array = flat.view(height, bucket).numpy()
            array[:_TABLE] = 0
            array[_ROW, count:] = self._nobody
            array[_SLOT, count:] = -1
            array[_ROW, :count] = rows[:count]
            array[_POSITION, :count] = [chunk.start for chunk in chunks]
            array[_SLOT, :count] = [
                chunk.block_ids[chunk.start // size] * size + chunk.start % size for chunk in chunks
            ]
            array[_LENGTH, :count] = [chunk.stop for chunk in chunks]
            # What pads has no context, so any table will do: it is that of row 0.
            self._tables.gather(rows, array[_TABLE:])
            self._inputs[: len(flat)].copy_(flat, non_blocking=True)
        return self._replay(graph, count)

    def _run_prefill(self, chunks: Sequence[GraphChunk]) -> tuple[Tensor, Tensor]:
        layout = _prefill_layout(sum(chunk.stop - chunk.start for chunk in chunks))
        graph = self._graph("prefill", layout.size)
        most = -(-max(chunk.stop for chunk in chunks) // self._kv_cache.block_size)
        with self._staging.take(layout.num_inputs + most * layout.sequences) as flat:
            self._fill_prefill(layout, flat, chunks)
            self._inputs[: len(flat)].copy_(flat, non_blocking=True)
        return self._replay(graph, len(chunks))

    def _fill_prefill(
        self, layout: _PrefillLayout, flat: Tensor, chunks: Sequence[GraphChunk]
    ) -> None:
        size, tile = self._kv_cache.block_size, PackedSpan.TILE
        tokens, sequences, tiles, rest = layout.split(flat.numpy())
        tables = rest.reshape(-1, layout.sequences)
        flat.zero_()
        tokens[3] = -1  # no slot
        sequences[4] = self._nobody
        tiles[0] = -1
        at = num_tiles = 0
        for column, chunk in enumerate(chunks):
            count = chunk.stop - chunk.start
            blocks = np.array(chunk.block_ids[: -(-chunk.stop // size)], dtype=np.int32)
            span = slice(at, at + count)
            if chunk.token_ids is None:
                tokens[0, at], tokens[1, at] = -1, chunk.row
            else:
                tokens[0, span] = chunk.token_ids[chunk.start : chunk.stop]
            positions = tokens[2, span] = np.arange(chunk.start, chunk.stop, dtype=np.int32)
            tokens[3, span] = blocks[positions // size] * size + positions % size
            sequences[:, column] = (at, count, chunk.stop, at + count - 1, chunk.row)
            tables[: len(blocks), column] = blocks
            more = -(-count // tile)
            tiles[0, num_tiles : num_tiles + more] = column
            tiles[1, num_tiles : num_tiles + more] = range(0, count, tile)
            num_tiles += more
            at += count

    def _replay(self, graph: Graph, count: int) -> tuple[Tensor, Tensor]:
        tokens = graph.replay()
        return self._logits[:count], tokens[:count]

    def _graph(self, kind: str, size: int) -> Graph:
        if (graph := self._graphs.get((kind, size))) is None:
            step = {"decode": self._decode, "prefill": self._prefill}[kind]
            self._clear_inputs(kind, size)
            graph = self._capture.capture(f"a {kind} step of {size}", lambda: step(size))
            self._graphs[kind, size] = graph
        return graph

    def _clear_inputs(self, kind: str, size: int) -> None:
        """Nothing to compute but what pads."""
        self._inputs.zero_()
        if kind == "decode":
            inputs = self._inputs[: _TABLE * size].view(_TABLE, size)
            inputs[_ROW], inputs[_SLOT] = self._nobody, -1
        else:
            tokens, sequences, tiles, _ = _PrefillLayout(size).split(self._inputs)
            tokens[3], sequences[4], tiles[0] = -1, self._nobody, -1

    def _decode(self, size: int) -> Tensor:
        inputs = self._inputs[: (_TABLE + self._max_blocks) * size].view(-1, size)
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
        return self._sample(self._model(batch), rows)

    def _prefill(self, size: int) -> Tensor:
        layout = _PrefillLayout(size)
        tokens, sequences, tiles, rest = layout.split(self._inputs)
        tables = rest[: self._max_context_blocks * layout.sequences].view(-1, layout.sequences)
        known = tokens[0].long()
        batch = ForwardBatch(
            token_ids=torch.where(known < 0, self._last_tokens[tokens[1].long()], known),
            positions=tokens[2].long(),
            slot_mapping=tokens[3],
            packed=PackedSpan(tiles=tiles, sequences=sequences, block_ids=tables.t()),
            kv_cache=self._kv_cache,
        )
        hidden = self._model(batch)[sequences[3].long()]
        return self._sample(hidden, sequences[4].long())

    def _sample(self, hidden: Tensor, rows: Tensor) -> Tensor:
        logits = self._model.lm_head(hidden, out=self._logits[: len(hidden)])
        tokens = self._sampler.greedy(logits)
        self._last_tokens[rows] = tokens
        return tokens


GRAPH_SIZES = GraphSizes(
    decode=tuple(StepSize(size, size) for size in _DECODE_SIZES),
    prefill=tuple(StepSize(size, _PrefillLayout(size).sequences) for size in _PREFILL_SIZES),
    draws=MAX_DRAWS,
)
"""Every step that there is a graph for, once it was needed."""


def _prefill_layout(num_tokens: int) -> _PrefillLayout:
    return _PrefillLayout(_PREFILL_SIZES[bisect_left(_PREFILL_SIZES, num_tokens)])
