"""What the sections of a report share: what was found in the run folder, and the page they write to."""

from __future__ import annotations

import shlex
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from probgen.core import Posterior
from probgen.diagnostics.summary import Summary
from probgen.report.entries import judge
from probgen.report.findings import Findings
from probgen.report.page import Page, Section

Draw = Callable[[Path], Path]


@dataclass
class Story:
    """A report while it is written.

    Args:
        found: what the run folder holds.
        page: where it is told.
        scratch: a folder for figures, which go into the page.
    """

    found: Findings
    page: Page
    scratch: Path

    @property
    def folder(self) -> str:
        """The run folder as it is written in a command."""
        return shlex.quote(str(self.found.record.path))

    @property
    def data(self) -> str:
        """The data as they are written in a command."""
        return shlex.quote(self.found.data or "DATA")

    @cached_property
    def posteriors(self) -> dict[str, Posterior]:
        """All draws, by name."""
        return self.found.posteriors

    @cached_property
    def verdicts(self) -> dict[str, Summary]:
        """What diagnostics say of them, by name; of those that can be judged."""
        judged = {name: self.found.attempt(judge, posterior) for name, posterior in self.posteriors.items()}
        return {name: verdict for name, verdict in judged.items() if verdict is not None}

    def plot(self, section: Section, draw: Draw, alt: str, caption: str) -> None:
        """Curves; where they cannot be drawn the reason goes to the top of the page."""
        image = self.drawn(draw, ".svg")
        if image is not None:
            section.plot(image, alt, caption)

    def drawn(self, draw: Draw, ending: str) -> Path | None:
        """The figure that a function of its path draws; None where it cannot be drawn."""
        number = sum(1 for _ in self.scratch.iterdir())
        return self.found.attempt(draw, self.scratch / f"{number}{ending}")
