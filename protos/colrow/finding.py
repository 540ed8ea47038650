"""What an examination of a machine found: `shard_worker.doctor` prints it, `colrow doctor` shows it."""

import json
from dataclasses import asdict, dataclass
from enum import StrEnum
from typing import Self


class Verdict(StrEnum):
    """What a finding means for serving."""

    OK = "ok"
    WARNING = "warning"
    """Serving works, less well than it could."""
    PROBLEM = "problem"
    """`colrow serve` would not work."""
    NOT_HERE = "not here"
    """There is nothing of the kind to examine, and nothing is missing."""


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing that was examined. `advice` is what to do; empty where nothing is to be done."""

    name: str
    verdict: Verdict
    found: str
    advice: str = ""

    def to_json(self) -> str:
        """An object in one line."""
        return json.dumps(asdict(self), ensure_ascii=False)

    @classmethod
    def from_json(cls, line: str) -> Self:
        """Of `to_json`; ValueError where it is something else."""
        try:
            fields = json.loads(line)
            return cls(**(fields | {"verdict": Verdict(fields["verdict"])}))
        except (KeyError, TypeError) as error:
            raise ValueError(f"{line!r} is no finding: {error}") from error
