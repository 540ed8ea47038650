"""What `nvidia-smi` prints, read. Its formats are NVIDIA's; https://docs.nvidia.com/deploy/nvidia-smi."""

import re
from dataclasses import dataclass

TOPOLOGY = ("nvidia-smi", "topo", "-m")
GPUS = (
    "nvidia-smi",
    "--query-gpu=index,uuid,driver_version,compute_mode,mig.mode.current",
    "--format=csv,noheader",
)

_PATHS = {
    "PIX": "one PCIe switch",
    "PXB": "several PCIe switches",
    "PHB": "PCIe through the CPU",
    "NODE": "PCIe through the CPU, between host bridges of a NUMA node",
    "SYS": "PCIe through the CPUs of two NUMA nodes",
}
_SHORT = ("PIX", "PXB")
"""Paths that keep away from the CPU."""


@dataclass(frozen=True, slots=True)
class SmiGpu:
    """A GPU as the driver has it; `index` is the driver's, which need not be CUDA's."""

    index: int
    uuid: str
    driver: str
    compute_mode: str
    mig: str


def parse_gpus(text: str) -> list[SmiGpu]:
    """Of the command `GPUS`. Lines of another form are left out."""
    gpus = []
    for line in text.splitlines():
        fields = [field.strip() for field in line.split(",")]
        if len(fields) == 5 and fields[0].isdecimal():
            index, uuid, driver, mode, mig = fields
            gpus.append(SmiGpu(int(index), uuid.removeprefix("GPU-"), driver, mode, mig))
    return gpus


def parse_links(text: str) -> dict[tuple[int, int], str]:
    """The link of each pair (a, b), a < b, of the driver's indices: NV18, PIX, SYS, …

    Of the command `TOPOLOGY`: a matrix whose first columns are the GPUs; those of network cards and
    affinities follow.
    """
    plain = re.sub(r"\x1b\[[0-9;]*m", "", text)  # its header is underlined
    columns: list[int] = []
    links: dict[tuple[int, int], str] = {}
    for line in plain.splitlines():
        cells = line.split()
        gpus = [int(cell[3:]) for cell in cells if re.fullmatch(r"GPU\d+", cell)]
        if not columns:
            columns = gpus
        elif len(gpus) == 1 and cells[0] == f"GPU{gpus[0]}":
            for column, link in zip(columns, cells[1:], strict=False):
                if gpus[0] < column:
                    links[gpus[0], column] = link
    return links


def describe_link(link: str) -> str:
    """`NV18` in words."""
    if number := re.fullmatch(r"NV(\d+)", link):
        return f"{number.group(1)} NVLinks" if number.group(1) != "1" else "1 NVLink"
    return f"{_PATHS[link]} ({link})" if link in _PATHS else link


def is_short(link: str) -> bool:
    """Whether GPUs joined so reach each other without the CPU."""
    return link.startswith("NV") or link in _SHORT
