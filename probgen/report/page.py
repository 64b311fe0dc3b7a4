"""One self-contained HTML page: sections of prose, figures, tables, and what needs attention at the top."""

from __future__ import annotations

import base64
import re
from collections.abc import Iterable, Mapping, Sequence
from datetime import UTC, datetime
from html import escape
from importlib.resources import files
from os import PathLike
from pathlib import Path
from typing import Literal

from probgen.core import InputError
from probgen.files import write_bytes

Look = Literal["plot", "picture"]
_MEDIA = {".png": "image/png", ".svg": "image/svg+xml", ".jpg": "image/jpeg"}
_NUMBER = re.compile(r"[-+−±~<>=|z\d.,:%\s/×x]*\d[\d.,%\s±]*(e[-+]\d+)?( s)?|[-–—]?|nan|-?inf")
_POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"  # nothing is fetched, nothing runs


class Page:
    """A report of one file that needs no other: styles and pictures inside, no script, no network.

    Args:
        title: the heading.
        summary: a sentence below it.

    Whatever is put in is text and is shown as such: `escape`d, but for `code` in backticks.

    >>> import tempfile
    >>> page = Page("Eight schools", "4 chains of 500 draws by NUTS")
    >>> section = page.section("Convergence")
    >>> section.prose("R-hat is below 1.01 for every entry.")
    >>> section.table("Estimates", ["entry", "mean"], [["tau", "3.6"]])
    >>> page.problem("There were 6 divergences: increase `target_accept`.")
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     "Eight schools" in page.write(f"{folder}/report.html").read_text(encoding="utf-8")
    True
    """

    def __init__(self, title: str, summary: str = "") -> None:
        self.title, self.summary = title, summary
        self.problems: list[str] = []
        self.sections: list[Section] = []

    def section(self, title: str) -> Section:
        """A new section at the end."""
        section = Section(title, f"section-{len(self.sections) + 1}")
        self.sections.append(section)
        return section

    def problem(self, sentence: str) -> None:
        """Something that needs attention, with the way out; shown at the top."""
        if sentence not in self.problems:
            self.problems.append(sentence)

    def write(self, path: str | PathLike[str]) -> Path:
        """Write the page, whole or not at all, and return its path; `FileError` where it cannot be written."""
        write_bytes(path, self.html().encode("utf-8", "replace"))
        return Path(path)

    def html(self) -> str:
        """The page as text."""
        contents = "".join(
            f'<li><a href="#{each.anchor}">{_text(each.title)}</a></li>' for each in self.sections
        )
        return _DOCUMENT.format(
            policy=_POLICY,
            title=_text(self.title),
            plain_title=escape(self.title),
            style=(files("probgen.report") / "page.css").read_text(encoding="utf-8"),
            summary=_text(self.summary),
            verdict=self._verdict(),
            contents=f'<nav aria-label="Contents"><ul>{contents}</ul></nav>',
            sections="\n".join(section.html() for section in self.sections),
            written=datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        )

    def _verdict(self) -> str:
        if not self.problems:
            return '<div class="verdict" role="note"><p>Nothing that was checked is wrong.</p></div>'
        items = "".join(f"<li>{_text(sentence)}</li>" for sentence in self.problems)
        heading = '<h2 id="attention">What needs attention</h2>'
        return (
            f'<section class="verdict alarm" aria-labelledby="attention">{heading}<ul>{items}</ul></section>'
        )


class Section:
    """A part of a page, filled from top to bottom. Made by `Page.section`."""

    def __init__(self, title: str, anchor: str) -> None:
        self.title, self.anchor = title, anchor
        self._blocks: list[str] = []

    def prose(self, text: str) -> None:
        """A paragraph."""
        self._blocks.append(f"<p>{_text(text)}</p>")

    def points(self, sentences: Iterable[str]) -> None:
        """A list of sentences."""
        items = "".join(f"<li>{_text(sentence)}</li>" for sentence in sentences)
        self._blocks.append(f"<ul>{items}</ul>" if items else "")

    def code(self, text: str) -> None:
        """A command, or a few lines of a program."""
        self._blocks.append(f'<pre tabindex="0"><code>{escape(text)}</code></pre>')

    def missing(self, what: str, command: str) -> None:
        """What could stand here, and the command that would make it."""
        self._blocks.append(f'<p class="missing">{_text(what)}</p>')
        self.code(command)

    def facts(self, facts: Mapping[str, str]) -> None:
        """Names and values, as of a configuration."""
        items = "".join(f"<dt>{_text(name)}</dt><dd>{_text(value)}</dd>" for name, value in facts.items())
        self._blocks.append(f'<dl class="facts">{items}</dl>')

    def figures(self, figures: Mapping[str, str]) -> None:
        """The few numbers that matter most, large."""
        items = "".join(
            f"<div><dt>{_text(name)}</dt><dd>{_text(value)}</dd></div>" for name, value in figures.items()
        )
        self._blocks.append(f'<dl class="figures">{items}</dl>')

    def table(self, caption: str, columns: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
        """Rows of text under their columns; the first cell of a row names it, numbers stand on the right."""
        cells = [list(row) for row in rows]
        numeric = [i > 0 and all(_NUMBER.fullmatch(row[i]) for row in cells) for i in range(len(columns))]
        marks = [' class="number"' if number else "" for number in numeric]
        head = "".join(
            f'<th scope="col"{mark}>{_text(name)}</th>' for name, mark in zip(columns, marks, strict=True)
        )
        body = "".join(f"<tr>{_row(row, marks)}</tr>" for row in cells)
        self._blocks.append(
            f'<div class="scroll" tabindex="0" role="region" aria-label="{escape(caption)}"><table>'
            f"<caption><span>{_text(caption)}</span></caption><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>"
        )

    def plot(self, image: Path, alt: str, caption: str = "") -> None:
        """Curves or bars on a white ground, turned to light on dark where the reader's theme is dark.

        Args:
            image: a .png, .svg or .jpg file; it goes into the page and is not needed any more.
            alt: what is to be seen, for those who do not see it.
            caption: stands below.
        """
        self._blocks.append(_figure(image, alt, caption, "plot"))

    def picture(self, image: Path, alt: str, caption: str = "") -> None:
        """Images whose colours are data and stay as they are; arguments as for `plot`."""
        self._blocks.append(_figure(image, alt, caption, "picture"))

    def pictures(self, pictures: Iterable[tuple[Path, str, str]]) -> None:
        """Several pictures (image, alt, caption) side by side where there is room."""
        figures = "".join(_figure(image, alt, caption, "picture") for image, alt, caption in pictures)
        self._blocks.append(f'<div class="pictures">{figures}</div>')

    def html(self) -> str:
        """The section as text."""
        heading = f'<h2 id="{self.anchor}">{_text(self.title)}</h2>'
        blocks = "\n".join(self._blocks)
        return f'<section aria-labelledby="{self.anchor}">\n{heading}\n{blocks}\n</section>'


def _row(cells: Sequence[str], marks: Sequence[str]) -> str:
    first, *others = [_text(cell) for cell in cells]
    return f'<th scope="row">{first}</th>' + "".join(
        f"<td{mark}>{cell}</td>" for cell, mark in zip(others, marks[1:], strict=True)
    )


def _text(text: str) -> str:
    """Escaped, `code` in backticks set apart."""
    return re.sub(r"`([^`]+)`", r"<code>\1</code>", escape(text))


def _figure(image: Path, alt: str, caption: str, look: Look) -> str:
    below = f"<figcaption>{_text(caption)}</figcaption>" if caption else ""
    scrolls = f' tabindex="0" role="region" aria-label="{escape(alt)}"' if look == "plot" else ""
    shown = f'<img src="{_embedded(image)}" alt="{escape(alt)}">'
    return f'<figure class="{look}"><div class="frame"{scrolls}>{shown}</div>{below}</figure>'


def _embedded(path: Path) -> str:
    """An image file as a URI that holds it."""
    if path.suffix not in _MEDIA:
        raise InputError(
            f"{path.name}: expected an image ({', '.join(_MEDIA)}), got {path.suffix or 'no ending'!r}."
        )
    return f"data:{_MEDIA[path.suffix]};base64,{base64.b64encode(path.read_bytes()).decode()}"


_DOCUMENT = """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="{policy}">
<meta name="color-scheme" content="light dark">
<meta name="generator" content="probgen">
<link rel="icon" href="data:,">
<title>{plain_title}</title>
<style>
{style}</style>
</head>
<body>
<a class="skip" href="#content">Skip to the content</a>
<header>
<h1>{title}</h1>
<p class="summary">{summary}</p>
</header>
{verdict}
{contents}
<main id="content">
{sections}
</main>
<footer>Written by probgen, {written}.</footer>
</body>
</html>
"""
