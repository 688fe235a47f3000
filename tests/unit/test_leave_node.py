"""What a pod runs before it ends. That requests in progress are answered is asked in tests/e2e/test_leaving_node.py."""

from __future__ import annotations

import socket
import sys
import time
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import psutil
import pytest

from ft_ray import leave_node

NODE = "ab" * 28


@pytest.fixture
def head(monkeypatch: pytest.MonkeyPatch) -> Iterator[socket.socket]:
    """Something that listens, as a head does; `leave` looks every hundredth of a second."""
    monkeypatch.setattr(leave_node, "_LOOK_SECONDS", 0.01)
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        listening.listen(1000)
        yield listening


def raylet(head: socket.socket, *titles: str) -> Any:
    """A raylet with children of these titles; each look at them takes the first one away."""
    children = [SimpleNamespace(cmdline=lambda title=title: [title, "x"]) for title in titles]

    def look() -> list[Any]:
        if not children:
            raise psutil.NoSuchProcess(1)
        return [children.pop(0), *children]

    command = ["raylet", f"--node_id={NODE}", f"--gcs-address=127.0.0.1:{head.getsockname()[1]}", "--x"]
    return SimpleNamespace(cmdline=lambda: command, children=look)


def drained(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    asked: list[Any] = []
    monkeypatch.setattr(leave_node, "_drain", lambda *given: asked.extend(given))
    return asked


def test_it_ends_when_nothing_serves_any_more(head: socket.socket, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = drained(monkeypatch)
    serving = ("ray::ServeReplica:m:Server:m", "ray::ServeReplica:m:Ingress", "ray::ProxyActor.listen", "ray::IDLE")
    assert leave_node.leave(raylet(head, *serving), 7)
    assert asked[:2] == [NODE, f"127.0.0.1:{head.getsockname()[1]}"]
    assert 0 < asked[2] - 1000 * time.time() <= 7000


def test_what_does_not_end_is_told_in_time(
    head: socket.socket, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    drained(monkeypatch)
    monkeypatch.setattr(leave_node, "_PROXY_SECONDS", 0.1)
    monkeypatch.setattr(leave_node, "serving", lambda _: ["ray::ServeReplica:m:Server:m"])
    began = time.monotonic()
    assert not leave_node.leave(raylet(head), 1)
    assert 1 <= time.monotonic() - began < 10
    assert "ray::ServeReplica:m:Server:m did not end within 1 seconds and will now be ended" in capsys.readouterr().err


def test_without_a_head_nobody_is_waited_for(
    head: socket.socket, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A cluster that is deleted as a whole, GPUs and all."""
    monkeypatch.setattr(leave_node, "_HEAD_SECONDS", 0.2)
    monkeypatch.setattr(leave_node, "_ASK_SECONDS", 0.2)
    monkeypatch.setattr(leave_node, "serving", lambda _: ["ray::ProxyActor"])
    monkeypatch.setattr(leave_node, "_drain", lambda *_: head.close())
    node = raylet(head)
    assert not leave_node.leave(node, 600)
    assert "ray::ProxyActor have no head any more at 127.0.0.1:" in capsys.readouterr().err
    with pytest.raises(SystemExit, match="no head answers at 127"):
        leave_node.leave(node, 600)


def test_one_node_is_expected(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(leave_node, "_raylets", list)
    monkeypatch.setattr(sys, "argv", ["leave_node", "5"])
    with pytest.raises(SystemExit, match="0 raylets run here and one was expected"):
        leave_node.main()
