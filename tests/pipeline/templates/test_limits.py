"""Templates that would take for ever or fill the memory are stopped; and none of the stops is in the way of others."""

from __future__ import annotations

import threading
import time
from pathlib import Path
from typing import Any

import jinja2
import pytest

from pipeline.errors import RowError, UserError
from pipeline.templates.environment import BoundedEnvironment
from pipeline.templates.limits import TemplateLimits
from pipeline.templates.template import Template

LIMITS = TemplateLimits(max_chars=1_000_000, max_items=20_000, max_steps=20_000)
NESTED = (
    "{% set n = namespace(s=[1], t=[1]) %}"
    "{% for i in range(200) %}{% set n.s = [n.s, n.s] %}{% set n.t = [n.t, n.t] %}{% endfor %}"
)
DOUBLED = "{%% set n = namespace(s='aa') %%}{%% for i in range(99) %%}{%% set n.s = %s %%}{%% endfor %%}"


def rendered(source: str, limits: TemplateLimits = LIMITS, **values: Any) -> str | RowError:
    environment = BoundedEnvironment(limits, refuse_null=True, undefined=jinja2.StrictUndefined)
    return Template(source, environment, title="prompt.template").render(values)


ENDLESS = {
    "loops that print nothing": "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
    "loops that print text": "{% for i in range(99999) %}{% for j in range(99999) %}x{% endfor %}{% endfor %}",
    "loops into a variable": "{% set x %}{% for i in range(9999) %}{{ 'y' * 100000 }}{% endfor %}{% endset %}",
    "literal text into a variable": "{% set x %}{% for i in range(9999) %}"
    + "y" * 100_000
    + "{% endfor %}{% endset %}",
    "loops in a macro": "{% macro m() %}{% for i in range(9999) %}{{ 'y' * 99999 }}{% endfor %}{% endmacro %}{{ m() }}",
    "loops in a filter": "{% filter upper %}{% for i in range(999) %}{{ 'y' * 99999 }}{% endfor %}{% endfilter %}",
    "recursion that branches": "{% macro m(n) %}{% if n %}{{ m(n-1) }}{{ m(n-1) }}{% endif %}{% endmacro %}{{ m(90) }}",
    "recursion that does not end": "{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}",
    "blocks that branch": "{% block b0 %}{% endblock %}"
    + "".join(
        f"{{% block b{i} %}}{{{{ self.b{i - 1}() }}}}{{{{ self.b{i - 1}() }}}}{{% endblock %}}" for i in range(1, 60)
    ),
    "blocks of much text": "{% block b0 %}"
    + "y" * 100_000
    + "{% endblock %}"
    + "".join(
        f"{{% block b{i} %}}{{{{ self.b{i - 1}() }}}}{{{{ self.b{i - 1}() }}}}{{% endblock %}}" for i in range(1, 14)
    ),
    "a recursive loop": "{% for a in range(99) recursive %}{{ loop(range(99)) }}{% endfor %}",
    "calls that branch in an expression": (
        "{% macro m(n) %}{% if n %}{% set x = m(n-1) ~ m(n-1) %}{% endif %}{% endmacro %}{{ m(90) }}"
    ),
    "a filtered loop": "{% for i in range(99999) if false %}{% endfor %}" * 3
    + "{% for a in range(99999) %}{% for i in range(99999) if false %}{% endfor %}{% endfor %}",
    "doubling by +": DOUBLED % "n.s + n.s",
    "doubling by ~": DOUBLED % "n.s ~ n.s",
    "doubling by join": DOUBLED % "[n.s, n.s]|join",
    "doubling by replace": DOUBLED % "n.s|replace('a', 'aa')",
    "doubling by format": DOUBLED % "'%s%s' % (n.s, n.s)",
    "doubling lists": "{% set n = namespace(s=[1]) %}{% for i in range(99) %}{% set n.s = n.s + n.s %}{% endfor %}",
    "doubling in a set block": (
        "{% set n = namespace(s='ab') %}{% for i in range(99) %}{% set x %}{{ n.s }}{{ n.s }}{% endset %}"
        "{% set n.s = x %}{% endfor %}"
    ),
    "multiplied text": "{{ 'x' * 10**9 }}",
    "multiplied lists": "{{ ([1] * 10**9)|length }}",
    "multiplied twice": "{{ (10**9 * 'x')|length }}",
    "powers": "{{ 10 ** 10 ** 8 }}{{ (10 ** 999) ** 999 }}",
    "squares": "{% set n = namespace(i=10) %}{% for i in range(99) %}{% set n.i = n.i * n.i %}{% endfor %}",
    "centre": "{{ 'x'|center(10**9) }}",
    "centre by name": "{{ 'x'|center(width=10**9) }}",
    "ljust": "{{ 'x'.ljust(10**9) }}",
    "zfill": "{{ 'x'.zfill(10**9) }}",
    "expandtabs": "{{ '\t'.expandtabs(10**9) }}",
    "indent by a text": "{{ ('a\n' * 1000)|indent('  ' * 10**5) }}",
    "wide formats": "{{ '%1000000000d' % 1 }}",
    "formats with a given width": "{{ '%*d' % (10**9, 1) }}",
    "wide braces": "{{ '{:1000000000}'.format(1) }}",
    "braces with a given width": "{{ '{:{w}}'.format(1, w=10**9) }}",
    "format_map": "{{ '{x:999999999}'.format_map({'x': 1}) }}",
    "the filter format": "{{ '%1000000000d'|format(1) }}",
    "precision": "{{ '%.1000000000f' % 1.5 }}",
    "rounding": "{{ 1.5|round(10**9, 'ceil') }}",
    "batches": "{{ [1]|batch(10**9, 'x')|list }}",
    "slices": "{{ [1]|slice(10**9)|list }}",
    "slices by name": "{{ [1]|slice(slices=10**9)|list }}",
    "joining with a long text": "{{ (['y'] * 9999)|join('x' * 100000) }}",
    "joining by method": "{{ ('x' * 100000).join(['y'] * 9999) }}",
    "joining a generator": "{{ ('x' * 100000).join(range(9999)|map('string')) }}",
    "replacing": "{{ ('a' * 100000).replace('a', 'b' * 100000) }}",
    "replacing nothing": "{{ ('a' * 100000).replace('', 'b' * 100000) }}",
    "translating": "{{ ('x' * 100000).translate({120: 'y' * 100000}) }}",
    "wrapping": "{{ ('a ' * 100000)|wordwrap(1, wrapstring='z' * 100000) }}",
    "summing lists": "{{ ([[1] * 9999] * 9999)|sum(start=[])|length }}",
    "summing texts": "{{ (['a' * 99999] * 9999)|sum(start='')|length }}",
    "listing lists": "{{ ([range(99999)] * 9999)|map('list')|list|length }}",
    "upper many times": "{{ (['a' * 99999] * 9999)|map('upper')|list|length }}",
    "splitting": "{{ ('a' * 999999).split('a')|length }}",
    "listing characters": "{{ ('a' * 999999)|list|length }}",
    "bytes": "{{ (1).to_bytes(10**9, 'big') }}",
    "printing nested lists": NESTED + "{{ n.s }}",
    "JSON of nested lists": NESTED + "{{ n.s|tojson }}",
    "nested lists as text": NESTED + "{{ n.s|string }}",
    "nested lists joined": NESTED + "{{ [n.s]|join }}",
    "nested lists and text": NESTED + "{{ 'x' ~ n.s }}",
    "nested lists by percent": NESTED + "{{ '%s' % n.s }}",
    "nested lists by the filter format": NESTED + "{{ '%s'|format(n.s) }}",
    "nested lists in braces": NESTED + "{{ '{}'.format(n.s) }}",
    "nested lists for people": NESTED + "{{ n.s|pprint }}",
    "comparing nested lists": NESTED + "{{ n.s == n.t }}",
    "ordering nested lists": NESTED + "{{ n.s < n.t }}",
    "sorting nested lists": NESTED + "{{ [n.s, n.t]|sort }}",
    "finding nested lists": NESTED + "{{ n.s in [n.t] }}",
    "not finding nested lists": NESTED + "{{ n.s not in [n.t] }}",
    "testing nested lists": NESTED + "{{ n.s is eq(n.t) }}",
    "selecting nested lists": NESTED + "{{ [n.s]|select('equalto', n.t)|list }}",
    "counting nested lists": NESTED + "{{ [n.s].count(n.t) }}",
    "the largest nested list": NESTED + "{{ [n.s, n.t]|max }}",
    "complaining of nested lists": NESTED + "{{ [1].index(n.s) }}",
    "nested tuples as keys": NESTED.replace("[n.s, n.s]", "(n.s, n.s)") + "{{ {n.s: 1} }}",
    "nested tuples as subscripts": NESTED.replace("[n.s, n.s]", "(n.s, n.s)") + "{{ {}[n.s] }}",
    "JSON with deep indents": "{{ [[[1]]]|tojson(indent=10**9) }}",
    "JSON with long separators": "{{ ([1] * 9999)|tojson(separators=('x' * 99999, 'y')) }}",
    "links": "{{ ('a@b.c ' * 99999)|urlize }}",
    "long lists of long texts": "{{ ['a' * 99999] * 9999 }}",
}


def peak_kib() -> int:
    (line,) = [line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM:")]
    return int(line.split()[1])


@pytest.mark.parametrize("name", list(ENDLESS))
def test_is_stopped_soon(name: str) -> None:
    rendered("warm {{ 'up'|upper }}")
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
    started, memory_kib = time.thread_time(), peak_kib()
    result = rendered(ENDLESS[name])
    assert time.thread_time() - started < 5
    assert peak_kib() - memory_kib < 60_000
    assert isinstance(result, RowError), str(result)[:100]
    assert result.code == "template_error"
    assert "\n" not in result.message
    assert len(result.message) < 300


def test_the_clock_stops_what_no_count_does() -> None:
    slow = TemplateLimits(max_seconds=0.2)
    started = time.thread_time()
    result = rendered("{% set t = 'ab' * 400000 %}{% for i in range(99999) %}{{ t.count('b') }}{% endfor %}", slow)
    assert result == RowError("template_error", "the template takes more than 0.2 seconds")
    assert time.thread_time() - started < 5


def test_a_result_that_is_too_long_is_an_error() -> None:
    assert rendered("{{ a }}{{ a }}", a="x" * 600_000) == RowError(
        "template_error", "the template makes more than 1,000,000 characters at once"
    )


def test_each_rendering_has_limits_of_its_own() -> None:
    environment = BoundedEnvironment(LIMITS, refuse_null=True)
    template = Template("{% for i in range(15000) %}{% endfor %}done", environment, title="t")
    assert [template.render({}) for _ in range(4)] == ["done"] * 4
    results: list[Any] = []
    threads = [threading.Thread(target=lambda: results.append(template.render({}))) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert results == ["done"] * 3


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("{% for w in body.split()[:3] %}{{ loop.index }}.{{ w }} {% endfor %}", "1.one 2.two 3.three "),
        ("{{ body|truncate(11) }}", "one two..."),
        ("{{ body|wordwrap(9) }}", "one two\nthree\nfour"),
        ("{{ body|indent(2, first=true) }}", "  one two three four"),
        ("{{ '%-5s|%5.1f|%03d' % ('ab', 1.25, 7) }}", "ab   |  1.2|007"),
        ("{{ '{:>5}|{:.1f}'.format('ab', 1.25) }}", "   ab|1.2"),
        ("{{ tags|join(', ') }}", "a, b"),
        ("{{ tags|map('upper')|join }}", "AB"),
        ("{{ [3, 1, 2]|sort|join }}{{ [1, 2]|sum }}{{ rows|sum(attribute='n') }}", "12333"),
        ("{{ rows|map(attribute='n')|list }}", "[1, 2]"),
        ("{{ {'a': [1, none], 'b': 'é<'}|tojson }}", '{"a": [1, null], "b": "é<"}'),
        ("{{ 'a' in tags }} {{ 'z' not in tags }} {{ 'two' in body }} {{ 'n' in rows[0] }}", "True True True True"),
        ("{{ 1 < 2 < 3 }} {{ (1, 2) == (1, 2) }} {{ not ('a' in tags) }}", "True True False"),
        ("{% macro m(x) %}[{{ x }}]{% endmacro %}{{ m('a') ~ m('b') }}", "[a][b]"),
        ("{% call(x) wrap() %}{{ x }}{% endcall %}{% macro wrap() %}{% endmacro %}", None),
        ("{% set ns = namespace(n=0) %}{% for t in tags %}{% set ns.n = ns.n + 1 %}{% endfor %}{{ ns.n }}", "2"),
        ("{% for t in tags %}{% if loop.last %}{% break %}{% endif %}{{ t }}{% else %}none{% endfor %}", "a"),
        ("{% for t in [] %}{% else %}none{% endfor %}", "none"),
        ("{% for k, v in rows[0].items() %}{{ k }}={{ v }}{% endfor %}", "n=1"),
        ("{{ body[:3] }}{{ body[-4:] }}{{ tags[::-1]|first }}", "onefourb"),
        ("{{ 'a,b'.split(',')|length }} {{ 'x'.center(5) }} {{ 'a-b'.replace('-', '+') }}", "2   x   a+b"),
        ("{{ 2 ** 10 }} {{ 7 // 2 }} {{ 7 % 4 }} {{ -3 }} {{ 'ab' * 2 }} {{ [0] * 3 }}", "1024 3 3 -3 abab [0, 0, 0]"),
        ("{% filter upper %}{{ tags[0] }}{% endfilter %}{% set x %}{{ tags[1] }}{% endset %}{{ x }}", "Ab"),
        (
            "{{ nothing or 'default' }}{{ 'x' if nothing is none else 'y' }}{{ nothing|default('d', true) }}",
            "defaultxd",
        ),
        ("{% if missing is defined %}a{% else %}b{% endif %}", "b"),
        ("{% raw %}{{ x }}{% endraw %}{# comment #}", "{{ x }}"),
        (
            "{{ tags|batch(1)|list }} {{ tags|groupby(0)|list|length }} {{ tags|unique|list }}",
            "[['a'], ['b']] 2 ['a', 'b']",
        ),
        ("{{ rows|selectattr('n', 'gt', 1)|list }} {{ tags|reject('eq', 'a')|list }}", "[{'n': 2}] ['b']"),
        ("{{ 1.567|round(1) }} {{ 5|string }} {{ '3'|int + 1 }} {{ dict(a=1) }}", "1.6 5 4 {'a': 1}"),
    ],
)
def test_ordinary_templates_are_not_in_anyones_way(source: str, expected: str | None) -> None:
    values = {"body": "one two three four", "tags": ["a", "b"], "rows": [{"n": 1}, {"n": 2}], "nothing": None}
    if expected is not None:
        assert rendered(source, **values) == expected
        plain = jinja2.Environment(extensions=["jinja2.ext.loopcontrols"])
        if "tojson" not in source:
            assert plain.from_string(source).render(**values) == expected
    else:
        assert isinstance(rendered(source, **values), str | RowError)


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("{{ a.b.c }}", "has no attribute 'b'"),
        ("{{ missing }}", "'missing' is undefined"),
        ("{{ 1 / 0 }}", "ZeroDivisionError"),
        ("{{ 'a' + 1 }}", "TypeError"),
        ("{{ a.append(1) }}", "unsafe|SecurityError"),
        ("{{ ''.__class__ }}", "unsafe|SecurityError"),
        ("{{ [1, 2]|random }}", "another result each time"),
        ("{{ lipsum() }}", "'lipsum' is undefined"),
    ],
)
def test_what_goes_wrong_in_a_template_is_said_in_a_line(source: str, message: str) -> None:
    result = rendered(source, a=[])
    assert isinstance(result, RowError)
    assert result.code == "template_error"
    assert __import__("re").search(message, result.message)


def test_a_null_is_not_printed() -> None:
    for source in ("{{ a }}", "x{{ a }}", "{{ 'x' ~ a }}", "{% for i in [1] %}{{ a }}{% endfor %}"):
        assert rendered(source, a=None) == RowError("not_text", "the template prints a null")


@pytest.mark.parametrize(
    "source",
    ["{{ 1 +", "{% for %}", "{% endfor %}", "{{ x|nosuchfilter }}", "{{ x is nosuchtest }}", "{% include 'a' %}"],
)
def test_a_broken_template_is_the_users_to_mend(source: str) -> None:
    with pytest.raises(UserError, match=r"^prompt\.template, line 2: "):
        rendered("first line\n" + source)


@pytest.mark.parametrize(
    "source", ["{{ " + "(" * 5000 + ")" * 5000 + " }}", "{{ " + "9" * 5000 + " }}", "x" * 1_000_001]
)
def test_a_template_too_large_to_compile_is_the_users_to_mend(source: str) -> None:
    with pytest.raises(UserError, match=r"^prompt\.template"):
        rendered(source)
