"""Tables: drawn for a terminal, one plain line a row where the output is piped."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Iterable, Sequence
from typing import Any

from probgen.core import InputError, did_you_mean
from probgen.discovery import methods

KINDS = {"programs": "models", "objectives": "objectives", "engines": "inference", "estimators": "evidence"}


def print_table(title: str, columns: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
    """Print rows of text under their columns.

    >>> print_table("Engines", ["engine", "needs"], [["NUTS", "any program"]])
    Engines
    engine  needs
    NUTS    any program
    """
    table = [list(columns), *map(list, rows)]
    print_as = _print_drawn if sys.stdout.isatty() else _print_plain
    print_as(title, table)


def _print_drawn(title: str, table: list[list[str]]) -> None:
    from rich import box
    from rich.console import Console
    from rich.table import Table

    drawn = Table(title=title, title_justify="left", title_style="bold", box=box.ROUNDED, show_lines=True)
    for position, column in enumerate(table[0]):
        drawn.add_column(column, no_wrap=position == 0)
    for row in table[1:]:
        drawn.add_row(*row)
    Console(highlight=False, markup=False).print(drawn)


def _print_plain(title: str, table: list[list[str]]) -> None:
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    print(title)
    for row in table:
        print("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())


def list_methods(what: str | None = None) -> None:
    """Print what there is: every kind of method, one kind, or the documentation of one method by its name.

    Args:
        what: "programs", "objectives", "engines", "estimators", the name of a method, or None for all kinds.

    Raises `InputError` for a name that does not exist.

    >>> list_methods("objectives")
    Objectives
    objective  needs                offers                                     ...
    """
    by_name: dict[str, Any] = {
        name: method for folder in KINDS.values() for name, method in methods(folder).items()
    }
    if what in by_name:
        print(f"{what}: {by_name[what].paper}\n\n{inspect.getdoc(by_name[what])}")
        return
    if what is not None and what not in KINDS:
        raise InputError(
            f"There is nothing called {what!r} to list; {did_you_mean(what, [*KINDS, *by_name])}"
        )
    for kind in KINDS if what is None else [what]:
        second, describe = ("engines", _engines) if kind == "programs" else ("needs", _needs)
        columns = [kind.removesuffix("s"), second, "offers", "gives up", "paper"]
        found = methods(KINDS[kind]).values()
        print_table(kind.capitalize(), columns, [_row(method, describe(method)) for method in found])
        if what is None:
            print()


def _row(method: Any, second: str) -> list[str]:
    return [method.__name__, second, method.offers, method.gives_up, method.paper]


def _needs(method: Any) -> str:
    """What the program must be, in the words of the capabilities' docstrings."""
    sentences = [(capability.__doc__ or "").split(".")[0].split(";")[0] for capability in method.needs]
    return " and ".join(sentence[0].lower() + sentence[1:] for sentence in sentences) or "any program"


def _engines(program: type) -> str:
    """Engines whose needs the program's class fulfils."""
    engines: dict[str, Any] = methods("inference")
    return ", ".join(
        name for name, engine in engines.items() if all(issubclass(program, need) for need in engine.needs)
    )
