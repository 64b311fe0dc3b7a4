"""What a program with a guide and a decoder makes of data it has not learnt from."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from probgen.core import Decoding, Guided, InputError
from probgen.data_files import read_data
from probgen.diagnostics.plots import reconstruction_grid
from probgen.diagnostics.predict import predict
from probgen.inference.guide import Guide
from probgen.report.entries import bounds_of, is_image
from probgen.report.story import Story
from probgen.targets import named
from probgen.verbs import infer

_NUM_DATA, _NUM_DRAWS = 20, 50


def tell(story: Story) -> None:
    """Pairs of images; of other data how far their reconstructions are off. Nothing for other programs."""
    program = story.found.program
    if not (isinstance(program, Guided) and isinstance(program, Decoding)):
        return
    section = story.page.section("Reconstructions")
    if story.found.data is None:
        section.prose("The run was started from Python and does not say where its data are.")
        return
    pair = story.found.attempt(_reconstruct, program, story.found.data)
    if pair is None:
        section.prose("They could not be made; the reason stands at the top.")
    elif is_image(pair[0].shape[1:]):
        _show(story, *pair)
    else:
        error = float((pair[0] - pair[1]).square().mean().sqrt())
        section.figures({"root mean square of x - E[x_new | x]": f"{error:.3g}"})


def _reconstruct(program: Any, data: str) -> tuple[Tensor, Tensor]:
    """Held-out rows, where the data come in two parts, and E[x_new | x] of each."""
    rows = read_data(data, "held_out")
    first = torch.arange(min(_NUM_DATA, len(rows)))
    values = (
        named(rows[first])
        if not isinstance(rows, dict)
        else {name: each[first] for name, each in rows.items()}
    )
    if set(values) != {"x"}:
        raise InputError(f"{data!r} has the sites {', '.join(values)}: reconstructions are of x alone.")
    predicted = predict(infer(program, Guide(), data=values["x"], num_draws=_NUM_DRAWS))["x"]
    return values["x"], predicted.mean((0, 1))


def _show(story: Story, originals: Tensor, means: Tensor) -> None:
    path = story.drawn(
        lambda path: reconstruction_grid(originals, means, path, bounds=bounds_of(originals)), ".png"
    )
    if path is not None:
        story.page.sections[-1].picture(
            path,
            f"{len(originals)} data, and below each its reconstruction.",
            "Data that were not learnt from, and E[x_new | x] under the guide.",
        )
