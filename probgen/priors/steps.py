"""The steps of a reverse diffusion whose Gaussian transitions are known, for engines that shift and weigh them."""

from __future__ import annotations

from typing import NamedTuple

import torch

from probgen.core import InputError
from probgen.processes import Grid, Process, as_grid


class Step(NamedTuple):
    """From t to s < t: x_s = on_x x_t + on_x_0 x_0hat + scale z, the law q(x_s | x_t, x_0) at x_0 = x_0hat.

    Args:
        t, s: times.
        on_x, on_x_0, scale: of the bridge, worked out in float64.
        on_score: by how much a term added to the score of p(x_t) moves the mean of x_s: on_x_0 sigma_t^2 / alpha_t.
        flow_on_x, flow_on_x_0, flow_on_score: the same for the probability flow (no noise):
            x_s = alpha_s x_0hat + sigma_s (x_t - alpha_t x_0hat) / sigma_t.
        ahead: by how much of its change over the step before x_0hat is carried on, to the middle of this step in
            log(alpha / sigma): x_0hat + ahead (x_0hat - x_0hat before) makes steps of second order (Lu et al. 2022,
            arXiv 2211.01095, SDE-DPM-Solver++(2M)); 0 for the first step.
    """

    t: float
    s: float
    on_x: float
    on_x_0: float
    scale: float
    on_score: float
    flow_on_x: float
    flow_on_x_0: float
    flow_on_score: float
    ahead: float


def reverse_steps(
    process: Process, grid: Grid | str, num_steps: int, start: float | None = None
) -> list[Step]:
    """The steps from `start`, t_max where it is None, down to t_min.

    >>> from probgen.processes import VP
    >>> steps = reverse_steps(VP(), "quadratic", 3)
    >>> [round(step.t, 3) for step in steps], steps[-1].s
    ([1.0, 0.459, 0.126], 0.001)
    """
    u = torch.linspace(0, 1, num_steps + 1, dtype=torch.float64)
    times = as_grid(grid).between(start or process.t_max, process.t_min, process).time(u)
    times[-1] = process.t_min  # whatever rounding made of it
    t, s = times[:-1], times[1:]
    on_x, on_x_0, variance = process.bridge_coefficients(s, t)
    if on_x.ndim > 1:
        raise InputError(
            "Steps with known transitions need one alpha and one sigma a time for all coordinates."
        )
    spread = process.sigma(t).square() / process.alpha(t)
    flow_on_x = process.sigma(s) / process.sigma(t)
    flow_on_x_0 = process.alpha(s) - process.alpha(t) * flow_on_x
    lengths = (process.alpha(times) / process.sigma(times)).log().diff()
    ahead = torch.cat((lengths.new_zeros(1), 0.5 * lengths[1:] / lengths[:-1]))
    columns = (
        t,
        s,
        on_x,
        on_x_0,
        variance.sqrt(),
        on_x_0 * spread,
        flow_on_x,
        flow_on_x_0,
        flow_on_x_0 * spread,
        ahead,
    )
    return [Step(*row) for row in zip(*(column.tolist() for column in columns), strict=True)]
