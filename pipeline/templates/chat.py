"""The checkpoint's chat template: a conversation that ends in the row's text -> the prompt, as transformers renders it.

Reference: `PreTrainedTokenizerBase.apply_chat_template` of transformers 5.23, whose output this equals byte for byte.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from jinja2 import nodes
from jinja2.ext import Extension
from jinja2.parser import Parser

from pipeline.errors import RowError, UserError
from pipeline.templates.environment import BoundedEnvironment, chat_globals
from pipeline.templates.limits import Question, TemplateLimits
from pipeline.templates.template import Template

# A text that no template will have in it. Some have a `trim` at either end of it, which must leave it whole.
_WATCHED = "\ue000gristmill\ue001"
_PROBES = (
    "plain",
    ' \n\t It\'s "quoted", <b>& escaped</b> \\n {{ here }} {% raw %} é\u00a0\U0001f600 \r\n ',
    "A" * 5000 + "\n\n" + "z" * 5000,
)


@dataclass(frozen=True, slots=True)
class Frame:
    """What stands around the row's text. `trimmed`: the template trims the text itself.

    It holds for texts that answer `questions` like this; the template asks them, and does something else otherwise.
    """

    before: str
    after: str
    trimmed: bool = False
    questions: tuple[Question, ...] = ()

    def fits(self, text: str) -> bool:
        return all(getattr(text, method)(*arguments) == answer for method, arguments, answer in self.questions)

    def around(self, text: str) -> str:
        return self.before + (text.strip() if self.trimmed else text) + self.after


class ChatTemplate:
    """A checkpoint's chat template with the messages that come before every row's own.

    `special_tokens`: role -> string, `{"bos_token": "<s>"}`. `now`: what the template takes for today. UserError where
    the template is broken or refuses such conversations (a system message, say).
    """

    def __init__(
        self,
        source: str,
        *,
        messages: Sequence[Mapping[str, str]],
        special_tokens: Mapping[str, str],
        now: datetime,
        limits: TemplateLimits,
    ) -> None:
        environment = BoundedEnvironment(
            limits, refuse_null=False, trim_blocks=True, lstrip_blocks=True, extensions=[_GenerationBlocks]
        )
        environment.globals.update(chat_globals(now))
        self._meter = environment.meter
        self._template = Template(source, environment, title="the model's chat template")
        self._messages = [dict(message) for message in messages]
        self._special_tokens = dict(special_tokens)
        first = self.render(_PROBES[0])
        if isinstance(first, RowError):
            raise UserError(f"the model's chat template refuses this conversation: {first.message}")
        self.frame = self._find_frame()

    def render(self, text: str) -> str | RowError:
        """The prompt whose last message is the user's `text`."""
        values: dict[str, Any] = {
            **self._special_tokens,
            "messages": [*self._messages, {"role": "user", "content": text}],
            "add_generation_prompt": True,
            "tools": None,
            "documents": None,
        }
        return self._template.render(values)

    def _find_frame(self) -> Frame | None:
        """The frame around the row's text, if the template only ever puts the text in its place.

        One rendering is watched for every use of the text other than printing it; and texts of several kinds must come
        out the same either way.
        """
        meter = self._meter
        meter.watched, meter.was_used, meter.was_trimmed, meter.questions = _WATCHED, False, False, []
        rendered = self.render(_WATCHED)
        used, trimmed, questions = meter.was_used, meter.was_trimmed, tuple(dict.fromkeys(meter.questions))
        meter.watched = None
        if isinstance(rendered, RowError) or used or rendered.count(_WATCHED) != 1 or (trimmed and questions):
            return None
        before, after = rendered.split(_WATCHED)
        frame = Frame(before, after, trimmed, questions)
        return frame if all(self.render(text) == frame.around(text) for text in _PROBES if frame.fits(text)) else None


class _GenerationBlocks(Extension):
    """`{% generation %}...{% endgeneration %}`, which marks what the assistant said, and prints it as it is."""

    tags = {"generation"}  # noqa: RUF012  # Jinja's own declaration

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.CallBlock(self.call_method("_printed"), [], [], body).set_lineno(line)

    def _printed(self, caller: Any) -> Any:
        return caller()
