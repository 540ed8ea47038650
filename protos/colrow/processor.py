"""What processor a host has."""

import functools
import platform


@functools.cache
def processor_name() -> str:
    """As the kernel calls it: "Intel(R) Xeon(R) Platinum 8480C"."""
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            for line in file:
                if line.startswith("model name"):
                    return line.partition(":")[2].strip()
    except OSError:  # not Linux
        pass
    return platform.processor() or platform.machine()
