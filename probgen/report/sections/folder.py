"""What the folder holds."""

from __future__ import annotations

from probgen.report.story import Story
from probgen.runs import LOCK

REPORT = "report.html"


def tell(story: Story) -> None:
    """Every file with its size."""
    path = story.found.record.path
    section = story.page.section("Files")
    steps = ", ".join(f"{step:,}" for step in story.found.steps)
    section.prose(f"In `{path}`." + (f" Whole checkpoints are there of steps {steps}." if steps else ""))
    files = [file for file in sorted(path.rglob("*")) if file.is_file() and file.name not in (LOCK, REPORT)]
    rows = [[str(file.relative_to(path)), f"{file.stat().st_size:,}"] for file in files]
    section.table("What the folder holds", ["file", "bytes"], rows)
