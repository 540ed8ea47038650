"""What a worker says of itself, from the worker and on to operators."""

from collections.abc import Iterable

from colrow.memory import GraphSizes, MemoryLedger, MemoryUse, StepSize
from colrow.v1 import shard_worker_service_pb2
from coordinator.worker_status import Link, OpStats, WorkerDescription

_pb = shard_worker_service_pb2

_TRANSPORT_VALUES = {
    "single": _pb.TRANSPORT_SINGLE,
    "shm": _pb.TRANSPORT_SHARED_MEMORY,
    "gloo": _pb.TRANSPORT_GLOO,
    "nccl": _pb.TRANSPORT_NCCL,
    "peer": _pb.TRANSPORT_PEER,
}
_TRANSPORTS = {value: name for name, value in _TRANSPORT_VALUES.items()}
_WORKER_STATE_VALUES = {
    "idle": _pb.WORKER_STATE_IDLE,
    "joined": _pb.WORKER_STATE_JOINED,
    "loading": _pb.WORKER_STATE_LOADING,
    "loaded": _pb.WORKER_STATE_LOADED,
    "ready": _pb.WORKER_STATE_READY,
}
_WORKER_STATES = {value: name for name, value in _WORKER_STATE_VALUES.items()}
# A worker's description has the same fields on both sides, but for these.
_PLAIN_FIELDS = (
    "version",
    "host_id",
    "pid",
    "device",
    "device_name",
    "device_uuid",
    "memory_total_bytes",
    "memory_available_bytes",
    "epoch",
    "rank",
    "size",
    "weight_bytes",
    "kv_cache_bytes",
    "resident_bytes",
    "file_bytes_read",
)
_STATS_FIELDS = tuple(_pb.CommunicationStats.DESCRIPTOR.fields_by_name)


def transport_value(transport: str | None) -> _pb.Transport:
    if transport is None:
        return _pb.TRANSPORT_UNSPECIFIED
    return _TRANSPORT_VALUES[transport]


def worker_description(message: _pb.WorkerDescription) -> WorkerDescription:
    return WorkerDescription(
        **{name: getattr(message, name) for name in _PLAIN_FIELDS},
        state=_WORKER_STATES.get(message.state, "unknown"),
        transport=_TRANSPORTS.get(message.transport),
        communication=tuple(
            OpStats(**{name: getattr(s, name) for name in _STATS_FIELDS})
            for s in message.communication
        ),
        supported_architectures=tuple(message.supported_architectures),
        links=links(message.links),
        memory=_ledger(message.memory),
        graph_sizes=GraphSizes(
            _step_sizes(message.memory.graph_sizes.decode),
            _step_sizes(message.memory.graph_sizes.prefill),
            message.memory.graph_sizes.draws,
        ),
    )


def _ledger(message: _pb.MemoryLedger) -> MemoryLedger:
    uses = {name: getattr(message, name) for name, _ in MemoryLedger().entries()}
    return MemoryLedger(
        **{
            name: MemoryUse(
                use.planned_bytes if use.HasField("planned_bytes") else None,
                use.actual_bytes if use.HasField("actual_bytes") else None,
            )
            for name, use in uses.items()
        }
    )


def _step_sizes(messages: Iterable[_pb.StepSize]) -> tuple[StepSize, ...]:
    return tuple(StepSize(message.tokens, message.sequences) for message in messages)


def links(messages: Iterable[_pb.Link]) -> tuple[Link, ...]:
    return tuple(Link(link.rank, link.path, link.note) for link in messages)


def description_message(worker: WorkerDescription) -> _pb.WorkerDescription:
    return _pb.WorkerDescription(
        **{name: getattr(worker, name) for name in _PLAIN_FIELDS},
        state=_WORKER_STATE_VALUES.get(worker.state, _pb.WORKER_STATE_UNSPECIFIED),
        transport=transport_value(worker.transport),
        communication=[
            _pb.CommunicationStats(**{name: getattr(s, name) for name in _STATS_FIELDS})
            for s in worker.communication
        ],
        supported_architectures=worker.supported_architectures,
        links=[_pb.Link(rank=link.rank, path=link.path, note=link.note) for link in worker.links],
        memory=_ledger_message(worker.memory, worker.graph_sizes),
    )


def _ledger_message(ledger: MemoryLedger, sizes: GraphSizes) -> _pb.MemoryLedger:
    return _pb.MemoryLedger(
        **{
            name: _pb.MemoryUse(planned_bytes=use.planned, actual_bytes=use.actual)
            for name, use in ledger.entries()
        },
        graph_sizes=_pb.GraphSizes(
            decode=_step_size_messages(sizes.decode),
            prefill=_step_size_messages(sizes.prefill),
            draws=sizes.draws,
        ),
    )


def _step_size_messages(sizes: Iterable[StepSize]) -> list[_pb.StepSize]:
    return [_pb.StepSize(tokens=size.tokens, sequences=size.sequences) for size in sizes]
