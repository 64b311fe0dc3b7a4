"""The reverse SDE of a prior, bent by what was observed."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from probgen.priors.engine import GuidedEngine


@dataclass(frozen=True)
class GuidedSDE(GuidedEngine):
    """The reverse SDE with score p(x_t) + grad log p(y | x_t), the latter by a guidance: an approximation.

    Args:
        guidance: log p(y | x_t) as it is approximated: `PiGDM`, `MomentMatching`, `DPS`, `Jensen`,
            `ClassifierGuidance`, `ClassifierFree`.
        steps: n >= 1; network calls a draw.
        grid: how they are spread over time: "quadratic", "logsnr", "karras", "uniform" or a `Grid`.
        batch_size: draws made side by side, to bound memory; None makes all at once. Noise belongs to the draw, not to
            the batch, so that it changes nothing else.

    How steps are taken is said in `GuidedEngine`. Draws are independent, and their errors do not show: more draws and
    finer steps lead to where the guidance leads, not to the posterior.

    Source: Dhariwal & Nichol (2021), arXiv 2105.05233; Song et al. (2021), arXiv 2011.13456, section 5; the steps:
    Lu et al. (2022), arXiv 2211.01095.

    >>> import pyro, pyro.distributions as dist, torch
    >>> from probgen import infer
    >>> from probgen.models.gaussian_mixture import GaussianMixture
    >>> from probgen.priors.prior import Prior
    >>> prior = Prior(GaussianMixture.example())
    >>> def seen():
    ...     x = pyro.sample("x", prior)
    ...     pyro.sample("y", dist.Normal(x[..., 0], 0.5))
    >>> infer(seen, GuidedSDE(steps=20), data={"y": torch.tensor(1.0)}, num_draws=3)["x"].shape
    torch.Size([1, 3, 2])
    """

    stochasticity: ClassVar[float] = 1.0
    paper: ClassVar[str] = "Dhariwal & Nichol 2021, arXiv 2105.05233; Song et al. 2021, arXiv 2011.13456"
    offers: ClassVar[str] = (
        "conditioning a fitted prior at the price of drawing from it, with one gradient a step"
    )
    gives_up: ClassVar[str] = "the posterior itself: p(y | x_t) is approximated, and nothing corrects it"


def example() -> GuidedSDE:
    """A few steps."""
    return GuidedSDE(steps=20)
