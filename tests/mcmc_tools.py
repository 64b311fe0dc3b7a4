"""Verdicts on chains: z-scores that count both Monte Carlo errors, ranks of simulation-based calibration, and
Geweke's joint test.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import NamedTuple, TypeVar

import arviz as az
import numpy as np
import torch
from scipy import stats
from torch import Tensor

from probgen.arviz_io import chain_error
from probgen.randomness import forked_rng
from statistics_tools import Worst

Statistics = Mapping[str, Tensor]
State = TypeVar("State")


class Moments(NamedTuple):
    """A reference: mean and standard deviation of a scalar, known from `ess` independent draws."""

    mean: float
    sd: float
    ess: float = math.inf


# --- z-scores against a reference ---------------------------------------------------------------------------------


def worst_z(draws: Statistics, reference: Mapping[str, Moments]) -> Worst:
    """The largest |z| of means and sds over all of the reference; draws are `(chain, draw)` by name.

    A name that the draws lack is an error, a draw that is not finite an infinite z.
    """
    scores = {}
    for name, moments in reference.items():
        scores[f"mean of {name}"], scores[f"sd of {name}"] = z_scores(draws[name], moments)
    worst = max(scores, key=lambda name: _size(scores[name]))
    return Worst(_size(scores[worst]), worst)


def z_scores(draws: Tensor, reference: Moments) -> tuple[float, float]:
    """z of the mean and of the standard deviation of draws `(chain, draw)`, errors of both sides counted.

    The error of an sd is that of the mean square over 2 sd, the kurtosis of the reference that of the draws.
    """
    draws = draws.double()
    sd = draws.std()
    squares = (draws - draws.mean()).square()
    mean_error = math.hypot(_error(draws), reference.sd / math.sqrt(reference.ess))
    sd_error = math.hypot(_error(squares) / (2 * sd), squares.std() / (2 * sd * math.sqrt(reference.ess)))
    return float(draws.mean() - reference.mean) / mean_error, float(sd - reference.sd) / sd_error


def max_r_hat(draws: Statistics) -> float:
    """The largest rank-normalised split R-hat (Vehtari et al. 2021) of draws `(chain, draw)` by name."""
    return max(float(az.rhat(values.double().numpy())) for values in draws.values())


def _error(draws: Tensor) -> float:
    return float(chain_error(draws.numpy()))


def _size(z: float) -> float:
    return abs(z) if math.isfinite(z) else math.inf


# --- simulation-based calibration ---------------------------------------------------------------------------------


class Uniformity(NamedTuple):
    """p-values of ranks being uniform: two tests that see any error, and a sharper one of the width of the draws."""

    chi_square: float
    ks: float
    width: float


def ranks(prior: Tensor, draws: Tensor) -> Tensor:
    """How many of the L draws `(draw, set)` of each data set lie below the value `(set,)` that simulated it."""
    assert bool(torch.isfinite(draws).all()), "a chain ran away"
    return (draws < prior).sum(0)


def uniformity(ranks: Tensor, num_draws: int, num_bins: int = 10) -> Uniformity:
    """Are the ranks `(set,)` uniform on 0..L? Talts, Betancourt, Simpson, Vehtari & Gelman (2018), arXiv 1804.06788.

    The test of the width is two-sided, of a sum of squared normal scores, sum_i Phi^-1(rank_i / L)^2 ~ chi^2 (Cook,
    Gelman & Rubin 2006, J. Comput. Graph. Stat. 15, 675). Over 1,000 sets it finds an sd 20 % too large with p < 1e-6
    in 99 of 100 seeds, where ten bins do so in 66 and KS in none.

    Args:
        ranks: integers in 0..num_draws.
        num_draws: L; L + 1 must be a multiple of num_bins.
        num_bins: few, as errors of calibration are smooth in the rank.
    """
    counts = np.bincount(ranks.numpy() * num_bins // (num_draws + 1), minlength=num_bins)
    with forked_rng(0):  # spread over their cells, ranks of a calibrated engine are uniform on [0, 1]
        spread = (ranks + torch.rand(ranks.shape, dtype=torch.float64)) / (num_draws + 1)
    squares = float(torch.special.ndtri(spread).square().sum())
    narrow, wide = stats.chi2.sf(squares, len(ranks)), stats.chi2.cdf(squares, len(ranks))
    return Uniformity(
        float(stats.chisquare(counts).pvalue),
        float(stats.kstest(spread.numpy(), "uniform").pvalue),
        float(min(1.0, 2 * min(narrow, wide))),
    )


# --- Geweke's joint test ------------------------------------------------------------------------------------------


def geweke_z(
    joint: Callable[[int], State],
    transition: Callable[[State], State],
    statistics: Callable[[State], Statistics],
    *,
    num_chains: int,
    num_steps: int,
) -> Worst:
    """The largest |z| between the marginal-conditional and the successive-conditional simulator of a program.

    Args:
        joint: n -> n independent draws of (z, x).
        transition: one step of the kernel on z | x followed by a fresh x | z, for all chains at once.
        statistics: test functions `(chain,)` of (z, x).
        num_chains, num_steps: chains start in the joint law, which a correct pair of steps never leaves.

    Chains are independent: the spread of their averages over time counts autocorrelation without estimating it.
    Source: Geweke (2004), J. Am. Stat. Assoc. 99, 799.
    """
    exact = statistics(joint(num_chains))
    state, totals = joint(num_chains), {name: torch.zeros_like(value) for name, value in exact.items()}
    for _ in range(num_steps):
        state = transition(state)
        totals = {name: totals[name] + value for name, value in statistics(state).items()}
    scores = {name: _two_sample_z(total / num_steps, exact[name]) for name, total in totals.items()}
    worst = max(scores, key=lambda name: _size(scores[name]))
    return Worst(_size(scores[worst]), worst)


def _two_sample_z(a: Tensor, b: Tensor) -> float:
    a, b = a.double(), b.double()
    return float((a.mean() - b.mean()) / (a.var() / len(a) + b.var() / len(b)).sqrt())
