"""Exponential steps: the linear part of a diffusion is solved exactly, x0hat between network calls by a polynomial.

In lambda = log(alpha/sigma) every member of the reverse family (diffusion a g^2) obeys, over a step of length h,

    x_s = (sigma_s/sigma_t) e^{-a h} x_t + alpha_s int (1 + a) e^{-(1 + a)(lambda_s - lambda)} x0hat d lambda
          + sigma_s sqrt(1 - e^{-2 a h}) z,

and with x0hat a polynomial through its latest values the integral is a weighted sum of them: numbers that are worked
out in float64 before the loop. Lu et al. (2022), arXiv 2211.01095; Xue et al. (2023), arXiv 2305.14267 for any a.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from probgen.dynamics.fields import AffineDenoiser, Output, scalar, times
from probgen.processes import Grid, Process

_NODES = 24  # Gauss-Legendre: exact to rounding for steps over the whole range of any noising law here


class Step(NamedTuple):
    """x' = on_x x + sum_j on_x0[j] x0hat_j + scale z, the newest x0hat first, at float64 t `(1,)`.

    `corrects`, where there is one, replaces the weights of the step that led here, now that x0hat is known here.
    """

    t: Tensor
    output_to_x0: tuple[Any, Any]
    on_x: Any
    on_x0: Sequence[Any]
    scale: Any = 0.0
    corrects: Sequence[Any] = ()


class Weights(NamedTuple):
    """One exponential step: factors on x and on each x0hat, and the scale of the noise; each `()` or `(*event)`."""

    on_x: Tensor
    on_x0: list[Tensor]
    scale: Tensor


def take_steps(output: Output, steps: Sequence[Step], x: Tensor, noises: Iterable[Tensor]) -> Tensor:
    """Carry x `(batch, *event)` through the steps, one network call each; noise is drawn where a step has a scale."""
    clock = torch.cat([step.t for step in steps]).to(x)[:, None]
    unit_noise = iter(noises)
    base, known = x, list[Tensor]()
    for step, t in zip(steps, clock, strict=True):
        x0hat = _x0hat(step, x, output(x, t))
        known = [x0hat, *known[: max(len(step.on_x0), len(step.corrects)) - 1]]
        if step.corrects:
            x = _plus(base.clone(), step.corrects, known)
        base = times(step.on_x, x)
        if not _is_zero(step.scale):
            base = _plus(base, [step.scale], [next(unit_noise)])
        x = _plus(base.clone(), step.on_x0, known)
    return x


def _x0hat(step: Step, x: Tensor, output: Tensor) -> Tensor:
    on_x, on_output = step.output_to_x0
    x0hat = times(on_output, output)
    return x0hat if _is_zero(on_x) else _plus(x0hat, [on_x], [x])


def _plus(x: Tensor, weights: Sequence[Any], values: Sequence[Tensor]) -> Tensor:
    """Add sum_j weights_j values_j to x in place; values beyond the weights are left out."""
    for weight, value in zip(weights, values, strict=False):
        if isinstance(weight, float):
            x.add_(value, alpha=weight)
        else:
            x.add_(times(weight, value))
    return x


def _is_zero(coefficient: Any) -> bool:
    return isinstance(coefficient, float) and coefficient == 0.0


# --- the numbers ------------------------------------------------------------------------------------------------


def exponential_weights(
    process: Process, t: Tensor, s: Tensor, known_at: Tensor, stochasticity: float, exponent: float
) -> list[Weights]:
    """Steps from t to s with x0hat interpolated between the times `known_at`.

    Args:
        process: the noising law.
        t, s: float64 times `(m,)`, s < t: one row a step.
        known_at: float64 times `(p, m)` at which x0hat is known, in the order of the weights; p - 1 is the degree.
        stochasticity: a >= 0.
        exponent: the polynomial is one in (sigma/alpha)^exponent; 0 is its limit, one in lambda.
    """
    start, end, a = _half_log_snr(process, t), _half_log_snr(process, s), stochasticity
    h = end - start
    nodes, measure = (
        torch.from_numpy(value).reshape((-1,) + (1,) * h.ndim)
        for value in np.polynomial.legendre.leggauss(_NODES)
    )
    before_end = 0.5 * h * (1 - nodes)
    kernel = 0.5 * h * measure * (1 + a) * torch.exp(-(1 + a) * before_end)
    known = torch.stack([_half_log_snr(process, times) for times in known_at])
    basis = _lagrange(_bent(known, exponent), _bent(end - before_end, exponent))
    on_x = process.sigma(s) / process.sigma(t) * torch.exp(-a * h)
    on_x0 = torch.stack([process.alpha(s) * (kernel * values).sum(0) for values in basis], dim=1)
    scale = process.sigma(s) * (-torch.expm1(-2 * a * h)).sqrt()
    return [Weights(*row) for row in zip(on_x, map(list, on_x0), scale, strict=True)]


def _half_log_snr(process: Process, t: Tensor) -> Tensor:
    return process.alpha(t).log() - process.sigma(t).log()


def _bent(half_log_snr: Tensor, exponent: float) -> Tensor:
    """The variable of the polynomial: (sigma/alpha)^exponent, or -lambda."""
    return torch.exp(-exponent * half_log_snr) if exponent else -half_log_snr


def _lagrange(nodes: Tensor, at: Tensor) -> list[Tensor]:
    """The polynomials that are 1 at one node `(p, ...)` and 0 at the others, at points `(m, ...)`."""
    basis = []
    for i in range(len(nodes)):
        value = torch.ones_like(at)
        for j in range(len(nodes)):
            if j != i:
                value = value * (at - nodes[j]) / (nodes[i] - nodes[j])
        basis.append(value)
    return basis


def last_weights(process: Process, known_at: Tensor) -> Weights:
    """The step that ends in the data: x0hat taken to t_min by a polynomial in (sigma/alpha)^2 through its last values.

    Near the data x0hat is a smooth and even function of sigma/alpha along the path of an ODE; the values of noisy paths
    are not to be extrapolated: for them `known_at` is the last time alone, and the step is x0hat itself.
    """
    end = torch.full((1,), process.t_min, dtype=torch.float64)
    nodes, at = (_bent(_half_log_snr(process, t), 2.0) for t in (known_at, end))
    zero = torch.zeros((), dtype=torch.float64)
    return Weights(zero, [values[0] for values in _lagrange(nodes, at)], zero)


def network_steps(
    denoiser: AffineDenoiser,
    t: Tensor,
    weights: Sequence[Weights],
    corrections: Sequence[Sequence[Tensor]] = (),
) -> list[Step]:
    """One step a network call, the coefficients of the network put in.

    Args:
        denoiser: how the network's output becomes x0hat.
        t: float64 times of the calls, decreasing, `(n,)`.
        weights: of the n steps that begin there.
        corrections: for each of the first n - 1, what replaces its weights once x0hat is known where it ends.
    """
    on_x, on_output = (list(map(scalar, value)) for value in denoiser.coefficients(t))
    return [
        Step(
            t[k : k + 1],
            (on_x[k], on_output[k]),
            scalar(move.on_x),
            list(map(scalar, move.on_x0)),
            scalar(move.scale),
            list(map(scalar, corrections[k - 1])) if corrections and k else (),
        )
        for k, move in enumerate(weights)
    ]


def call_times(process: Process, grid: Grid, steps: int) -> Tensor:
    """Where n steps begin, `(n,)`: progress 0, 1/n, .., (n - 1)/n from t_max to t_min; the n-th ends in the data."""
    progress = torch.arange(steps, dtype=torch.float64) / steps
    return grid.between(process.t_max, process.t_min, process).time(progress)
