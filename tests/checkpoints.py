"""Small random checkpoints that transformers itself makes, one a family and a variation of it.

Head counts are such that hardly a tp size divides them. The weights are drawn wider than a trained
model's first ones, so that the best token is not decided by the last bit.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

CONTEXT = 256

_LLAMA_LIKE = {
    "hidden_size": 72,
    "intermediate_size": 104,
    "num_hidden_layers": 3,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "vocab_size": 331,
    "max_position_embeddings": CONTEXT,
    "initializer_range": 0.25,
    "bos_token_id": 1,
    "eos_token_id": None,
    "pad_token_id": None,
}


@dataclass(frozen=True)
class Variation:
    """A config class of transformers and what it is called with."""

    config: type[Any]
    settings: dict[str, Any]


def _llama_like(config: type[Any], **changes: Any) -> Variation:
    return Variation(config, _LLAMA_LIKE | changes)


VARIATIONS = {
    "llama2": _llama_like(
        transformers.LlamaConfig, num_attention_heads=6, num_key_value_heads=6, vocab_size=257
    ),
    "llama3": _llama_like(
        transformers.LlamaConfig,
        hidden_size=80,
        num_attention_heads=10,
        num_key_value_heads=2,
        head_dim=12,
        rope_parameters={
            "rope_type": "llama3",
            "rope_theta": 10000.0,
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 64,
        },
    ),
    "smollm2": _llama_like(transformers.LlamaConfig, tie_word_embeddings=True),
    "llama_biased": _llama_like(
        transformers.LlamaConfig,
        attention_bias=True,
        mlp_bias=True,
        rope_parameters={"rope_type": "linear", "rope_theta": 10000.0, "factor": 2.0},
    ),
    "mistral": _llama_like(
        transformers.MistralConfig,
        num_attention_heads=7,
        num_key_value_heads=7,
        hidden_size=56,
        head_dim=8,
        sliding_window=24,
    ),
    "qwen2": _llama_like(transformers.Qwen2Config, intermediate_size=97),
    "qwen3": _llama_like(transformers.Qwen3Config, head_dim=16, intermediate_size=101),
    "gpt2": Variation(
        transformers.GPT2Config,
        {
            "n_embd": 70,
            "n_head": 5,
            "n_layer": 3,
            "n_positions": CONTEXT,
            "vocab_size": 331,
            "initializer_range": 0.25,
            "bos_token_id": None,
            "eos_token_id": None,
            "pad_token_id": None,
        },
    ),
}


def build(variation: str, folder: Path, **save: Any) -> Path:
    """Writes a variation's checkpoint, always the same weights; `save` goes to transformers."""
    chosen = VARIATIONS[variation]
    torch.manual_seed(sum(variation.encode()))
    config = chosen.config(**chosen.settings)
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    # Biases start at zero, where a forgotten one would not show.
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter.normal_(std=0.2)
    model.generation_config.eos_token_id = None
    model.save_pretrained(folder, **save)
    return folder


def add_tokenizer(folder: Path, chat_template: str) -> None:
    """One token a byte, so that any text is a prompt; its ids are below 256."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({letter: i for i, letter in enumerate(alphabet)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "chat_template.jinja").write_text(chat_template)


def oracle(folder: Path) -> Any:
    """The checkpoint in transformers, float32, to compare with."""
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    return model.eval()


def greedy(model: Any, prompt: list[int], num_tokens: int) -> list[int]:
    """What transformers generates, greedily and without stopping."""
    with torch.inference_mode():
        output = model.generate(
            torch.tensor([prompt], device=model.device),
            attention_mask=torch.ones(1, len(prompt), dtype=torch.int64, device=model.device),
            max_new_tokens=num_tokens,
            min_new_tokens=num_tokens,
            do_sample=False,
            pad_token_id=0,
        )
    return output[0, len(prompt) :].tolist()
