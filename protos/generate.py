"""Generates the Python stubs of `colrow.v1` beside the protos: messages, services and their types.

Run as `python protos/generate.py`; installing the project runs it too. Needs grpcio-tools and
mypy-protobuf.
"""

import os
import sys
from importlib.resources import files
from pathlib import Path

from grpc_tools import protoc


def generate(root: Path) -> None:
    """Compiles every proto under `root`; raises RuntimeError when protoc refuses one."""
    protos = sorted(str(path.relative_to(root)) for path in root.glob("colrow/v1/*.proto"))
    services = [name for name in protos if name.endswith("_service.proto")]
    common = [
        "protoc",
        f"--proto_path={root}",
        f"--proto_path={files('grpc_tools') / '_proto'}",
    ]
    messages = [f"--python_out={root}", f"--pyi_out={root}"]
    grpc = [f"--grpc_python_out={root}", f"--mypy_grpc_out={root}"]
    for arguments in ([*common, *messages, *protos], [*common, *grpc, *services]):
        if status := protoc.main(arguments):
            raise RuntimeError(f"protoc failed with status {status}")


if __name__ == "__main__":
    # protoc looks for its mypy plug-in on PATH, which need not have this interpreter's scripts.
    os.environ["PATH"] = os.pathsep.join((os.environ["PATH"], str(Path(sys.executable).parent)))
    generate(Path(__file__).resolve().parent)
