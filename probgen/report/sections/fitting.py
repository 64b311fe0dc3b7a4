"""How the loss fell."""

from __future__ import annotations

import math
from functools import partial
from typing import Any

from probgen.diagnostics.plots import plot_history
from probgen.report.sections.about import number
from probgen.report.story import Story

Points = list[tuple[float, float]]


def tell(story: Story) -> None:
    """The curves of the log."""
    section = story.page.section("Fitting")
    curves = read_curves(story.found.record.log)
    if not any(curves.values()):
        section.missing(
            "Nothing was logged yet.",
            f"probgen fit {story.found.name} --data {story.data} --run {story.folder}",
        )
        return
    if any(not math.isfinite(value) for _, value in curves["training"]):
        story.page.problem(
            "The loss turned NaN or infinite on the way: take a smaller learning rate (`lr`), or clip the gradient "
            "(`clip_norm`)."
        )
    unit = story.found.record.config.get("unit")
    draw = partial(plot_history, curves, ylabel=f"loss ({unit} a datum)" if unit else "loss")
    caption = "The loss at every logged step; a noisy one is pale, with its running median."
    story.plot(section, draw, in_words(curves), caption)


def read_curves(log: list[dict[str, Any]]) -> dict[str, Points]:
    """(step, value) of what was logged of the loss and of the validation.

    >>> read_curves([{"step": 1, "loss": 3.0}, {"step": 2, "loss": 2.0, "validation": 2.5}, {"text": "else"}])
    {'training': [(1.0, 3.0), (2.0, 2.0)], 'held out': [(2.0, 2.5)]}
    """
    named = {"training": "loss", "held out": "validation"}
    return {
        title: [
            (float(line["step"]), float(line[name]))
            for line in log
            if _is_number(line.get("step")) and _is_number(line.get(name))
        ]
        for title, name in named.items()
    }


def in_words(curves: dict[str, Points]) -> str:
    """The curves for those who do not see them."""
    parts = [
        f"the {name} loss goes from {number(points[0][1])} at step {points[0][0]:.0f} to {number(points[-1][1])} at "
        f"step {points[-1][0]:.0f}"
        for name, points in curves.items()
        if points
    ]
    return "Curves: " + "; ".join(parts) + "."


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
