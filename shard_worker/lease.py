"""How long a worker keeps what it holds while no coordinator calls."""

import asyncio
import contextlib
import time
from collections.abc import Iterator


class Lease:
    """Kept by calls: a coordinator that steps asks for a sign of life all the time.

    One that is gone, or cut off, must not keep memory that another could use. For the event loop alone.
    """

    def __init__(self, duration_s: float) -> None:
        self.duration_s = duration_s
        self._calls = 0
        self._called_at = time.monotonic()

    @contextlib.contextmanager
    def call(self) -> Iterator[None]:
        """Around each call of a coordinator: as long as there is one, the lease is kept."""
        self._calls += 1
        try:
            yield
        finally:
            self._calls -= 1
            self.renew()

    def renew(self) -> None:
        """It runs for another `duration_s`."""
        self._called_at = time.monotonic()

    @property
    def has_ended(self) -> bool:
        """No call is there, and none was for `duration_s`."""
        return not self._calls and self._left_s() <= 0

    def _left_s(self) -> float:
        return self._called_at + self.duration_s - time.monotonic()

    async def ended(self) -> None:
        """Returns once it has."""
        while not self.has_ended:
            await asyncio.sleep(max(self._left_s(), self.duration_s / 10))
