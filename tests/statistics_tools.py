"""What a statistical test needs: statistics of known expectation, their z-scores, noise shared between step sizes."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import cache, partial
from typing import NamedTuple

import torch
from torch import Tensor

from probgen.core import Batch
from probgen.models.gaussian_mixture import GaussianMixture
from probgen.randomness import BrownianSteps, Noise, forked_rng

ALLOWED_Z = (
    4.5  # p = 7e-6: 600 statistics at once raise a false alarm at one seed in 250, and seeds are fixed
)
NUM_DRAWS = 50_000
_CHUNK = 5000


# --- statistics of draws from a mixture ---------------------------------------------------------------------------


class Summary(NamedTuple):
    """Averages over draws by name of statistic, and the standard deviation of one draw's contribution."""

    mean: dict[str, Tensor]
    sd: dict[str, Tensor]


def mixture_statistics(mixture: GaussianMixture, x: Tensor) -> dict[str, Tensor]:
    """Statistics `(n, m)` of draws x `(n, d)` whose expectation under the mixture is exactly zero.

    Means and covariances in whitened coordinates, so that a bias reads in standard deviations; weights by
    responsibilities r_k = P(k | x); moments within component k, as E[r_k h(x)] = w_k E[h(x) | k]; and the derivative
    of log p with respect to the variance of white noise added to x, the most powerful statistic for noise left over.
    """
    rows, columns = torch.tril_indices(*[x.shape[1]] * 2)
    diagonal = (rows == columns).to(x)

    def products(white: Tensor) -> Tensor:
        return white[:, rows] * white[:, columns] - diagonal

    def sizes(white: Tensor) -> Tensor:
        return white.square().sum(1, keepdim=True) - x.shape[1]

    def whiten(loc: Tensor, scale_tril: Tensor) -> Tensor:
        return torch.linalg.solve_triangular(scale_tril, (x - loc).mT, upper=False).mT

    white = whiten(mixture.mean, torch.linalg.cholesky(mixture.covariance))
    responsibilities = mixture.responsibilities(x)
    found = {
        "mean": white,
        "covariance": products(white),
        "total variance": sizes(white),
        "weights": responsibilities - mixture.weights,
    }
    leftover = torch.zeros_like(x[:, :1])
    for k, (loc, scale_tril) in enumerate(zip(mixture.locs, mixture.scale_trils, strict=True)):
        r, white = responsibilities[:, k : k + 1], whiten(loc, scale_tril)
        found[f"mean of component {k}"] = r * white
        found[f"covariance of component {k}"] = r * products(white)
        found[f"total variance of component {k}"] = r * sizes(white)
        precision = torch.cholesky_inverse(scale_tril)
        pull = (x - loc) @ precision
        leftover = leftover + 0.5 * r * (pull.square().sum(1, keepdim=True) - precision.trace())
    return found | {"leftover noise": leftover}


def summarise(statistics: Callable[[Tensor], dict[str, Tensor]], x: Tensor) -> Summary:
    """Mean and standard deviation of every statistic over the draws x, in float64, a chunk at a time."""
    total: dict[str, Tensor] = {}
    squares: dict[str, Tensor] = {}
    for part in x.double().split(_CHUNK):
        for name, value in statistics(part).items():
            total[name] = total.get(name, 0) + value.sum(0)
            squares[name] = squares.get(name, 0) + value.square().sum(0)
    mean = {name: value / len(x) for name, value in total.items()}
    return Summary(mean, {name: (squares[name] / len(x) - mean[name].square()).sqrt() for name in mean})


# --- the asymmetric mixture that engines are held to ---------------------------------------------------------------


@cache
def exact_mixture(dim: int) -> GaussianMixture:
    return GaussianMixture.example(dim)


@cache
def exact_draws(dim: int) -> Tensor:
    with forked_rng(dim):
        return exact_mixture(dim).model(Batch(num_rows=NUM_DRAWS))


def summary_of(dim: int, x: Tensor) -> Summary:
    return summarise(partial(mixture_statistics, exact_mixture(dim)), x)


@cache
def exact_law(dim: int) -> Summary:
    """Its standard deviations are what biases are measured in."""
    return summary_of(dim, exact_draws(dim))


# --- verdicts -----------------------------------------------------------------------------------------------------


class Worst(NamedTuple):
    """The statistic that stands out most, in words, and by how much."""

    size: float
    name: str


def _worst(values: dict[str, Tensor]) -> Worst:
    """NaN counts as infinite: a sampler that blew up has not passed."""
    sizes = {name: value.abs().nan_to_num(math.inf).max().item() for name, value in values.items()}
    name = max(sizes, key=sizes.__getitem__)
    return Worst(sizes[name], name)


def largest_bias(found: Summary, reference: Summary, exact: Summary) -> Worst:
    """The largest difference of averages, in standard deviations of the statistic under the exact law."""
    return _worst({name: (found.mean[name] - reference.mean[name]) / exact.sd[name] for name in exact.sd})


def largest_z(found: Summary, exact: Summary, num_draws: int, bound: float = 0.0) -> Worst:
    """The largest |average| beyond `bound` standard deviations, in standard errors."""
    excess = {
        name: ((found.mean[name] / exact.sd[name]).abs() - bound).clamp_min(0) * math.sqrt(num_draws)
        for name in exact.sd
    }
    return _worst(excess)


def two_sample_z(found: Summary, reference: Summary, num_draws: int) -> Worst:
    """The largest difference of averages over `num_draws` each, in standard errors."""
    return _worst(
        {
            name: (found.mean[name] - reference.mean[name])
            * math.sqrt(num_draws)
            / (found.sd[name].square() + reference.sd[name].square()).sqrt()
            for name in reference.sd
        }
    )


def z_of_mean(values: Tensor, expected: float = 0.0) -> float:
    """(average - expected) in standard errors, for independent values."""
    values = values.double().flatten()
    return ((values.mean() - expected) / (values.std() / math.sqrt(values.numel()))).item()


# --- one Brownian path, two step sizes ----------------------------------------------------------------------------


def halved(unit_noises: Iterable[Tensor]) -> Tensor:
    """Unit noise of a step from those of its two halves."""
    first, second = unit_noises
    return (first + second) / math.sqrt(2)


class StepsOfTwo(BrownianSteps):
    """Unit steps on a clock that runs half as fast: each is the sum of two steps of the fine clock."""

    def __init__(self, noise: Noise, end: float = math.inf) -> None:
        super().__init__(noise, end)
        self._fine = BrownianSteps(noise, 2 * end)

    def increment(self, a: float, b: float) -> Tensor:
        return halved(self._fine.increment(u, u + (b - a)) for u in (2 * a, a + b))


class NoiseOfTwo(Noise):
    """The noise of a chain of T/2 steps from that of T: step k is made of steps 2k - 1 and 2k; key 0 is the start."""

    def __call__(self, key: int) -> Tensor:
        one = super().__call__
        return one(0) if key == 0 else halved(one(k) for k in (2 * key - 1, 2 * key))

    def each(self, keys: Sequence[int]) -> Iterator[Tensor]:
        return map(self, keys)
