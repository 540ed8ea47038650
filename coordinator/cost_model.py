"""How long a step would take: the plan says what each rank reads and sends, the figures how fast.

Pure: a prediction follows from a ShardPlan and the figures of a kind of GPU and its links. Time is a
sum, so nothing overlaps: bytes over a bandwidth, operations over a rate, a ramp for every kernel, and
for every all-reduce a latency and bytes over a bandwidth (the alpha-beta model; Thakur et al., 2005,
https://doi.org/10.1177/1094342005051521). Ranks wait for each other in every all-reduce, so of each
block of a layer the slowest rank counts, and uneven cuts cost what they cost.

Not in it: the coordinator (a step is launched while the one before it runs), steps of more sequences
than a graph was captured for, smaller matrices that tensor cores fill less well, and ranks that come to
an all-reduce at different times for other reasons than their shares. docs/scaling.md says how far
predictions were off where they could be checked.
"""

from __future__ import annotations

import math
from collections.abc import Collection
from dataclasses import dataclass
from enum import StrEnum

from coordinator.model_spec import Axis
from coordinator.shard_plan import RankShard, ShardPlan

# Kernels of a layer beside its norms: a rotation, writing to the KV cache, decode attention and its
# merge before o_proj; the activation before down_proj. Two products are in each of the two blocks.
_ATTENTION_KERNELS = 4
_MLP_KERNELS = 1
_PRODUCTS_PER_BLOCK = 2

SHORT_CONTEXT = 128
"""Tokens before the one that a plan's prediction is about."""


class Algorithm(StrEnum):
    """How the ranks' terms become their sum on every rank."""

    NCCL = "nccl"  # a ring, or within one host a chain of as many steps: 2(n - 1)
    ONE_SHOT = "one_shot"  # every rank writes all of its term to every other
    TWO_SHOT = "two_shot"  # every rank sums a part of it, then writes the sum to every other

    def bytes_sent(self, tp_size: int, num_bytes: int) -> float:
        """What leaves each rank when `tp_size` ranks sum `num_bytes`."""
        peers = tp_size - 1
        if self is Algorithm.ONE_SHOT:
            return float(peers * num_bytes)
        return 2 * peers * num_bytes / tp_size


@dataclass(frozen=True, slots=True)
class AllReduceFigures:
    """One algorithm on one kind of link."""

    algorithm: Algorithm
    latency_s: float  # of two ranks
    latency_per_rank_s: float  # what every further rank adds
    bytes_per_s: float  # out of one GPU, to all others together
    adds_and_norms: bool  # the time includes the residual addition and the norm that follow
    max_bytes: float = math.inf  # of a message

    def time_s(self, tp_size: int, num_bytes: int) -> float:
        """Of one all-reduce in a CUDA graph; a rank alone has nothing to wait for."""
        if tp_size == 1:
            return 0.0
        latency_s = self.latency_s + (tp_size - 2) * self.latency_per_rank_s
        return latency_s + self.algorithm.bytes_sent(tp_size, num_bytes) / self.bytes_per_s


@dataclass(frozen=True, slots=True)
class AllReduce:
    """One all-reduce as predicted, and the residual addition and norm after it."""

    algorithm: Algorithm | None  # None of a rank alone
    seconds: float
    norm_s: float  # 0 where it is included


@dataclass(frozen=True, slots=True)
class LinkFigures:
    """The links between the GPUs of a host."""

    all_reduces: tuple[AllReduceFigures, ...]
    gather_latency_s: float  # an all-gather of a few numbers, two ranks
    gather_latency_per_rank_s: float
    max_tp_size: int

    def gather_s(self, tp_size: int) -> float:
        """The ranks' exchange of their likeliest tokens."""
        if tp_size == 1:
            return 0.0
        return self.gather_latency_s + (tp_size - 2) * self.gather_latency_per_rank_s


@dataclass(frozen=True, slots=True)
class DeviceFigures:
    """One GPU, as this project's kernels and serving path use it, in a 16-bit type."""

    memory_bytes: int  # for weights and KV cache
    weight_bytes_per_s: float
    kv_bytes_per_s: float
    activation_bytes_per_s: float
    flops_per_s: float  # of products; a multiplication and an addition are two
    attention_flops_per_s: float  # of prompts, what the causal mask leaves
    one_token_product_ramp_s: float  # added by each product, of one token
    product_ramp_s: float  # of several
    kernel_s: float  # each small kernel, however little it does
    launch_layer_s: float  # Python launches a layer, in steps that are no graph
    max_graph_tokens: int  # steps with prompts are graphs up to this many tokens
    request_s: float  # of the time to the first token, what is no step


@dataclass(frozen=True, slots=True)
class Hardware:
    """GPUs of one host and their links."""

    name: str
    device: DeviceFigures
    link: LinkFigures

    def all_reduce(
        self, tp_size: int, num_bytes: int, algorithms: Collection[Algorithm] = tuple(Algorithm)
    ) -> AllReduce:
        """Of `num_bytes` by those of `algorithms` after which the next norm is done first.

        ValueError where none of them takes so many.
        """
        # It reads a sum and the residual stream, and writes both anew.
        norm_s = self.device.kernel_s + 4 * num_bytes / self.device.activation_bytes_per_s
        if tp_size == 1:
            return AllReduce(None, 0.0, norm_s)
        found = [
            AllReduce(
                figures.algorithm,
                figures.time_s(tp_size, num_bytes),
                0.0 if figures.adds_and_norms else norm_s,
            )
            for figures in self.link.all_reduces
            if figures.algorithm in algorithms and num_bytes <= figures.max_bytes
        ]
        if not found:
            names = ", ".join(algorithms)
            raise ValueError(f"algorithms = {names!r}: none takes a message of {num_bytes} bytes")
        return min(found, key=lambda each: each.seconds + each.norm_s)


# "Measured" is between two NVIDIA H200 (18 NVLinks, without multicast) or on one, in a CUDA graph unless
# said otherwise. "Fitted" is to time per token and time to the first token of Llama-3.1-8B shapes at
# tp=1 through the whole serving path (docs/scaling.md). What more than two ranks add is assumed: the
# steps are those of NCCL's own model (src/graph/tuning.cc), in which every rank adds two of 0.6 µs to
# a small ring over NVLink, and a peer written to besides others 0.4 µs.
_NCCL_STEP_S = 0.6e-6
_PEER_S = 0.4e-6

H200_NVLINK = Hardware(
    name="NVIDIA H200, NVLink",
    device=DeviceFigures(
        memory_bytes=int(0.9 * 141e9),  # the default of --gpu-memory-utilization
        # Measured: GEMVs of 17 to 525 MB take 2.7 µs and their bytes at 4.3 TB/s, within 7 %; a
        # reduction over 4 GiB reads at 4.48.
        weight_bytes_per_s=4.3e12,
        # Measured of FlashInfer, batches of 32 and 128 at 1,024 tokens of context.
        kv_bytes_per_s=3.9e12,
        activation_bytes_per_s=4.3e12,
        flops_per_s=790e12,  # large bfloat16 products
        attention_flops_per_s=286e12,  # fitted to a prompt of 8,192
        one_token_product_ramp_s=2.7e-6,
        product_ramp_s=5.0e-6,  # measured, cuBLAS
        kernel_s=1.9e-6,  # fitted to batch 1: what products leave of it, by 7 kernels a layer
        launch_layer_s=0.31e-3,  # measured: 10 ms for 32 layers
        max_graph_tokens=512,
        request_s=1.9e-3,  # fitted to a prompt of 128
    ),
    link=LinkFigures(
        all_reduces=(
            AllReduceFigures(Algorithm.NCCL, 19.0e-6, 2 * _NCCL_STEP_S, 280e9, False),
            # A kernel that pushes, adds and normalises, measured from 8 KiB to 1 MiB. It is for small
            # messages: its buffers hold each rank's whole term several times.
            AllReduceFigures(Algorithm.ONE_SHOT, 3.65e-6, _PEER_S, 330e9, True, max_bytes=2**20),
            # torch's over symmetric memory, measured from 8 KiB to 16 MiB. It has two rounds of writes.
            AllReduceFigures(Algorithm.TWO_SHOT, 6.6e-6, 2 * _PEER_S, 314e9, False),
        ),
        # NCCL's: half the steps of its all-reduce.
        gather_latency_s=19.0e-6 - _NCCL_STEP_S,
        gather_latency_per_rank_s=_NCCL_STEP_S,
        max_tp_size=8,
    ),
)


@dataclass(frozen=True, slots=True)
class StepTime:
    """A step as predicted, in seconds. The blocks are those of all layers, of the slowest ranks."""

    attention_s: float
    mlp_s: float
    head_s: float
    num_norms: int  # after the embedding and after every block
    all_reduce: AllReduce  # before each norm
    gather_s: float
    launch_s: float  # Python, beside the device; 0 of a graph

    @property
    def num_all_reduces(self) -> int:
        return 0 if self.all_reduce.algorithm is None else self.num_norms

    @property
    def communication_s(self) -> float:
        """All-reduces, with what their kernels do besides, and the exchange of likeliest tokens."""
        return self.num_all_reduces * self.all_reduce.seconds + self.gather_s

    @property
    def seconds(self) -> float:
        blocks_s = self.attention_s + self.mlp_s + self.head_s
        norms_s = self.num_norms * self.all_reduce.norm_s
        return max(blocks_s + norms_s + self.communication_s, self.launch_s)

    @property
    def communication_share(self) -> float:
        return self.communication_s / self.seconds


@dataclass(frozen=True, slots=True)
class FirstToken:
    """The way to a prompt's first token, as predicted."""

    steps: tuple[StepTime, ...]
    request_s: float

    @property
    def seconds(self) -> float:
        return self.request_s + sum(step.seconds for step in self.steps)

    @property
    def communication_share(self) -> float:
        return sum(step.communication_s for step in self.steps) / self.seconds


@dataclass(frozen=True, slots=True)
class _Work:
    """What one step computes, before it is cut."""

    num_tokens: int
    num_sampled: int
    kv_tokens: int  # tokens whose keys and values decode attention reads
    attended: int  # pairs of a prompt's token and a token that it sees


def unpredictable(plan: ShardPlan, hardware: Hardware = H200_NVLINK) -> str | None:
    """Why nothing can be said of `plan` on `hardware`; None where something can."""
    if plan.itemsize != 2:
        return f"figures are of 16-bit types, not of {plan.dtype}"
    if plan.tp_size > hardware.link.max_tp_size:
        return f"links are known between {hardware.link.max_tp_size} ranks at most"
    if not fits(plan, hardware):
        most = max(shard.weight_bytes for shard in plan.ranks)
        return (
            f"a rank has {most / 1e9:.1f} GB of weights, "
            f"and {hardware.device.memory_bytes / 1e9:.1f} GB of memory for them and the KV cache"
        )
    return None


def fits(plan: ShardPlan, hardware: Hardware = H200_NVLINK, context_tokens: int = 1) -> bool:
    """Every rank has room for its weights and the KV cache of `context_tokens` tokens in all."""
    return all(
        shard.weight_bytes + context_tokens * shard.kv_bytes_per_token
        <= hardware.device.memory_bytes
        for shard in plan.ranks
    )


def predicted_step(plan: ShardPlan, hardware: Hardware = H200_NVLINK) -> StepTime | None:
    """A step of one sequence after `SHORT_CONTEXT` tokens; None of what is `unpredictable`."""
    if unpredictable(plan, hardware) is not None:
        return None
    return decode_step(plan, 1, SHORT_CONTEXT, hardware=hardware)


def decode_step(
    plan: ShardPlan,
    batch: int,
    context: int,
    *,
    hardware: Hardware = H200_NVLINK,
    algorithms: Collection[Algorithm] = tuple(Algorithm),
) -> StepTime:
    """A step that gives each of `batch` sequences a token, with `context` tokens before it."""
    assert batch >= 1 and context >= 0, (batch, context)
    seen = min(context + 1, plan.spec.sliding_window or context + 1)
    work = _Work(batch, batch, kv_tokens=batch * seen, attended=0)
    return _step(plan, work, 0.0, hardware, algorithms)


def first_token(
    plan: ShardPlan,
    prompt: int,
    *,
    max_batched_tokens: int,
    hardware: Hardware = H200_NVLINK,
    algorithms: Collection[Algorithm] = tuple(Algorithm),
) -> FirstToken:
    """One request of `prompt` tokens, in chunks of `max_batched_tokens`, on an idle cluster."""
    assert prompt >= 1 and max_batched_tokens >= 1, (prompt, max_batched_tokens)
    device = hardware.device
    steps = []
    for start in range(0, prompt, max_batched_tokens):
        stop = min(start + max_batched_tokens, prompt)
        attended = sum(
            min(position + 1, plan.spec.sliding_window or prompt) for position in range(start, stop)
        )
        work = _Work(stop - start, int(stop == prompt), kv_tokens=0, attended=attended)
        is_graph = stop - start <= device.max_graph_tokens
        launch_s = 0.0 if is_graph else plan.spec.num_layers * device.launch_layer_s
        steps.append(_step(plan, work, launch_s, hardware, algorithms))
    return FirstToken(tuple(steps), device.request_s)


def _step(
    plan: ShardPlan,
    work: _Work,
    launch_s: float,
    hardware: Hardware,
    algorithms: Collection[Algorithm],
) -> StepTime:
    assert plan.itemsize == 2, plan.dtype
    assert plan.tp_size <= hardware.link.max_tp_size, plan.tp_size
    spec, device = plan.spec, hardware.device
    row_bytes = work.num_tokens * spec.hidden_size * plan.itemsize
    return StepTime(
        attention_s=max(_attention_s(plan, shard, work, device) for shard in plan.ranks),
        mlp_s=max(_mlp_s(plan, shard, work, device) for shard in plan.ranks),
        head_s=max(_head_s(plan, shard, work, device) for shard in plan.ranks),
        num_norms=2 * spec.num_layers + 1,
        all_reduce=hardware.all_reduce(plan.tp_size, row_bytes, algorithms),
        gather_s=hardware.link.gather_s(plan.tp_size) if work.num_sampled else 0.0,
        launch_s=launch_s,
    )


def _attention_s(plan: ShardPlan, shard: RankShard, work: _Work, device: DeviceFigures) -> float:
    """From the norm to the term of the attention output, all layers."""
    spec = plan.spec
    q_heads, kv_heads = len(shard.ranges[Axis.Q_HEADS]), len(shard.ranges[Axis.KV_HEADS])
    kv_s = work.kv_tokens * shard.kv_bytes_per_token / device.kv_bytes_per_s
    flops = 4 * work.attended * spec.head_dim * q_heads * spec.num_layers
    # q, k and v are rotated and stored; q is read again, and attention's output written.
    width = spec.head_dim * (2 * (q_heads + 2 * kv_heads) + 2 * q_heads)
    return (
        _products_s(plan, shard, Axis.Q_HEADS, work.num_tokens, device)
        + spec.num_layers * _kernels_s(plan, _ATTENTION_KERNELS, work.num_tokens * width, device)
        + kv_s
        + flops / device.attention_flops_per_s
    )


def _mlp_s(plan: ShardPlan, shard: RankShard, work: _Work, device: DeviceFigures) -> float:
    """From the norm to the term of the MLP's output, all layers."""
    width = 3 * len(shard.ranges[Axis.MLP])  # gate and up are read, their product written
    kernels_s = _kernels_s(plan, _MLP_KERNELS, work.num_tokens * width, device)
    products_s = _products_s(plan, shard, Axis.MLP, work.num_tokens, device)
    return products_s + plan.spec.num_layers * kernels_s


def _head_s(plan: ShardPlan, shard: RankShard, work: _Work, device: DeviceFigures) -> float:
    """This rank's logits. The embedding's rows that a step reads are too few to count."""
    if not work.num_sampled:
        return 0.0
    numel = len(shard.ranges[Axis.VOCAB]) * plan.spec.hidden_size
    return _product_s(1, numel * plan.itemsize, numel, work.num_sampled, device)


def _products_s(
    plan: ShardPlan, shard: RankShard, axis: Axis, rows: int, device: DeviceFigures
) -> float:
    """The products of the blocks that are cut along `axis`, all layers."""
    numel = _block_numel(plan, shard.rank, axis)
    count = _PRODUCTS_PER_BLOCK * plan.spec.num_layers
    return _product_s(count, numel * plan.itemsize, numel, rows, device)


def _product_s(count: int, num_bytes: int, numel: int, rows: int, device: DeviceFigures) -> float:
    """`count` products of weights of so many bytes and elements in all with `rows` rows."""
    ramp_s = device.one_token_product_ramp_s if rows == 1 else device.product_ramp_s
    flops = 2 * rows * numel
    return count * ramp_s + num_bytes / device.weight_bytes_per_s + flops / device.flops_per_s


def _kernels_s(plan: ShardPlan, count: int, elements: int, device: DeviceFigures) -> float:
    """Small kernels that read and write so many activations together."""
    moved_s = elements * plan.itemsize / device.activation_bytes_per_s
    return count * device.kernel_s + moved_s


def _block_numel(plan: ShardPlan, rank: int, axis: Axis) -> int:
    """Elements that `rank` holds of the parameters of all layers that are cut along `axis`.

    Query heads stand for attention as a whole.
    """
    axes = {Axis.Q_HEADS, Axis.KV_HEADS} if axis is Axis.Q_HEADS else {axis}
    return sum(
        math.prod(plan.local_shape(parameter, rank))
        for parameter in plan.spec.parameters
        if any(section.axis in axes for section in parameter.sections)
    )
