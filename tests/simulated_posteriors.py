"""Two posteriors of simulated data whose programs are hard to run for many chains at once: an ODE is solved in the
one, a hidden Markov chain summed out by hand in the other.

Their references come another way: importance sampling with densities written in NumPy.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any, NamedTuple

import numpy as np
import pyro
import pyro.distributions as dist
import torch
from numpy.typing import NDArray
from pyro.distributions import constraints
from scipy import optimize, stats
from torch import Tensor
from torchdiffeq import odeint

from mcmc_tools import Moments
from posteriordb import Case, flat, real

Array = NDArray[np.float64]


# --- Lotka-Volterra -----------------------------------------------------------------------------------------------

# Prey and predators at times 1..6, simulated from birth 1, predation 0.5, death 0.8, growth 0.3 and sigma 0.15.
TIMES = np.arange(7.0)
START = np.array([2.0, 1.0])
POPULATIONS = np.array([[3.43, 0.97], [5.5, 1.6], [3.95, 3.31], [2.43, 4.05], [1.08, 2.05], [1.1, 1.58]])
# Log-normal priors by (location, scale).
RATES = {"birth": (0.0, 0.5), "predation": (-0.7, 0.5), "death": (-0.2, 0.5), "growth": (-1.2, 0.5)}
SIGMA_PRIOR = (-1.5, 0.5)


def lotka_volterra() -> Case:
    """Rates of d prey = (birth - predation predators) prey, d predators = (growth prey - death) predators."""
    y, start, times = real(POPULATIONS), real(START), real(TIMES)

    def program() -> None:
        rate = {
            name: pyro.sample(name, dist.LogNormal(real(loc), scale)) for name, (loc, scale) in RATES.items()
        }
        sigma = pyro.sample("sigma", dist.LogNormal(real(SIGMA_PRIOR[0]), SIGMA_PRIOR[1]))

        alone = torch.stack([rate["birth"], -rate["death"]], -1)
        together = torch.stack([-rate["predation"], rate["growth"]], -1)

        def field(t: Tensor, populations: Tensor) -> Tensor:
            return (alone + together * populations.flip(-1)) * populations

        first = start.expand(*rate["birth"].shape, 2)
        # Far out the ODE is stiff: one solution there would take minutes. It fails instead, and log p is -inf.
        limit = {"max_num_steps": 50}
        path = odeint(field, first, times, rtol=1e-5, atol=1e-6, method="dopri5", options=limit)
        path = path[1:].movedim(0, -2)
        pyro.sample("y", dist.LogNormal(path.log(), sigma[..., None, None]).to_event(2))

    return Case(program, {"y": y})


def log_lotka_volterra(u: Array) -> Array:
    """log density of u = (log rates, log sigma), `(n, 5)`, by a fixed-step Runge-Kutta method."""
    birth, predation, death, growth, sigma = np.exp(u.T)

    def field(state: Array) -> Array:
        prey, predators = state
        return np.stack([(birth - predation * predators) * prey, (growth * prey - death) * predators])

    state, total, num_steps = np.tile(START[:, None], len(u)), np.zeros(len(u)), 20
    for step in range(num_steps * len(POPULATIONS)):
        state = _runge_kutta(field, state, 1 / num_steps)
        if (step + 1) % num_steps == 0:
            total += (
                stats.norm(np.log(state), sigma)
                .logpdf(np.log(POPULATIONS[step // num_steps])[:, None])
                .sum(0)
            )
    loc, scale = np.array([*RATES.values(), SIGMA_PRIOR]).T
    return total + stats.norm(loc, scale).logpdf(u).sum(1)


def _runge_kutta(field: Callable[[Array], Array], x: Array, h: float) -> Array:
    a = field(x)
    b = field(x + h / 2 * a)
    c = field(x + h / 2 * b)
    return x + h / 6 * (a + 2 * b + 2 * c + field(x + h * c))


# --- a hidden Markov chain ----------------------------------------------------------------------------------------

# Simulated with two states of means 3 and 5 and unit variance, left with probability 0.2 and 0.3.
SIGNAL = np.array(
    [
        [0.67, 3.75, 2.46, 3.41, 2.87, 4.33, 5.9, 4.26, 4.54, 3.99],
        [4.84, 5.21, 4.35, 5.78, 3.74, 6.35, 5.26, 6.46, 6.8, 5.36],
        [3.0, 3.71, 3.43, 1.82, 4.56, 4.74, 3.33, 4.58, 3.63, 5.05],
        [6.0, 6.82, 4.34, 5.05, 5.19, 4.62, 3.72, 5.58, 4.25, 4.71],
    ]
).ravel()
MEANS_PRIOR = (np.array([3.0, 5.0]), 1.0)


def hidden_markov() -> Case:
    """Transition rows theta1, theta2 and ordered means mu of a chain of two states, its path summed out."""
    y = torch.tensor(SIGNAL, dtype=torch.float32)
    prior_loc = torch.tensor(MEANS_PRIOR[0], dtype=torch.float32)

    def program() -> None:
        theta1 = pyro.sample("theta1", dist.Dirichlet(torch.ones(2)))
        theta2 = pyro.sample("theta2", dist.Dirichlet(torch.ones(2)))
        mu = pyro.sample("mu", flat(constraints.positive_ordered_vector, 2))
        pyro.factor("mu_prior", dist.Normal(prior_loc, MEANS_PRIOR[1]).log_prob(mu).sum(-1))
        log_theta = torch.stack([theta1, theta2], -2).log()
        emission = dist.Normal(mu, 1.0)
        forward = emission.log_prob(y[0])
        for value in y[1:]:
            forward = (forward[..., None] + log_theta).logsumexp(-2) + emission.log_prob(value)
        pyro.factor("y", forward.logsumexp(-1))

    return Case(program, {})


def log_hidden_markov(u: Array) -> Array:
    """log density of u = (logit theta1[1], logit theta2[1], mu[1], mu[2]), `(n, 4)`; probabilities, rescaled."""
    theta = stats.logistic.cdf(u[:, :2])
    mu = u[:, 2:]
    forward, log_scale = stats.norm.pdf(SIGNAL[0] - mu), np.zeros(len(u))
    for value in SIGNAL[1:]:
        first = (forward * theta).sum(1)
        forward = np.stack([first, forward.sum(1) - first], 1) * stats.norm.pdf(value - mu)
        total = forward.sum(1)
        forward, log_scale = forward / total[:, None], log_scale + np.log(total)
    log_prior = stats.logistic.logpdf(u[:, :2]).sum(1) + stats.norm(*MEANS_PRIOR).logpdf(mu).sum(1)
    inside = (mu[:, 0] > 0) & (mu[:, 0] < mu[:, 1])
    return np.where(inside, log_scale + np.log(forward.sum(1)) + log_prior, -np.inf)


# --- references by importance sampling ----------------------------------------------------------------------------


class Simulated(NamedTuple):
    """A case, and its density in coordinates u with the names and values of its scalars there."""

    case: Callable[[], Case]
    log_density: Callable[[Array], Array]
    start: Array
    scalars: Callable[[Array], dict[str, Array]]


def _hidden_markov_scalars(u: Array) -> dict[str, Array]:
    theta = stats.logistic.cdf(u[:, :2])
    return {"theta1[1]": theta[:, 0], "theta2[1]": theta[:, 1], "mu[1]": u[:, 2], "mu[2]": u[:, 3]}


SIMULATED = {
    "lotka-volterra": Simulated(
        lotka_volterra,
        log_lotka_volterra,
        np.array([0.0, -0.7, -0.2, -1.2, -1.5]),
        lambda u: dict(zip([*RATES, "sigma"], np.exp(u.T), strict=True)),
    ),
    "hidden-markov": Simulated(
        hidden_markov, log_hidden_markov, np.array([1.0, -1.0, 3.0, 5.0]), _hidden_markov_scalars
    ),
}


@cache
def reference(name: str, num_draws: int = 100_000) -> dict[str, Moments]:
    """Moments of every scalar by importance sampling from a Student t fitted to the posterior in two rounds."""
    simulated, rng = SIMULATED[name], np.random.default_rng(0)
    fit: Any = optimize.minimize(lambda u: -simulated.log_density(u[None])[0], simulated.start, method="BFGS")
    loc, covariance = fit.x, fit.hess_inv
    for size in (num_draws // 10, num_draws):
        proposal = stats.multivariate_t(loc, 1.5 * covariance, df=5, seed=rng)
        u = proposal.rvs(size)
        log_weights = simulated.log_density(u) - proposal.logpdf(u)
        weights = np.exp(log_weights - log_weights.max())
        weights /= weights.sum()
        loc, covariance = weights @ u, np.cov(u.T, aweights=weights)
    ess = 1 / float(weights @ weights)
    found = {}
    for scalar, values in simulated.scalars(u).items():
        mean = float(weights @ values)
        found[scalar] = Moments(mean, float(np.sqrt(weights @ (values - mean) ** 2)), ess)
    return found
