"""What travels between a served index and those who ask it: bytes for plain values and arrays, and nothing else."""

from __future__ import annotations

import numpy as np
import pytest

from pipeline.errors import JobError, UserError
from workers.serving.query_messages import Message, answer_in, respond


def test_values_and_arrays_come_back_as_they_were() -> None:
    arrays = (
        np.arange(6, dtype=np.float32).reshape(2, 3)[:, ::2],
        np.array([[1, -1]]),
        np.zeros((0, 4)),
        np.array([True, False, True]),
    )
    values = {"text": "ünï \ud800", "deep": [None, 1.5, {"0": 2**60}]}
    message = Message.of(Message(values, arrays).to_bytes())
    assert message.values == values
    assert [array.dtype for array in message.arrays] == [array.dtype for array in arrays]
    assert all(np.array_equal(one, other) for one, other in zip(message.arrays, arrays, strict=True))
    assert all(array.flags.aligned for array in message.arrays)


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\xff" * 64,
        Message({"ask": "x"}, (np.ones(8),)).to_bytes()[:-8],
        Message({"ask": "x"}, (np.ones(8),)).to_bytes().replace(b'"<f8"', b'"|O8"'),
        b"\x02" + bytes(7) + b"[]",
    ],
)
def test_what_is_no_message_is_answered_with_an_error(content: bytes) -> None:
    with pytest.raises(JobError, match="not a message of ours"):
        answer_in(respond({}, content))


def test_errors_are_raised_where_it_was_asked() -> None:
    def refuse(request: Message) -> Message:
        raise UserError(f"no {request.values['k']} hits")

    def fail(request: Message) -> Message:
        raise KeyError("lost")

    methods = {"refuse": refuse, "fail": fail, "echo": lambda request: Message(request.values["k"], request.arrays)}

    def ask(name: str) -> Message:
        return answer_in(respond(methods, Message({"ask": name, "k": 3}, (np.ones(2),)).to_bytes()))

    assert (ask("echo").values, ask("echo").arrays[0].tolist()) == (3, [1.0, 1.0])
    with pytest.raises(UserError, match="no 3 hits"):
        ask("refuse")
    with pytest.raises(JobError, match="a worker failed: KeyError: 'lost'"):
        ask("fail")
    with pytest.raises(JobError, match="does not know 'unknown': it is of another version"):
        ask("unknown")
