"""Hamiltonian Monte Carlo: trajectories of a fixed number of leapfrog steps, then an accept step."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, ClassVar

import torch
from torch import Tensor

from probgen.core import Count, Fraction, NonNegativeInt, Positive, Within
from probgen.kernels import (
    MAX_ENERGY_ERROR,
    AdaptiveEngine,
    Evaluate,
    MetricKind,
    Point,
    Stats,
    Tuning,
    accept,
    compiled,
    kinetic_energy,
    leapfrog,
)
from probgen.priors.noise_space import Space


@dataclass(frozen=True)
class HMCKernel:
    """p ~ N(0, I), L leapfrog steps of x' = p, p' = grad log p(x), accepted with probability min(1, exp(-dH)).

    Args:
        num_steps: L.
        jitter: the step of each chain and transition is multiplied by a uniform number in (1 - jitter, 1).
        leapfrog: makes one step.
    """

    num_steps: int
    jitter: float = 0.0
    leapfrog: Callable[..., tuple[Point, Tensor]] = leapfrog
    static: ClassVar[bool] = True

    def normals(self, dim: int) -> int:
        """A momentum, two for the accept step, one for the jitter."""
        return dim + 2 + (self.jitter > 0)

    def start(self, evaluate: Evaluate, position: Tensor, noise: Tensor) -> Point:
        """The density where chains begin."""
        return Point(position, *evaluate(position))

    def step(self, evaluate: Evaluate, state: Point, tuning: Tuning, noise: Tensor) -> tuple[Point, Stats]:
        """One trajectory of every chain: exactly L gradients."""
        dim = len(state.position)
        momentum, step_size = noise[:dim], tuning.step_size
        if self.jitter:
            step_size = step_size * (1 - 0.5 * self.jitter * torch.erfc(noise[dim + 2] * 0.5**0.5))
        energy = kinetic_energy(momentum) - state.log_prob
        point = state
        for _ in range(self.num_steps):
            point, momentum = self.leapfrog(evaluate, point, momentum, step_size)
        change = kinetic_energy(momentum) - point.log_prob - energy
        state, acceptance, _ = accept(state, point, -change, noise[dim : dim + 2])
        return state, {
            "acceptance_rate": acceptance,
            "diverging": ~(change < MAX_ENERGY_ERROR),
            "energy": energy,
            "n_steps": torch.full_like(acceptance, self.num_steps, dtype=torch.int32),
        }

    def in_steps(self) -> HMCKernel:
        """The same with its leapfrog steps compiled, for trajectories too long to be compiled whole."""
        return _SteppingHMCKernel(self.num_steps, self.jitter, compiled(leapfrog, True))


class _SteppingHMCKernel(HMCKernel):
    static: ClassVar[bool] = False


@dataclass(frozen=True)
class HMC(AdaptiveEngine):
    """Draws at the ends of Hamiltonian trajectories of a fixed number of steps; asymptotically exact.

    Args:
        num_steps: L >= 1, leapfrog steps and gradients a transition; step_size * L is the length of a trajectory.
        step_size: > 0, in coordinates scaled by the metric; None is adapted.
        num_warmup: transitions for adapting step size and metric, thrown away; 0 needs a step size.
        target_accept: acceptance the step size aims at, in (0, 1).
        metric: "diagonal", "dense" or "identity": the covariance learnt in warm-up.
        jitter: in [0, 1): each step size is multiplied by a uniform number in (1 - jitter, 1), so that no
            trajectory returns to its start for ever.
        space: "data", or "noise" (a `NoiseSpace`) for chains in the noise that a `Prior` makes its site of.
        thin, compile: as for every `MarkovEngine`.

    Raises:
        InputError: a setting out of range.

    `stats` holds acceptance_rate, diverging, energy, lp, n_steps.

    Source: Duane et al. (1987); Neal (2011), arXiv 1206.1901.

    >>> HMC(num_steps=10).target_accept
    0.9
    """

    num_steps: Count = 16
    step_size: Positive | None = None
    num_warmup: NonNegativeInt = 500
    target_accept: Fraction = 0.9
    metric: MetricKind = "diagonal"
    jitter: Annotated[float, Within(0, 1, "[)")] = 0.5
    space: Space = "data"
    guarantee = "asymptotic"
    paper: ClassVar[str] = "Neal 2011, arXiv 1206.1901"
    offers: ClassVar[str] = "many chains at once at the same cost each, of any continuous program or energy"
    gives_up: ClassVar[str] = "the number of steps is set by hand; separated modes"

    def kernel(self) -> HMCKernel:
        """The transition."""
        return HMCKernel(self.num_steps, self.jitter)


def example() -> HMC:
    """A short warm-up and short trajectories."""
    return HMC(num_steps=4, num_warmup=20)
