"""The textbook path: one module at a time, its partial outputs brought to the coordinator and combined.

It is how a user looks inside a layer, and how the serving path is verified. float32 throughout here;
the workers compute in the served type.
"""

from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass

import numpy as np

from colrow.errors import AnswerTooLarge, InvalidArgument, ServiceError
from coordinator.model_spec import Combine, ModelSpec, ParameterSpec
from coordinator.shard_group import Partial

MAX_TOKENS = 4096

ComputePartial = Callable[[str, np.ndarray, int], Awaitable[list[Partial]]]
"""Of a module by its name and its input; no rank's output takes more than so many bytes."""


@dataclass(frozen=True, slots=True)
class ModuleRun:
    """One module: its whole input, every rank's partial output, and what they combine to."""

    module: str
    combine: Combine
    input: np.ndarray
    partials: tuple[Partial, ...]
    output: np.ndarray

    @property
    def num_bytes(self) -> int:
        partials = sum(partial.output.nbytes for partial in self.partials)
        return self.input.nbytes + partials + self.output.nbytes


@dataclass(frozen=True, slots=True)
class LayerRun:
    """What was run, in order; `output` of a whole layer includes its residual connections."""

    runs: tuple[ModuleRun, ...]
    output: np.ndarray

    @property
    def num_bytes(self) -> int:
        """Of all its tensors."""
        return sum(run.num_bytes for run in self.runs) + self.output.nbytes


def combine_partials(partials: Sequence[Partial]) -> np.ndarray:
    """[num_tokens, features] of the whole module.

    "sum" adds in rank order. "concat" puts each piece at its columns, where the replicas of a KV head
    fall on one another. "replicate" takes rank 0's.
    """
    first = partials[0]
    if first.combine == Combine.REPLICATE:
        return first.output
    if first.combine == Combine.SUM:
        total = first.output.copy()
        for partial in partials[1:]:
            total += partial.output
        return total
    width = max(stop for partial in partials for _, stop in partial.columns)
    whole = np.empty((first.output.shape[0], width), dtype=np.float32)
    covered = np.zeros(width, dtype=bool)
    for partial in partials:
        offset = 0
        for start, stop in partial.columns:
            whole[:, start:stop] = partial.output[:, offset : offset + stop - start]
            covered[start:stop] = True
            offset += stop - start
    assert covered.all(), "the ranks' columns cover the output"
    return whole


def full_name(spec: ModelSpec, layer: int | None, module: str) -> str:
    """The module's name from the root; InvalidArgument for a layer that the model has not."""
    if layer is None:
        if not module:
            raise InvalidArgument("module", module, "name a layer, a module, or both")
        return module
    if not 0 <= layer < spec.num_layers:
        raise InvalidArgument("layer", layer, f"the model has {spec.num_layers} layers")
    return f"{spec.layer_prefix}.{layer}" + (f".{module}" if module else "")


def noise(spec: ModelSpec, module: str, num_tokens: int, seed: int) -> np.ndarray:
    """An input for a module: standard normal float32 [num_tokens, features], or token ids."""
    if not 1 <= num_tokens <= MAX_TOKENS:
        raise InvalidArgument("num_tokens", num_tokens, f"is not in [1, {MAX_TOKENS}]")
    generator = np.random.default_rng(seed)
    weight = next((p for p in spec.parameters if p.name == f"{module}.weight"), None)
    if weight and (module == spec.embedding or _is_position_embedding(weight)):
        return generator.integers(0, weight.shape[0], num_tokens)
    features = _input_features(weight) if weight else spec.hidden_size
    return generator.standard_normal((num_tokens, features), dtype=np.float32)


def _is_position_embedding(weight: ParameterSpec) -> bool:
    return weight.split_dim is None and len(weight.shape) == 2


def _input_features(weight: ParameterSpec) -> int:
    if len(weight.shape) == 1 or weight.split_dim is None:  # a norm
        return weight.shape[0]
    # A column-parallel weight is split along its outputs, a row-parallel one along its inputs.
    inputs = weight.split_dim if weight.combine is Combine.SUM else 1 - weight.split_dim
    return weight.shape[inputs]


async def run(
    spec: ModelSpec,
    compute_partial: ComputePartial,
    *,
    layer: int | None,
    module: str,
    activation: np.ndarray | None,
    num_tokens: int = 4,
    seed: int = 0,
    max_bytes: int,
) -> LayerRun:
    """Runs one module, or all of a layer's when `module` is empty.

    AnswerTooLarge, as early as that is seen, where its tensors would take over `max_bytes`.
    """
    name = full_name(spec, layer, module)
    x = noise(spec, name, num_tokens, seed) if activation is None else activation
    if x.shape and x.shape[0] > MAX_TOKENS:
        raise InvalidArgument("activation.shape", x.shape, f"are more than {MAX_TOKENS} tokens")
    runs: list[ModuleRun] = []

    async def run_module(name: str, x: np.ndarray) -> np.ndarray:
        taken = sum(run.num_bytes for run in runs) + x.nbytes
        if taken > max_bytes:
            raise AnswerTooLarge(max_bytes)
        # Beside a partial output there is at least the whole one, in its run and in the answer.
        left = (max_bytes - taken) // 3
        try:
            partials = tuple(await compute_partial(name, x, left))
        except ServiceError as error:
            if error.reason != AnswerTooLarge.reason:
                raise
            # The rank says what was left for it, which tells a user nothing.
            raise AnswerTooLarge(max_bytes) from error
        combine = Combine(partials[0].combine)
        runs.append(ModuleRun(name, combine, x, partials, combine_partials(partials)))
        return runs[-1].output

    whole_layer = layer is not None and not module
    if whole_layer:
        for block in spec.blocks:
            norm = await run_module(f"{name}.{block.norm}", x)
            x = x + await run_module(f"{name}.{block.body}", norm)
    else:
        x = await run_module(name, x)
    layer_run = LayerRun(tuple(runs), x)
    if layer_run.num_bytes > max_bytes:
        raise AnswerTooLarge(max_bytes)
    return layer_run
