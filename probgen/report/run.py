"""The report of a run folder: what was run, how it went, what was drawn, and what needs attention."""

from __future__ import annotations

import warnings
from dataclasses import replace
from os import PathLike
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from probgen.report.findings import Findings, read_findings
from probgen.report.page import Page
from probgen.report.sections import about, draws, fitting, folder, likelihood, reconstructions, units
from probgen.report.sections.folder import REPORT
from probgen.report.story import Story
from probgen.runs import POSTERIOR
from probgen.targets import read


def report(path: str | PathLike[str], *, program: Any = None, data: Any = None) -> Path:
    """Write report.html into a run folder, from whatever the folder holds.

    What is damaged is named at the top of the page; what is not there yet is named with the command that makes it.

    Args:
        path: a folder that `fit(..., run=path)`, `infer(..., run=path)` or the command `probgen` made.
        program: a run of `fit`: the program to take the weights, where it is none of probgen's own. A run of `infer`:
            what was conditioned, for posterior predictions.
        data: what the program of a run of `infer` was conditioned on, as `infer` takes it.

    Returns the path of the page.
    Raises `FileError` where there is no such folder or no run in it, or where the page cannot be written.

    >>> import tempfile
    >>> from probgen.runs import Run
    >>> with tempfile.TemporaryDirectory() as path:
    ...     with Run(path, "fit", {"num_steps": 10}) as run:
    ...         run.log(step=1, loss=0.5)
    ...     report(path).name
    'report.html'
    """
    found = read_findings(path, program if data is None else None)
    if data is not None:
        _know_target(found, program, data)
    page = Page(_title(found), _summary(found))
    with TemporaryDirectory() as scratch, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of libraries about odd draws: diagnostics tell of them in sentences
        story = Story(found, page, Path(scratch))
        about.tell(story)
        if found.record.verb != "infer":
            fitting.tell(story)
        draws.tell(story)
        if found.record.verb != "infer":
            reconstructions.tell(story)
            units.tell(story)
            likelihood.tell(story)
        folder.tell(story)
    for problem in found.problems:
        page.problem(problem)
    return page.write(found.record.path / REPORT)


def _know_target(found: Findings, program: Any, data: Any) -> None:
    """Tell the posterior of the run which program it is of."""
    name = Path(POSTERIOR).stem
    target = found.attempt(lambda: read(program, data, ()))
    if name in found.posteriors and target is not None:
        found.posteriors[name] = replace(found.posteriors[name], target=target)


def _title(found: Findings) -> str:
    if found.record.verb == "infer":
        posterior = found.posteriors.get(Path(POSTERIOR).stem)
        return f"Inference by {posterior.engine}" if posterior is not None else "Inference"
    of = f" of {found.data}" if found.data else ""
    return f"{found.name}{of}"


def _summary(found: Findings) -> str:
    done = "finished" if found.record.finished is not None else "not finished"
    engines = sorted({posterior.engine for posterior in found.posteriors.values()})
    drawn = f"; drawn from by {', '.join(engines)}" if engines else ""
    started = found.record.started.replace("T", " ").removesuffix("+00:00")
    return f"A run of {found.record.verb or 'probgen'}{f', started {started} UTC' if started else ''}, {done}{drawn}."
