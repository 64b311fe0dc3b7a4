"""Stochastic gradient descent with a constant step, taken as a sampler: it hovers about the mode."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from probgen.core import Count, InputError, NonNegativeInt, Positive, Target, describe
from probgen.kernels import Evaluate, Point, Stats, SteppingEngine, Tuning
from probgen.targets import Density
from probgen.targets.minibatch import minibatch_density


@dataclass(frozen=True)
class ConstantSGDKernel:
    """x' = x + tau g(x) with E g = grad log p."""

    static: ClassVar[bool] = True

    def normals(self, dim: int) -> int:
        """None of its own: what is random are the rows."""
        return 0

    def start(self, evaluate: Evaluate, position: Tensor, noise: Tensor) -> Point:
        """The gradient where chains begin."""
        return Point(position, *evaluate(position))

    def step(self, evaluate: Evaluate, state: Point, tuning: Tuning, noise: Tensor) -> tuple[Point, Stats]:
        """One step of every chain: one gradient."""
        position = state.position + tuning.step_size * state.grad
        new = Point(position, *evaluate(position))
        return new, {"n_steps": torch.ones_like(new.log_prob)}


@dataclass(frozen=True)
class ConstantSGD(SteppingEngine):
    """Descent x' = x + tau g(x) on -log p, g an unbiased estimate of grad log p from m of N rows; no noise is added.

    It is not Langevin dynamics: the spread of the draws is that of the minibatches. On a quadratic of Hessian A where g
    has covariance C it is stationary with the covariance S that solves

        S = (I - tau A) S (I - tau A) + tau^2 C,

    about tau/2 A^-1 C for commuting A and C, and in no way that of the posterior, A^-1, unless tau and m are chosen so:
    in d dimensions the closest Gaussian has about tau = 2 d/tr C. More draws do not bring it closer.

    Args:
        step_size: tau > 0, in unconstrained space, on -log p itself; 1/N of the step on the average over N rows. Below
            2/(largest eigenvalue of A), or chains run away.
        batch_size: m, rows of a `Batch` that a gradient looks at; None for functions, whose plates say it.
        num_warmup: transitions before the first draw, >= 0; thrown away.
        thin, compile: as for every `MarkovEngine`.

    Raises:
        InputError: a setting out of range; no minibatches, without which all chains end in the mode.

    `stats` holds lp, as estimated from the rows drawn, and n_steps.

    Source: Mandt, Hoffman & Blei (2017), arXiv 1704.04289, section 3.

    >>> ConstantSGD(step_size=1e-4, batch_size=10).guarantee
    'approximate'
    """

    step_size: Positive = 0.001
    batch_size: Count | None = None
    num_warmup: NonNegativeInt = 500
    guarantee = "approximate"
    data_sets = False
    independent: ClassVar[bool] = True
    needs_log_prob: ClassVar[bool] = False
    paper: ClassVar[str] = "Mandt et al. 2017, arXiv 1704.04289"
    offers: ClassVar[str] = "a posterior's place, and some spread, at the price of optimisation"
    gives_up: ClassVar[str] = (
        "the posterior's covariance: the spread is that of minibatches, whatever the data say"
    )

    def density(self, target: Target) -> Density:
        """The density as minibatches estimate it; `InputError` where there are none."""
        density = minibatch_density(target, self.batch_size)
        if not density.num_normals:
            raise InputError(
                f"ConstantSGD draws by the noise of minibatches, and {describe(target.program)} has none: pass "
                "batch_size for a program of a Batch, or write pyro.plate(..., subsample_size=...) in a function. "
                "For gradients of all rows there is ULA."
            )
        return density

    def kernel(self) -> ConstantSGDKernel:
        """The transition."""
        return ConstantSGDKernel()


def example() -> ConstantSGD:
    """Minibatches of two rows."""
    return ConstantSGD(step_size=0.01, batch_size=2, num_warmup=20)
