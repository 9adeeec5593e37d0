"""A Ray whose head is gone is found out, also in the middle of a call that waits for it."""

from __future__ import annotations

import socket
import threading
import time

import pytest

from jobs.cluster import head_watch
from jobs.cluster.head_watch import HeadWatch, RayLost


@pytest.fixture
def head(monkeypatch):
    """A listening socket, and what is watched of it."""
    monkeypatch.setattr(head_watch, "LOOK_S", 0.02)
    monkeypatch.setattr(head_watch, "OWN_S", 0.1)
    with socket.create_server(("127.0.0.1", 0)) as listener:
        yield listener, {"Ray's head": listener.getsockname()}


@pytest.fixture
def watch(head):
    watch = HeadWatch(head[1], own=True)
    yield watch
    watch.close()


def test_a_call_gives_what_it_gives_while_the_head_is_there(watch):
    time.sleep(0.3)
    assert watch.ask(lambda: 7) == 7
    with pytest.raises(KeyError):
        watch.ask(lambda: {}["nothing"])


def test_a_call_that_waits_for_a_head_that_is_gone_is_left_alone(head, watch):
    listener, doors = head
    threading.Timer(0.1, listener.close).start()
    host, port = doors["Ray's head"]
    with pytest.raises(RayLost, match=f"Ray's head at {host}:{port} takes no connection"):
        watch.ask(threading.Event().wait)
    with pytest.raises(RayLost, match="what is committed is kept: the same command goes on from there"):
        watch.refuse_lost()


def test_somebody_may_restart_the_head_of_a_cluster_that_was_joined(head):
    listener, doors = head
    listener.close()
    watch = HeadWatch(doors, own=False)
    time.sleep(0.3)
    watch.refuse_lost()
    watch.close()
