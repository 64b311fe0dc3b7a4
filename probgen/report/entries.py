"""Draws as a report sees them: which sites are images, and what diagnostics say of a bearable number of entries."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from probgen.core import Energetic, Engine, Pairwise, Posterior, describe
from probgen.diagnostics.summary import Summary, summary
from probgen.inference import NUTS, Ancestral, DPMSolver, Gibbs, ProbabilityFlowODE, ReverseSDE

_MOST_ENTRIES = 500  # of a site that are judged: a millisecond each
_SMALLEST = 4  # pixels in a row of an image


def is_image(shape: Sequence[int]) -> bool:
    """Whether a shape ends as that of an image does, `(1 or 3, height, width)`: a matrix of latents is none.

    >>> is_image((1, 8, 8)), is_image((5, 3, 4, 6)), is_image((5, 8)), is_image((8, 8, 8))
    (True, True, False, False)
    """
    return len(shape) >= 3 and shape[-3] in (1, 3) and min(shape[-2:]) >= _SMALLEST


def images_of(posterior: Posterior) -> dict[str, Tensor]:
    """The sites that are images, each `(n, channels, height, width)`: data sets and plates side by side."""
    return {
        site: value.flatten(0, -4)
        for site, value in posterior.draws.items()
        if is_image(value.shape[2:]) and value.is_floating_point()
    }


def bounds_of(images: Tensor) -> tuple[float, float]:
    """The values shown as black and white: -1 and 1 where most pixels lie between them, as those of levels do."""
    low, high = images.double().flatten()[: 10**6].quantile(torch.tensor([0.01, 0.99], dtype=torch.double))
    return (-1.0, 1.0) if -1.5 < low < -0.5 and 0.5 < high < 1.5 else (float(low), float(high))


def engines_for(program: Any) -> list[str]:
    """The engines worth a try, the plainest that serves this program first."""
    if isinstance(program, Pairwise):
        first: Engine = Gibbs()
    else:
        first = NUTS() if isinstance(program, Energetic) else Ancestral()
    others = (ReverseSDE(), ProbabilityFlowODE(), DPMSolver())
    serving = [engine for engine in others if program is not None and engine.supports(program)]
    return [describe(engine) for engine in (first, *serving)]


def judge(posterior: Posterior) -> Summary:
    """`summary` of the draws; of sites with very many entries, of some spread evenly over them."""
    draws, dims = {}, dict(posterior.dims)
    for site, value in posterior.draws.items():
        entries = value.flatten(2) if value.ndim > 2 else value
        if value.ndim > 2 and entries.shape[2] > _MOST_ENTRIES:
            kept = torch.linspace(0, entries.shape[2] - 1, _MOST_ENTRIES).round().long()
            draws[site] = entries[:, :, kept]
            dims.pop(site, None)
        else:
            draws[site] = value
    return summary(replace(posterior, draws=draws, dims=dims))
