"""`probgen diagnose FILE.nc`."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from probgen import Posterior, summary
from probgen.cli.options import Parser
from probgen.cli.words import Answer
from probgen.core import InputError
from probgen.diagnostics.summary import Summary
from probgen.report.entries import judge
from probgen.runs import POSTERIOR


@dataclass(frozen=True)
class Asked:
    """What is judged.

    Args:
        sites: the sites, apart by commas; by default all, and of those with very many entries some.
    """

    sites: tuple[str, ...] | None = None


def run(words: Sequence[str], *, progress: bool) -> Answer:  # noqa: ARG001 - the signature of every command
    """Read the draws and judge them."""
    parser = Parser(
        "diagnose FILE.nc", "Can these draws be trusted? ArviZ's numbers, and what to do about them."
    )
    parser.take(Asked, "diagnose")
    (path,) = parser.names(words)
    asked = Asked(**parser.values(words)["diagnose"])
    posterior = read_posterior(Path(path))
    return judged(judge(posterior) if asked.sites is None else summary(posterior, asked.sites))


def read_posterior(path: Path) -> Posterior:
    """The draws of a file; those of a run folder of `infer` are its posterior.nc."""
    from probgen.saving import load

    path = path / POSTERIOR if path.is_dir() else path
    posterior = load(path)
    if not isinstance(posterior, Posterior):
        raise InputError(f"{str(path)!r} holds a program, not draws: probgen diagnose reads .nc files.")
    return posterior


def judged(verdict: Summary) -> Answer:
    """The verdict in words and for programs."""
    return Answer(str(verdict), facts_of(verdict))


def facts_of(verdict: Summary) -> dict[str, Any]:
    """The verdict for programs: what is wrong, what cannot be seen, and the table by entry."""
    table: dict[str, Any] = json.loads(verdict.table.to_json(orient="index"))
    return {
        "ok": verdict.ok,
        "problems": list(verdict.problems),
        "notes": list(verdict.notes),
        "table": table,
    }
