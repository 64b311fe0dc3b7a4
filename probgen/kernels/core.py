"""The contracts of Markov chains: what a kernel, its tuning, an adapter and an engine made of them are.

Chains stand in columns: positions are `(dim, n)`, scalars `(n,)`. Kernels move in coordinates x with u = S x
(`Coordinates`), in which the posterior has about unit scale, so that none of them knows of a metric.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple, Protocol

import torch
from torch import Tensor

from probgen.core import Count, Engine, InputError, Posterior, Target, describe
from probgen.kernels.compiling import Compiled
from probgen.kernels.coordinates import Coordinates
from probgen.priors.score_density import scored_density
from probgen.priors.sites import frozen_priors
from probgen.runs import Run
from probgen.targets import Density, density


class Evaluate(Protocol):
    """x `(dim, n)` -> log p `(n,)` and its gradient `(dim, n)`.

    A NamedTuple where it has parts: compiled code then takes the tensors in it as its arguments.
    """

    def __call__(self, x: Tensor, /) -> tuple[Tensor, Tensor]: ...


Stats = dict[str, Tensor]
"""Statistics of one transition by name, each `(n,)`."""


class Point(NamedTuple):
    """Where chains stand, and what is known there: the state of kernels that need no more.

    A kernel that needs more (a momentum) has a NamedTuple of its own, with these three fields first.
    """

    position: Tensor
    log_prob: Tensor
    grad: Tensor


class Tuning(NamedTuple):
    """What warm-up sets: a step size, coordinates, a trajectory length. Tensors, so that compiled code takes new ones.

    Args:
        step_size: `()` or `(n,)`, > 0, in x coordinates.
        coordinates: of the kernel.
        length: trajectory length in x coordinates, `()` or `(n,)`; for kernels that have one.
        beta: inverse temperature of columns i with i mod g = j, `(g,)`; for kernels that temper.
    """

    step_size: Tensor
    coordinates: Coordinates
    length: Tensor
    beta: Tensor = torch.ones(1)


class Kernel(Protocol):
    """A Markov transition that leaves a density invariant (or, for unadjusted ones, nearly so).

    Pure: `step` is a function of its arguments, randomness included, so that it can be compiled, replayed and tested.
    """

    @property
    def static(self) -> bool:
        """Whether `step` always does the same operations, so that several transitions can be compiled together."""

    def normals(self, dim: int) -> int:
        """How many standard normals a transition of one chain takes."""

    def start(self, evaluate: Evaluate, position: Tensor, noise: Tensor) -> Any:
        """The state of chains that begin at `position` `(dim, n)`; noise as for `step`."""

    def step(self, evaluate: Evaluate, state: Any, tuning: Tuning, noise: Tensor) -> tuple[Any, Stats]:
        """One transition of all chains; noise `(normals, n)`.

        All statistics hold `n_steps`, gradients of each chain; those of kernels that adapt `acceptance_rate`, in
        [0, 1]; those with a Hamiltonian `diverging` and `energy`.
        """


class Adapter(Protocol):
    """Tunes one thing during warm-up.

    What it has learnt stands in its attributes, which a run folder keeps: tensors, numbers, text, and tuples of them.
    """

    def begin(self, tuning: Tuning, num_sets: int) -> Tuning:
        """The tuning to start with; chain i belongs to data set i mod `num_sets`."""

    def update(self, step: int, state: Any, stats: Stats, tuning: Tuning) -> Tuning:
        """The tuning after warm-up transition `step`, counted from 0."""

    def restart(self, tuning: Tuning) -> Tuning:
        """Called after the coordinates changed: what was learnt in the old ones is forgotten."""

    def finish(self, tuning: Tuning) -> Tuning:
        """The tuning to draw with."""


@dataclass(frozen=True, kw_only=True)
class MarkovEngine(Engine):
    """An engine whose draws are Markov chains: many at once, in unconstrained space.

    Args:
        thin: every how manieth transition is kept, >= 1.
        compile: compile the transitions (seconds to minutes once an `infer`, reported apart in `cost`).
    """

    thin: Count = 1
    compile: bool = False
    kind = "mcmc"
    conditions = True
    data_sets = True
    default_chains = 4
    numbered = True
    independent: ClassVar[bool] = False
    """Chain i is the same however many run beside it: its noise is its own, and nothing is adapted."""
    min_chains: ClassVar[int] = 1
    """Fewer chains than these for each data set cannot adapt."""
    needs_log_prob: ClassVar[bool] = True
    """Whether the density itself is needed, or the score alone will do."""

    def density(self, target: Target) -> Density:
        """What the chains move in."""
        return density(target) if self.needs_log_prob else scored_density(target)

    def kernel(self) -> Kernel:
        """The transition."""
        raise NotImplementedError

    def adapters(self) -> list[Adapter]:
        """What is tuned during warm-up, in the order in which it is updated."""
        return []

    @property
    def replicas(self) -> int:
        """Copies of each chain that move with it, in columns between those of its data sets; the first is drawn."""
        return 1

    @property
    def warmup(self) -> int:
        """Transitions before the first draw."""
        return 0

    @property
    def first_step_size(self) -> float | None:
        """The step size to start with; None looks for one at which about 0.8 of single leapfrog steps are accepted."""
        return None

    def run_stats(self, tuning: Tuning, stats: Stats) -> Stats:
        """Statistics of whole chains, each `(n,)`: from the tuning they drew with and those of draws, `(draws, n)`."""
        return {"step_size": tuning.step_size}

    def run(
        self,
        target: Target,
        *,
        num_draws: int,
        num_chains: int,
        seed: int,
        init: Posterior | None = None,
        state: Any = None,
        progress: bool = True,
        first: int = 0,
        run: Run | None = None,
    ) -> Posterior:
        """Run the chains; see `Engine.run`. In a run folder they go on from where they were stopped."""
        from probgen.kernels.run import run_chains

        if num_chains < self.min_chains:
            raise InputError(
                f"{describe(self)} learns from chains side by side: it needs at least {self.min_chains} for each data "
                f"set, got {num_chains}. Pass num_chains={self.default_chains}, or use NUTS."
            )
        with frozen_priors(target):
            return run_chains(
                self,
                target,
                num_draws=num_draws,
                num_chains=num_chains,
                seed=seed,
                init=init,
                state=state,
                progress=progress,
                first_chain=first,
                run=run,
            )


class SteppingEngine(MarkovEngine):
    """An engine with the fields `num_warmup` and `step_size`.

    It is no dataclass: each engine names these fields itself, where it wants them among its arguments.
    """

    num_warmup: int
    step_size: float | None

    @property
    def warmup(self) -> int:
        """`num_warmup`."""
        return self.num_warmup

    @property
    def first_step_size(self) -> float | None:
        """`step_size`."""
        return self.step_size


def per_chain(value: Tensor, num_chains: int) -> Tensor:
    """One value for each data set, `(..., num_sets)`, as one for each chain, `(..., n)`."""
    return value.repeat(*[1] * (value.ndim - 1), num_chains // value.shape[-1]) if value.ndim else value


def per_set(value: Tensor, num_sets: int) -> Tensor:
    """Values of chains, `(..., n)`, as `(..., chains, num_sets)`."""
    return value.unflatten(-1, (-1, num_sets))


def compiled(function: Callable[..., Any], wanted: bool) -> Callable[..., Any]:
    """The function, compiled for the shapes it is called with, where that is wanted."""
    return Compiled(function) if wanted else function
