"""What the units of a Boltzmann machine look for, and how the machine completes data of which it sees half."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from probgen.core import Pairwise
from probgen.data import Binarised, Quantised
from probgen.data_files import read_data
from probgen.diagnostics.unit_plots import plot_filters, plot_recall
from probgen.inference.gibbs import Gibbs
from probgen.report.entries import is_image
from probgen.report.story import Story
from probgen.targets import named
from probgen.verbs import infer

_NUM_DATA, _NUM_DRAWS = 10, 50


def tell(story: Story) -> None:
    """Filters, and completions where the data are known; nothing for other programs."""
    program = story.found.program
    if not isinstance(program, Pairwise) or not is_image((1, *story.found.program.event_shape)[-3:]):
        return
    section = story.page.section("Units")
    filters = story.drawn(partial(plot_filters, program), ".png")
    if filters is not None:
        alt = "The weights between the pixels and each of some hidden units, as images."
        section.picture(
            filters, alt, "What hidden units look for: red pixels switch a unit on, blue ones off."
        )
    completed = None if story.found.data is None else story.drawn(partial(_draw_completed, story), ".png")
    if completed is not None:
        alt = f"{_NUM_DATA} images, their upper halves, and completions by Gibbs moves: draws and the mean."
        section.picture(
            completed, alt, "Data that were not learnt from, their lower half hidden and drawn anew."
        )


def _draw_completed(story: Story, path: Path) -> Path:
    x, cue, draws = _complete(story.found.program, str(story.found.data))
    return plot_recall(x, cue, {"Gibbs": draws}, path)


def _complete(program: Pairwise, data: str) -> tuple[Tensor, Tensor, Tensor]:
    """Held-out rows, where the data come in two parts, what is seen of them, and draws given that."""
    rows = read_data(data, "held_out")
    served = (
        Binarised(rows) if isinstance(rows, Quantised) and "x" not in program.couplings().scales else rows
    )
    x = named(served.all() if isinstance(served, Binarised | Quantised) else served)["x"][:_NUM_DATA]
    cue = x.clone()
    cue[..., x.shape[-2] // 2 :, :] = torch.nan
    return x, cue, infer(program, Gibbs(), data=cue, num_draws=_NUM_DRAWS, num_chains=4).flat("x")
