"""What a rank needs of its device's memory, before anything is loaded and when the KV cache is sized.

It only computes, as the plan does: bytes follow from the model's sizes and the ranges that a rank has.
Weights and KV cache are exact. What a step takes and gives back on a GPU, and what CUDA graphs keep, are
what `shard_worker`'s operations have at one time in the largest step; libraries and the allocator add to
it, for which there is the part of the memory that `--gpu-memory-utilization` leaves alone.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

from colrow.errors import InvalidArgument
from colrow.memory import GraphSizes, MemoryLedger, MemoryUse, StepSize, size_text
from coordinator.config import (
    DEFAULT_CPU_BATCHED_TOKENS,
    DEFAULT_CPU_CACHE_MIB,
    DEFAULT_GPU_BATCHED_TOKENS,
    CoordinatorConfig,
)
from coordinator.model_spec import Axis, ModelSpec
from coordinator.request import ModelLimits
from coordinator.shard_plan import MAX_LISTED_TP_SIZE, ShardPlan, fitting_tp_sizes, make_plan
from coordinator.worker_status import WorkerDescription

_INDEX_BYTES = 32  # of a token: its id, position, slot
_FLOAT_BYTES = 4
# Of a logit while tokens are drawn: its mass in float64, three times while a top-p is searched for,
# the bits and digits of that, and itself and its mass once more for the rows that are truncated.
_DRAW_BYTES = 53
# cuBLAS keeps as much for each stream that it works on (compute capability 9.0; others 8 MiB).
_LIBRARY_BYTES = 32 * 2**20
# torch's allocator takes memory in such pieces, for small and for larger tensors.
_SEGMENT_BYTES = (2 + 20) * 2**20


@dataclass(frozen=True, slots=True)
class StepLimits:
    """The largest steps that are made: tokens, sequences, tokens of the longest context."""

    tokens: int
    sequences: int
    context: int


@dataclass(frozen=True, slots=True)
class MemorySettings:
    """What the coordinator's settings say of memory."""

    limits: StepLimits
    least_cache_tokens: int
    """With fewer tokens of KV cache nothing is served; whole blocks."""
    gpu_memory_utilization: float
    is_cache_given: bool
    """The cache's size is given, else it takes what is left on a GPU."""


def wanted_context(config: CoordinatorConfig, spec: ModelSpec) -> int:
    """Tokens of prompt and completion together, as far as the cache holds them."""
    limit = spec.max_position_embeddings
    return min(limit, config.max_model_len or limit)


def max_batched_tokens(config: CoordinatorConfig, descriptions: Sequence[WorkerDescription]) -> int:
    """Of a step."""
    if config.max_batched_tokens is not None:
        return config.max_batched_tokens
    on_gpu = all(description.is_gpu for description in descriptions)
    default = DEFAULT_GPU_BATCHED_TOKENS if on_gpu else DEFAULT_CPU_BATCHED_TOKENS
    # Every running sequence gets its token.
    return max(default, config.max_running)


def memory_settings(
    config: CoordinatorConfig, spec: ModelSpec, descriptions: Sequence[WorkerDescription]
) -> MemorySettings:
    """InvalidArgument for a context that the model has not."""
    context = spec.max_position_embeddings
    if config.max_model_len is not None and config.max_model_len > context:
        raise InvalidArgument(
            "max_model_len", config.max_model_len, f"the model's context is {context}"
        )
    # A context that nobody asked for is cut to what there is room for.
    least, size = config.max_model_len or 1, config.block_size
    return MemorySettings(
        limits=StepLimits(
            max_batched_tokens(config, descriptions),
            config.max_running,
            wanted_context(config, spec),
        ),
        least_cache_tokens=-(-least // size) * size,
        gpu_memory_utilization=config.gpu_memory_utilization,
        is_cache_given=config.num_blocks is not None or config.kv_cache_bytes is not None,
    )


def layer_bytes(plan: ShardPlan, rank: int, num_tokens: int) -> int:
    """The most that a step of `num_tokens` tokens has at one time in a layer."""
    spec, own = plan.spec, plan.ranks[rank].ranges
    q, kv = len(own[Axis.Q_HEADS]) * spec.head_dim, len(own[Axis.KV_HEADS]) * spec.head_dim
    attention = (q + 2 * kv) + 2 * q  # the projections, what heads give and where it is put
    mlp = 3 * len(own[Axis.MLP])  # gate and up, and their product
    stream = 3 * spec.hidden_size  # the residual, normalised, and what a block adds to it
    width = stream + max(attention, mlp) + 2 * spec.head_dim  # with rotations
    return num_tokens * (width * plan.itemsize + _INDEX_BYTES)


def logits_bytes(plan: ShardPlan, rank: int, size: StepSize) -> int:
    """A step's last hidden states, and the logits of its sequences while they become float32."""
    hidden = size.tokens * plan.spec.hidden_size * plan.itemsize
    vocab = len(plan.ranks[rank].ranges[Axis.VOCAB])
    return hidden + size.sequences * vocab * (plan.itemsize + _FLOAT_BYTES)


def workspace_bytes(plan: ShardPlan, rank: int, limits: StepLimits) -> int:
    """What a step takes and gives back that is launched operation by operation."""
    own = plan.ranks[rank].ranges
    # The context of one sequence is gathered from its blocks while its prompt is computed.
    gathered = 2 * len(own[Axis.KV_HEADS]) * plan.spec.head_dim * limits.context * plan.itemsize
    in_layers = layer_bytes(plan, rank, limits.tokens) + gathered
    size = StepSize(limits.tokens, limits.sequences)
    drawn = limits.sequences * len(own[Axis.VOCAB]) * _DRAW_BYTES
    after = logits_bytes(plan, rank, size) + drawn
    return max(in_layers, after) + 2 * _LIBRARY_BYTES  # one stream computes, one warms graphs up


def graph_bytes(plan: ShardPlan, rank: int, limits: StepLimits, sizes: GraphSizes) -> int:
    """What all graphs keep that steps within `limits` can have captured.

    All write their logits to one place, made for the largest; what else they need they share too.
    """
    captured = [
        *_captured(sizes.decode, lambda size: size.sequences, limits.sequences),
        *_captured(sizes.prefill, lambda size: size.tokens, limits.tokens),
    ]
    if not captured:
        return 0
    vocab = len(plan.ranks[rank].ranges[Axis.VOCAB])
    logits = max(size.sequences for size in sizes.decode) * vocab * _FLOAT_BYTES
    drawn = min(sizes.draws, limits.sequences) * vocab * _DRAW_BYTES
    shared = max(
        drawn,
        *(layer_bytes(plan, rank, size.tokens) for size in captured),
        *(logits_bytes(plan, rank, size) for size in captured),
    )
    return logits + shared + _LIBRARY_BYTES + _SEGMENT_BYTES


def _captured(
    sizes: Sequence[StepSize], extent: Callable[[StepSize], int], most: int
) -> Iterator[StepSize]:
    """Those that a step of up to `most` can need: it takes the next larger one."""
    for size in sizes:
        yield size
        if extent(size) >= most:
            return


def planned(
    plan: ShardPlan, rank: int, description: WorkerDescription, settings: MemorySettings
) -> MemoryLedger:
    """What is reckoned with on a rank, and the least cache. Of a CPU no workspace is known."""
    shard, workspace, graphs = plan.ranks[rank], None, 0
    if description.is_gpu:
        workspace = workspace_bytes(plan, rank, settings.limits)
        graphs = graph_bytes(plan, rank, settings.limits, description.graph_sizes)
    return MemoryLedger(
        weights=MemoryUse(shard.weight_bytes),
        kv_cache=MemoryUse(settings.least_cache_tokens * shard.kv_bytes_per_token),
        graphs=MemoryUse(graphs),
        workspace=MemoryUse(workspace),
    )


def cache_room(
    plan: ShardPlan, rank: int, description: WorkerDescription, settings: MemorySettings
) -> int:
    """What is left for the cache of a GPU that has its weights: bytes. InvalidArgument for too few.

    That is what is free, but for the part that may not be used, and what graphs and steps will take.
    """
    total, free = description.memory_total_bytes, description.memory_available_bytes
    need = planned(plan, rank, description, settings)
    left = free - (total - _usable_bytes(description, settings))
    left -= (need.graphs.planned or 0) + (need.workspace.planned or 0)
    if left < (need.kv_cache.planned or 0):
        ledger = replace(need, weights=description.memory.weights)
        raise InvalidArgument(
            "gpu_memory_utilization",
            settings.gpu_memory_utilization,
            f"rank {rank} ({description.device}) has {size_text(max(left, 0))} left for the KV cache, "
            f"which is to hold {settings.least_cache_tokens} tokens: {ledger}; "
            f"{size_text(free)} of {size_text(total)} are free",
        )
    return left


def size_cache(
    config: CoordinatorConfig,
    plan: ShardPlan,
    descriptions: Sequence[WorkerDescription],
    settings: MemorySettings,
) -> tuple[int, ModelLimits]:
    """Blocks of the KV cache, as many as fit on every rank, and the context.

    `descriptions` are by rank, of workers that have their weights. InvalidArgument for too little room.
    """
    context, num_blocks = settings.limits.context, config.num_blocks
    if num_blocks is None:
        # Sequences that fill the batch with whole contexts are all the cache could be used for.
        num_blocks = config.max_running * -(-context // config.block_size)
        for shard, description in zip(plan.ranks, descriptions, strict=True):
            if config.kv_cache_bytes is not None:
                room = config.kv_cache_bytes
            elif description.is_gpu:
                room = cache_room(plan, shard.rank, description, settings)
            else:
                room = DEFAULT_CPU_CACHE_MIB * 2**20
            block_bytes = config.block_size * shard.kv_bytes_per_token
            num_blocks = min(num_blocks, room // block_bytes)
            if num_blocks < 1:
                raise InvalidArgument(
                    "kv_cache_mib",
                    room / 2**20,
                    f"a block of {config.block_size} tokens takes {block_bytes} bytes on rank "
                    f"{shard.rank} ({description.device}: {description.memory})",
                )
    cache_tokens = num_blocks * config.block_size
    context = min(context, cache_tokens)
    return num_blocks, ModelLimits(
        plan.spec.vocab_size, context, plan.spec.eos_token_ids, cache_tokens
    )


def check_fits(
    plan: ShardPlan, descriptions: Sequence[WorkerDescription], settings: MemorySettings
) -> None:
    """InvalidArgument, with the smallest tp size that fits, where a device or host can't hold its part.

    `descriptions` are by rank. A host's memory is that of all its CPU ranks together.
    """
    for rank, description in enumerate(descriptions):
        if description.is_gpu:
            _check_gpu(plan, rank, description, settings)
    hosts: dict[str, list[int]] = {}
    for rank, description in enumerate(descriptions):
        if not description.is_gpu:
            hosts.setdefault(description.host_id, []).append(rank)
    for ranks in hosts.values():
        _check_host(plan, ranks, descriptions[ranks[0]].memory_total_bytes)


def _check_gpu(
    plan: ShardPlan, rank: int, description: WorkerDescription, settings: MemorySettings
) -> None:
    usable = _usable_bytes(description, settings)

    def need(plan: ShardPlan, rank: int) -> MemoryLedger:
        if settings.is_cache_given:  # by somebody who may know better how much the rest takes
            return MemoryLedger(weights=MemoryUse(plan.ranks[rank].weight_bytes))
        return planned(plan, rank, description, settings)

    def fits(plan: ShardPlan) -> bool:
        return all(need(plan, rank).planned_bytes <= usable for rank in range(plan.tp_size))

    ledger = need(plan, rank)
    if ledger.planned_bytes > usable:
        raise InvalidArgument(
            "tp_size",
            plan.tp_size,
            f"rank {rank} ({description.device}) needs {size_text(ledger.planned_bytes)} "
            f"({ledger}) and may use {size_text(usable)} of "
            f"{size_text(description.memory_total_bytes)}; {_smallest(plan, usable, fits)}",
        )


def _check_host(plan: ShardPlan, ranks: Sequence[int], total: int) -> None:
    need = sum(plan.ranks[rank].weight_bytes for rank in ranks)

    def fits(plan: ShardPlan) -> bool:
        return all(shard.weight_bytes <= total for shard in plan.ranks)

    if need > total:
        who = f"rank {ranks[0]} needs" if len(ranks) == 1 else f"ranks {_listed(ranks)} need"
        raise InvalidArgument(
            "tp_size",
            plan.tp_size,
            f"{who} {size_text(need)} for weights on a host (cpu) that has {size_text(total)}; with "
            f"a host for each rank, {_smallest(plan, total, fits)}",
        )


def _listed(ranks: Sequence[int]) -> str:
    return f"{', '.join(map(str, ranks[:-1]))} and {ranks[-1]}"


def _usable_bytes(description: WorkerDescription, settings: MemorySettings) -> int:
    """Of a GPU. Where the cache is given, nothing is kept back for it to be sized by."""
    share = 1.0 if settings.is_cache_given else settings.gpu_memory_utilization
    return int(share * description.memory_total_bytes)


def _smallest(plan: ShardPlan, usable: int, fits: Callable[[ShardPlan], bool]) -> str:
    """The smallest tp size with equal shares that `fits` devices with so many usable bytes each."""
    for tp_size in fitting_tp_sizes(plan.spec):
        # Most sizes need not be planned: the ranks hold the checkpoint at least.
        if tp_size * usable < plan.checkpoint_bytes:
            continue
        if fits(make_plan(plan.spec, tp_size, dtype=plan.dtype)):
            return f"the smallest tp size that fits such memory is {tp_size}"
    return f"no tp size up to {MAX_LISTED_TP_SIZE} fits such memory"
