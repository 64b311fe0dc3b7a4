"""The unadjusted Langevin algorithm: small steps up the score with noise, none of them refused."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from probgen.core import NonNegativeInt, Positive
from probgen.kernels import Evaluate, Point, Stats, SteppingEngine, Tuning


@dataclass(frozen=True)
class ULAKernel:
    """x' = x + h grad log p(x) + sqrt(2 h) z, z ~ N(0, I): Euler-Maruyama steps of Langevin dynamics."""

    static: ClassVar[bool] = True

    def normals(self, dim: int) -> int:
        """z."""
        return dim

    def start(self, evaluate: Evaluate, position: Tensor, noise: Tensor) -> Point:
        """The gradient where chains begin."""
        return Point(position, *evaluate(position))

    def step(self, evaluate: Evaluate, state: Point, tuning: Tuning, noise: Tensor) -> tuple[Point, Stats]:
        """One step of every chain: one gradient."""
        h = tuning.step_size
        position = state.position + h * state.grad + (2 * h).sqrt() * noise
        new = Point(position, *evaluate(position))
        return new, {"n_steps": torch.ones_like(new.log_prob)}


@dataclass(frozen=True)
class ULA(SteppingEngine):
    """Langevin steps x' = x + h grad log p(x) + sqrt(2 h) z without an accept step, one gradient each.

    Nothing is adapted and nothing is refused, so that a score suffices, each chain is the same however many run beside
    it, and the law drawn from is off by O(h): on N(0, 1) its variance is 1/(1 - h/2). Steps longer than twice the
    smallest variance run away.

    Args:
        step_size: h > 0, in unconstrained space.
        num_warmup: transitions before the first draw, >= 0, in which chains forget their starts; thrown away.
        thin, compile: as for every `MarkovEngine`.

    Raises:
        InputError: a setting out of range; chains that all ran away.

    `stats` holds lp and n_steps.

    Source: Parisi (1981); Roberts & Tweedie (1996), "Exponential convergence of Langevin distributions and their
    discrete approximations", Bernoulli 2(4).

    >>> ULA(step_size=0.1).guarantee
    'discretised'
    """

    step_size: Positive = 0.01
    num_warmup: NonNegativeInt = 500
    guarantee = "discretised"
    independent: ClassVar[bool] = True
    needs_log_prob: ClassVar[bool] = False
    paper: ClassVar[str] = "Roberts & Tweedie 1996, Bernoulli 2(4)"
    offers: ClassVar[str] = (
        "one gradient a transition, from scores too; chains that know nothing of each other"
    )
    gives_up: ClassVar[str] = "a law off by O(step size), which is set by hand; separated modes"

    def kernel(self) -> ULAKernel:
        """The transition."""
        return ULAKernel()


def example() -> ULA:
    """A few steps before the first draw."""
    return ULA(step_size=0.05, num_warmup=20)
