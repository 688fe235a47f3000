"""Two hosts with addresses of their own on this machine: network namespaces with a cable between them."""

from __future__ import annotations

import contextlib
import os
import secrets
import shutil
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass

import pytest


@dataclass(frozen=True)
class Hosts:
    """Two network namespaces, joined by one cable. `a` and `b` run a command on a host."""

    a: tuple[str, ...]
    b: tuple[str, ...]
    ip_a: str
    ip_b: str
    cable: tuple[str, ...]

    def cut(self) -> None:
        subprocess.run([*self.cable, "down"], check=True)

    def mend(self) -> None:
        subprocess.run([*self.cable, "up"], check=True)


@contextlib.contextmanager
def two_hosts() -> Iterator[Hosts]:
    """Skips where network namespaces cannot be had."""
    tool = shutil.which("ip")
    if tool is None or os.geteuid() != 0:
        pytest.skip("network namespaces need root and the ip command")
    mark = secrets.token_hex(3)
    names = [f"fta{mark}", f"ftb{mark}"]
    network = f"10.{200 + secrets.randbelow(50)}.{secrets.randbelow(250)}"
    made: list[str] = []
    try:
        for name in names:
            done = subprocess.run([tool, "netns", "add", name], capture_output=True, text=True, check=False)
            if done.returncode:
                pytest.skip(f"network namespaces are not allowed here ({done.stderr.strip()})")
            made.append(name)
        pair = ["link", "add", "cable", "netns", names[0], "type", "veth", "peer", "name", "cable", "netns", names[1]]
        done = subprocess.run([tool, *pair], capture_output=True, text=True, check=False)
        if done.returncode:
            pytest.skip(f"virtual cables are not allowed here ({done.stderr.strip()})")
        for number, name in enumerate(names, start=1):
            for words in (["addr", "add", f"{network}.{number}/24", "dev", "cable"], ["link", "set", "cable", "up"],
                          ["link", "set", "lo", "up"]):  # fmt: skip
                subprocess.run([tool, "-n", name, *words], check=True)
        a, b = ((tool, "netns", "exec", name) for name in names)
        yield Hosts(a, b, f"{network}.1", f"{network}.2", (tool, "-n", names[1], "link", "set", "cable"))
    finally:
        for name in made:
            subprocess.run([tool, "netns", "del", name], check=False)
