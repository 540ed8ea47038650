"""The group of one rank: every collective is the identity, and that is all of the truth here."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from . import (
    Communicator,
    CommunicatorAborted,
    CommunicatorError,
    check_all_gather,
    check_all_reduce,
)

__all__ = ["SingleCommunicator"]


class SingleCommunicator(Communicator):
    """tp_size 1. Checks its arguments like the others, so that a model that works here does not meet
    its first ValueError at tp_size 2."""

    transport = "single"

    def __init__(self) -> None:
        super().__init__(rank=0, size=1, op_timeout_s=0.0)
        self._aborted = False
        self._closed = False

    def all_reduce(self, x: Tensor) -> Tensor:
        """In place, and the sum over one rank is x: returned untouched."""
        self._check_alive("all_reduce")
        check_all_reduce(x, x.device.type)
        return x

    def all_gather(self, x: Tensor, sizes: Sequence[int]) -> Tensor:
        """Returns x itself, not a copy (made contiguous if it was not): writing to the result
        writes to x."""
        self._check_alive("all_gather")
        check_all_gather(x, sizes, self.rank, self.size, x.device.type)
        return x.contiguous()

    def barrier(self, timeout_s: float) -> None:
        """Everyone is here."""
        self._check_alive("barrier")

    def abort(self) -> None:
        """Nothing ever waits here; later collectives raise CommunicatorAborted."""
        self._aborted = True

    def close(self) -> None:
        """Holds nothing; later collectives raise CommunicatorError."""
        self._closed = True

    def _check_alive(self, op: str) -> None:
        if self._closed:
            raise CommunicatorError(f"{op}: the communicator is closed")
        if self._aborted:
            raise CommunicatorAborted(f"{op}: the communicator was aborted")
