"""The probability flow of a prior, bent by what was observed."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from probgen.dynamics.fields import Steps
from probgen.priors.engine import GuidedEngine


@dataclass(frozen=True)
class GuidedODE(GuidedEngine):
    """The probability flow with score p(x_t) + grad log p(y | x_t), the latter by a guidance: an approximation.

    As `GuidedSDE` without its noise: fewer steps do, and each draw is a smooth function of the noise it starts from;
    but errors made at early times stay, where noise would make up for some of them.

    Args:
        guidance, grid, batch_size: as for `GuidedSDE`.
        steps: n >= 1; network calls a draw.

    Source: Song et al. (2021), arXiv 2011.13456, sections 4.3 and 5; the steps: Lu et al. (2022), arXiv 2211.01095.

    >>> GuidedODE(steps=50).guarantee
    'approximate'
    """

    steps: Steps = 100
    stochasticity: ClassVar[float] = 0.0
    paper: ClassVar[str] = "Song et al. 2021, arXiv 2011.13456"
    offers: ClassVar[str] = "fewer steps than GuidedSDE; draws are smooth in their noise"
    gives_up: ClassVar[str] = "the posterior itself; the noise that would forgive errors of the guidance"


def example() -> GuidedODE:
    """A few steps."""
    return GuidedODE(steps=20)
