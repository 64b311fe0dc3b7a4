"""Paths over real coordinates: from a law that can be drawn from to a density, moved by Hamiltonian Monte Carlo.

Runs stand in columns, `(dim, n)`, and the log densities and gradients of the two ends are kept side by side: where a
run stands they serve every beta.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from probgen.core import Count, Fraction, check_fields
from probgen.kernels.core import Point
from probgen.kernels.leapfrog import accept, kinetic_energy

_ADAPTATION = 0.5  # change of the log step size for acceptance that is wrong by one
_STRIDE = 0.5  # nats: standard deviation of the log weights that the pilot gains at a step
_LONGEST, _MOST = 1 / 20, 400  # step of beta, number of steps of the pilot
_MOVES = 3  # at each of its beta


class Ends(Protocol):
    """The two ends of a path over R^dim, for `num_rows` rows of data in columns `run * rows + row`."""

    num_rows: int
    log_partition: Tensor
    """log of the integral of the first end: `()`, or `(rows,)` where rows of data have paths of their own."""

    def draw(self) -> Point:
        """Independent draws of the first end."""

    def at(self, position: Tensor) -> Point:
        """Log densities of both ends, `(2, n)`, and their gradients, `(2, dim, n)`, at `(dim, n)`."""


@dataclass(frozen=True)
class HamiltonianMoves:
    """Hamiltonian Monte Carlo with an accept step: one transition leaves each p_beta as it is, exactly.

    One step is MALA. Step sizes are found in a pilot run before the runs that count, for every beta and each datum.

    Args:
        num_steps: leapfrog steps a transition, >= 1; each costs a gradient.
        acceptance: the rate that step sizes are set for, in (0, 1).

    Source: Duane, Kennedy, Pendleton & Roweth (1987), Physics Letters B 195; Neal (2011), arXiv 1206.1901.

    >>> HamiltonianMoves(num_steps=1).acceptance
    0.8
    """

    num_steps: Count = 3
    acceptance: Fraction = 0.8

    def __post_init__(self) -> None:
        check_fields(self)

    def move(self, ends: Ends, point: Point, beta: float, step_size: Tensor) -> tuple[Point, Tensor]:
        """One transition for p_beta, and how likely each was to be accepted, `(n,)`.

        Args:
            ends: of the path.
            point: where the runs stand.
            beta: in [0, 1].
            step_size: `(dim, n)` or `(dim, 1)`, in units of the coordinates; it is shortened at random, by up to half.
        """
        share = point.log_prob.new_tensor([1 - beta, beta])
        step = step_size * (0.5 + 0.5 * torch.rand_like(point.log_prob[0]))
        first = momentum = torch.randn_like(point.position)
        new, force = point, torch.tensordot(share, point.grad, 1)
        for _ in range(self.num_steps):
            half = momentum + 0.5 * step * force
            new = ends.at(new.position + step * half)
            force = torch.tensordot(share, new.grad, 1)
            momentum = half + 0.5 * step * force
        log_ratio = share @ (new.log_prob - point.log_prob) + kinetic_energy(first) - kinetic_energy(momentum)
        chosen, probability, _ = accept(point, new, log_ratio, torch.randn_like(point.log_prob))
        return chosen, probability


class Pilot(NamedTuple):
    """What runs before the ones that count have found out.

    Args:
        betas: such that log weights spread by about as much at each step, from 0 to 1.
        step_sizes: at these, each `(dim, rows)`.
        position: where the runs ended, `(dim, n)`.
    """

    betas: list[float]
    step_sizes: list[Tensor]
    position: Tensor


def pilot(ends: Ends, moves: HamiltonianMoves) -> Pilot:
    """Go once from one end to the other, no faster than the runs can follow, and adapt step sizes on the way."""
    point, betas, step_sizes = ends.draw(), [0.0], []
    log_step = point.position.new_full((ends.num_rows,), -0.25 * math.log(len(point.position)))
    while True:
        scale = _spread(point.position, ends.num_rows)
        for _ in range(_MOVES):
            step = _by_column(log_step.exp() * scale, point)
            point, accepted = moves.move(ends, point, betas[-1], step)
            log_step = log_step + _ADAPTATION * (
                accepted.reshape(-1, ends.num_rows).mean(0) - moves.acceptance
            )
        step_sizes.append(log_step.exp() * scale)
        if betas[-1] == 1.0:
            return Pilot(betas, step_sizes, point.position)
        stride = min(_LONGEST, _STRIDE / max(_roughness(point, ends.num_rows), 1e-30))
        betas.append(min(1.0, betas[-1] + stride) if len(betas) < _MOST else 1.0)


class HamiltonianPath:
    """log f_beta = (1 - beta) log f_0 + beta log f_1 over R^dim.

    Args:
        ends: log f_0 and log f_1.
        moves: the transitions.
        found: by the pilot.
    """

    def __init__(self, ends: Ends, moves: HamiltonianMoves, found: Pilot) -> None:
        self.ends, self.moves, self.found = ends, moves, found

    @property
    def log_partition(self) -> Tensor:
        """log Z_0."""
        return self.ends.log_partition

    def schedule(self, num_temperatures: int) -> list[float]:
        """The pilot's beta, with as many in each of its steps."""
        betas = torch.tensor(self.found.betas, dtype=torch.float64)
        at = torch.linspace(0, len(betas) - 1, num_temperatures + 1, dtype=torch.float64)
        left = at.long().clamp(max=len(betas) - 2)
        between: list[float] = torch.lerp(betas[left], betas[left + 1], at - left).tolist()
        return between

    def draw(self) -> Point:
        """Independent draws of the first end."""
        return self.ends.draw()

    def log_ratio(self, state: Point, before: float, after: float) -> Tensor:
        """log f_after - log f_before, `(n,)`."""
        return (after - before) * (state.log_prob[1] - state.log_prob[0])

    def move(self, state: Point, beta: float) -> Point:
        """One transition, the step size that of the pilot at about this beta."""
        step = self.found.step_sizes[bisect_right(self.found.betas, beta) - 1]
        return self.moves.move(self.ends, state, beta, _by_column(step, state))[0]

    def take(self, state: Point, index: Tensor) -> Point:
        """Runs that begin where those of `index` stand."""
        return Point(*(each[..., index] for each in state))


def _spread(position: Tensor, num_rows: int) -> Tensor:
    """Standard deviation of each coordinate over the runs of a row, `(dim, rows)`, few runs believed less."""
    by_run = position.unflatten(1, (-1, num_rows))
    count = by_run.shape[1]
    variance = by_run.var(1) * (count / (count + 5))
    return (variance + (5 / (count + 5)) * variance.mean(0)).sqrt().clamp_min(1e-6)


def _roughness(point: Point, num_rows: int) -> float:
    """Standard deviation of log f_1 - log f_0 over the runs of a row, nats."""
    by_run = (point.log_prob[1] - point.log_prob[0]).double().reshape(-1, num_rows)
    variance = by_run.var(0)
    return float(variance[torch.isfinite(variance)].mean().nan_to_num().sqrt())


def _by_column(step: Tensor, point: Point) -> Tensor:
    rows = step.shape[1]
    return step if rows == 1 else step.repeat(1, point.position.shape[1] // rows)
