"""The Jinja environment in which templates run: sandboxed, metered, without what would differ from run to run."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from datetime import datetime
from types import GeneratorType
from typing import Any

import jinja2
from jinja2 import nodes
from jinja2.ext import Extension
from jinja2.filters import make_attrgetter
from jinja2.runtime import LoopContext, Macro
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace
from jinja2.visitor import NodeTransformer

from pipeline.templates.guards import COMPARING_TESTS, FILTER_GUARDS, LIST_FILTERS, METHOD_GUARDS, Guard
from pipeline.templates.limits import Meter, OverLimit, TemplateLimits

_QUESTIONS = {"startswith", "endswith"}
_KEEPERS = (dict, Namespace)  # called with values, they only keep them
_FOR_NULLS = {"d", "default", "tojson"}  # the filters that have something to say about a null
_LISTING_FILTERS = {"join", "list", "sum"}  # that go through a generator to its end
_JINJAS_OWN_ARGUMENTS = {"_loop_vars", "_block_vars", "caller"}


class NullPrinted(Exception):
    """A template prints a value that is null."""


class BoundedEnvironment(ImmutableSandboxedEnvironment):
    """`refuse_null`: printing None raises NullPrinted instead of printing `None`."""

    intercepted_binops = frozenset(["+", "-", "*", "/", "//", "**", "%"])

    def __init__(
        self, limits: TemplateLimits, *, refuse_null: bool, extensions: Sequence[type[Extension]] = (), **options: Any
    ) -> None:
        super().__init__(extensions=["jinja2.ext.loopcontrols", *extensions], **options)
        self.meter = Meter(limits)
        self.turn: Callable[..., None] = self.meter.step  # one object, so that `call` knows it
        self.concat_bounded: Callable[..., str] = self._concat
        self.comparable: Callable[[Any], Any] = self._comparable
        self.looked: Callable[[Any], Any] = self._looked
        self.contains: Callable[[Any, Any], bool] = self._contains
        self.tested: Callable[[Any], Any] = self._tested
        self._own = (self.concat_bounded, self.comparable, self.looked, self.contains, self.tested)
        self.finalize = self._null_refusing if refuse_null else self._counted
        self._refuse_null = refuse_null
        self.filters["sum"] = self._sum
        self.filters["tojson"] = tojson
        for name, function in list(self.filters.items()):
            self.filters[name] = _guarded_filter(name, function, self.meter, FILTER_GUARDS.get(name))
            if refuse_null and name not in _FOR_NULLS:
                self.filters[name] = _null_refusing_filter(name, self.filters[name])
        self.filters["random"] = _not_random
        for name in COMPARING_TESTS:
            self.tests[name] = _guarded_test(self.tests[name], self.meter)
        self.globals.pop("lipsum")

    def call(__self, __context: Any, __obj: Any, *args: Any, **kwargs: Any) -> Any:
        """Call an object from a template."""
        if __obj is __self.turn:
            __obj(*args)
            return ""
        if any(__obj is own for own in __self._own):
            return __obj(*args)
        __self.meter.step()
        own = {name: value for name, value in kwargs.items() if name not in _JINJAS_OWN_ARGUMENTS}
        if not isinstance(__obj, Macro | LoopContext):
            __self.meter.allow_text(args, own)
            if not any(__obj is keeper for keeper in _KEEPERS):
                __self.meter.look(args, own)
        method = getattr(__obj, "__wrapped__", __obj)  # Jinja wraps str.format
        owner = getattr(method, "__self__", None)
        if isinstance(owner, list | tuple | dict):
            __self.meter.allow_text(owner)
        elif isinstance(owner, str | bytes | int):
            if method.__name__ == "strip" and not args and owner == __self.meter.watched:
                __self.meter.was_trimmed = True
            elif method.__name__ not in _QUESTIONS:
                __self.meter.look(owner)
            if __self._refuse_null and method.__name__ == "format" and _holds_null((*args, *own.values())):
                raise NullPrinted
            if (guard := METHOD_GUARDS.get(method.__name__)) is not None:
                guard(__self.meter, owner, *args, **own)
        result = super().call(__context, __obj, *args, **kwargs)
        __self.meter.made(result)
        if isinstance(owner, str) and method.__name__ in _QUESTIONS:
            __self.meter.ask(owner, method.__name__, args, result)
        return result

    def getitem(self, obj: Any, argument: Any) -> Any:
        return super().getitem(obj, self._comparable(argument))

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        self.meter.allow_operator(operator, left, right)
        formats = operator == "%" and isinstance(left, str)
        if self._refuse_null and formats and _holds_null(right if isinstance(right, tuple) else (right,)):
            raise NullPrinted
        if operator != "+":
            self.meter.look(left, right)
        result = super().call_binop(context, operator, left, right)
        self.meter.made(result)
        return result

    def _generate(self, source: nodes.Template, *args: Any, **kwargs: Any) -> str:
        _instrument(source)
        return super()._generate(source, *args, **kwargs)

    def _concat(self, *values: Any) -> str:
        """`a ~ b`, which Jinja's sandbox does not intercept."""
        if self._refuse_null and _holds_null(values):
            raise NullPrinted
        self.meter.allow_text(*values)
        result = "".join(map(str, values))
        self.meter.made(result)
        return result

    def _comparable(self, value: Any) -> Any:
        """The value, if comparing or hashing it does not take too long."""
        if isinstance(value, list | tuple | dict):
            self.meter.allow_text(value)
        self.meter.look(value)
        return value

    def _contains(self, container: Any, value: Any) -> bool:
        """`value in container`."""
        self.meter.step()
        self.meter.allow_text(value, list(container) if isinstance(container, dict) else container)
        found: bool = value in container
        if isinstance(container, str):
            self.meter.ask(container, "__contains__", (value,), found)
        else:
            self.meter.look(value, list(container) if isinstance(container, dict) else container)
        return found

    def _tested(self, value: Any) -> Any:
        """Whether a loop with a condition takes its next item."""
        self.meter.step()
        return value

    def _looked(self, value: Any) -> Any:
        """The value; going through it, or cutting it, may depend on what it is."""
        if isinstance(value, str):
            self.meter.look(value)
        return value

    def _counted(self, value: Any) -> Any:
        if isinstance(value, str):
            self.meter.step(len(value))
        else:
            self.meter.allow_text(value)
            self.meter.step()
        return value

    def _null_refusing(self, value: Any) -> Any:
        if value is None:
            raise NullPrinted
        return self._counted(value)

    def _sum(self, iterable: Any, attribute: Any = None, start: Any = 0) -> Any:
        """Jinja's filter with bounded additions."""
        items = self.meter.listed(iterable)
        if attribute is not None:
            items = list(map(make_attrgetter(self, attribute), items))
        for item in items:
            start = self.call_binop(None, "+", start, item)
        return start


def tojson(
    x: Any, ensure_ascii: bool = False, indent: Any = None, separators: Any = None, sort_keys: bool = False
) -> str:
    """JSON without HTML escapes, as chat templates expect it."""
    return json.dumps(x, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def chat_globals(now: datetime) -> Mapping[str, Callable[[str], str]]:
    """The functions that chat templates expect. The date is the job's, so that a resumed job renders the same."""

    def raise_exception(message: str) -> str:
        raise jinja2.TemplateError(message)

    def strftime_now(format: str) -> str:
        return now.strftime(format)

    return {"raise_exception": raise_exception, "strftime_now": strftime_now}


def _not_random(*_: Any) -> Any:
    raise OverLimit("uses the filter `random`, which would give another result each time")


def _guarded_filter(name: str, function: Any, meter: Meter, guard: Guard | None) -> Any:
    """The filter, counted and, where it can make something large, asked for its size first."""
    num_passed = _num_passed(function)

    @functools.wraps(function)
    def guarded(*args: Any, **kwargs: Any) -> Any:
        passed, value, rest = args[:num_passed], args[num_passed], args[num_passed + 1 :]
        if isinstance(value, GeneratorType) and name in _LISTING_FILTERS:
            value = meter.listed(value)
        if meter.watched is not None:
            _watch_filter(name, meter, value, rest, kwargs)
        if guard is not None:
            guard(meter, value, *rest, **kwargs)
        elif name == "list" and hasattr(value, "__len__"):
            meter.allow_items(len(value))
        result = function(*passed, value, *rest, **kwargs)
        meter.made(result)
        return result

    return guarded


def _null_refusing_filter(name: str, function: Any) -> Any:
    """The filter, which does not make the text `None` of a null."""
    num_passed = _num_passed(function)

    @functools.wraps(function)
    def refusing(*args: Any, **kwargs: Any) -> Any:
        value = args[num_passed]
        if value is None or (name == "join" and isinstance(value, list | tuple) and _holds_null(value)):
            raise NullPrinted
        return function(*args, **kwargs)

    return refusing


def _holds_null(values: Iterable[Any]) -> bool:
    return any(value is None for value in values)


def _num_passed(function: Any) -> int:
    """How many arguments, a context or an environment, come before the value."""
    return 1 if hasattr(function, "jinja_pass_arg") else 0


def _watch_filter(name: str, meter: Meter, value: Any, rest: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
    """Notice what a filter may do with the watched text."""
    if name == "trim" and value == meter.watched and not rest and not kwargs:
        meter.was_trimmed = True
    elif isinstance(value, str):
        meter.look(value if name not in ("default", "d", "string") else "", *rest, *kwargs.values())
    elif name not in LIST_FILTERS:
        meter.look(value, *rest, *kwargs.values())
        meter.was_used |= isinstance(value, GeneratorType)


def _guarded_test(function: Any, meter: Meter) -> Any:
    """The test, counted and refused where its values are too large to compare."""

    def guarded(*args: Any) -> Any:
        meter.step()
        meter.allow_text(*args)
        meter.look(*args)
        return function(*args)

    return guarded


def _instrument(template: nodes.Template) -> None:
    """Make every loop turn and macro call count, with the literal text it may print, and `~` bounded."""
    for loop in template.find_all(nodes.For):
        loop.iter = _call("looked", [loop.iter], loop.lineno)
        if loop.test is not None:
            loop.test = _call("tested", [loop.test], loop.lineno)
    bodies: list[Any] = list(template.find_all((nodes.For, nodes.Macro, nodes.CallBlock, nodes.FilterBlock)))
    for node in bodies:
        literal = sum(len(data.data) for statement in node.body for data in statement.find_all(nodes.TemplateData))
        turn = _call("turn", [nodes.Const(literal)], node.lineno)
        node.body.insert(0, nodes.ExprStmt(turn).set_lineno(node.lineno))
    environment: Any = template.environment
    _Bounded().visit(template)
    template.set_environment(environment)


class _Bounded(NodeTransformer):
    """Puts a call of ours in the place of `a ~ b`, and around what is compared, cut or becomes a dictionary's key."""

    def visit_Concat(self, node: nodes.Concat) -> nodes.Call:
        self.generic_visit(node)
        return _call("concat_bounded", node.nodes, node.lineno)

    def visit_Compare(self, node: nodes.Compare) -> nodes.Node:
        self.generic_visit(node)
        if len(node.ops) == 1 and node.ops[0].op in ("in", "notin"):
            found = _call("contains", [node.ops[0].expr, node.expr], node.lineno)
            return found if node.ops[0].op == "in" else nodes.Not(found).set_lineno(node.lineno)
        node.expr = _compared(node.expr)
        for operand in node.ops:
            operand.expr = _compared(operand.expr)
        return node

    def visit_Getitem(self, node: nodes.Getitem) -> nodes.Node:
        self.generic_visit(node)
        if isinstance(node.arg, nodes.Slice):
            node.node = _call("looked", [node.node], node.lineno)
        return node

    def visit_Pair(self, node: nodes.Pair) -> nodes.Node:
        self.generic_visit(node)
        node.key = _compared(node.key)
        return node


def _compared(node: nodes.Expr) -> nodes.Expr:
    return node if isinstance(node, nodes.Const) else _call("comparable", [node], node.lineno)


def _call(name: str, arguments: list[Any], line: int) -> nodes.Call:
    call = nodes.Call(nodes.EnvironmentAttribute(name), arguments, [], None, None)
    call.set_lineno(line)
    return call
