"""ChEES-HMC: trajectories whose length many chains learn together."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor

from probgen.core import Count, Fraction, Positive
from probgen.kernels import (
    MAX_ENERGY_ERROR,
    Adapter,
    AdaptiveEngine,
    Coordinates,
    Evaluate,
    MetricKind,
    Point,
    Stats,
    Tuning,
    accept,
    compiled,
    kinetic_energy,
    leapfrog,
    per_chain,
    per_set,
)
from probgen.kernels.schedule import early
from probgen.priors.noise_space import Space

_LEARNING_RATE, _MEMORY, _MOST = 0.05, 0.95, 0.35  # of Adam on log T; the longest step it may take
_QUARTER_PERIOD = math.log(math.pi / 2)  # of a Gaussian of unit scale
_THRIFT = 0.2  # how much more a longer trajectory must gain: the power of T
_STEPS = 32  # up to so many have the trajectories of chains on their way
_NOISE_ROWS = 3


class ChEESState(NamedTuple):
    """Where chains stand, and the last trajectory: where it began and ended, and with which momentum and length."""

    position: Tensor
    log_prob: Tensor
    grad: Tensor
    origin: Tensor
    proposal: Tensor
    momentum: Tensor
    time: Tensor


@dataclass(frozen=True)
class ChEESKernel:
    """HMC whose number of steps is ceil(u T / eps), u uniform in (0, 1) and the same for all chains.

    Args:
        max_steps: the longest trajectory, in steps.
        leapfrog: makes one step.
    """

    max_steps: int
    leapfrog: Callable[..., tuple[Point, Tensor]] = leapfrog
    static: ClassVar[bool] = False

    def normals(self, dim: int) -> int:
        """A momentum, two for the accept step, one for the length."""
        return dim + _NOISE_ROWS

    def start(self, evaluate: Evaluate, position: Tensor, noise: Tensor) -> ChEESState:
        """The density where chains begin; no trajectory yet."""
        log_prob, grad = evaluate(position)
        still = torch.zeros_like(position)
        return ChEESState(position, log_prob, grad, position, position, still, torch.zeros_like(log_prob))

    def step(
        self, evaluate: Evaluate, state: ChEESState, tuning: Tuning, noise: Tensor
    ) -> tuple[ChEESState, Stats]:
        """One trajectory of every chain."""
        dim = len(state.position)
        old, momentum = Point(*state[:3]), noise[:dim]
        steps = self._num_steps(tuning, noise[dim + 2, 0])
        energy = kinetic_energy(momentum) - old.log_prob
        point = old
        for _ in range(steps):
            point, momentum = self.leapfrog(evaluate, point, momentum, tuning.step_size)
        change = kinetic_energy(momentum) - point.log_prob - energy
        new, acceptance, _ = accept(old, point, -change, noise[dim : dim + 2])
        time = steps * tuning.step_size
        return ChEESState(*new, old.position, point.position, momentum, time), {
            "acceptance_rate": acceptance,
            "diverging": ~(change < MAX_ENERGY_ERROR),
            "energy": energy,
            "n_steps": torch.full_like(acceptance, steps),
        }

    def _num_steps(self, tuning: Tuning, normal: Tensor) -> int:
        uniform = 0.5 * torch.erfc(-normal * 0.5**0.5)
        length = per_chain(tuning.length, tuning.step_size.numel())
        return max(1, min(self.max_steps, math.ceil(float(uniform * (length / tuning.step_size).median()))))


class TrajectoryLength:
    """Adam on log T, up log (ChEES / T^0.2), ChEES = E[(|x' - E x'|^2 - |x - E x|^2)^2]/4, x' a trajectory's end.

    With t the trajectory's length the gradient of ChEES with respect to log t is, for one chain,
    t (|x' - mean x'|^2 - |x - mean x|^2) (x' - mean x')'p', weighted by its acceptance. Each data set has its own.

    The paper maximises ChEES alone. It is nearly flat beyond its first maximum, where noise carries T to many times the
    length that is needed; the power of T makes the shortest of equally good lengths the best.

    Chains on their way from the start to the posterior want ever longer trajectories: what is learnt before half of
    warm-up is over is forgotten when the coordinates change.

    Args:
        num_warmup: transitions of warm-up.
    """

    def __init__(self, num_warmup: int) -> None:
        self.num_warmup, self.num_sets = num_warmup, 1
        self._log = self._mean = self._second = torch.zeros(())
        self._step = self._count = 0

    def begin(self, tuning: Tuning, num_sets: int) -> Tuning:
        """Start with trajectories of some steps: chains may begin far out."""
        self.num_sets = num_sets
        self._reset()
        self._step, self._size = 0, _sizes(tuning.coordinates)
        return self._some_steps(tuning)

    def restart(self, tuning: Tuning) -> Tuning:
        """In new coordinates the slowest direction takes as much less time as its scale has grown."""
        size = _sizes(tuning.coordinates)
        shift = (size / self._size).log().amax(0)
        early = self._step < self.num_warmup // 2
        self._log = torch.full_like(self._log, _QUARTER_PERIOD) if early else self._log - shift
        self._mean, self._size = self._log, size
        self._reset()
        return tuning._replace(length=self._log.exp())

    def update(self, step: int, state: ChEESState, stats: Stats, tuning: Tuning) -> Tuning:
        """One step of Adam; T is averaged with weights that fade as 1/sqrt(number of steps)."""
        self._step = step
        if step < early(self.num_warmup):
            return self._some_steps(tuning)
        gradient = self._gradient(state, stats)
        self._count += 1
        self._second = _MEMORY * self._second + (1 - _MEMORY) * gradient.square()
        scale = (self._second / (1 - _MEMORY**self._count)).sqrt()
        change = _LEARNING_RATE * gradient / (scale + 1e-12)
        self._log = self._log + change.clamp(-_MOST, _MOST)
        weight = self._count**-0.5
        self._mean = (1 - weight) * self._mean + weight * self._log
        return tuning._replace(length=self._log.exp())

    def finish(self, tuning: Tuning) -> Tuning:
        """Keep the average."""
        return tuning._replace(length=self._mean.exp())

    def _some_steps(self, tuning: Tuning) -> Tuning:
        step_size = per_set(tuning.step_size, self.num_sets).median(0).values
        self._log = self._mean = (_STEPS * step_size).log()
        return tuning._replace(length=self._log.exp())

    def _reset(self) -> None:
        self._count, self._second = 0, torch.zeros(())

    def _gradient(self, state: ChEESState, stats: Stats) -> Tensor:
        """Of log (ChEES / T^_THRIFT) with respect to log T, one for each data set."""
        end = _centred(per_set(state.proposal, self.num_sets))
        origin = _centred(per_set(state.origin, self.num_sets))
        momentum = per_set(state.momentum, self.num_sets)
        gain = end.square().sum(0) - origin.square().sum(0)
        slope = per_set(state.time, self.num_sets) * gain * (end * momentum).sum(0)
        weight = per_set(stats["acceptance_rate"], self.num_sets)
        weight = torch.where(torch.isfinite(slope) & torch.isfinite(gain.square()), weight, 0.0)
        # Numerator and denominator from the same trajectories: one that has nearly diverged dominates both or neither.
        chees = 0.25 * (weight * gain.square()).nan_to_num().sum(0)
        gradient = (weight * slope).nan_to_num().sum(0) / chees - _THRIFT
        return gradient.nan_to_num(nan=0.0, posinf=0.0, neginf=0.0)


def _centred(x: Tensor) -> Tensor:
    """x `(dim, chains, sets)` less its mean over chains; ends of diverged trajectories count as the mean."""
    finite = torch.isfinite(x)
    held = torch.where(finite, x, 0.0)
    mean = held.sum(1, keepdim=True) / finite.sum(1, keepdim=True).clamp(min=1)
    return torch.where(finite, x - mean, 0.0)


def _sizes(coordinates: Coordinates) -> Tensor:
    """Scale of each coordinate, `(dim, sets or 1)`."""
    scale = coordinates.scale
    return scale.square().sum(-1).sqrt().mT if coordinates.is_dense else scale


@dataclass(frozen=True)
class ChEES(AdaptiveEngine):
    """HMC that learns in warm-up how long its trajectories should be, from many chains run together.

    The length maximises the change of squared distance from the mean (ChEES) that a trajectory makes; each transition
    takes a uniform part of it. All chains take the same number of steps, so that
    nothing waits: the engine of choice for tens to thousands of chains.

    Args:
        num_warmup: transitions for adapting trajectory length, step size and metric, >= 1; thrown away.
        step_size: > 0, in coordinates scaled by the metric; None is adapted.
        target_accept: acceptance the step size aims at, in (0, 1); shorter steps than the most efficient (0.65 to 0.8)
            keep divergences away.
        metric: "diagonal", "dense" or "identity": the covariance learnt in warm-up.
        max_steps: the longest trajectory, in leapfrog steps.
        space: "data", or "noise" (a `NoiseSpace`) for chains in the noise that a `Prior` makes its site of.
        thin, compile: as for every `MarkovEngine`.

    Raises:
        InputError: a setting out of range, or fewer than 2 chains: the criterion is an average over chains.

    `stats` holds acceptance_rate, diverging, energy, lp, n_steps; `run_stats` step_size and trajectory_length,
    in scaled coordinates.

    Source: Hoffman, Radul & Sountsov (2021), "An adaptive MCMC scheme for setting trajectory lengths in Hamiltonian
    Monte Carlo", AISTATS.

    >>> ChEES(num_warmup=200).default_chains
    64
    """

    num_warmup: Count = 500
    step_size: Positive | None = None
    target_accept: Fraction = 0.9
    metric: MetricKind = "diagonal"
    max_steps: Count = 1000
    space: Space = "data"
    guarantee = "asymptotic"
    default_chains = 64
    min_chains: ClassVar[int] = 2
    paper: ClassVar[str] = "Hoffman, Radul & Sountsov 2021, AISTATS"
    offers: ClassVar[str] = "the most effective draws a second from many chains, nothing set by hand"
    gives_up: ClassVar[str] = (
        "chains that adapt together; one length for the whole posterior; separated modes"
    )

    def kernel(self) -> ChEESKernel:
        """The transition."""
        return ChEESKernel(self.max_steps, compiled(leapfrog, self.compile))

    def adapters(self) -> list[Adapter]:
        """Trajectory length, then step size and metric."""
        return [TrajectoryLength(self.num_warmup), *super().adapters()]

    def run_stats(self, tuning: Tuning, stats: Stats) -> Stats:
        """Step size and trajectory length."""
        return super().run_stats(tuning, stats) | {
            "trajectory_length": per_chain(tuning.length, tuning.step_size.numel())
        }


def example() -> ChEES:
    """A short warm-up."""
    return ChEES(num_warmup=20, max_steps=10)
