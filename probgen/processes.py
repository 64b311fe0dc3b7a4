"""Noising laws: how data x_0 at t = 0 become noise at t = 1.

A process is q(x_t | x_0) = N(alpha(t) x_0, sigma(t)^2 I); everything else follows from alpha and sigma:
dx = f(t) x dt + g(t) dW with f = alpha'/alpha and g^2 = 2 sigma sigma' - 2 f sigma^2, the laws between two
times, and the posterior of an earlier point. Times are tensors `(n,)`; alpha and sigma return `(n,)`, or
`(n, *event)` for laws that differ by coordinate.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar, Literal, NamedTuple

import torch
from torch import Tensor

from probgen.core import InputError, did_you_mean

Prediction = Literal["x0", "eps", "v"]
PREDICTIONS: tuple[Prediction, ...] = ("x0", "eps", "v")


class Gaussian(NamedTuple):
    """A diagonal normal law, `loc` and `scale` broadcastable over `(batch, *event)`."""

    loc: Tensor
    scale: Tensor


def over_event(value: Tensor, x: Tensor) -> Tensor:
    """Shape a per-time value `(n,)` or `(n, *event)` so that it broadcasts over x `(n, *event)`."""
    return value.reshape(value.shape + (1,) * (x.ndim - value.ndim)).to(x)


@dataclass(frozen=True)
class Process:
    """A noising law given by `alpha` and `sigma`; subclasses write these two and, for exactness, `drift`, `diffusion2`.

    Args:
        t_min: the earliest time at which engines evaluate a denoiser, in (0, 1): at t = 0 the score of data on a
            thin set is unbounded, and eps-prediction divides 0 by 0.

    Source: Song et al. (2021), arXiv 2011.13456; Kingma et al. (2021), arXiv 2107.00630.

    >>> p = VP()
    >>> t = torch.tensor([0.5], dtype=torch.float64)
    >>> bool(torch.isclose(p.alpha(t) ** 2 + p.sigma(t) ** 2, torch.ones(1, dtype=torch.float64)))
    True
    """

    t_min: float = 1e-3
    paper: ClassVar[str] = ""

    def __post_init__(self) -> None:
        if not 0 < self.t_min < 1:
            raise InputError(f"t_min must lie strictly between 0 and 1, got {self.t_min!r}.")

    def alpha(self, t: Tensor) -> Tensor:
        """alpha(t), the factor on x_0."""
        raise NotImplementedError

    def sigma(self, t: Tensor) -> Tensor:
        """sigma(t), the standard deviation of the noise."""
        raise NotImplementedError

    def drift(self, t: Tensor) -> Tensor:
        """f(t) = alpha'(t) / alpha(t)."""
        return _derivative(lambda s: self.alpha(s).log(), t)

    def diffusion2(self, t: Tensor) -> Tensor:
        """g(t)^2 = d sigma^2/dt - 2 f sigma^2."""
        return _derivative(lambda s: self.sigma(s).square(), t) - 2 * self.drift(t) * self.sigma(t).square()

    def snr(self, t: Tensor) -> Tensor:
        """Signal-to-noise ratio alpha^2 / sigma^2."""
        return (self.alpha(t) / self.sigma(t)).square()

    def marginal(self, x_0: Tensor, t: Tensor) -> Gaussian:
        """q(x_t | x_0) = N(alpha x_0, sigma^2)."""
        return Gaussian(over_event(self.alpha(t), x_0) * x_0, over_event(self.sigma(t), x_0))

    def transition(self, x_s: Tensor, s: Tensor, t: Tensor) -> Gaussian:
        """q(x_t | x_s), s < t: alpha_{t|s} = alpha_t/alpha_s, sigma_{t|s}^2 = sigma_t^2 - alpha_{t|s}^2 sigma_s^2."""
        ratio = self.alpha(t) / self.alpha(s)
        variance = self.sigma(t).square() - ratio.square() * self.sigma(s).square()
        return Gaussian(over_event(ratio, x_s) * x_s, over_event(variance.clamp_min(0).sqrt(), x_s))

    def bridge(self, x_t: Tensor, x_0: Tensor, s: Tensor, t: Tensor) -> Gaussian:
        """q(x_s | x_t, x_0), s < t: the posterior of an earlier point given a later one and the data."""
        on_x_t, on_x_0, variance = self.bridge_coefficients(s, t)
        loc = over_event(on_x_t, x_t) * x_t + over_event(on_x_0, x_0) * x_0
        return Gaussian(loc, over_event(variance.sqrt(), x_t))

    def bridge_coefficients(self, s: Tensor, t: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Factors on x_t and x_0 and the variance of q(x_s | x_t, x_0)."""
        ratio = self.alpha(t) / self.alpha(s)
        sigma2_s, sigma2_t = self.sigma(s).square(), self.sigma(t).square()
        sigma2_ts = (sigma2_t - ratio.square() * sigma2_s).clamp_min(0)
        return (
            ratio * sigma2_s / sigma2_t,
            self.alpha(s) * sigma2_ts / sigma2_t,
            sigma2_ts * sigma2_s / sigma2_t,
        )


def _derivative(function: Callable[[Tensor], Tensor], t: Tensor) -> Tensor:
    """d function / dt for a function of each time on its own."""
    # Forward mode would say the same in one word, but torch 2.13 warns of its own deprecations when first asked.
    return torch.func.vmap(torch.func.jacrev(lambda s: function(s[None])[0]))(t)


@dataclass(frozen=True)
class VP(Process):
    """Variance preserving: alpha = exp(-1/2 int_0^t beta), sigma^2 = 1 - alpha^2, g^2 = beta, beta linear in t.

    Args:
        beta_min, beta_max: rates at t = 0 and t = 1, > 0; equal rates give the constant schedule.

    Source: Ho et al. (2020), arXiv 2006.11239; Song et al. (2021), arXiv 2011.13456.

    >>> VP(beta_min=5.0, beta_max=5.0).diffusion2(torch.tensor([0.1, 0.9]))
    tensor([5., 5.])
    """

    beta_min: float = 0.1
    beta_max: float = 20.0
    paper: ClassVar[str] = "Ho et al. 2020, arXiv 2006.11239"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.beta_min <= 0 or self.beta_max <= 0:
            raise InputError(
                f"VP needs positive rates, got beta_min={self.beta_min}, beta_max={self.beta_max}."
            )

    def _integral(self, t: Tensor) -> Tensor:
        return self.beta_min * t + 0.5 * (self.beta_max - self.beta_min) * t.square()

    def alpha(self, t: Tensor) -> Tensor:
        return torch.exp(-0.5 * self._integral(t))

    def sigma(self, t: Tensor) -> Tensor:
        return (-torch.expm1(-self._integral(t))).sqrt()

    def drift(self, t: Tensor) -> Tensor:
        return -0.5 * self.diffusion2(t)

    def diffusion2(self, t: Tensor) -> Tensor:
        return self.beta_min + (self.beta_max - self.beta_min) * t


@dataclass(frozen=True)
class CosineVP(Process):
    """Variance preserving with alpha(t) = cos(angle(t)) / cos(angle(0)), angle linear in t, sigma^2 = 1 - alpha^2.

    Args:
        offset: Nichol's s, so that noise does not vanish linearly at t = 0; angle(0) = pi/2 * s/(1 + s).
        alpha_end: alpha(1) > 0. Nichol clips beta_k at 0.999 because alpha(1) = 0 has no finite rate; ending the
            angle where alpha = alpha_end keeps the chain's marginals and the process the same law instead.

    Source: Nichol & Dhariwal (2021), arXiv 2102.09672.
    """

    offset: float = 0.008
    alpha_end: float = 0.005
    paper: ClassVar[str] = "Nichol & Dhariwal 2021, arXiv 2102.09672"

    def __post_init__(self) -> None:
        super().__post_init__()
        if not (self.offset >= 0 and 0 < self.alpha_end < 1):
            raise InputError(f"CosineVP needs offset >= 0 and 0 < alpha_end < 1, got {self}.")

    def _angles(self) -> tuple[float, float]:
        first = 0.5 * math.pi * self.offset / (1 + self.offset)
        return first, math.acos(self.alpha_end * math.cos(first)) - first

    def _angle(self, t: Tensor) -> Tensor:
        first, span = self._angles()
        return first + span * t

    def alpha(self, t: Tensor) -> Tensor:
        return torch.cos(self._angle(t)) / math.cos(self._angles()[0])

    def sigma(self, t: Tensor) -> Tensor:
        # 1 - alpha^2 without cancellation: sin^2 angle - sin^2 angle(0), over cos^2 angle(0).
        first, span = self._angles()
        return (torch.sin(2 * first + span * t) * torch.sin(span * t)).clamp_min(0).sqrt() / math.cos(first)

    def drift(self, t: Tensor) -> Tensor:
        return -self._angles()[1] * torch.tan(self._angle(t))

    def diffusion2(self, t: Tensor) -> Tensor:
        return -2 * self.drift(t)


# --- one network, several names ---------------------------------------------------------------------------------


def denoiser_coefficients(process: Process, prediction: Prediction, t: Tensor) -> tuple[Tensor, Tensor]:
    """a, b with x0hat = a x_t + b output, for a network that predicts x_0, eps = (x_t - alpha x_0)/sigma or
    v = alpha eps - sigma x_0 (Salimans & Ho 2022, arXiv 2202.00512).

    >>> denoiser_coefficients(VP(), "x0", torch.tensor([0.3]))
    (tensor([0.]), tensor([1.]))
    """
    alpha, sigma = process.alpha(t), process.sigma(t)
    if prediction == "x0":
        return torch.zeros_like(alpha), torch.ones_like(alpha)
    if prediction == "eps":
        return 1 / alpha, -sigma / alpha
    if prediction == "v":
        total = alpha.square() + sigma.square()
        return alpha / total, -sigma / total
    raise InputError(f"Unknown prediction {prediction!r}; {did_you_mean(prediction, PREDICTIONS)}")


def score_from_denoised(process: Process, x_t: Tensor, x0hat: Tensor, t: Tensor) -> Tensor:
    """score of p_t at x_t = (alpha x0hat - x_t) / sigma^2 (Tweedie's formula, turned round)."""
    return (over_event(process.alpha(t), x_t) * x0hat - x_t) / over_event(process.sigma(t), x_t).square()


def eps_from_denoised(process: Process, x_t: Tensor, x0hat: Tensor, t: Tensor) -> Tensor:
    """eps = (x_t - alpha x0hat) / sigma."""
    return (x_t - over_event(process.alpha(t), x_t) * x0hat) / over_event(process.sigma(t), x_t)


# --- time grids -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Grid:
    """Times from 1 down to t_min as a smooth function of progress u in [0, 1].

    t(u) = (1 - u (1 - t_min^{1/power}))^power: power = 1 is uniform, 2 quadratic, denser near the data.

    >>> Grid(t_min=0.25, power=2.0).time(torch.tensor([0.0, 1.0]))
    tensor([1.0000, 0.2500])
    """

    t_min: float
    power: float = 1.0

    def time(self, u: Tensor) -> Tensor:
        """t at progress u."""
        return (1 - u * (1 - self.t_min ** (1 / self.power))) ** self.power

    def speed(self, u: Tensor) -> Tensor:
        """dt/du, negative."""
        span = 1 - self.t_min ** (1 / self.power)
        return -self.power * span * (1 - u * span) ** (self.power - 1)
