"""Programs around a fitted prior whose posterior and evidence are known exactly, with what tests ask of draws."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor, nn

from probgen.core import Batch
from probgen.models.gaussian_mixture import GaussianMixture
from probgen.priors.prior import Prior
from probgen.processes import VP, Process
from probgen.randomness import forked_rng

DTYPE = torch.float64


class Gaussian(NamedTuple):
    """x ~ N(0, I), y = x + noise: each coordinate of x given y is N(mean, sd^2)."""

    program: Callable[[], Any]
    data: dict[str, Tensor]
    mean: float
    sd: float


class Conjugate(NamedTuple):
    """x from a mixture, y = A x + noise: the posterior is a mixture."""

    program: Callable[[], Any]
    data: dict[str, Tensor]
    posterior: GaussianMixture
    log_evidence: float


class Linear(NamedTuple):
    """A prior, the operator A `(m, dim)` and the noise of y = A x + noise."""

    prior: GaussianMixture
    operator: Tensor
    noise: float

    def program(self) -> Tensor:
        """Sites "x" and "y"."""
        x = pyro.sample("x", Prior(self.prior))
        pyro.sample("y", dist.Normal((self.operator @ x[..., None])[..., 0], self.noise).to_event(1))
        return x

    def given(self, y: Tensor) -> Conjugate:
        """The program with y `(m,)` and what follows from it."""
        exact = self.prior.posterior(y, self.operator, self.noise)
        evidence = float(self.prior.evidence(y, self.operator, self.noise))
        return Conjugate(self.program, {"y": y}, exact, evidence)

    def pairs(self, num_pairs: int, seed: int = 0) -> tuple[Tensor, Tensor]:
        """x `(n, dim)` and y `(n, m)` from the joint law."""
        with forked_rng(seed):
            x = self.prior.model(Batch(num_rows=num_pairs))
            y = x @ self.operator.mT
            return x, y + self.noise * torch.randn_like(y)


class Denoiser(nn.Module):
    """A diffusion that knows nothing but E[x_0 | x_t]: its density is that of its ODE, its score Tweedie's."""

    event_shape = (2,)

    def __init__(self) -> None:
        super().__init__()
        self.oracle = GaussianMixture.example()

    def process(self) -> Any:
        return self.oracle.process()

    def denoise(self, x_t: Tensor, t: Tensor) -> Tensor:
        return self.oracle.denoise(x_t, t)

    def model(self, batch: Batch) -> Tensor:
        return self.oracle.model(batch)


def gaussian_prior(dim: int, process: Process = VP()) -> GaussianMixture:  # noqa: B008 - frozen
    """N(0, I) as a diffusion."""
    weights, locs = torch.ones(1, dtype=DTYPE), torch.zeros(1, dim, dtype=DTYPE)
    return GaussianMixture(weights, locs, torch.eye(dim, dtype=DTYPE)[None], process)


def white_gaussian(dim: int = 8, noise: float = 0.5) -> Gaussian:
    """x ~ N(0, I_dim), y = 1 seen with this noise: mean .8 and sd .447 at noise .5.

    >>> [round(value, 3) for value in white_gaussian()[2:]]
    [0.8, 0.447]
    """
    prior = gaussian_prior(dim)

    def program() -> Tensor:
        x = pyro.sample("x", Prior(prior))
        pyro.sample("y", dist.Normal(x, noise).to_event(1))
        return x

    shrink = 1 / (1 + noise**2)
    return Gaussian(program, {"y": torch.ones(dim, dtype=DTYPE)}, shrink, math.sqrt(shrink) * noise)


def linear(dim: int = 4, noise: float = 0.5, seed: int = 0, num_seen: int | None = None) -> Linear:
    """An asymmetric mixture of three components seen through a random operator, half as many rows as columns."""
    rows = max(1, dim // 2) if num_seen is None else num_seen
    generator = torch.Generator().manual_seed(seed)
    operator = torch.randn(rows, dim, dtype=DTYPE, generator=generator) / math.sqrt(dim)
    return Linear(GaussianMixture.example(dim), operator, noise)


def mixture(dim: int = 4, noise: float = 0.5, seed: int = 0, num_seen: int | None = None) -> Conjugate:
    """`linear` with a y drawn from it.

    >>> case = mixture(4)
    >>> case.posterior.event_shape, case.data["y"].shape
    ((4,), torch.Size([2]))
    """
    testbed = linear(dim, noise, seed, num_seen)
    return testbed.given(testbed.pairs(1, seed)[1][0])


def mean_z(x: Tensor, mean: Tensor | float) -> Tensor:
    """(average - mean) in standard errors, by coordinate: independent draws x `(n, d)` -> `(d,)`."""
    return (x.mean(0) - mean) / (x.std(0) / math.sqrt(len(x)))


def sd_z(x: Tensor, sd: Tensor | float) -> Tensor:
    """(standard deviation - sd) in standard errors, by coordinate, from the fourth moment of the draws."""
    squares = (x - x.mean(0)).square()
    return (squares.mean(0) - torch.as_tensor(sd).square()) / (squares.std(0) / math.sqrt(len(x)))


def pooled(x: Tensor) -> Tensor:
    """All coordinates as draws of one, `(n, d)` -> `(n d, 1)`: where they are independent and alike."""
    return x.reshape(-1, 1)


def errors(x: Tensor, exact: GaussianMixture) -> tuple[float, float]:
    """The largest error of a mean and of a standard deviation, in exact standard deviations: x `(n, d)`."""
    sd = exact.covariance.diagonal().sqrt()
    of_mean = ((x.mean(0) - exact.mean) / sd).abs().max()
    return float(of_mean), float((x.std(0) / sd - 1).abs().max())
