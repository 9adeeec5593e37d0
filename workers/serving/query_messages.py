"""What travels between those who ask a served index and its actors: plain values and arrays. Nothing is ever unpickled.

    8 bytes   the length of the head, little-endian
    head      JSON {"values": ..., "arrays": [[dtype, shape], ...]}, filled up with spaces to a multiple of 8 bytes
    arrays    one after another in C order, each filled up likewise, so that they can be used where they lie

A request's values are {"ask": a method's name, ...}; a reply's are {"answer": ...} or {"error": [kind, words]}.
"""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from pipeline.errors import JobError, UserError, one_line

Array = npt.NDArray[Any]

_LENGTH: Final = struct.Struct("<Q")
_COMPACT: Final = json.JSONEncoder(separators=(",", ":"))  # `json.dumps` would make one for each message
_KINDS: Final = "biuf"  # of arrays: Booleans and numbers
_ERRORS: Final[dict[str, type[UserError] | type[JobError]]] = {"UserError": UserError, "JobError": JobError}


@dataclass(frozen=True, slots=True)
class Message:
    values: Any = None  # what JSON holds
    arrays: tuple[Array, ...] = ()

    def to_bytes(self) -> bytes:
        arrays = [np.ascontiguousarray(array) for array in self.arrays]
        described = [[array.dtype.str, list(array.shape)] for array in arrays]
        head = _COMPACT.encode({"values": self.values, "arrays": described}).encode()
        head += b" " * _filling(len(head))
        pieces: list[Any] = [_LENGTH.pack(len(head)), head]
        for array in arrays:
            pieces += [array, bytes(_filling(array.nbytes))]
        return b"".join(pieces)

    @staticmethod
    def of(content: bytes | bytearray) -> Message:
        """Its arrays lie in `content`. ValueError where that is no message."""
        try:
            (length,) = _LENGTH.unpack_from(content)
            document = json.loads(content[_LENGTH.size : _LENGTH.size + length])
            start, arrays = _LENGTH.size + length, []
            for name, shape in document["arrays"]:
                kind = np.dtype(name)
                if kind.kind not in _KINDS:
                    raise ValueError(f"an array of {kind}")
                array = np.frombuffer(content, kind, math.prod(shape), start).reshape(shape)
                arrays.append(array)
                start += array.nbytes + _filling(array.nbytes)
            return Message(document["values"], tuple(arrays))
        except (struct.error, KeyError, TypeError, ValueError) as error:
            raise ValueError(f"not a message of ours: {error}") from error


Method = Callable[[Message], Message]  # a request -> {"answer"} and its arrays


def respond(methods: Mapping[str, Method], content: bytes | bytearray) -> bytes:
    """The reply to a request, which is always one: what fails is told to who asked."""
    try:
        request = Message.of(content)
        asked = request.values["ask"]
        if asked not in methods:
            raise JobError(f"the served index does not know {asked!r}: it is of another version than who asks")
        reply = methods[asked](request)
        return Message({"answer": reply.values}, reply.arrays).to_bytes()
    except (UserError, JobError) as error:
        return _failure("UserError" if isinstance(error, UserError) else "JobError", str(error))
    except Exception as error:
        return _failure("JobError", f"a worker failed: {type(error).__name__}: {one_line(error)}")


def answer_in(content: bytes | bytearray) -> Message:
    """The answer that a reply holds. Raises the UserError or JobError that it tells of."""
    reply = Message.of(content)
    if "error" in reply.values:
        kind, words = reply.values["error"]
        raise _ERRORS.get(kind, JobError)(words)
    return Message(reply.values["answer"], reply.arrays)


def _failure(kind: str, words: str) -> bytes:
    return Message({"error": [kind, words]}).to_bytes()


def _filling(length: int) -> int:
    return -length % 8
