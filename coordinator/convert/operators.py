"""For `ControlService`: the cluster, plans, layers and times."""

import time

from colrow import __version__
from colrow.v1 import control_service_pb2, shard_worker_service_pb2
from coordinator.cluster import Cluster, State
from coordinator.convert.descriptions import description_message, transport_value
from coordinator.convert.plans import COMBINE_VALUES, plan_message
from coordinator.convert.tensors import tensor_message
from coordinator.cost_model import H200_NVLINK, SHORT_CONTEXT, StepTime
from coordinator.run_layer import LayerRun, ModuleRun
from coordinator.step_times import StepTimes
from coordinator.worker_status import Phase, WorkerStatus

_pb = control_service_pb2

_PHASE_VALUES = {
    Phase.CONNECTING: _pb.WORKER_PHASE_CONNECTING,
    Phase.WAITING: _pb.WORKER_PHASE_WAITING,
    Phase.JOINING: _pb.WORKER_PHASE_JOINING,
    Phase.LOADING: _pb.WORKER_PHASE_LOADING,
    Phase.ALLOCATING: _pb.WORKER_PHASE_ALLOCATING,
    Phase.SERVING: _pb.WORKER_PHASE_SERVING,
    Phase.LOST: _pb.WORKER_PHASE_LOST,
}
_STATE_VALUES = {
    State.CONNECTING: _pb.CLUSTER_STATE_CONNECTING,
    State.JOINING: _pb.CLUSTER_STATE_JOINING,
    State.LOADING: _pb.CLUSTER_STATE_LOADING,
    State.SERVING: _pb.CLUSTER_STATE_SERVING,
    State.RECOVERING: _pb.CLUSTER_STATE_RECOVERING,
    State.DRAINING: _pb.CLUSTER_STATE_DRAINING,
    State.FAILED: _pb.CLUSTER_STATE_FAILED,
    State.STOPPED: _pb.CLUSTER_STATE_STOPPED,
}


def cluster_message(cluster: Cluster) -> _pb.Cluster:
    now = time.monotonic()
    message = _pb.Cluster(
        state=_STATE_VALUES[cluster.state],
        error=cluster.error,
        epoch=cluster.group.epoch,
        model=cluster.config.served_model_name,
        version=__version__,
        transport=transport_value(cluster.group.transport),
        workers=[_status_message(status, now) for status in cluster.group.statuses],
        state_age_s=cluster.state_age_s,
        recoveries=cluster.num_recoveries,
        last_recovery_s=cluster.last_recovery_s,
    )
    if cluster.plan is not None:
        message.plan.CopyFrom(plan_message(cluster.plan))
    if cluster.scheduler is not None:
        scheduler, engine = cluster.scheduler, cluster.engine_or_none
        message.scheduler.CopyFrom(
            _pb.SchedulerStatus(
                waiting=len(scheduler.waiting),
                running=len(scheduler.running),
                kv_blocks_total=scheduler.blocks.num_blocks,
                kv_blocks_used=scheduler.blocks.num_used,
                block_size=scheduler.blocks.block_size,
                steps=scheduler.num_steps,
                prompt_tokens=engine.num_prompt_tokens if engine else 0,
                generated_tokens=engine.num_generated_tokens if engine else 0,
                preemptions=scheduler.num_preemptions,
                prefix_queries=scheduler.num_prefix_queries,
                prefix_hits=scheduler.num_prefix_hits,
                kv_blocks_cached=scheduler.blocks.num_cached,
            )
        )
    return message


def _status_message(status: WorkerStatus, now: float) -> _pb.WorkerStatus:
    message = _pb.WorkerStatus(
        address=status.address,
        rank=status.rank,
        bytes_read=status.progress.bytes_read,
        bytes_to_read=status.progress.bytes_to_read,
        last_step_id=status.last_step_id,
        busy_us=status.busy_us,
        phase=_PHASE_VALUES[status.phase],
        phase_age_s=now - status.phase_since,
        heard_age_s=None if status.heard_at is None else now - status.heard_at,
        error=status.error,
        error_age_s=now - status.error_at if status.error else 0.0,
        losses=status.num_losses,
        restarts=status.num_restarts,
    )
    if status.description is not None:
        message.description.CopyFrom(description_message(status.description))
    return message


def prediction_message(step: StepTime | None) -> _pb.StepPrediction | None:
    """None where nothing can be predicted."""
    if step is None:
        return None
    return _pb.StepPrediction(
        hardware=H200_NVLINK.name,
        context_tokens=SHORT_CONTEXT,
        step_s=step.seconds,
        communication_s=step.communication_s,
        num_all_reduces=step.num_all_reduces,
        all_reduce_s=step.all_reduce.seconds,
        all_reduce_algorithm=step.all_reduce.algorithm or "",
    )


def layer_response(layer_run: LayerRun) -> _pb.RunLayerResponse:
    return _pb.RunLayerResponse(
        runs=[_module_run(run) for run in layer_run.runs],
        output=tensor_message(layer_run.output),
    )


def _module_run(run: ModuleRun) -> _pb.ModuleRun:
    return _pb.ModuleRun(
        module=run.module,
        combine=COMBINE_VALUES[run.combine],
        input=tensor_message(run.input),
        partials=[
            _pb.PartialOutput(
                rank=partial.rank,
                output=tensor_message(partial.output),
                columns=[
                    shard_worker_service_pb2.ColumnRange(start=a, stop=b)
                    for a, b in partial.columns
                ],
            )
            for partial in run.partials
        ],
        output=tensor_message(run.output),
    )


def times_response(times: StepTimes) -> _pb.TimeCommunicationResponse:
    return _pb.TimeCommunicationResponse(
        num_steps=times.num_steps,
        num_tokens=times.num_tokens,
        steps_us=times.steps_us,
        times=[
            _pb.CommunicationTime(
                module=time.module,
                operation=time.operation,
                path=time.path,
                calls=time.calls,
                payload_bytes=time.payload_bytes,
                own_us=time.own_ns / 1000,
                rank_us=[ns / 1000 for ns in time.rank_ns],
            )
            for time in times.communication
        ],
    )
