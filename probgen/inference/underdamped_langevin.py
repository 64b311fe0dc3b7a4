"""Underdamped Langevin dynamics: a momentum that is rubbed off and kicked, integrated by BAOAB."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor

from probgen.core import NonNegativeInt, Positive
from probgen.kernels import Evaluate, Stats, SteppingEngine, Tuning


class MovingPoint(NamedTuple):
    """Where chains stand, and how they move."""

    position: Tensor
    log_prob: Tensor
    grad: Tensor
    momentum: Tensor


@dataclass(frozen=True)
class BAOABKernel:
    """dx = p dt, dp = grad log p(x) dt - gamma p dt + sqrt(2 gamma) dW, split into parts that are solved exactly.

    B, a kick by the gradient for half a step; A, a drift for half a step; O, the friction and the noise of a whole
    step, p <- c p + sqrt(1 - c^2) z with c = exp(-gamma eps); then A and B again.

    Args:
        friction: gamma.
    """

    friction: Positive
    static: ClassVar[bool] = True

    def normals(self, dim: int) -> int:
        """z, or the first momentum."""
        return dim

    def start(self, evaluate: Evaluate, position: Tensor, noise: Tensor) -> MovingPoint:
        """The gradient where chains begin, with momenta from N(0, I)."""
        return MovingPoint(position, *evaluate(position), noise)

    def step(
        self, evaluate: Evaluate, state: MovingPoint, tuning: Tuning, noise: Tensor
    ) -> tuple[MovingPoint, Stats]:
        """One step of every chain: one gradient."""
        half = 0.5 * tuning.step_size
        decay = -self.friction * tuning.step_size
        momentum = state.momentum + half * state.grad
        position = state.position + half * momentum
        momentum = decay.exp() * momentum + (-(2 * decay).expm1()).sqrt() * noise
        position = position + half * momentum
        log_prob, grad = evaluate(position)
        new = MovingPoint(position, log_prob, grad, momentum + half * grad)
        return new, {"n_steps": torch.ones_like(log_prob)}


@dataclass(frozen=True)
class UnderdampedLangevin(SteppingEngine):
    """Langevin dynamics with a momentum, dp = grad log p(x) dt - gamma p dt + sqrt(2 gamma) dW, by BAOAB steps.

    Momentum carries chains farther than `ULA` at the same cost, one gradient a step, and nothing is refused, so that a
    score suffices and each chain is the same however many run beside it. The law drawn from is off by O(step_size^2),
    and not at all where it is Gaussian. Steps longer than twice the smallest standard deviation run away.

    Args:
        step_size: eps > 0, time of a step, in unconstrained space with unit mass.
        friction: gamma > 0, a rate; chains forget their momenta within a time of 1/gamma.
        num_warmup: transitions before the first draw, >= 0, in which chains forget their starts; thrown away.
        thin, compile: as for every `MarkovEngine`.

    Raises:
        InputError: a setting out of range; chains that all ran away.

    `stats` holds lp and n_steps.

    Source: Leimkuhler & Matthews (2013), "Rational construction of stochastic numerical methods for molecular
    sampling", arXiv 1203.5428.

    >>> UnderdampedLangevin(step_size=0.2, friction=0.5).independent
    True
    """

    step_size: Positive = 0.1
    friction: Positive = 1.0
    num_warmup: NonNegativeInt = 500
    guarantee = "discretised"
    independent: ClassVar[bool] = True
    needs_log_prob: ClassVar[bool] = False
    paper: ClassVar[str] = "Leimkuhler & Matthews 2013, arXiv 1203.5428"
    offers: ClassVar[str] = "one gradient a transition, from scores too, and momentum; exact on Gaussians"
    gives_up: ClassVar[str] = "a law off by O(step size squared), which is set by hand; separated modes"

    def kernel(self) -> BAOABKernel:
        """The transition."""
        return BAOABKernel(self.friction)


def example() -> UnderdampedLangevin:
    """A few steps before the first draw."""
    return UnderdampedLangevin(step_size=0.2, num_warmup=20)
