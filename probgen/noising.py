"""What denoising objectives share: times spread over a minibatch, data noised at them, the score and the noise's error.

Times are float64 tensors `(batch,)`, one a row; coefficients are worked out at them and cast to the dtype of the data.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from probgen.core import (
    Batch,
    Chained,
    Diffusion,
    InputError,
    Levelled,
    Scored,
    UnsupportedError,
    describe,
    given,
)
from probgen.dynamics.fields import AffineDenoiser
from probgen.dynamics.trace import estimated_divergence, exact_divergence
from probgen.processes import Process, Weighting, check_times, over_event

_NUM_CELLS = 512


# --- what an objective is given ---------------------------------------------------------------------------------


def admitted(objective: Any, program: Any, batch: Batch) -> tuple[Any, Tensor]:
    """The program at the condition of the batch, and the data x_0 `(batch, *event)`.

    Raises `UnsupportedError` where the program lacks what `objective.needs`, `InputError` where site "x" is missing.
    """
    for capability in objective.needs:
        if not isinstance(program, capability):
            raise UnsupportedError(
                f"{describe(objective)} needs a {capability.__name__} program; {describe(program)} lacks "
                f"{' and '.join(_missing(capability, program))}. A program with a guide is fitted by ELBO()."
            )
    if "x" not in batch.data:
        raise InputError(
            f"{describe(objective)} needs data for site 'x', got {sorted(batch.data) or 'none'}."
        )
    if Diffusion in objective.needs:
        _check_process(objective, program)
    return given(program, batch.condition), batch.data["x"]


def _check_process(objective: Any, program: Diffusion) -> None:
    try:
        program.process()
    except UnsupportedError as error:
        raise UnsupportedError(f"{describe(objective)} cannot fit {describe(program)}: {error}.") from error


def _missing(capability: type, program: Any) -> list[str]:
    """The methods of a capability that a program lacks, as one calls them."""
    names = [name for base in capability.__mro__ for name in vars(base) if not name.startswith("_")]
    return [f"{name}()" for name in names if not callable(getattr(program, name, None))]


# --- times ------------------------------------------------------------------------------------------------------


def strata(size: int) -> Tensor:
    """A uniform number from each of `size` equal parts of [0, 1), in random order, float64 `(size,)`.

    Source: Kingma et al. (2021), arXiv 2107.00630, appendix I.1, for diffusion losses.

    >>> (strata(4).sort().values * 4).long()
    tensor([0, 1, 2, 3])
    """
    return (torch.randperm(size) + torch.rand(size, dtype=torch.float64)) / size


def training_times(program: Diffusion, size: int, t: float | None = None) -> Tensor:
    """Times for the rows of a minibatch, `(size,)`, stratified: uniform over [t_min, t_max] or the program's levels.

    Args:
        program: where it has `levels()`, or is a chain, only these and the times of its steps occur.
        size: number of rows.
        t: one time in [t_min, t_max] for all rows instead; `InputError` for others.
    """
    process: Process = program.process()
    if t is not None:
        same = torch.full((size,), t, dtype=torch.float64)
        check_times(f"t of the objective, for {process},", same, process.t_min, process.t_max)
        return same
    levels = _levels(program)
    if levels is not None:
        return levels[(strata(size) * len(levels)).long()]
    return process.t_min + (process.t_max - process.t_min) * strata(size)


def _levels(program: Diffusion) -> Tensor | None:
    if isinstance(program, Levelled):
        return program.levels().double()
    return program.reverse_chain().times if isinstance(program, Chained) else None


def importance_times(
    program: Diffusion, size: int, density: Callable[[Tensor], Tensor]
) -> tuple[Tensor, Tensor]:
    """Stratified times t `(size,)` of probability about proportional to `density`, with exact weights.

    The law is uniform inside each of many cells of [t_min, t_max] (levels are cells of no width), so that its own
    density is known exactly: E[weight f(t)] is the uniform average of f, whatever the cells.

    Args:
        program: as for `training_times`.
        size: number of rows.
        density: times `(n,)` -> positive, not normalised, `(n,)` or `(n, *event)` (then its mean counts).

    Returns t and weight = p_uniform(t) / p_drawn(t), each `(size,)`.

    >>> from probgen import DDPM, TimeMLP
    >>> t, weight = importance_times(DDPM(TimeMLP((2,)), num_steps=4), 100, lambda t: t)
    >>> t.unique()
    tensor([0.2500, 0.5000, 0.7500, 1.0000], dtype=torch.float64)
    >>> bool(torch.isclose(weight.mean(), torch.ones((), dtype=torch.float64), atol=0.1))
    True
    """
    start, width, share = _cells(program)
    values = density(start + 0.5 * width)
    mass = share * (values.flatten(1).mean(1) if values.ndim > 1 else values)
    mass = mass / mass.sum()
    ends = mass.cumsum(0)
    u = strata(size)
    cell = torch.searchsorted(ends, u, right=True).clamp_max(len(mass) - 1)
    inside = 1 - (ends[cell] - u) / mass[cell]
    return start[cell] + inside.clamp(0, 1) * width[cell], (share / mass)[cell]


class _Cells(NamedTuple):
    """Where each cell starts, its width, and the share of uniform times that fall into it."""

    start: Tensor
    width: Tensor
    share: Tensor


def _cells(program: Diffusion) -> _Cells:
    levels = _levels(program)
    if levels is not None:
        return _Cells(levels, torch.zeros_like(levels), torch.full_like(levels, 1 / len(levels)))
    process: Process = program.process()
    # Narrow at both ends, where g^2 / sigma^2 is steep: 1/t at t = 0, and 1/(1 - t) where alpha(1) = 0.
    share = 0.5 * (1 - torch.linspace(0, math.pi, _NUM_CELLS + 1, dtype=torch.float64).cos())
    edges = process.t_min + (process.t_max - process.t_min) * share
    return _Cells(edges[:-1], edges.diff(), share.diff())


# --- noised data, and what a program says of them ---------------------------------------------------------------


def noised(process: Process, x_0: Tensor, t: Tensor) -> Tensor:
    """x_t ~ q(x_t | x_0) = N(alpha x_0, sigma^2), one time a row: `(batch, *event)`."""
    law = process.marginal(x_0, t)
    return law.loc + law.scale * torch.randn_like(x_0)


def score_at(program: Diffusion, t: Tensor) -> Callable[[Tensor], Tensor]:
    """x_t -> the program's own score, or (alpha x0hat - x_t)/sigma^2, at times `(batch,)`; `(batch, *event)` both.

    As x0hat = a x_t + b output, the score is a multiple of x_t plus one of the output, both worked out in float64:
    for a network that predicts eps or the score the first is 0, and nothing cancels.
    """
    if isinstance(program, Scored):
        return lambda x_t: program.score(x_t, t.to(x_t))
    denoiser = AffineDenoiser.of(program)
    on_x, on_output = denoiser.coefficients(t)
    alpha, sigma2 = denoiser.process.alpha(t), denoiser.process.sigma(t).square()
    on_x, on_output = (alpha * on_x - 1) / sigma2, alpha * on_output / sigma2
    return lambda x_t: combined((on_x, x_t), (on_output, denoiser.output(x_t, t.to(x_t))))


def noise_error(program: Diffusion, x_0: Tensor, t: Tensor) -> Tensor:
    """eps - epshat(x_t, t) `(batch, *event)` at x_t = alpha x_0 + sigma eps with fresh eps.

    As x0hat = a x_t + b output, this is a sum of x_0, eps and the output with coefficients worked out in float64: for
    a network that predicts eps they are 0, 1 and -1, and no x_t - alpha x0hat is ever formed.
    """
    denoiser = AffineDenoiser.of(program)
    alpha, sigma = denoiser.process.alpha(t), denoiser.process.sigma(t)
    on_x, on_output = denoiser.coefficients(t)
    eps = torch.randn_like(x_0)
    x_t = combined((alpha, x_0), (sigma, eps))
    output = denoiser.output(x_t, t.to(x_t))
    snr = alpha / sigma  # eps - epshat = (alpha/sigma) (x0hat - x_0)
    return combined((snr * (on_x * alpha - 1), x_0), (alpha * on_x, eps), (snr * on_output, output))


def combined(*terms: tuple[Tensor, Tensor]) -> Tensor:
    """sum_i c_i x_i, c_i `(batch,)` or `(batch, *event)`."""
    (first, x), *others = terms
    total = over_event(first, x) * x
    for coefficient, value in others:
        total = total + over_event(coefficient, value) * value
    return total


class WeightedScore(NamedTuple):
    """s(x_t, t) and lambda(t), `(batch, *event)` or broadcastable to it, and tr(lambda ds/dx_t), `(batch,)`."""

    score: Tensor
    weight: Tensor
    trace: Tensor


def scored(
    program: Diffusion, x_0: Tensor, t: Tensor, weighting: Weighting, directions: Tensor | None = None
) -> WeightedScore:
    """The score at x_t ~ q(x_t | x_0) with the trace of its derivative, both differentiable in the network's weights.

    Args:
        program: whose score it is.
        x_0: data `(batch, *event)`.
        t: times `(batch,)`.
        weighting: lambda.
        directions: e, `(batch, n, *event)`: the trace is estimated as the mean of e'(lambda ds/dx_t)e; None is exact.
    """
    process: Process = program.process()
    score, weight = score_at(program, t), over_event(process.weight(t, weighting), x_0)

    def field(x: Tensor, _: Tensor) -> Tensor:
        return weight * score(x)

    x_t = noised(process, x_0, t).requires_grad_(torch.is_grad_enabled())
    if directions is None:
        value, trace = exact_divergence(field, x_t, t)
    else:
        value, traces = estimated_divergence(field, x_t, t, directions)
        trace = traces.mean(1)
    return WeightedScore(value / weight, weight, trace)
