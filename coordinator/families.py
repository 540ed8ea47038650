"""The supported model families: for each, its parameters and along which axis each is split.

A family is one function from the fields of `config.json` to a ModelSpec. Defaults of absent fields
are those of transformers, so that a file read here and there means the same model. What the family
can express but the workers would compute wrongly is refused here, by name and value.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from coordinator.model_spec import (
    ITEMSIZES,
    Axis,
    ModelSpec,
    ParameterSpec,
    ResidualBlock,
    Section,
    UnsupportedModelError,
    column,
    lm_head,
    replicated,
    row,
    vocab_embedding,
)

MAX_LAYERS = 4096
MAX_SIZE = 2**31 - 1
ROPE_TYPES = ("default", "linear", "llama3")
GPT2_ACTIVATIONS = ("gelu_new", "gelu_pytorch_tanh", "gelu", "relu")


class _Required:
    """Marks a field that has no default: its absence is an error."""


_REQUIRED = _Required()


@dataclass(frozen=True, slots=True)
class Fields:
    """Checked reads of `config.json`; every error is a ValueError naming the field and the value.

    A field given as null counts as given: only the `optional_` reads accept it.
    """

    values: Mapping[str, object]
    prefix: str = ""  # of names in messages, for nested objects

    def get(self, name: str, absent: object = _REQUIRED) -> object:
        """The raw value of a field, or `absent` where there is none."""
        value = self.values.get(name, absent)
        if isinstance(value, _Required):
            raise ValueError(f"{self.prefix}{name} is missing from config.json")
        return value

    def size(self, name: str, absent: int | _Required = _REQUIRED) -> int:
        """A positive whole number within reason: a config may come from anybody."""
        value = self.get(name, absent)
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise ValueError(f"{self.prefix}{name} must be a positive integer, got {value!r}")
        limit = MAX_LAYERS if name in ("num_hidden_layers", "n_layer") else MAX_SIZE
        if value > limit:
            raise ValueError(f"{self.prefix}{name} must be at most {limit}, got {value}")
        return value

    def optional_size(self, name: str, absent: int | _Required | None = _REQUIRED) -> int | None:
        """A positive whole number or null."""
        return None if self.get(name, absent) is None else self.size(name, absent or _REQUIRED)

    def number(self, name: str, absent: float | _Required = _REQUIRED) -> float:
        """A positive number."""
        value = self.get(name, absent)
        if isinstance(value, int | float) and not isinstance(value, bool) and 0 < value < math.inf:
            return value
        raise ValueError(f"{self.prefix}{name} must be a positive number, got {value!r}")

    def flag(self, name: str, absent: bool) -> bool:
        """true or false."""
        value = self.get(name, absent)
        if not isinstance(value, bool):
            raise ValueError(f"{self.prefix}{name} must be true or false, got {value!r}")
        return value

    def text(self, name: str, absent: str | _Required = _REQUIRED) -> str:
        """A string."""
        value = self.get(name, absent)
        if not isinstance(value, str):
            raise ValueError(f"{self.prefix}{name} must be a string, got {value!r}")
        return value

    def token_ids(self, name: str, absent: int | None) -> tuple[int, ...]:
        """Token ids given as one, a list or null. They may lie outside the vocabulary."""
        value = self.get(name, absent)
        ids = () if value is None else value if isinstance(value, list | tuple) else (value,)
        for token in ids:
            if not isinstance(token, int) or isinstance(token, bool) or token < 0:
                raise ValueError(
                    f"{self.prefix}{name} must be a token id, a list of them or null, got {value!r}"
                )
        return tuple(ids)

    def token_id(self, name: str, absent: int | None) -> int | None:
        """A token id or null; the first, where a list is given."""
        return next(iter(self.token_ids(name, absent)), None)

    def dtype(self) -> str:
        """The checkpoint's dtype; transformers 5 writes `dtype`, older ones `torch_dtype`."""
        name = "dtype" if self.values.get("dtype") is not None else "torch_dtype"
        value = self.values.get(name)
        if value is not None and value not in ITEMSIZES:
            raise ValueError(f"{name} must be one of {', '.join(ITEMSIZES)}, got {value!r}")
        return "float32" if value is None else str(value)

    def must_be(self, name: str, supported: tuple[object, ...], absent: object) -> None:
        """Refuse any value but the supported ones."""
        value = self.get(name, absent)
        if value not in supported:
            raise UnsupportedModelError(f"{self.prefix}{name}", value, supported)


@dataclass(frozen=True, slots=True)
class Family:
    """`name` is `model_type` in config.json, `architecture` the class in transformers."""

    name: str
    architecture: str
    declare: Callable[[Fields, Family], ModelSpec]


def _llama(config: Fields, family: Family) -> ModelSpec:
    """Llama 2, Llama 3.x, SmolLM2 (https://arxiv.org/abs/2307.09288)."""
    attention_bias = config.flag("attention_bias", False)
    return _decoder(
        config,
        family,
        qkv_bias=attention_bias,
        o_bias=attention_bias,
        mlp_bias=config.flag("mlp_bias", False),
        absent={"bos_token_id": 1, "eos_token_id": 2},
    )


def _mistral(config: Fields, family: Family) -> ModelSpec:
    """Mistral: Llama with a sliding window on every layer (https://arxiv.org/abs/2310.06825)."""
    layer_types = _layer_types(config)
    if len(set(layer_types)) > 1:
        raise UnsupportedModelError("layer_types", layer_types, ("the same for every layer",))
    return _decoder(
        config,
        family,
        sliding_window=config.optional_size("sliding_window", absent=4096),
        absent={"num_key_value_heads": 8, "bos_token_id": 1, "eos_token_id": 2},
    )


def _qwen2(config: Fields, family: Family) -> ModelSpec:
    """Qwen2, Qwen2.5: biases on q, k and v (https://arxiv.org/abs/2407.10671)."""
    _refuse_sliding_layers(config)
    return _decoder(config, family, qkv_bias=True, absent={"num_key_value_heads": 32})


def _qwen3(config: Fields, family: Family) -> ModelSpec:
    """Qwen3: each head's q and k are normed (https://arxiv.org/abs/2505.09388)."""
    _refuse_sliding_layers(config)
    attention_bias = config.flag("attention_bias", False)
    return _decoder(
        config,
        family,
        qkv_bias=attention_bias,
        o_bias=attention_bias,
        qk_norm=True,
        absent={"num_key_value_heads": 32, "head_dim": 128},
    )


def _decoder(
    config: Fields,
    family: Family,
    *,
    absent: Mapping[str, int],
    sliding_window: int | None = None,
    qkv_bias: bool = False,
    o_bias: bool = False,
    mlp_bias: bool = False,
    qk_norm: bool = False,
) -> ModelSpec:
    """The layout that Llama set: RMSNorm, rotary positions, grouped-query attention, gated MLP.

    Keyword arguments are what the families differ in; `absent` holds the defaults that are not null
    of fields that the config may lack.
    """
    config.must_be("hidden_act", ("silu",), absent="silu")
    _check_rope(config)
    hidden = config.size("hidden_size")
    num_layers = config.size("num_hidden_layers")
    num_q_heads = config.size("num_attention_heads")
    num_kv_heads = (
        config.optional_size("num_key_value_heads", absent.get("num_key_value_heads"))
        or num_q_heads
    )
    if num_q_heads % num_kv_heads:
        raise ValueError(
            f"num_attention_heads ({num_q_heads}) must be a multiple of "
            f"num_key_value_heads ({num_kv_heads})"
        )
    head_dim = config.optional_size("head_dim", absent.get("head_dim")) or _divide_heads(
        "hidden_size", hidden, "num_attention_heads", num_q_heads
    )
    if head_dim % 2:
        raise ValueError(f"head_dim must be even for rotary embedding, got {head_dim}")
    intermediate, vocab = config.size("intermediate_size"), config.size("vocab_size")
    tied = config.flag("tie_word_embeddings", False)

    q = Section(Axis.Q_HEADS, num_q_heads, head_dim)
    kv = Section(Axis.KV_HEADS, num_kv_heads, head_dim)
    mlp = Section(Axis.MLP, intermediate)

    def layer(name: str) -> tuple[ParameterSpec, ...]:
        attn = f"{name}.self_attn"
        qk_norms = (
            replicated(f"{attn}.q_norm.weight", head_dim),
            replicated(f"{attn}.k_norm.weight", head_dim),
        )
        return (
            replicated(f"{name}.input_layernorm.weight", hidden),
            *column(f"{attn}.q_proj", (q,), hidden, bias=qkv_bias),
            *column(f"{attn}.k_proj", (kv,), hidden, bias=qkv_bias),
            *column(f"{attn}.v_proj", (kv,), hidden, bias=qkv_bias),
            *(qk_norms if qk_norm else ()),
            *row(f"{attn}.o_proj", (q,), hidden, bias=o_bias),
            replicated(f"{name}.post_attention_layernorm.weight", hidden),
            *column(f"{name}.mlp.gate_proj", (mlp,), hidden, bias=mlp_bias),
            *column(f"{name}.mlp.up_proj", (mlp,), hidden, bias=mlp_bias),
            *row(f"{name}.mlp.down_proj", (mlp,), hidden, bias=mlp_bias),
        )

    return ModelSpec(
        family=family.name,
        architecture=family.architecture,
        hidden_size=hidden,
        num_layers=num_layers,
        num_q_heads=num_q_heads,
        num_kv_heads=num_kv_heads,
        head_dim=head_dim,
        intermediate_size=intermediate,
        vocab_size=vocab,
        max_position_embeddings=config.size("max_position_embeddings"),
        sliding_window=sliding_window,
        dtype=config.dtype(),
        tie_word_embeddings=tied,
        eos_token_ids=config.token_ids("eos_token_id", absent.get("eos_token_id")),
        bos_token_id=config.token_id("bos_token_id", absent.get("bos_token_id")),
        parameters=(
            vocab_embedding("model.embed_tokens", vocab, hidden),
            *(p for i in range(num_layers) for p in layer(f"model.layers.{i}")),
            replicated("model.norm.weight", hidden),
            *(() if tied else (lm_head("lm_head", vocab, hidden),)),
        ),
        # Old transformers saved the rotary frequencies, which follow from the config.
        ignored=("model.*rotary_emb.inv_freq", *(("lm_head.weight",) if tied else ())),
        optional_prefix="",
        layer_prefix="model.layers",
        blocks=(
            ResidualBlock("input_layernorm", "self_attn"),
            ResidualBlock("post_attention_layernorm", "mlp"),
        ),
        embedding="model.embed_tokens",
        final_norm="model.norm",
        lm_head="lm_head",
    )


def _gpt2(config: Fields, family: Family) -> ModelSpec:
    """GPT-2 (Radford et al. 2019): LayerNorm, learned positions, fused q, k and v, biases."""
    config.must_be("activation_function", GPT2_ACTIVATIONS, absent="gelu_new")
    config.must_be("scale_attn_weights", (True,), absent=True)
    config.must_be("scale_attn_by_inverse_layer_idx", (False,), absent=False)
    config.must_be("reorder_and_upcast_attn", (False,), absent=False)
    config.must_be("add_cross_attention", (False,), absent=False)
    hidden, num_layers = config.size("n_embd"), config.size("n_layer")
    num_heads = config.size("n_head")
    head_dim = _divide_heads("n_embd", hidden, "n_head", num_heads)
    intermediate = config.optional_size("n_inner", absent=None) or 4 * hidden
    vocab, context = config.size("vocab_size"), config.size("n_positions")
    tied = config.flag("tie_word_embeddings", True)

    q = Section(Axis.Q_HEADS, num_heads, head_dim)
    kv = Section(Axis.KV_HEADS, num_heads, head_dim)
    mlp = Section(Axis.MLP, intermediate)

    def norm(name: str) -> tuple[ParameterSpec, ...]:
        return replicated(f"{name}.weight", hidden), replicated(f"{name}.bias", hidden)

    def layer(name: str) -> tuple[ParameterSpec, ...]:
        return (
            *norm(f"{name}.ln_1"),
            *column(f"{name}.attn.c_attn", (q, kv, kv), hidden, bias=True, transposed=True),
            *row(f"{name}.attn.c_proj", (q,), hidden, bias=True, transposed=True),
            *norm(f"{name}.ln_2"),
            *column(f"{name}.mlp.c_fc", (mlp,), hidden, bias=True, transposed=True),
            *row(f"{name}.mlp.c_proj", (mlp,), hidden, bias=True, transposed=True),
        )

    return ModelSpec(
        family=family.name,
        architecture=family.architecture,
        hidden_size=hidden,
        num_layers=num_layers,
        num_q_heads=num_heads,
        num_kv_heads=num_heads,
        head_dim=head_dim,
        intermediate_size=intermediate,
        vocab_size=vocab,
        max_position_embeddings=context,
        sliding_window=None,
        dtype=config.dtype(),
        tie_word_embeddings=tied,
        eos_token_ids=config.token_ids("eos_token_id", 50256),
        bos_token_id=config.token_id("bos_token_id", 50256),
        parameters=(
            vocab_embedding("transformer.wte", vocab, hidden),
            replicated("transformer.wpe.weight", context, hidden),
            *(p for i in range(num_layers) for p in layer(f"transformer.h.{i}")),
            *norm("transformer.ln_f"),
            *(() if tied else (lm_head("lm_head", vocab, hidden),)),
        ),
        # Old transformers saved the causal masks.
        ignored=("*.attn.bias", "*.attn.masked_bias", *(("lm_head.weight",) if tied else ())),
        optional_prefix="transformer.",
        layer_prefix="transformer.h",
        blocks=(ResidualBlock("ln_1", "attn"), ResidualBlock("ln_2", "mlp")),
        embedding="transformer.wte",
        final_norm="transformer.ln_f",
        lm_head="lm_head",
    )


def _divide_heads(width_field: str, width: int, heads_field: str, heads: int) -> int:
    if width % heads:
        raise ValueError(f"{width_field} ({width}) must be a multiple of {heads_field} ({heads})")
    return width // heads


def _check_rope(config: Fields) -> None:
    """Refuse rotary variations that the workers don't compute, and values they can't compute with.

    transformers 5 writes `rope_parameters`; older files have `rope_scaling`, which wins, and keep
    `rope_theta` beside it.
    """
    config.number("rope_theta", absent=10000.0)
    config.must_be("partial_rotary_factor", (1, None), absent=None)
    name = "rope_scaling" if config.values.get("rope_scaling") else "rope_parameters"
    values = config.get(name, absent=None)
    if values is None:
        return
    if not isinstance(values, Mapping):
        raise ValueError(f"{name} must be an object or null, got {values!r}")
    rope = Fields(values, prefix=f"{name}.")
    if any(isinstance(value, Mapping) for value in values.values()):
        raise UnsupportedModelError(name, dict(values), ("the same for every layer",))
    type_field = "rope_type" if "rope_type" in values else "type"  # `type` before transformers 4.43
    rope.must_be(type_field, ROPE_TYPES, absent="default")
    rope.must_be("partial_rotary_factor", (1, None), absent=None)
    if values.get("rope_theta") is not None:
        rope.number("rope_theta")
    rope_type = values.get(type_field, "default")
    if rope_type in ("linear", "llama3"):
        rope.number("factor")
    if rope_type == "llama3":
        low, high = rope.number("low_freq_factor"), rope.number("high_freq_factor")
        rope.size("original_max_position_embeddings", config.size("max_position_embeddings"))
        if high <= low:
            raise ValueError(f"{name}.high_freq_factor must exceed {low} (low), got {high}")


def _layer_types(config: Fields) -> tuple[object, ...]:
    value = config.get("layer_types", absent=None)
    if value is not None and not isinstance(value, list | tuple):
        raise ValueError(f"layer_types must be a list or null, got {value!r}")
    return tuple(value or ())


def _refuse_sliding_layers(config: Fields) -> None:
    """Qwen can put a window on some layers only; a setting that reaches no layer is harmless."""
    layer_types = _layer_types(config)
    if any(kind != "full_attention" for kind in layer_types):
        raise UnsupportedModelError("layer_types", list(layer_types), ("full_attention",))
    if layer_types or not config.flag("use_sliding_window", False):
        return
    window = config.optional_size("sliding_window", absent=4096)
    num_layers = config.size("num_hidden_layers")
    max_window_layers = config.get("max_window_layers", absent=28)
    if not isinstance(max_window_layers, int):
        raise ValueError(f"max_window_layers must be an integer, got {max_window_layers!r}")
    if window is not None and max_window_layers < num_layers:
        raise UnsupportedModelError("use_sliding_window", True, (False,))


FAMILIES = (
    Family("llama", "LlamaForCausalLM", _llama),
    Family("mistral", "MistralForCausalLM", _mistral),
    Family("qwen2", "Qwen2ForCausalLM", _qwen2),
    Family("qwen3", "Qwen3ForCausalLM", _qwen3),
    Family("gpt2", "GPT2LMHeadModel", _gpt2),
)


def model_spec(config: Mapping[str, object]) -> ModelSpec:
    """The spec of the model that `config`, a parsed `config.json`, describes.

    The family is `architectures[0]`, or `model_type` where no architecture is named.

    Raises:
        UnsupportedModelError: a family, or a variation of one, that would be computed wrongly.
        ValueError: a field is missing, of the wrong type or out of range; names field and value.
    """
    fields = Fields(config)
    if config.get("quantization_config") is not None:
        raise UnsupportedModelError(
            "quantization_config", config["quantization_config"], ("no quantization",)
        )
    architectures = config.get("architectures")
    if architectures is not None and not isinstance(architectures, list | tuple):
        raise ValueError(f"architectures must be a list of class names, got {architectures!r}")
    if architectures:
        for family in FAMILIES:
            if family.architecture == architectures[0]:
                return family.declare(fields, family)
        supported = tuple(family.architecture for family in FAMILIES)
        raise UnsupportedModelError("architectures[0]", architectures[0], supported)
    model_type = fields.text("model_type")
    for family in FAMILIES:
        if family.name == model_type:
            return family.declare(fields, family)
    raise UnsupportedModelError("model_type", model_type, tuple(f.name for f in FAMILIES))
