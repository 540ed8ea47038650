"""Starts one shard worker: `python -m shard_worker`, or `colrow worker`."""

import asyncio
import logging
import signal
import sys
from collections.abc import Sequence

import torch

from colrow import logs, tls
from colrow.errors import ServiceError
from shard_worker import grpc_server
from shard_worker.config import WorkerConfig, parse
from shard_worker.executor import Executor

log = logging.getLogger("shard_worker")

STOP_GRACE_S = 2.0
SWITCH_INTERVAL_S = 0.0005


async def serve(config: WorkerConfig) -> None:
    """Serves until SIGTERM or SIGINT. Raises what ends the lease, without which it does not serve."""
    torch.set_num_threads(config.num_threads)
    # The thread that launches steps would keep those that answer from running for 5 ms at a time.
    sys.setswitchinterval(SWITCH_INTERVAL_S)
    own = tls.read_server(config.tls, "tls", client_certificates=True) if config.tls else None
    executor = Executor(config)
    await executor.open()
    server = grpc_server.build(executor, own, config.tls_client)
    port = await server.start(f"{config.host}:{config.port}")
    # A worker serves as soon as it can be joined; how far it is, Describe tells.
    await server.set_serving(True)
    _warn_of_what_is_open(config)
    log.info("listening on %s:%d", config.host, port)
    if config.port_file is not None:
        config.port_file.write_text(f"{port}\n")

    lease = asyncio.create_task(executor.keep_lease())
    stopping = asyncio.Event()
    for name in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(name, stopping.set)
    stopped = asyncio.create_task(stopping.wait())
    try:
        await asyncio.wait((lease, stopped), return_when=asyncio.FIRST_COMPLETED)
        if lease.done():
            # A worker that would keep its device for good is of no use to anyone.
            await lease
    finally:
        log.info("stopping")
        lease.cancel()
        stopped.cancel()
        await server.stop(STOP_GRACE_S)
        await executor.close()


def _warn_of_what_is_open(config: WorkerConfig) -> None:
    """A line for each door that stands open to other machines, with the flag that closes it."""
    if tls.is_loopback(config.host):
        return
    if config.tls is None:
        log.warning(
            "anyone who reaches %s may have this worker load and compute, and prompts can be read on "
            "their way; --tls closes it",
            config.host,
        )
    if not config.model_roots:
        log.warning("models are loaded from any folder; --model-root closes it")


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
