"""What is changed in a template's syntax tree, so that the environment sees what Jinja's sandbox does not intercept.

Each change puts a call of one of the environment's own functions into the tree.
"""

from __future__ import annotations

from typing import Any

from jinja2 import nodes
from jinja2.visitor import NodeTransformer


def instrument(template: nodes.Template) -> None:
    """Make every loop turn and macro call count, with the literal text it may print, and `~` bounded."""
    for loop in template.find_all(nodes.For):
        loop.iter = _call("looked", [loop.iter], loop.lineno)
        if loop.test is not None:
            loop.test = _call("tested", [loop.test], loop.lineno)
    bodies: list[Any] = list(
        template.find_all((nodes.For, nodes.Macro, nodes.CallBlock, nodes.FilterBlock, nodes.Block))
    )
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
        if isinstance(node.arg, nodes.Slice) and not isinstance(node.node, nodes.Literal):
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
