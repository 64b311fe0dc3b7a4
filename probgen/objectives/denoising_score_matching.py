"""Score matching to the noise that was added."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from torch import Tensor

from probgen.core import Batch, Diffusion, check_fields
from probgen.noising import (
    admitted,
    importance_times,
    noise_error,
    training_times,
)
from probgen.processes import Time, Weighting, over_event

Sampling = Literal["uniform", "importance"]


@dataclass(frozen=True)
class DenoisingScoreMatching:
    """1/2 E lambda(t) |s(x_t, t) + eps/sigma|^2 at x_t = alpha x_0 + sigma eps: explicit score matching + const.

    The mean of -eps/sigma = grad log q(x_t | x_0) given x_t is the score. It is worked out as lambda/sigma^2 times
    |eps - epshat|^2, from the network's own output. With "g2", and times t_max - t_min, it bounds -log p(x) in nats up
    to a constant (likelihood weighting); with "sigma2" it is d/2 times `SimpleLoss`.

    Args:
        weighting: lambda, "sigma2" (no unit), "g2" (nats per unit of t) or "uniform" (1 over data squared).
        sampling: of t, over [t_min, t_max], the program's levels, or k/T for a chain, always stratified: "uniform", or
            "importance", t about proportional to lambda/sigma^2 with exact weights. The mean is the same; with "g2" and
            "uniform" weightings the variance is far lower.
        t: one noise level in [t_min, t_max] of the process instead of all.

    Raises:
        InputError: an unknown weighting or sampling, a time out of range.
        UnsupportedError: by `loss`, for programs without a process and a denoiser.

    Source: Vincent (2011), Neural Computation 23; Song & Ermon (2019), arXiv 1907.05600, over levels; Song et al.
    (2021), arXiv 2011.13456, over t; Song et al. (2021), arXiv 2101.09258, for "g2" and the importance sampling.

    >>> import torch
    >>> from probgen import Batch, DDPM, TimeMLP
    >>> ddpm = DDPM(TimeMLP((2,), width=8), num_steps=10)
    >>> DenoisingScoreMatching("g2", "importance").loss(ddpm, Batch({"x": torch.zeros(5, 2)})).shape
    torch.Size([])
    """

    weighting: Weighting = "sigma2"
    sampling: Sampling = "uniform"
    t: Time | None = None
    needs: ClassVar[tuple[type, ...]] = (Diffusion,)
    paper: ClassVar[str] = "Vincent 2011, Neural Computation 23"
    offers: ClassVar[str] = "the score at every noise level from one network call a row"
    gives_up: ClassVar[str] = "the score of the clean data: noise is needed"

    def __post_init__(self) -> None:
        check_fields(self)

    def loss(self, program: Any, batch: Batch) -> Tensor:
        """Half the weighted squared error, summed over coordinates: a differentiable scalar."""
        program, x_0 = admitted(self, program, batch)
        t, weight = self._times(program, len(x_0))
        error = noise_error(program, x_0, t)
        return 0.5 * (over_event(weight, x_0) * error.square()).sum() / len(x_0)

    def _times(self, program: Diffusion, size: int) -> tuple[Tensor, Tensor]:
        """t and the weight of |eps - epshat|^2 there, `(size,)` or `(size, *event)`."""

        def weight(t: Tensor) -> Tensor:
            process = program.process()
            return process.weight(t, self.weighting) / process.sigma(t).square()

        if self.sampling == "uniform" or self.t is not None:
            t = training_times(program, size, self.t)
            return t, weight(t)
        t, ratio = importance_times(program, size, weight)
        values = weight(t)
        return t, over_event(ratio, values) * values


def example() -> DenoisingScoreMatching:
    """Over all noise levels, each of equal weight."""
    return DenoisingScoreMatching()
