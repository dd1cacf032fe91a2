"""The pytest plugin: there when a test asks for it, and no weight on those that do not."""

from __future__ import annotations

import re
from importlib.metadata import entry_points
from pathlib import Path

import pytest

pytest_plugins = ("pytester",)

README = Path(__file__).parents[2] / "README.md"

SHOP = """
from celery import Celery
from taskguard import ReliableTask, install

app = Celery("shop", broker="redis://192.0.2.1:6379/0", backend="redis://192.0.2.1:6379/0")
install(app, store="redis://192.0.2.1:6379/0")
charges = []

@app.task(base=ReliableTask, idempotency_key="charge:{order}")
def charge(order):
    charges.append(order)
    return f"receipt for {order}"
"""


@pytest.fixture
def shop(pytester: pytest.Pytester) -> pytest.Pytester:
    """A project with a task, whose tests run in a process of their own."""
    pytester.makepyfile(shop=SHOP)
    pytester.syspathinsert()
    return pytester


def run(shop: pytest.Pytester, *options: str, **files: str) -> pytest.RunResult:
    """Run the project's tests, without the plugins that others have installed here."""
    shop.makepyfile(**files)
    others = {"cacheprovider"} | {plugin.name for plugin in entry_points(group="pytest11")} - {"taskguard"}
    without = [option for name in sorted(others) for option in ("-p", f"no:{name}")]
    return shop.runpytest_subprocess(*without, *options)


def test_the_fixture_finds_the_application_whose_tasks_the_test_imports(shop: pytest.Pytester) -> None:
    """Nothing is configured, nothing answers, and it runs."""
    result = run(
        shop,
        test_shop="""
        from shop import charge, charges

        def test_a_charge_is_made_once(reliable):
            first, second = charge.delay("A17"), charge.delay("A17")
            reliable.drain()
            assert first.get() == second.get() == "receipt for A17"
            assert charges == ["A17"]
        """,
    )
    result.assert_outcomes(passed=1)


@pytest.mark.parametrize("how", ["ini", "fixture"])
def test_the_application_can_be_named(shop: pytest.Pytester, how: str) -> None:
    """In pytest's configuration, or with a fixture, where the project has several."""
    if how == "ini":
        shop.makeini("[pytest]\ntaskguard_app = shop:app\n")
    else:
        shop.makeconftest("import pytest, shop\n@pytest.fixture\ndef taskguard_app():\n    return shop.app\n")
    result = run(
        shop,
        test_shop="""
        def test_it(reliable):
            from celery import Celery
            other = Celery("other")
            assert reliable.app.main == "shop"
            reliable.app.send_task("shop.charge", ("A1",))
            assert reliable.drain() == 1
        """,
    )
    result.assert_outcomes(passed=1)


@pytest.mark.parametrize(
    ("ini", "complaint"),
    [
        ("", "has no ReliableTask; import your tasks in the test, or name their application"),
        ("shop:nothing", "taskguard_app: 'shop:nothing' cannot be imported: "),
        ("nowhere:app", "taskguard_app: 'nowhere:app' cannot be imported: No module named 'nowhere'"),
        ("shop:charges", "[] is no Celery application; give the one your tasks are declared on"),
    ],
)
def test_an_application_that_is_not_there_costs_one_line(shop: pytest.Pytester, ini: str, complaint: str) -> None:
    """And no traceback of ours."""
    shop.makeini(f"[pytest]\ntaskguard_app = {ini}\n")
    result = run(shop, test_shop="def test_it(reliable):\n    pass\n")
    result.assert_outcomes(errors=1)
    (line,) = [line for line in result.outlines if complaint in line and not line.startswith("ERROR")]
    assert "Traceback" not in result.stdout.str()
    assert "site-packages" not in line


def test_a_repeated_effect_fails_the_test_at_its_own_line(shop: pytest.Pytester) -> None:
    """The report shows the assertion, not how it was made."""
    result = run(
        shop,
        test_shop="""
        from shop import charge, charges

        def test_a_charge_is_made_once(reliable):
            reliable.assert_idempotent(charge, "A17", effects=charges)
        """,
    )
    result.assert_outcomes(failed=1)
    result.stdout.fnmatch_lines(
        [
            '>*reliable.assert_idempotent(charge, "A17", effects=charges)',
            "E*AssertionError: shop.charge is not idempotent.",
            "E*its process ends in the body, after line 10, `charges.append(order)`; then it is rescued",
            "E*expected effects: *A17*",
            "E*actual effects: *A17*A17*",
            "test_shop.py:4: AssertionError",
        ]
    )


def test_a_session_that_does_not_ask_imports_nothing_of_it(shop: pytest.Pytester) -> None:
    """pytest starts without Celery and without taskguard; and our modules can still be rewritten when they come."""
    result = run(
        shop,
        "-W",
        "error::pytest.PytestAssertRewriteWarning",
        test_nothing="""
        import sys

        def test_it(pytestconfig):
            assert pytestconfig.pluginmanager.has_plugin("taskguard")
            assert not {"celery", "kombu", "taskguard", "taskguard.testing"} & sys.modules.keys()
        """,
    )
    result.assert_outcomes(passed=1)


def test_the_plugin_can_be_left_out(shop: pytest.Pytester) -> None:
    """By its name."""
    result = run(shop, "-p", "no:taskguard", test_shop="def test_it(reliable):\n    pass\n")
    result.assert_outcomes(errors=1)
    result.stdout.fnmatch_lines(["*fixture 'reliable' not found"])


def test_the_readme_s_example_passes_as_it_is_pasted(pytester: pytest.Pytester) -> None:
    """Into a file of its own, run by `pytest`; and the failure it speaks of is the one that pytest shows."""
    section = README.read_text().partition("## Testing your own tasks")[2].partition("\n## ")[0]
    (example,) = re.findall(r"^```python\n(.*?)^```$", section, re.MULTILINE | re.DOTALL)
    (shown,) = re.findall(r"^```text\n(.*?)^```$", section, re.MULTILINE | re.DOTALL)
    count = example.count("def test_")
    run(pytester, test_shop=example).assert_outcomes(passed=count)
    broken = example.replace("call_bank(order_id, amount, self.custody.key)", "call_bank(order_id, amount)")
    assert broken != example
    result = run(pytester, test_shop=broken)
    result.assert_outcomes(passed=count - 1, failed=1)
    report = [line.removeprefix("E").strip() for line in result.outlines if line.startswith("E  ")]
    expected = [line.strip() for line in shown.splitlines() if line.strip()]
    assert [line for line in report if line][: len(expected)] == expected
