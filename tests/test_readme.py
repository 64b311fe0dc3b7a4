"""README.md does what it says."""

import contextlib
import io
import os
import re
import runpy
from pathlib import Path

import pytest

import probgen
from probgen.discovery import methods

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
QUICKSTART = (ROOT / "examples" / "quickstart.py").read_text(encoding="utf-8")
BLOCKS = re.findall(r"```python\n(.*?)```", README, re.DOTALL)


def test_readme_begins_with_the_two_commands() -> None:
    head = README[: README.index("##")]
    assert head.index("make demo") < head.index("make test")


def test_quickstart_is_in_the_readme_and_has_25_lines() -> None:
    assert BLOCKS[0] == QUICKSTART
    assert len([line for line in QUICKSTART.splitlines() if line.strip()]) <= 25


@pytest.mark.parametrize("block", BLOCKS, ids=range(len(BLOCKS)))
def test_python_of_the_readme_runs(block: str, tmp_path: Path) -> None:
    script = tmp_path / "block.py"
    script.write_text(block, encoding="utf-8")
    with contextlib.chdir(tmp_path), contextlib.redirect_stdout(io.StringIO()) as printed:
        runpy.run_path(str(script))
    if block == QUICKSTART:
        text = printed.getvalue()
        for word in ("Guide", "SVI", "NUTS", "r_hat", "ess_bulk", "bits/dim", "posterior_predictive"):
            assert word in text


def test_tables_of_the_readme_name_every_method_and_its_file() -> None:
    for folder in ("models", "objectives", "inference", "evidence"):
        for name, method in methods(folder).items():
            (row,) = [line for line in README.splitlines() if line.startswith(f"| `{name}`")]
            path = method.__module__.replace(".", "/") + ".py"
            assert f"`{path}`" in row
            assert method.paper in row


def test_paths_and_names_of_the_readme_exist() -> None:
    for path in re.findall(r"\]\(([^)#:]+)\)", README):
        assert (ROOT / path).exists(), path
    for name in re.findall(r"`probgen\.(\w+)`", README):
        assert (
            name in dir(probgen)
            or (ROOT / "probgen" / name).exists()
            or (ROOT / "probgen" / f"{name}.py").exists()
        )
    assert os.sep + "work" not in README
