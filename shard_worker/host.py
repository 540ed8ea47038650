"""The host that a worker is on."""

import contextlib
import ctypes
import gc
import os
import socket
from pathlib import Path


def host_id() -> str:
    """Equal for processes that can share memory: one kernel, one /dev/shm."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        shm = os.stat("/dev/shm")
        return f"{boot}:{shm.st_dev}:{shm.st_ino}"
    except OSError:
        return socket.gethostname()


def give_memory_back() -> None:
    """To the system, what is free: glibc keeps it, for it might be wanted again."""
    gc.collect()
    with contextlib.suppress(OSError, AttributeError):  # another C library
        ctypes.CDLL("libc.so.6").malloc_trim(0)
