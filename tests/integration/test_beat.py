"""Real beats: two at once, one killed and started again; each tick of the schedule is one run."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack
from datetime import datetime
from pathlib import Path

import pytest

from tests.integration.beatapp import make_app
from tests.integration.conftest import open_site, pairs
from tests.integration.site import ROOT, Site

TICKS = 6


class BeatSite(Site):
    """A site with beats."""

    program = "tests.integration.beatapp"
    _make_app = staticmethod(make_app)

    def __init__(self, **options: object) -> None:
        super().__init__(**options)  # type: ignore[arg-type]
        self.beats: list[subprocess.Popen[bytes]] = []

    def start_beat(self, file: str) -> subprocess.Popen[bytes]:
        """Start a beat that keeps its schedule in *file*."""
        command = [sys.executable, "-m", "celery", "-A", self.program, "beat", "--pidfile=", "--loglevel", "INFO"]
        command += ["-S", "taskguard.celery.beat:ReliableScheduler", "-s", str(self._directory / file)]
        log = self._directory / f"beat{len(self.beats)}.log"
        with log.open("wb") as sink:
            beat = subprocess.Popen(
                command, cwd=ROOT, env=self.environ(), stdout=sink, stderr=sink, stdin=subprocess.DEVNULL,
                start_new_session=True,
            )  # fmt: skip
        self.beats.append(beat)
        return beat

    def close(self) -> None:
        """End the beats too."""
        for beat in self.beats:
            beat.kill()
            beat.wait()
        super().close()

    def ticks(self) -> list[float]:
        """The moments of the ticks that ran, as often as they ran."""
        keys = [entry.detail for entry in self.journal.entries("ticked")]
        assert all(key.startswith("second@") for key in keys)
        return sorted(datetime.fromisoformat(key.partition("@")[2]).timestamp() for key in keys)

    def told(self, beat: int) -> int:  # type: ignore[override]
        """How many ticks this beat has come to."""
        log = (self._directory / f"beat{beat}.log").read_text(errors="replace")
        return log.count("Sending due task second")


@pytest.fixture(params=pairs(("redis", "redis"), ("rabbitmq", "postgresql")))
def site(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[BeatSite]:
    """A broker and a store, with one worker."""
    with ExitStack() as stack:
        site = open_site(stack, *request.param, tmp_path, BeatSite)
        assert isinstance(site, BeatSite)
        site.start_worker()
        yield site


def test_two_beats_send_each_tick_once(site: BeatSite) -> None:
    """Both come to the same ones. A beat on a busy machine may pass a second over, as Celery's does."""
    site.start_beat("one")
    site.start_beat("two")
    site.wait(lambda: min(site.told(0), site.told(1)) >= TICKS, "both beats at work")
    for beat in site.beats:
        beat.terminate()
        beat.wait(timeout=60)
    site.wait_settled()
    ticks = site.ticks()
    assert ticks == sorted(set(ticks)), "no second twice"
    assert len(ticks) >= TICKS
    assert site.told(0) + site.told(1) > len(ticks), "they met"
    assert 1 <= len(site.journal.entries("plain")) <= len(ticks) // 3 + 1, "a task without custody is sent once, too"


def test_a_beat_that_is_killed_and_started_again_repeats_no_tick(site: BeatSite) -> None:
    """Its file says that the last ones were not sent; the store knows better. One that it missed is made up for."""
    site.start_beat("one")
    site.wait(lambda: site.told(0) >= TICKS // 2, "ticks")
    os.killpg(site.beats[0].pid, signal.SIGKILL)
    site.beats[0].wait()
    killed = time.time()
    site.start_beat("one")
    site.wait(lambda: site.told(1) >= TICKS // 2, "ticks of the second")
    site.wait_settled()
    ticks = site.ticks()
    assert ticks == sorted(set(ticks))
    assert any(tick > killed for tick in ticks)
