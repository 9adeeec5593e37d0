"""A row -> the text that the model sees: its own text, framed by a system message, examples and the chat template."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from datetime import datetime
from typing import Any, Literal

import pyarrow as pa

from pipeline.control_strings import ControlStrings, Span, reveal
from pipeline.errors import RowError, UserError
from pipeline.row_text import RowText
from pipeline.schemas import InputSchema
from pipeline.shortening import longest_fitting
from pipeline.source import Rows
from pipeline.templates.chat import ChatTemplate, Frame
from pipeline.templates.limits import TemplateLimits
from pipeline.tokenizer import Tokenizer


@dataclass(frozen=True, slots=True)
class Prompt:
    """Text for a tokenizer.

    `add_special_tokens`: as the checkpoint's tokenizer does by default. `parse_special`: control tokens' strings in the
    text become control tokens, but for those that touch a `literal` span (half-open, in order, disjoint): that is text
    of the row's, not of the prompt's author or the checkpoint's.
    """

    text: str
    add_special_tokens: bool
    parse_special: bool
    literal: tuple[Span, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Example:
    """One exchange that is shown before the row's own text."""

    user: str
    assistant: str


@dataclass(frozen=True, slots=True, kw_only=True)
class PromptSettings:
    """The section `prompt` of a job."""

    column: str | None = None
    template: str | None = None
    chat: bool | Literal["auto"] = "auto"
    system: str | None = None
    examples: tuple[Example, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelText:
    """What a checkpoint says about its prompts.

    `special_tokens`: role -> string, the variables that chat templates expect. `control_strings`: all that its
    tokenizer reads as one control token.
    """

    chat_template: str | None = None
    special_tokens: Mapping[str, str] | None = None
    control_strings: Collection[str] = ()

    @staticmethod
    def of(tokenizer: Tokenizer) -> ModelText:
        return ModelText(
            chat_template=tokenizer.chat_template,
            special_tokens=tokenizer.special_tokens,
            control_strings=tokenizer.control_strings,
        )


class TextBuilder:
    """A row -> its own text and nothing else: what is embedded. It never passes through a chat template."""

    def __init__(self, row_text: RowText) -> None:
        self._row_text = row_text
        self.columns = row_text.columns

    def build(self, rows: Rows) -> list[Prompt | RowError]:
        """One for each row: its text, or why there is none."""
        return [
            text if isinstance(text, RowError) else self._wrapped(text)
            for text in self._row_text.texts(rows.batch, rows.errors)
        ]

    def texts(self, batch: pa.RecordBatch) -> list[str | RowError]:
        """The texts of rows that are given by their columns, the ones that a part carries for instance."""
        return self._row_text.texts(batch)

    def shorten(
        self, rows: Rows, offset: int, *, num_tokens: int, max_tokens: int, count_tokens: Callable[[Prompt], int]
    ) -> Prompt | RowError:
        """As PromptBuilder.shorten."""

        def wrapped(values: Mapping[str, Any]) -> Prompt | RowError:
            text = self._row_text.text(values)
            return text if isinstance(text, RowError) else self._wrapped(text)

        return _shortened(self._row_text, wrapped, rows, offset, num_tokens, max_tokens, count_tokens)

    @staticmethod
    def _wrapped(text: str) -> Prompt:
        return Prompt(text, add_special_tokens=True, parse_special=False)


class QueryText:
    """What someone searches for -> the text that is embedded, by `embed.query_template`."""

    def __init__(self, template: str = "{{ text }}") -> None:
        schema = InputSchema(pa.schema([pa.field("text", pa.string())]))
        self._row_text = RowText(schema, template=template, section="embed.query")

    def build(self, text: str) -> Prompt:
        """UserError where there is no text to search for."""
        built = self._row_text.text({"text": text})
        if isinstance(built, RowError):
            raise UserError(f"query: {built.message}")
        return Prompt(built, add_special_tokens=True, parse_special=False)


class PromptBuilder:
    """A row -> the prompt that a text is generated from.

    `columns` are the input's columns that it needs. `now` is the date that a chat template prints, fixed for a job so
    that a resumed one renders the same. UserError where settings, input and model don't go together.
    """

    def __init__(
        self,
        settings: PromptSettings,
        schema: InputSchema,
        *,
        model: ModelText,
        text_column: str | None = None,
        now: datetime | None = None,
        limits: TemplateLimits | None = None,
    ) -> None:
        limits = limits or TemplateLimits()
        self._row_text = RowText(
            schema, column=settings.column, template=settings.template, text_column=text_column, limits=limits
        )
        self.columns = self._row_text.columns
        if settings.chat is True and model.chat_template is None:
            raise UserError("prompt.chat is true, but the model has no chat template")
        self._chat: ChatTemplate | None = None
        if settings.chat is not False and model.chat_template is not None:
            self._chat = ChatTemplate(
                model.chat_template,
                messages=_messages(settings),
                special_tokens=model.special_tokens or {},
                now=now or datetime.now(),
                limits=limits,
            )
            self._frame = self._chat.frame
        else:
            self._frame = _plain_frame(settings)
        self._control = ControlStrings(model.control_strings)
        written = "\n".join([self._row_text.written, *(message["content"] for message in _messages(settings))])
        self._beside = written + (model.chat_template or "")
        # What the author wrote may hold control tokens; then they have to be told apart from the same strings in rows.
        self._author_controls = self._control.occur_in(self._row_text.written)
        self._parse_special = self._chat is not None or self._control.occur_in(written)

    def build(self, rows: Rows) -> list[Prompt | RowError]:
        """One for each row: its prompt, or why there is none."""
        if self._author_controls:
            return [self._built(rows, offset) for offset in range(rows.batch.num_rows)]
        return [
            text if isinstance(text, RowError) else self._wrapped(text)
            for text in self._row_text.texts(rows.batch, rows.errors)
        ]

    def shorten(
        self, rows: Rows, offset: int, *, num_tokens: int, max_tokens: int, count_tokens: Callable[[Prompt], int]
    ) -> Prompt | RowError:
        """The row's prompt, which takes `num_tokens`, with as much of the row's text as `max_tokens` allow.

        The end of the row's longest text is cut, of the next one too where that is not enough; the template, the system
        message and the examples stay whole. `prompt_too_long` if they alone are too long.
        """
        return _shortened(self._row_text, self._of_values, rows, offset, num_tokens, max_tokens, count_tokens)

    def _built(self, rows: Rows, offset: int) -> Prompt | RowError:
        values = self._row_text.values(rows.batch, offset)
        if offset in rows.errors or isinstance(values, RowError):
            return rows.errors.get(offset) or values  # type: ignore[return-value]  # one of them is an error
        return self._of_values(values)

    def _of_values(self, values: Mapping[str, Any]) -> Prompt | RowError:
        hidden: Mapping[str, str] | None = None
        if self._author_controls:
            values, hidden = self._control.hide(values, self._beside)
        text = self._row_text.text(values)
        return text if isinstance(text, RowError) else self._wrapped(text, hidden)

    def _wrapped(self, text: str, hidden: Mapping[str, str] | None = None) -> Prompt | RowError:
        """The row's text in its frame. `hidden`: what in it stands for control strings that are not to be parsed.

        None means that nothing in it was written by the prompt's author.
        """
        plain = self._chat is None
        if self._frame is None or (self._frame.questions and not self._frame.fits(text)):
            assert self._chat is not None
            if hidden is None:
                values, hidden = self._control.hide({"text": text}, self._beside)
                text = values["text"]
            rendered = self._chat.render(text)
            if isinstance(rendered, RowError):
                return rendered
            rendered, literal = reveal(rendered, hidden)
            return Prompt(rendered, plain, True, literal)
        before, after, trimmed = self._frame.before, self._frame.after, self._frame.trimmed
        text = text.strip() if trimmed else text
        if hidden is not None:
            whole, literal = reveal(before + text + after, hidden)
            return Prompt(whole, plain, True, literal)
        literal = ((len(before), len(before) + len(text)),) if self._parse_special else ()
        return Prompt(before + text + after, plain, self._parse_special, literal)


def _messages(settings: PromptSettings) -> list[dict[str, str]]:
    """What is said before the row's own text."""
    messages = [] if settings.system is None else [{"role": "system", "content": settings.system}]
    for example in settings.examples:
        messages.append({"role": "user", "content": example.user})
        messages.append({"role": "assistant", "content": example.assistant})
    return messages


def _plain_frame(settings: PromptSettings) -> Frame:
    """Without a chat template: the system text, examples as a line of each side, then the row, blank lines between.

    After examples the row's text ends with a line end too, so that what follows is what an assistant's line was there.
    """
    blocks = [] if settings.system is None else [settings.system]
    blocks += [f"{example.user}\n{example.assistant}" for example in settings.examples]
    return Frame("".join(f"{block}\n\n" for block in blocks), "\n" if settings.examples else "", trimmed=False)


def _shortened(
    row_text: RowText,
    wrapped: Callable[[Mapping[str, Any]], Prompt | RowError],
    rows: Rows,
    offset: int,
    num_tokens: int,
    max_tokens: int,
    count_tokens: Callable[[Prompt], int],
) -> Prompt | RowError:
    values = row_text.values(rows.batch, offset)
    if isinstance(values, RowError):
        return values
    texts = {name: value for name, value in values.items() if isinstance(value, str) and value}
    for name in sorted(texts, key=lambda name: len(texts[name]), reverse=True):
        whole = texts[name]

        def count(length: int, name: str = name, whole: str = whole) -> int:
            prompt = wrapped({**values, name: whole[:length]})
            return max_tokens + 1 if isinstance(prompt, RowError) else count_tokens(prompt)

        length = longest_fitting(len(whole), num_tokens, max_tokens, count)
        if length:
            return wrapped({**values, name: whole[:length]})
        values[name] = ""
        prompt = wrapped(values)
        if isinstance(prompt, RowError):
            break
        num_tokens = count_tokens(prompt)
        if num_tokens <= max_tokens and any(value for key, value in values.items() if key in texts):
            return prompt
    return RowError("prompt_too_long", f"even without the row's text there are more than {max_tokens} tokens")
