"""What a user installs and what an operator starts: the wheel, the metadata, the compose file."""

from __future__ import annotations

import shutil
import subprocess
import zipfile
from importlib.metadata import entry_points, requires
from pathlib import Path

import pytest
import yaml
from hatchling.builders.wheel import WheelBuilder

ROOT = Path(__file__).parents[2]


COMPOSE = ROOT / "docker-compose.yml"
SERVERS = ("redis", "rabbitmq", "postgres")
OURS = ("worker-1", "worker-2", "relay")


def test_the_wheel_holds_every_module_script_and_type_marker(tmp_path: Path) -> None:
    """Lua scripts and ``py.typed`` are package data: what is in the tree is in the wheel. The demo's tasks are inside
    taskguard there: a package `workers` beside it could be in the way of the user's own."""
    (wheel,) = WheelBuilder(str(ROOT)).build(directory=str(tmp_path), versions=["standard"])
    packed = set(zipfile.ZipFile(wheel).namelist())
    homes = {
        "taskguard": "taskguard",
        "pytest_taskguard": "pytest_taskguard",
        "workers": "taskguard/demo/programs/workers",
    }
    tree = {
        f"{home}/{path.relative_to(ROOT / package).as_posix()}"
        for package, home in homes.items()
        for path in (ROOT / package).rglob("*")
        if path.suffix in {".py", ".lua"} or path.name == "py.typed"
    }
    assert "taskguard/py.typed" in tree
    assert any(name.endswith(".lua") for name in tree)
    assert tree <= packed
    installed = {name.partition("/")[0] for name in packed}
    assert {name for name in installed if not name.endswith(".dist-info")} == {"taskguard", "pytest_taskguard"}


def test_only_celery_is_installed_without_an_extra() -> None:
    """Everything but Celery and what it brings is an extra."""
    unconditional = [line for line in requires("taskguard") or [] if "extra ==" not in line]
    assert [line.split(">")[0] for line in unconditional] == ["celery"]


@pytest.mark.parametrize("group", ["console_scripts", "celery.commands"])
def test_the_entry_points_resolve(group: str) -> None:
    """``taskguard`` and ``celery -A app taskguard`` find their command."""
    (entry,) = entry_points(group=group, name="taskguard")
    assert callable(entry.load())


def test_pytest_finds_the_plugin() -> None:
    """It is the module itself that pytest registers."""
    (entry,) = entry_points(group="pytest11", name="taskguard")
    assert callable(entry.load().reliable)


def test_every_compose_service_is_checked_and_waits_for_healthy_servers() -> None:
    """No worker starts before its broker, store and result backend answer, and `docker compose ps` tells the truth."""
    compose = yaml.safe_load(COMPOSE.read_text())
    services = compose["services"]
    assert set(services) == {*SERVERS, *OURS}
    for name, service in services.items():
        assert "image" in service or "build" in service, name
        assert service["healthcheck"]["test"][0] in {"CMD", "CMD-SHELL"}, name
        assert {volume.split(":")[0] for volume in service.get("volumes", ())} <= set(compose["volumes"]), name
    for name in OURS:
        assert services[name]["depends_on"] == {server: {"condition": "service_healthy"} for server in SERVERS}, name
    if has_compose():
        command = ("docker", "compose", "--file", str(COMPOSE), "config", "--quiet")
        checked = subprocess.run(command, capture_output=True, text=True, check=False)
        assert checked.returncode == 0, checked.stderr


def has_compose() -> bool:
    """Whether docker and its compose plugin are here to be asked."""
    docker = shutil.which("docker")
    return docker is not None and not subprocess.run([docker, "compose", "version"], capture_output=True).returncode
