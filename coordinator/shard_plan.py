"""How a model is cut over ranks: which range of each axis a rank owns, and what follows in bytes.

Pure: a ShardPlan is made from a ModelSpec, thus from `config.json` alone, and nothing is read.
Local shapes, the slices to read from the checkpoint, how partial outputs combine, memory and
communication per token all come from the ranges, so that no other place states sharding again.

Column and row parallelism are those of Megatron-LM (https://arxiv.org/abs/1909.08053): attention is
q, k, v (column) then o (row), the MLP is gate, up (column) then down (row), so that a layer needs
two all-reduces. Heads need not divide by the number of ranks: see `make_plan`.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction

from coordinator.model_spec import ITEMSIZES, Axis, Combine, ModelSpec, ParameterSpec, Section

# Cuts of long axes fall on multiples of a quantum, so that GPU tiles and wide loads stay whole.
_QUANTA = (64, 32, 16, 8, 4, 2, 1)
_ALIGNED_QUANTUM = 8  # 16 bytes of bfloat16, what one load reads
_MIN_QUANTA_PER_RANK = 8  # or the ranks would differ too much
MAX_LISTED_TP_SIZE = 64


class PlanError(ValueError):
    """The model can't be cut over this many ranks.

    Attributes: `tp_size` as asked for (also as `field` and `value`), and `fitting`, the sizes up to
    64 that can be planned.
    """

    field = "tp_size"

    def __init__(self, tp_size: int, why: str, fitting: Sequence[int]) -> None:
        listed = ", ".join(map(str, fitting))
        super().__init__(f"tp_size {tp_size} can't be planned: {why}; tp sizes that fit: {listed}")
        self.tp_size = self.value = tp_size
        self.fitting = tuple(fitting)


@dataclass(frozen=True, slots=True)
class Range:
    """Half-open: `start` is in, `stop` is not."""

    start: int
    stop: int

    def __len__(self) -> int:
        return self.stop - self.start

    def __str__(self) -> str:
        return f"[{self.start},{self.stop})"


@dataclass(frozen=True, slots=True)
class RankShard:
    """What one rank owns: a range of units along every axis, and its bytes."""

    rank: int
    ranges: Mapping[Axis, Range]
    weight_bytes: int
    kv_bytes_per_token: int  # keys and values of all layers


@dataclass(frozen=True, slots=True)
class ShardPlan:
    """The cut of `spec` over `tp_size` ranks with weights and KV cache in `dtype`.

    Bytes communicated are payload a rank puts in; an algorithm may move more. With one rank nothing
    is communicated.
    """

    spec: ModelSpec
    tp_size: int
    dtype: str
    ranks: tuple[RankShard, ...]

    @property
    def itemsize(self) -> int:
        """Bytes of one weight or activation."""
        return ITEMSIZES[self.dtype]

    def range(self, axis: Axis, rank: int) -> Range:
        """The units of `axis` that `rank` owns; KV ranges repeat where KV heads are replicated."""
        assert 0 <= rank < self.tp_size, rank
        return self.ranks[rank].ranges[axis]

    def local_shape(self, parameter: ParameterSpec, rank: int) -> tuple[int, ...]:
        """Shape of what `rank` holds of `parameter`."""
        if parameter.split_dim is None:
            return parameter.shape
        shape = list(parameter.shape)
        slices = self.slices(parameter, rank)
        shape[parameter.split_dim] = sum(stop - start for start, stop in slices)
        return tuple(shape)

    def slices(self, parameter: ParameterSpec, rank: int) -> tuple[tuple[int, int], ...]:
        """Element ranges (start, stop) along `split_dim` that `rank` holds, one per section.

        In this order they make up the local tensor. They also say where a rank's partial output
        belongs in a `concat`: placed there, replicas of a KV head fall on each other. Empty for a
        replicated parameter, which is read whole.
        """
        assert 0 <= rank < self.tp_size, rank
        return _slices(parameter, self.ranks[rank].ranges)

    def combine(self, parameter: ParameterSpec) -> Combine:
        """How the partial outputs of the parameter's module become the whole one."""
        return parameter.combine

    @property
    def checkpoint_bytes(self) -> int:
        """Bytes of all parameters, each once, in the plan's dtype."""
        return self.itemsize * sum(parameter.numel for parameter in self.spec.parameters)

    @property
    def replicated_bytes(self) -> int:
        """Bytes held beyond the first copy: whole tensors on every rank, and repeated KV heads.

        The ranks' `weight_bytes` add up to `checkpoint_bytes + replicated_bytes`.
        """
        kv_held = sum(len(self.range(Axis.KV_HEADS, rank)) for rank in range(self.tp_size))
        extra = 0
        for parameter in self.spec.parameters:
            if parameter.split_dim is None:
                extra += (self.tp_size - 1) * parameter.numel
            for section in parameter.sections:
                if section.axis is Axis.KV_HEADS:
                    extra += (kv_held - section.units) * _unit_numel(parameter, section)
        return extra * self.itemsize

    @property
    def all_reduce_bytes_per_token_per_layer(self) -> int:
        """After the row-parallel attention output and after the row-parallel MLP output."""
        return 0 if self.tp_size == 1 else 2 * self.spec.hidden_size * self.itemsize

    @property
    def all_reduce_bytes_per_token(self) -> int:
        """All layers', and that of the vocab-parallel embedding."""
        if self.tp_size == 1:
            return 0
        num_all_reduces = 2 * self.spec.num_layers + 1
        return num_all_reduces * self.spec.hidden_size * self.itemsize


def make_plan(
    spec: ModelSpec,
    tp_size: int,
    *,
    dtype: str | None = None,
    memory_weights: Sequence[float] | None = None,
) -> ShardPlan:
    """Cut `spec` over `tp_size` ranks, each with something of every axis.

    Attention is divided in units of a KV head with its query heads. With more ranks than KV heads,
    ranks are dealt evenly to the KV heads, each serves one, and the query heads of its group are
    divided among its ranks. The MLP is then cut so that bytes per layer and rank even out again,
    the vocabulary evenly. Where shares can't be equal, the larger come first.

    Args:
        dtype: of weights and KV cache; the checkpoint's by default.
        memory_weights: one positive number per rank, for instance its free memory. Shares are then
            proportional to them, not equal.

    Raises:
        PlanError: some rank would be left without work.
        ValueError: an argument is out of range; names it and its value.
    """
    if not isinstance(tp_size, int) or isinstance(tp_size, bool) or tp_size < 1:
        raise ValueError(f"tp_size must be a positive integer, got {tp_size!r}")
    dtype = spec.dtype if dtype is None else dtype
    if dtype not in ITEMSIZES:
        raise ValueError(f"dtype must be one of {', '.join(ITEMSIZES)}, got {dtype!r}")
    weights = _check_weights(memory_weights, tp_size)
    if short := [
        f"{axis} has only {spec.axis_units(axis)}"
        for axis in (Axis.Q_HEADS, Axis.MLP, Axis.VOCAB)
        if spec.axis_units(axis) < tp_size
    ]:
        why = f"every rank needs a unit of every axis, but {' and '.join(short)}"
        raise PlanError(tp_size, why, fitting_tp_sizes(spec))

    q_heads, kv_heads = _attention_ranges(spec, weights)
    vocab = _cut(spec.vocab_size, weights, [Fraction(0)] * tp_size)
    ranges: list[dict[Axis, Range]] = [
        {Axis.Q_HEADS: q, Axis.KV_HEADS: kv, Axis.VOCAB: v}
        for q, kv, v in zip(q_heads, kv_heads, vocab, strict=True)
    ]
    for own, mlp in zip(ranges, _mlp_ranges(spec, ranges, weights), strict=True):
        own[Axis.MLP] = mlp

    itemsize = ITEMSIZES[dtype]
    kv_bytes_per_head = 2 * spec.num_layers * spec.head_dim * itemsize
    ranks = tuple(
        RankShard(
            rank=rank,
            ranges={axis: own[axis] for axis in Axis},
            weight_bytes=itemsize * sum(_local_numel(p, own) for p in spec.parameters),
            kv_bytes_per_token=len(own[Axis.KV_HEADS]) * kv_bytes_per_head,
        )
        for rank, own in enumerate(ranges)
    )
    return ShardPlan(spec, tp_size, dtype, ranks)


def fitting_tp_sizes(spec: ModelSpec, limit: int = MAX_LISTED_TP_SIZE) -> tuple[int, ...]:
    """The tp sizes up to `limit` that `make_plan` accepts for this model."""
    # KV heads don't bound it: they are replicated.
    most = min(spec.axis_units(axis) for axis in (Axis.Q_HEADS, Axis.MLP, Axis.VOCAB))
    return tuple(range(1, min(limit, most) + 1))


def _check_weights(memory_weights: Sequence[float] | None, tp_size: int) -> list[Fraction]:
    """Weights as exact fractions, so that shares don't depend on rounding."""
    if memory_weights is None:
        return [Fraction(1)] * tp_size
    if len(memory_weights) != tp_size:
        raise ValueError(
            f"memory_weights must be one number per rank ({tp_size}), got {list(memory_weights)!r}"
        )
    for rank, weight in enumerate(memory_weights):
        if not isinstance(weight, int | float) or not 0 < weight < math.inf:  # nor NaN
            raise ValueError(f"memory_weights[{rank}] must be positive and finite, got {weight!r}")
    return [Fraction(weight) for weight in memory_weights]


def _attention_ranges(
    spec: ModelSpec, weights: Sequence[Fraction]
) -> tuple[list[Range], list[Range]]:
    """Each rank's query heads and KV heads."""
    tp_size, num_kv_heads = len(weights), spec.num_kv_heads
    group = spec.num_q_heads // num_kv_heads  # query heads of a KV head
    if tp_size <= num_kv_heads:
        kv_heads = _ranges(_apportion(num_kv_heads, weights))
        return [Range(kv.start * group, kv.stop * group) for kv in kv_heads], kv_heads
    q_sizes: list[int] = []
    kv_heads = []
    for head, num_ranks in enumerate(_apportion(tp_size, [Fraction(1)] * num_kv_heads)):
        first = len(kv_heads)
        q_sizes += _apportion(group, weights[first : first + num_ranks])
        kv_heads += [Range(head, head + 1)] * num_ranks
    return _ranges(q_sizes), kv_heads


def _mlp_ranges(
    spec: ModelSpec, ranges: Sequence[Mapping[Axis, Range]], weights: Sequence[Fraction]
) -> list[Range]:
    """Each rank's MLP units, cut so that everything it holds of the layers evens out."""
    layers = [p for p in spec.parameters if p.name.startswith(f"{spec.layer_prefix}.")]
    # A parameter has either MLP sections only or none, so it is counted on one side.
    mlp = [p for p in layers if any(s.axis is Axis.MLP for s in p.sections)]
    rest = [p for p in layers if all(s.axis is not Axis.MLP for s in p.sections)]
    unit = sum(_unit_numel(p, section) for p in mlp for section in p.sections)
    loads = [Fraction(sum(_local_numel(p, own) for p in rest), unit) for own in ranges]
    return _cut(spec.intermediate_size, weights, loads)


def _cut(units: int, weights: Sequence[Fraction], loads: Sequence[Fraction]) -> list[Range]:
    """Cut an axis on multiples of a quantum; `loads` is what each rank bears already, in units."""
    quantum = _quantum(units, len(weights))
    shares = _apportion(units // quantum, weights, [load / quantum for load in loads])
    return _ranges(quantum * share for share in shares)


def _quantum(units: int, tp_size: int) -> int:
    """The largest quantum that gives equal shares if an aligned one does, else any that divides."""
    fine = [q for q in _QUANTA if q == 1 or units // q >= _MIN_QUANTA_PER_RANK * tp_size]
    equal = [q for q in fine if q >= _ALIGNED_QUANTUM and units % (q * tp_size) == 0]
    return max(equal or [q for q in fine if units % q == 0])


def _apportion(
    total: int, weights: Sequence[Fraction], loads: Sequence[Fraction] | None = None
) -> list[int]:
    """Shares of at least 1 that add up to `total`, such that load + share is as near as can be to
    proportional to the weights: filled like water, then rounded by largest remainder.
    """
    assert total >= len(weights), (total, len(weights))
    loads = loads or [Fraction(0)] * len(weights)
    shares = [1] * len(weights)
    rising = list(range(len(weights)))  # ranks that the water reaches; the others keep 1
    while True:
        free = total - (len(weights) - len(rising))
        level = (free + sum(loads[i] for i in rising)) / sum(weights[i] for i in rising)
        quotas = {i: level * weights[i] - loads[i] for i in rising}
        if all(quota >= 1 for quota in quotas.values()):
            break
        # Never empties: the quotas add up to `free`, which is at least one per rising rank.
        rising = [i for i in rising if quotas[i] >= 1]
    for i, quota in quotas.items():
        shares[i] = math.floor(quota)
    left = total - sum(shares)
    for i in sorted(rising, key=lambda i: (shares[i] - quotas[i], i))[:left]:
        shares[i] += 1
    return shares


def _ranges(sizes: Iterable[int]) -> list[Range]:
    """Contiguous ranges from 0 on."""
    ranges: list[Range] = []
    start = 0
    for size in sizes:
        ranges.append(Range(start, start + size))
        start += size
    return ranges


def _slices(parameter: ParameterSpec, ranges: Mapping[Axis, Range]) -> tuple[tuple[int, int], ...]:
    slices = []
    offset = 0
    for section in parameter.sections:
        own = ranges[section.axis]
        slices.append(
            (offset + own.start * section.unit_size, offset + own.stop * section.unit_size)
        )
        offset += section.size
    return tuple(slices)


def _unit_numel(parameter: ParameterSpec, section: Section) -> int:
    """Elements of the parameter that belong to one unit of one of its sections."""
    assert parameter.split_dim is not None
    return section.unit_size * (parameter.numel // parameter.shape[parameter.split_dim])


def _local_numel(parameter: ParameterSpec, ranges: Mapping[Axis, Range]) -> int:
    """Elements of the parameter that the owner of `ranges` holds."""
    if parameter.split_dim is None:
        return parameter.numel
    return sum(len(ranges[s.axis]) * _unit_numel(parameter, s) for s in parameter.sections)
