"""What a model is, from its `config.json` alone: sizes, and every parameter with how it is split.

A family (coordinator/families.py) says for each parameter which dimension is split along which
named axis, or that it is replicated. That is the only place where sharding is declared: the ranges
of each rank, the local shapes, the slices to read and how partial outputs combine all follow from
it (coordinator/shard_plan.py). Names are those of Hugging Face checkpoints, unchanged.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum

ITEMSIZES: Mapping[str, int] = {"float32": 4, "bfloat16": 2, "float16": 2}
"""The types that a model is served in, and the bytes of an element."""


class UnsupportedModelError(ValueError):
    """The config is sound, but asks for something that Colrow would compute wrongly.

    Attributes: `field` and `value` as in `config.json`, and the `supported` values of that field.
    """

    def __init__(self, field: str, value: object, supported: Sequence[object]) -> None:
        listed = ", ".join(str(item) for item in supported)
        super().__init__(f"{field} is {value!r}, which is not supported (supported: {listed})")
        self.field = field
        self.value = value
        self.supported = tuple(supported)


class Axis(StrEnum):
    """A dimension of the model that is cut over ranks; each rank owns one range of its units."""

    Q_HEADS = "q_heads"
    KV_HEADS = "kv_heads"
    MLP = "mlp"
    VOCAB = "vocab"


class Combine(StrEnum):
    """How the ranks' partial outputs of a module become the whole output."""

    CONCAT = "concat"  # the output dimension is split
    SUM = "sum"  # the input dimension is split
    REPLICATE = "replicate"  # every rank has the whole output


@dataclass(frozen=True, slots=True)
class Section:
    """A stretch of a split dimension: `units` units of `axis`, `unit_size` elements each."""

    axis: Axis
    units: int
    unit_size: int = 1

    @property
    def size(self) -> int:
        """Length of the stretch in elements."""
        return self.units * self.unit_size


@dataclass(frozen=True, slots=True)
class ParameterSpec:
    """One checkpoint tensor: its full shape, and how it is split.

    `sections` tile `shape[split_dim]` in order; a fused tensor such as GPT-2's `c_attn` has
    several. A replicated parameter has `split_dim` None and no sections.
    """

    name: str
    shape: tuple[int, ...]
    combine: Combine = Combine.REPLICATE
    split_dim: int | None = None
    sections: tuple[Section, ...] = ()

    def __post_init__(self) -> None:
        tiled = sum(section.size for section in self.sections)
        assert tiled == (0 if self.split_dim is None else self.shape[self.split_dim]), self

    @property
    def numel(self) -> int:
        """Number of elements of the whole tensor."""
        return math.prod(self.shape)


@dataclass(frozen=True, slots=True)
class ResidualBlock:
    """`x + body(norm(x))`, the pre-norm block; both names are relative to the layer."""

    norm: str
    body: str


@dataclass(frozen=True, slots=True)
class ModelSpec:
    """What `config.json` says of a model, in the same words for every family."""

    family: str
    architecture: str  # class name in transformers
    hidden_size: int
    num_layers: int
    num_q_heads: int
    num_kv_heads: int
    head_dim: int
    intermediate_size: int
    vocab_size: int
    max_position_embeddings: int  # context length, tokens
    sliding_window: int | None  # tokens that attention looks back, itself included; None: all
    dtype: str  # of the checkpoint
    tie_word_embeddings: bool
    eos_token_ids: tuple[int, ...]
    bos_token_id: int | None
    parameters: tuple[ParameterSpec, ...]  # without lm_head.weight where it is tied
    ignored: tuple[str, ...]  # fnmatch patterns of checkpoint keys knowingly not loaded
    optional_prefix: str  # checkpoint keys may come with or without this prefix
    layer_prefix: str  # layer i is f"{layer_prefix}.{i}"
    blocks: tuple[ResidualBlock, ...]  # of a layer, in order
    embedding: str
    final_norm: str
    lm_head: str

    def axis_units(self, axis: Axis) -> int:
        """How many units there are to divide along `axis`."""
        return {
            Axis.Q_HEADS: self.num_q_heads,
            Axis.KV_HEADS: self.num_kv_heads,
            Axis.MLP: self.intermediate_size,
            Axis.VOCAB: self.vocab_size,
        }[axis]


# What families declare parameters with. Linear weights are [out, in]; `transposed` is for GPT-2's
# Conv1D, whose weights are [in, out].


def replicated(name: str, *shape: int) -> ParameterSpec:
    """A parameter that every rank holds whole: norms, position embeddings, row-parallel biases."""
    return ParameterSpec(name, shape)


def column(
    module: str,
    outputs: tuple[Section, ...],
    in_features: int,
    *,
    bias: bool = False,
    transposed: bool = False,
) -> tuple[ParameterSpec, ...]:
    """A column-parallel linear module: the output dimension is split, the bias with it."""
    size = sum(section.size for section in outputs)
    shape = (in_features, size) if transposed else (size, in_features)
    split_dim = 1 if transposed else 0
    weight = ParameterSpec(f"{module}.weight", shape, Combine.CONCAT, split_dim, outputs)
    if not bias:
        return (weight,)
    return (weight, ParameterSpec(f"{module}.bias", (size,), Combine.CONCAT, 0, outputs))


def row(
    module: str,
    inputs: tuple[Section, ...],
    out_features: int,
    *,
    bias: bool = False,
    transposed: bool = False,
) -> tuple[ParameterSpec, ...]:
    """A row-parallel linear module: the input dimension is split, the outputs are summed.

    Its bias is replicated; only rank 0 adds it, or the sum would count it tp_size times.
    """
    size = sum(section.size for section in inputs)
    shape = (size, out_features) if transposed else (out_features, size)
    split_dim = 0 if transposed else 1
    weight = ParameterSpec(f"{module}.weight", shape, Combine.SUM, split_dim, inputs)
    return (weight, replicated(f"{module}.bias", out_features)) if bias else (weight,)


def vocab_embedding(module: str, vocab_size: int, hidden_size: int) -> ParameterSpec:
    """[vocab, hidden], split by token id: a rank gives zeros for ids of others, all are summed."""
    sections = (Section(Axis.VOCAB, vocab_size),)
    return ParameterSpec(f"{module}.weight", (vocab_size, hidden_size), Combine.SUM, 0, sections)


def lm_head(module: str, vocab_size: int, hidden_size: int) -> ParameterSpec:
    """[vocab, hidden], split by token id: a rank gives the logits of its ids, concatenated."""
    sections = (Section(Axis.VOCAB, vocab_size),)
    return ParameterSpec(f"{module}.weight", (vocab_size, hidden_size), Combine.CONCAT, 0, sections)
