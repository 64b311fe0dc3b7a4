"""The folders are the registry: what programs, objectives, engines and estimators there are."""

from __future__ import annotations

import importlib
import pkgutil

from probgen.core import InputError, did_you_mean

FOLDERS = ("models", "objectives", "inference", "evidence", "diagnostics")


def methods(folder: str) -> dict[str, type]:
    """Public classes of a folder that say what paper they come from, by name.

    >>> "NUTS" in methods("inference")
    True
    """
    if folder not in FOLDERS:
        raise InputError(f"No folder {folder!r}; {did_you_mean(folder, FOLDERS)}")
    package = importlib.import_module(f"probgen.{folder}")
    found: dict[str, type] = {}
    for module_info in pkgutil.iter_modules(package.__path__):
        module = importlib.import_module(f"probgen.{folder}.{module_info.name}")
        for name, value in vars(module).items():
            if isinstance(value, type) and value.__module__ == module.__name__ and hasattr(value, "paper"):
                found[name] = value
    return dict(sorted(found.items()))
