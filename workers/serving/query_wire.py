"""One connection between who asks and who answers: messages of bytes, each behind its length.

Both sides show that they know the key before anything else is read. Nothing is encrypted, as between Ray's own
processes. A peer whose machine is gone or cut off is given up after about five seconds; one that is only busy is not.
"""

from __future__ import annotations

import hmac
import secrets
import socket
import struct
import time
from dataclasses import dataclass, field
from typing import Final

KEY_BYTES: Final = 32
CONNECT_S: Final = 2.0
HANDSHAKE_S: Final = 5.0
SILENCE_S: Final = 5  # of a machine, until its connections end

_LENGTH: Final = struct.Struct("<Q")
_NONCE_BYTES: Final = 32
_DIGEST: Final = "sha256"
_PROOF_BYTES: Final = 32
_LEAST_S: Final = 1e-3  # a socket takes 0 for something else
_JOINED_BYTES: Final = 1 << 16  # a message up to this size goes out with its length in one piece


@dataclass(frozen=True, slots=True)
class Door:
    """Where an actor answers. `key` is what those who may ask were given, through Ray."""

    host: str
    port: int
    key: bytes = field(repr=False)


class Wire:
    """Not for several threads at once. OSError from any method where the connection has ended."""

    def __init__(self, connection: socket.socket) -> None:
        self._socket = connection
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        for name, value in (
            ("TCP_KEEPIDLE", 1),
            ("TCP_KEEPINTVL", 1),
            ("TCP_KEEPCNT", SILENCE_S - 1),
            ("TCP_USER_TIMEOUT", SILENCE_S * 1000),
        ):
            if hasattr(socket, name):  # Linux's
                connection.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)

    @staticmethod
    def to(door: Door) -> Wire:
        """OSError where nobody is reached there within seconds, or it is not who has the key."""
        connection = socket.create_connection((door.host, door.port), CONNECT_S)
        try:
            wire, until = Wire(connection), time.monotonic() + HANDSHAKE_S
            theirs, ours = wire._read(_NONCE_BYTES, until), secrets.token_bytes(_NONCE_BYTES)
            connection.sendall(ours + _proof(door.key, b"asks", theirs, ours))
            if not hmac.compare_digest(wire._read(_PROOF_BYTES, until), _proof(door.key, b"answers", theirs, ours)):
                raise ConnectionError(f"{door.host}:{door.port} is not who it should be")
            connection.settimeout(None)
        except BaseException:
            connection.close()
            raise
        return wire

    @staticmethod
    def of(connection: socket.socket, key: bytes) -> Wire:
        """The other side of `to`. OSError where who has connected does not know the key."""
        wire, until, ours = Wire(connection), time.monotonic() + HANDSHAKE_S, secrets.token_bytes(_NONCE_BYTES)
        connection.sendall(ours)
        theirs, proof = bytes(wire._read(_NONCE_BYTES, until)), wire._read(_PROOF_BYTES, until)
        if not hmac.compare_digest(proof, _proof(key, b"asks", ours, theirs)):
            raise ConnectionError("someone without the key")
        connection.sendall(_proof(key, b"answers", ours, theirs))
        connection.settimeout(None)
        return wire

    def send(self, message: bytes) -> None:
        length = _LENGTH.pack(len(message))
        if len(message) <= _JOINED_BYTES:
            self._socket.sendall(length + message)
        else:
            self._socket.sendall(length)
            self._socket.sendall(message)

    def receive(self) -> bytearray:
        (length,) = _LENGTH.unpack(self._read(_LENGTH.size))
        return self._read(length)

    def close(self) -> None:
        self._socket.close()

    def _read(self, length: int, until: float | None = None) -> bytearray:
        """`until`: of time.monotonic, when it is given up, however little comes at a time."""
        content = bytearray(length)
        view, done = memoryview(content), 0
        while done < length:
            if until is not None:
                self._socket.settimeout(max(until - time.monotonic(), _LEAST_S))
            count = self._socket.recv_into(view[done:])
            if count == 0:
                raise ConnectionResetError("the other side has closed the connection")
            done += count
        return content


def _proof(key: bytes, role: bytes, answering: bytes | bytearray, asking: bytes | bytearray) -> bytes:
    return hmac.digest(key, role + bytes(answering) + bytes(asking), _DIGEST)
