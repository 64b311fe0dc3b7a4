"""Conditioned programs whose posterior is known: priors with a perfect denoiser, linear and nonlinear observations."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor

from probgen.core import Batch
from probgen.models.gaussian_mixture import GaussianMixture
from probgen.priors.prior import Prior
from probgen.randomness import forked_rng

DTYPE = torch.float64
Observe = Callable[[Tensor], Tensor]
_POINTS, _REACH = 200, 7.0  # of the grid along each axis; how far it goes, in standard deviations


class Exact(NamedTuple):
    """What is known of x | y.

    Args:
        mean, sd: of each coordinate, `(dim,)`.
        weights: P(component | y) of the prior's components, `(K,)`.
        log_evidence: log p(y), nats.
    """

    mean: Tensor
    sd: Tensor
    weights: Tensor
    log_evidence: float


@dataclass(frozen=True)
class Testbed:
    """x ~ prior, y ~ N(A(x), noise^2 I).

    Args:
        prior: with a perfect denoiser.
        observe: A, rows `(..., dim)` -> `(..., m)`.
        noise: > 0.
        posterior: of one y.
    """

    prior: GaussianMixture
    observe: Observe
    noise: float
    posterior: Callable[[Tensor], Exact]

    def program(self) -> None:
        x = pyro.sample("x", Prior(self.prior))
        pyro.sample("y", dist.Normal(self.observe(x), self.noise).to_event(1))

    def data(self, num_sets: int, seed: int) -> Tensor:
        """y `(num_sets, m)` from the program."""
        with forked_rng(seed):
            mean = self.observe(self.prior.model(Batch(num_rows=num_sets)))
            return mean + self.noise * torch.randn_like(mean)


def gaussian(dim: int) -> GaussianMixture:
    """One component, correlated, off the origin."""
    mixture = GaussianMixture.example(dim)
    covariance = 3 * mixture.covariances[:1] + 0.3 * torch.eye(dim, dtype=DTYPE)
    return GaussianMixture(torch.ones(1, dtype=DTYPE), mixture.locs[:1], covariance)


def linear(prior: GaussianMixture, noise: float = 0.5) -> Testbed:
    """Half as many numbers as coordinates, through a random matrix."""
    dim = prior.event_shape[0]
    operator = _matrix(dim // 2, dim)

    def posterior(y: Tensor) -> Exact:
        exact = prior.posterior(y, operator, noise)
        sd = exact.covariance.diagonal().sqrt()
        return Exact(exact.mean, sd, exact.weights, float(prior.evidence(y, operator, noise)))

    return Testbed(prior, lambda x: x @ operator.mT, noise, posterior)


def nonlinear(prior: GaussianMixture, noise: float = 0.3) -> Testbed:
    """Two saturating numbers, tanh of a random projection."""
    operator = _matrix(2, prior.event_shape[0])
    posterior = partial(by_quadrature, prior, operator, _saturating, noise)
    return Testbed(prior, lambda x: _saturating(x @ operator.mT), noise, posterior)


TESTBEDS: dict[str, Callable[[int], Testbed]] = {
    "gaussian": lambda dim: linear(gaussian(dim)),
    "mixture": lambda dim: linear(GaussianMixture.example(dim)),
    "sharp": lambda dim: linear(GaussianMixture.example(dim), noise=0.1),
    "tanh": lambda dim: nonlinear(GaussianMixture.example(dim)),
}


def _matrix(rows: int, dim: int) -> Tensor:
    generator = torch.Generator().manual_seed(dim)
    return torch.randn(rows, dim, dtype=DTYPE, generator=generator) / math.sqrt(dim)


def _saturating(projection: Tensor) -> Tensor:
    return torch.tanh(2 * projection)


def by_quadrature(
    prior: GaussianMixture, operator: Tensor, observe: Observe, noise: float, y: Tensor
) -> Exact:
    """x | y where y sees no more than two numbers s = B x: sums over a grid of s, as x given s is Gaussian.

    Of each component k the sums give P(k | y), E[s | y, k] and Cov[s | y, k]; x follows by the gain G_k = Cov[x, s]
    Cov[s]^-1: E[x | y, k] = m_k + G_k (E[s | y, k] - B m_k), Cov[x | y, k] = S_k - G_k B S_k + G_k Cov[s | y, k] G_k'.
    """
    centres, cross = prior.locs @ operator.mT, prior.covariances @ operator.mT
    spread = operator @ cross
    reach = _REACH * spread.diagonal(dim1=-2, dim2=-1).sqrt()
    axes = [
        torch.linspace(float(low), float(high), _POINTS, dtype=DTYPE)
        for low, high in zip((centres - reach).amin(0), (centres + reach).amax(0), strict=True)
    ]
    s = torch.cartesian_prod(*axes)
    log_joint = prior.weights.log() + dist.MultivariateNormal(centres, spread).log_prob(s[:, None])
    log_joint = log_joint + dist.Normal(observe(s), noise).to_event(1).log_prob(y)[:, None]
    cell = math.prod(float(axis[1] - axis[0]) for axis in axes)
    log_evidence = float(log_joint.flatten().logsumexp(0)) + math.log(cell)
    w = log_joint.softmax(0)  # of s given y and k
    weights = log_joint.logsumexp(0).softmax(0)
    s_mean = w.mT @ s
    offset = s[:, None] - s_mean
    s_covariance = torch.einsum("nk,nki,nkj->kij", w, offset, offset)
    gain = torch.linalg.solve(spread, cross.mT).mT
    means = prior.locs + (gain @ (s_mean - centres)[..., None])[..., 0]
    covariances = prior.covariances - gain @ cross.mT + gain @ s_covariance @ gain.mT
    posterior = GaussianMixture(weights, means, 0.5 * (covariances + covariances.mT))
    return Exact(posterior.mean, posterior.covariance.diagonal().sqrt(), weights, log_evidence)
