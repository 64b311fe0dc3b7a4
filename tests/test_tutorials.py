"""The tutorials run, claim only what they check, and their pages show the scripts that there are."""

from __future__ import annotations

import contextlib
import io
import runpy
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
FOLDER = ROOT / "examples" / "tutorials"
RENDER = runpy.run_path(str(FOLDER / "render.py"), run_name="render")
SCRIPTS: dict[str, Path] = RENDER["tutorials"]()
PAGES: Path = RENDER["PAGES"]


def run(name: str, folder: Path, monkeypatch: pytest.MonkeyPatch, *arguments: str) -> str:
    """What the script prints."""
    monkeypatch.setattr(sys, "argv", [str(SCRIPTS[name]), *arguments])
    with contextlib.chdir(folder), contextlib.redirect_stdout(io.StringIO()) as printed:
        runpy.run_path(str(SCRIPTS[name]), run_name="__main__")
    return printed.getvalue()


def test_there_are_three() -> None:
    assert list(SCRIPTS) == ["many_engines", "own_program", "vae_to_posterior"]


@pytest.mark.filterwarnings("ignore::probgen.priors.particles.CollapsedWarning")
@pytest.mark.filterwarnings("ignore:overflow encountered:RuntimeWarning:arviz")
@pytest.mark.parametrize("name", SCRIPTS)
def test_a_tutorial_runs(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A network of twenty steps knows nothing: what is claimed of a fitted one is left out here."""
    run(name, tmp_path, monkeypatch, "--quick")
    pictures = list((tmp_path / "runs" / name).glob("*.png"))
    assert len(pictures) == 3
    assert all(picture.stat().st_size > 3_000 for picture in pictures)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::probgen.priors.particles.CollapsedWarning")
@pytest.mark.filterwarnings("ignore:overflow encountered:RuntimeWarning:arviz")
@pytest.mark.parametrize("name", SCRIPTS)
def test_what_a_tutorial_claims_holds(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The script checks it itself, and says so in its last line."""
    assert "What was claimed" in SCRIPTS[name].read_text(encoding="utf-8")
    assert run(name, tmp_path, monkeypatch).strip().endswith(".")


@pytest.mark.parametrize("name", SCRIPTS)
def test_its_page_shows_the_script_as_it_is(name: str) -> None:
    """After a change: `python examples/tutorials/render.py NAME`."""
    page = (PAGES / f"{name}.md").read_text(encoding="utf-8")
    for cell in RENDER["cells"](SCRIPTS[name].read_text(encoding="utf-8")):
        assert (cell.text if cell.is_prose else f"```python\n{cell.text}\n```") in page
