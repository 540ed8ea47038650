"""Starts the coordinator: `python -m coordinator`, or `colrow coordinator`."""

import asyncio
import logging
import signal
import sys
from collections.abc import Sequence

from colrow.errors import ServiceError
from coordinator import grpc_server
from coordinator.cluster import Cluster, ModelFolder, State
from coordinator.config import CoordinatorConfig, parse
from coordinator.shard_group import ShardGroup
from coordinator.worker_client import WorkerClient

log = logging.getLogger("coordinator")

STOP_GRACE_S = 2.0


async def serve(config: CoordinatorConfig) -> None:
    """Serves until SIGTERM or SIGINT, or until the cluster fails; then raises its error."""
    group = ShardGroup(
        [WorkerClient(address) for address in config.workers],
        step_timeout_s=config.step_timeout_s,
    )
    cluster = Cluster(config, ModelFolder.open(config.model), group)
    server = grpc_server.build(cluster)
    port = await server.start(f"{config.host}:{config.grpc_port}")
    log.info("listening on %s:%d", config.host, port)
    if config.port_file is not None:
        config.port_file.write_text(f"{port}\n")

    async def follow_health() -> None:
        async for _ in cluster.changes(None):
            await server.set_serving(cluster.state is State.SERVING)

    stopping = asyncio.Event()
    for name in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(name, stopping.set)
    running = asyncio.create_task(cluster.run())
    health = asyncio.create_task(follow_health())
    stop = asyncio.create_task(stopping.wait())
    await asyncio.wait((running, stop), return_when=asyncio.FIRST_COMPLETED)
    log.info("stopping")
    try:
        if running.done():
            await running
    finally:
        for task in (running, stop):
            task.cancel()
        await asyncio.gather(running, stop, return_exceptions=True)
        await server.stop(STOP_GRACE_S)
        health.cancel()
        await asyncio.gather(health, return_exceptions=True)
        await cluster.stop()


def main(arguments: Sequence[str] | None = None) -> int:
    config = parse(arguments)
    logging.basicConfig(
        level=config.log_level.upper(),
        format="%(asctime)s %(levelname)s %(name)s %(message)s",
        stream=sys.stderr,
    )
    try:
        asyncio.run(serve(config))
    except (ServiceError, ValueError) as error:
        print(f"colrow coordinator: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
