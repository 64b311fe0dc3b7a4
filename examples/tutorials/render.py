"""Run the tutorials and write the pages of the site that show them: docs/tutorials/*.md, with output and pictures.

    OMP_NUM_THREADS=1 python examples/tutorials/render.py [NAME ...]

A tutorial is a script in the percent format, which editors open as a notebook: `# %% [markdown]` begins prose, `# %%`
code. Pictures it leaves in runs/NAME/ are copied beside its page.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import os
import re
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

FOLDER = Path(__file__).resolve().parent
PAGES = FOLDER.parent.parent / "docs" / "tutorials"
MARK = re.compile(r"^# %%( \[markdown\])?\n", re.MULTILINE)


class Cell(NamedTuple):
    """A piece of a tutorial: prose as Markdown, or code."""

    is_prose: bool
    text: str


def tutorials() -> dict[str, Path]:
    """The scripts by name."""
    return {path.stem: path for path in sorted(FOLDER.glob("*.py")) if MARK.match(path.read_text("utf-8"))}


def cells(source: str) -> list[Cell]:
    """The cells of a script, in order."""
    _, *parts = MARK.split(source)
    pairs = zip(parts[::2], parts[1::2], strict=True)
    return [Cell(bool(mark), _prose(text) if mark else text.strip()) for mark, text in pairs]


def _prose(text: str) -> str:
    return re.sub(r"^# ?", "", text, flags=re.MULTILINE).strip()


def page(name: str, source: str) -> Iterator[str]:
    """The page of one tutorial in Markdown, made by running it in the working directory."""
    namespace = {"__name__": "__main__", "__file__": str(FOLDER / f"{name}.py")}
    for cell in cells(source):
        yield cell.text if cell.is_prose else f"```python\n{cell.text}\n```"
        if not cell.is_prose:
            with contextlib.redirect_stdout(io.StringIO()) as printed:
                exec(compile(cell.text, f"{name}.py", "exec"), namespace)  # noqa: S102 - our own script
            if text := printed.getvalue().strip("\n"):
                yield f"```text\n{text}\n```"
    yield f"The script: `examples/tutorials/{name}.py`."


def render(name: str, path: Path) -> None:
    """Run one tutorial in a folder of its own, and write its page and its pictures."""
    with tempfile.TemporaryDirectory() as folder, contextlib.chdir(folder):
        text = "\n\n".join(page(name, path.read_text(encoding="utf-8")))
        pictures = sorted(Path(folder, "runs", name).glob("*.png"))
        PAGES.mkdir(exist_ok=True)
        for picture in pictures:
            shutil.copy(picture, PAGES / f"{name}_{picture.name}")
    (PAGES / f"{name}.md").write_text(text + "\n", encoding="utf-8")
    print(f"{name}: {len(pictures)} pictures")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="*", choices=[[], *tutorials()], metavar="NAME")
    os.environ.setdefault("MPLBACKEND", "Agg")
    for chosen in parser.parse_args().names or tutorials():
        render(chosen, tutorials()[chosen])
