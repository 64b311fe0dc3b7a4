"""Names on the command line: of methods, of your own objects in a file or module, of fitted runs."""

from __future__ import annotations

import ast
import importlib
import importlib.util
import sys
import traceback
from pathlib import Path
from types import ModuleType
from typing import Any

from probgen.cli.words import closest
from probgen.core import FileError, InputError
from probgen.discovery import methods

KINDS = {
    "models": "a program",
    "objectives": "an objective",
    "inference": "an engine",
    "evidence": "an estimator",
}
_PARTS = ("probgen", "probgen.models", "probgen.processes", "probgen.conditioning")


def method(folder: str, name: str) -> Any:
    """The class of a program, objective, engine or estimator: by its name, or as `module:Name` or `file.py:Name`.

    >>> method("inference", "NUTS").__name__
    'NUTS'
    """
    if is_reference(name):
        return own(name)
    known = methods(folder)
    if name in known:
        return known[name]
    for other, kind in KINDS.items():
        if name in methods(other):
            raise InputError(f"{name} is {kind}, and {KINDS[folder]} was expected; {closest(name, known)}")
    raise InputError(
        f"{name!r} is not {KINDS[folder]} of probgen; {closest(name, known)} One of your own is file.py:Name or "
        "module:Name."
    )


def is_reference(name: str) -> bool:
    """Whether a name says where it is found, `file.py:Name` or `module:Name`."""
    return ":" in name


def own(name: str) -> Any:
    """What a file or module of yours calls by a name; the file is run to find out, as `python file.py` would.

    Raises `InputError` where there is no such file, module or name, or where running it fails.
    """
    place, _, attribute = name.rpartition(":")
    module = _run_file(Path(place)) if place.endswith(".py") else _import(place)
    if not hasattr(module, attribute):
        known = [key for key in vars(module) if not key.startswith("_")]
        raise InputError(f"{place} has no {attribute!r}; {closest(attribute, known)}")
    return getattr(module, attribute)


def _run_file(path: Path) -> ModuleType:
    if not path.is_file():
        raise FileError(f"There is no file {str(path)!r}.")
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules.setdefault(path.stem, module)  # where dataclasses look up their annotations
    sys.path.insert(0, str(path.parent.resolve()))  # as for `python file.py`
    try:
        spec.loader.exec_module(module)
    except (Exception, SystemExit) as error:
        raise InputError(
            f"{path} cannot be run: {type(error).__name__}: {error}{_line(error, path)}"
        ) from error
    finally:
        sys.path.remove(str(path.parent.resolve()))
    return module


def _line(error: BaseException, path: Path) -> str:
    """Where in the file it happened."""
    frames = traceback.extract_tb(error.__traceback__)
    lines = [frame.lineno for frame in frames if Path(frame.filename).resolve() == path.resolve()]
    return f" (line {lines[-1]})" if lines else ""


def _import(name: str) -> ModuleType:
    sys.path.insert(0, "")  # as for `python -m`
    try:
        return importlib.import_module(name)
    except Exception as error:
        raise InputError(
            f"The module {name!r} cannot be imported: {type(error).__name__}: {error}."
        ) from error
    finally:
        sys.path.remove("")


def spelled(text: str) -> Any:
    """The object that a text spells: a class of probgen, called with plain values or further such objects.

    Nothing else is looked up or run.

    >>> spelled("VP(beta_max=10.0)"), spelled("OTPath")
    (VP(t_min=0.001, t_max=1.0, beta_min=0.1, beta_max=10.0), OTPath(t_min=0.001, t_max=0.999))
    """
    if is_reference(text):
        thing = own(text)
        return thing() if isinstance(thing, type) else thing
    try:
        return _build(ast.parse(text, mode="eval").body)
    except (SyntaxError, ValueError, TypeError, RecursionError, MemoryError) as error:
        raise InputError(f"{text!r} spells nothing: {error}. Write it as VP or VP(beta_max=10).") from error


def _build(node: ast.expr) -> Any:
    if isinstance(node, ast.Name):
        return _public(node.id)()
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
        keywords = {keyword.arg: _build(keyword.value) for keyword in node.keywords if keyword.arg}
        return _public(node.func.id)(*map(_build, node.args), **keywords)
    return ast.literal_eval(node)


def _public(name: str) -> type:
    """A public class of probgen."""
    found: dict[str, type] = {}
    for part in _PARTS:
        module = importlib.import_module(part)
        if isinstance(value := getattr(module, name, None), type):
            return value
        found |= {key: None for key in dir(module) if key[0].isupper()}  # type: ignore[misc]
    raise InputError(f"probgen has no {name!r}; {closest(name, found)}")
