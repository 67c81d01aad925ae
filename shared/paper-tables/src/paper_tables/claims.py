"""Claims of a paper as expressions over measured cells. The README documents the language; nothing else is run."""

from __future__ import annotations

import ast
import itertools
import math
import operator
import string
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import reduce
from typing import TYPE_CHECKING, Any

from .errors import TableError, nearest
from .quantity import Quantity, apply, combine

if TYPE_CHECKING:
    from .table import Claim, Table

Lookup = Callable[[str, str], Quantity | None]
HELD, NOT_HELD, NOT_MEASURED = "held", "not held", "not measured"

_OPERATORS: dict[type[ast.operator], Callable[[Any, Any], Any]] = {
    ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul, ast.Div: operator.truediv, ast.Pow: math.pow,
}  # fmt: skip
_COMPARISONS: dict[type[ast.cmpop], tuple[Callable[[float, float], bool], str]] = {
    ast.Lt: (operator.lt, "<"), ast.LtE: (operator.le, "<="), ast.Gt: (operator.gt, ">"),
    ast.GtE: (operator.ge, ">="), ast.Eq: (operator.eq, "=="), ast.NotEq: (operator.ne, "!="),
}  # fmt: skip
_ONE: dict[str, Callable[[float], float]] = {"abs": abs, "sqrt": math.sqrt, "log": math.log, "exp": math.exp}
_MANY = ("min", "max", "mean", "sum", "increasing", "decreasing")
FUNCTIONS = ("se", *_ONE, *_MANY)


@dataclass(frozen=True)
class Verdict:
    """What became of a claim at one scale: `held`, `not held` or `not measured`, and why, in numbers."""

    status: str
    detail: str = ""


class _Missing(Exception):
    """A cell that the expression needs was not measured."""


class _NoRow(_Missing):
    """A pattern that no row meets."""


class _Undefined(_Missing):
    """The figures are there, but not what is computed from them (a division by zero, the logarithm of 0)."""


class _Evaluator:
    """One claim, one choice of its `for` values, one scale."""

    def __init__(self, table: Table, lookup: Lookup, rows: Sequence[str], names: Mapping[str, Any]) -> None:
        self.table, self.lookup, self.rows, self.names = table, lookup, rows, names
        self.shown: list[str] = []

    def truth(self, node: ast.expr) -> bool:
        """Is it true? Raises `_Missing` where that cannot be said, `TableError` for what is not in the language."""
        if isinstance(node, ast.BoolOp):
            return self._both(node) if isinstance(node.op, ast.And) else not self._both(_negated(node))
        if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.Not):
            return not self.truth(node.operand)
        if isinstance(node, ast.Compare):
            return self._computed(self._compare, node) if len(node.ops) == 1 else self._both(_chain(node))
        if isinstance(node, ast.Call) and _called(node.func) in ("increasing", "decreasing"):
            return self._computed(self._ordered, node)
        raise TableError(f"`{ast.unparse(node)}` is neither true nor false; compare it with something")

    def _both(self, node: ast.BoolOp) -> bool:
        missing: _Missing | None = None
        for part in node.values:
            try:
                if not self.truth(part):
                    return False
            except _Missing as error:
                missing = missing or error
        if missing is not None:
            raise missing
        return True

    def _computed(self, read: Callable[[Any], bool], node: ast.expr) -> bool:
        try:
            return read(node)
        except (ArithmeticError, ValueError) as error:
            if isinstance(error, TableError):
                raise
            raise _Undefined(f"cannot be computed ({error})") from None

    def _compare(self, node: ast.Compare) -> bool:
        if type(node.ops[0]) not in _COMPARISONS:
            raise TableError(f"`{ast.unparse(node)}`: compare by {' '.join(sign for _, sign in _COMPARISONS.values())}")
        compare, sign = _COMPARISONS[type(node.ops[0])]
        left, right = self.figure(node.left).value, self.figure(node.comparators[0]).value
        self.shown.append(f"{left:.4g} {sign} {right:.4g}")
        return compare(left, right)

    def _ordered(self, node: ast.Call) -> bool:
        name, values = _called(node.func), self._list(node)
        if len(values) < 2:
            raise _Missing(f"{name}() needs two figures or more")
        self.shown.append((" < " if name == "increasing" else " > ").join(f"{v.value:.4g}" for v in values))
        above = operator.lt if name == "increasing" else operator.gt
        return all(above(a.value, b.value) for a, b in itertools.pairwise(values))

    def figure(self, node: ast.expr) -> Quantity:
        found = self.value(node)
        if isinstance(found, list):
            raise TableError(f"`{ast.unparse(node)}` is a list; put it into {', '.join(_MANY)}")
        return found

    def value(self, node: ast.expr) -> Quantity | list[Quantity]:
        match node:
            case ast.Constant(value=bool()):
                raise TableError(f"`{ast.unparse(node)}`: numbers only")
            case ast.Constant(value=int() | float() as number):
                return Quantity(float(number))
            case ast.Name(id=name):
                return Quantity(float(self._name(name)))
            case ast.UnaryOp(op=ast.USub(), operand=inner):
                return apply(operator.neg, self.figure(inner))
            case ast.BinOp(left=left, op=op, right=right) if type(op) in _OPERATORS:
                return combine(_OPERATORS[type(op)], self.figure(left), self.figure(right))
            case ast.Subscript(value=ast.Name(id=column), slice=ast.Constant(value=str() as row)):
                return self._cells(column, row)
            case ast.Call(func=ast.Name(id=function)):
                return self._call(function, node)
        raise TableError(f"`{ast.unparse(node)}` is not part of the language of claims")

    def _name(self, name: str) -> Any:
        value = self.names.get(name)
        if isinstance(value, (int, float)) and not isinstance(value, bool):
            return value
        if name in self.table.columns:
            raise TableError(f'`{name}` is a column; a cell is {name}["row"]')
        numbers = [k for k, v in self.names.items() if isinstance(v, (int, float)) and not isinstance(v, bool)]
        raise TableError(f"unknown name {name!r}{nearest(name, [*numbers, *self.table.columns, *FUNCTIONS])}")

    def _cells(self, column: str, row: str) -> Quantity | list[Quantity]:
        if column not in self.table.columns:
            raise TableError(f"no column {column!r}{nearest(column, self.table.columns)}")
        try:
            wanted = row.format(**self.names)
        except (LookupError, ValueError, AttributeError, TypeError) as error:
            fields = [f for _, f, _, _ in string.Formatter().parse(row) if f] if "{" in row else []
            unknown = next((f for f in fields if f not in self.names), row)
            raise TableError(f"{row!r} names {unknown!r}{nearest(unknown, self.names)}") from error
        if not any(c in wanted for c in "*?"):
            return self._cell(column, wanted)
        found = [r for r in self.rows if fnmatchcase(r, wanted)]
        if not found:
            raise _NoRow(f"no row {wanted!r} at this scale")
        return [self._cell(column, r) for r in found]

    def _cell(self, column: str, row: str) -> Quantity:
        found = self.lookup(row, column)
        if found is None:
            raise _Missing(f'no {column}["{row}"]')
        return found

    def _list(self, node: ast.Call) -> list[Quantity]:
        values: list[Quantity] = []
        for argument in node.args:
            found = self.value(argument)
            values.extend(found if isinstance(found, list) else [found])
        if not values or node.keywords:
            raise TableError(f"`{ast.unparse(node)}`: figures or a list of them are expected")
        return values

    def _call(self, function: str, node: ast.Call) -> Quantity:
        if function not in FUNCTIONS:
            raise TableError(f"unknown function {function!r}{nearest(function, FUNCTIONS)}")
        values = self._list(node)
        if function in ("min", "max"):
            return (min if function == "min" else max)(values, key=lambda q: q.value)
        if function in ("sum", "mean"):
            total = reduce(lambda a, b: combine(operator.add, a, b), values)
            return total if function == "sum" else combine(operator.truediv, total, Quantity(float(len(values))))
        if function in _MANY:
            raise TableError(f"`{ast.unparse(node)}` is true or false, not a figure")
        if len(values) != 1:
            raise TableError(f"{function}() takes one figure, found {len(values)}")
        return Quantity(values[0].se) if function == "se" else apply(_ONE[function], values[0])


def _called(node: ast.expr) -> str:
    return node.id if isinstance(node, ast.Name) else ""


def _chain(node: ast.Compare) -> ast.BoolOp:
    """`a < b < c` as `a < b and b < c`."""
    pairs = zip(itertools.pairwise((node.left, *node.comparators)), node.ops, strict=True)
    return ast.BoolOp(ast.And(), [ast.Compare(a, [symbol], [b]) for (a, b), symbol in pairs])


def _negated(node: ast.BoolOp) -> ast.BoolOp:
    return ast.BoolOp(ast.And(), [ast.UnaryOp(ast.Not(), part) for part in node.values])


def _bindings(table: Table, claim: Claim, scale: str) -> Iterator[dict[str, Any]] | None:
    """The choices of the claim's `for` values at `scale`; None where the scale has no such list."""
    vary = table.scales[scale].vary
    axes = {}
    for name, values in claim.vary.items():
        if isinstance(values, str) and values.startswith("$"):
            if values[1:] not in vary:
                return None
            values = vary[values[1:]]
        axes[name] = values if isinstance(values, list) else [values]
    return (dict(zip(axes, point, strict=True)) for point in itertools.product(*axes.values()))


def _parse(claim: Claim) -> ast.expr:
    try:
        return ast.parse(claim.holds.strip(), mode="eval").body
    except (SyntaxError, ValueError) as error:
        raise TableError(f"not an expression ({getattr(error, 'msg', error)}): {claim.holds}") from None


def judge(table: Table, claim: Claim, scale: str, lookup: Lookup) -> Verdict:
    """Does `claim` hold at `scale`? `lookup(row, column)` gives a cell, or None where it was not measured."""
    expression, choices = _parse(claim), _bindings(table, claim, scale)
    if choices is None:
        return Verdict(NOT_MEASURED, "not asked at this scale")
    rows = [row.id for row in table.rows(scale)]
    held: list[str] = []
    broken: list[str] = []
    missing: list[str] = []
    for choice in choices:
        label = ", ".join(f"{k}={v}" for k, v in choice.items() if v != "")
        evaluator = _Evaluator(table, lookup, rows, {**table.scales[scale].settings, **choice})
        try:
            target = held if evaluator.truth(expression) else broken
            shown = "; ".join(evaluator.shown)
        except _Missing as error:
            target, shown = missing, str(error)
        except TableError as error:
            raise TableError(f"{table.path}:{claim.line}: claim {claim.id}: {error}") from None
        target.append(f"{label}: {shown}" if label else shown)
    if broken:
        return Verdict(NOT_HELD, _listed(broken) + (f" (held: {_listed(held)})" if held else ""))
    if missing or not held:
        return Verdict(NOT_MEASURED, _listed(missing))
    return Verdict(HELD, _listed(held))


def _listed(parts: list[str], most: int = 6) -> str:
    return "; ".join(parts[:most]) + (f"; and {len(parts) - most} more" if len(parts) > most else "")


def check_claim(table: Table, claim: Claim) -> None:
    """Refuse, when a table is read, what could never be evaluated. Raises `TableError` with file and line."""
    known = table.all_rows()

    def lookup(row: str, column: str) -> Quantity:
        if row not in known:
            raise TableError(f"no row {row!r} at any scale{nearest(row, known)}")
        return Quantity(1.0)

    try:
        expression, asked = _parse(claim), False
        for scale in table.scales.values():
            for choice in _bindings(table, claim, scale.name) or ():
                asked = True
                _check(_Evaluator(table, lookup, list(known), {**scale.settings, **choice}), expression)
        if not asked:
            wanted = next(v for v in claim.vary.values() if isinstance(v, str) and v.startswith("$"))
            lists = {name for scale in table.scales.values() for name in scale.vary}
            raise TableError(f"no scale has a list {wanted!r}{nearest(wanted[1:], lists)}")
    except TableError as error:
        raise TableError(f"{table.path}:{claim.line}: claim {claim.id}: {error}") from None


def _check(evaluator: _Evaluator, node: ast.expr) -> None:
    """Evaluate every operand, also those behind an `or` that is decided earlier."""
    if isinstance(node, ast.BoolOp):
        for part in node.values:
            _check(evaluator, part)
    elif isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.Not):
        _check(evaluator, node.operand)
    elif isinstance(node, ast.Compare) and len(node.ops) > 1:
        _check(evaluator, _chain(node))
    else:
        try:
            evaluator.truth(node)
        except _NoRow as error:
            raise TableError(str(error).replace("this scale", "any scale")) from None
        except _Undefined:  # owing to the stand-in figures, not to the claim: look at each part alone
            _check_parts(evaluator, node)
        except _Missing:
            return


def _check_parts(evaluator: _Evaluator, node: ast.expr) -> None:
    parts = node.args if isinstance(node, ast.Call) else ast.iter_child_nodes(node)
    for part in parts:
        if not isinstance(part, ast.expr):
            continue
        try:
            evaluator.value(part)
        except (ArithmeticError, ValueError) as error:
            if isinstance(error, TableError):
                raise
            _check_parts(evaluator, part)
