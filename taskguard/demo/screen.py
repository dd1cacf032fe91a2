"""What is seen while the demo runs: a live screen on a terminal, plain lines elsewhere. Both fit in 80 columns."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from types import TracebackType
from typing import Literal, Protocol

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.padding import Padding
from rich.progress_bar import ProgressBar
from rich.rule import Rule
from rich.table import Table
from rich.text import Text

Mood = Literal["plain", "trouble", "relief"]
LAST_EVENTS = 12
STYLES: Mapping[Mood, str] = {"plain": "default", "trouble": "bold red", "relief": "green"}
MARKS: Mapping[Mood, str] = {"plain": "·", "trouble": "✗", "relief": "✓"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Snapshot:
    """The state of the play at one moment. ``waiting`` counts messages that are somewhere on their way."""

    orders: int
    placed: int
    charged: int
    dead: Mapping[str, int] = field(default_factory=dict)
    waiting: int
    bank_up: bool
    workers: Mapping[str, bool]

    @property
    def dead_count(self) -> int:
        """Orders that are visibly dead."""
        return sum(self.dead.values())

    @property
    def settled(self) -> int:
        """Orders that have an end."""
        return min(self.orders, self.charged + self.dead_count)

    @property
    def progress(self) -> tuple[int, int, int, int]:
        """Equal for as long as nothing moves."""
        return self.placed, self.charged, self.dead_count, self.waiting


class Screen(Protocol):
    """Where the play is shown; a context manager for as long as it lasts."""

    def __enter__(self) -> Screen: ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...

    def say(self, text: str, mood: Mood = "plain") -> None:
        """Something happened."""

    def show(self, snapshot: Snapshot) -> None:
        """This is how things stand."""


def make_screen(console: Console, title: str) -> Screen:
    """The live screen where *console* is a terminal, plain lines where it is not."""
    return LiveScreen(console, title) if console.is_terminal else PlainScreen(console, title)


class PlainScreen:
    """One line for each event, and one every few seconds between."""

    EVERY = 5.0

    def __init__(self, console: Console, title: str) -> None:
        self._console = console
        self._title = title
        self._began = self._shown_at = time.monotonic()

    def __enter__(self) -> PlainScreen:
        self._line(self._title)
        return self

    def __exit__(self, *_: object) -> None:
        """Nothing to put away."""

    def say(self, text: str, mood: Mood = "plain") -> None:
        self._line(f"{_clock(time.monotonic() - self._began)}  {text}")

    def show(self, snapshot: Snapshot) -> None:
        if time.monotonic() - self._shown_at >= self.EVERY:
            self._shown_at = time.monotonic()
            self.say(
                f"placed {snapshot.placed}/{snapshot.orders}, charged {snapshot.charged}, "
                f"dead letters {snapshot.dead_count}, under way {snapshot.waiting}"
            )

    def _line(self, text: str) -> None:
        self._console.print(text, markup=False, highlight=False, soft_wrap=True)


class LiveScreen:
    """Redrawn in place; its last picture stays."""

    def __init__(self, console: Console, title: str) -> None:
        self._title = title
        self._events: list[tuple[float, str, Mood]] = []
        self._snapshot: Snapshot | None = None
        self._began = time.monotonic()
        self._live = Live(console=console, refresh_per_second=8, get_renderable=self._picture)

    def __enter__(self) -> LiveScreen:
        self._live.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._live.stop()

    def say(self, text: str, mood: Mood = "plain") -> None:
        self._events.append((time.monotonic() - self._began, text, mood))

    def show(self, snapshot: Snapshot) -> None:
        self._snapshot = snapshot

    def _picture(self) -> Padding:
        now = time.monotonic() - self._began
        head = Table.grid(expand=True)
        head.add_column(ratio=1)
        head.add_column(justify="right")
        head.add_row(Text(self._title, style="bold"), Text(_clock(now), style="dim"))
        parts: list[RenderableType] = [head, Rule(style="dim")]
        if self._snapshot is not None:
            parts += [self._bars(self._snapshot), Text(), self._lights(self._snapshot), self._counts(self._snapshot)]
            parts += [Rule(style="dim")]
        return Padding(Group(*parts, self._news()), (0, 1), expand=False)

    @staticmethod
    def _bars(it: Snapshot) -> Table:
        bars = Table.grid(padding=(0, 2), expand=True)
        bars.add_column(width=9)
        bars.add_column(ratio=1)
        bars.add_column(justify="right", width=9)
        for name, done, style in (("placed", it.placed, "blue"), ("settled", it.settled, "green")):
            bar = ProgressBar(total=it.orders, completed=done, complete_style=style, finished_style=style)
            bars.add_row(name, bar, f"{done}/{it.orders}")
        return bars

    @staticmethod
    def _lights(it: Snapshot) -> Text:
        text = Text()
        for name, up in {"bank": it.bank_up, **dict(sorted(it.workers.items()))}.items():
            text.append("● " if up else "✗ ", style="green" if up else "bold red")
            text.append(f"{name:<9}" if up else f"{name} down ", style="default" if up else "bold red")
            text.append("   ")
        return text

    @staticmethod
    def _counts(it: Snapshot) -> Group:
        counts = Text()
        for name, value, style in (
            ("charged", it.charged, "green"),
            ("under way", it.waiting, "yellow"),
            ("dead letters", it.dead_count, "magenta"),
        ):
            counts.append(f"{name} ", style="dim")
            counts.append(f"{value:<7}", style=f"bold {style}")
        reasons = Text(", ".join(f"{reason} {count}" for reason, count in it.dead.items()) or " ", style="dim magenta")
        return Group(counts, reasons)

    def _news(self) -> Table:
        news = Table.grid(padding=(0, 2))
        for at, text, mood in self._events[-LAST_EVENTS:]:
            news.add_row(Text(_clock(at), style="dim"), Text(f"{MARKS[mood]} {text}", style=STYLES[mood]))
        return news


def _clock(seconds: float) -> str:
    return f"{int(seconds) // 60}:{int(seconds) % 60:02d}"
