"""A griffe extension of the site: examples in docstrings are shown as what was typed and printed."""

from __future__ import annotations

import re
from typing import Any

import griffe

EXAMPLE = re.compile(r"^>>> .*?(?=^\s*$|\Z)", re.MULTILINE | re.DOTALL)


class Examples(griffe.Extension):
    """Fences every run of lines that begins with `>>>`; Markdown would take them for quotations."""

    def on_object(self, *, obj: griffe.Object, **_: Any) -> None:
        if obj.docstring:
            obj.docstring.value = EXAMPLE.sub(
                lambda run: f"```pycon\n{run[0].rstrip()}\n```\n", obj.docstring.value
            )
