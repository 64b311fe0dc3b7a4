"""Words of a command line: which name things, which are options; and what is answered to them."""

from __future__ import annotations

import difflib
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

USAGE_ERROR = 2
INTERRUPTED = 130


class UsageError(Exception):
    """Words that cannot be understood."""


class HelpAsked(Exception):
    """Help was asked for instead of the thing itself; the help."""


@dataclass(frozen=True)
class Answer:
    """What a command answers.

    Args:
        text: the result in words, for stdout.
        facts: the result for programs: what JSON can hold, printed instead with `--json`.
        advice: what to do next, a line each, for stderr.
        code: exit code.
    """

    text: str = ""
    facts: Mapping[str, Any] = field(default_factory=dict)
    advice: Sequence[str] = ()
    code: int = 0


def closest(word: str, known: Iterable[str]) -> str:
    """The nearest known word, or all of them.

    >>> closest("lst", ["demo", "list"])
    "did you mean 'list'?"
    """
    known = list(known)
    close = difflib.get_close_matches(word, known, n=1)
    return f"did you mean {close[0]!r}?" if close else f"known: {', '.join(known)}."


def split(words: Sequence[str], flags: Collection[str]) -> tuple[list[str], list[str]]:
    """Words that name things, and options, each with its value as one word.

    Args:
        words: in any order.
        flags: options without a value; `--no-...` and options before another option have none either.

    >>> split(["runs/x", "--steps", "20", "DDIM", "--compile", "--eta=0.5"], {"--compile"})
    (['runs/x', 'DDIM'], ['--steps=20', '--compile', '--eta=0.5'])
    """
    names: list[str] = []
    options: list[str] = []
    rest = list(words)
    while rest:
        word = rest.pop(0)
        if not word.startswith("-"):
            names.append(word)
        elif "=" in word or word in flags or word.startswith("--no-") or _is_last(rest):
            options.append(word)
        else:
            options.append(f"{word}={rest.pop(0)}")
    return names, options


def _is_last(rest: Sequence[str]) -> bool:
    return not rest or rest[0].startswith("--")
