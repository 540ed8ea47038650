"""The spec of every family is what transformers makes of the same config.json."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors import safe_open
from torch import nn

from coordinator.families import model_spec
from coordinator.model_spec import Axis, Combine, ModelSpec, UnsupportedModelError
from coordinator.shard_plan import make_plan

Config = dict[str, Any]  # a parsed config.json

LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
# Sizes differ from each other, so that no two dimensions can be taken for one another.
SMALL = {
    "hidden_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 6,
    "num_key_value_heads": 3,
    "intermediate_size": 52,
    "vocab_size": 101,
    "max_position_embeddings": 64,
}
SMALL_GPT2: Config = {"n_embd": 36, "n_layer": 2, "n_head": 3, "n_positions": 40, "vocab_size": 101}

# Variation -> (architecture, fields).
VARIATIONS: dict[str, tuple[str, Config]] = {
    "llama": ("LlamaForCausalLM", SMALL),
    "llama with biases": ("LlamaForCausalLM", SMALL | {"attention_bias": True, "mlp_bias": True}),
    "llama 3, tied": (
        "LlamaForCausalLM",
        SMALL | {"tie_word_embeddings": True, "head_dim": 10, "rope_parameters": LLAMA3_ROPE},
    ),
    "llama, as many KV heads": ("LlamaForCausalLM", SMALL | {"num_key_value_heads": None}),
    "mistral": ("MistralForCausalLM", SMALL | {"sliding_window": 16}),
    "mistral, no window": ("MistralForCausalLM", SMALL | {"sliding_window": None, "head_dim": 12}),
    "qwen2": ("Qwen2ForCausalLM", SMALL),
    "qwen2, tied": ("Qwen2ForCausalLM", SMALL | {"tie_word_embeddings": True}),
    "qwen3": ("Qwen3ForCausalLM", SMALL | {"head_dim": 16, "tie_word_embeddings": True}),
    "qwen3 with biases": ("Qwen3ForCausalLM", SMALL | {"head_dim": 8, "attention_bias": True}),
    "gpt2": ("GPT2LMHeadModel", SMALL_GPT2),
    "gpt2, untied": (
        "GPT2LMHeadModel",
        SMALL_GPT2 | {"n_inner": 70, "tie_word_embeddings": False, "activation_function": "relu"},
    ),
}


def transformers_model(architecture: str, fields: Config) -> Any:
    torch.manual_seed(0)
    model_class = getattr(transformers, architecture)
    return model_class(model_class.config_class(**fields)).eval()


def saved_config(folder: Path) -> Config:
    config: Config = json.loads((folder / "config.json").read_text())
    return config


def saved_shapes(folder: Path) -> dict[str, tuple[int, ...]]:
    with safe_open(folder / "model.safetensors", framework="pt") as checkpoint:
        return {key: tuple(checkpoint.get_slice(key).get_shape()) for key in checkpoint.keys()}  # noqa: SIM118


def spec_shapes(spec: ModelSpec) -> dict[str, tuple[int, ...]]:
    return {parameter.name: parameter.shape for parameter in spec.parameters}


@pytest.fixture(autouse=True, scope="module")
def one_torch_thread() -> Iterator[None]:
    """Tensors of a few dozen elements: handing them to a thread pool takes far longer than they."""
    num_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(num_threads)


@pytest.fixture
def llama() -> Config:
    return {"architectures": ["LlamaForCausalLM"], "model_type": "llama", **SMALL}


@pytest.mark.parametrize("variation", VARIATIONS)
def test_parameters_are_exactly_those_that_transformers_saves(
    variation: str, tmp_path: Path
) -> None:
    transformers_model(*VARIATIONS[variation]).save_pretrained(tmp_path)
    spec = model_spec(saved_config(tmp_path))
    assert len(spec_shapes(spec)) == len(spec.parameters), "a name is declared twice"
    assert spec_shapes(spec) == saved_shapes(tmp_path)


@pytest.mark.parametrize("variation", VARIATIONS)
def test_sizes_are_those_of_the_transformers_config(variation: str, tmp_path: Path) -> None:
    architecture, fields = VARIATIONS[variation]
    config = getattr(transformers, architecture).config_class(**fields)
    config.save_pretrained(tmp_path)
    spec = model_spec(saved_config(tmp_path))  # has model_type, but no architectures
    head_dim = getattr(config, "head_dim", None)
    assert spec.architecture == architecture
    assert spec.family == config.model_type
    assert spec.hidden_size == config.hidden_size
    assert spec.num_layers == config.num_hidden_layers
    assert spec.num_q_heads == config.num_attention_heads
    assert spec.num_kv_heads == getattr(config, "num_key_value_heads", config.num_attention_heads)
    assert spec.head_dim == (head_dim or config.hidden_size // config.num_attention_heads)
    assert spec.vocab_size == config.vocab_size
    assert spec.max_position_embeddings == config.max_position_embeddings
    assert spec.sliding_window == getattr(config, "sliding_window", None)
    assert spec.tie_word_embeddings == config.tie_word_embeddings
    assert spec.bos_token_id == config.bos_token_id
    eos = config.eos_token_id
    assert spec.eos_token_ids == (() if eos is None else (eos,))


@pytest.mark.parametrize("variation", VARIATIONS)
def test_names_of_modules_exist_in_the_transformers_model(variation: str) -> None:
    architecture, fields = VARIATIONS[variation]
    model = transformers_model(architecture, fields)
    spec = model_spec({"architectures": [architecture], **fields})
    for name in (spec.embedding, spec.final_norm, spec.lm_head):
        model.get_submodule(name)
    layers = model.get_submodule(spec.layer_prefix)
    assert len(layers) == spec.num_layers
    for layer in layers:
        in_blocks = {name for block in spec.blocks for name in (block.norm, block.body)}
        assert in_blocks == {name for name, _ in layer.named_children()}


@pytest.mark.parametrize("variation", VARIATIONS)
def test_blocks_are_in_the_order_in_which_a_layer_runs_them(variation: str) -> None:
    architecture, fields = VARIATIONS[variation]
    model = transformers_model(architecture, fields)
    spec = model_spec({"architectures": [architecture], **fields})
    calls: list[str] = []
    for name, module in model.get_submodule(f"{spec.layer_prefix}.0").named_children():
        module.register_forward_pre_hook(lambda *_, name=name: calls.append(name))
    with torch.no_grad():
        model(torch.tensor([[1, 2, 3]]))
    assert calls == [name for block in spec.blocks for name in (block.norm, block.body)]


@pytest.mark.parametrize("variation", VARIATIONS)
@pytest.mark.parametrize("tp_size", [2, 5])  # fewer and more ranks than KV heads
def test_partial_outputs_combine_to_the_output_of_the_transformers_module(
    variation: str, tp_size: int
) -> None:
    architecture, fields = VARIATIONS[variation]
    model = transformers_model(architecture, fields)
    spec = model_spec({"architectures": [architecture], **fields})
    plan = make_plan(spec, min(tp_size, spec.num_q_heads))
    checked = 0
    for parameter in spec.parameters:
        if parameter.split_dim is None or not parameter.name.endswith(".weight"):
            continue
        module = model.get_submodule(parameter.name.removesuffix(".weight"))
        size = parameter.shape[parameter.split_dim]
        held = []  # per rank: which indices of the split dimension
        for rank in range(plan.tp_size):
            spans = plan.slices(parameter, rank)
            held.append(torch.tensor([i for span in spans for i in range(*span)]))
        weight = module.weight.detach()
        if isinstance(module, nn.Embedding):
            ids = torch.arange(size)
            expected = module(ids).detach()
            partials = [weight * torch.isin(ids, own)[:, None] for own in held]
        else:
            matrix = weight.T if isinstance(module, nn.Linear) else weight  # [in, out]
            x = torch.randn(5, matrix.shape[0])
            expected = module(x).detach()
            if getattr(module, "bias", None) is not None:
                expected = expected - module.bias.detach()
            if parameter.combine is Combine.SUM:
                partials = [x[:, own] @ matrix[own] for own in held]
            else:
                partials = [x @ matrix[:, own] for own in held]
        if parameter.combine is Combine.SUM:
            combined = torch.stack(partials).sum(0)
        else:
            combined = torch.full_like(expected, torch.nan)
            for own, partial in zip(held, partials, strict=True):
                combined[:, own] = partial
        torch.testing.assert_close(combined, expected)
        checked += 1
    assert checked >= 4 * spec.num_layers + 1


def test_qkv_of_gpt2_is_one_tensor_of_three_sections() -> None:
    spec = model_spec({"architectures": ["GPT2LMHeadModel"], **SMALL_GPT2})
    c_attn = next(p for p in spec.parameters if p.name == "transformer.h.0.attn.c_attn.weight")
    assert c_attn.shape == (36, 108)
    assert c_attn.split_dim == 1
    assert [s.axis for s in c_attn.sections] == [Axis.Q_HEADS, Axis.KV_HEADS, Axis.KV_HEADS]
    assert [(s.units, s.unit_size) for s in c_attn.sections] == [(3, 12)] * 3


def test_a_row_parallel_bias_is_replicated_and_a_column_parallel_one_is_split() -> None:
    architecture, fields = VARIATIONS["llama with biases"]
    spec = model_spec({"architectures": [architecture], **fields})
    combine = {p.name.removeprefix("model.layers.0."): p.combine for p in spec.parameters}
    assert combine["self_attn.q_proj.bias"] == combine["mlp.gate_proj.bias"] == "concat"
    assert combine["self_attn.o_proj.bias"] == combine["mlp.down_proj.bias"] == "replicate"


def test_keys_of_a_gpt2_without_the_prefix_are_the_declared_ones_less_the_prefix(
    tmp_path: Path,
) -> None:
    model = transformers_model("GPT2LMHeadModel", SMALL_GPT2)
    model.transformer.save_pretrained(tmp_path)  # as the first GPT-2 was published
    spec = model_spec({"architectures": ["GPT2LMHeadModel"], **SMALL_GPT2})
    bare = {name.removeprefix(spec.optional_prefix) for name in spec_shapes(spec)}
    assert bare == set(saved_shapes(tmp_path))


@pytest.mark.parametrize("variation", VARIATIONS)
def test_no_declared_parameter_is_ignored(variation: str) -> None:
    architecture, fields = VARIATIONS[variation]
    spec = model_spec({"architectures": [architecture], **fields})
    for name in spec_shapes(spec):
        assert not any(fnmatchcase(name, pattern) for pattern in spec.ignored), name


@pytest.mark.parametrize(
    ("variation", "key"),
    [
        ("llama", "model.layers.1.self_attn.rotary_emb.inv_freq"),
        ("llama 3, tied", "lm_head.weight"),
        ("gpt2", "lm_head.weight"),
        ("gpt2", "h.0.attn.bias"),
        ("gpt2", "transformer.h.1.attn.masked_bias"),
    ],
)
def test_keys_that_old_checkpoints_carry_are_ignored(variation: str, key: str) -> None:
    architecture, fields = VARIATIONS[variation]
    spec = model_spec({"architectures": [architecture], **fields})
    assert any(fnmatchcase(key, pattern) for pattern in spec.ignored)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_dtype_is_that_of_the_saved_checkpoint(dtype: str, tmp_path: Path) -> None:
    model = transformers_model("LlamaForCausalLM", SMALL).to(getattr(torch, dtype))
    model.save_pretrained(tmp_path)
    assert model_spec(saved_config(tmp_path)).dtype == dtype


def test_dtype_is_read_from_either_field_and_is_float32_without(llama: Config) -> None:
    assert model_spec(llama).dtype == "float32"
    assert model_spec(llama | {"torch_dtype": "bfloat16"}).dtype == "bfloat16"
    assert model_spec(llama | {"dtype": "float16"}).dtype == "float16"
    assert model_spec(llama | {"dtype": None, "torch_dtype": "bfloat16"}).dtype == "bfloat16"


@pytest.mark.parametrize("architecture", ["LlamaForCausalLM", "GPT2LMHeadModel"])
@pytest.mark.parametrize(
    ("given", "read"), [(7, (7,)), ([7, 9], (7, 9)), (None, ()), (0, (0,)), ([], ())]
)
def test_end_of_sequence_is_an_id_a_list_or_null(
    architecture: str, given: object, read: tuple[int, ...]
) -> None:
    fields = SMALL if architecture == "LlamaForCausalLM" else SMALL_GPT2
    config = {"architectures": [architecture], **fields, "eos_token_id": given}
    assert model_spec(config).eos_token_ids == read


@pytest.mark.parametrize("model_type", ["llama", "mistral", "qwen2", "qwen3"])
def test_absent_fields_mean_what_they_mean_to_transformers(model_type: str) -> None:
    required = {k: v for k, v in SMALL.items() if k != "num_key_value_heads"}
    required |= {"num_attention_heads": 32, "hidden_size": 128}
    spec = model_spec({"model_type": model_type, **required})
    config = transformers.AutoConfig.for_model(model_type, **required)
    assert spec.num_kv_heads == config.num_key_value_heads
    assert spec.head_dim == (getattr(config, "head_dim", None) or 128 // 32)
    assert spec.sliding_window == getattr(config, "sliding_window", None)
    assert spec.tie_word_embeddings == config.tie_word_embeddings
    assert spec.bos_token_id == config.bos_token_id
    eos = config.eos_token_id
    assert spec.eos_token_ids == (() if eos is None else (eos,))


def test_absent_fields_of_gpt2_mean_what_they_mean_to_transformers() -> None:
    spec = model_spec({"model_type": "gpt2", **SMALL_GPT2})
    config = transformers.GPT2Config(**SMALL_GPT2)
    assert spec.intermediate_size == 4 * config.n_embd
    assert spec.tie_word_embeddings == config.tie_word_embeddings
    assert spec.eos_token_ids == (config.eos_token_id,)


@pytest.mark.parametrize(
    "changes",
    [
        {"rope_scaling": None, "rope_theta": 10000.0},
        {"rope_scaling": {"type": "linear", "factor": 2.0}},
        {"rope_scaling": {**LLAMA3_ROPE}, "rope_theta": 500000.0},
        {"rope_parameters": {"rope_type": "default", "rope_theta": 1e6}},
        {"rope_parameters": {"rope_type": "linear", "rope_theta": 1e6, "factor": 4}},
        {"rope_parameters": {**LLAMA3_ROPE, "original_max_position_embeddings": 8}},
        {"quantization_config": None},
        {"pretraining_tp": 2},
    ],
)
def test_harmless_variations_are_accepted(llama: Config, changes: Config) -> None:
    assert model_spec(llama | changes) == model_spec(llama)


@pytest.mark.parametrize(
    "changes",
    [
        {"use_sliding_window": False, "sliding_window": 32, "max_window_layers": 0},
        {"use_sliding_window": True, "sliding_window": 32, "max_window_layers": 2},
        {"use_sliding_window": True, "sliding_window": None, "max_window_layers": 0},
        {"use_sliding_window": True, "layer_types": ["full_attention"] * 2},
    ],
)
@pytest.mark.parametrize("model_type", ["qwen2", "qwen3"])
def test_a_window_that_reaches_no_layer_is_accepted(model_type: str, changes: Config) -> None:
    assert model_spec({"model_type": model_type, **SMALL} | changes).sliding_window is None


@pytest.mark.parametrize(
    ("model_type", "changes", "field"),
    [
        ("llama", {"architectures": ["LlamaForSequenceClassification"]}, "architectures[0]"),
        ("bert", {}, "model_type"),
        ("llama", {"hidden_act": "gelu"}, "hidden_act"),
        ("llama", {"quantization_config": {"bits": 4}}, "quantization_config"),
        ("llama", {"rope_scaling": {"rope_type": "yarn", "factor": 4}}, "rope_scaling.rope_type"),
        ("llama", {"rope_scaling": {"type": "dynamic", "factor": 4}}, "rope_scaling.type"),
        ("qwen3", {"rope_parameters": {"rope_type": "longrope"}}, "rope_parameters.rope_type"),
        ("qwen3", {"rope_parameters": {"full_attention": {"rope_theta": 1.0}}}, "rope_parameters"),
        ("llama", {"partial_rotary_factor": 0.5}, "partial_rotary_factor"),
        ("mistral", {"layer_types": ["full_attention", "sliding_attention"]}, "layer_types"),
        ("qwen2", {"layer_types": ["full_attention", "sliding_attention"]}, "layer_types"),
        ("qwen2", {"use_sliding_window": True, "max_window_layers": 1}, "use_sliding_window"),
        ("qwen3", {"use_sliding_window": True, "max_window_layers": 0}, "use_sliding_window"),
        ("gpt2", {"activation_function": "tanh"}, "activation_function"),
        ("gpt2", {"scale_attn_by_inverse_layer_idx": True}, "scale_attn_by_inverse_layer_idx"),
        ("gpt2", {"reorder_and_upcast_attn": True}, "reorder_and_upcast_attn"),
        ("gpt2", {"scale_attn_weights": False}, "scale_attn_weights"),
        ("gpt2", {"add_cross_attention": True}, "add_cross_attention"),
    ],
)
def test_what_would_be_computed_wrongly_is_refused_by_name_and_value(
    model_type: str, changes: Config, field: str
) -> None:
    sizes = SMALL_GPT2 if model_type == "gpt2" else SMALL
    with pytest.raises(UnsupportedModelError) as refusal:
        model_spec({"model_type": model_type, **sizes, **changes})
    assert refusal.value.field == field
    assert str(refusal.value).startswith(f"{field} is {refusal.value.value!r}")
    assert all(str(value) in str(refusal.value) for value in refusal.value.supported)
    assert refusal.value.supported


def test_an_unknown_architecture_is_refused_with_the_list_of_supported_ones() -> None:
    with pytest.raises(UnsupportedModelError) as refusal:
        model_spec({"architectures": ["T5ForConditionalGeneration"], "model_type": "t5"})
    assert refusal.value.value == "T5ForConditionalGeneration"
    assert set(refusal.value.supported) == {architecture for architecture, _ in VARIATIONS.values()}


def without(field: str) -> Callable[[Config], Config]:
    return lambda config: {name: value for name, value in config.items() if name != field}


@pytest.mark.parametrize("field", [*SMALL.keys() - {"num_key_value_heads"}])
def test_a_missing_size_is_named(llama: Config, field: str) -> None:
    with pytest.raises(ValueError, match=f"^{field} is missing"):
        model_spec(without(field)(llama))


@pytest.mark.parametrize("field", SMALL_GPT2)
def test_a_missing_size_of_gpt2_is_named(field: str) -> None:
    with pytest.raises(ValueError, match=f"^{field} is missing"):
        model_spec(without(field)({"model_type": "gpt2", **SMALL_GPT2}))


@pytest.mark.parametrize("field", [*SMALL, "head_dim"])
@pytest.mark.parametrize("value", [0, -4, 2.0, "8", True, [4]])
def test_a_size_that_is_no_positive_integer_is_named_with_its_value(
    llama: Config, field: str, value: object
) -> None:
    with pytest.raises(ValueError, match=f"^{field} must be") as error:
        model_spec(llama | {field: value})
    assert repr(value) in str(error.value)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"dtype": "int8"}, "dtype must be one of float32, bfloat16, float16, got 'int8'"),
        ({"torch_dtype": 16}, "torch_dtype must be one of"),
        ({"eos_token_id": "</s>"}, "eos_token_id must be .* got '</s>'"),
        ({"eos_token_id": [2, -1]}, r"eos_token_id must be .* got \[2, -1\]"),
        ({"bos_token_id": 1.5}, "bos_token_id must be .* got 1.5"),
        ({"tie_word_embeddings": "yes"}, "tie_word_embeddings must be true or false, got 'yes'"),
        ({"attention_bias": None}, "attention_bias must be true or false, got None"),
        ({"num_key_value_heads": 4}, r"num_attention_heads \(6\) must be .*_value_heads \(4\)"),
        ({"hidden_size": 50}, r"hidden_size \(50\) must be .* num_attention_heads \(6\)"),
        ({"head_dim": 7}, "head_dim must be even.*got 7"),
        ({"architectures": "LlamaForCausalLM"}, "architectures must be a list"),
        ({"architectures": [], "model_type": None}, "model_type must be a string, got None"),
        ({"rope_theta": -1}, "rope_theta must be a positive number, got -1"),
        ({"rope_scaling": "linear"}, "rope_scaling must be an object or null, got 'linear'"),
        ({"rope_scaling": {"type": "linear"}}, "rope_scaling.factor is missing"),
        ({"rope_scaling": {"type": "linear", "factor": 0}}, "rope_scaling.factor must be"),
        (
            {"rope_parameters": LLAMA3_ROPE | {"high_freq_factor": 1.0}},
            "rope_parameters.high_freq_factor must exceed",
        ),
    ],
)
def test_an_ill_typed_field_is_named_with_its_value(
    llama: Config, changes: Config, message: str
) -> None:
    with pytest.raises(ValueError, match=f"^{message}"):
        model_spec(llama | changes)
