"""How long a coordinator leaves others waiting while it works for somebody."""

from __future__ import annotations

import threading
import time

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

# On idle cores the worst is a fifth of it; requests that are too large took 3.5 to 60 s before they were
# looked after.
LONGEST_PAUSE_S = 3.0


class Pulse:
    """Asks for health all the time; `longest_s` is the worst answer."""

    def __init__(self, target: str) -> None:
        options = [("grpc.use_local_subchannel_pool", 1)]  # not behind what the test sends
        self._channel = grpc.insecure_channel(target, options=options)
        self._stub = health_pb2_grpc.HealthStub(self._channel)
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run)
        self.longest_s = 0.0

    def _run(self) -> None:
        while not self._stop.wait(0.01):
            began = time.monotonic()
            self._stub.Check(health_pb2.HealthCheckRequest(), timeout=60)
            self.longest_s = max(self.longest_s, time.monotonic() - began)

    def __enter__(self) -> Pulse:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()
        self._channel.close()
