"""Classifier guidance: labels by a classifier that knows how noisy its input is."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from probgen.core import InputError, Positive, describe
from probgen.priors.conditioned import Conditioned, Covariance, Marginal
from probgen.priors.guidance import Denoised, Guidance, Guided, PiGDM, denoised


@dataclass(frozen=True)
class ClassifierGuidance(Guidance):
    """Adds s grad log p(c | x_t, t) of the sites `NoiseAware(classifier, x)` to the score: draws from p(x) p(c | x)^s.

    With s = 1 this is what every guidance does with such sites; larger s gives up variety for typical members of the
    class, and is no posterior.

    Args:
        scale: s > 0, as the paper names it.
        guidance: for all other observations.

    Raises:
        InputError: when used with a program without a `NoiseAware` site.

    Source: Dhariwal & Nichol (2021), arXiv 2105.05233, algorithm 1.

    >>> ClassifierGuidance(scale=2.0).guidance
    PiGDM(prior_scale=1.0)
    """

    scale: Positive = 1.0
    guidance: Guidance = PiGDM()  # noqa: RUF009 - frozen
    paper: ClassVar[str] = "Dhariwal & Nichol 2021, arXiv 2105.05233"
    offers: ClassVar[str] = "labels, at no approximation but the classifier's own"
    gives_up: ClassVar[str] = (
        "a classifier must be fitted at all noise levels; scales above 1 are no posterior"
    )

    @property
    def smooth(self) -> bool:
        """See `Guidance.smooth`."""
        return self.guidance.smooth

    def covariance(self, conditioned: Conditioned, look: Denoised) -> Covariance:
        """See `Guidance.covariance`."""
        return self.guidance.covariance(conditioned, look)

    def seen(
        self, conditioned: Conditioned, x_0: Tensor, covariance: Covariance, z: Tensor | None
    ) -> Marginal:
        """See `Guidance.seen`."""
        return self.guidance.seen(conditioned, x_0, covariance, z)

    def look(self, conditioned: Conditioned, x_t: Tensor, t: float) -> Denoised:
        """See `Guidance.look`."""
        if not conditioned.aware:
            raise InputError(
                f"{describe(conditioned.target.program)} has no label seen through a classifier. Write it as "
                'pyro.sample("label", NoiseAware(classifier, x)), the classifier a function of (x, t), and observe it.'
            )
        return denoised(conditioned, x_t, t, self.scale)

    def shift(self, guided: Guided, factor: float) -> Tensor:
        """See `Guidance.shift`."""
        return self.guidance.shift(guided, factor)
