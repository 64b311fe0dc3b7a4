"""How observations bend the path of a diffusion: approximations of log p(y | x_t) and its gradient."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor

from probgen.core import InputError, Method, Positive
from probgen.priors.conditioned import Conditioned, Covariance, Isotropic, Marginal


class Denoised(NamedTuple):
    """What one network call, and one of the classifier where there is one, say at x_t.

    Args:
        x_t, x_0: x_t and E[x_0 | x_t, c], `(n, *shape)`, c what `NoiseAware` sites saw.
        t: the time; `alpha`, `sigma` there.
        pullback: (d x_0 / d x_t)' g for g `(n, *shape)`; for several at once, `(m, n, *shape)`.
        prior_x_0: E[x_0 | x_t].
        aware: log p(c | x_t, t) and its gradient in x_t; None where there is no such c.
    """

    x_t: Tensor
    x_0: Tensor
    t: float
    alpha: float
    sigma: float
    pullback: Callable[[Tensor], Tensor]
    prior_x_0: Tensor
    aware: Marginal | None


class Guided(NamedTuple):
    """What a guidance says at x_t.

    Args:
        x_0: E[x_0 | x_t] of the prior, `(n, *shape)`.
        log_prob: approximate log p(y, z | x_t), `(n,)`.
        grad: what is added to the score of p(x_t), `(n, *shape)`: for a `twist`, the gradient of `log_prob` in x_t.
        seen_from: E[x_0 | x_t, c], at which observations were linearised; x_0 itself without `NoiseAware` sites.
        covariance: Cov[x_0 | x_t, c] as it was taken: other z can be tried with it at no network call, by
            `conditioned.marginal(seen_from, covariance, z)`.
    """

    x_0: Tensor
    log_prob: Tensor
    grad: Tensor
    seen_from: Tensor
    covariance: Covariance


@dataclass(frozen=True)
class Guidance(Method):
    """log p(y | x_t) by a Gaussian law of x_0 given x_t: N(x_0hat, C). Subclasses say what C is.

    log p(y | x_t) = log int p(y | x) N(x; x_0hat, C) dx, observations linearised at x_0hat. The gradient goes through
    the network, C held fixed. `NoiseAware` sites are asked at x_t itself, and move x_0hat before the others see it:
    E[x_0 | x_t, c] = E[x_0 | x_t] + (sigma^2/alpha) grad log p(c | x_t). Errors of a network are bounded: `not_beyond`.
    """

    twist: ClassVar[bool] = True
    """Whether `log_prob` tends to log p(y | x_0) as t goes to 0, so that particles can be weighted by it."""
    num_calls: ClassVar[int] = 1
    """Network calls each time it is asked."""

    @property
    def smooth(self) -> bool:
        """Whether x_0hat + (sigma^2/alpha) grad is a smooth function of time, so that steps may look back on it."""
        return True

    def covariance(self, conditioned: Conditioned, look: Denoised) -> Covariance:
        """Cov[x_0 | x_t]."""
        raise NotImplementedError

    def __call__(self, conditioned: Conditioned, x_t: Tensor, t: float, z: Tensor | None = None) -> Guided:
        """What is known at x_t `(n, *shape)`, one time t for all, and other latents z `(n, k)`: one network call."""
        look = self.look(conditioned, x_t, t)
        covariance = self.covariance(conditioned, look)
        seen = self.seen(conditioned, look.x_0, covariance, z)
        log_prob, grad = seen.log_prob, look.pullback(seen.grad)
        if seen.residual is not None and seen.jacobian is not None:
            move = look.sigma**2 / look.alpha * grad
            grad = grad * over_rows(not_beyond(move, seen.residual, seen.jacobian), grad)
        if look.aware is not None:
            log_prob, grad = log_prob + look.aware.log_prob, grad + look.aware.grad
        return Guided(look.prior_x_0, log_prob, grad, look.x_0, covariance)

    def look(self, conditioned: Conditioned, x_t: Tensor, t: float) -> Denoised:
        """One network call at x_t, and one of the classifier where there is one."""
        return denoised(conditioned, x_t, t)

    def seen(
        self, conditioned: Conditioned, x_0: Tensor, covariance: Covariance, z: Tensor | None
    ) -> Marginal:
        """log p(y, z | x_t) but for the `NoiseAware` sites, and its gradient in x_0hat."""
        return conditioned.marginal(x_0, covariance, z)

    def shift(self, guided: Guided, factor: float) -> Tensor:
        """By how much a step moves the mean of x_s: factor grad, where factor is that of the score."""
        return factor * guided.grad


def denoised(conditioned: Conditioned, x_t: Tensor, t: float, aware_scale: float = 1.0) -> Denoised:
    """One network call at x_t `(n, *shape)`, to be differentiated; log p(c | x_t, t) counts `aware_scale` times."""
    alpha, sigma = level(conditioned, t)
    with torch.enable_grad():
        x_t = x_t.detach().requires_grad_()
        prior_x_0 = x_0 = conditioned.denoised(x_t, t)
        aware = conditioned.log_aware(x_t, t)
        if aware is not None:
            aware = Marginal(aware_scale * aware.log_prob, aware_scale * aware.grad)
            x_0 = prior_x_0 + sigma**2 / alpha * aware.grad
            aware = Marginal(aware.log_prob.detach(), aware.grad.detach())

    def pullback(g: Tensor) -> Tensor:
        batched = g.ndim > x_0.ndim
        found = torch.autograd.grad(x_0, x_t, g, retain_graph=True, is_grads_batched=batched)
        return found[0]

    return Denoised(x_t.detach(), x_0.detach(), t, alpha, sigma, pullback, prior_x_0.detach(), aware)


def not_beyond(move: Tensor, residual: Tensor, jacobian: Tensor) -> Tensor:
    """The factor in (0, 1] on a move of x_0hat `(n, *shape)` so that |J move| <= |r|, whitened: `(n,)`.

    The exact E[x_0 | x_t, y] - x_0hat of a Gaussian, C J' S^-1 r, has J C J' S^-1 r = (1 - S^-1) r: it never takes what
    is predicted farther than what was seen is away. (sigma^2/alpha) d x_0hat/d x_t of a network is C and an error that
    sigma^2/alpha makes huge at early times.
    """
    flat = move.reshape(len(move), -1).to(jacobian)
    seen = flat @ jacobian.mT if jacobian.ndim == 2 else (jacobian @ flat[..., None])[..., 0]
    reached = seen.norm(dim=1)
    allowed = residual.norm(dim=1)
    return torch.where(reached > allowed, allowed / reached, 1.0).to(move)


def over_rows(factor: Tensor, x: Tensor) -> Tensor:
    """`(n,)` as it multiplies `(n, *shape)`."""
    return factor.reshape(-1, *[1] * (x.ndim - 1))


def level(conditioned: Conditioned, t: float) -> tuple[float, float]:
    """alpha and sigma at t; `InputError` for processes in which they differ by coordinate."""
    at = torch.full((1,), t, dtype=torch.float64)
    alpha, sigma = conditioned.process.alpha(at), conditioned.process.sigma(at)
    if alpha.numel() > 1 or sigma.numel() > 1:
        raise InputError(
            f"The process of {conditioned.prior} noises each coordinate by a law of its own; guidance knows one alpha "
            "and one sigma a time. Use HMC(space='noise')."
        )
    return float(alpha), float(sigma)


@dataclass(frozen=True)
class PiGDM(Guidance):
    """Pseudo-inverse guidance: C = r_t^2 I, r_t^2 = s^2 sigma^2 / (alpha^2 s^2 + sigma^2), exact for x_0 ~ N(m, s^2 I).

    Args:
        prior_scale: s > 0, about the standard deviation of one coordinate of the data.

    Source: Song et al. (2023), "Pseudoinverse-guided diffusion models for inverse problems", ICLR; the formula for r_t
    is their appendix A.3.

    >>> PiGDM().prior_scale
    1.0
    """

    prior_scale: Positive = 1.0
    paper: ClassVar[str] = "Song et al. 2023, ICLR (PiGDM)"
    offers: ClassVar[str] = "the exact spread of x_0 for white Gaussian data; one network call a step"
    gives_up: ClassVar[str] = "the correlations of x_0 given x_t"

    def covariance(self, conditioned: Conditioned, look: Denoised) -> Covariance:
        """See `Guidance.covariance`."""
        s2, sigma2 = self.prior_scale**2, look.sigma**2
        return Isotropic(s2 * sigma2 / (look.alpha**2 * s2 + sigma2))


@dataclass(frozen=True)
class Jensen(Guidance):
    """log p(y | x_t) taken to be log p(y | E[x_0 | x_t]): C = 0.

    Source: Chung et al. (2023), arXiv 2209.14687, eq. 7.

    >>> Jensen().twist
    True
    """

    paper: ClassVar[str] = "Chung et al. 2023, arXiv 2209.14687"
    offers: ClassVar[str] = "any likelihood; one network call a step"
    gives_up: ClassVar[str] = "the spread of x_0 given x_t: far too sure of itself at early times"

    def covariance(self, conditioned: Conditioned, look: Denoised) -> Covariance:
        """See `Guidance.covariance`."""
        return Isotropic(0.0)
