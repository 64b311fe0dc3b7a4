"""The no-U-turn sampler: Hamiltonian trajectories that are as long as they need to be."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from probgen.core import Count, Fraction, NonNegativeInt, Positive
from probgen.kernels import AdaptiveEngine, MetricKind
from probgen.kernels.no_u_turn import NUTSKernel
from probgen.priors.noise_space import Space


@dataclass(frozen=True)
class NUTS(AdaptiveEngine):
    """Draws of Hamiltonian trajectories that stop at a U-turn; asymptotically exact.

    Each trajectory doubles, forwards or backwards in time, until it turns; one of its states is drawn with weight
    exp(-H), those of the last doubling first. Chains run side by side and never wait for longer trajectories of others.

    Args:
        num_warmup: transitions for adapting step size and metric, thrown away; 0 needs a step size.
        step_size: > 0, in coordinates scaled by the metric; None is adapted.
        target_accept: acceptance the step size aims at, in (0, 1).
        max_tree_depth: doublings at most, >= 1: at most 2^depth - 1 gradients a draw.
        metric: "diagonal", "dense" or "identity": the covariance learnt in warm-up.
        space: "data", or "noise" (a `NoiseSpace`) for chains in the noise that a `Prior` makes its site of.
        thin, compile: as for every `MarkovEngine`.

    Raises:
        InputError: a setting out of range.

    `stats` holds acceptance_rate, diverging, energy, lp, n_steps (gradients), tree_depth, reached_max_tree_depth.

    Source: Hoffman & Gelman (2014), arXiv 1111.4246; weights and U-turns as in Betancourt (2017), arXiv 1701.02434;
    trees without recursion as in Phan, Pradhan & Jankowiak (2019), arXiv 1912.11554, and Lao & Dillon (2019).

    >>> NUTS(num_warmup=200).target_accept
    0.9
    """

    num_warmup: NonNegativeInt = 500
    step_size: Positive | None = None
    target_accept: Fraction = 0.9
    max_tree_depth: Count = 10
    metric: MetricKind = "diagonal"
    space: Space = "data"
    guarantee = "asymptotic"
    paper: ClassVar[str] = "Hoffman & Gelman 2014, arXiv 1111.4246"
    offers: ClassVar[str] = "the posterior itself, of any continuous program or energy, with nothing to set"
    gives_up: ClassVar[str] = "many gradients a draw; separated modes"

    def kernel(self) -> NUTSKernel:
        """The transition."""
        return NUTSKernel(self.max_tree_depth, self.compile)


def example() -> NUTS:
    """A short warm-up and short trajectories."""
    return NUTS(num_warmup=20, max_tree_depth=4)
