"""What a run folder holds, read with care: what is damaged is told in a sentence, and the rest is used."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from os import PathLike
from pathlib import Path
from typing import Any, TypeVar

from probgen.core import DamagedFile, Posterior, ProbgenError, describe
from probgen.files import read_json, read_tensors
from probgen.runs import (
    CHECKPOINTS,
    COMMAND,
    FINISHED,
    POSTERIOR,
    PROGRAM,
    Checkpoints,
    RunRecord,
    read_run,
)
from probgen.saving import load

T = TypeVar("T")
DRAWS, EVIDENCE = "draws", "evidence"


@dataclass
class Findings:
    """Everything in a run folder that a report can use.

    Args:
        record: what was asked for, and the log.
        command: what was typed, where it was a command: program, data, options.
        program: the fitted program, or None.
        posteriors: draws by name: "posterior", and those in draws/.
        estimates: what estimators found, by name, as JSON.
        steps: of which there are whole checkpoints.
        problems: what could not be read and what that means, a sentence each.
    """

    record: RunRecord
    command: dict[str, Any] = field(default_factory=dict)
    program: Any = None
    posteriors: dict[str, Posterior] = field(default_factory=dict)
    estimates: dict[str, dict[str, Any]] = field(default_factory=dict)
    steps: list[int] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)

    @property
    def name(self) -> str:
        """What the program is called."""
        if self.program is not None:
            return describe(self.program)
        named = self.command.get("program", self.record.config.get("program"))
        return named if isinstance(named, str) else "a program"

    @property
    def data(self) -> str | None:
        """How the data were named on the command line; None where it was Python that named them."""
        data = self.command.get("data")
        return data if isinstance(data, str) else None

    def attempt(self, act: Callable[..., T], *args: Any) -> T | None:
        """What an action returns; where it fails in a way that was foreseen the reason is kept, and None returned."""
        try:
            return act(*args)
        except ProbgenError as error:
            self.problems.append(str(error))
            return None


def read_findings(path: str | PathLike[str], program: Any = None) -> Findings:
    """Read a run folder.

    Args:
        path: the folder.
        program: one to take the fitted weights, where it is none of probgen's own and the file cannot make it.

    Raises `FileError` where there is no folder, or no run in it.
    """
    path = Path(path)
    found = _record(path)
    if (path / COMMAND).is_file():
        found.command = found.attempt(_read_object, path / COMMAND) or {}
    if (path / PROGRAM).is_file():
        found.program = found.attempt(load, path / PROGRAM, program)
    _read_draws(found)
    for file in _files(path / EVIDENCE, ".json"):
        estimate = found.attempt(_read_object, file)
        if estimate is not None:
            found.estimates[file.stem] = estimate
    _check_checkpoints(found)
    return found


def _record(path: Path) -> Findings:
    """What the folder says of itself, as much of it as is whole."""
    try:
        record = read_run(path)
    except DamagedFile as error:
        unknown = RunRecord(path, "", {}, {}, "", [], {} if (path / FINISHED).exists() else None)
        return Findings(unknown, problems=[str(error)])
    if isinstance(record.finished, dict | None):
        return Findings(record)
    return Findings(replace(record, finished={}), problems=[_foreign(path / FINISHED)])


def _read_object(path: Path) -> dict[str, Any]:
    value = read_json(path)
    if not isinstance(value, dict):
        raise DamagedFile(_foreign(path))
    return value


def _foreign(path: Path) -> str:
    return f"{str(path)!r} was not written by probgen: expected a JSON object. It is left out."


def _read_draws(found: Findings) -> None:
    path = found.record.path
    files = [file for file in (path / POSTERIOR,) if file.is_file()] + _files(path / DRAWS, ".nc")
    for file in files:
        posterior = found.attempt(load, file)
        if isinstance(posterior, Posterior):
            found.posteriors[file.stem] = posterior


def _files(folder: Path, ending: str) -> list[Path]:
    return sorted(folder.glob(f"[!.]*{ending}")) if folder.is_dir() else []


def _check_checkpoints(found: Findings) -> None:
    checkpoints = Checkpoints(found.record.path / CHECKPOINTS)
    for step in checkpoints.steps():
        if found.attempt(read_tensors, checkpoints.path(step)) is not None:
            found.steps.append(step)
