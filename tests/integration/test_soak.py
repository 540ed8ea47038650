"""The soak, in short: `make soak` runs it for ten minutes with the demo model."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests import checkpoints

ROOT = Path(__file__).parents[2]


@pytest.mark.timeout(180)
def test_under_mixed_load_and_kills_nothing_fails_and_every_process_is_measured(
    tmp_path: Path,
) -> None:
    folder = checkpoints.build("smollm2", tmp_path)
    done = subprocess.run(
        [
            *(sys.executable, "benchmarks/soak.py", "--model", str(folder)),
            *("--minutes", "0.4", "--warm-up-minutes", "0.1", "--kill-every", "8"),
            # In seconds nothing can be said of growth; that it is measured can.
            *("--interval", "2", "--max-growth-percent", "50"),
        ],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=150,
        check=False,
    )
    said = done.stdout
    assert done.returncode == 0, said + done.stderr
    assert re.search(r"^0.4 minutes, 2 kills, 2 recoveries$", said, re.MULTILINE), said
    assert len(re.findall(r"worker 1 was killed by SIGKILL; it is started again", said)) == 2
    for kind in ("greedy", "seeded", "several", "long", "left", "HTTP", "HTTP stream", "HTTP left"):
        assert f"'{kind}': " in said
    assert re.search(r"calls: .*, 0 failed", said)
    assert len(re.findall(r"MiB: worker 0 \S+, worker 1 \S+, coordinator \S+", said)) >= 8
    for name in ("worker 0", "worker 1", "coordinator"):
        assert re.search(rf"{name}: peaks of [\d. ]+ MiB; grew by \S+ %", said), said
