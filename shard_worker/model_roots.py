"""The folders that models may be loaded from."""

from dataclasses import dataclass
from pathlib import Path

from colrow.errors import InvalidArgument, PermissionDenied


@dataclass(frozen=True, slots=True)
class ModelRoots:
    """`roots` are absolute and free of links; without any, every folder will do."""

    roots: tuple[Path, ...] = ()

    @classmethod
    def of(cls, folders: tuple[Path, ...]) -> "ModelRoots":
        """InvalidArgument where one is no folder: a typing error would close the worker unseen."""
        for folder in folders:
            if not folder.is_dir():
                raise InvalidArgument("model_root", str(folder), "is no folder")
        return cls(tuple(folder.resolve() for folder in folders))

    def check(self, path: Path) -> None:
        """PermissionDenied where `path` lies outside, its links and `..` followed.

        Of a folder in the Hugging Face cache the files are links to `blobs` beside `snapshots`: so the
        root has to be that model's whole folder there, or the cache.
        """
        if not self.roots:
            return
        try:
            real = path.resolve()
        except (OSError, RuntimeError, ValueError):  # links in a circle, a NUL
            real = None
        if real is None or not any(real.is_relative_to(root) for root in self.roots):
            raise PermissionDenied(
                f"model_path = {str(path)!r}: lies outside of what --model-root allows",
                reason="OUTSIDE_MODEL_ROOTS",
                metadata={"field": "model_path", "value": str(path)},
            )
