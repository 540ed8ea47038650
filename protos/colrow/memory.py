"""What a worker's memory is for, in the words of both services; free of gRPC and protobuf."""

from collections.abc import Iterator
from dataclasses import dataclass, fields

MIB, GIB = 2**20, 2**30


def size_text(num_bytes: int) -> str:
    """1.50 GiB, or 12.3 MiB of what is less than one."""
    return f"{num_bytes / GIB:.2f} GiB" if num_bytes >= GIB else f"{num_bytes / MIB:.1f} MiB"


@dataclass(frozen=True, slots=True)
class MemoryUse:
    """Bytes that are reckoned with, and those that are held; None: not known."""

    planned: int | None = None
    actual: int | None = None

    def __str__(self) -> str:
        if self.actual is None:
            return "unknown" if self.planned is None else f"{size_text(self.planned)} planned"
        held = size_text(self.actual)
        if self.planned is None or size_text(self.planned) == held:
            return held
        return f"{held} of {size_text(self.planned)} planned"


@dataclass(frozen=True, slots=True)
class StepSize:
    """What a step computes, at most: tokens, and the sequences that they belong to."""

    tokens: int
    sequences: int


@dataclass(frozen=True, slots=True)
class GraphSizes:
    """For which steps a worker captures CUDA graphs, ascending; a step takes the next larger one."""

    decode: tuple[StepSize, ...] = ()
    """Steps that only decode."""
    prefill: tuple[StepSize, ...] = ()
    """Those with prompts in them."""
    draws: int = 0
    """Rows of the largest graph that draws tokens."""


@dataclass(frozen=True, slots=True)
class MemoryLedger:
    """One rank's memory: the device's, which for a CPU is the host's."""

    weights: MemoryUse = MemoryUse()
    kv_cache: MemoryUse = MemoryUse()
    graphs: MemoryUse = MemoryUse()
    """What CUDA graphs keep for themselves."""
    workspace: MemoryUse = MemoryUse()
    """What a step takes and gives back; actual is the most that one took so far."""

    def entries(self) -> Iterator[tuple[str, MemoryUse]]:
        """Every use by its name: "kv_cache"."""
        for field in fields(self):
            yield field.name, getattr(self, field.name)

    @property
    def planned_bytes(self) -> int:
        """All that is reckoned with."""
        return sum(use.planned or 0 for _, use in self.entries())

    def __str__(self) -> str:
        """In words, without what is not known: "weights 15.0 GiB, KV cache 9.00 GiB planned"."""
        known = [
            f"{'KV cache' if name == 'kv_cache' else name} {use}"
            for name, use in self.entries()
            if use != MemoryUse()
        ]
        return ", ".join(known) or "nothing is held"
