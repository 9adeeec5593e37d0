"""Which nodes a job's `cluster.labels` mean: label -> rule on its value, in the words of Ray's label selectors. Pure.

gpu            the label has this value
in(gpu, big)   one of these
!gpu           another value, or the node has no such label
!in(gpu, big)  none of these, or the node has no such label
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping

from pipeline.errors import UserError

_NAME = r"[a-zA-Z0-9](?:[a-zA-Z0-9_.-]{0,61}[a-zA-Z0-9])?"
_LABEL = re.compile(rf"(?:[a-zA-Z0-9.-]{{1,253}}/)?{_NAME}")
_RULE = re.compile(rf"(?P<negated>!?)(?:in\((?P<several>{_NAME}(?:, ?{_NAME})*)\)|(?P<one>{_NAME}))")

NODE_ID = "ray.io/node-id"  # Ray gives every node this label


def complaint(labels: Mapping[str, str]) -> str | None:
    """What is wrong with such rules, for people; None where nothing is."""
    for label, rule in labels.items():
        if not _LABEL.fullmatch(label):
            return f"{label!r} is no label; labels look like pool or example.com/pool"
        if not _RULE.fullmatch(rule):
            return f"{label}: {rule!r} must be a value, !value, in(value, value) or !in(value, value)"
    return None


def plain(rules: Mapping[str, str]) -> dict[str, str]:
    """As Ray reads them: it allows a space after a comma, and then looks for a value that begins with one."""
    return {label: rule.replace(", ", ",") for label, rule in rules.items()}


def matches(rules: Mapping[str, str], labels: Mapping[str, str]) -> bool:
    """Whether a node with these labels is meant.

    >>> matches({"pool": "in(gpu, big)", "zone": "!west"}, {"pool": "big"})
    True
    """
    return all(_fits(rule, labels.get(label)) for label, rule in rules.items())


def _fits(rule: str, value: str | None) -> bool:
    parsed = _RULE.fullmatch(rule)
    assert parsed is not None, rule
    wanted = re.split(", ?", parsed["several"]) if parsed["several"] else [parsed["one"]]
    return (value in wanted) != bool(parsed["negated"])


def without_nodes(rules: Mapping[str, str], nodes: Collection[str]) -> dict[str, str]:
    """The same rules, but none of these nodes, by id. A person's own rule on node ids is left as it is."""
    return {NODE_ID: f"!in({','.join(sorted(nodes))})"} | dict(rules) if nodes else dict(rules)


def refuse_no_match(rules: Mapping[str, str], labels: Iterable[Mapping[str, str]]) -> None:
    """UserError that names the first rule which leaves none of the nodes with these labels, and what they have."""
    left = list(labels)
    for label, rule in rules.items():
        found = [one for one in left if _fits(rule, one.get(label))]
        if not found:
            values = sorted({one[label] for one in left if label in one})
            have = f"their {label} is {', '.join(values[:10])}" if values else f"none has a label {label}"
            raise UserError(
                f"cluster.labels: no node has {label}: {rule} (of {len(left)} looked at, {have}); "
                "give Ray's nodes that label (ray start --labels), or ask for another"
            )
        left = found


def describe(rules: Mapping[str, str]) -> str:
    """For people, after a number of nodes: ' with pool: gpu'."""
    return " with " + ", ".join(f"{label}: {rule}" for label, rule in rules.items()) if rules else ""
