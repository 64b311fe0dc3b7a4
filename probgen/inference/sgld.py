"""Stochastic gradient Langevin dynamics: Langevin steps whose gradient comes from a few rows of the data."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, ClassVar, NamedTuple

import torch
from torch import Tensor

from probgen.core import Count, NonNegativeInt, Positive, Target, Within
from probgen.kernels import Evaluate, Stats, SteppingEngine, Tuning
from probgen.targets import Density
from probgen.targets.minibatch import minibatch_density


class SGLDState(NamedTuple):
    """Where chains stand, the gradient there by the rows of the next step, and the number of that step `(n,)`."""

    position: Tensor
    log_prob: Tensor
    grad: Tensor
    step: Tensor


@dataclass(frozen=True)
class SGLDKernel:
    """x' = x + h_t g(x) + sqrt(2 h_t) z with E g = grad log p, z ~ N(0, I) and h_t = h (1 + t/b)^-gamma.

    Args:
        decay: gamma.
        offset: b.
    """

    decay: Annotated[float, Within(0, 1, why="faster, steps have a finite sum and chains stop short")]
    offset: Positive
    static: ClassVar[bool] = True

    def normals(self, dim: int) -> int:
        """z."""
        return dim

    def start(self, evaluate: Evaluate, position: Tensor, noise: Tensor) -> SGLDState:
        """The gradient where chains begin, at step 0."""
        log_prob, grad = evaluate(position)
        return SGLDState(position, log_prob, grad, torch.zeros_like(log_prob))

    def step(
        self, evaluate: Evaluate, state: SGLDState, tuning: Tuning, noise: Tensor
    ) -> tuple[SGLDState, Stats]:
        """One step of every chain: one gradient."""
        h = tuning.step_size
        if self.decay:
            h = h * (1 + state.step / self.offset) ** -self.decay
        position = state.position + h * state.grad + (2 * h).sqrt() * noise
        log_prob, grad = evaluate(position)
        stats = {"n_steps": torch.ones_like(log_prob), "step_size": h.expand_as(log_prob)}
        return SGLDState(position, log_prob, grad, state.step + 1), stats


@dataclass(frozen=True)
class SGLD(SteppingEngine):
    """Langevin steps x' = x + h_t g(x) + sqrt(2 h_t) z, g an unbiased estimate of grad log p from m of N rows.

    With a constant step the law drawn from is off by O(h), of which the noise of g is a part: on a quadratic of Hessian
    A where g has covariance C, the covariance solves S = (I - h A) S (I - h A) + 2 h I + h^2 C. With steps
    h_t = h (1 + t/b)^-gamma, which is the paper's a (b + t)^-gamma, both fade; chains then move less and less. Draws
    are equally weighted, where the paper weights them by h_t, which stands in `stats`. Without minibatches and decay it
    is ULA.

    Each transition draws m rows with replacement, for each chain its own: of a `Batch`, or as plates with a
    `subsample_size` do. Latents of single rows are refused.

    Args:
        step_size: h > 0, half of the paper's, in unconstrained space; about the smallest variance at most.
        batch_size: m, rows of a `Batch` that a gradient looks at; None for all, and for functions, whose plates say
            it.
        decay: gamma, 0 for a constant step; the paper asks for a number in (1/2, 1].
        offset: b > 0, transitions until the decay is felt.
        num_warmup: transitions before the first draw, >= 0; thrown away. The decay counts them.
        thin, compile: as for every `MarkovEngine`.

    Raises:
        InputError: a setting out of range; a batch size for a program without a `Batch`.

    `stats` holds lp, as estimated from the rows drawn, n_steps and step_size.

    Source: Welling & Teh (2011), "Bayesian learning via stochastic gradient Langevin dynamics", ICML.

    >>> SGLD(step_size=1e-3, batch_size=32).guarantee
    'discretised'
    """

    step_size: Positive = 0.001
    batch_size: Count | None = None
    decay: Annotated[float, Within(0, 1, why="faster, steps have a finite sum and chains stop short")] = 0.0
    offset: Positive = 100.0
    num_warmup: NonNegativeInt = 500
    guarantee = "discretised"
    data_sets = False
    independent: ClassVar[bool] = True
    needs_log_prob: ClassVar[bool] = False
    paper: ClassVar[str] = "Welling & Teh 2011, ICML"
    offers: ClassVar[str] = "gradients from a few rows: a transition costs the same for any amount of data"
    gives_up: ClassVar[str] = "a law off by O(step size) and by the noise of minibatches; separated modes"

    def density(self, target: Target) -> Density:
        """The density as minibatches estimate it."""
        return minibatch_density(target, self.batch_size)

    def kernel(self) -> SGLDKernel:
        """The transition."""
        return SGLDKernel(self.decay, self.offset)


def example() -> SGLD:
    """Short steps, few before the first draw."""
    return SGLD(step_size=0.01, num_warmup=20)
