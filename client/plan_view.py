"""`colrow plan`: from a model's `config.json` to what every rank would hold, as tables and as data."""

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from rich.table import Table

from client.model_source import Progress, resolve_model
from client.views import RankRow, mib, new_table, rank_table, ranks_text
from coordinator.cost_model import H200_NVLINK, SHORT_CONTEXT, predicted_step, unpredictable
from coordinator.families import model_spec
from coordinator.model_spec import Axis, Combine, ModelSpec, ParameterSpec
from coordinator.shard_plan import ShardPlan


def load_spec(model: str | None, progress: Progress | None = None) -> ModelSpec:
    """The spec of MODEL, which may also be the path of a config.json. Weights are not fetched.

    ValueError where it is no model, or one that is not supported.
    """
    if model is not None and model.endswith(".json") and Path(model).expanduser().is_file():
        return read_spec(Path(model).expanduser())
    return read_spec(resolve_model(model, weights=False, progress=progress) / "config.json")


def read_spec(config_file: Path) -> ModelSpec:
    """The spec that a config.json describes; ValueError naming the file where it is none."""
    try:
        config = json.loads(config_file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:  # neither JSON nor text is a ValueError
        raise ValueError(f"{config_file}: {error}") from error
    if not isinstance(config, dict):
        raise ValueError(f"{config_file}: is no JSON object")
    return model_spec(config)


def plan_rank_rows(plan: ShardPlan) -> list[RankRow]:
    return [
        RankRow(
            shard.rank,
            {str(axis): (r.start, r.stop) for axis, r in shard.ranges.items()},
            shard.weight_bytes,
            shard.kv_bytes_per_token,
        )
        for shard in plan.ranks
    ]


def fold_layers(spec: ModelSpec) -> dict[ParameterSpec, int]:
    """Parameters and how many of each: one, with `{i}` in its name, for those that only differ in
    their layer.
    """
    counts: dict[ParameterSpec, int] = {}
    prefix = f"{spec.layer_prefix}."
    for parameter in spec.parameters:
        if parameter.name.startswith(prefix):
            _, _, rest = parameter.name.removeprefix(prefix).partition(".")
            parameter = replace(parameter, name=f"{prefix}{{i}}.{rest}")
        counts[parameter] = counts.get(parameter, 0) + 1
    return counts


def split_kind(parameter: ParameterSpec) -> str:
    """How the parameter is cut, in the words of the field."""
    if parameter.split_dim is None:
        return "replicated"
    if any(section.axis is Axis.VOCAB for section in parameter.sections):
        return "vocab parallel"
    return "column parallel" if parameter.combine is Combine.CONCAT else "row parallel"


def plan_tables(plan: ShardPlan) -> list[Table]:
    """What each rank owns, and how each parameter is cut."""
    spec = plan.spec
    title = f"{spec.architecture} over {ranks_text(plan.tp_size)}, {plan.dtype}"
    ranks = rank_table(title, plan_rank_rows(plan))
    parameters = new_table("Parameters")
    parameters.add_column("name", overflow="fold")
    for column in ("shape", "split", "on each rank", "combined by"):
        parameters.add_column(column)
    for parameter, count in fold_layers(spec).items():
        axes = " + ".join(dict.fromkeys(section.axis for section in parameter.sections))
        parameters.add_row(
            parameter.name + (f" [dim]x {count}[/dim]" if count > 1 else ""),
            _shape(parameter.shape),
            split_kind(parameter) + (f" [dim]({axes})[/dim]" if axes else ""),
            _local_shapes(plan, parameter),
            "" if parameter.combine is Combine.REPLICATE else str(parameter.combine),
        )
    return [ranks, parameters]


def _shape(shape: Sequence[int]) -> str:
    return str(list(shape))


def _local_shapes(plan: ShardPlan, parameter: ParameterSpec) -> str:
    """The shape that ranks hold; where they differ a line for each, with the ranks that hold it."""
    ranks: dict[tuple[int, ...], list[int]] = {}
    for rank in range(plan.tp_size):
        ranks.setdefault(plan.local_shape(parameter, rank), []).append(rank)
    if len(ranks) == 1:
        return _shape(next(iter(ranks)))
    return "\n".join(f"{_rank_list(held_by)}: {_shape(shape)}" for shape, held_by in ranks.items())


def _rank_list(ranks: Sequence[int]) -> str:
    """`0-2,5`"""
    runs: list[list[int]] = []
    for rank in ranks:
        if runs and runs[-1][-1] == rank - 1:
            runs[-1].append(rank)
        else:
            runs.append([rank])
    return ",".join(str(r[0]) if len(r) == 1 else f"{r[0]}-{r[-1]}" for r in runs)


def plan_summary(plan: ShardPlan) -> list[str]:
    """Lines on memory, communication and time as a whole."""
    spec = plan.spec
    held = plan.checkpoint_bytes + plan.replicated_bytes
    lines = [
        f"Memory: the checkpoint has {plan.checkpoint_bytes:,} bytes ({mib(plan.checkpoint_bytes)}), "
        f"the ranks hold {held:,}: {plan.replicated_bytes:,} more, of what is replicated."
    ]
    if spec.tie_word_embeddings:
        lines.append(f"The head is the embedding ({spec.embedding}), so it has no line above.")
    if plan.tp_size == 1:
        return [*lines, "Communication: none, there is one rank.", _prediction(plan)]
    per_layer = plan.all_reduce_bytes_per_token_per_layer
    return [
        *lines,
        f"Communication: a rank puts {plan.all_reduce_bytes_per_token:,} bytes a token into "
        f"all-reduces: {per_layer:,} in each of {spec.num_layers} layers (after attention, after "
        f"the MLP) and {per_layer // 2:,} after the embedding. To choose a token the ranks exchange "
        "a few numbers more, never their logits.",
        _prediction(plan),
    ]


def _prediction(plan: ShardPlan) -> str:
    """What the cost model says of a step of one sequence, or why it says nothing."""
    heading = f"Prediction for {H200_NVLINK.name}:"
    step = predicted_step(plan)
    if step is None:
        return f"{heading} none, {unpredictable(plan)}."
    line = f"{heading} one token of one sequence takes {1e3 * step.seconds:.2f} ms"
    if step.all_reduce.algorithm is None:
        return f"{line}."
    return (
        f"{line}, of which {1e3 * step.communication_s:.2f} ms ({step.communication_share:.0%}) are "
        f"communication: {step.num_all_reduces} all-reduces of {1e6 * step.all_reduce.seconds:.1f} µs "
        f"({step.all_reduce.algorithm}), and the exchange."
    )


def _prediction_data(plan: ShardPlan) -> dict[str, Any] | None:
    step = predicted_step(plan)
    if step is None:
        return None
    return {
        "hardware": H200_NVLINK.name,
        "context_tokens": SHORT_CONTEXT,
        "step_s": step.seconds,
        "communication_s": step.communication_s,
        "num_all_reduces": step.num_all_reduces,
        "all_reduce_s": step.all_reduce.seconds,
        "all_reduce_algorithm": step.all_reduce.algorithm,
    }


def plan_data(plan: ShardPlan) -> dict[str, Any]:
    """The plan as data for JSON; bytes and units are whole numbers."""
    spec = plan.spec
    return {
        "family": spec.family,
        "architecture": spec.architecture,
        "tp_size": plan.tp_size,
        "dtype": plan.dtype,
        "num_layers": spec.num_layers,
        "hidden_size": spec.hidden_size,
        "num_q_heads": spec.num_q_heads,
        "num_kv_heads": spec.num_kv_heads,
        "head_dim": spec.head_dim,
        "intermediate_size": spec.intermediate_size,
        "vocab_size": spec.vocab_size,
        "tie_word_embeddings": spec.tie_word_embeddings,
        "checkpoint_bytes": plan.checkpoint_bytes,
        "replicated_bytes": plan.replicated_bytes,
        "all_reduce_bytes_per_token": plan.all_reduce_bytes_per_token,
        "all_reduce_bytes_per_token_per_layer": plan.all_reduce_bytes_per_token_per_layer,
        "prediction": _prediction_data(plan),
        "ranks": [
            {
                "rank": shard.rank,
                "ranges": {str(axis): [r.start, r.stop] for axis, r in shard.ranges.items()},
                "weight_bytes": shard.weight_bytes,
                "kv_bytes_per_token": shard.kv_bytes_per_token,
            }
            for shard in plan.ranks
        ],
        "parameters": [
            {
                "name": parameter.name,
                "shape": list(parameter.shape),
                "split": split_kind(parameter),
                "split_dim": parameter.split_dim,
                "axes": [str(section.axis) for section in parameter.sections],
                "combine": str(parameter.combine),
                "local_shapes": [
                    list(plan.local_shape(parameter, rank)) for rank in range(plan.tp_size)
                ],
            }
            for parameter in spec.parameters
        ],
    }
