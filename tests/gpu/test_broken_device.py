"""A process whose GPU refuses every call ends itself; one that makes a mistake does not."""

import subprocess
import sys

import pytest

from shard_worker.device_thread import EXIT_BROKEN

SCRIPT = """
import asyncio, sys, torch
from shard_worker.device_thread import DeviceThread
from shard_worker.memory_meter import MemoryMeter

device = torch.device("cuda:0")
index = int(sys.argv[1])

async def main():
    thread = DeviceThread(device, MemoryMeter(device))
    await thread.open()
    at = torch.tensor([index])
    try:
        # Looked up on the device, where an index that is out of range ends all that is to come.
        await thread.run(lambda: torch.zeros(4, device=device)[at.to(device)].cpu())
        await thread.run(lambda: torch.zeros(2, device=device) + torch.zeros(3, device=device))
    except RuntimeError:
        await thread.run(lambda: None)  # behind the question whether the device is well
    thread.close()

asyncio.run(main())
"""


@pytest.mark.parametrize(("index", "code"), [(9, EXIT_BROKEN), (3, 0)])
def test_it_ends_where_the_device_is_lost_for_good(index: int, code: int) -> None:
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, str(index)],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == code, done.stderr
    assert ("cuda:0 is broken: " in done.stderr) == (code == EXIT_BROKEN)
