"""Mutation testing by hand: ``python -m tests.mutation [WORD ...]``; with words, only mutants whose name has one.

mutmut passes decorated functions over, and nearly all of stores/records.py is decorated; cosmic-ray starts an
interpreter a mutant. Here the tests over process memory are collected once, each mutant is a fork in which the
functions get the mutant's code, and the test that killed last is tried first. A survivor then meets the model of the
contract, which takes seconds. docs/mutants.md explains who survives that; one not named there fails this command.
"""

from __future__ import annotations

import os
import resource
import sys
import time
from collections.abc import Iterable, Iterator
from importlib import import_module
from pathlib import Path
from types import FunctionType, ModuleType

import pytest
from _pytest.runner import runtestprotocol

from tests.mutation.mutants import Mutant, mutants

ROOT = Path(__file__).resolve().parents[2]
MODULES = ("gate", "lifecycle", "stores.records")
CONTRACT = ("claim", "settle", "at_rest", "lease", "dead_letters", "names", "results", "model")
TESTS = [
    *sorted(str(path) for path in (ROOT / "tests" / "unit").glob("test_gate*.py")),
    *sorted(str(path) for path in (ROOT / "tests" / "unit").glob("test_lifecycle*.py")),
    *(str(ROOT / "tests" / "contracts" / f"test_{name}.py") for name in CONTRACT),
]
SLOW = ("test_whatever_happens_one_run_holds", "test_a_store_lives_as_the_model_says")
SECONDS = 20
JOBS = int(os.environ.get("JOBS") or os.cpu_count() or 1)
Found = tuple[str, Mutant]


def functions(module: ModuleType) -> Iterator[FunctionType]:
    """The functions and methods written in the module, beneath their decorators."""
    kinds = [kind for kind in vars(module).values() if isinstance(kind, type) and kind.__module__ == module.__name__]
    for holder in (module, *kinds):
        for value in vars(holder).values():
            value = value.fget if isinstance(value, property) else value
            value = getattr(value, "__wrapped__", value)
            if isinstance(value, FunctionType) and value.__module__ == module.__name__:
                yield value


def become(name: str, mutant: Mutant) -> None:
    """Give the live functions of the module the mutant's code and defaults."""
    module = import_module(f"taskguard.{name}")
    twin = ModuleType(module.__name__)
    sys.modules["twin"] = twin
    exec(compile(mutant.plant(), "mutant", "exec"), twin.__dict__)
    mutated = {function.__qualname__: function for function in functions(twin)}
    for function in functions(module):
        other = mutated[function.__qualname__]
        function.__code__, function.__defaults__ = other.__code__, other.__defaults__
        function.__kwdefaults__ = other.__kwdefaults__


class Trial:
    """Runs the collected tests once for each mutant."""

    def __init__(self, words: list[str]) -> None:
        self.words = words
        self.items: list[pytest.Item] = []
        self.strangers: list[Mutant] = []

    def pytest_runtestloop(self, session: pytest.Session) -> bool:
        self.items = session.items
        quick = [at for at, item in enumerate(self.items) if not item.name.startswith(SLOW)]
        slow = [at for at in range(len(self.items)) if at not in quick]
        began = time.monotonic()
        found = [
            (module, mutant)
            for module in MODULES
            for mutant in mutants((ROOT / "taskguard" / f"{module.replace('.', '/')}.py").read_text())
            if mutant.within_function and (not self.words or any(word in mutant.name for word in self.words))
        ]
        assert self._survivors([("gate", None)], [*quick, *slow]), "a test fails without a mutant"
        print(f"\n{len(quick)} quick tests leave")
        alive = self._survivors(found, quick)
        print(f"{len(slow)} slow tests leave")
        alive = self._survivors(alive, slow)
        explained = (ROOT / "docs" / "mutants.md").read_text()
        self.strangers = [mutant for _, mutant in alive if f"`{mutant.name}`" not in explained]
        print(f"\n{'module':30} mutants  killed  explained  unexplained")
        for module in MODULES:
            mine, left = (sum(name == module for name, _ in group) for group in (found, alive))
            odd = sum(mutant in self.strangers for name, mutant in alive if name == module)
            path = f"taskguard/{module.replace('.', '/')}.py"
            print(f"{path:30} {mine:7}  {mine - left:6}  {left - odd:9}  {odd:11}")
        print(f"{time.monotonic() - began:.0f} s")
        return True

    def _survivors(self, found: Iterable[tuple[str, Mutant | None]], order: list[int]) -> list[Found]:
        running: dict[int, tuple[str, Mutant | None]] = {}
        alive = []

        def one_ended() -> None:
            child, status = os.wait()
            module, mutant = running.pop(child)
            code = os.waitstatus_to_exitcode(status)
            if code > 0 and code - 1 in order:
                order.remove(code - 1)
                order.insert(0, code - 1)
            if code == 0:
                alive.append((module, mutant))
                if mutant:
                    print(f"  taskguard/{module.replace('.', '/')}.py:{mutant.line}  {mutant.name}", flush=True)

        for module, mutant in found:
            if len(running) == JOBS:
                one_ended()
            running[self._fork(module, mutant, order)] = module, mutant
        while running:
            one_ended()
        return alive

    def _fork(self, module: str, mutant: Mutant | None, order: list[int]) -> int:
        """A process that exits 0 when all tests passed, else with the number of the test that failed, from 1 to 250."""
        child = os.fork()
        if child:
            return child
        code = 251
        try:
            resource.setrlimit(resource.RLIMIT_CPU, (SECONDS, SECONDS))
            resource.setrlimit(resource.RLIMIT_AS, (4 << 30, 4 << 30))
            if mutant:
                become(module, mutant)
            code = next((min(at + 1, 250) for at in order if self._fails(self.items[at])), 0)
        finally:
            os._exit(code)

    def _fails(self, item: pytest.Item) -> bool:
        return any(report.failed for report in runtestprotocol(item, log=False, nextitem=None))


if __name__ == "__main__":
    trial = Trial(sys.argv[1:])
    options = ["-q", "-s", "-p", "no:cacheprovider", "-p", "no:logging", "-k", "memory or lifecycle or gate"]
    sys.exit(pytest.main([*options, *TESTS], plugins=[trial]) not in (0, 5) or bool(trial.strangers))
