"""A compiled template: which variables it names, and its text for given values."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jinja2
from jinja2 import meta, nodes

from pipeline.errors import RowError, UserError, one_line
from pipeline.templates.environment import BoundedEnvironment, NullPrinted
from pipeline.templates.limits import OverLimit

MAX_SOURCE_CHARS = 1_000_000


class Template:
    """`title` says in errors which template this is, `prompt.template` say.

    UserError with the line where the source is no Jinja, or wants other templates.
    """

    def __init__(self, source: str, environment: BoundedEnvironment, *, title: str) -> None:
        if len(source) > MAX_SOURCE_CHARS:
            raise UserError(f"{title}: longer than {MAX_SOURCE_CHARS:,} characters")
        self._environment = environment
        environment.meter.begin()
        try:
            tree = environment.parse(source)
            for other in tree.find_all((nodes.Include, nodes.Import, nodes.FromImport, nodes.Extends)):
                raise UserError(f"{title}, line {other.lineno}: includes and imports are not supported")
            # Names that the template does not set itself; those of Jinja's own functions are among them.
            self.variables = frozenset(meta.find_undeclared_variables(tree))
            self.functions = frozenset(environment.globals)
            self.literal_text = "\n".join(_literals(tree))
            self.parts = _parts(tree)
            self._tree = tree
            self._render = environment.from_string(source)
        except jinja2.TemplateSyntaxError as error:
            raise UserError(f"{title}, line {error.lineno}: {error.message}") from error
        except (OverLimit, SyntaxError, ValueError, OverflowError, RecursionError, MemoryError) as error:
            if isinstance(error, UserError):
                raise
            raise UserError(f"{title}: {'the template ' * isinstance(error, OverLimit)}{one_line(error)}") from error

    def subscripts_of(self, variable: str) -> frozenset[str] | None:
        """The constants in `variable["..."]`; None if the template uses the variable in any other way."""
        uses = sum(name.name == variable for name in self._tree.find_all(nodes.Name))
        subscripts = [
            item.arg.value
            for item in self._tree.find_all(nodes.Getitem)
            if isinstance(item.node, nodes.Name) and item.node.name == variable and isinstance(item.arg, nodes.Const)
        ]
        return frozenset(subscripts) if len(subscripts) == uses else None

    def render(self, values: Mapping[str, Any]) -> str | RowError:
        """The text, or `template_error`; `not_text` where a null would be printed."""
        meter = self._environment.meter
        meter.begin()
        try:
            text = "".join(self._render.root_render_func(self._render.new_context(dict(values))))
            meter.allow(len(text))
        except NullPrinted:
            return RowError("not_text", "the template prints a null")
        except OverLimit as error:
            return RowError("template_error", f"the template {error}")
        except RecursionError:
            return RowError("template_error", "the template calls itself without end")
        except Exception as error:  # whatever a template does wrong is its row's error
            return RowError("template_error", f"{type(error).__name__}: {one_line(error)}")
        return text


def _literals(tree: nodes.Template) -> list[str]:
    """What the template itself may print: its text and its string constants."""
    texts = [data.data for data in tree.find_all(nodes.TemplateData)]
    return texts + [const.value for const in tree.find_all(nodes.Const) if isinstance(const.value, str)]


def _parts(tree: nodes.Template) -> list[str | nodes.Name] | None:
    """Text and variables in turn, if the template is nothing but these."""
    parts: list[str | nodes.Name] = []
    for statement in tree.body:
        if not isinstance(statement, nodes.Output):
            return None
        for part in statement.nodes:
            if isinstance(part, nodes.TemplateData):
                parts.append(part.data)
            elif isinstance(part, nodes.Name):
                parts.append(part)
            else:
                return None
    return parts
