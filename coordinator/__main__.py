"""Starts the coordinator: `python -m coordinator`, or `colrow coordinator`."""

import asyncio
import contextlib
import logging
import math
import signal
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from colrow import logs, tls
from colrow.errors import ServiceError
from coordinator import grpc_server
from coordinator.access import Access, what_is_open
from coordinator.cluster import Cluster, State
from coordinator.config import CoordinatorConfig, parse
from coordinator.http import server as http_server
from coordinator.http.server import HttpServer
from coordinator.metrics import Metrics
from coordinator.model_folder import ModelFolder
from coordinator.shard_group import ShardGroup
from coordinator.telemetry import Telemetry
from coordinator.tracing import Tracing
from coordinator.worker_client import WorkerClient

log = logging.getLogger("coordinator")

STOP_GRACE_S = 2.0


async def _until_told_to_stop(cluster: Cluster, drain_timeout_s: float) -> None:
    """Returns on SIGINT, on a second SIGTERM, and after a first one when requests have ended."""
    draining, stopping = asyncio.Event(), asyncio.Event()

    def terminate() -> None:
        (stopping if draining.is_set() else draining).set()

    async def drain() -> None:
        await draining.wait()
        log.info("draining")
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(drain_timeout_s):
                await cluster.drain()

    loop = asyncio.get_running_loop()
    loop.add_signal_handler(signal.SIGTERM, terminate)
    loop.add_signal_handler(signal.SIGINT, stopping.set)
    ways = asyncio.create_task(drain()), asyncio.create_task(stopping.wait())
    try:
        await asyncio.wait(ways, return_when=asyncio.FIRST_COMPLETED)
    finally:
        for way in ways:
            way.cancel()


class GrpcServer(Protocol):
    """What is asked of the gRPC server here, where nobody sees gRPC."""

    async def start(self, address: str) -> int: ...
    async def set_serving(self, serving: bool) -> None: ...
    async def stop(self, grace_s: float) -> None: ...


@dataclass(frozen=True, slots=True)
class Coordinator:
    """A coordinator's parts, wired."""

    config: CoordinatorConfig
    cluster: Cluster
    grpc: GrpcServer
    http: HttpServer
    tracing: Tracing | None

    @classmethod
    def build(cls, config: CoordinatorConfig) -> "Coordinator":
        """Nothing of it listens yet. ValueError naming what can't be used as it is configured."""
        serving_tls = worker_tls = None
        if config.tls is not None:
            serving_tls = tls.read_server(
                config.tls, "tls", client_certificates=config.client_cert_auth
            )
        if config.worker_tls is not None:
            worker_tls = tls.read_peer(config.worker_tls, "worker_tls")
        access = Access.open(config)
        workers = [WorkerClient(address, worker_tls) for address in config.workers]
        group = ShardGroup(workers, step_timeout_s=config.step_timeout_s)
        model = ModelFolder.open(config.model)
        context_length = config.max_model_len or model.spec.max_position_embeddings
        metrics = Metrics(config.served_model_name, context_length)
        tracing = None
        if config.otlp_endpoint:
            tracing = Tracing.open(config.otlp_endpoint, config.served_model_name)
        cluster = Cluster(config, model, group, observer=Telemetry(metrics, tracing))
        secured: dict[str, Any] = {
            "tls": serving_tls,
            "client_certificates": config.client_cert_auth,
        }
        api = http_server.build(
            cluster,
            lambda accept: metrics.render(cluster, accept),
            access.to_http if access else None,
        )
        return cls(
            config,
            cluster,
            grpc_server.build(cluster, access, **secured),
            HttpServer(api, stop_grace_s=math.ceil(STOP_GRACE_S), **secured),
            tracing,
        )

    async def start(self) -> None:
        """Listens, and says where. InvalidArgument for a port that can't be had."""
        config = self.config
        http_port = self.http.bind(config.host, config.http_port)
        port = await self.grpc.start(f"{config.host}:{config.grpc_port}")
        await self.http.start()
        for line in what_is_open(config):
            log.warning("%s", line)
        scheme = "https" if config.tls else "http"
        log.info("HTTP API at %s://%s:%d", scheme, config.host, http_port)
        log.info("listening on %s:%d", config.host, port)
        if config.http_port_file is not None:
            config.http_port_file.write_text(f"{http_port}\n")
        if config.port_file is not None:
            config.port_file.write_text(f"{port}\n")

    async def run(self) -> None:
        """Until a signal ends it, or one of its parts fails, whose error this raises."""
        running = asyncio.create_task(self.cluster.run())
        health = asyncio.create_task(self._follow_health())
        stop = asyncio.create_task(_until_told_to_stop(self.cluster, self.config.drain_timeout_s))
        await asyncio.wait((running, health, stop), return_when=asyncio.FIRST_COMPLETED)
        log.info("stopping")
        try:
            for part in (running, health):
                if part.done():  # these end by an error alone
                    await part
        finally:
            for task in (running, stop):
                task.cancel()
            await asyncio.gather(running, stop, return_exceptions=True)
            await asyncio.gather(self.grpc.stop(STOP_GRACE_S), self.http.stop())
            health.cancel()
            await asyncio.gather(health, return_exceptions=True)
            await self.cluster.stop()
            if self.tracing is not None:
                await asyncio.to_thread(self.tracing.close)

    async def _follow_health(self) -> None:
        """Health checks answer as the cluster is; returns never."""
        async for _ in self.cluster.changes(None):
            await self.grpc.set_serving(self.cluster.state is State.SERVING)


async def serve(config: CoordinatorConfig) -> None:
    """Serves until a signal ends it, or until the cluster can't come up; then raises its error."""
    coordinator = Coordinator.build(config)
    await coordinator.start()
    await coordinator.run()


def main(arguments: Sequence[str] | None = None) -> int:
    config = parse(arguments)
    logs.configure(config.log_level, config.log_format)
    try:
        asyncio.run(serve(config))
    except (ServiceError, ValueError) as error:
        logs.complain("colrow coordinator", error, config.log_format)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
