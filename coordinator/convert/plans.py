"""The shard plan and what it is about."""

from colrow.v1 import shard_plan_pb2
from coordinator.convert.tensors import DTYPE_VALUES
from coordinator.model_spec import Axis, Combine, ParameterSpec
from coordinator.shard_plan import ShardPlan

_AXIS_VALUES = {
    Axis.Q_HEADS: shard_plan_pb2.AXIS_Q_HEADS,
    Axis.KV_HEADS: shard_plan_pb2.AXIS_KV_HEADS,
    Axis.MLP: shard_plan_pb2.AXIS_MLP,
    Axis.VOCAB: shard_plan_pb2.AXIS_VOCAB,
}
COMBINE_VALUES = {
    Combine.CONCAT: shard_plan_pb2.COMBINE_CONCAT,
    Combine.SUM: shard_plan_pb2.COMBINE_SUM,
    Combine.REPLICATE: shard_plan_pb2.COMBINE_REPLICATE,
}
COMBINES = {value: name for name, value in COMBINE_VALUES.items()}


def plan_message(plan: ShardPlan) -> shard_plan_pb2.ShardPlan:
    spec = plan.spec
    return shard_plan_pb2.ShardPlan(
        family=spec.family,
        architecture=spec.architecture,
        tp_size=plan.tp_size,
        data_type=DTYPE_VALUES[plan.dtype],
        ranks=rank_messages(plan),
        checkpoint_bytes=plan.checkpoint_bytes,
        replicated_bytes=plan.replicated_bytes,
        all_reduce_bytes_per_token=plan.all_reduce_bytes_per_token,
        all_reduce_bytes_per_token_per_layer=plan.all_reduce_bytes_per_token_per_layer,
        num_layers=spec.num_layers,
        hidden_size=spec.hidden_size,
        num_q_heads=spec.num_q_heads,
        num_kv_heads=spec.num_kv_heads,
        head_dim=spec.head_dim,
        intermediate_size=spec.intermediate_size,
        vocab_size=spec.vocab_size,
    )


def rank_messages(plan: ShardPlan) -> list[shard_plan_pb2.RankShard]:
    return [
        shard_plan_pb2.RankShard(
            rank=shard.rank,
            ranges=[
                shard_plan_pb2.AxisRange(axis=_AXIS_VALUES[axis], start=r.start, stop=r.stop)
                for axis, r in shard.ranges.items()
            ],
            weight_bytes=shard.weight_bytes,
            kv_bytes_per_token=shard.kv_bytes_per_token,
        )
        for shard in plan.ranks
    ]


def parameter_message(parameter: ParameterSpec) -> shard_plan_pb2.Parameter:
    return shard_plan_pb2.Parameter(
        name=parameter.name,
        shape=parameter.shape,
        split_dim=parameter.split_dim,
        sections=[
            shard_plan_pb2.Section(axis=_AXIS_VALUES[s.axis], units=s.units, unit_size=s.unit_size)
            for s in parameter.sections
        ],
        combine=COMBINE_VALUES[parameter.combine],
    )
