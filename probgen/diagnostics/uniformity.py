"""Are numbers in [0, 1] uniform, as the ranks of truths among draws of their posteriors must be?"""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from probgen.core import InputError

Array = npt.NDArray[np.float64]

_BINS = 10  # few, as errors of calibration are smooth in the rank
_SMALLEST = 1e-12  # keeps the normal scores of 0 and 1 finite


class Uniformity(NamedTuple):
    """p-values of three tests, and what the numbers look like.

    Args:
        chi_square: of counts in equal bins.
        ks: of the largest distance between the empirical and the uniform distribution function.
        scores: of mean and sum of squares of the normal scores Phi^-1(u), the sharper one, times two.
        loc, scale: mean and root mean square of the normal scores; 0 and 1 where u is uniform.
    """

    chi_square: float
    ks: float
    scores: float
    loc: float
    scale: float

    @property
    def p_value(self) -> float:
        """The smallest of the three, times three (Bonferroni)."""
        return min(1.0, 3 * min(self.chi_square, self.ks, self.scores))


class Band(NamedTuple):
    """Where an empirical distribution function of uniform numbers stays: `(num_points,)` each."""

    at: Array
    low: Array
    high: Array


def uniformity(u: Array) -> Uniformity:
    """Test whether u_i ~ U(0, 1), independently.

    Counts in ten bins (fewer below 50 numbers) and Kolmogorov's statistic see any error; the normal scores
    z = Phi^-1(u) see errors of location, sqrt(n) mean(z) ~ N(0, 1), and of width, sum z^2 ~ chi^2_n, with far fewer.

    Args:
        u: numbers in [0, 1], `(n,)`, n >= 10.

    Returns a `Uniformity`. Raises `InputError` for fewer numbers, or numbers outside of [0, 1].

    Source: Cook, Gelman & Rubin (2006), doi 10.1198/106186006X136976, for the scores.

    >>> u = np.random.default_rng(0).uniform(size=1000)
    >>> uniformity(u).p_value > 0.01, uniformity(u**2).p_value < 1e-10
    (True, True)
    """
    from scipy import stats
    from scipy.special import ndtri

    if len(u) < 10 or not bool(((u >= 0) & (u <= 1)).all()):
        raise InputError(f"Uniformity is tested of at least 10 numbers in [0, 1], got {len(u)}.")
    n, num_bins = len(u), min(_BINS, len(u) // 5)
    counts = np.bincount(np.minimum((u * num_bins).astype(int), num_bins - 1), minlength=num_bins)
    scores = ndtri(np.clip(u, _SMALLEST, 1 - _SMALLEST))
    squares = float(np.sum(scores**2))
    width = 2 * min(stats.chi2.sf(squares, n), stats.chi2.cdf(squares, n))
    location = 2 * stats.norm.sf(abs(scores.mean()) * math.sqrt(n))
    return Uniformity(
        float(stats.chisquare(counts).pvalue),
        float(stats.kstest(u, "uniform").pvalue),
        float(min(1.0, 2 * min(width, location))),
        float(scores.mean()),
        math.sqrt(squares / n),
    )


def power(num_sets: int, ratio: float = 1.2, alpha: float = 0.01) -> float:
    """How often ten bins find draws whose sd is `ratio` times what it should be, at p < alpha.

    The ranks then have probabilities p_b = Phi(ratio q_b) - Phi(ratio q_{b-1}) with q the normal quantiles, and the
    statistic is a chi-square with noncentrality n sum_b (p_b - 1/B)^2 B. Without bins it would be n (ratio^2 /
    sqrt(2 ratio^2 - 1) - 1): 0.05 a data set for 1.2, so that a hundred add 5 to a chi-square of 9 +- 4.

    Args:
        num_sets: n, how many data sets.
        ratio: > 0.
        alpha: below which p counts as found.

    >>> [round(power(n), 2) for n in (100, 200, 1000)]
    [0.09, 0.26, 1.0]
    """
    from scipy import stats

    edges = stats.norm.cdf(ratio * stats.norm.ppf(np.linspace(0, 1, _BINS + 1)))
    noncentrality = num_sets * _BINS * float(((np.diff(edges) - 1 / _BINS) ** 2).sum())
    return float(stats.ncx2.sf(stats.chi2.isf(alpha, _BINS - 1), _BINS - 1, noncentrality))


def simultaneous_band(n: int, level: float = 0.95, num_points: int = 100, seed: int = 0) -> Band:
    """The band that an empirical distribution function of n uniform numbers leaves nowhere, with probability `level`.

    At each point its count is binomial; the pointwise level is the one at which a share `level` of simulated paths
    stays inside everywhere.

    Args:
        n: how many numbers.
        level: in (0, 1).
        num_points: where it is looked at, equally spaced inside (0, 1).
        seed: of 2,000 simulated paths.

    Source: Säilynoja, Bürkner & Vehtari (2022), arXiv 2103.10522.

    >>> band = simultaneous_band(100)
    >>> bool((band.low < band.at).all() and (band.at < band.high).all())
    True
    """
    from scipy import stats

    at = np.arange(1, num_points) / num_points
    cells = np.full(num_points, 1 / num_points)
    paths = np.random.default_rng(seed).multinomial(n, cells, size=2000).cumsum(1)[:, :-1]
    tails = np.minimum(stats.binom.cdf(paths, n, at), stats.binom.sf(paths - 1, n, at)).min(1)
    tail = float(np.quantile(tails, 1 - level))
    return Band(at, stats.binom.ppf(tail, n, at) / n, stats.binom.isf(tail, n, at) / n)


def example() -> Uniformity:
    """Numbers that crowd in the middle, as ranks do among draws that are too wide."""
    u = np.random.default_rng(0).uniform(size=1000)
    return uniformity(0.5 + (u - 0.5) * np.abs(2 * u - 1) ** 0.3)
