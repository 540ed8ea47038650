"""Starts one shard worker: `python -m shard_worker`, or `colrow worker`."""

import asyncio
import logging
import signal
import sys
from collections.abc import Sequence

import torch

from colrow import logs
from colrow.errors import ServiceError
from shard_worker import grpc_server
from shard_worker.config import WorkerConfig, parse
from shard_worker.executor import Executor

log = logging.getLogger("shard_worker")

STOP_GRACE_S = 2.0
SWITCH_INTERVAL_S = 0.0005


async def serve(config: WorkerConfig) -> None:
    """Serves until SIGTERM or SIGINT."""
    torch.set_num_threads(config.num_threads)
    # The thread that launches steps would keep those that answer from running for 5 ms at a time.
    sys.setswitchinterval(SWITCH_INTERVAL_S)
    executor = Executor(config)
    await executor.open()
    server = grpc_server.build(executor)
    port = await server.start(f"{config.host}:{config.port}")
    # A worker serves as soon as it can be joined; how far it is, Describe tells.
    await server.set_serving(True)
    log.info("listening on %s:%d", config.host, port)
    if config.port_file is not None:
        config.port_file.write_text(f"{port}\n")

    lease = asyncio.create_task(executor.keep_lease())
    stopping = asyncio.Event()
    for name in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(name, stopping.set)
    await stopping.wait()
    log.info("stopping")
    lease.cancel()
    await server.stop(STOP_GRACE_S)
    await executor.close()


def main(arguments: Sequence[str] | None = None) -> int:
    config = parse(arguments)
    logs.configure(config.log_level, config.log_format)
    try:
        asyncio.run(serve(config))
    except ServiceError as error:
        logs.complain("colrow worker", error, config.log_format)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
