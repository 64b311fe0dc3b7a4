"""Classifier-free guidance: from what a network says without its condition to what it says with it, and further."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

from torch import Tensor

from probgen.core import InputError, Positive
from probgen.dynamics import AffineDenoiser
from probgen.priors.conditioned import Conditioned, Covariance
from probgen.priors.guidance import Denoised, Guidance, Guided, PiGDM


@dataclass(frozen=True)
class ClassifierFree(Guidance):
    """x_0hat = (1 + w) x_0hat(c) - w x_0hat(none) for a prior with a condition, `Prior(program, condition=c)`.

    Two network calls a step. For w > 0 these are draws of no posterior: the field is the score of no noised law.

    Args:
        scale: w > 0, as the paper names it; w = 0 would be the prior at its condition, which any guidance follows.
        guidance: for what was observed.

    Raises:
        InputError: when used with a prior without a condition.

    Source: Ho & Salimans (2022), arXiv 2207.12598, eq. 6.

    >>> ClassifierFree(scale=2.0).twist
    False
    """

    scale: Positive = 1.0
    guidance: Guidance = PiGDM()  # noqa: RUF009 - frozen
    twist: ClassVar[bool] = False
    num_calls: ClassVar[int] = 2
    paper: ClassVar[str] = "Ho & Salimans 2022, arXiv 2207.12598"
    offers: ClassVar[str] = (
        "draws more typical of their condition, from one network that was fitted to drop it"
    )
    gives_up: ClassVar[str] = "the law p(x | c); two network calls a step"

    @property
    def smooth(self) -> bool:
        """See `Guidance.smooth`."""
        return self.guidance.smooth

    def covariance(self, conditioned: Conditioned, look: Denoised) -> Covariance:
        """See `Guidance.covariance`."""
        return self.guidance.covariance(conditioned, look)

    def __call__(self, conditioned: Conditioned, x_t: Tensor, t: float, z: Tensor | None = None) -> Guided:
        """See `Guidance.__call__`; two network calls."""
        return self.guidance(conditioned.with_denoiser(self._extrapolated(conditioned)), x_t, t, z)

    def shift(self, guided: Guided, factor: float) -> Tensor:
        """See `Guidance.shift`."""
        return self.guidance.shift(guided, factor)

    def _extrapolated(self, conditioned: Conditioned) -> AffineDenoiser:
        prior, there = conditioned.prior, conditioned.denoiser
        if prior.condition is None:
            raise InputError(
                f"Classifier-free guidance extrapolates from no condition to one, and {prior} of site "
                f"{conditioned.name!r} has none: Prior(program, condition=c)."
            )
        nowhere = AffineDenoiser.of(prior.program.given(None)).through(conditioned.wrap)

        def output(x: Tensor, t: Tensor) -> Tensor:
            return there.output(x, t).lerp(nowhere.output(x, t), -self.scale)

        return replace(there, output=output)
