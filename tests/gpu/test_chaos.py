"""Workers on GPUs that are killed at random: COLROW_KILLS=100 for the whole."""

from pathlib import Path

import pytest
import torch

from tests import checkpoints
from tests.chaos import num_kills, outlive_random_kills
from tests.supervised import Supervisor, running

NUM_KILLS = num_kills(3)
RECOVERY_TIMEOUT_S = 90.0  # a new process makes a CUDA context and captures its graphs anew


@pytest.mark.timeout(300 + RECOVERY_TIMEOUT_S * NUM_KILLS)
def test_64_streams_outlive_random_kills_without_an_error_or_a_changed_token(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = checkpoints.build("smollm2", tmp_path / "smollm2")
    tp = min(torch.cuda.device_count(), 4)
    supervisor = Supervisor(tp, devices=[f"cuda:{rank}" for rank in range(tp)])
    with running(folder, tp, supervisor=supervisor) as cluster:
        outcome = outlive_random_kills(cluster, NUM_KILLS, RECOVERY_TIMEOUT_S)
    with capsys.disabled():
        print(f"\ntp={tp} on GPUs: {outcome}")
