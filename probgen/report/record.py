"""What a report says on the way and leaves at the end: one table, advice, files."""

from __future__ import annotations

import json
import textwrap
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

from probgen.core import Cost, describe
from probgen.diagnostics.plots import plot_history
from probgen.fitting import History
from probgen.report.folder import Folder
from probgen.report.tables import print_table

COLUMNS = ("program", "engine", "network calls", "seconds", "quality", "diagnosis")
FIGURES = "figures.json"


class Record:
    """Collects the table's rows, the advice and the same in numbers, while files go into a folder.

    Args:
        folder: where files go.
        settings: what was asked for, kept with the figures.
    """

    def __init__(self, folder: Folder, settings: dict[str, Any]) -> None:
        self.folder, self.figures = folder, {"settings": settings}
        self.rows: list[list[str]] = []
        self.advice: list[str] = []

    def say(self, text: str) -> None:
        """Print at once."""
        print(text, flush=True)

    def advise(self, sentence: str) -> None:
        """Keep a sentence for the end."""
        self.advice.append(sentence)

    def note(self, **figures: Any) -> None:
        """Keep figures that have no row."""
        self.figures |= figures

    def file(self, name: str) -> AbstractContextManager[Path]:
        """A path to write to, as `Folder.file`."""
        return self.folder.file(name)

    def history(self, program: Any, history: History) -> None:
        """Say how a fit went and draw it."""
        self.say(f"     {history}")
        curves: dict[str, Any] = {"training": history.loss, "held out": history.validation}
        with self.file(f"history_{describe(program).lower()}.png") as path:
            plot_history(curves, path, title=f"{describe(program)}: the ELBO's negative")

    def row(self, program: Any, method: Any, cost: Cost, quality: str, diagnosis: str, figure: float) -> None:
        """One line of the table; `figure` is its quality as a number."""
        calls = cost.network_calls + cost.gradients + cost.warmup_gradients
        seconds = cost.seconds + cost.warmup_seconds
        names = [describe(program), describe(method)]
        self.rows.append([*names, f"{calls:,}" if calls else "-", f"{seconds:.1f}", quality, diagnosis])
        self.figures["/".join(names)] = {"calls": calls, "seconds": seconds, "figure": float(figure)}

    def finish(self, seconds: float) -> None:
        """Print the table and the advice, write the figures."""
        self.note(seconds=seconds)
        with self.file(FIGURES) as path:
            path.write_text(json.dumps(self.figures, indent=2) + "\n", encoding="utf-8")
        self.say("")
        print_table("What it cost and what it is worth", COLUMNS, self.rows)
        self.say("")
        for sentence in self.advice:
            self.say(textwrap.fill(sentence, 100, initial_indent="- ", subsequent_indent="  "))
        self.say(f"\n{seconds:.0f} s. Pictures, traces and ArviZ files are in {self.folder.path}/.")
