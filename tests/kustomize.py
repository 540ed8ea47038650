"""`kubectl kustomize`, of as much as deploy/kubernetes uses, for machines that have no kubectl.

What it knows: resources, namespace, images, and JSON patches (RFC 6902: add, replace, remove) of a
target by kind and name. Anything else in a kustomization is an error. Where kubectl or kustomize is
installed, tests compare the two.
"""

import copy
from pathlib import Path
from typing import Any

import yaml

Manifest = dict[str, Any]

KNOWN = {"apiVersion", "kind", "namespace", "resources", "images", "patches"}
CLUSTER_WIDE = {"Namespace"}


def render(folder: Path) -> list[Manifest]:
    """The manifests that a folder's kustomization makes, in no particular order."""
    kustomization = yaml.safe_load((folder / "kustomization.yaml").read_text())
    if unknown := set(kustomization) - KNOWN:
        raise ValueError(f"{folder}: {', '.join(sorted(unknown))}: not known here")
    manifests: list[Manifest] = []
    for resource in kustomization["resources"]:
        path = folder / resource
        manifests += render(path) if path.is_dir() else yaml.safe_load_all(path.read_text())
    for patch in kustomization.get("patches", []):
        _patch(manifests, patch)
    for manifest in manifests:
        if (namespace := kustomization.get("namespace")) and manifest["kind"] not in CLUSTER_WIDE:
            manifest["metadata"]["namespace"] = namespace
        for container in containers(manifest):
            for image in kustomization.get("images", []):
                if container["image"] == image["name"]:
                    name = image.get("newName", image["name"])
                    container["image"] = f"{name}:{image['newTag']}"
    return manifests


def pod(manifest: Manifest) -> Manifest | None:
    """The pod's spec of a workload; None for what is none."""
    template = manifest.get("spec", {}).get("template", {})
    return template.get("spec")


def containers(manifest: Manifest) -> list[Manifest]:
    """All of a workload's, those that initialize it first."""
    spec = pod(manifest) or {}
    return [*spec.get("initContainers", []), *spec.get("containers", [])]


def _patch(manifests: list[Manifest], patch: Manifest) -> None:
    target = patch["target"]
    matching = [
        manifest
        for manifest in manifests
        if (manifest["kind"], manifest["metadata"]["name"]) == (target["kind"], target["name"])
    ]
    assert len(matching) == 1, target
    for operation in yaml.safe_load(patch["patch"]):
        _apply(matching[0], operation)


def _apply(manifest: Manifest, operation: Manifest) -> None:
    *parents, last = operation["path"].removeprefix("/").split("/")
    at: Any = manifest
    for parent in parents:
        at = at[int(parent) if isinstance(at, list) else parent.replace("~1", "/")]
    key: Any = last.replace("~1", "/")
    if isinstance(at, list) and key != "-":
        key = int(key)
    value = copy.deepcopy(operation.get("value"))
    match operation["op"]:
        case "add" if isinstance(at, list):
            at.insert(len(at) if key == "-" else key, value)
        case "add":
            at[key] = value
        case "replace":
            at[key]  # which must be there
            at[key] = value
        case "remove":
            del at[key]
        case other:
            raise ValueError(f"{other}: not known here")
