"""A hook of the site: formulas between dollar signs become MathML, which browsers draw without any script."""

from __future__ import annotations

import re
from html import unescape
from typing import Any

from latex2mathml.converter import convert

INLINE = re.compile(r'<span class="arithmatex">\\\((.*?)\\\)</span>', re.DOTALL)
DISPLAY = re.compile(r'<div class="arithmatex">\s*\\\[(.*?)\\\]\s*</div>', re.DOTALL)


def on_page_content(html: str, **_: Any) -> str:
    """Called by mkdocs with the HTML of each page."""
    html = INLINE.sub(lambda formula: _mathml(formula[1], "inline"), html)
    return DISPLAY.sub(lambda formula: _mathml(formula[1], "block"), html)


def _mathml(formula: str, display: str) -> str:
    made = convert(unescape(formula), display=display)
    return made.replace("<mi>log</mi>", '<mi>log</mi><mspace width="0.17em" />')  # log x, not logx
