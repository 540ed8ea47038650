"""Drawing tokens as CUDA graphs: some eighty operations that take longer to launch than to run.

They read the logits where a step's graph has left them, and what the rows ask for from one copy.
"""

from bisect import bisect_left
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from shard_worker.graph_capture import Graph, GraphCapture
from shard_worker.sampler import Columns, Draw, Sampler, uniforms
from shard_worker.staging import Staging
from shard_worker.truncation import CANDIDATES, Cuts

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
        capture: GraphCapture,
    ) -> None:
        """capture: that of the steps, which never run at once with these."""
        self._sampler, self._logits, self._last_tokens = sampler, logits, last_tokens
        self._capture = capture
        self._nobody = len(last_tokens) - 1
        size = _HEIGHT * MAX_DRAWS
        self._inputs = torch.zeros(size, dtype=torch.float64, device=logits.device)
        self._staging = Staging(size, torch.float64)
        self._graphs: dict[tuple[int, bool], Graph] = {}

    def fit(self, draws: Sequence[Draw]) -> bool:
        """There is a graph for such rows."""
        vocab_size = self._sampler.vocabulary.size
        return len(draws) <= MAX_DRAWS and all(
            draw.adjustment is None
            and draw.sampling.logprobs is None
            and (draw.sampling.top_k <= CANDIDATES or draw.sampling.top_k >= vocab_size)
            for draw in draws
        )

    def run(self, draws: Sequence[Draw], rows: Sequence[int]) -> Tensor:
        """Queues the draws of the first rows of the logits -> tokens, int64 [n], which are in
        `last_tokens[rows]` then."""
        vocab_size = self._sampler.vocabulary.size
        count = len(draws)
        size = _SIZES[bisect_left(_SIZES, count)]
        has_cuts = any(
            0 < s.top_k < vocab_size or s.top_p < 1 or s.min_p > 0
            for s in (draw.sampling for draw in draws)
        )
        graph = self._graph(size, has_cuts)
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
        return graph.replay()[:count]

    def _fill(self, columns: np.ndarray) -> None:
        """Nothing to draw: the likeliest token of nobody."""
        columns.fill(0)
        columns[_ROW] = self._nobody
        columns[_TOP_P] = 1

    def _graph(self, size: int, has_cuts: bool) -> Graph:
        if (graph := self._graphs.get((size, has_cuts))) is None:
            inputs = self._inputs[: _HEIGHT * size].view(_HEIGHT, size)
            neutral = np.empty((_HEIGHT, size))
            self._fill(neutral)
            inputs.copy_(torch.from_numpy(neutral))
            logits = self._logits[:size]
            # Called outside of a graph, it leaves the logits that wait as they will be drawn from.
            graph = self._capture.capture(
                f"draws of {size}", lambda: self._draw(logits, inputs, has_cuts)
            )
            self._graphs[size, has_cuts] = graph
        return graph

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
