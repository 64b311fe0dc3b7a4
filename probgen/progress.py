"""Live progress on the terminal: one line with what matters, its rate and the time left; silent when piped."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator

Update = Callable[..., None]


def _silent(_done: int, **_values: float) -> None:
    return None


@contextlib.contextmanager
def ticker(title: str, total: int, enabled: bool) -> Iterator[Update]:
    """Yield `update(done, **values)`; values are shown behind the bar, rate and time left.

    >>> with ticker("fit", 10, enabled=False) as update:
    ...     update(1, loss=0.5)
    """
    if not (enabled and sys.stderr.isatty()):
        yield _silent
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (
        TextColumn("{task.description}"),
        BarColumn(bar_width=24),
        MofNCompleteColumn(),
        TextColumn("{task.fields[values]}"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=Console(stderr=True), transient=False) as bar:
        task = bar.add_task(title, total=total, values="")

        def update(done: int, **values: float) -> None:
            speed = bar.tasks[task].speed
            rate = f"{speed:.0f}/s" if speed else ""
            text = "  ".join([*(f"{name} {value:.4g}" for name, value in values.items()), rate])
            bar.update(task, completed=done, values=text)

        yield update
