"""The Metropolis-adjusted Langevin algorithm: Langevin steps, refused as often as makes them exact."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from probgen.core import Fraction, NonNegativeInt, Positive
from probgen.kernels import (
    AdaptiveEngine,
    Evaluate,
    MetricKind,
    Point,
    Stats,
    StepSize,
    Tuning,
    accept,
    kinetic_energy,
)
from probgen.priors.noise_space import Space


@dataclass(frozen=True)
class MALAKernel:
    """x' = x + h grad log p(x) + sqrt(2 h) z, accepted with probability min(1, p(x') q(x | x') / p(x) q(x' | x)).

    The way back, x = x' + h grad log p(x') + sqrt(2 h) z', takes the noise z' = -z - sqrt(h/2) (g + g'), with g and g'
    the gradients at x and x'; so log q(x | x') - log q(x' | x) = |z|^2/2 - |z'|^2/2.
    """

    static: ClassVar[bool] = True

    def normals(self, dim: int) -> int:
        """z, and two for the accept step."""
        return dim + 2

    def start(self, evaluate: Evaluate, position: Tensor, noise: Tensor) -> Point:
        """The density where chains begin."""
        return Point(position, *evaluate(position))

    def step(self, evaluate: Evaluate, state: Point, tuning: Tuning, noise: Tensor) -> tuple[Point, Stats]:
        """One proposal for every chain: one gradient."""
        dim, h = len(state.position), tuning.step_size
        z = noise[:dim]
        position = state.position + h * state.grad + (2 * h).sqrt() * z
        new = Point(position, *evaluate(position))
        back = z + (0.5 * h).sqrt() * (state.grad + new.grad)
        log_ratio = new.log_prob - kinetic_energy(back) - state.log_prob + kinetic_energy(z)
        state, acceptance, _ = accept(state, new, log_ratio, noise[dim:])
        return state, {"acceptance_rate": acceptance, "n_steps": torch.ones_like(acceptance)}


class LangevinStepSize(StepSize):
    """A step size h for Langevin steps; begins from eps, that of a leapfrog step of the same length: h = eps^2/2."""

    def begin(self, tuning: Tuning, num_sets: int) -> Tuning:
        """Start from half the square of the step size there is."""
        return super().begin(tuning._replace(step_size=0.5 * tuning.step_size.square()), num_sets)


@dataclass(frozen=True)
class MALA(AdaptiveEngine):
    """Langevin steps x' = x + h grad log p(x) + sqrt(2 h) z with an accept step, one gradient each; exact in the end.

    Args:
        step_size: h > 0, in coordinates scaled by the metric; None is adapted.
        num_warmup: transitions for adapting step size and metric, thrown away; 0 needs a step size.
        target_accept: acceptance the step size aims at, in (0, 1); 0.574 is optimal in many dimensions (Roberts &
            Rosenthal 1998).
        metric: "diagonal", "dense" or "identity": the covariance learnt in warm-up.
        space: "data", or "noise" (a `NoiseSpace`) for chains in the noise that a `Prior` makes its site of.
        thin, compile: as for every `MarkovEngine`.

    Raises:
        InputError: a setting out of range; chains of which not one moved.

    `stats` holds acceptance_rate, lp, n_steps.

    Source: Besag (1994); Roberts & Tweedie (1996), "Exponential convergence of Langevin distributions and their
    discrete approximations", Bernoulli 2(4).

    >>> MALA(num_warmup=200).guarantee
    'asymptotic'
    """

    step_size: Positive | None = None
    num_warmup: NonNegativeInt = 500
    target_accept: Fraction = 0.574
    metric: MetricKind = "diagonal"
    space: Space = "data"
    step_adapter: ClassVar[type[StepSize]] = LangevinStepSize
    guarantee = "asymptotic"
    paper: ClassVar[str] = "Roberts & Tweedie 1996, Bernoulli 2(4)"
    offers: ClassVar[str] = "one gradient a transition, nothing set by hand, draws from the law itself"
    gives_up: ClassVar[str] = "distance: each transition is a single short step; separated modes"

    def kernel(self) -> MALAKernel:
        """The transition."""
        return MALAKernel()


def example() -> MALA:
    """A short warm-up."""
    return MALA(num_warmup=20)
