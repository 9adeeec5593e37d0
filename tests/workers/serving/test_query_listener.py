"""Connections of a served index: who knows the key is answered, nobody else, however many ask."""

from __future__ import annotations

import dataclasses
import socket
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from workers.serving.query_listener import QueryListener
from workers.serving.query_wire import Door, Wire

BIG = 3 << 20


@pytest.fixture
def listener() -> QueryListener:
    return QueryListener("127.0.0.1", lambda message: bytes(message)[::-1], at_once=2)


def asked(door: Door, message: bytes) -> bytes:
    wire = Wire.to(door)
    try:
        wire.send(message)
        return bytes(wire.receive())
    finally:
        wire.close()


def test_messages_of_any_size_come_back_in_turn(listener: QueryListener) -> None:
    wire = Wire.to(listener.door)
    for message in (b"abc", b"", bytes(range(256)) * (BIG // 256), b"x"):
        wire.send(message)
        assert wire.receive() == message[::-1]
    wire.close()


def test_many_ask_side_by_side(listener: QueryListener) -> None:
    with ThreadPoolExecutor(16) as threads:
        answers = list(threads.map(lambda number: asked(listener.door, b"%05d" % number), range(64)))
    assert answers == [(b"%05d" % number)[::-1] for number in range(64)]


def test_who_does_not_know_the_key_is_not_answered(listener: QueryListener) -> None:
    stranger = dataclasses.replace(listener.door, key=b"another" * 4)
    with pytest.raises(OSError):
        asked(stranger, b"abc")
    with socket.create_connection((listener.door.host, listener.door.port), 5.0) as connection:
        connection.sendall(b"GET / HTTP/1.1".ljust(64))  # as long as what would show that it knows the key
        while connection.recv(4096):
            pass  # its nonce; then it hangs up
    assert asked(listener.door, b"abc") == b"cba"
    assert "key" not in repr(listener.door)


def test_who_shows_the_key_too_slowly_is_hung_up_on(listener: QueryListener, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("workers.serving.query_wire.HANDSHAKE_S", 0.3)
    begun = time.monotonic()

    def send_slowly(connection: socket.socket) -> None:
        while time.monotonic() - begun < 20.0:
            connection.sendall(b"x")
            time.sleep(0.1)

    with socket.create_connection((listener.door.host, listener.door.port), 5.0) as stranger, pytest.raises(OSError):
        send_slowly(stranger)
    assert time.monotonic() - begun < 10.0
    assert asked(listener.door, b"abc") == b"cba"


@pytest.mark.parametrize("length", [1 << 62, (1 << 64) - 1])
def test_a_length_that_can_not_be_costs_its_sender_the_connection(listener: QueryListener, length: int) -> None:
    wire = Wire.to(listener.door)
    wire._socket.sendall(length.to_bytes(8, "little"))
    with pytest.raises(OSError, match="closed the connection"):
        wire.receive()
    wire.close()
    assert asked(listener.door, b"abc") == b"cba"


def test_where_no_thread_is_to_be_had_the_next_who_asks_is_answered(
    listener: QueryListener, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as short:
        short.setattr(threading.Thread, "start", lambda thread: (_ for _ in ()).throw(RuntimeError("no thread")))
        with pytest.raises(OSError):
            asked(listener.door, b"abc")
    assert asked(listener.door, b"abc") == b"cba"


def test_a_listener_without_the_key_is_not_asked() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:

        def answer_anything() -> None:
            connection, _ = server.accept()
            with connection:
                connection.sendall(bytes(64))
                connection.recv(4096)

        threading.Thread(target=answer_anything, daemon=True).start()
        with pytest.raises(OSError, match="is not who it should be"):
            Wire.to(Door("127.0.0.1", server.getsockname()[1], b"key" * 11))


def test_an_address_that_is_not_this_machines_gives_no_listener() -> None:
    assert QueryListener.open("192.0.2.77", lambda message: bytes(message), at_once=1) is None
