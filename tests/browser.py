"""A page as Chromium shows it: what it complains of, which images failed, whether it is wider than the window."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from dataclasses import dataclass
from html import escape, unescape
from pathlib import Path

BROWSER = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
_FLAGS = """
--headless --no-sandbox --disable-gpu --no-first-run --disable-background-networking --disable-component-update
--disable-sync --hide-scrollbars --enable-logging=stderr --v=0 --window-size=1400,1000
""".split()  # noqa: SIM905
_THEMES = {"dark": 0, "light": 1}  # Chromium's own numbers
_PROBE = """<script>
addEventListener("load", () => {
  const broken = [...document.images].filter(image => !image.complete || image.naturalWidth === 0)
  parent.document.documentElement.dataset.probe = JSON.stringify({
    images: document.images.length,
    broken: broken.map(image => image.alt),
    page: document.documentElement.scrollWidth,
    window: innerWidth,
    background: getComputedStyle(document.body).backgroundColor,
  })
})
</script></body>"""


@dataclass(frozen=True)
class Look:
    """What was seen; `console` holds the lines a page wrote to the console, errors and refusals among them."""

    images: int
    broken: list[str]
    page: int
    window: int
    background: str
    console: list[str]


def look(page: Path, width: int, theme: str, scratch: Path) -> Look:
    """Open a copy of the page that reports on itself, in a frame: windows have a least width, frames have none."""
    text = page.read_text(encoding="utf-8")
    probed = text.replace("default-src 'none';", "default-src 'none'; script-src 'unsafe-inline';")
    framed = escape(probed.replace("</body>", _PROBE))
    outside = scratch / "outside.html"
    outside.write_text(
        f'<!DOCTYPE html><meta charset="utf-8"><meta name="color-scheme" content="light dark">'
        f'<iframe width="{width}" height="900" style="border: 0" srcdoc="{framed}"></iframe>',
        encoding="utf-8",
    )
    command = [
        str(BROWSER),
        *_FLAGS,
        f"--user-data-dir={scratch / f'profile-{width}-{theme}'}",
        f"--blink-settings=preferredColorScheme={_THEMES[theme]}",
        "--dump-dom",
        outside.as_uri(),
    ]
    shown = subprocess.run(command, capture_output=True, text=True, check=True, timeout=120)
    found = re.search(r'data-probe="([^"]*)"', shown.stdout)
    assert found, shown.stderr
    console = [line for line in shown.stderr.splitlines() if "CONSOLE" in line]
    return Look(**json.loads(unescape(found[1])), console=console)
