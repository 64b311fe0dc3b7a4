"""Multistep exponential solvers of the reverse family: few network calls, each used several times."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from probgen.core import NonNegative
from probgen.dynamics import AffineDenoiser, FlowEngine, GaussianInitial
from probgen.dynamics.fields import Steps
from probgen.dynamics.multistep import (
    Step,
    Weights,
    call_times,
    exponential_weights,
    last_weights,
    network_steps,
    take_steps,
)
from probgen.processes import Grid, Process, as_grid
from probgen.randomness import Noise


@dataclass(frozen=True)
class DPMSolver(FlowEngine):
    """Solves the linear part of the reverse family exactly, x0hat between network calls by a polynomial.

        x_s = (sigma_s/sigma_t) e^{-a h} x_t + alpha_s int (1 + a) e^{-(1 + a)(lambda_s - lambda)} x0hat d lambda
              + sigma_s sqrt(1 - e^{-2 a h}) z,    lambda = log(alpha/sigma), h = lambda_s - lambda_t.

    n steps cost n network calls: they begin at progress 0, 1/n, .., (n - 1)/n of the grid, and the last one ends in
    the data: in x0hat, carried on from the last two calls to t_min where the path has no noise. The first steps are of
    lower order, there being fewer calls to look back on.

    Args:
        steps: n >= 1.
        order: 1, 2 or 3 values of x0hat in the polynomial; 1 without corrector is `DDIM`. Third order needs the
            corrector: without it the first step, of order 1, leaves an error of second order.
        stochasticity: a >= 0; 0 is the probability-flow ODE, 1 Anderson's SDE (SDE-DPM-Solver++).
        grid: how steps are spread over time: "logsnr", "karras", "quadratic", "uniform" or a `Grid`; the last two are
            for laws that differ by coordinate.
        exponent: the polynomial is one in (sigma/alpha)^exponent, >= 0; 0 is one in lambda, as published. A power
            stays finite where x0hat does, near the data, and grows with the errors of x0hat near noise.
        corrector: once x0hat is known where a step ends, take that step again with it in the polynomial (UniC): no
            further call, and a smaller error from about 10 steps on.
        batch_size, compile: as for every `FlowEngine`.

    DPM-Solver++(2M) is `DPMSolver(n, order=2, exponent=0, corrector=False)` with the integral taken exactly. What was
    best on the digits: the defaults, for 5 calls with `exponent=1 / 2`.

    Source: Lu et al. (2022), arXiv 2211.01095; Zhao et al. (2023), arXiv 2302.04867, for the corrector; Zhang & Chen
    (2022), arXiv 2204.13902, for the choice of the variable; Xue et al. (2023), arXiv 2305.14267, for any a.

    >>> str(DPMSolver(steps=10, order=2))
    'DPMSolver(steps=10, order=2)'
    """

    steps: Steps = 20
    order: Literal[1, 2, 3] = 3
    stochasticity: NonNegative = 0.0
    grid: Grid | str = "logsnr"
    exponent: NonNegative = 1 / 3
    corrector: bool = True
    paper: ClassVar[str] = "Lu et al. 2022, arXiv 2211.01095"
    offers: ClassVar[str] = "the fewest network calls; any member of the reverse family"
    gives_up: ClassVar[str] = "exactness at finite steps; few steps hang on the grid"

    def __post_init__(self) -> None:
        super().__post_init__()
        as_grid(self.grid)

    def num_calls(self) -> int:
        """One a step."""
        return self.steps

    def draw(self, field: AffineDenoiser, noise: Noise) -> Tensor:
        """One batch; see `FlowEngine.draw`."""
        times = call_times(field.process, as_grid(self.grid), self.steps)
        x = GaussianInitial(field.process.terminal_scale()).draw(noise)
        return take_steps(field.output, self.plan(field, times), x, noise.each(range(1, self.steps)))

    def plan(self, field: AffineDenoiser, times: Tensor) -> list[Step]:
        """The steps that begin at these times `(n,)`, float64 and decreasing, the last of them to the data."""
        predictions = self._weights(field.process, times, looks_ahead=False)
        corrections = self._weights(field.process, times, looks_ahead=True) if self.corrector else []
        noisy_or_first_order = self.stochasticity > 0 or self.order == 1
        last = last_weights(field.process, times[-1:] if noisy_or_first_order else times[-2:].flip(0))
        return network_steps(field, times, [*predictions, last], [move.on_x0 for move in corrections])

    def _weights(self, process: Process, times: Tensor, looks_ahead: bool) -> list[Weights]:
        """Of each step between two times, by the latest values of x0hat where it begins, or up to where it ends."""
        ends = torch.arange(1, len(times))
        newest = ends if looks_ahead else ends - 1
        num_known = (newest + 1).clamp_max(self.order)
        weights: list[Weights] = []
        for count in range(1, self.order + 1):  # fewer are known at the first steps
            rows = num_known == count
            known_at = times[newest[rows] - torch.arange(count)[:, None]]
            start, end = times[ends[rows] - 1], times[ends[rows]]
            weights += exponential_weights(process, start, end, known_at, self.stochasticity, self.exponent)
        return weights


def example() -> DPMSolver:
    """A few steps."""
    return DPMSolver(steps=5)
