"""Drawing tokens as CUDA graphs: some eighty operations that take longer to launch than to run.

They read the logits where a step's graph has left them, and what the rows ask for from one copy.
"""

import logging
import time
from bisect import bisect_left
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from shard_worker.memory_meter import MemoryMeter
from shard_worker.sampler import Columns, Draw, Sampler, uniforms
from shard_worker.staging import Staging
from shard_worker.truncation import CANDIDATES, Cuts

log = logging.getLogger(__name__)

# With more rows the device takes longer than Python.
_SIZES = (1, 2, 4, 8, 16, 32, 64)
MAX_DRAWS = _SIZES[-1]
# Of each row, in float64, which all of it fits exactly: where its token goes, and how it is drawn.
_ROW, _INVERSE_TEMPERATURE, _UNIFORM, _TOP_K, _TOP_P, _MIN_P, _TEMPERATURE, _HEIGHT = range(8)


class DrawGraphs:
    """Draws from `logits`, float32 [rows, vocabulary of this rank], which are written to.

    `last_tokens`, int64 [sequences + 1]: there the likeliest tokens are, and those drawn come; the last
    one is for what pads.
    """

    def __init__(
        self,
        sampler: Sampler,
        logits: Tensor,
        last_tokens: Tensor,
        *,
        side: torch.cuda.Stream,
        meter: MemoryMeter,
    ) -> None:
        self._sampler, self._logits, self._last_tokens = sampler, logits, last_tokens
        self._side, self._meter = side, meter
        self._nobody = len(last_tokens) - 1
        size = _HEIGHT * MAX_DRAWS
        self._inputs = torch.zeros(size, dtype=torch.float64, device=logits.device)
        self._staging = Staging(size, torch.float64)
        self._graphs: dict[tuple[int, bool], Any] = {}

    def fit(self, draws: Sequence[Draw]) -> bool:
        """There is a graph for such rows."""
        vocab_size = self._sampler.vocabulary.size
        return len(draws) <= MAX_DRAWS and all(
            draw.adjustment is None
            and draw.sampling.logprobs is None
            and (draw.sampling.top_k <= CANDIDATES or draw.sampling.top_k >= vocab_size)
            for draw in draws
        )

    def run(self, draws: Sequence[Draw], rows: Sequence[int], pool: Any) -> Tensor:
        """Queues the draws of the first rows of the logits -> tokens, int64 [n], which are in
        `last_tokens[rows]` then. pool: of the step's graph, which is where this one's memory is too."""
        vocab_size = self._sampler.vocabulary.size
        count = len(draws)
        size = _SIZES[bisect_left(_SIZES, count)]
        has_cuts = any(
            0 < s.top_k < vocab_size or s.top_p < 1 or s.min_p > 0
            for s in (draw.sampling for draw in draws)
        )
        graph = self._graphs.get((size, has_cuts)) or self._capture(size, has_cuts, pool)
        with self._staging.take(_HEIGHT * size) as memory:
            columns = memory.view(_HEIGHT, size).numpy()
            self._fill(columns)
            numbers = uniforms(draws)
            for column, (draw, row) in enumerate(zip(draws, rows, strict=True)):
                sampling = draw.sampling
                columns[_ROW, column] = row
                if sampling.temperature == 0:
                    continue
                columns[1:, column] = (
                    1 / sampling.temperature,
                    numbers[column],
                    sampling.top_k if sampling.top_k < vocab_size else 0,
                    sampling.top_p,
                    sampling.min_p,
                    sampling.temperature,
                )
            self._inputs[: len(memory)].copy_(memory, non_blocking=True)
        replayed, tokens, communicates = graph
        replayed.replay()
        self._sampler.tp.count(communicates)
        return tokens[:count]

    def _fill(self, columns: np.ndarray) -> None:
        """Nothing to draw: the likeliest token of nobody."""
        columns.fill(0)
        columns[_ROW] = self._nobody
        columns[_TOP_P] = 1

    def _capture(self, size: int, has_cuts: bool, pool: Any) -> Any:
        began = time.monotonic()
        inputs = self._inputs[: _HEIGHT * size].view(_HEIGHT, size)
        neutral = np.empty((_HEIGHT, size))
        self._fill(neutral)
        inputs.copy_(torch.from_numpy(neutral))
        logits, device = self._logits[:size], self._logits.device
        # Once outside, as for a step. It leaves the logits that wait as they will be drawn from.
        self._side.wait_stream(torch.cuda.current_stream(device))
        with torch.cuda.stream(self._side):
            self._draw(logits, inputs, has_cuts)
        torch.cuda.current_stream(device).wait_stream(self._side)
        torch.cuda.synchronize(device)
        self._meter.look()
        tp = self._sampler.tp
        counted = tp.all_stats()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=pool):
            tokens = self._draw(logits, inputs, has_cuts)
        self._meter.captured(graph.pool())
        log.info("captured draws of %d in %.2f s", size, time.monotonic() - began)
        captured = self._graphs[size, has_cuts] = graph, tokens, tp.take_back(counted)
        return captured

    def _draw(self, logits: Tensor, inputs: Tensor, has_cuts: bool) -> Tensor:
        columns = inputs.unsqueeze(-1)
        cuts = Cuts(
            top_k=columns[_TOP_K].long(),
            top_p=columns[_TOP_P],
            min_p=columns[_MIN_P],
            temperature=columns[_TEMPERATURE],
            num_candidates=CANDIDATES,
            has_top_p=True,
            has_both=True,
            has_min_p=True,
        )
        drawn = self._sampler.drawn(
            logits,
            Columns(columns[_INVERSE_TEMPERATURE], columns[_UNIFORM], cuts if has_cuts else None),
        )
        rows = inputs[_ROW].long()
        tokens = torch.where(inputs[_TEMPERATURE] > 0, drawn, self._last_tokens[rows])
        self._last_tokens[rows] = tokens
        return tokens
