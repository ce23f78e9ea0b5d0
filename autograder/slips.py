"""The slips of tensor code: what may stand, wrongly, in the place of a piece of it.

Another operator, reduction, dimension or dtype; a constant off by one; a step, a condition or an
argument left out; results in another order.
"""

from __future__ import annotations

import ast
import copy
import math
from collections.abc import Iterator
from typing import Any


def _table(rows: str, both_ways: bool = False) -> dict[str, list[str]]:
    """``"a b c, d e"`` as {a: [b, c], d: [e]}; both ways also {b: [a], c: [a], e: [d]}."""
    split = [row.split() for row in rows.split(", ")]
    back = {other: [name] for name, *others in split for other in others} if both_ways else {}
    return {name: others for name, *others in split} | back


OPERATORS = _table(
    "Add Sub, Mult Div, LShift RShift, BitAnd BitOr, And Or, Lt LtE, Gt GtE, Eq NotEq, Is IsNot, "
    "In NotIn",
    both_ways=True,
) | _table("FloorDiv Mult, Mod FloorDiv, Pow Mult, BitXor BitAnd")
FUNCTIONS = _table(
    "min max, amin amax, argmin argmax, clamp_min clamp_max, minimum maximum, mean sum, any all, "
    "zeros ones, zeros_like ones_like, log log2, cumsum cumprod",
    both_ways=True,
) | _table(
    "round floor ceil trunc, floor round, ceil floor, trunc round, log10 log2, square abs, "
    "atomic_add store"
)
DTYPES = _table(
    "int8 uint8 int16, uint8 int8, int16 int8, int32 int8, int64 int32, float64 float32, "
    "float32 float16, float16 bfloat16, bfloat16 float16"
)
# Calls that a forgetful hand leaves out: x.abs() -> x, torch.round(x) -> x.
FORGOTTEN = (
    "abs round floor ceil trunc clamp clip clamp_min clamp_max nan_to_num t trans transpose "
    "permute flip square sqrt exp log log2 log10 neg sign detach clone double float half long int "
    "to"
)
MODULES = ("torch", "math", "np", "numpy", "F", "tl")
DEFENSIVE = ("strict", "device")  # keywords that change nothing where all is well


def alternatives(node: ast.AST, trail: list[ast.AST], bound: set[str]) -> Iterator[ast.AST]:
    """What may stand in the place of ``node``: one wrong thing each."""
    if isinstance(node, ast.BinOp | ast.AugAssign | ast.BoolOp):
        yield from (_with(node, op=other) for other in _other_operators(node.op))
    match node:
        case ast.Compare(ops=ops):
            for i, op in enumerate(ops):
                for other in _other_operators(op):
                    yield _with(node, ops=_replaced(ops, i, other))
        case ast.Constant(value=bool(value)):
            yield ast.Constant(not value)
        case ast.Constant(value=int(value) | float(value)) if math.isfinite(value):
            yield from (_number(value + 1), _number(value - 1))
        case ast.Constant(value=str()) if any(isinstance(n, ast.Compare) for n in trail[-3:-1]):
            yield ast.Constant("")
        case ast.UnaryOp():
            yield node.operand
        case ast.BoolOp():
            yield from node.values
        case ast.IfExp():
            yield from (node.body, node.orelse)
        case ast.Attribute(attr="T" | "mT"):
            yield node.value
        case ast.Attribute(value=ast.Name(id="torch" | "tl"), attr=dtype) if dtype in DTYPES:
            yield from (_with(node, attr=other) for other in DTYPES[dtype])
        case ast.Slice():
            for end in ("lower", "upper"):
                if bound_expr := getattr(node, end):
                    yield _with(node, **{end: None})
                    if not isinstance(bound_expr, ast.Constant | ast.UnaryOp):
                        yield _with(node, **{end: ast.BinOp(bound_expr, ast.Add(), _number(1))})
        case ast.comprehension(ifs=ifs):
            yield from (_with(node, ifs=_replaced(ifs, i)) for i in range(len(ifs)))
        case ast.keyword(arg="dim" | "axis"):
            yield from (_with(node, value=_number(dim)) for dim in (-1, 0))
        case ast.Call():
            yield from (new for new in _other_calls(node) if not _is_removal(new, trail))
        case ast.If() | ast.While():
            if not _has_opposite(node.test):
                yield _with(node, test=ast.UnaryOp(ast.Not(), node.test))
            yield _with(node, test=ast.Constant(False))
            if isinstance(node, ast.If) and node.orelse:
                yield _with(node, test=ast.Constant(True))
        case ast.Return(value=ast.Tuple(elts=parts)):
            for i in range(len(parts) - 1):
                swapped = [*parts[:i], parts[i + 1], parts[i], *parts[i + 2 :]]
                yield _with(node, value=ast.Tuple(swapped, ast.Load()))
        case ast.Break():
            yield ast.Continue()
        case ast.Continue():
            yield ast.Break()
        case ast.Expr() | ast.AugAssign() | ast.For():
            yield ast.Pass()
        case ast.Assign(targets=targets):
            names = {n.id for t in targets for n in ast.walk(t) if isinstance(n, ast.Name)}
            if names <= bound:  # the names keep older values; with a new name nothing would run
                yield ast.Pass()


def _other_operators(operator: ast.AST) -> list[ast.AST]:
    return [getattr(ast, other)() for other in OPERATORS.get(type(operator).__name__, [])]


def _other_calls(node: ast.Call) -> Iterator[ast.AST]:
    """Another function, one keyword less, another order of arguments, or no call at all."""
    function, arguments, keywords = node.func, node.args, node.keywords
    name = getattr(function, "attr", getattr(function, "id", ""))
    owner = getattr(function, "value", None)
    if isinstance(owner, ast.Name) and owner.id in MODULES:
        module, owner = owner.id, None
    else:
        module = ""
    for other in FUNCTIONS.get(name, []):
        if isinstance(function, ast.Attribute) and (module, other) != ("math", "round"):
            yield _with(node, func=_with(function, attr=other))
        elif isinstance(function, ast.Name) and other in ("min", "max", "any", "all"):
            yield _with(node, func=_with(function, id=other))
    for i, keyword in enumerate(keywords):
        if keyword.arg in ("min", "max") and len(keywords) == 1 and name in ("clamp", "clip"):
            other = "max" if keyword.arg == "min" else "min"
            yield _with(node, keywords=[_with(keyword, arg=other)])
        elif keyword.arg and keyword.arg not in DEFENSIVE and not _is_flag(keyword.value):
            yield _with(node, keywords=_replaced(keywords, i))
    if name == "where" and len(arguments) == 3:
        condition, yes, no = arguments
        yield from (_with(node, args=[condition, no, yes]), yes, no)
    elif name.startswith("require") and arguments:
        yield arguments[0]
    elif name in FORGOTTEN.split() and owner is not None:
        yield owner
    elif name in FORGOTTEN.split() and arguments and name not in ("int", "float"):
        yield arguments[0]


def _has_opposite(test: ast.expr) -> bool:
    """Tests that another operator turns around: to negate them would say the same twice."""
    opposites = (ast.Eq, ast.NotEq, ast.Is, ast.IsNot, ast.In, ast.NotIn)
    if isinstance(test, ast.Compare):
        return isinstance(test.ops[0], opposites)
    return isinstance(test, ast.Constant | ast.UnaryOp)


def _is_flag(node: ast.expr) -> bool:
    """True and False are flipped; to drop the keyword as well would say the same twice."""
    return isinstance(node, ast.Constant) and isinstance(node.value, bool)


def _with(node: Any, **changes: Any) -> Any:
    """A shallow copy of a node with some fields changed."""
    node = copy.copy(node)
    for name, value in changes.items():
        setattr(node, name, value)
    return node


def _replaced(items: list[Any], index: int, *new: Any) -> list[Any]:
    return [*items[:index], *new, *items[index + 1 :]]


def _number(value: float) -> ast.expr:
    return ast.Constant(value) if value >= 0 else ast.UnaryOp(ast.USub(), ast.Constant(-value))


def _is_removal(new: ast.AST, trail: list[ast.AST]) -> bool:
    """Whether ``x = f(x)`` became ``x = x``, or ``f(x)`` a plain ``x``: nothing is left of it."""
    match trail[0]:
        case ast.Expr():
            return len(trail) == 2 and not isinstance(new, ast.Call)
        case ast.Assign(targets=[target]):
            return len(trail) == 2 and ast.unparse(target) == ast.unparse(new)
    return False
