"""`probgen list [WHAT]`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from probgen.cli.words import Answer, UsageError
from probgen.discovery import methods
from probgen.report import tables

_ABOUT = """usage: probgen list [WHAT]

What there is: what each method needs, offers and gives up.
WHAT is programs, objectives, engines, estimators, or the name of one; all without it."""


def run(words: Sequence[str], *, progress: bool) -> Answer:  # noqa: ARG001 - the signature of every command
    """Print the tables, drawn where there is a terminal."""
    if any(word in ("-h", "--help") for word in words):
        return Answer(_ABOUT)
    unknown = [word for word in words if word.startswith("-")]
    if unknown or len(words) > 1:
        raise UsageError(
            f"probgen list: unrecognized arguments: {' '.join(unknown or words[1:])}. See probgen list --help."
        )
    tables.list_methods(words[0] if words else None)
    return Answer("", {kind: _told(folder) for kind, folder in tables.KINDS.items()})


def _told(folder: str) -> dict[str, dict[str, str]]:
    """What the methods of a folder say of themselves."""
    known: dict[str, Any] = methods(folder)
    return {
        name: {"offers": kind.offers, "gives_up": kind.gives_up, "paper": kind.paper}
        for name, kind in known.items()
    }
