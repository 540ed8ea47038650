"""Hosts on a network of their own, made of this machine's kernel: for tests of clusters that span some.

Each host is a set of namespaces (network, name, IPC, mounts) with an address, a cable (a veth pair) to
one switch (a bridge in a namespace of its own), a /dev/shm that no other has, and an /etc/hosts that
names them all. This process is on the switch too, as the host of the clients. All of it is held by
processes that end with this one, however it ends, and no namespace has a name: nothing is left behind.
"""

import contextlib
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import client
from tests.clusters import Service

CHILD = Path(client.__file__).with_name("child.py")
NEEDED = ("ip", "nsenter", "unshare", "mount")
SWITCH = "switch"
UP = "ip link set lo up && echo up && exec cat"
PORTS = range(40_000, 40_500)
"""That hosts take where any will do."""
RANGE = "ip_local_port_range"


def missing() -> str:
    """Why this machine can't make hosts, or nothing."""
    if sys.platform != "linux" or os.geteuid():
        return "network namespaces need root on Linux"
    if absent := [tool for tool in NEEDED if shutil.which(tool) is None]:
        return f"network namespaces need {', '.join(absent)} (Debian: iproute2, util-linux)"
    with contextlib.ExitStack() as stack:
        try:
            switch = stack.enter_context(_held("--net", script=UP))
            _run(switch, "ip", "link", "add", SWITCH, "type", "bridge")
            _run(switch, "ip", "link", "add", "try0", "type", "veth", "peer", "name", "try1")
        except (OSError, AssertionError) as error:
            return f"this kernel makes no network namespaces with a bridge and veth pairs: {error}"
    return ""


@contextlib.contextmanager
def _held(*namespaces: str, script: str) -> Iterator[int]:
    """New namespaces, as the id of a process that holds them until its stdin ends, as on our death."""
    holder = subprocess.Popen(
        ["unshare", *namespaces, "sh", "-c", script],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    with holder:
        assert holder.stdin is not None and holder.stdout is not None
        assert holder.stderr is not None
        try:
            assert holder.stdout.readline() == "up\n", holder.stderr.read().strip()
            yield holder.pid
        finally:
            holder.stdin.close()
            holder.wait(10)


def _run(net_of: int | None, *command: str) -> None:
    enter = [] if net_of is None else ["nsenter", "--target", str(net_of), "--net"]
    done = subprocess.run([*enter, *command], capture_output=True, text=True, timeout=20)
    assert done.returncode == 0, f"{' '.join(command)}: {done.stderr.strip()}"


def _free_subnet() -> int:
    """The third number of a subnet that nobody uses here, of those meant for tests (RFC 2544)."""
    shown = subprocess.run(["ip", "-4", "route", "show", "table", "all"], capture_output=True)
    used = {int(octet) for octet in re.findall(rb"\b198\.18\.(\d+)\.", shown.stdout)}
    return next(number for number in range(os.getpid() % 128, 256) if number not in used)


@dataclass(frozen=True)
class Host:
    """A machine on the network. `holder` is None for this process."""

    name: str
    address: str
    holder: int | None
    device: str
    switch: int
    holders: list[int]
    """Of all hosts."""

    @property
    def port(self) -> str:
        """The other end of its cable, at the switch."""
        return f"to-{self.name}"

    def start(self, name: str, module: str, *arguments: str) -> Service:
        """Starts `python -m module` there without waiting for it; it ends with this process."""
        enter = ["nsenter", "--target", str(self.holder), "--net", "--uts", "--ipc", "--mount"]
        log = Path(tempfile.mkstemp(prefix=f"colrow-{name}-", suffix=".log")[1])
        process = subprocess.Popen(
            [*enter, sys.executable, "-P", str(CHILD), module, *arguments],
            stdout=log.open("wb"),
            stderr=subprocess.STDOUT,
            stdin=subprocess.PIPE,
        )
        return Service(name, process, log, host=self.address)

    def link(self, state: str) -> None:
        """Its interface "down", with which its routes go, so that sending fails; or "up"."""
        _run(self.holder, "ip", "link", "set", self.device, state)

    def move(self, address: str) -> "Host":
        """The same host at another address, under its old name."""
        _run(self.holder, "ip", "addr", "flush", "dev", self.device)
        _run(self.holder, "ip", "addr", "add", f"{address}/24", "dev", self.device)
        for holder in self.holders:
            names = Path(f"/proc/{holder}/root/etc/hosts")
            names.write_text(names.read_text().replace(f"{self.address} ", f"{address} "))
        return replace(self, address=address)

    def unplug(self) -> None:
        """From now on all it sends, and all that is sent to it, is lost without a word."""
        _run(self.switch, "ip", "link", "set", self.port, "nomaster")

    def plug(self) -> None:
        _run(self.switch, "ip", "link", "set", self.port, "master", SWITCH)

    def isolate(self, state: str) -> None:
        """ "on": packets between it and other isolated hosts are lost without a word; "off" again."""
        _run(self.switch, "ip", "link", "set", self.port, "type", "bridge_slave", "isolated", state)

    def shape(self, *discipline: str) -> None:
        """A queueing discipline of tc for what the host sends and for what it is sent."""
        for of, device in ((self.holder, self.device), (self.switch, self.port)):
            _run(of, "tc", "qdisc", "replace", "dev", device, "root", *discipline)

    def unshape(self) -> None:
        for of, device in ((self.holder, self.device), (self.switch, self.port)):
            _run(of, "tc", "qdisc", "del", "dev", device, "root")


@contextlib.contextmanager
def network(*names: str) -> Iterator[list[Host]]:
    """A host for each name, and last this process as the host "here"."""
    number = _free_subnet()
    subnet, our_device = f"198.18.{number}", f"colrow{number}"
    with contextlib.ExitStack() as stack:
        switch = stack.enter_context(_held("--net", script=UP))
        _run(switch, "ip", "link", "add", SWITCH, "type", "bridge")
        _run(switch, "ip", "link", "set", SWITCH, "up")
        names_file = "".join(f"{subnet}.{last} {name}\\n" for last, name in enumerate(names, 1))
        holders: list[int] = []
        hosts = []
        for last, name in enumerate((*names, "here"), start=1):
            holder, device = None, our_device
            if name != "here":
                script = " && ".join(
                    (
                        f"mount -t tmpfs tmpfs /dev/shm && hostname {name}",
                        f"printf '127.0.0.1 localhost\\n{names_file}' > /dev/shm/hosts",
                        "mount --bind /dev/shm/hosts /etc/hosts",
                        f"echo {PORTS.start} {PORTS.stop - 1} > /proc/sys/net/ipv4/{RANGE} && {UP}",
                    )
                )
                namespaces = ("--net", "--uts", "--ipc", "--mount")
                holder, device = stack.enter_context(_held(*namespaces, script=script)), "eth0"
                holders.append(holder)
            host = Host(name, f"{subnet}.{last}", holder, device, switch, holders)
            cable = ("type", "veth", "peer", "name", device, "netns", str(holder or os.getpid()))
            _run(switch, "ip", "link", "add", host.port, *cable)
            _run(switch, "ip", "link", "set", host.port, "master", SWITCH, "up")
            _run(holder, "ip", "addr", "add", f"{host.address}/24", "dev", device)
            host.link("up")
            hosts.append(host)
        # A namespace goes some time after its last process; the cable to us, now.
        stack.callback(_run, switch, "ip", "link", "del", hosts[-1].port)
        yield hosts
