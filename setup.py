"""Generates the gRPC stubs before packages are collected; all else is in pyproject.toml."""

import runpy
from pathlib import Path

from setuptools import find_packages, setup
from setuptools.command.build_py import build_py


class BuildWithStubs(build_py):
    """`build_py`, with the stubs of `colrow.v1` generated into the source tree first."""

    def run(self) -> None:
        runpy.run_path(str(Path(__file__).parent / "protos" / "generate.py"), run_name="__main__")
        super().run()


setup(
    packages=[
        *find_packages(include=["coordinator*", "shard_worker*", "client*"]),
        "colrow",
        "colrow.v1",
    ],
    # The contract's package lies beside the protos it is generated from.
    package_dir={"colrow": "protos/colrow"},
    package_data={
        "colrow": ["py.typed"],
        "colrow.v1": ["*.pyi", "*.proto"],
        "shard_worker.communicator": ["*.cu"],
    },
    cmdclass={"build_py": BuildWithStubs},
)
