"""Weighted particles: effective size, resampling, and how many of the first are still represented.

Log weights are `(runs, particles, sets)`, those of each run and data set a population of its own. What particles hold
are rows `(runs * particles * sets, ...)` in this order.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from probgen.core import InputError


class CollapsedWarning(UserWarning):
    """So few particles carry the weight that neither draws nor errors can be believed."""


def effective_size(log_weights: Tensor) -> Tensor:
    """(sum w)^2 / sum w^2: from 1, one particle has all the weight, to their number: `(runs, sets)`.

    Source: Kong, Liu & Wong (1994), Journal of the American Statistical Association 89.

    >>> effective_size(torch.tensor([0.5, 0.5, 0.0]).log().reshape(1, 3, 1))
    tensor([[2.]])
    """
    return 1 / log_weights.softmax(1).square().sum(1)


def systematic(log_weights: Tensor, uniform: Tensor, count: int) -> Tensor:
    """Indices of `count` particles a population, particle i count w_i times, rounded up or down: `(runs, count, sets)`.

    Args:
        log_weights: w up to a factor, `(runs, particles, sets)`.
        uniform: one number in (0, 1) a population, `(runs, sets)`.
        count: how many to take.

    Source: Kitagawa (1996), Journal of Computational and Graphical Statistics 5; Douc, Cappe & Moulines (2005).

    >>> weights = torch.tensor([0.25, 0.0, 0.75]).log().reshape(1, 3, 1)
    >>> systematic(weights, torch.tensor([[0.5]]), 4).flatten()
    tensor([0, 2, 2, 2])
    """
    heights = log_weights.double().transpose(1, 2).softmax(-1).cumsum(-1)
    heights = heights / heights[..., -1:]
    ladder = torch.arange(count, dtype=torch.float64, device=uniform.device)
    places = (ladder + uniform.double()[..., None]) / count
    # From the right: a particle without weight is as high as the one before it, and never taken.
    found = torch.searchsorted(heights.contiguous(), places.contiguous(), right=True)
    return found.clamp_max(heights.shape[-1] - 1).transpose(1, 2)


def rows_of(index: Tensor, num_particles: int) -> Tensor:
    """The rows of particles `(runs, count, sets)` of each run and data set: `(runs * count * sets,)`.

    >>> rows_of(torch.tensor([[[1]], [[0]]]), num_particles=2)
    tensor([1, 2])
    """
    runs, _, sets = index.shape
    run = torch.arange(runs, device=index.device)[:, None, None]
    column = torch.arange(sets, device=index.device)
    return ((run * num_particles + index) * sets + column).reshape(-1)


def num_represented(ancestor: Tensor) -> Tensor:
    """How many different ancestors `(runs, particles, sets)` there are: `(runs, sets)`.

    >>> num_represented(torch.tensor([0, 2, 2]).reshape(1, 3, 1))
    tensor([[2]])
    """
    return torch.zeros_like(ancestor).scatter_(1, ancestor, 1).sum(1)


def spread(values: Tensor, log_weights: Tensor) -> Tensor:
    """L with LL' the weighted covariance of each population: `(runs, particles, sets, k)` -> `(runs, sets, k, k)`.

    A little is added to the diagonal, so that particles that have become alike can part again.
    """
    weights = log_weights.softmax(1)[..., None].to(values)
    centred = (values - (weights * values).sum(1, keepdim=True)) * weights.sqrt()
    cov = torch.einsum("rpsi,rpsj->rsij", centred, centred)
    eye = torch.eye(cov.shape[-1], dtype=cov.dtype, device=cov.device)
    size = cov.diagonal(dim1=-2, dim2=-1).mean(-1)[..., None, None]
    factor: Tensor = torch.linalg.cholesky(cov + (1e-6 * size + 1e-8) * eye)
    return factor


def check_weights(log_weights: Tensor, t: float, blame: Callable[[int], str]) -> None:
    """Raise `InputError` where a weight is NaN, or no particle of a population has any, at time t.

    Args:
        log_weights: `(runs, particles, sets)`.
        t: the time.
        blame: what is not finite at a row, in words.
    """
    lost = log_weights.isnan() | (log_weights == torch.inf)
    if bool(lost.any()):
        raise InputError(
            f"The likelihood of {int(lost.sum())} of {lost.numel()} particles is NaN or infinite at t = {t:.4g}: "
            f"{blame(int(lost.flatten().nonzero()[0]))}. What is it where E[x_0 | x_t] may be? Clamp what must be "
            "positive, and check that no noise is 0."
        )
    empty = (log_weights == -torch.inf).all(1)
    if bool(empty.any()):
        raise InputError(
            f"All weights are 0 at t = {t:.4g} in {int(empty.sum())} of {empty.numel()} populations: no particle can "
            "have led to what was observed. Is the observation possible under the prior, and its noise > 0?"
        )
