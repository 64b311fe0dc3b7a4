"""Run folders as the commands see them: the program that was fitted, and places for what is drawn of it."""

from __future__ import annotations

import inspect
import re
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, dataclass
from pathlib import Path
from typing import Any

from probgen.cli.naming import is_reference, own
from probgen.cli.options import Parser, parameters, typed
from probgen.core import DamagedFile, FileError, InputError
from probgen.discovery import methods
from probgen.files import make_folder, read_json, write_json
from probgen.randomness import forked_rng
from probgen.runs import COMMAND, PROGRAM, read_run

SETTINGS = "program"


@dataclass(frozen=True)
class OwnProgram:
    """Which program a run folder is of, where it cannot say so itself.

    Args:
        program: where a program of your own is found, file.py:Name; its run folder holds the weights alone.
    """

    program: str | None = None


def slug(*names: str) -> str:
    """Names as the name of a folder.

    >>> slug("DDPM", "data/my heights.csv"), slug("models.py:Heights", "digits")
    ('ddpm-my-heights', 'heights-digits')
    """
    parts = [Path(name.rpartition(":")[2] or name).stem for name in names]
    return "-".join(re.sub(r"\W+", "-", part).strip("-").lower() for part in parts)


# --- programs ------------------------------------------------------------------------------------------------------


def is_made(kind: Any) -> bool:
    """Whether a name stands for something that makes a program, a class or function, and not for a program."""
    return isinstance(kind, type) or inspect.isroutine(kind)


def take_settings(parser: Parser, kind: Any) -> None:
    """Take what makes a program, but for the shape of the data, as options."""
    if is_made(kind):
        check_made_from_shape(kind)
        names = {parameter.name for parameter in parameters(kind)} - {"event_shape"}
        parser.take(kind, SETTINGS, names)


def check_made_from_shape(kind: Any) -> None:
    """`InputError` for a program of probgen that needs more than the shape of the data."""
    known = methods("models")
    if kind in known.values() and not is_made_from_shape(kind):
        able = [name for name, other in known.items() if is_made_from_shape(other)]
        raise InputError(
            f"{kind.__name__} needs more than the shape of the data, so that it cannot be made here: make it in a file "
            f"of yours and name that, file.py:program. Made here are {', '.join(able)}."
        )


def is_made_from_shape(kind: Any) -> bool:
    """Whether a class is made from a shape, and nothing that it takes beside the shape must be given."""
    others = [parameter for parameter in parameters(kind) if parameter.name != "event_shape"]
    takes_shape = "event_shape" in inspect.signature(getattr(kind, "of_shape", kind)).parameters
    return takes_shape and all(parameter.default is not MISSING for parameter in others)


def make_program(kind: Any, event_shape: Sequence[int] | None, settings: Mapping[str, Any], seed: int) -> Any:
    """The program, its weights drawn by a seed.

    Args:
        kind: a program, or a class or function that makes one; it is told `event_shape` if it asks for it.
        event_shape: shape of one datum; None where the data are of several sites.
        settings: its other arguments.
    """
    if not is_made(kind):
        return kind
    maker = getattr(kind, "of_shape", kind)
    arguments = dict(settings)
    if "event_shape" in inspect.signature(maker).parameters:
        if event_shape is None:
            raise InputError(
                f"{kind.__name__} wants the shape of one datum, and the data are of several sites."
            )
        arguments["event_shape"] = tuple(event_shape)
    missing = [p.name for p in parameters(kind) if p.default is MISSING and p.name not in arguments]
    if missing:
        raise InputError(f"{kind.__name__} cannot be made without {', '.join(missing)}.")
    with forked_rng(seed):
        return maker(**arguments)


# --- what was fitted -----------------------------------------------------------------------------------------------


def write_command(run: Path, program: str, data: str, options: Mapping[str, str], **facts: Any) -> None:
    """Note beside a run what was asked for: its names and options, and what else will be needed."""
    others = {name: text for name, text in options.items() if name not in ("data", "run")}
    make_folder(run)
    write_json(run / COMMAND, {"program": program, "data": data, "options": others, **facts})


def read_command(run: Path) -> dict[str, Any]:
    """What `write_command` noted; empty for a run that Python began."""
    path = run / COMMAND
    if not path.exists():
        return {}
    command = read_json(path)
    settings = command.get("settings", {}) if isinstance(command, dict) else None
    if not isinstance(settings, dict) or not all(isinstance(text, str) for text in settings.values()):
        raise DamagedFile(
            f"{str(path)!r} is not what probgen wrote: expected names and settings. Take another copy."
        )
    return command


def fitted_program(run: Path, reference: str | None = None) -> Any:
    """The program that was fitted in a run folder.

    Args:
        run: the folder.
        reference: for a program of one's own where it is found, `file.py:Name`: what a run folder names is not run.
    """
    from probgen.saving import load

    record, path = read_run(run), run / PROGRAM
    if record.verb != "fit":
        raise InputError(f"{str(run)!r} is a run of {record.verb}, not of fit: there is no program in it.")
    if not path.exists():
        raise FileError(f"{str(run)!r} is not finished: make the same call of fit again, and it goes on.")
    name = str(read_command(run).get("program", ""))
    if reference is not None:
        return load(path, into=own_program(run, reference))
    if is_reference(name):
        raise InputError(
            f"{str(run)!r} holds the weights of a program of yours. No code is run because a file names it: say where "
            f"the program is, --program {name}."
        )
    return load(path)


def own_program(run: Path, reference: str) -> Any:
    """A program of one's own as it was made for the run, without the fitted weights."""
    kind, command = own(reference), read_command(run)
    settings = typed(kind, command.get("settings", {})) if is_made(kind) else {}
    return make_program(kind, command.get("event_shape"), settings, seed=0)


def free_path(folder: Path, name: str, ending: str) -> Path:
    """`folder/name.ending`, or the first of `name-2`, `name-3`, ... that is not there yet; the folder is made."""
    make_folder(folder)
    path, count = folder / f"{name}{ending}", 1
    while path.exists():
        count += 1
        path = folder / f"{name}-{count}{ending}"
    return path
