"""From the MODEL a user names to a folder in Hugging Face layout.

MODEL is one of three things, told apart by its spelling and by what exists on disk:

- nothing, or `demo`: the demo model, converted on first use (`client.demo_model`);
- an existing folder: itself;
- `organization/name`: a model of the Hugging Face hub, downloaded to that hub's own cache.

What is spelled like a path (`./x`, `/x`, `~/x`, `a/b/c`) is never asked of the hub: a mistyped
folder gets an error about folders, and its name does not leave the machine.
"""

from __future__ import annotations

import io
import json
import os
import re
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from client.demo_model import (
    DEMO_MODEL_NAME,
    DemoModelError,
    Progress,
    convert_demo_model,
)

__all__ = ["ModelSourceError", "Progress", "default_cache_folder", "resolve_model"]

_CONFIG_PATTERNS = ("*.json", "*.jinja", "tokenizer*", "*.model", "*.txt")
_WEIGHT_PATTERNS = ("*.safetensors",)
# Subfolders hold the same weights in other formats (onnx/, original/), consolidated*.safetensors
# under other tensor names: never download a model twice.
_IGNORED_PATTERNS = ("*/*", "*.bin", "*.pt", "*.pth", "*.gguf", "consolidated*")

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*", re.ASCII)

_WHAT_TO_TRY = (
    "Name a folder that holds config.json and *.safetensors, a Hugging Face id such as "
    f"'HuggingFaceTB/{DEMO_MODEL_NAME}' when online, or no MODEL at all for the demo model."
)


class ModelSourceError(ValueError):
    """MODEL does not lead to a model; the message names it and says what to try."""


def default_cache_folder(environ: Mapping[str, str] = os.environ) -> Path:
    """`$XDG_CACHE_HOME/colrow`, or `~/.cache/colrow`: where Colrow keeps what it can make anew.

    The only reading of the environment here; the hub's cache has its own variables (`HF_HOME`).
    A relative `XDG_CACHE_HOME` is invalid and ignored, as the XDG Base Directory spec says.
    """
    configured = Path(environ.get("XDG_CACHE_HOME", ""))
    base = configured if configured.is_absolute() else Path.home() / ".cache"
    return base / "colrow"


def resolve_model(
    model: str | None,
    *,
    weights: bool = True,
    cache_folder: Path | None = None,
    progress: Progress | None = None,
) -> Path:
    """The folder, in Hugging Face layout, of the model that the user calls `model`.

    Args:
        model: None or "demo" (the demo model, even beside a folder of that name: say `./demo` for
            the folder), a folder, or a hub id "organization/name".
        weights: False downloads a hub model's configuration and tokenizer alone, which is all that
            planning needs.
        cache_folder: where the demo model is kept; default `default_cache_folder()`.
        progress: called with (description, done bytes, total bytes; total 0 while unknown), in the
            caller's thread. What it raises ends the work and is passed on, like Ctrl-C.

    Raises:
        ModelSourceError: there is no such model, or it can't be had.
    """
    if model is None or model == "demo":
        return _demo_model(cache_folder or default_cache_folder(), progress)
    if not model.strip():
        raise ModelSourceError(f"model: {model!r} is empty. {_WHAT_TO_TRY}")
    try:
        folder = _expand_home(model)
        if folder.is_dir():
            return _existing_folder(model, folder)
        if folder.exists():
            raise ModelSourceError(f"model: {model!r} is a file, not a folder. {_WHAT_TO_TRY}")
    except OSError as error:  # may not be looked into, or no path at all, being too long
        raise ModelSourceError(f"model: {model!r} can't be read: {error.strerror}") from error
    if not _HUB_ID.fullmatch(model):
        raise ModelSourceError(
            f"model: no folder {model!r}, and it is not a hub id, which has the form "
            f"'organization/name'. {_WHAT_TO_TRY}"
        )
    return _hub_model(model, weights, progress)


def _expand_home(model: str) -> Path:
    try:
        return Path(model).expanduser()
    except RuntimeError:  # `~someone` who has no home here
        return Path(model)


def _demo_model(cache_folder: Path, progress: Progress | None) -> Path:
    folder = cache_folder / "models" / DEMO_MODEL_NAME
    try:
        return convert_demo_model(folder, progress)
    except DemoModelError as error:
        raise ModelSourceError(f"model: the demo model can't be made: {error}") from error
    except OSError as error:
        raise ModelSourceError(
            f"model: the demo model can't be written to {folder}: {error}. "
            f"XDG_CACHE_HOME may name another cache folder"
        ) from error


def _existing_folder(model: str, folder: Path) -> Path:
    if not (folder / "config.json").is_file():
        raise ModelSourceError(f"model: the folder {model!r} holds no config.json. {_WHAT_TO_TRY}")
    return folder.resolve()


# --- Hugging Face hub -------------------------------------------------------------------------

_FAILURES = {
    "gated": (
        "{model!r} asks for permission. Request it at https://huggingface.co/{model}, then log in "
        "with `hf auth login`."
    ),
    "unknown": (
        "{model!r} is neither a folder nor a public model of the hub (for a private one, log in "
        "with `hf auth login`). " + _WHAT_TO_TRY
    ),
    "unreachable": (
        "{model!r} is not a folder, and not (completely) in the hub's local cache, and the hub "
        "can't be reached ({reason}). " + _WHAT_TO_TRY
    ),
    "failed": "downloading {model!r} failed ({reason}). " + _WHAT_TO_TRY,
}


def _hub_model(model: str, weights: bool, progress: Progress | None) -> Path:
    answer = _download(model, weights, progress)
    if "folder" not in answer:
        message = _FAILURES[answer["failure"]].format(model=model, reason=answer["reason"])
        raise ModelSourceError(f"model: {message}")
    folder = Path(answer["folder"])
    if not (folder / "config.json").is_file():
        raise ModelSourceError(f"model: {model!r} has no config.json on the hub. {_WHAT_TO_TRY}")
    if weights and not any(folder.glob("*.safetensors")):
        raise ModelSourceError(f"model: {model!r} has no *.safetensors on the hub. {_WHAT_TO_TRY}")
    return folder


def _download(model: str, weights: bool, progress: Progress | None) -> dict[str, Any]:
    """Download into the hub's cache: {"folder": path}, or {"failure": kind, "reason": why}.

    In a process of its own, because only that ends at once. Interrupted, the hub client's threads go
    on with the files they are at, and Python waits for them, which takes minutes for large files.
    What was fetched stays in the hub's cache and the next download goes on from there.
    """
    patterns = [*_CONFIG_PATTERNS, *(_WEIGHT_PATTERNS if weights else ())]
    with (
        # The hub client's advice and warnings would garble progress bars.
        tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace") as complaints,
        subprocess.Popen(
            [sys.executable, "-m", "client.model_source", model, *patterns],
            cwd=Path(__file__).parents[1],  # where `client` can be imported from
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=complaints,
            start_new_session=True,  # Ctrl-C is for this process, which then ends that one
            encoding="utf-8",
        ) as process,
    ):
        assert process.stdout is not None
        try:
            for line in process.stdout:
                message: dict[str, Any] = json.loads(line)
                if "done" not in message:
                    return message
                if progress is not None:
                    progress(f"Downloading {model}", message["done"], message["total"])
            process.wait()
            complaints.seek(0)
            last_words = complaints.read().strip().splitlines()[-1:]
            reason = "".join(last_words) or f"exit status {process.returncode}"
            return {"failure": "failed", "reason": reason}
        finally:
            process.kill()


def _download_process(model: str, patterns: list[str]) -> None:
    """The other side of `_download`: writes its messages to stdout, one JSON object a line.

    Lives no longer than its stdin is open, so that it can't outlast a parent that was killed.
    """

    def end_with_parent() -> None:
        sys.stdin.read()
        os._exit(1)

    threading.Thread(target=end_with_parent, daemon=True).start()
    # Keep stdout to ourselves: what a library prints, even while it is imported, is no message.
    messages = os.fdopen(os.dup(1), "w", buffering=1, encoding="utf-8")
    os.dup2(2, 1)
    from huggingface_hub import errors, snapshot_download

    def tell(**message: str | int) -> None:
        messages.write(json.dumps(message) + "\n")

    try:
        folder = snapshot_download(
            model,
            allow_patterns=patterns,
            ignore_patterns=list(_IGNORED_PATTERNS),
            tqdm_class=_progress_bar_class(lambda done, total: tell(done=done, total=total)),
        )
        tell(folder=folder)
    except errors.GatedRepoError as error:
        tell(failure="gated", reason=_reason(error))
    except errors.RepositoryNotFoundError as error:
        tell(failure="unknown", reason=_reason(error))
    except errors.LocalEntryNotFoundError as error:
        tell(failure="unreachable", reason=_reason(error.__cause__ or error))
    except Exception as error:
        # Broad on purpose: full disks, proxies and resets come as exceptions of whichever HTTP and
        # transfer library the hub client is built on, and those change between its releases.
        tell(failure="failed", reason=_reason(error))


def _reason(error: BaseException) -> str:
    """The type and first line of an error: the hub client's messages go on for paragraphs."""
    return f"{type(error).__name__}: {error}".splitlines()[0]


def _progress_bar_class(report: Callable[[int, int], None]) -> type[Any]:
    """A tqdm class, as the hub client takes it, that calls `report(done, total)`, in bytes."""
    from tqdm.std import tqdm  # type: ignore[import-untyped]  # comes with huggingface_hub

    # The client counts bytes on one or two bars (received; written), depending on its release and
    # on the transfer. The one that is ahead is the news.
    byte_bars: list[Any] = []

    class HubProgress(tqdm):  # type: ignore[misc]
        monitor_interval = 0  # no monitor thread: nothing is drawn

        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **{**kwargs, "file": io.StringIO(), "disable": False})
            if self.unit == "B":
                byte_bars.append(self)

        def display(self, *args: Any, **kwargs: Any) -> None:
            total = max((int(bar.total or 0) for bar in byte_bars), default=0)
            done = max((int(bar.n) for bar in byte_bars), default=0)
            if self.unit == "B" and done:
                report(min(done, total) if total else done, total)

    # tqdm's default lock is shared between processes and costs a helper process.
    HubProgress.set_lock(threading.RLock())
    return HubProgress


if __name__ == "__main__":
    _download_process(sys.argv[1], sys.argv[2:])
