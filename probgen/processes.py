"""Noising laws: how data x_0 at t = 0 become noise at t = 1.

A process is q(x_t | x_0) = N(alpha(t) x_0, sigma(t)^2 I); everything else follows from alpha and sigma:
dx = f(t) x dt + g(t) dW with f = alpha'/alpha and g^2 = (sigma^2)' - 2 f sigma^2, the laws between two
times, and the posterior of an earlier point. Times are tensors `(n,)`; alpha and sigma return `(n,)`, or
`(n, *event)` for laws that differ by coordinate.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal, NamedTuple, Protocol, get_args

import torch
from torch import Tensor

from probgen.core import (
    Fraction,
    InputError,
    Probability,
    Within,
    check,
    check_choice,
    check_fields,
    did_you_mean,
)
from probgen.recorded import nameable

Prediction = Literal["x0", "eps", "v", "score", "velocity", "edm"]
PREDICTIONS: tuple[Prediction, ...] = get_args(Prediction)
Time = Annotated[float, Within(0, 1, why="0 is data, 1 is noise")]
_SHORTEST = 1e-9  # span of time over which a process may run
Rate = Annotated[float, Within(1e-6, 1_000_000)]
Exponent = Annotated[float, Within(0.01, 100)]
Weighting = Literal["sigma2", "g2", "uniform"]
WEIGHTINGS: tuple[Weighting, ...] = get_args(Weighting)


class Gaussian(NamedTuple):
    """A diagonal normal law, `loc` and `scale` broadcastable over `(batch, *event)`."""

    loc: Tensor
    scale: Tensor


def over_event(value: Tensor, x: Tensor) -> Tensor:
    """Shape a per-time value `(n,)` or `(n, *event)` so that it broadcasts over x `(n, *event)`."""
    return value.reshape(value.shape + (1,) * (x.ndim - value.ndim)).to(x)


@dataclass(frozen=True)
class Process:
    """A noising law given by `alpha` and `sigma`; subclasses write these two and, for exactness and speed, their rates.

    Args:
        t_min, t_max: the times between which engines evaluate a denoiser, 0 <= t_min < t_max <= 1. At t = 0 the score
            of data on a thin set is unbounded and eps-prediction divides 0 by 0, so t_min > 0 wherever sigma(0) = 0;
            where alpha(1) = 0, the drift of the SDE has no limit at t = 1, so t_max < 1. `ends` says which applies.

    Source: Song et al. (2021), arXiv 2011.13456; Kingma et al. (2021), arXiv 2107.00630.

    >>> p = VP()
    >>> t = torch.tensor([0.5], dtype=torch.float64)
    >>> bool(torch.isclose(p.alpha(t) ** 2 + p.sigma(t) ** 2, torch.ones(1, dtype=torch.float64)))
    True
    """

    t_min: Time = 1e-3
    t_max: Time = 1.0
    paper: ClassVar[str] = ""
    ends: ClassVar[str] = "sigma(0) = 0: scores are unbounded at t = 0"

    def __init_subclass__(cls) -> None:
        super().__init_subclass__()
        nameable(cls)

    def __post_init__(self) -> None:
        check_fields(self)
        if not 0 <= self.t_min < self.t_max - _SHORTEST <= 1:
            raise InputError(
                f"{type(self).__name__} needs 0 <= t_min < t_max <= 1, got t_min={self.t_min!r}, t_max={self.t_max!r}."
            )
        if self.t_min == 0 and not self._noisy_at_zero():
            raise InputError(f"{type(self).__name__} needs t_min > 0: {self.ends}.")

    def _noisy_at_zero(self) -> bool:
        return False

    def alpha(self, t: Tensor) -> Tensor:
        """alpha(t), the factor on x_0."""
        raise NotImplementedError

    def sigma(self, t: Tensor) -> Tensor:
        """sigma(t), the standard deviation of the noise."""
        raise NotImplementedError

    def alpha_rate(self, t: Tensor) -> Tensor:
        """alpha'(t)."""
        return _derivative(self.alpha, t)

    def variance_rate(self, t: Tensor) -> Tensor:
        """(sigma^2)'(t), finite where sigma' is not."""
        return _derivative(lambda s: self.sigma(s).square(), t)

    def sigma_rate(self, t: Tensor) -> Tensor:
        """sigma'(t) = (sigma^2)'(t) / (2 sigma(t)), infinite at t = 0 where sigma grows as a root of t."""
        return self.variance_rate(t) / (2 * self.sigma(t))

    def drift(self, t: Tensor) -> Tensor:
        """f(t) = alpha'(t) / alpha(t)."""
        return self.alpha_rate(t) / self.alpha(t)

    def diffusion2(self, t: Tensor) -> Tensor:
        """g(t)^2 = (sigma^2)' - 2 f sigma^2."""
        return self.variance_rate(t) - 2 * self.drift(t) * self.sigma(t).square()

    def snr(self, t: Tensor) -> Tensor:
        """Signal-to-noise ratio alpha^2 / sigma^2."""
        return (self.alpha(t) / self.sigma(t)).square()

    def time_at(self, ratio: Tensor) -> Tensor:
        """The time t in [t_min, t_max] at which sigma(t)/alpha(t) = ratio `(n,)`, by bisection."""
        low, high = (torch.full_like(ratio, end) for end in (self.t_min, self.t_max))
        for _ in range(60):
            middle = 0.5 * (low + high)
            above = self.sigma(middle) > ratio * self.alpha(middle)
            low, high = torch.where(above, low, middle), torch.where(above, middle, high)
        return 0.5 * (low + high)

    def terminal_scale(self) -> Tensor:
        """Standard deviation of the terminal law N(0, sigma(t_max)^2), from which engines start: `()` or `(*event)`."""
        return self.sigma(torch.full((1,), self.t_max, dtype=torch.float64))[0]

    def weight(self, t: Tensor, weighting: Weighting = "sigma2") -> Tensor:
        """lambda(t) of the loss lambda |score + eps/sigma|^2: sigma^2, g^2 (which bounds the likelihood) or 1."""
        if weighting == "sigma2":
            return self.sigma(t).square()
        if weighting == "g2":
            return self.diffusion2(t)
        if weighting == "uniform":
            return torch.ones_like(self.sigma(t))
        raise InputError(f"Unknown weighting {weighting!r}; {did_you_mean(weighting, WEIGHTINGS)}")

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

    beta_min: Rate = 0.1
    beta_max: Rate = 20.0
    paper: ClassVar[str] = "Ho et al. 2020, arXiv 2006.11239"

    def _beta(self, t: Tensor) -> Tensor:
        return self.beta_min + (self.beta_max - self.beta_min) * t

    def _integral(self, t: Tensor) -> Tensor:
        return self.beta_min * t + 0.5 * (self.beta_max - self.beta_min) * t.square()

    def alpha(self, t: Tensor) -> Tensor:
        return torch.exp(-0.5 * self._integral(t))

    def sigma(self, t: Tensor) -> Tensor:
        return (-torch.expm1(-self._integral(t))).sqrt()

    def alpha_rate(self, t: Tensor) -> Tensor:
        return -0.5 * self._beta(t) * self.alpha(t)

    def variance_rate(self, t: Tensor) -> Tensor:
        return self._beta(t) * self.alpha(t).square()

    def drift(self, t: Tensor) -> Tensor:
        return -0.5 * self._beta(t)

    def diffusion2(self, t: Tensor) -> Tensor:
        return self._beta(t)


@dataclass(frozen=True)
class SubVP(VP):
    """Below variance preserving: alpha as `VP`, sigma = 1 - alpha^2, g^2 = beta (1 - exp(-2 int_0^t beta)).

    Args:
        beta_min, beta_max: rates at t = 0 and t = 1, > 0.

    Source: Song et al. (2021), arXiv 2011.13456, appendix B.

    >>> t = torch.tensor([0.4])
    >>> bool(SubVP().sigma(t) < VP().sigma(t))
    True
    """

    paper: ClassVar[str] = "Song et al. 2021, arXiv 2011.13456"

    def sigma(self, t: Tensor) -> Tensor:
        return -torch.expm1(-self._integral(t))

    def variance_rate(self, t: Tensor) -> Tensor:
        return 2 * self.sigma(t) * self.sigma_rate(t)

    def sigma_rate(self, t: Tensor) -> Tensor:
        return self._beta(t) * self.alpha(t).square()

    def diffusion2(self, t: Tensor) -> Tensor:
        return -self._beta(t) * torch.expm1(-2 * self._integral(t))


@dataclass(frozen=True)
class CosineVP(Process):
    """Variance preserving with alpha(t) = cos(angle(t)) / cos(angle(0)), angle linear in t, sigma^2 = 1 - alpha^2.

    Args:
        offset: Nichol's s, so that noise does not vanish linearly at t = 0; angle(0) = pi/2 * s/(1 + s).
        alpha_end: alpha(1) > 0. Nichol clips beta_k at 0.999 because alpha(1) = 0 has no finite rate; ending the
            angle where alpha = alpha_end keeps the chain's marginals and the process the same law instead.

    Source: Nichol & Dhariwal (2021), arXiv 2102.09672.
    """

    offset: Probability = 0.008
    alpha_end: Fraction = 0.005
    paper: ClassVar[str] = "Nichol & Dhariwal 2021, arXiv 2102.09672"

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

    def alpha_rate(self, t: Tensor) -> Tensor:
        return self.drift(t) * self.alpha(t)

    def variance_rate(self, t: Tensor) -> Tensor:
        return -2 * self.alpha_rate(t) * self.alpha(t)

    def drift(self, t: Tensor) -> Tensor:
        return -self._angles()[1] * torch.tan(self._angle(t))

    def diffusion2(self, t: Tensor) -> Tensor:
        return -2 * self.drift(t)


@dataclass(frozen=True)
class VE(Process):
    """Variance exploding: alpha = 1, sigma = sigma_min (sigma_max/sigma_min)^t, g^2 = d sigma^2/dt.

    Args:
        t_min: as for `Process`, 0 by default: sigma_min > 0 is clamp enough.
        sigma_min: noise left on the data at t = 0, > 0, in units of the data.
        sigma_max: noise at t = 1, > sigma_min; as wide as the largest distance between two data, or the terminal law
            N(0, sigma_max^2) is not that of x_1.

    Source: Song & Ermon (2019), arXiv 1907.05600; Song et al. (2021), arXiv 2011.13456.

    >>> VE(sigma_min=0.01, sigma_max=100.0).sigma(torch.tensor([0.5]))
    tensor([1.])
    """

    t_min: Time = 0.0
    sigma_min: Rate = 0.01
    sigma_max: Rate = 50.0
    paper: ClassVar[str] = "Song et al. 2021, arXiv 2011.13456"
    ends: ClassVar[str] = "sigma(0) = sigma_min > 0: no end needs a clamp"

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.sigma_min < self.sigma_max:
            raise InputError(
                f"{type(self).__name__} needs sigma_min < sigma_max, got {self.sigma_min!r} and {self.sigma_max!r}."
            )

    def _noisy_at_zero(self) -> bool:
        return True

    def alpha(self, t: Tensor) -> Tensor:
        return torch.ones_like(t)

    def sigma(self, t: Tensor) -> Tensor:
        return self.sigma_min * (self.sigma_max / self.sigma_min) ** t

    def alpha_rate(self, t: Tensor) -> Tensor:
        return torch.zeros_like(t)

    def variance_rate(self, t: Tensor) -> Tensor:
        return 2 * math.log(self.sigma_max / self.sigma_min) * self.sigma(t).square()


@dataclass(frozen=True)
class EDM(VE):
    """alpha = 1 and sigma itself on a power grid: sigma(t) = (sigma_min^{1/rho} + t (sigma_max^{1/rho} - ...))^rho.

    Uniform steps of t are then Karras's steps of sigma, and t is a good input for a network at every noise level.

    Args:
        sigma_min, sigma_max: noise at t = 0 and t = 1, 0 < sigma_min < sigma_max, in units of the data.
        rho: > 0; 7 by default.

    Source: Karras et al. (2022), arXiv 2206.00364, eq. 5.

    >>> EDM().sigma(torch.tensor([0.0, 1.0], dtype=torch.float64))
    tensor([2.0000e-03, 8.0000e+01], dtype=torch.float64)
    """

    sigma_min: Rate = 0.002
    sigma_max: Rate = 80.0
    rho: Exponent = 7.0
    paper: ClassVar[str] = "Karras et al. 2022, arXiv 2206.00364"

    def _root(self, t: Tensor) -> tuple[Tensor, float]:
        first, last = (sigma ** (1 / self.rho) for sigma in (self.sigma_min, self.sigma_max))
        return first + t * (last - first), last - first

    def sigma(self, t: Tensor) -> Tensor:
        return self._root(t)[0] ** self.rho

    def variance_rate(self, t: Tensor) -> Tensor:
        root, speed = self._root(t)
        return 2 * self.rho * speed * root ** (2 * self.rho - 1)


@dataclass(frozen=True)
class OU(Process):
    """Ornstein-Uhlenbeck, dx = -theta x d tau + s dW with tau = t tau_max.

    alpha = exp(-theta tau), sigma^2 = s^2 (1 - exp(-2 theta tau)) / (2 theta), f = -theta tau_max, g^2 = s^2 tau_max.

    Args:
        t_min: as for `Process`; early, for noise comes fast: sigma(1e-3) would already be 0.1 by default.
        theta: rate of reversion, > 0; s: diffusion, > 0; tau_max: length of the process, > 0.

    Source: Uhlenbeck & Ornstein (1930), Physical Review 36; as noising law Song et al. (2021), arXiv 2011.13456.

    >>> bool(torch.isclose(OU(tau_max=2.0).alpha(torch.tensor([0.5])), torch.tensor([-1.0]).exp()))
    True
    """

    t_min: Time = 1e-5
    theta: Rate = 1.0
    s: Rate = 2**0.5
    tau_max: Rate = 5.0
    paper: ClassVar[str] = "Uhlenbeck & Ornstein 1930, Physical Review 36"

    def alpha(self, t: Tensor) -> Tensor:
        return torch.exp(-self.theta * self.tau_max * t)

    def sigma(self, t: Tensor) -> Tensor:
        return self.s * (-torch.expm1(-2 * self.theta * self.tau_max * t) / (2 * self.theta)).sqrt()

    def alpha_rate(self, t: Tensor) -> Tensor:
        return self.drift(t) * self.alpha(t)

    def variance_rate(self, t: Tensor) -> Tensor:
        return self.diffusion2(t) * self.alpha(t).square()

    def drift(self, t: Tensor) -> Tensor:
        return torch.full_like(t, -self.theta * self.tau_max)

    def diffusion2(self, t: Tensor) -> Tensor:
        return torch.full_like(t, self.s**2 * self.tau_max)


@dataclass(frozen=True)
class OTPath(Process):
    """The straight path of rectified flow: alpha = 1 - t, sigma = t, g^2 = 2t/(1 - t); velocity x_1 - x_0.

    Source: Liu et al. (2022), arXiv 2209.03003; Lipman et al. (2022), arXiv 2210.02747 (whose time is 1 - t).

    >>> OTPath().diffusion2(torch.tensor([0.5]))
    tensor([2.])
    """

    t_max: Time = 0.999
    paper: ClassVar[str] = "Lipman et al. 2022, arXiv 2210.02747"
    ends: ClassVar[str] = (
        "sigma(0) = 0: scores are unbounded at t = 0; alpha(1) = 0: f and g^2 are unbounded at t = 1"
    )

    def alpha(self, t: Tensor) -> Tensor:
        return 1 - t

    def sigma(self, t: Tensor) -> Tensor:
        return t.clone()

    def alpha_rate(self, t: Tensor) -> Tensor:
        return -torch.ones_like(t)

    def variance_rate(self, t: Tensor) -> Tensor:
        return 2 * t

    def sigma_rate(self, t: Tensor) -> Tensor:
        return torch.ones_like(t)

    def diffusion2(self, t: Tensor) -> Tensor:
        return 2 * t / (1 - t)


# --- one network, several names ---------------------------------------------------------------------------------
# Whatever a network predicts is affine in (x_t, x_0): output = on_x_t x_t + on_x_0 x_0. One table, read both ways.


def _output_coefficients(process: Process, prediction: Prediction, t: Tensor) -> tuple[Tensor, Tensor]:
    alpha, sigma = process.alpha(t), process.sigma(t)
    if prediction == "x0":
        return torch.zeros_like(alpha), torch.ones_like(alpha)
    if prediction == "eps":
        return 1 / sigma, -alpha / sigma
    if prediction == "v":
        return alpha / sigma, -(alpha.square() + sigma.square()) / sigma
    if prediction == "score":
        return -1 / sigma.square(), alpha / sigma.square()
    if prediction == "velocity":
        return velocity_coefficients(process, t)
    if prediction == "edm":
        total = alpha.square() + sigma.square()
        return -alpha / (sigma * total.sqrt()), total.sqrt() / sigma
    raise InputError(f"Unknown prediction {prediction!r}; {did_you_mean(str(prediction), PREDICTIONS)}")


def denoiser_coefficients(process: Process, prediction: Prediction, t: Tensor) -> tuple[Tensor, Tensor]:
    """a, b with x0hat = a x_t + b output, for a network that predicts one of

    x_0 ("x0"), eps = (x_t - alpha x_0)/sigma, v = alpha eps - sigma x_0 (Salimans & Ho 2022, arXiv 2202.00512), the
    "score" -eps/sigma, the "velocity" alpha' x_0 + sigma' eps, or Karras's unit-scaled "edm" output F, here
    x0hat = (alpha x_t + sigma sqrt(alpha^2 + sigma^2) F)/(alpha^2 + sigma^2) (Karras et al. 2022, arXiv 2206.00364).

    >>> denoiser_coefficients(VP(), "x0", torch.tensor([0.3]))[1]
    tensor([1.])
    """
    on_x_t, on_x_0 = _output_coefficients(process, prediction, t)
    return -on_x_t / on_x_0, 1 / on_x_0


def output_from_denoised(
    process: Process, prediction: Prediction, x_t: Tensor, x0hat: Tensor, t: Tensor
) -> Tensor:
    """What a network of this `prediction` says where its denoiser says x0hat: the inverse of `denoiser_coefficients`.

    >>> x, x0hat, t = torch.randn(3, 2), torch.randn(3, 2), torch.rand(3)
    >>> torch.equal(output_from_denoised(VP(), "x0", x, x0hat, t), x0hat)
    True
    """
    on_x_t, on_x_0 = _output_coefficients(process, prediction, t)
    return over_event(on_x_t, x_t) * x_t + over_event(on_x_0, x_t) * x0hat


def velocity_coefficients(process: Process, t: Tensor) -> tuple[Tensor, Tensor]:
    """Factors on x_t and x0hat of the probability flow, dx_t/dt = alpha' x0hat + sigma' (x_t - alpha x0hat)/sigma.

    Equal to f x - 1/2 g^2 score, without the infinities of f and g^2 where alpha = 0.
    """
    growth = process.variance_rate(t) / (2 * process.sigma(t).square())
    return growth, process.alpha_rate(t) - growth * process.alpha(t)


def score_from_denoised(process: Process, x_t: Tensor, x0hat: Tensor, t: Tensor) -> Tensor:
    """score of p_t at x_t = (alpha x0hat - x_t) / sigma^2 (Tweedie's formula, turned round)."""
    return output_from_denoised(process, "score", x_t, x0hat, t)


def eps_from_denoised(process: Process, x_t: Tensor, x0hat: Tensor, t: Tensor) -> Tensor:
    """eps = (x_t - alpha x0hat) / sigma."""
    return output_from_denoised(process, "eps", x_t, x0hat, t)


# --- time grids -------------------------------------------------------------------------------------------------


class Schedule(NamedTuple):
    """Times as a smooth function of progress u in [0, 1], from t_max down to t_min, with dt/du; float64 in and out."""

    time: Callable[[Tensor], Tensor]
    speed: Callable[[Tensor], Tensor]


class Grid(Protocol):
    """How steps are spread over time. Yours is any object with this method."""

    def between(self, t_max: float, t_min: float, process: Process | None) -> Schedule:
        """The schedule from t_max down to t_min; `process` is None for flows whose noise is no Gaussian."""


@nameable
@dataclass(frozen=True)
class Power:
    """t(u)^{1/exponent} linear in u: 1 is uniform, 2 quadratic, denser near the data; `exponent` > 0.

    >>> Power(2.0).between(1.0, 0.25, None).time(torch.tensor([0.0, 1.0]))
    tensor([1.0000, 0.2500])
    """

    exponent: Exponent = 1.0

    def __post_init__(self) -> None:
        check_fields(self)

    def between(self, t_max: float, t_min: float, process: Process | None) -> Schedule:
        """See `Grid.between`."""
        p = self.exponent
        first, span = t_max ** (1 / p), t_min ** (1 / p) - t_max ** (1 / p)
        return Schedule(lambda u: (first + u * span) ** p, lambda u: p * span * (first + u * span) ** (p - 1))


@nameable
@dataclass(frozen=True)
class Karras:
    """(sigma/alpha)^{1/rho} linear in u, most steps at small noise; `rho` > 0, 7 by default.

    Source: Karras et al. (2022), arXiv 2206.00364, eq. 5.

    >>> Karras().between(1.0, 1e-3, VP()).time(torch.tensor([0.0, 1.0], dtype=torch.float64))
    tensor([1.0000, 0.0010], dtype=torch.float64)
    """

    rho: Exponent = 7.0

    def __post_init__(self) -> None:
        check_fields(self)

    def between(self, t_max: float, t_min: float, process: Process | None) -> Schedule:
        """See `Grid.between`."""
        law, first, last = _noise_ratios("Karras", t_max, t_min, process)
        first, last = first ** (1 / self.rho), last ** (1 / self.rho)

        def root(u: Tensor) -> Tensor:
            return first + u * (last - first)

        return _through_ratio(
            law,
            lambda u: root(u) ** self.rho,
            lambda u: self.rho * (last - first) * root(u) ** (self.rho - 1),
        )


@nameable
@dataclass(frozen=True)
class LogSNR:
    """log(alpha/sigma) linear in u: the limit of `Karras` as rho grows.

    Source: Lu et al. (2022), arXiv 2206.00927, section 3.

    >>> LogSNR().between(1.0, 1e-3, VP()).time(torch.tensor([0.0, 1.0], dtype=torch.float64))
    tensor([1.0000, 0.0010], dtype=torch.float64)
    """

    def between(self, t_max: float, t_min: float, process: Process | None) -> Schedule:
        """See `Grid.between`."""
        law, first, last = _noise_ratios("logSNR", t_max, t_min, process)

        def ratio(u: Tensor) -> Tensor:
            return first * (last / first) ** u

        return _through_ratio(law, ratio, lambda u: math.log(last / first) * ratio(u))


def _noise_ratios(
    grid: str, t_max: float, t_min: float, process: Process | None
) -> tuple[Process, float, float]:
    """The process with sigma/alpha at both ends, for grids that need one number a time."""
    if process is None:
        raise InputError(
            f'The {grid} grid needs sigma/alpha of a process; this flow has none: use grid="uniform".'
        )
    ends = torch.tensor([t_max, t_min], dtype=torch.float64)
    ratios = process.sigma(ends) / process.alpha(ends)
    if ratios.ndim > 1:
        raise InputError(
            f'The {grid} grid needs one sigma a time; this process has more: use grid="quadratic".'
        )
    return process, *ratios.tolist()


def _through_ratio(
    process: Process, ratio: Callable[[Tensor], Tensor], ratio_speed: Callable[[Tensor], Tensor]
) -> Schedule:
    """t(u) where sigma/alpha = ratio(u)."""

    def speed(u: Tensor) -> Tensor:
        t, r = process.time_at(ratio(u)), ratio(u)
        # d(sigma/alpha)/dt = g^2 / (2 alpha^2 (sigma/alpha))
        rate = process.diffusion2(t) / (2 * process.alpha(t).square() * r)
        return ratio_speed(u) / rate

    return Schedule(lambda u: process.time_at(ratio(u)), speed)


GRIDS: dict[str, Grid] = {
    "uniform": Power(1.0),
    "quadratic": Power(2.0),
    "karras": Karras(),
    "logsnr": LogSNR(),
}


def as_grid(grid: Grid | str) -> Grid:
    """A grid by its name, "uniform", "quadratic", "karras" or "logsnr", or the grid itself.

    >>> as_grid("quadratic")
    Power(exponent=2.0)
    """
    check("grid", grid, Grid | str)
    if not isinstance(grid, str):
        return grid
    check_choice("grid", grid, GRIDS)
    return GRIDS[grid]


def check_times(name: str, t: Tensor, low: float = 0.0, high: float = 1.0) -> None:
    """Raise `InputError` unless every time lies in [low, high]: time 0 is data, 1 is noise."""
    bad = (t < low) | (t > high) | t.isnan()
    if bool(bad.any()):
        raise InputError(
            f"{name}: times must lie in [{low:g}, {high:g}] (0 is data, 1 is noise), "
            f"got {t[bad].flatten()[0].item():g}."
        )
