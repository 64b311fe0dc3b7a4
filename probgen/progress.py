"""Live progress on the terminal: a row for each stage, what matters in it and the time left; silent when piped."""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

Update = Callable[..., None]

_BAR_WIDTH = 16
_SHOWS_A_SECOND = 8


def silent(_done: int, **_values: float) -> None:
    """The update that shows nothing; who would have to work out what to show can look for it."""


@contextlib.contextmanager
def ticker(
    title: str, total: int | Mapping[str, int], enabled: bool, rates: Collection[str] = ()
) -> Iterator[Update]:
    """Yield `update(done, **values)`, which shows how far it is, the values given, and the time left.

    Args:
        title: what is running.
        total: how many steps in all; or those of each stage by name, in order: each has a row and values of its own,
            and `done` counts the steps of all of them.
        enabled: False shows nothing; nor is anything shown where stderr is no terminal.
        rates: names of values that are running counts, and shown per second.

    >>> with ticker("fit", 10, enabled=False) as update:
    ...     update(1, loss=0.5)
    """
    if not (enabled and sys.stderr.isatty()):
        yield silent
        return
    from rich.console import Console

    with live(Board(title, total, rates), Console(stderr=True)) as update:
        yield update


@contextlib.contextmanager
def live(board: Board, console: Console) -> Iterator[Update]:
    """Show the board on a console while it is updated, and leave it there."""
    from rich.live import Live

    with Live(console=console, get_renderable=board.table, refresh_per_second=_SHOWS_A_SECOND):
        yield board.update


@dataclass
class Stage:
    """One row: how far it is, and the last values shown; clock and counts run from its first update."""

    name: str
    total: int
    done: int = 0
    values: dict[str, float] = field(default_factory=dict)
    now: float = 0.0
    first: tuple[float, int, dict[str, float]] | None = None

    def update(self, done: int, values: dict[str, float], now: float) -> None:
        """Take in how far it is at a time in seconds."""
        if self.first is None:
            self.first = now, done, values
        self.done, self.values, self.now = done, values, now

    def per_second(self, name: str) -> float | None:
        """How fast a count grows; None where it is too early to say."""
        if self.first is None or self.now <= self.first[0]:
            return None
        return (self.values[name] - self.first[2].get(name, 0.0)) / (self.now - self.first[0])

    def seconds_left(self) -> float | None:
        """At the pace so far; None where it is too early to say."""
        if self.first is None or self.done <= self.first[1]:
            return None
        return (self.total - self.done) * (self.now - self.first[0]) / (self.done - self.first[1])


class Board:
    """A table of stages that says what they are doing.

    Args:
        title, total, rates: as for `ticker`.
        clock: seconds, growing.
    """

    def __init__(
        self,
        title: str,
        total: int | Mapping[str, int],
        rates: Collection[str] = (),
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        stages = total if isinstance(total, Mapping) else {title: total}
        self.title = title if isinstance(total, Mapping) else ""
        self.stages = [Stage(name, count) for name, count in stages.items() if count or len(stages) == 1]
        self.rates, self.clock = rates, clock

    def update(self, done: int, **values: float) -> None:
        """How many steps of all stages are done, and what there is to say of the stage that is running."""
        before = 0
        for stage in self.stages:
            if done <= before + stage.total or stage is self.stages[-1]:
                stage.update(done - before, values, self.clock())
                return
            stage.done = stage.total
            before += stage.total

    def table(self) -> Table:
        """What is shown."""
        from rich.progress_bar import ProgressBar
        from rich.table import Table

        names = list(dict.fromkeys(name for stage in self.stages for name in stage.values))
        table = Table(box=None, padding=(0, 2, 0, 0), header_style="dim")
        table.add_column(self.title, no_wrap=True)
        table.add_column(max_width=_BAR_WIDTH)  # the one that gives way where there is little room
        table.add_column("done", justify="right", no_wrap=True)
        for name in names:
            shown = name.replace("_", " ")
            table.add_column(f"{shown}/s" if name in self.rates else shown, justify="right", no_wrap=True)
        table.add_column("time left", justify="right", no_wrap=True)
        waiting = next((stage for stage in self.stages if stage.done < stage.total), None)
        for stage in self.stages:
            bar = ProgressBar(total=stage.total or None, completed=stage.done)
            cells = [self._cell(stage, name) for name in names]
            table.add_row(stage.name, bar, _share(stage), *cells, _time_left(stage, stage is waiting))
        return table

    def _cell(self, stage: Stage, name: str) -> str:
        if name not in stage.values:
            return ""
        if name not in self.rates:
            return _number(stage.values[name])
        rate = stage.per_second(name)
        return "" if rate is None else _short(rate)


def _share(stage: Stage) -> str:
    return f"{stage.done:,}/{stage.total:,}" if stage.total else f"{stage.done:,}"


def _time_left(stage: Stage, running: bool) -> str:
    left = stage.seconds_left()
    if stage.done >= stage.total > 0:
        return "0:00"
    if left is None:
        return "preparing" if running and stage.first is None else ""
    minutes, seconds = divmod(round(left), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"


def _number(value: float) -> str:
    return f"{value:,}" if isinstance(value, int) else f"{value:.3g}"


def _short(value: float) -> str:
    """Three digits and a unit.

    >>> _short(1234567.0), _short(85.2)
    ('1.23M', '85.2')
    """
    for unit in ("", "k", "M", "G"):
        if abs(value) < 999.5:
            return f"{value:.3g}{unit}"
        value /= 1000
    return f"{value:,.0f}T"
