"""The documentation does what it says: its Python runs, its links lead somewhere, and it names all there is."""

from __future__ import annotations

import contextlib
import importlib.util
import io
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

import probgen
from probgen.cli import main

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"
BLOCK = re.compile(r"^```python\n(.*?)^```$", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"\]\(([^)\s#]+)(?:#[^)]*)?\)")
PAGES = {str(page.relative_to(DOCS)): page.read_text(encoding="utf-8") for page in sorted(DOCS.rglob("*.md"))}
TITLED = re.compile(r'^```\w+ title="([^"]+)"\n(.*?)^```$', re.MULTILINE | re.DOTALL)
COMMAND = re.compile(r"^probgen (.*)$", re.MULTILINE)
TUTORIALS = {name for name in PAGES if name.startswith("tutorials/")}  # test_tutorials.py runs their scripts
WITH_PYTHON = sorted(name for name, text in PAGES.items() if BLOCK.search(text) and name not in TUTORIALS)
SLOW = {"devices.md"}
NEEDS = {"devices.md": "lightning_fabric"}


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[pytest.mark.slow] * (name in SLOW)) for name in WITH_PYTHON]
)
def test_python_of_a_page_runs(name: str, tmp_path: Path) -> None:
    """All blocks of a page in their order, in one namespace, as a reader would type them."""
    if name in NEEDS and not importlib.util.find_spec(NEEDS[name]):
        pytest.skip(f"this page needs {NEEDS[name]}")
    blank = re.sub(r"[^\n]", "", PAGES[name])  # line numbers of a failure are those of the page
    script = list(blank.splitlines())
    for block in BLOCK.finditer(PAGES[name]):
        first = PAGES[name][: block.start(1)].count("\n")
        script[first : first + block[1].count("\n")] = block[1].splitlines()
    code = compile("\n".join(script), str(DOCS / name), "exec")
    with contextlib.chdir(tmp_path), contextlib.redirect_stdout(io.StringIO()):
        exec(code, {"__name__": "__main__"})  # noqa: S102 - our own page


@pytest.mark.slow
def test_commands_of_the_command_line_run(tmp_path: Path) -> None:
    """In their order, beside the files that the page shows."""
    for name, text in TITLED.findall(PAGES["cli.md"]):
        (tmp_path / name).write_text(text, encoding="utf-8")
    shells = re.findall(r"^```sh\n(.*?)^```$", PAGES["cli.md"], re.MULTILINE | re.DOTALL)
    with contextlib.chdir(tmp_path):
        for command in COMMAND.findall("\n".join(shells)):
            assert main([*shlex.split(command), "--quiet"]) == 0, command
    assert (tmp_path / "runs" / "vae" / "report.html").exists()


@pytest.mark.parametrize("name", PAGES)
def test_links_of_a_page_lead_somewhere(name: str) -> None:
    """Files beside the page; read as plain Markdown they lead there too."""
    for link in LINK.findall(re.sub(r"```.*?```", "", PAGES[name], flags=re.DOTALL)):
        if "://" not in link:
            assert (DOCS / name).parent.joinpath(link).exists(), link


def test_every_public_name_is_in_the_reference() -> None:
    reference = "\n".join(text for name, text in PAGES.items() if name.startswith("reference/"))
    told = [name.rpartition(".")[2] for name in re.findall(r"^::: probgen\.(\S+)$", reference, re.MULTILINE)]
    assert sorted({*probgen.__all__} - {*told}) == []
    assert len(told) == len({*told})


def test_messages_that_troubleshooting_quotes_are_those_of_the_code() -> None:
    joint = re.compile(r'"\s*\n\s*f?"')  # where a message goes on in the next line
    sources = " ".join(joint.sub("", path.read_text("utf-8")) for path in (ROOT / "probgen").rglob("*.py"))
    tables = re.findall(r"\| it says .*?\n\n", PAGES["troubleshooting.md"] + "\n", re.DOTALL)
    said = [row.split("|")[1] for table in tables for row in table.splitlines()[2:] if row]
    quotes = [quote for cell in said for quote in re.findall(r"`([^`]+)`", cell)]
    assert len(quotes) > 10
    assert [quote for quote in quotes if quote not in sources] == []


@pytest.mark.skipif(
    not importlib.util.find_spec("mkdocs"), reason="pip install -e '.[docs]' to build the site"
)
def test_the_site_is_built_without_a_warning_and_needs_no_network(tmp_path: Path) -> None:
    """Strict: a broken link, an unknown name, a page that no menu has are failures. Nothing is fetched by a reader."""
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path / "site")]
    environment = os.environ | {"NO_MKDOCS_2_WARNING": "1"}
    built = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert built.returncode == 0, built.stderr
    assert "WARNING" not in built.stderr
    for page in (tmp_path / "site").rglob("*.html"):
        assert not re.search(
            r'<(script|link|img|iframe)[^>]*(src|href)="(https?:)?//', page.read_text("utf-8")
        ), page
