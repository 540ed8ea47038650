"""One module alone on this rank's shard, without communication: tensor parallelism made visible.

A module goes by its Hugging Face name ("model.layers.3.mlp.down_proj"), also where the serving path
has merged it with its neighbours.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from colrow.errors import AnswerTooLarge, InvalidArgument, NotFound, shown
from shard_worker.forward_batch import ForwardBatch
from shard_worker.layers.embedding import Embedding, VocabParallelEmbedding, VocabParallelLMHead
from shard_worker.layers.linear import ColumnParallelLinear, RowParallelBlock, RowParallelLinear
from shard_worker.layers.norm import LayerNorm, RMSNorm
from shard_worker.models import Model
from shard_worker.sharding import ShardLayout

MAX_TOKENS = 4096


@dataclass(frozen=True, slots=True)
class Partial:
    """A rank's partial output [num_tokens, features] and how the ranks' outputs combine.

    `columns` tells, for "concat", which columns [start, stop) of the whole output these are, in order.
    """

    output: Tensor
    combine: str
    columns: tuple[tuple[int, int], ...] = ()


@dataclass(frozen=True, slots=True)
class _Part:
    """A checkpoint module within a merged one."""

    linear: ColumnParallelLinear
    name: str


def _find(model: Model, name: str) -> object:
    """The object that a dotted name leads to. NotFound where the name leads nowhere."""
    found: object = model
    for component in name.split("."):
        members: dict[str, object] = getattr(found, "__dict__", {})
        if isinstance(found, list):
            members = {str(index): member for index, member in enumerate(found)}
        if component in members:
            found = members[component]
            continue
        merged = [
            member
            for member in members.values()
            if isinstance(member, ColumnParallelLinear) and component in member.parts
        ]
        if not merged:
            raise NotFound(
                f"module = {shown(name)}: there is no {shown(component)}",
                reason="UNKNOWN_MODULE",
                metadata={"field": "module", "value": name},
            )
        found = _Part(merged[0], component)
    if isinstance(found, ColumnParallelLinear) and len(found.parts) == 1:
        return _Part(found, found.parts[0])
    return found


def _columns(module: object, layout: ShardLayout, name: str) -> tuple[tuple[int, int], ...]:
    """Which columns of the whole output this rank has, of a module whose outputs are concatenated."""
    match module:
        case _Part():
            return layout.slices(f"{name}.weight")
        case VocabParallelLMHead():
            return ((module.start, module.stop),)
    return ()


@torch.inference_mode()
def compute_partial(
    model: Model, layout: ShardLayout, name: str, activation: Tensor, max_bytes: int
) -> Partial:
    """Runs one module on its whole input and gives this rank's partial output.

    `activation` is [num_tokens, features] in the model's type, or int64 [num_tokens] for an embedding.
    InvalidArgument names the shape that the module takes; NotFound, the module; AnswerTooLarge where the
    output would take over `max_bytes` as float32, before it is computed.
    """
    module = _find(model, name)
    # The device does nothing else meanwhile, and attention takes the square of it.
    if activation.dim() and activation.shape[0] > MAX_TOKENS:
        raise InvalidArgument(
            "activation.shape", tuple(activation.shape), f"are more than {MAX_TOKENS} tokens"
        )
    columns = _columns(module, layout, name)
    hidden_size = model.lm_head.weight.shape[1]
    # A norm within a head gives less than the hidden state, all others without columns give that.
    features = sum(stop - start for start, stop in columns) or hidden_size
    if isinstance(module, RMSNorm | LayerNorm):
        features = module.weight.shape[0]
    if activation.dim() and activation.shape[0] * features * torch.float32.itemsize > max_bytes:
        raise AnswerTooLarge(max_bytes)
    if isinstance(module, VocabParallelEmbedding | Embedding):
        _check_ids(activation, layout.parameters[f"{name}.weight"].shape[0])
        if isinstance(module, Embedding):
            return Partial(module(activation), "replicate")
        return Partial(module.partial(activation), "sum")
    if activation.dim() != 2 or not activation.is_floating_point():
        raise InvalidArgument(
            "activation", tuple(activation.shape), "a float tensor [num_tokens, features] is needed"
        )
    match module:
        case RMSNorm() | LayerNorm():
            _check_features(activation, module.weight.shape[0])
            return Partial(module(activation), "replicate")
        case _Part(linear=linear, name=part):
            weight = layout.parameters[f"{name}.weight"]
            _check_features(activation, weight.shape[1 - (weight.split_dim or 0)])
            return Partial(linear.part(part, activation), "concat", columns)
        case RowParallelLinear():
            _check_features(activation, module.whole_inputs)
            return Partial(module.partial(module.select(activation)), "sum")
        case VocabParallelLMHead():
            _check_features(activation, module.weight.shape[1])
            return Partial(module(activation), "concat", columns)
        case RowParallelBlock():
            _check_features(activation, hidden_size)
            # The tokens are one sequence from position 0 on.
            ids = torch.arange(activation.shape[0], device=activation.device)
            batch = ForwardBatch(token_ids=ids, positions=ids, slot_mapping=ids)
            return Partial(module.partial(activation, batch), "sum")
    raise InvalidArgument("module", name, "is no module with one input; name one inside it")


def _check_features(activation: Tensor, features: int) -> None:
    if activation.shape[1] != features:
        raise InvalidArgument(
            "activation.shape",
            tuple(activation.shape),
            f"the module takes [num_tokens, {features}]",
        )


def _check_ids(activation: Tensor, count: int) -> None:
    if activation.dim() != 1 or activation.dtype != torch.int64:
        raise InvalidArgument(
            "activation", tuple(activation.shape), "an embedding takes int64 ids [num_tokens]"
        )
    if activation.numel() and not 0 <= int(activation.min()) <= int(activation.max()) < count:
        raise InvalidArgument("activation", activation.tolist(), f"ids are in [0, {count})")
