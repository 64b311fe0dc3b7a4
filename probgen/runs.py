"""Run folders: what a long call leaves behind, and takes up again after it was stopped, killed or unplugged.

run.json       what was asked for, with which versions
log.jsonl      one line a report: step, loss, seconds
checkpoints/   the last few states, each whole or not there
finished.json  once it is done
"""

from __future__ import annotations

import contextlib
import json
import os
import platform
import re
import time
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from types import TracebackType
from typing import IO, Any

from torch import Tensor

from probgen.core import DamagedFile, DamagedFileWarning, FileError, InputError, check_count
from probgen.files import (
    PART,
    PathLike,
    make_folder,
    read_json,
    read_tensors,
    remove_parts,
    write_bytes,
    write_json,
    write_tensors,
)

FORMAT = "probgen run 1"
CONFIG, LOG, CHECKPOINTS, FINISHED, LOCK = "run.json", "log.jsonl", "checkpoints", "finished.json", "lock"
PROGRAM, POSTERIOR = "program.safetensors", "posterior.nc"  # what came of it
COMMAND = "command.json"  # the command line's, which may be there first
PACKAGES = ("probgen", "torch", "pyro-ppl", "numpy")
SECONDS_APART, SHARE = (
    30.0,
    0.02,
)  # of checkpoints: how long they lie apart, and how much of the time they may take
_NAME = re.compile(r"(\d{8,})\.safetensors")


@dataclass(frozen=True)
class Checkpoint:
    """All that is needed to go on from a step: tensors by name, and what JSON can hold."""

    step: int
    tensors: dict[str, Tensor]
    facts: dict[str, Any]


class Checkpoints:
    """The last few checkpoints of a run.

    Args:
        folder: where they are; made when the first is written.
        keep: how many are kept, >= 1.

    >>> import tempfile, torch
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     checkpoints = Checkpoints(folder)
    ...     checkpoints.write(10, {"w": torch.ones(1)}, {"loss": 0.5})
    ...     checkpoints.latest()
    Checkpoint(step=10, tensors={'w': tensor([1.])}, facts={'loss': 0.5})
    """

    def __init__(self, folder: PathLike, keep: int = 3) -> None:
        check_count("keep", keep)
        self.folder, self.keep = Path(folder), keep
        self._next = time.perf_counter() + SECONDS_APART

    @property
    def due(self) -> bool:
        """Whether it is time for one: half a minute after the last, later where writing one takes long."""
        return time.perf_counter() >= self._next

    def write(self, step: int, tensors: Mapping[str, Tensor], facts: Mapping[str, Any]) -> None:
        """Write one, then remove what is older than the last `keep`; `FileError` where there is no room."""
        started = time.perf_counter()
        make_folder(self.folder)
        try:
            write_tensors(self.path(step), tensors, {"step": step, "facts": facts})
        except FileError as error:
            kept = f"go on from step {self.steps()[-1]:,}" if self.steps() else "begin anew"
            raise FileError(f"{error} Then make the same call again to {kept}.") from error
        for old in self.steps()[: -self.keep]:
            self.path(old).unlink(missing_ok=True)
        now = time.perf_counter()
        self._next = now + max(SECONDS_APART, (now - started) / SHARE)

    def latest(self) -> Checkpoint | None:
        """The newest one that is whole; None where there is none. Damaged ones are passed over with a warning.

        Raises `DamagedFile` where there are checkpoints and all are damaged.
        """
        damaged: list[str] = []
        for step in reversed(self.steps()):
            try:
                found = self.read(step)
            except DamagedFile as error:
                damaged.append(str(error))
                continue
            for message in damaged:
                warnings.warn(f"{message} Going on from step {step:,}.", DamagedFileWarning, stacklevel=2)
            return found
        if damaged:
            raise DamagedFile(
                f"None of the {len(damaged)} checkpoints in {str(self.folder)!r} is whole. {damaged[0]} "
                "To begin anew, choose another run folder."
            )
        return None

    def clear(self) -> None:
        """Remove all of them."""
        for step in self.steps():
            self.path(step).unlink(missing_ok=True)

    def steps(self) -> list[int]:
        """Steps of which there is a checkpoint, in order."""
        if not self.folder.is_dir():
            return []
        names = (_NAME.fullmatch(path.name) for path in self.folder.iterdir() if path.is_file())
        return sorted(int(name[1]) for name in names if name)

    def path(self, step: int) -> Path:
        """The file of a step."""
        return self.folder / f"{step:08}.safetensors"

    def read(self, step: int) -> Checkpoint:
        """That of a step; `DamagedFile` where it is not whole."""
        tensors, facts = read_tensors(self.path(step))
        if facts.get("step") != step:
            raise DamagedFile(f"{str(self.path(step))!r} was renamed: it is of step {facts.get('step')}.")
        return Checkpoint(step, tensors, facts["facts"])


class Run:
    """A run folder, held by one process at a time: `with Run(path, "fit", config) as run: ...`.

    Args:
        path: the folder; made if it is not there.
        verb: "fit" or "infer".
        config: all that decides the result, as JSON can hold it; a folder with another one is refused.
        keep: checkpoints that are kept.

    Inside the block `resumed` says whether the folder held this run already, and `finished` what `finish` was told,
    or None. Raises `InputError` for a folder with another run, `FileError` where another process is at work in it,
    where it holds files of others, or where it cannot be written.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as path:
    ...     with Run(path, "fit", {"num_steps": 10}) as run:
    ...         run.log(step=1, loss=0.5)
    ...     with Run(path, "fit", {"num_steps": 10}) as run:
    ...         run.resumed, read_run(path).log
    (True, [{'step': 1, 'loss': 0.5}])
    """

    def __init__(self, path: PathLike, verb: str, config: Mapping[str, Any], keep: int = 3) -> None:
        self.path, self.verb = Path(path), verb
        self.config: dict[str, Any] = json.loads(json.dumps(config))
        self.checkpoints = Checkpoints(self.path / CHECKPOINTS, keep)
        self.resumed = False

    def __enter__(self) -> Run:
        make_folder(self.path)
        self._check()  # before the lock, so that another run is told from a busy one
        self._lock = _lock(self.path / LOCK)
        try:
            self._check()  # and after it: another process may have begun meanwhile
            remove_parts(self.path)
            remove_parts(self.checkpoints.folder)
            self.resumed = (self.path / CONFIG).exists()
            if not self.resumed:
                about = {"format": FORMAT, "verb": self.verb, "config": self.config}
                write_json(self.path / CONFIG, about | {"versions": versions(), "started": _now()})
        except BaseException:
            self._lock.close()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._lock.close()

    @property
    def finished(self) -> dict[str, Any] | None:
        """What `finish` was told; None while there is work left."""
        path = self.path / FINISHED
        return read_json(path) if path.exists() else None

    def finish(self, **facts: Any) -> None:
        """Note that all is done."""
        write_json(self.path / FINISHED, facts)

    def log(self, **values: Any) -> None:
        """Add a line to the log."""
        try:
            with (self.path / LOG).open("a", encoding="utf-8") as file:
                file.write(json.dumps(values) + "\n")
        except OSError as error:
            raise FileError(
                f"{str(self.path / LOG)!r} could not be written: {error.strerror}. Free some space and make the same "
                "call again: it goes on from the last checkpoint."
            ) from error

    def rewind(self, step: int) -> None:
        """Forget what was logged after a step: it will be done again."""
        kept = [line for line in _read_log(self.path / LOG) if line.get("step", 0) <= step]
        write_bytes(self.path / LOG, "".join(json.dumps(line) + "\n" for line in kept).encode())

    def _check(self) -> None:
        """Refuse a folder of others, and one that holds another run than this."""
        if not (self.path / CONFIG).exists():
            if any(
                entry.name not in (LOCK, COMMAND) and entry.suffix != PART for entry in self.path.iterdir()
            ):
                raise FileError(
                    f"{str(self.path)!r} holds files but no run of probgen. Choose an empty folder, or a new one."
                )
            return
        found = read_run(self.path)
        if found.verb != self.verb:
            raise InputError(
                f"{str(self.path)!r} is a run of {found.verb}; {self.verb} needs a folder of its own."
            )
        changed = _differences(found.config, self.config)
        if changed:
            raise InputError(
                f"{str(self.path)!r} is a run that was asked for otherwise: {'; '.join(changed)}. Choose another "
                "folder, or ask for the same to go on."
            )


@dataclass(frozen=True)
class RunRecord:
    """What a run folder says of itself: see `Run`; `finished` is None while there is work left."""

    path: Path
    verb: str
    config: dict[str, Any]
    versions: dict[str, str]
    started: str
    log: list[dict[str, Any]]
    finished: dict[str, Any] | None


def read_run(path: PathLike) -> RunRecord:
    """Read a run folder without taking it over; `FileError` where there is none, `DamagedFile` where it is not ours."""
    path = Path(path)
    if not (path / CONFIG).exists():
        raise FileError(f"{str(path)!r} is no run folder: it holds no {CONFIG}.")
    about = read_json(path / CONFIG)
    fields = {"verb": str, "config": dict, "versions": dict, "started": str}
    whole = isinstance(about, dict) and all(
        isinstance(about.get(name), kind) for name, kind in fields.items()
    )
    if not whole or about.get("format") != FORMAT:
        raise DamagedFile(f"{str(path / CONFIG)!r} was not written by this version of probgen ({FORMAT}).")
    finished = read_json(path / FINISHED) if (path / FINISHED).exists() else None
    return RunRecord(
        path, **{name: about[name] for name in fields}, log=_read_log(path / LOG), finished=finished
    )


def versions() -> dict[str, str]:
    """Python, the machine, and the packages that decide the last bits of a result."""
    found = {"python": platform.python_version(), "machine": f"{platform.system()} {platform.machine()}"}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:  # used from a checkout that was not installed
            continue
    return found


def _read_log(path: Path) -> list[dict[str, Any]]:
    """The lines that are whole: the last one of a process that was killed may not be."""
    if not path.exists():
        return []
    lines = []
    for text in path.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            line = json.loads(text)
        except ValueError:
            continue
        if isinstance(line, dict):
            lines.append(line)
    return lines


def _differences(was: dict[str, Any], now: dict[str, Any], prefix: str = "") -> list[str]:
    """What differs between two configurations, by name, in words."""
    told = []
    for name in sorted({*was, *now}):
        old, new = was.get(name), now.get(name)
        if isinstance(old, dict) and isinstance(new, dict):
            told += _differences(old, new, f"{prefix}{name}.")
        elif old != new:
            told.append(f"{prefix}{name} was {old!r} and is {new!r}")
    return told


def _lock(path: Path) -> IO[str]:
    """Hold a file until it is closed, or its process ends in whatever way."""
    try:
        file = path.open("a+", encoding="utf-8")
    except OSError as error:
        raise FileError(
            f"Cannot write into {str(path.parent)!r}: {error.strerror}. Choose another folder."
        ) from error
    try:
        _take(file)
    except OSError as error:
        file.seek(0)
        holder = file.read().strip() or "another process"
        file.close()
        raise FileError(
            f"{holder} is at work in {str(path.parent)!r}. Wait for it, stop it, or choose another folder."
        ) from error
    with contextlib.suppress(OSError):  # a full disk: the lock holds, only its note is missing
        file.truncate(0)
        os.write(file.fileno(), f"process {os.getpid()} (since {_now()})".encode())
    return file


def _take(file: IO[str]) -> None:
    try:
        import fcntl
    except ImportError:  # Windows
        import msvcrt

        file.seek(0)
        msvcrt.locking(file.fileno(), msvcrt.LK_NBLCK, 1)  # type: ignore[attr-defined]
        return
    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)


def _now() -> str:
    return datetime.fromtimestamp(time.time(), UTC).isoformat(timespec="seconds")
