"""From the plan's axes to this rank's tensors: which slices they are and where they are put.

The coordinator says how each parameter is split (`Parameter`) and which range of each axis this rank
owns; nothing here knows a model family or decides a range.
"""

import weakref
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from math import prod

import torch
from torch import Tensor

from colrow.errors import InvalidArgument
from shard_worker.tensor_parallel import TensorParallel


@dataclass(frozen=True, slots=True)
class Section:
    """A stretch of a split dimension: `units` units of `axis`, `unit_size` elements each."""

    axis: str
    units: int
    unit_size: int


@dataclass(frozen=True, slots=True)
class Parameter:
    """A parameter as the checkpoint has it, and how it is split.

    `sections` tile `shape[split_dim]` in order; a parameter without `split_dim` is held whole by
    every rank. `combine` says what becomes of the ranks' partial outputs of the module that it
    belongs to: "concat", "sum" or "replicate".
    """

    name: str
    shape: tuple[int, ...]
    split_dim: int | None
    sections: tuple[Section, ...]
    combine: str

    def __post_init__(self) -> None:
        if self.split_dim is None:
            return
        extent = sum(section.units * section.unit_size for section in self.sections)
        if not self.split_dim < len(self.shape) or extent != self.shape[self.split_dim]:
            raise InvalidArgument(
                f"parameters[{self.name}].sections",
                extent,
                f"the shape {self.shape} is split along dimension {self.split_dim}",
            )


@dataclass(frozen=True, slots=True)
class ShardLayout:
    """What one rank owns of every parameter.

    `ranks[r]` gives the units [start, stop) of each axis that rank r owns; the ranks are all here
    because some exchanges need to know how much comes from whom.
    """

    parameters: Mapping[str, Parameter]
    rank: int
    ranks: tuple[Mapping[str, tuple[int, int]], ...]

    def __post_init__(self) -> None:
        for parameter in self.parameters.values():
            for section in parameter.sections:
                start, stop = self.ranges.get(section.axis, (0, 0))
                if not 0 <= start < stop <= section.units:
                    raise InvalidArgument(
                        f"ranks[{self.rank}].ranges[{section.axis}]",
                        f"[{start}, {stop})",
                        f"{parameter.name} has {section.units} units on this axis",
                    )

    @property
    def ranges(self) -> Mapping[str, tuple[int, int]]:
        """The units [start, stop) of each axis that this rank owns."""
        return self.ranks[self.rank]

    def num_units(self, axis: str) -> int:
        """How many units of an axis this rank owns."""
        start, stop = self.ranges[axis]
        return stop - start

    def slices(self, name: str) -> tuple[tuple[int, int], ...]:
        """This rank's element ranges [start, stop) along the split dimension; () when it has none."""
        result, offset = [], 0
        for section in self.parameters[name].sections:
            start, stop = self.ranges[section.axis]
            result.append((offset + start * section.unit_size, offset + stop * section.unit_size))
            offset += section.units * section.unit_size
        return tuple(result)

    def local_shape(self, name: str) -> tuple[int, ...]:
        """The shape of this rank's slice of a parameter."""
        parameter = self.parameters[name]
        if parameter.split_dim is None:
            return parameter.shape
        shape = list(parameter.shape)
        shape[parameter.split_dim] = sum(stop - start for start, stop in self.slices(name))
        return tuple(shape)

    @property
    def numel(self) -> int:
        """Elements of all that this rank owns."""
        return sum(prod(self.local_shape(name)) for name in self.parameters)


@dataclass(slots=True)
class ShardTensors:
    """Hands a model its parameters, empty, and remembers where each checkpoint key goes.

    A model asks for what it needs while it is built; `checkpoint.load` then fills `destinations`.
    Several keys may share one tensor (merged q, k and v), and a transposed parameter is a view. What a
    layer adds to `preparations` runs once everything is loaded, and gives the bytes that it has made.
    """

    layout: ShardLayout
    tp: TensorParallel
    dtype: torch.dtype
    device: torch.device
    destinations: dict[str, Tensor] = field(default_factory=dict)
    preparations: list[Callable[[], int]] = field(default_factory=list)
    _taken: list["weakref.ref[Tensor]"] = field(default_factory=list)

    def has(self, name: str) -> bool:
        return name in self.layout.parameters

    def take(self, name: str) -> Tensor:
        """An empty tensor of this rank's slice of one parameter, in its checkpoint layout."""
        tensor = self._empty(self._shape(name))
        self._register(name, tensor)
        return tensor

    def take_merged(self, names: Iterable[str], *, transposed: bool = False) -> Tensor:
        """One empty [sum of outputs, inputs] (or [sum of outputs]) tensor for several parameters.

        `transposed` is for checkpoints that keep weights as [inputs, outputs].
        """
        names = tuple(names)
        shapes = [self._shape(name)[:: -1 if transposed else 1] for name in names]
        rows = [shape[0] for shape in shapes]
        merged = self._empty((sum(rows), *shapes[0][1:]))
        for name, part in zip(names, merged.split(rows), strict=True):
            self._register(name, part.t() if transposed else part)
        return merged

    def _empty(self, shape: tuple[int, ...]) -> Tensor:
        tensor = torch.empty(shape, dtype=self.dtype, device=self.device)
        self._taken.append(weakref.ref(tensor))
        return tensor

    def _shape(self, name: str) -> tuple[int, ...]:
        if name not in self.layout.parameters:
            raise InvalidArgument("parameters", name, "is missing; the model needs it")
        return self.layout.local_shape(name)

    def _register(self, name: str, tensor: Tensor) -> None:
        assert name not in self.destinations, f"{name} was taken twice"
        self.destinations[name] = tensor

    def check_all_taken(self) -> None:
        """InvalidArgument when the plan has parameters that the model did not ask for."""
        if unknown := sorted(self.layout.parameters.keys() - self.destinations.keys()):
            raise InvalidArgument("parameters", unknown[0], "the model has no such parameter")

    def finish(self) -> int:
        """Brings every loaded weight into its fastest layout; `destinations` are given up.

        Gives the bytes that are held from then on: more than were taken where a layout pads, or where
        somebody needs a weight as it was taken, too.
        """
        self.destinations.clear()
        made = sum([prepare() for prepare in self.preparations])
        return made + sum(kept.nbytes for ref in self._taken if (kept := ref()) is not None)

    @property
    def num_bytes(self) -> int:
        """Bytes of everything that was taken."""
        return sum(tensor.nbytes for tensor in self.destinations.values())
