"""Prints what pyproject.toml asks for, one requirement a line: `requirements.py [build|run|EXTRA]…`.

Images install packages before the code is copied, so that a change of the code does not install them
anew; pip itself can't install the dependencies of a project without the project.
"""

import re
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

_OWN_EXTRA = re.compile(r"colrow\[([\w,-]+)\]")


def requirements(pyproject: dict[str, Any], group: str) -> Iterator[str]:
    """Those of building (`build`), of running (`run`), or of an extra and of those it names."""
    project = pyproject["project"]
    if group in ("build", "run"):
        yield from (
            pyproject["build-system"]["requires"] if group == "build" else project["dependencies"]
        )
        return
    if group not in project["optional-dependencies"]:
        raise SystemExit(
            f"{group!r} is not an extra: {', '.join(project['optional-dependencies'])}"
        )
    for requirement in project["optional-dependencies"][group]:
        if own := _OWN_EXTRA.fullmatch(requirement):
            for extra in own[1].split(","):
                yield from requirements(pyproject, extra)
        else:
            yield requirement


if __name__ == "__main__":
    read = tomllib.loads((Path(__file__).parents[1] / "pyproject.toml").read_text())
    for group in sys.argv[1:]:
        print(*requirements(read, group), sep="\n")
