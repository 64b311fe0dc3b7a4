"""What the demo says on the way and leaves at the end: one table, advice, files, and a page of it all."""

from __future__ import annotations

import json
import textwrap
from collections.abc import Callable
from contextlib import AbstractContextManager
from functools import partial
from pathlib import Path
from typing import Any

from probgen.core import Cost, describe
from probgen.diagnostics.plots import plot_history
from probgen.fitting import History
from probgen.report.folder import Folder
from probgen.report.page import Page, Section
from probgen.report.tables import print_table
from probgen.runs import versions

TITLE = "What it cost and what it is worth"
COLUMNS = ("program", "engine", "network calls", "seconds", "quality", "diagnosis")
FIGURES, REPORT = "figures.json", "report.html"


class Record:
    """Collects the table's rows, the advice and the same in numbers, while files go into a folder and onto a page.

    Args:
        folder: where files go.
        settings: what was asked for, kept with the figures.
    """

    def __init__(self, folder: Folder, settings: dict[str, Any]) -> None:
        self.folder, self.figures = folder, {"settings": settings}
        self.rows: list[list[str]] = []
        self.advice: list[str] = []
        self.page = Page(
            "probgen on real digits",
            "Five programs fitted to 8 x 8 digits, drawn from by engine after engine, each draw and likelihood judged.",
        )
        self._table = self.page.section(TITLE)

    def say(self, text: str) -> None:
        """Print at once."""
        print(text, flush=True)

    def advise(self, sentence: str) -> None:
        """Keep a sentence for the end."""
        self.advice.append(sentence)
        self.page.problem(sentence)

    def note(self, **figures: Any) -> None:
        """Keep figures that have no row."""
        self.figures |= figures

    def section(self, title: str) -> Section:
        """A new section of the page."""
        return self.page.section(title)

    def file(self, name: str) -> AbstractContextManager[Path]:
        """A path to write to, as `Folder.file`."""
        return self.folder.file(name)

    def drawn(self, name: str, draw: Callable[[Path], object]) -> Path:
        """A file of the folder, drawn by a function of its path."""
        with self.file(name) as path:
            draw(path)
        return self.folder.path / name

    def history(self, section: Section, program: Any, history: History) -> None:
        """Say how a fit went and draw it."""
        self.say(f"     {history}")
        name = describe(program)
        curves: dict[str, Any] = {"training": history.loss, "held out": history.validation}
        draw = partial(plot_history, curves, title=f"{name}: the ELBO's negative")
        section.plot(
            self.drawn(f"history_{name.lower()}.png", draw),
            f"The loss of the {name} falls as it is fitted, on training data and on held-out data.",
            f"{name}: {history}.",
        )

    def row(self, program: Any, method: Any, cost: Cost, quality: str, diagnosis: str, figure: float) -> None:
        """One line of the table; `figure` is its quality as a number."""
        calls = cost.network_calls + cost.gradients + cost.warmup_gradients
        seconds = cost.seconds + cost.warmup_seconds
        names = [describe(program), describe(method)]
        self.rows.append([*names, f"{calls:,}" if calls else "-", f"{seconds:.1f}", quality, diagnosis])
        self.figures["/".join(names)] = {"calls": calls, "seconds": seconds, "figure": float(figure)}

    def finish(self, seconds: float) -> Path:
        """Print the table and the advice, write the figures and the page; the path of the page."""
        self.note(seconds=seconds)
        with self.file(FIGURES) as path:
            path.write_text(json.dumps(self.figures, indent=2) + "\n", encoding="utf-8")
        report = self._write_page(seconds)
        self.say("")
        print_table(TITLE, COLUMNS, self.rows)
        self.say("")
        for sentence in self.advice:
            self.say(textwrap.fill(sentence, 100, initial_indent="- ", subsequent_indent="  "))
        self.say(
            f"\n{seconds:.0f} s. Pictures, traces and ArviZ files are in {self.folder.path}/, all on one page:"
        )
        self.say(str(report))
        return report

    def _write_page(self, seconds: float) -> Path:
        self._table.table("Programs and what was done with them, in order", COLUMNS, self.rows)
        about = self.section("How it was made")
        about.code("probgen demo")
        settings = {name.replace("_", " "): str(value) for name, value in self.figures["settings"].items()}
        about.facts({"took": f"{seconds:.0f} s of one core", "seed": "0"} | versions() | settings)
        return self.drawn(REPORT, self.page.write)
