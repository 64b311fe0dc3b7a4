"""Running the scripts of examples/ from tests."""

from __future__ import annotations

import contextlib
import importlib.util
import io
from pathlib import Path
from types import ModuleType
from typing import Any

FOLDER = Path(__file__).parent.parent / "examples"


def load(name: str) -> ModuleType:
    """The script of this name as a module, not run."""
    spec = importlib.util.spec_from_file_location(f"example_{name}", FOLDER / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def run(module: ModuleType, folder: Path, **settings: Any) -> str:
    """What `main(folder, **settings)` prints."""
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        module.main(folder, **settings)
    return printed.getvalue()


def claims() -> set[str]:
    """The names of all scripts that claim something."""
    scripts = {path.stem for path in FOLDER.glob("*.py")} - {"quickstart"}
    return {name for name in scripts if "Claim: " in (FOLDER / f"{name}.py").read_text()}
