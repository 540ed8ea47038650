"""Models come from the folders that a worker was told, and from nowhere else."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from client.serving import model_roots
from colrow.errors import InvalidArgument, PermissionDenied
from shard_worker.checkpoint import INDEX_FILE, SINGLE_FILE, Checkpoint
from shard_worker.model_roots import ModelRoots

pytestmark = pytest.mark.timeout(60)


def checkpoint(folder: Path) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    save_file({"weight": torch.zeros(4)}, folder / SINGLE_FILE)
    return folder


@pytest.fixture
def root(tmp_path: Path) -> Path:
    checkpoint(tmp_path / "root" / "model")
    checkpoint(tmp_path / "elsewhere")
    return tmp_path / "root"


def test_a_folder_within_a_root_is_allowed_and_so_is_the_root(root: Path) -> None:
    for roots in ((root,), (root / "model",), (root.parent / "elsewhere", root)):
        ModelRoots.of(roots).check(root / "model")
    ModelRoots.of((root / ".." / "root",)).check(root / "model" / ".." / "model")


@pytest.mark.parametrize(
    "path",
    [
        *("../elsewhere", "model/../../elsewhere", "link", "link/.", "nowhere/../../elsewhere"),
        *("../root2", "..", "/", "loop", "", "model\0"),
    ],
)
def test_a_folder_outside_is_refused_by_whatever_way_it_is_named(root: Path, path: str) -> None:
    (root / "link").symlink_to(root.parent / "elsewhere")
    (root / "loop").symlink_to(root / "loop")
    (root.parent / "root2").mkdir()
    asked = root / path if path else Path("")
    with pytest.raises(PermissionDenied) as raised:
        ModelRoots.of((root / "model", root)).check(asked)
    assert raised.value.metadata["field"] == "model_path"
    assert raised.value.reason == "OUTSIDE_MODEL_ROOTS"


def test_without_roots_every_folder_will_do(root: Path) -> None:
    ModelRoots().check(root.parent / "elsewhere")


def test_a_root_that_is_no_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InvalidArgument, match=r"model_root = '.*nowhere': is no folder"):
        ModelRoots.of((tmp_path / "nowhere",))


@pytest.mark.parametrize("linked", [SINGLE_FILE, "shard.safetensors", INDEX_FILE])
def test_a_file_that_leads_outside_is_not_read(root: Path, linked: str) -> None:
    folder = root / "model"
    file = folder / SINGLE_FILE
    if linked != SINGLE_FILE:
        file = file.rename(folder / "shard.safetensors")
        index = {"weight_map": {"weight": "shard.safetensors"}}
        (folder / INDEX_FILE).write_text(json.dumps(index))
    roots = ModelRoots.of((root,))
    assert Checkpoint.open(folder, roots).tensors
    (folder / linked).rename(root.parent / "outside")
    (folder / linked).symlink_to(root.parent / "outside")
    with pytest.raises(PermissionDenied, match="lies outside of what --model-root allows"):
        Checkpoint.open(folder, roots)
    assert Checkpoint.open(folder).tensors  # which is what a link is for


def test_a_model_in_the_hugging_face_cache_loads_where_the_cache_is_the_root(
    tmp_path: Path,
) -> None:
    model = tmp_path / "hub" / "models--org--name"
    snapshot = model / "snapshots" / "0123abc"
    snapshot.mkdir(parents=True)
    blob = checkpoint(model / "blobs") / SINGLE_FILE
    blob = blob.rename(blob.with_name("ff00"))
    (snapshot / SINGLE_FILE).symlink_to(Path("../../blobs/ff00"))
    for root in (tmp_path / "hub", model):
        roots = ModelRoots.of((root,))
        roots.check(snapshot)
        assert Checkpoint.open(snapshot, roots).tensors
    with pytest.raises(PermissionDenied):
        Checkpoint.open(snapshot, ModelRoots.of((snapshot,)))
    # What `colrow serve` allows its workers: the folder, and where links in it lead.
    allowed = model_roots(snapshot)
    assert allowed == [model / "blobs", snapshot]
    assert Checkpoint.open(snapshot, ModelRoots.of(tuple(allowed))).tensors


def test_a_pickled_checkpoint_is_no_checkpoint(tmp_path: Path) -> None:
    torch.save({"weight": torch.zeros(4)}, tmp_path / "pytorch_model.bin")
    with pytest.raises(InvalidArgument, match=r"has neither model\.safetensors nor"):
        Checkpoint.open(tmp_path)
    (tmp_path / "pytorch_model.bin").rename(tmp_path / SINGLE_FILE)
    with pytest.raises(Exception, match="no safetensors file"):
        Checkpoint.open(tmp_path)
