"""What is shipped: a wheel that holds probgen and nothing else, and a checkout that works without its links."""

import os
import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path, PurePosixPath

import pytest

ROOT = Path(__file__).parent.parent
LINKS = ("models", "inference")
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]


def run_python(*arguments: str, **options: object) -> None:
    result = subprocess.run(
        [sys.executable, *arguments], capture_output=True, text=True, check=False, **options
    )
    assert result.returncode == 0, result.stdout + result.stderr


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> zipfile.ZipFile:
    """The wheel, built from this checkout without a network."""
    folder = tmp_path_factory.mktemp("wheel")
    run_python("-m", "build", "--wheel", "--no-isolation", "--outdir", str(folder), str(ROOT))
    (path,) = folder.glob("*.whl")
    return zipfile.ZipFile(path)


def test_wheel_holds_probgen_alone(wheel: zipfile.ZipFile) -> None:
    information = f"probgen-{PROJECT['version']}.dist-info"
    assert {PurePosixPath(name).parts[0] for name in wheel.namelist()} == {"probgen", information}
    assert f"{information}/licenses/LICENSE" in wheel.namelist()


def test_wheel_holds_all_of_probgen(wheel: zipfile.ZipFile) -> None:
    shipped = {name for name in wheel.namelist() if name.startswith("probgen/")}
    sources = {path.relative_to(ROOT).as_posix() for path in (ROOT / "probgen").rglob("*.py")}
    assert shipped >= sources | {"probgen/py.typed"}


def test_wheel_offers_the_command(wheel: zipfile.ZipFile) -> None:
    (entry_points,) = [name for name in wheel.namelist() if name.endswith("entry_points.txt")]
    assert "probgen = probgen.cli:main" in wheel.read(entry_points).decode()


@pytest.mark.parametrize("name", LINKS)
def test_links_at_the_root_lead_into_the_package(name: str) -> None:
    link = ROOT / name
    if not link.is_symlink():
        pytest.skip("this checkout has no symbolic links")
    assert os.readlink(link) == f"probgen/{name}"
    assert (link / "__init__.py").is_file()


def test_probgen_imports_where_links_became_text_files(tmp_path: Path) -> None:
    """Git on Windows writes a link as a file that holds its target."""
    shutil.copytree(ROOT / "probgen", tmp_path / "probgen", ignore=shutil.ignore_patterns("__pycache__"))
    for name in LINKS:
        (tmp_path / name).write_text(f"probgen/{name}", encoding="utf-8")
    check = """
import importlib, pathlib, pkgutil, sys
import probgen
assert pathlib.Path(probgen.__file__).is_relative_to(pathlib.Path.cwd()), probgen.__file__
for module in pkgutil.walk_packages(probgen.__path__, "probgen."):
    if not module.name.endswith("__main__"):
        importlib.import_module(module.name)
assert not {"models", "inference"} & sys.modules.keys()
"""
    run_python("-W", "ignore", "-c", check, cwd=tmp_path)


def test_constraints_pin_what_the_project_names() -> None:
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    pins = [line for line in lines if line and not line.startswith("#")]
    pinned = {pin.split("==")[0].lower() for pin in pins if "==" in pin}
    extras = PROJECT["optional-dependencies"].values()
    named = [*PROJECT["dependencies"], *(requirement for extra in extras for requirement in extra)]
    wanted = [requirement for requirement in named if not requirement.startswith("probgen[")]
    assert {requirement.split(">=")[0].lower() for requirement in wanted} <= pinned
    assert not [pin for pin in pins if "+" in pin or "@" in pin or pin.lower().startswith("torchvision")]
