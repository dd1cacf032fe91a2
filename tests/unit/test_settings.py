"""Settings: one name in three places, read once, refused when they cannot work."""

from __future__ import annotations

import threading
from contextlib import suppress
from dataclasses import fields
from datetime import timedelta

import pytest
from hypothesis import given
from hypothesis import strategies as st

from taskguard.errors import ConfigurationError
from taskguard.settings import Settings

NAMES = [field.name for field in fields(Settings)]
ODD: dict[str, object] = {
    "store": "redis://elsewhere",
    "namespace": "shop",
    "relay": False,
    "early_ack": False,
    "max_crashes": 7,
    "outbox": "postgresql://orders",
    "permits": "redis://permits",
    "session": "shop.db:Session",
}


def other(name: str) -> object:
    """A value of this setting that is not its default."""
    return ODD.get(name, 123.0)


def test_nothing_given_is_the_documented_default() -> None:
    """The defaults of the documentation."""
    settings = Settings.read({}, {}, {})
    assert (settings.store, settings.namespace) == (None, "default")
    assert (settings.lease, settings.max_crashes, settings.retention) == (15.0, 3, 86400.0)
    assert (settings.relay, settings.early_ack) == (True, True)


@pytest.mark.parametrize("name", NAMES)
def test_every_setting_has_one_name_in_three_places(name: str) -> None:
    """`install(app, lease=…)`, `taskguard_lease` and `TASKGUARD_LEASE` say the same."""
    value = other(name)
    assert getattr(Settings.read({name: value}, {}, {}), name) == value
    assert getattr(Settings.read({}, {f"taskguard_{name}": value}, {}), name) == value
    assert getattr(Settings.read({}, {}, {f"TASKGUARD_{name.upper()}": str(value)}), name) == value


def test_settings_can_be_given_again_whatever_is_in_them() -> None:
    """A sessionmaker has locks, which cannot be copied."""
    session = lambda lock=threading.Lock(): lock  # noqa: B008, E731
    settings = Settings(store="sqlite:///shop", session=session, lease=20)
    assert Settings(**settings.arguments()) == settings


def test_an_argument_outranks_the_configuration_which_outranks_the_environment() -> None:
    """The nearest to the code wins; None means not given."""
    conf, environ = {"taskguard_lease": 20}, {"TASKGUARD_LEASE": "30"}
    assert Settings.read({"lease": 10}, conf, environ).lease == 10
    assert Settings.read({"lease": None}, conf, environ).lease == 20
    assert Settings.read({}, {}, environ).lease == 30


def test_false_is_a_value() -> None:
    """`relay=False` is not the same as nothing given."""
    assert Settings.read({"relay": False}, {}, {"TASKGUARD_RELAY": "1"}).relay is False


def test_an_unknown_name_is_refused_with_the_known_ones() -> None:
    """A typing error does not go unnoticed."""
    with pytest.raises(ConfigurationError, match=r"'leese' is not a taskguard setting.*lease"):
        Settings.read({"leese": 10}, {}, {})


def test_what_looks_misspelt_in_the_environment_is_warned_of(caplog: pytest.LogCaptureFixture) -> None:
    """Once, with the name that is meant; what others call by the prefix is left alone."""
    Settings.read({}, {}, {"TASKGUARD_LEESE": "3", "TASKGUARD_STORE_PORT": "tcp://10.0.0.1", "TASKGUARD_LEASE": "4"})
    assert caplog.messages == ["TASKGUARD_LEESE is no setting and has no effect; is TASKGUARD_LEASE meant?"]


def test_settings_of_others_are_left_alone() -> None:
    """Celery's configuration and the environment hold much that is not ours."""
    settings = Settings.read({}, {"task_acks_late": True, "lease": 99}, {"LEASE": "99", "PATH": "/bin"})
    assert settings == Settings()


@pytest.mark.parametrize("given", ["30s", "0.5m", 30, timedelta(seconds=30)])
def test_durations_come_in_every_form(given: object) -> None:
    """Seconds, text or a timedelta; seconds are kept."""
    assert Settings.read({"lease": given}, {}, {}).lease == 30.0


@pytest.mark.parametrize(
    ("text", "value"), [("1", True), ("Yes", True), ("on", True), ("0", False), (" FALSE ", False)]
)
def test_flags_are_read_from_text(text: str, value: bool) -> None:
    """The environment knows only text."""
    assert Settings.read({}, {}, {"TASKGUARD_RELAY": text}).relay is value


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("lease", 0),
        ("lease", -1),
        ("lease", "soon"),
        ("retention", 0),
        ("store_timeout", float("inf")),
        ("patience", True),
        ("max_crashes", 0),
        ("max_crashes", "many"),
        ("max_crashes", 2.7),
        ("max_crashes", float("inf")),
        ("relay", "perhaps"),
        ("early_ack", ""),
        ("namespace", ""),
        ("namespace", "two words"),
        ("namespace", "{tag}"),
        ("namespace", "line\r"),
        ("namespace", 5),
    ],
)
def test_a_setting_that_cannot_work_is_refused_by_name(name: str, value: object) -> None:
    """At start, not in the worker at night."""
    with pytest.raises(ConfigurationError, match=name):
        Settings.read({name: value}, {}, {})


@given(st.sampled_from(NAMES), st.text())
def test_no_text_in_the_environment_brings_another_error_out(name: str, text: str) -> None:
    """A setting, or a ConfigurationError."""
    with suppress(ConfigurationError):
        Settings.read({}, {}, {f"TASKGUARD_{name.upper()}": text})
