"""The mutants of a module: its syntax tree with one small mistake each."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from dataclasses import dataclass

OTHER: dict[type[ast.AST], list[type[ast.AST]]] = {
    ast.Lt: [ast.LtE, ast.GtE],
    ast.LtE: [ast.Lt, ast.Gt],
    ast.Gt: [ast.GtE, ast.LtE],
    ast.GtE: [ast.Gt, ast.Lt],
    ast.Eq: [ast.NotEq],
    ast.NotEq: [ast.Eq],
    ast.Is: [ast.IsNot],
    ast.IsNot: [ast.Is],
    ast.In: [ast.NotIn],
    ast.NotIn: [ast.In],
    ast.Add: [ast.Sub],
    ast.Sub: [ast.Add],
    ast.Mult: [ast.Div],
    ast.Div: [ast.Mult],
    ast.And: [ast.Or],
    ast.Or: [ast.And],
}
FOR_THE_TYPE_CHECKER = {"TypeVar", "ParamSpec", "assert_never"}


Place = tuple[tuple[str, int | None], ...]


@dataclass(frozen=True, slots=True)
class Mutant:
    """``name`` is unique within its module and outlives edits elsewhere in it."""

    line: int
    name: str
    tree: ast.Module
    place: Place
    changed: ast.AST
    within_function: bool

    def plant(self) -> ast.Module:
        """Put the mistake into the tree, which all mutants of a module share: once a process."""
        node: ast.AST = self.tree
        for field, index in self.place[:-1]:
            node = getattr(node, field) if index is None else getattr(node, field)[index]
        field, index = self.place[-1]
        if index is None:
            setattr(node, field, self.changed)
        else:
            getattr(node, field)[index] = self.changed
        return ast.fix_missing_locations(self.tree)


def mutants(source: str) -> Iterator[Mutant]:
    """Every mutant, in the order of the source."""
    tree = ast.parse(source)
    seen: dict[str, int] = {}
    for place, node, within, deep in list(_nodes(tree, (), "", False)):
        for changed in _changes(node):
            name = f"{within}: {_told(node, changed)}"
            seen[name] = seen.get(name, 0) + 1
            if seen[name] > 1:
                name += f" ({seen[name]})"
            at = node.pattern if isinstance(node, ast.match_case) else node
            yield Mutant(getattr(at, "lineno", 0), name, tree, place, changed, deep)


def _nodes(node: ast.AST, place: Place, within: str, deep: bool) -> Iterator[tuple[Place, ast.AST, str, bool]]:
    """What may be mutated, with the way to it: no annotation, decorator, docstring, Protocol or import."""
    for field, value in ast.iter_fields(node):
        if field in ("annotation", "returns", "decorator_list", "type_params", "bases", "keywords_of_class"):
            continue
        for index, child in enumerate(value) if isinstance(value, list) else [(None, value)]:
            if not isinstance(child, ast.AST) or _passed_over(child):
                continue
            step = (*place, (field, index))
            named = isinstance(child, (ast.FunctionDef, ast.ClassDef))
            inner = f"{within}.{child.name}".lstrip(".") if named else within
            if not named:
                yield step, child, within or "module", deep
            if isinstance(child, ast.JoinedStr):
                continue
            yield from _nodes(child, step, inner, deep or isinstance(child, ast.FunctionDef))


def _passed_over(node: ast.AST) -> bool:
    match node:
        case ast.Import() | ast.ImportFrom() | ast.Raise(exc=None):
            return True
        case ast.ClassDef(bases=[ast.Name(id="Protocol")]):
            return True
        case ast.Expr(value=ast.Constant()):
            return True
        case ast.Assign(value=ast.Call(func=ast.Name(id=name))) | ast.Expr(value=ast.Call(func=ast.Name(id=name))):
            return name in FOR_THE_TYPE_CHECKER
        case ast.Assign(value=ast.Subscript(value=ast.Name(id="Literal"))):
            return True
        case ast.match_case(body=[ast.Expr(value=ast.Call(func=ast.Name(id="assert_never")))]):
            return True
    return False


def _changes(node: ast.AST) -> Iterator[ast.AST]:
    match node:
        case ast.Compare(ops=[op]):
            for other in OTHER.get(type(op), ()):
                yield _with(node, ops=[other()])
        case ast.BinOp(op=op):
            for other in OTHER.get(type(op), ()):
                yield _with(node, op=other())
        case ast.BoolOp(op=op, values=values):
            yield _with(node, op=OTHER[type(op)][0]())
            for index in range(len(values)):
                rest = [value for at, value in enumerate(values) if at != index]
                yield rest[0] if len(rest) == 1 else _with(node, values=rest)
        case ast.UnaryOp(op=ast.Not(), operand=operand):
            yield operand
        case ast.Constant(value=bool(value)):
            yield ast.Constant(not value)
        case ast.Constant(value=int(value) | float(value)):
            yield ast.Constant(value + 1)
        case ast.Constant(value=str(value)):
            yield ast.Constant(value + "?")
        case ast.JoinedStr():
            yield ast.Constant("?")
        case ast.If() | ast.IfExp():
            yield _with(node, test=ast.Constant(True))
            yield _with(node, test=ast.Constant(False))
        case ast.match_case(guard=guard):
            yield _with(node, guard=ast.Constant(False))
            if guard is not None:
                yield _with(node, guard=None)
        case ast.Call(func=ast.Name(id="min" | "max"), args=[one, other]):
            yield one
            yield other
        case ast.Call(keywords=keywords):
            for index, keyword in enumerate(keywords):
                if keyword.arg:
                    yield _with(node, keywords=[other for at, other in enumerate(keywords) if at != index])
        case ast.Return(value=ast.Constant(value=None)):
            return
        case ast.Return(value=ast.AST()):
            yield ast.Return(ast.Constant(None))
        case ast.Expr() | ast.Assign() | ast.AugAssign():
            yield ast.Pass()
        case ast.Continue():
            yield ast.Break()


def _with(node: ast.AST, **changed: object) -> ast.AST:
    return type(node)(**{**dict(ast.iter_fields(node)), **changed})


def _told(node: ast.AST, changed: ast.AST) -> str:
    match node, changed:
        case ast.Call(func=called, keywords=before), ast.Call(keywords=after):
            lacking = [keyword.arg for keyword in before if keyword not in after]
            if lacking:
                return f"{_text(called)}(...) without {lacking[0]}"
    return f"{_text(node)} -> {_text(changed)}"


def _text(node: ast.AST) -> str:
    """One line that tells the node."""
    match node:
        case ast.If(test=test):
            return f"if {ast.unparse(test)}"
        case ast.match_case(pattern=pattern, guard=guard):
            return f"case {ast.unparse(pattern)}" + (f" if {ast.unparse(guard)}" if guard else "")
    return " ".join(ast.unparse(node).split())
