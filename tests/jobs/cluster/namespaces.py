"""Nodes in namespaces of their own, as far as this machine lets one make them: networks apart, mounts apart."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import IO

import psutil

NODE = Path(__file__).with_name("ray_node.py")
START_S = 60.0
HOST = 1  # the bridge's last number


def command(*words: str) -> None:
    subprocess.run(words, check=True, capture_output=True)


def why_not(*programs: str) -> str | None:
    """Why this machine can't have namespaces; None if it can."""
    if sys.platform != "linux":
        return "namespaces are Linux's"
    if os.geteuid() != 0:
        return "making namespaces takes root"
    missing = [program for program in programs if shutil.which(program) is None]
    return f"there is no program {', '.join(missing)}" if missing else None


class LoneNode:
    """A Ray node in a process of its own, begun by `within` (`ip netns exec NAME`, `unshare --mount`)."""

    def __init__(self, within: Sequence[str], *, gcs_address: str, own_address: str, name: str, num_cpus: int) -> None:
        self._sockets = tempfile.TemporaryDirectory(prefix="gm-")  # short: Unix sockets' names are limited
        self._process = subprocess.Popen(
            [*within, sys.executable, str(NODE), gcs_address, own_address, name, str(num_cpus), self._sockets.name],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )
        self._id = ""

    @property
    def pid(self) -> int:
        return self._process.pid

    @property
    def id(self) -> str:
        """Ray's, once the node is up."""
        if not self._id:
            assert self._process.stdout is not None
            self._id = self._process.stdout.readline().strip()
            assert self._id, "the node did not start"
        return self._id

    def end(self) -> None:
        stdin: IO[str] | None = self._process.stdin
        assert stdin is not None
        # On a network that was cut they don't end by themselves.
        left = psutil.Process(self._process.pid).children(recursive=True)
        stdin.close()
        try:
            self._process.wait(5)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        for process in left:
            with suppress(psutil.NoSuchProcess):
                process.kill()
        assert self._process.stdout is not None
        self._process.stdout.close()
        self._sockets.cleanup()


class Bridge:
    """A network of namespaces around this machine's own: each has one interface, eth0, that leads to all others."""

    def __init__(self, head_address: str) -> None:
        """`head_address`: this machine's, which the namespaces are to reach."""
        self._tag = f"gm{os.getpid() % 10_000}"
        self._subnet = f"10.213.{os.getpid() % 250 + 1}"
        self._head = head_address
        self._numbers: dict[str, int] = {}
        command("ip", "link", "add", self._tag, "type", "bridge")
        command("ip", "address", "add", f"{self._subnet}.{HOST}/24", "dev", self._tag)
        command("ip", "link", "set", self._tag, "up")

    def add(self, name: str) -> list[str]:
        """-> the words that a command is begun with to run within."""
        number = self._numbers[name] = HOST + 1 + len(self._numbers)
        space, outside = self._space(name), self._outside(name)
        command("ip", "netns", "add", space)
        command("ip", "link", "add", outside, "type", "veth", "peer", "name", "eth0", "netns", space)
        command("ip", "link", "set", outside, "master", self._tag, "up")
        command("ip", "-n", space, "address", "add", f"{self._subnet}.{number}/24", "dev", "eth0")
        command("ip", "-n", space, "link", "set", "eth0", "up")
        command("ip", "-n", space, "link", "set", "lo", "up")
        command("ip", "-n", space, "route", "add", self._head, "via", f"{self._subnet}.{HOST}")
        return self.within(name)

    def within(self, name: str) -> list[str]:
        return ["ip", "netns", "exec", self._space(name)]

    def address(self, name: str) -> str:
        return f"{self._subnet}.{self._numbers[name]}"

    def sent_bytes(self, name: str) -> int:
        """What the namespace has sent over its interface."""
        return int(Path(f"/sys/class/net/{self._outside(name)}/statistics/rx_bytes").read_text())

    def cut(self, name: str) -> None:
        command("ip", "link", "set", self._outside(name), "down")

    def remove(self) -> None:
        for name in self._numbers:
            subprocess.run(["ip", "link", "del", self._outside(name)], capture_output=True)
            subprocess.run(["ip", "netns", "del", self._space(name)], capture_output=True)
        subprocess.run(["ip", "link", "del", self._tag], capture_output=True)

    def _space(self, name: str) -> str:
        return f"{self._tag}-{name}"

    def _outside(self, name: str) -> str:
        return f"{self._tag}-{name}"
