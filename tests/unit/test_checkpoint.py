"""A rank reads its slices of a checkpoint and no more; anything amiss is an error that names it."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from colrow.errors import DataLoss, InvalidArgument, ServiceError
from coordinator.families import model_spec
from coordinator.model_spec import ModelSpec
from coordinator.shard_plan import ShardPlan, make_plan
from shard_worker import checkpoint, loader
from shard_worker.checkpoint import INDEX_FILE, SINGLE_FILE, Checkpoint, LoadProgress
from shard_worker.communicator.single import SingleCommunicator
from shard_worker.sharding import Parameter, Section, ShardLayout, ShardTensors
from shard_worker.tensor_parallel import TensorParallel
from tests import checkpoints

Ranges = Mapping[str, tuple[int, int]]


def whole(name: str, *shape: int) -> Parameter:
    """A parameter that is not split."""
    return Parameter(name, shape, None, (), "replicate")


def split(name: str, shape: Sequence[int], dim: int, *sections: Section) -> Parameter:
    return Parameter(name, tuple(shape), dim, sections, "concat")


def layout_of(parameters: Sequence[Parameter], ranges: Ranges | None = None) -> ShardLayout:
    return ShardLayout({p.name: p for p in parameters}, 0, (ranges or {},))


@dataclass(frozen=True)
class Loaded:
    """This rank's tensors, and what was counted while they were read."""

    tensors: dict[str, Tensor]
    header_bytes: int
    data_bytes: int
    progress: list[LoadProgress]


def load(
    folder: Path,
    layout: ShardLayout,
    dtype: torch.dtype = torch.float32,
    *,
    ignored: Sequence[str] = (),
    optional_prefix: str = "",
) -> Loaded:
    """Loads into tensors that are NaN before, so that one that stays unfilled shows."""
    opened = Checkpoint.open(folder)
    stored = checkpoint.match_keys(layout, opened, ignored, optional_prefix)
    tensors = {
        name: torch.full(layout.local_shape(name), float("nan"), dtype=dtype)
        for name in layout.parameters
    }
    progress: list[LoadProgress] = []
    num_bytes = checkpoint.load(layout, stored, tensors, progress.append)
    return Loaded(tensors, opened.bytes_read, num_bytes, progress)


def save(folder: Path, **tensors: Tensor) -> Path:
    save_file(tensors, folder / SINGLE_FILE)
    return folder


def header_bytes(file: Path) -> int:
    """The length field and the header that it announces."""
    return 8 + int.from_bytes(file.read_bytes()[:8], "little")


# Slices


@st.composite
def splits(draw: st.DrawFn) -> tuple[Parameter, Ranges]:
    """A parameter of up to three dimensions, split along one of them in one to three sections."""
    dim = draw(st.integers(0, 2))
    shape = [draw(st.integers(1, 4)) for _ in range(draw(st.integers(dim + 1, 3)))]
    sections, ranges = [], {}
    for index in range(draw(st.integers(1, 3))):
        units, unit_size = draw(st.integers(1, 6)), draw(st.integers(1, 3))
        start = draw(st.integers(0, units - 1))
        ranges[f"axis{index}"] = (start, draw(st.integers(start + 1, units)))
        sections.append(Section(f"axis{index}", units, unit_size))
    shape[dim] = sum(section.units * section.unit_size for section in sections)
    return split("weight", shape, dim, *sections), ranges


@given(splits())
@settings(max_examples=150, deadline=None)
def test_a_slice_is_what_indexing_the_whole_tensor_gives(drawn: tuple[Parameter, Ranges]) -> None:
    parameter, ranges = drawn
    weight = torch.arange(prod(parameter.shape)).float().view(parameter.shape)
    wanted: list[int] = []
    offset = 0
    for section in parameter.sections:
        for unit in range(*ranges[section.axis]):
            first = offset + unit * section.unit_size
            wanted += range(first, first + section.unit_size)
        offset += section.units * section.unit_size
    assert parameter.split_dim is not None
    expected = weight.index_select(parameter.split_dim, torch.tensor(wanted))
    with tempfile.TemporaryDirectory() as name:
        loaded = load(save(Path(name), weight=weight), layout_of([parameter], ranges))
    assert torch.equal(loaded.tensors["weight"], expected)
    assert loaded.data_bytes == expected.nbytes


def test_a_parameter_that_is_not_split_is_read_whole(tmp_path: Path) -> None:
    tensors = {"matrix": torch.randn(3, 5), "vector": torch.randn(7), "scalar": torch.tensor(3.0)}
    save(tmp_path, **tensors)
    parameters = [whole(name, *tensor.shape) for name, tensor in tensors.items()]
    loaded = load(tmp_path, layout_of(parameters))
    for name, tensor in tensors.items():
        assert torch.equal(loaded.tensors[name], tensor)


def test_merged_and_transposed_parameters_land_in_one_tensor(tmp_path: Path) -> None:
    """GPT-2 keeps weights as [inputs, outputs]; the layer wants them side by side as outputs."""
    first, second = torch.randn(4, 6), torch.randn(4, 10)
    save(tmp_path, first=first, second=second)
    parameters = [
        split("first", (4, 6), 1, Section("mlp", 3, 2)),
        split("second", (4, 10), 1, Section("heads", 5, 2)),
    ]
    layout = layout_of(parameters, {"mlp": (1, 3), "heads": (0, 2)})
    tp = TensorParallel(0, 1, SingleCommunicator())
    tensors = ShardTensors(layout, tp, torch.float32, torch.device("cpu"))
    merged = tensors.take_merged(("first", "second"), transposed=True)
    stored = checkpoint.match_keys(layout, Checkpoint.open(tmp_path), (), "")
    checkpoint.load(layout, stored, tensors.destinations, lambda _: None)
    assert torch.equal(merged, torch.cat((first[:, 2:6], second[:, :4]), dim=1).t())


@pytest.mark.parametrize("served", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_weights_are_converted_as_torch_converts_them(
    tmp_path: Path, stored: torch.dtype, served: torch.dtype
) -> None:
    weight = (torch.randn(6, 8) * 3).to(stored)
    layout = layout_of([split("weight", (6, 8), 1, Section("mlp", 8, 1))], {"mlp": (2, 5)})
    loaded = load(save(tmp_path, weight=weight), layout, served)
    assert torch.equal(loaded.tensors["weight"], weight[:, 2:5].to(served))
    assert loaded.data_bytes == 6 * 3 * stored.itemsize, "read in the type that is stored"


def test_progress_ends_with_everything_read(tmp_path: Path) -> None:
    save(tmp_path, a=torch.randn(4, 2), b=torch.randn(6))
    layout = layout_of(
        [split("a", (4, 2), 0, Section("mlp", 4, 1)), whole("b", 6)], {"mlp": (1, 4)}
    )
    progress = load(tmp_path, layout).progress
    assert [p.parameters_loaded for p in progress] == [1, 2]
    assert progress[0].bytes_read < progress[1].bytes_read
    assert progress[1] == LoadProgress(24 + 24, 24 + 24, 2, 2)


# Whole models, written by transformers


@dataclass(frozen=True)
class Saved:
    """One model in one file and in several, and its weights."""

    spec: ModelSpec
    single: Path
    sharded: Path
    weights: Mapping[str, Tensor]


@pytest.fixture(scope="module", params=["smollm2", "qwen2", "gpt2"])
def saved(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Saved:
    folder = tmp_path_factory.mktemp(request.param)
    single = checkpoints.build(request.param, folder / "single")
    sharded = checkpoints.build(request.param, folder / "sharded", max_shard_size="150KB")
    assert len(list(sharded.glob("*.safetensors"))) > 2
    model = AutoModelForCausalLM.from_pretrained(single, dtype=torch.float32)
    spec = model_spec(json.loads((single / "config.json").read_text()))
    return Saved(spec, single, sharded, model.state_dict())


def layout_of_plan(plan: ShardPlan, rank: int) -> ShardLayout:
    """What the coordinator's plan is on a worker."""
    parameters = {
        p.name: Parameter(
            p.name,
            p.shape,
            p.split_dim,
            tuple(Section(str(s.axis), s.units, s.unit_size) for s in p.sections),
            str(p.combine),
        )
        for p in plan.spec.parameters
    }
    ranges = tuple(
        {str(axis): (r.start, r.stop) for axis, r in shard.ranges.items()} for shard in plan.ranks
    )
    return ShardLayout(parameters, rank, ranges)


@pytest.mark.parametrize("tp", [1, 2, 3, 4])
def test_every_rank_reads_exactly_its_slices_of_a_model(saved: Saved, tp: int) -> None:
    plan = make_plan(saved.spec, tp)
    for shard in plan.ranks:
        layout = layout_of_plan(plan, shard.rank)
        for folder in (saved.single, saved.sharded):
            loaded = load(
                folder,
                layout,
                ignored=saved.spec.ignored,
                optional_prefix=saved.spec.optional_prefix,
            )
            for parameter in saved.spec.parameters:
                expected = saved.weights[parameter.name]
                if parameter.split_dim is not None:
                    pieces = [
                        expected.narrow(parameter.split_dim, start, stop - start)
                        for start, stop in plan.slices(parameter, shard.rank)
                    ]
                    expected = torch.cat(pieces, dim=parameter.split_dim)
                assert torch.equal(loaded.tensors[parameter.name], expected), parameter.name
            assert loaded.data_bytes == shard.weight_bytes
            files = list(folder.glob("*.safetensors"))
            index = folder / INDEX_FILE
            index_bytes = index.stat().st_size if index.exists() else 0
            assert loaded.header_bytes == sum(map(header_bytes, files)) + index_bytes


KERNEL_COUNT = Path("/proc/thread-self/io")


def bytes_read_so_far() -> tuple[int, int]:
    """What the kernel says that this thread has read, and what asking will add to it."""
    text = KERNEL_COUNT.read_text()
    assert text.startswith("rchar: ")
    return int(text.split()[1]), len(text)


@pytest.mark.skipif(not os.access(KERNEL_COUNT, os.R_OK), reason="Linux counts reads there")
def test_the_kernel_counts_the_bytes_that_the_reader_counts(
    saved: Saved, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Rows of a mapped file are no read to it; what that call returns is the kernel's count of them.
    read, mapped = loader._process_vm_readv, []

    def counted(local: Any, remote: Any) -> int:
        mapped.append(read(local, remote))
        return mapped[-1]

    monkeypatch.setattr(loader, "_process_vm_readv", counted)
    plan = make_plan(saved.spec, 3)
    for folder in (saved.single, saved.sharded):
        for shard in plan.ranks:
            layout = layout_of_plan(plan, shard.rank)
            before, asking = bytes_read_so_far()
            mapped.clear()
            loaded = load(
                folder,
                layout,
                ignored=saved.spec.ignored,
                optional_prefix=saved.spec.optional_prefix,
            )
            by_kernel = bytes_read_so_far()[0] - before - asking + sum(mapped)
            assert by_kernel == loaded.header_bytes + loaded.data_bytes
            assert shard.weight_bytes < by_kernel <= shard.weight_bytes * 1.1


# Strict both ways

PAIR = (whole("a.weight", 2, 3), whole("b.weight", 4))


def pair(folder: Path, **changes: Tensor) -> Path:
    """What `PAIR` describes, or a variation of it; a name is written with `_` for its dot."""
    tensors = {"a_weight": torch.randn(2, 3), "b_weight": torch.randn(4)} | changes
    return save(folder, **{name.replace("_", "."): tensor for name, tensor in tensors.items()})


def test_a_missing_key_is_named(tmp_path: Path) -> None:
    pair(tmp_path)
    with pytest.raises(InvalidArgument, match=r"'c\.weight': missing \(1 of 3\)"):
        load(tmp_path, layout_of([*PAIR, whole("c.weight", 1)]))


def test_an_unexpected_key_is_named(tmp_path: Path) -> None:
    pair(tmp_path, c_weight=torch.randn(1))
    with pytest.raises(InvalidArgument, match=r"'c\.weight': unexpected \(1\)"):
        load(tmp_path, layout_of(PAIR))


def test_a_key_that_is_ignored_by_name_is_not_unexpected(tmp_path: Path) -> None:
    pair(tmp_path, c_mask=torch.randn(1), d_mask=torch.tensor([True]))
    loaded = load(tmp_path, layout_of(PAIR), ignored=["*.mask"])
    assert loaded.tensors.keys() == {"a.weight", "b.weight"}
    with pytest.raises(InvalidArgument, match=r"'d\.mask': unexpected"):
        load(tmp_path, layout_of(PAIR), ignored=["c.*"])


@pytest.mark.parametrize("stored_prefix", ["", "model."])
def test_keys_may_lack_the_optional_prefix(tmp_path: Path, stored_prefix: str) -> None:
    weight = torch.randn(3)
    keys = {f"{stored_prefix}norm": weight, f"{stored_prefix}mask": torch.randn(2)}
    save(tmp_path, **keys, head=torch.randn(1))
    layout = layout_of([whole("model.norm", 3), whole("head", 1)])
    loaded = load(tmp_path, layout, ignored=["model.mask"], optional_prefix="model.")
    assert torch.equal(loaded.tensors["model.norm"], weight)


def test_a_prefix_that_is_not_optional_is_not_added(tmp_path: Path) -> None:
    save(tmp_path, norm=torch.randn(3))
    with pytest.raises(InvalidArgument, match=r"'model\.norm': missing"):
        load(tmp_path, layout_of([whole("model.norm", 3)]))


def test_a_parameter_that_is_there_twice_is_refused(tmp_path: Path) -> None:
    """With and without the optional prefix: which one counts, nobody said."""
    save(tmp_path, **{"norm": torch.randn(3), "model.norm": torch.randn(3)})
    with pytest.raises(InvalidArgument, match=r"model\.norm"):
        load(tmp_path, layout_of([whole("model.norm", 3)]), optional_prefix="model.")


@pytest.mark.parametrize("shape", [(3, 2), (2, 3, 1), (6,), (2, 4)])
def test_another_shape_is_refused(tmp_path: Path, shape: tuple[int, ...]) -> None:
    pair(tmp_path, a_weight=torch.randn(shape))
    with pytest.raises(InvalidArgument, match=r"a\.weight.*has shape .*\(2, 3\)") as raised:
        load(tmp_path, layout_of(PAIR))
    assert str(shape) in str(raised.value)


@pytest.mark.parametrize("dtype", [torch.int64, torch.uint8, torch.bool, torch.float64], ids=str)
def test_a_type_that_is_no_weight_is_refused(tmp_path: Path, dtype: torch.dtype) -> None:
    pair(tmp_path, a_weight=torch.ones(2, 3, dtype=dtype))
    with pytest.raises(InvalidArgument, match=r"a\.weight.*BF16.*F16.*F32"):
        load(tmp_path, layout_of(PAIR))


# Files that are no checkpoint


def write(folder: Path, header: Any, data: bytes = b"", *, length: int | None = None) -> Path:
    """A safetensors file with any header: bytes as they are, anything else as JSON."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    file = folder / SINGLE_FILE
    file.write_bytes((len(text) if length is None else length).to_bytes(8, "little") + text + data)
    return file


def entry(begin: Any, end: Any, *, shape: Any = (2,), dtype: Any = "F32") -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


def test_a_file_that_is_cut_anywhere_is_refused(tmp_path: Path) -> None:
    file = pair(tmp_path) / SINGLE_FILE
    content = file.read_bytes()
    data = header_bytes(file)
    in_length, in_header, in_data = (0, 1, 7), (8, 9, data // 2, data - 1), (data, data + 1)
    for size in (*in_length, *in_header, *in_data, len(content) - 1):
        file.write_bytes(content[:size])
        with pytest.raises(DataLoss, match=r"model\.safetensors: .*truncated"):
            Checkpoint.open(tmp_path)
    file.write_bytes(content)
    load(tmp_path, layout_of(PAIR))


def test_a_file_that_shrinks_while_it_is_read_is_refused(tmp_path: Path) -> None:
    file = pair(tmp_path) / SINGLE_FILE
    layout = layout_of(PAIR)
    stored = checkpoint.match_keys(layout, Checkpoint.open(tmp_path), (), "")
    os.truncate(file, file.stat().st_size - 1)
    tensors = {name: torch.empty(layout.local_shape(name)) for name in layout.parameters}
    with pytest.raises(DataLoss, match=r"model\.safetensors: ended"):
        checkpoint.load(layout, stored, tensors, lambda _: None)


@pytest.mark.parametrize(
    "header",
    [
        b"{}x",
        b'{"a": ',
        b"\xff\xfe\x00\x01",
        b"[" * 200_000,
        [],
        [1, 2],
        "text",
        17,
        {"a": None},
        {"a": {}},
        {"a": "F32"},
        {"a": {"dtype": "F32", "shape": [2]}},
        {"a": {"dtype": "F32", "data_offsets": [0, 8]}},
        {"a": {"shape": [2], "data_offsets": [0, 8]}},
        {"a": {"dtype": ["F32"], "shape": [2], "data_offsets": [0, 8]}},
        {"a": {"dtype": "F32", "shape": 2, "data_offsets": [0, 8]}},
        {"a": {"dtype": "F32", "shape": [2], "data_offsets": [8]}},
        {"a": {"dtype": "F32", "shape": [2], "data_offsets": "08"}},
        {"a": entry(0, 8, shape=[None])},
        {"a": entry(0, 8, shape=["two"])},
        {"a": entry(0, 8, shape=[-2])},
        {"a": entry(0, 8, shape=[-1, -2])},
        {"a": entry(0, 8, shape=[2.0])},
        {"a": entry(0.0, 8.0)},
        {"a": entry(False, 8)},
        {"a": entry(0, 8, shape=[True, 2])},
    ],
    ids=lambda header: repr(header)[:60],
)
def test_a_header_that_makes_no_sense_is_refused(tmp_path: Path, header: Any) -> None:
    write(tmp_path, header, b"\0" * 8)
    with pytest.raises(DataLoss, match=r"model\.safetensors"):
        Checkpoint.open(tmp_path)


@pytest.mark.parametrize("length", [0, 1, 10**4, 2**40, 2**64 - 1])
def test_a_header_length_that_lies_is_refused(tmp_path: Path, length: int) -> None:
    write(tmp_path, {"a": entry(0, 8)}, b"\0" * 8, length=length)
    with pytest.raises(DataLoss, match=r"model\.safetensors"):
        Checkpoint.open(tmp_path)


@pytest.mark.parametrize(
    ("entries", "problem"),
    [
        ({"a": entry(8, 16)}, "a ends"),
        ({"a": entry(2**62, 2**62 + 8)}, "a ends"),
        ({"a": entry(-8, 0)}, "a "),
        ({"a": entry(8, 0)}, "a holds -8 bytes"),
        ({"a": entry(8, 0, dtype="I32")}, "a "),
        ({"a": entry(0, 4)}, "a holds 4 bytes"),
        ({"a": entry(0, 16)}, "a holds 16 bytes"),
        ({"a": entry(0, 8, shape=[2**40, 2**40])}, "a holds 8 bytes"),
    ],
)
def test_data_that_is_not_where_the_header_says_is_refused(
    tmp_path: Path, entries: Mapping[str, Any], problem: str
) -> None:
    write(tmp_path, entries, b"\0" * 8)
    with pytest.raises(DataLoss, match=rf"model\.safetensors: .*{problem}"):
        Checkpoint.open(tmp_path)


@pytest.mark.parametrize("second", [entry(0, 8), entry(4, 12), entry(7, 8, shape=[1], dtype="U8")])
def test_tensors_that_overlap_are_refused(tmp_path: Path, second: Mapping[str, Any]) -> None:
    write(tmp_path, {"a": entry(0, 8), "b": second}, b"\0" * 12)
    with pytest.raises(DataLoss, match=r"model\.safetensors: a and b overlap"):
        Checkpoint.open(tmp_path)


def test_an_empty_tensor_overlaps_nothing(tmp_path: Path) -> None:
    entries = {"a": entry(0, 8), "none": entry(0, 0, shape=[0]), "b": entry(8, 16)}
    write(tmp_path, entries, b"\0" * 16)
    assert Checkpoint.open(tmp_path).tensors.keys() == {"a", "none", "b"}


def test_a_folder_without_a_checkpoint_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InvalidArgument, match=rf"{tmp_path}.*{SINGLE_FILE}.*{INDEX_FILE}"):
        Checkpoint.open(tmp_path)
    (tmp_path / SINGLE_FILE).mkdir()
    with pytest.raises(InvalidArgument, match=SINGLE_FILE):
        Checkpoint.open(tmp_path)


@given(st.binary(max_size=64))
@settings(max_examples=200, deadline=None)
def test_any_bytes_for_a_file_are_an_error_that_names_it(content: bytes) -> None:
    with tempfile.TemporaryDirectory() as name:
        (Path(name) / SINGLE_FILE).write_bytes(content)
        try:
            assert not Checkpoint.open(Path(name)).tensors
        except ServiceError as error:
            assert SINGLE_FILE in error.message


@given(st.data())
@settings(max_examples=300, deadline=None)
def test_a_damaged_header_is_an_error_or_harmless(data: st.DataObject) -> None:
    """Bytes of a sound header are overwritten: nothing but a ServiceError may come of it."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        content = bytearray((pair(folder) / SINGLE_FILE).read_bytes())
        header = header_bytes(folder / SINGLE_FILE)
        for _ in range(data.draw(st.integers(1, 3))):
            at = data.draw(st.integers(0, header - 1))
            damage = st.sampled_from(b'0123456789-.,:[]{}" etf\x00\xff')
            content[at] = data.draw(damage)
        (folder / SINGLE_FILE).write_bytes(content)
        try:
            loaded = load(folder, layout_of(PAIR))
        except ServiceError as error:
            assert "safetensors" in error.message or "weight" in error.message
        else:
            assert not any(tensor.isnan().all() for tensor in loaded.tensors.values())


# The index of several files


@pytest.fixture
def sharded(tmp_path: Path) -> Path:
    save_file({"a.weight": torch.randn(2, 3)}, tmp_path / "one.safetensors")
    save_file({"b.weight": torch.randn(4)}, tmp_path / "two.safetensors")
    write_index(tmp_path, {"a.weight": "one.safetensors", "b.weight": "two.safetensors"})
    return tmp_path


def write_index(folder: Path, weight_map: Any) -> None:
    (folder / INDEX_FILE).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def test_the_index_says_which_files_are_read(sharded: Path) -> None:
    (sharded / "three.safetensors").write_bytes(b"nobody opens this")
    assert load(sharded, layout_of(PAIR)).tensors.keys() == {"a.weight", "b.weight"}


def test_a_missing_file_is_named(sharded: Path) -> None:
    (sharded / "two.safetensors").unlink()
    with pytest.raises(DataLoss, match=rf"two\.safetensors: is missing; {INDEX_FILE} names it"):
        Checkpoint.open(sharded)


def test_a_truncated_file_among_several_is_named(sharded: Path) -> None:
    os.truncate(sharded / "two.safetensors", (sharded / "two.safetensors").stat().st_size - 1)
    with pytest.raises(DataLoss, match=r"two\.safetensors: is truncated: b\.weight"):
        Checkpoint.open(sharded)


def test_a_key_that_no_file_holds_is_named(sharded: Path) -> None:
    names = {"a.weight": "one.safetensors", "b.weight": "two.safetensors"}
    write_index(sharded, names | {"c.weight": "two.safetensors"})
    with pytest.raises(DataLoss, match=r"two\.safetensors: lacks 'c\.weight'"):
        Checkpoint.open(sharded)


def test_a_key_in_another_file_than_the_index_says_is_named(sharded: Path) -> None:
    write_index(sharded, {"a.weight": "two.safetensors", "b.weight": "one.safetensors"})
    with pytest.raises(DataLoss, match=r"one\.safetensors: holds 'a\.weight'.*two\.safetensors"):
        Checkpoint.open(sharded)


def test_a_key_that_the_index_lacks_is_unexpected(sharded: Path) -> None:
    save_file({"b.weight": torch.randn(4), "c": torch.randn(1)}, sharded / "two.safetensors")
    with pytest.raises(InvalidArgument, match="'c': unexpected"):
        load(sharded, layout_of(PAIR))


def test_a_key_that_two_files_hold_is_named(sharded: Path) -> None:
    both = {"a.weight": torch.randn(2, 3), "b.weight": torch.randn(4)}
    save_file(both, sharded / "two.safetensors")
    with pytest.raises(DataLoss, match=r"two\.safetensors: holds 'a\.weight'.*one\.safetensors"):
        Checkpoint.open(sharded)


@pytest.mark.parametrize("name", ["../one.safetensors", "/etc/passwd", "sub/one.safetensors", ""])
def test_an_index_that_leaves_the_folder_is_refused(sharded: Path, name: str) -> None:
    (sharded.parent / "one.safetensors").write_bytes((sharded / "one.safetensors").read_bytes())
    (sharded / "sub").mkdir()
    (sharded / "sub" / "one.safetensors").hardlink_to(sharded / "one.safetensors")
    write_index(sharded, {"a.weight": name, "b.weight": "two.safetensors"})
    with pytest.raises(DataLoss, match=rf"{INDEX_FILE}: .*weight_map.*{name!r}"):
        Checkpoint.open(sharded)


@pytest.mark.parametrize("weight_map", [None, {}, [], "one.safetensors", {"a.weight": 3}])
def test_an_index_without_a_map_is_refused(sharded: Path, weight_map: Any) -> None:
    write_index(sharded, weight_map)
    with pytest.raises(DataLoss, match=rf"{INDEX_FILE}.*weight_map"):
        Checkpoint.open(sharded)


@pytest.mark.parametrize("text", ["", "{", "[]", "\x00", '"a"', "[" * 200_000])
def test_an_index_that_is_no_json_is_refused(sharded: Path, text: str) -> None:
    (sharded / INDEX_FILE).write_text(text)
    with pytest.raises(DataLoss, match=INDEX_FILE):
        Checkpoint.open(sharded)


def replaced(folder: Path, change: Callable[[Path], object]) -> bool:
    """Whether the worker would notice that a file has changed since it loaded it."""
    before = Checkpoint.open(folder).files
    change(folder / SINGLE_FILE)
    return Checkpoint.open(folder).files != before


def test_a_changed_file_is_another_model(tmp_path: Path) -> None:
    pair(tmp_path)
    later = 2_000_000_000
    assert not replaced(tmp_path, lambda file: file.read_bytes())
    assert replaced(tmp_path, lambda file: os.utime(file, (later, later)))
    assert replaced(tmp_path, lambda file: write(file.parent, {"a": entry(0, 8)}, b"\0" * 8))
