"""A noisy copy v = x + rho z of a prior's draw x: drawn towards what was observed, and back to the prior.

With x ~ p and v ~ N(x, rho^2 I), x given v needs the prior alone (`draw_prior`), and v given x what was observed alone
(`Pull`). Where observations are Gaussian and linear, both together leave p(x | y) as it is, whatever rho up to a bound.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import NamedTuple

import torch
from torch import Tensor

from probgen.core import InputError
from probgen.priors.conditioned import Conditioned, Isotropic
from probgen.processes import Process

# --- x given v: the prior alone -----------------------------------------------------------------------------------


class Level(NamedTuple):
    """A noise level sigma/alpha, the time at which it is reached, and alpha there."""

    ratio: float
    t: float
    alpha: float


def noise_range(process: Process) -> tuple[float, float]:
    """sigma/alpha at t_min and t_max: the noise on x_0 that the prior knows, in units of the data.

    Raises `InputError` for processes in which it differs by coordinate.

    >>> from probgen.processes import EDM
    >>> noise_range(EDM())
    (0.002, 80.0)
    """
    ends = torch.tensor([process.t_min, process.t_max], dtype=torch.float64)
    ratio = process.sigma(ends) / process.alpha(ends)
    if ratio.ndim > 1:
        raise InputError(
            f"{process} noises each coordinate by a law of its own; a copy x + rho z has one level of noise for all. "
            "An engine that does without: HMC(space='noise')."
        )
    low, high = ratio.tolist()
    return float(f"{low:.12g}"), float(f"{high:.12g}")


def levels(process: Process, rho: float, num_steps: int) -> list[Level]:
    """Noise levels from rho down to that at t_min, `num_steps` + 1 of them, their square roots evenly spaced.

    Raises `InputError` for a rho that the process does not reach.

    >>> from probgen.processes import VP
    >>> [round(level.ratio, 3) for level in levels(VP(), 0.5, 2)]
    [0.5, 0.164, 0.01]
    """
    low, high = noise_range(process)
    if not low < rho <= high:
        raise InputError(
            f"The prior knows noise (sigma/alpha) from {low:.3g} at t_min to {high:.3g} at t_max, in units of its "
            f"data; rho is {rho:.3g}. Observations with less noise than that need a process with a smaller t_min."
        )
    ratios = torch.linspace(math.sqrt(rho), math.sqrt(low), num_steps + 1, dtype=torch.float64).square()
    times = process.time_at(ratios)
    columns = (ratios.tolist(), times.tolist(), process.alpha(times).tolist())
    return [Level(*row) for row in zip(*columns, strict=True)]


def draw_prior(conditioned: Conditioned, v: Tensor, path: list[Level], noises: Iterable[Tensor]) -> Tensor:
    """x ~ p(x | v) where v = x + rho z, x ~ p: the reverse diffusion from the level rho, unguided.

    For u = x_t/alpha_t = x_0 + r z, r = sigma_t/alpha_t, the step from r to r' < r is

        u' = s u + (1 - s) x_0hat + r' sqrt(1 - s) z,    s = (r'/r)^2,

    the law q(u' | u, x_0) at x_0 = x_0hat. Its mean is right, for x_0hat is a martingale along the path; its variance
    lacks (1 - s)^2 Cov[x_0 | u], where Cov[x_0 | u] = r^2 dx_0hat/du. So x_0hat is asked for again where this step
    arrives, and (1 - s) (x_0hat' - x_0hat) / (2 s) added: its covariance with the noise is what was lacking, to first
    order. x_0hat' then serves for the next step, so that the prior is asked once a step.

    On x ~ N(0, a^2 I), a from 0.3 to 3 and rho 0.45 or 2, standard deviations are 0.5 to 3 % too small with 20 steps
    and 0.2 to 0.7 % with 40; without the correction it is 8 to 20 % and 5 to 10 %.

    Args:
        conditioned: whose prior it is.
        v: `(n, *shape)`.
        path: `levels` from rho down.
        noises: standard normals of the shape of v, one for each step.

    Returns x `(n, *shape)`; there were `len(path)` network calls.

    Source: the reverse diffusion of Song et al. (2021), arXiv 2011.13456; evaluating once where a step arrives, as
    predict-evaluate-correct methods do, is from Xue et al. (2023), arXiv 2305.14267, the weights are ours.
    """
    u, x_0 = v, conditioned.denoised(path[0].alpha * v, path[0].t)
    for level, lower, z in zip(path, path[1:], noises, strict=False):
        shrink = (lower.ratio / level.ratio) ** 2
        u = shrink * u + lower.ratio * math.sqrt(1 - shrink) * z + (1 - shrink) * x_0
        ahead = conditioned.denoised(lower.alpha * u, lower.t)
        u = u + (1 - shrink) / (2 * shrink) * (ahead - x_0)
        x_0 = ahead
    return x_0


# --- v given x: what was observed ---------------------------------------------------------------------------------


class Near(NamedTuple):
    """log p(y, z | x + d) for small d, Gaussian sites linearised: log_lik - (|r - J d|^2 - |r|^2)/2 + slope d.

    Args:
        log_lik: log p(y, z | x), `(n,)`.
        slope: gradient of all that is not Gaussian, `(n, size)`.
        along: U' r, r the whitened residual and J = U diag(s) V', `(n, k)`.
        singular: s, `(k,)` or `(n, k)`.
        right: V', `(k, size)` or `(n, k, size)`.
    """

    log_lik: Tensor
    slope: Tensor
    along: Tensor
    singular: Tensor
    right: Tensor

    def tempered(self, beta: float) -> Near:
        """The same of beta log p(y, z | x)."""
        root = math.sqrt(beta)
        return Near(
            beta * self.log_lik, beta * self.slope, root * self.along, root * self.singular, self.right
        )

    def in_rows(self, d: Tensor) -> Tensor:
        """V' d: `(n, size)` -> `(n, k)`."""
        return (self.right @ d[..., None])[..., 0]

    def back(self, a: Tensor) -> Tensor:
        """V a: `(n, k)` -> `(n, size)`."""
        return (a[:, None] @ self.right)[:, 0]


def near(conditioned: Conditioned, x: Tensor, z: Tensor | None = None) -> Near:
    """What is known at x `(n, *shape)` and z `(n, k)`; two gradients of the program where it is not linear."""
    linear = conditioned.linear
    if linear is not None:
        log_lik = conditioned.marginal(x, Isotropic(0.0)).log_prob
        flat = x.reshape(len(x), -1).to(linear.offset)
        residual = linear.offset.repeat(len(x) // len(linear.offset), 1) - flat @ linear.jacobian.mT
        return Near(log_lik, torch.zeros_like(flat), residual @ linear.left, linear.singular, linear.right)
    seen = conditioned.log_lik(x, z)
    # Where the program fails nothing pulls: chains leave such places as soon as the prior leads them out.
    residual, jacobian = (part.nan_to_num(0.0, 0.0, 0.0) for part in conditioned.linearised(x, z))
    grad = seen.grad.reshape(len(x), -1).nan_to_num(0.0, 0.0, 0.0)
    left, singular, right = torch.linalg.svd(jacobian, full_matrices=False)
    slope = grad - (residual[:, None] @ jacobian)[:, 0]
    return Near(seen.log_prob, slope, (residual[:, None] @ left)[:, 0], singular, right)


class Pull(NamedTuple):
    """q(v | x) = N(x + rho^2 (b + J'r), rho^2 (I - rho^2 J'J)), b the slope, r the residual and J its Jacobian at x.

    Where all sites are Gaussian and linear in x this is the law of v given x and y in the joint law

        p(x) N(v; x, rho^2 I) N(y; A v, R - rho^2 A A'),    whose integral over v is p(x) N(y; A x, R):

    the noise that v has is taken from that of y, and x keeps its posterior exactly. It asks for rho^2 s^2 <= 1, s the
    singular values of J. No more than the share `cut` of the variance of v is given up; with cut = 1 that is the law
    for observations at least as noisy as v. Where sites are not linear, q is a proposal, of a density if cut < 1.

    Args:
        rho: > 0.
        cut: in (0, 1]; less than 1 where the density of q is needed.

    Source: Vono et al. (2019), arXiv 1804.05809, whose likelihood is N(y; A v, R): the law of x is then off by
    O(rho^2). Taking the noise of v from R is ours.
    """

    rho: float
    cut: float = 1.0

    def draw(self, x: Tensor, at: Near, noise: Tensor) -> Tensor:
        """v ~ q(v | x): x and noise `(n, size)`."""
        gain, lost = self._gain(at)
        thinned = noise - at.back((1 - (1 - lost).clamp_min(0).sqrt()) * at.in_rows(noise))
        return x + self._shift(at) + at.back(gain * at.along) + self.rho * thinned

    def log_weight(self, x: Tensor, at: Near, v: Tensor) -> Tensor:
        """log p(y, z | x) q(v | x) / N(v; x, rho^2 I), `(n,)`: constant in x where q is exact; needs cut < 1."""
        gain, lost = self._gain(at)
        shift = self._shift(at)
        white = at.in_rows(v - x - shift) / self.rho
        moved = white - gain * at.along / self.rho
        of_gaussian = 0.5 * (white.square() - moved.square() / (1 - lost) - (1 - lost).log()).sum(1)
        of_others = (shift * (v - x - 0.5 * shift)).sum(1) / self.rho**2
        return at.log_lik + of_gaussian + of_others

    def _gain(self, at: Near) -> tuple[Tensor, Tensor]:
        """rho^2 s, by which residuals move v, and rho^2 s^2, the share of its variance that is given up: both cut."""
        gain = torch.minimum(self.rho**2 * at.singular, self.cut / at.singular)
        return gain, gain * at.singular

    def _shift(self, at: Near) -> Tensor:
        """rho^2 b, no longer than the noise: far out the slope of a likelihood says little of where it leads."""
        length = at.slope.norm(dim=1, keepdim=True) * self.rho / math.sqrt(at.slope.shape[1])
        return self.rho**2 * at.slope / length.clamp_min(1.0)
