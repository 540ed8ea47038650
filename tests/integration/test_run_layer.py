"""RunLayer, module by module, is what the unsharded module of transformers computes."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers.pytorch_utils import Conv1D

from client.grpc_client import array
from colrow.v1 import control_service_pb2, shard_plan_pb2
from coordinator.model_folder import ModelFolder
from coordinator.model_spec import ModelSpec
from coordinator.shard_plan import ShardPlan, make_plan
from tests import checkpoints
from tests.clusters import RunningCluster, WorkerPool, cluster

TOLERANCE = 1e-4
"""Of the largest value of the expected output."""

NUM_TOKENS = 40
"""More than Mistral's window in these checkpoints, so that it shows."""

_CONCAT, _SUM = shard_plan_pb2.COMBINE_CONCAT, shard_plan_pb2.COMBINE_SUM
_REPLICATE = shard_plan_pb2.COMBINE_REPLICATE


@dataclass(frozen=True)
class Checkpoint:
    """A random checkpoint: what transformers makes of it, and what its config.json says."""

    folder: Path
    oracle: Any
    spec: ModelSpec

    def module(self, name: str) -> torch.nn.Module:
        found: torch.nn.Module = self.oracle.get_submodule(name)
        return found

    def names(self) -> list[str]:
        """Every module that RunLayer can run, outside of layers and of one layer."""
        layer = f"{self.spec.layer_prefix}.1"
        inside = [name for name, _ in self.module(layer).named_modules() if name]
        # An activation function has no weights to split.
        skipped = ("act", "act_fn", "dropout", "attn_dropout", "resid_dropout", "rotary_emb")
        inside = [name for name in inside if name.rpartition(".")[2] not in skipped]
        position = ["transformer.wpe"] if self.spec.family == "gpt2" else []
        outside = [self.spec.embedding, *position, self.spec.final_norm, self.spec.lm_head]
        return [*outside, *(f"{layer}.{name}" for name in inside)]


@pytest.fixture(scope="module", params=sorted(checkpoints.VARIATIONS))
def checkpoint(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Checkpoint:
    folder = checkpoints.build(request.param, tmp_path_factory.mktemp(request.param))
    return Checkpoint(folder, checkpoints.oracle(folder), ModelFolder.open(folder).spec)


@pytest.fixture(scope="module", params=[2, 3], ids=lambda tp: f"tp{tp}")
def running(
    request: pytest.FixtureRequest, checkpoint: Checkpoint, worker_pool: WorkerPool
) -> Iterator[RunningCluster]:
    with cluster(worker_pool, checkpoint.folder, request.param) as running:
        yield running


@pytest.fixture
def plan(checkpoint: Checkpoint, running: RunningCluster) -> ShardPlan:
    return make_plan(checkpoint.spec, running.client.cluster().plan.tp_size)


def attention_inputs(oracle: Any, attention: str) -> dict[str, Any]:
    """What a model hands to its attention beside hidden states: positions from 0 on, causal mask."""
    seen: dict[str, Any] = {}

    def keep(module: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        seen.update(kwargs)

    hook = oracle.get_submodule(attention).register_forward_pre_hook(keep, with_kwargs=True)
    oracle(torch.zeros(1, NUM_TOKENS, dtype=torch.int64), use_cache=False)
    hook.remove()
    seen.pop("hidden_states", None)
    return seen


def expected_output(checkpoint: Checkpoint, name: str, x: Tensor) -> Tensor:
    """What the module of transformers makes of [num_tokens, features]."""
    module = checkpoint.module(name)
    layer = f"{checkpoint.spec.layer_prefix}.1"
    attention = checkpoint.spec.blocks[0].body
    with torch.inference_mode():
        if name not in (layer, f"{layer}.{attention}"):
            return module(x)
        inputs = attention_inputs(checkpoint.oracle, f"{layer}.{attention}")
        output = module(x.unsqueeze(0), **inputs)
        return (output[0] if isinstance(output, tuple) else output).reshape(x.shape)


def activation_of(checkpoint: Checkpoint, name: str) -> Tensor:
    """An input that suits the module."""
    generator = torch.Generator().manual_seed(sum(name.encode()))
    module = checkpoint.module(name)
    if isinstance(module, torch.nn.Embedding):
        return torch.randint(module.num_embeddings, (NUM_TOKENS,), generator=generator)
    features = checkpoint.spec.hidden_size
    if isinstance(module, torch.nn.Linear):
        features = module.in_features
    elif isinstance(module, Conv1D):
        features = module.nx
    elif name.endswith((".q_norm", ".k_norm")):
        features = checkpoint.spec.head_dim
    return torch.randn(NUM_TOKENS, features, generator=generator)


def assert_close(got: np.ndarray, expected: np.ndarray) -> None:
    assert got.shape == expected.shape
    assert np.abs(got - expected).max() <= TOLERANCE * np.abs(expected).max()


def run(running: RunningCluster, name: str, x: Tensor) -> control_service_pb2.ModuleRun:
    response = running.client.run_layer(module=name, activation=x.numpy())
    (only,) = response.runs
    assert only.module == name
    assert response.output == only.output
    assert np.array_equal(array(only.input), x.numpy())
    return only


def check_partials(run: control_service_pb2.ModuleRun, plan: ShardPlan) -> None:
    """The ranks' outputs have the shapes of their ranges, and combine to the output."""
    output = array(run.output)
    partials = [array(partial.output) for partial in run.partials]
    assert [partial.rank for partial in run.partials] == [*range(plan.tp_size)]
    columns = [[(c.start, c.stop) for c in partial.columns] for partial in run.partials]
    if run.combine == _CONCAT:
        weight = f"{run.module}.weight"
        tied = f"{plan.spec.embedding}.weight"
        parameters = {parameter.name: parameter for parameter in plan.spec.parameters}
        parameter = parameters[weight if weight in parameters else tied]
        covered = np.zeros(output.shape[1], dtype=int)
        for rank, partial in enumerate(partials):
            owned = plan.slices(parameter, rank)
            assert columns[rank] == [*owned]
            assert partial.shape == (len(output), sum(stop - start for start, stop in owned))
            at = 0
            for start, stop in owned:
                assert np.array_equal(output[:, start:stop], partial[:, at : at + stop - start])
                covered[start:stop] += 1
                at += stop - start
        assert covered.min() == 1
    else:
        assert columns == [[]] * plan.tp_size
        assert all(partial.shape == output.shape for partial in partials)
    if run.combine == _SUM:
        assert_close(sum(partials[1:], start=partials[0]), output)
        assert not any(np.array_equal(partial, output) for partial in partials)
    if run.combine == _REPLICATE:
        assert all(np.array_equal(partial, output) for partial in partials)


def test_every_module_is_that_of_transformers_and_its_parts_are_those_of_the_plan(
    checkpoint: Checkpoint, running: RunningCluster, plan: ShardPlan
) -> None:
    combined = {}
    for name in checkpoint.names():
        x = activation_of(checkpoint, name)
        ran = run(running, name, x)
        try:
            assert_close(array(ran.output), expected_output(checkpoint, name, x).numpy())
            check_partials(ran, plan)
        except AssertionError as error:
            raise AssertionError(f"{name}: {error}") from error
        combined[name.rpartition(".")[2]] = ran.combine
    if checkpoint.spec.family == "gpt2":
        assert combined == {
            **dict.fromkeys(("wte", "c_proj", "attn", "mlp"), _SUM),
            **dict.fromkeys(("c_attn", "c_fc", "lm_head"), _CONCAT),
            **dict.fromkeys(("wpe", "ln_1", "ln_2", "ln_f"), _REPLICATE),
        }
    else:
        norms = ["norm", "input_layernorm", "post_attention_layernorm"]
        norms += ["q_norm", "k_norm"] if checkpoint.spec.family == "qwen3" else []
        columns = ("q_proj", "k_proj", "v_proj", "gate_proj", "up_proj", "lm_head")
        assert combined == {
            **dict.fromkeys(("embed_tokens", "o_proj", "down_proj", "self_attn", "mlp"), _SUM),
            **dict.fromkeys(columns, _CONCAT),
            **dict.fromkeys(norms, _REPLICATE),
        }


def test_a_whole_layer_is_that_of_transformers_and_made_of_its_modules(
    checkpoint: Checkpoint, running: RunningCluster, plan: ShardPlan
) -> None:
    name = f"{checkpoint.spec.layer_prefix}.1"
    x = activation_of(checkpoint, name)
    response = running.client.run_layer(layer=1, activation=x.numpy())
    modules = [part for block in checkpoint.spec.blocks for part in (block.norm, block.body)]
    assert [ran.module for ran in response.runs] == [f"{name}.{module}" for module in modules]
    for ran in response.runs:
        check_partials(ran, plan)
    # Each block takes the norm of what the last one left, and is added to it.
    stream = x.numpy()
    for norm, body in zip(response.runs[::2], response.runs[1::2], strict=True):
        assert np.array_equal(array(norm.input), stream)
        assert np.array_equal(array(body.input), array(norm.output))
        stream = stream + array(body.output)
    assert np.array_equal(array(response.output), stream)
    assert_close(array(response.output), expected_output(checkpoint, name, x).numpy())


def test_modules_one_after_the_other_give_the_logits_of_the_model(
    checkpoint: Checkpoint, running: RunningCluster
) -> None:
    spec, client = checkpoint.spec, running.client
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(spec.vocab_size, (NUM_TOKENS,), generator=generator)
    x = array(client.run_layer(module=spec.embedding, activation=ids.numpy()).output)
    if spec.family == "gpt2":
        positions = np.arange(NUM_TOKENS)
        x = x + array(client.run_layer(module="transformer.wpe", activation=positions).output)
    for layer in range(spec.num_layers):
        x = array(client.run_layer(layer=layer, activation=x).output)
    x = array(client.run_layer(module=spec.final_norm, activation=x).output)
    logits = array(client.run_layer(module=spec.lm_head, activation=x).output)
    with torch.inference_mode():
        expected = checkpoint.oracle(ids.unsqueeze(0)).logits[0].numpy()
    assert_close(logits, expected)


def test_without_an_activation_seeded_noise_of_the_right_shape_is_sent(
    checkpoint: Checkpoint, running: RunningCluster
) -> None:
    for name in checkpoint.names():
        first, again, other = (
            running.client.run_layer(module=name, num_tokens=3, seed=seed) for seed in (1, 1, 2)
        )
        x = array(first.runs[0].input)
        assert x.shape == activation_of(checkpoint, name)[:3].shape, name
        assert first == again
        assert not np.array_equal(x, array(other.runs[0].input))
