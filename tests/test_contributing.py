"""The skeletons of CONTRIBUTING.md are complete files: put into a copy of the package, they pass what methods pass."""

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from layers import METHOD_FOLDERS, missing_parts, stale_docstrings, violations

ROOT = Path(__file__).parent.parent
SKELETON = re.compile(r"^### [^\n]*`(probgen/\S+\.py)`$.*?^```python\n(.*?)^```$", re.MULTILINE | re.DOTALL)
SKELETONS = dict(SKELETON.findall((ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")))


@pytest.fixture(scope="module")
def checkout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the package with the skeletons in it."""
    folder = tmp_path_factory.mktemp("checkout")
    shutil.copy(ROOT / "pyproject.toml", folder)
    shutil.copytree(ROOT / "probgen", folder / "probgen", ignore=shutil.ignore_patterns("__pycache__"))
    for name, text in SKELETONS.items():
        assert not (ROOT / name).exists(), f"{name} is a method of probgen by now: choose another skeleton"
        (folder / name).write_text(text, encoding="utf-8")
    return folder


def run(checkout: Path, *arguments: str) -> None:
    command = [sys.executable, "-m", *arguments]
    result = subprocess.run(command, cwd=checkout, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout + result.stderr


def test_there_is_one_skeleton_of_each_kind() -> None:
    assert [Path(name).parent.name for name in SKELETONS] == list(METHOD_FOLDERS)


def test_skeletons_keep_the_rules(checkout: Path) -> None:
    package = checkout / "probgen"
    complaints = violations(package) + missing_parts(package) + stale_docstrings(package)
    assert [line for line in complaints if f"probgen/{line.split(':')[0].split()[0]}" in SKELETONS] == []


def test_skeletons_run(checkout: Path) -> None:
    run(checkout, "pytest", "-q", "-o", "pythonpath=.", "-o", "addopts=--doctest-modules", *SKELETONS)


def test_skeletons_are_formatted_and_typed(checkout: Path) -> None:
    run(checkout, "ruff", "check", *SKELETONS)
    run(checkout, "ruff", "format", "--check", *SKELETONS)
    run(checkout, "mypy", *SKELETONS)
