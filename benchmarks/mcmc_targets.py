"""The densities of `benchmarks.mcmc`: each a Pyro program, and by hand for those who do not read programs.

By hand means over unconstrained vectors z of shape `(..., size)`, with the array functions of torch or of JAX, and up
to a constant; the tests hold the two forms against each other.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pyro
import pyro.distributions as dist
import torch
from torch import Tensor

Vectors = np.ndarray  # (chain, draw, size)
LogDensity = Callable[[Any, Any], Any]  # z and the module of its array functions -> (...,)


@dataclass(frozen=True)
class Problem:
    """A posterior.

    Args:
        size: number of unconstrained coordinates.
        program: a Pyro function.
        log_density: the same by hand.
        vector: draws by site, each `(chain, draw, *event)`, as unconstrained vectors.
        data: what is observed, by site.
    """

    size: int
    program: Callable[[], None]
    log_density: LogDensity
    vector: Callable[[Mapping[str, Tensor]], Tensor]
    data: dict[str, Tensor] = field(default_factory=dict)

    def vectors(self, draws: Mapping[str, Tensor]) -> Vectors:
        return self.vector(draws).detach().numpy()


@dataclass(frozen=True)
class Run:
    """What a sampler drew, and the seconds it drew; those of warm-up and of compiling apart."""

    draws: Vectors
    seconds: float
    warmup_seconds: float = 0.0
    compile_seconds: float = 0.0


class Skipped(Exception):
    """Why a sampler has no figure."""


Sampler = Callable[[int], Run]  # of a seed; raises Skipped


# --- a banana -----------------------------------------------------------------------------------------------------

BEND, WIDTH = 0.5, 0.5


def banana() -> Problem:
    """x ~ N(0, 1), y ~ N(x^2/2, 0.5^2): draws are easily made, and curvature varies along them."""

    def program() -> None:
        x = pyro.sample("x", dist.Normal(0.0, 1.0))
        pyro.sample("y", dist.Normal(BEND * x.square(), WIDTH))

    def log_density(z: Any, xp: Any) -> Any:
        x, y = z[..., 0], z[..., 1]
        return -0.5 * xp.square(x) - 0.5 * xp.square((y - BEND * xp.square(x)) / WIDTH)

    return Problem(2, program, log_density, lambda draws: torch.stack([draws["x"], draws["y"]], -1))


def banana_draws(count: int, seed: int) -> np.ndarray:
    """Exact draws `(count, 2)`."""
    x, noise = np.random.default_rng(seed).standard_normal((2, count))
    return np.stack([x, BEND * x**2 + WIDTH * noise], -1).astype(np.float32)


# --- eight schools ------------------------------------------------------------------------------------------------

EFFECTS = np.array([28, 8, -3, 7, -1, 1, 18, 12], dtype=np.float32)
ERRORS = np.array([15, 10, 16, 11, 9, 11, 10, 18], dtype=np.float32)


def schools() -> Problem:
    """Eight schools, not centred: mu ~ N(0, 5^2), tau ~ HalfCauchy(5), eta_j ~ N(0, 1), y_j ~ N(mu + tau eta_j, s_j^2).

    Source: Rubin (1981), Journal of Educational Statistics 6(4); Gelman et al., Bayesian Data Analysis, section 5.5.
    """
    errors = torch.from_numpy(ERRORS)

    def program() -> None:
        mu = pyro.sample("mu", dist.Normal(0.0, 5.0))
        tau = pyro.sample("tau", dist.HalfCauchy(5.0))
        with pyro.plate("schools", len(EFFECTS)):
            eta = pyro.sample("eta", dist.Normal(0.0, 1.0))
            pyro.sample("y", dist.Normal(mu + tau * eta, errors))

    def log_density(z: Any, xp: Any) -> Any:
        mu, log_tau, eta = z[..., :1], z[..., 1:2], z[..., 2:]
        tau = xp.exp(log_tau)
        residual = (xp.asarray(EFFECTS) - mu - tau * eta) / xp.asarray(ERRORS)
        prior = (-0.5 * xp.square(mu / 5) - xp.log1p(xp.square(tau / 5)) + log_tau)[..., 0]
        return prior - 0.5 * xp.square(eta).sum(-1) - 0.5 * xp.square(residual).sum(-1)

    def vector(draws: Mapping[str, Tensor]) -> Tensor:
        return torch.cat([draws["mu"][..., None], draws["tau"].log()[..., None], draws["eta"]], -1)

    return Problem(2 + len(EFFECTS), program, log_density, vector, {"y": torch.from_numpy(EFFECTS)})


# --- logistic regression ------------------------------------------------------------------------------------------


def logistic(num_data: int = 1000, size: int = 25) -> Problem:
    """y_i ~ Bernoulli(sigmoid(x_i beta)), beta ~ N(0, I), simulated once and for all; x_i0 = 1 is the intercept."""
    rng = np.random.default_rng(4)
    x = rng.standard_normal((num_data, size)).astype(np.float32)
    x[:, 0] = 1.0
    y = (rng.random(num_data) < 1 / (1 + np.exp(-x @ rng.standard_normal(size)))).astype(np.float32)
    covariates = torch.from_numpy(x)

    def program() -> None:
        beta = pyro.sample("beta", dist.Normal(0.0, 1.0).expand([size]).to_event(1))
        with pyro.plate("data", num_data):
            pyro.sample("y", dist.Bernoulli(logits=covariates @ beta))

    def log_density(z: Any, xp: Any) -> Any:
        logits = z @ xp.asarray(x).T
        likelihood = logits * xp.asarray(y) - xp.logaddexp(logits, xp.zeros_like(logits))
        return likelihood.sum(-1) - 0.5 * xp.square(z).sum(-1)

    return Problem(size, program, log_density, lambda draws: draws["beta"], {"y": torch.from_numpy(y)})


# --- a correlated Gaussian ----------------------------------------------------------------------------------------


def gauss(size: int = 100, correlation: float = 0.9) -> Problem:
    """N(0, C) with C_ij = 0.9^|i - j|: scales from 0.23 to 4.2, none of which a diagonal metric sees.

    By its precision P in either form, one product with a matrix: N(0, I) times exp(-x (P - I) x/2).
    """
    i = np.arange(size)
    precision = np.linalg.inv(correlation ** np.abs(i[:, None] - i)).astype(np.float32)
    off_unit = torch.from_numpy(precision) - torch.eye(size)

    def program() -> None:
        x = pyro.sample("x", dist.Normal(0.0, 1.0).expand([size]).to_event(1))
        pyro.factor("correlation", -0.5 * (x * (x @ off_unit)).sum(-1))

    def log_density(z: Any, xp: Any) -> Any:
        return -0.5 * (z * (z @ xp.asarray(precision))).sum(-1)

    return Problem(size, program, log_density, lambda draws: draws["x"])


PROBLEMS: dict[str, Callable[[], Problem]] = {
    "banana": banana,
    "schools": schools,
    "logistic": logistic,
    "gauss100": gauss,
}
