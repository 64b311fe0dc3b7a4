"""`probgen report RUN`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from probgen.cli.fitted import OwnProgram, own_program
from probgen.cli.options import Parser
from probgen.cli.words import Answer


def run(words: Sequence[str], *, progress: bool) -> Answer:  # noqa: ARG001 - the signature of every command
    """Write the page and say where it is."""
    parser = Parser(
        "report RUN", "One page of a run, RUN/report.html: curves, pictures, tables, warnings with remedies."
    )
    parser.take(OwnProgram, "report")
    (folder,) = parser.names(words)
    asked = OwnProgram(**parser.values(words)["report"])
    from probgen.report.run import report

    program = None if asked.program is None else own_program(Path(folder), asked.program)
    path = report(folder, program=program)
    return Answer(str(path), {"report": str(path)})
