"""Diffusion posterior sampling: steps down the distance between observations and what x_0hat predicts."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from probgen.core import Positive
from probgen.priors.conditioned import Conditioned, Covariance, Isotropic, Marginal
from probgen.priors.guidance import Denoised, Guidance, Guided


@dataclass(frozen=True)
class DPS(Guidance):
    """Every step of the prior is followed by x <- x - zeta grad |y - A(x_0hat(x_t))|.

    The norm is that of one draw, in the units of y, and the gradient goes through the network. However fine the steps,
    this is no posterior: the noise of y is nowhere in it. On x ~ N(0, I_8) seen as 1 with noise 0.5, of posterior mean
    0.80 and standard deviation 0.447, 1,000 steps with zeta = 1 give 1.00 and 0.18.

    Args:
        zeta: size of the steps, > 0, in the units of x; the paper takes 0.3 to 1 for images in [-1, 1].

    Raises:
        UnsupportedError: when used with observations that are not Gaussian.

    Source: Chung et al. (2023), arXiv 2209.14687, algorithm 1, its zeta_i grad |.|^2 with zeta_i = zeta/(2 |.|).

    >>> DPS().twist, DPS().smooth
    (False, False)
    """

    zeta: Positive = 1.0
    twist: ClassVar[bool] = False
    paper: ClassVar[str] = "Chung et al. 2023, arXiv 2209.14687 (DPS)"
    offers: ClassVar[str] = "any differentiable mean of a Gaussian observation; one network call a step"
    gives_up: ClassVar[str] = "the posterior: its noise is not in it, and zeta is tuned by eye"

    @property
    def smooth(self) -> bool:
        """See `Guidance.smooth`: the steps do not shrink with time."""
        return False

    def covariance(self, conditioned: Conditioned, look: Denoised) -> Covariance:
        """None is taken."""
        return Isotropic(0.0)

    def seen(
        self, conditioned: Conditioned, x_0: Tensor, covariance: Covariance, z: Tensor | None
    ) -> Marginal:
        """-|y - A(x_0hat)| and its gradient."""
        distance, grad = conditioned.distance(x_0)
        return Marginal(-distance, -grad)

    def shift(self, guided: Guided, factor: float) -> Tensor:
        """zeta grad, whatever the step."""
        return self.zeta * guided.grad
