"""`probgen report RUN`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from probgen.cli.fitted import own_program
from probgen.cli.options import Parser
from probgen.cli.words import Answer


@dataclass(frozen=True)
class Asked:
    """What the command adds.

    Args:
        program: where a program of your own is found, file.py:Name; its run folder holds the weights alone.
    """

    program: str | None = None


def run(words: Sequence[str], *, progress: bool) -> Answer:  # noqa: ARG001 - the signature of every command
    """Write the page and say where it is."""
    parser = Parser(
        "report RUN", "One page of a run, RUN/report.html: curves, pictures, tables, warnings with remedies."
    )
    parser.take(Asked, "report")
    (folder,) = parser.names(words)
    asked = Asked(**parser.values(words)["report"])
    from probgen.report.run import report

    program = None if asked.program is None else own_program(Path(folder), asked.program)
    path = report(folder, program=program)
    return Answer(str(path), {"report": str(path)})
