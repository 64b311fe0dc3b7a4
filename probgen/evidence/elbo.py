"""The ELBO of each datum, term by term."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Annotated, ClassVar

import torch
from torch import Tensor

from probgen.bounds import log_weights
from probgen.core import (
    Cost,
    Count,
    Estimate,
    EstimateKind,
    Estimator,
    Guided,
    Pairwise,
    Stepwise,
    Support,
    Target,
    Terms,
    Within,
    describe,
    given,
)
from probgen.progress import Update, ticker


@dataclass(frozen=True)
class ELBOEstimate(Estimator):
    """E_q [log p(x, z) - log q(z | x)] <= log p(x) for each datum, with the terms it is the sum of.

    For a chain every step's KL is taken in closed form given x_k ~ q(x_k | x_0); for other pairs the terms are the
    sites' log p - log q, by Monte Carlo. `Estimate.terms` holds what each contributes, averaged over the data.

    Args:
        num_particles: independent Monte Carlo repeats, >= 2, from whose spread the standard errors come.
        batch_size: network rows evaluated side by side, to bound memory.

    Source: Kingma & Welling (2013), arXiv 1312.6114; Ho et al. (2020), arXiv 2006.11239.

    >>> ELBOEstimate(num_particles=4).num_particles
    4
    """

    num_particles: Annotated[int, Within(2)] = 8
    batch_size: Count = 512
    needs = (Guided,)
    paper: ClassVar[str] = "Ho et al. 2020, arXiv 2006.11239"
    offers: ClassVar[str] = "a lower bound for any model/guide pair, and where it is lost"
    gives_up: ClassVar[str] = "the gap KL(q || p(z | x))"

    def supports(self, program: object) -> Support:
        """Whether the program has a guide."""
        return needs_guide(program)

    def estimate(self, target: Target, *, seed: int, progress: bool = True) -> Estimate:
        """The bound of each row; see `Estimator.estimate`."""
        started = time.perf_counter()
        if isinstance(target.program, Stepwise):
            terms, calls = self._steps(target.program, target.data["x"], target.batch.condition, progress)
        else:
            terms, calls = self._sites(target, progress), self.num_particles
        spread = torch.stack(list(terms.values())).sum(0)  # (particle, row)
        return Estimate(
            value=spread.mean(0),
            standard_error=spread.std(0) / self.num_particles**0.5,
            kind=bound_kind(target),
            event_size=event_size(target),
            terms=average_terms(terms),
            cost=Cost(network_calls=calls, seconds=time.perf_counter() - started),
        )

    def _sites(self, target: Target, progress: bool) -> dict[str, Tensor]:
        with ticker(describe(self), self.num_particles, progress) as update:
            parts = list(drawn_weights(target, self.num_particles, self.num_particles, update))
        return {name: torch.cat([part[name] for part in parts]).double() for name in parts[0]}

    def _steps(
        self, program: Stepwise, x_0: Tensor, condition: Tensor | None, progress: bool
    ) -> tuple[dict[str, Tensor], int]:
        """Every step of every row, particles and all, in chunks of `batch_size` rows: the prior first, as drawn."""
        rows, steps = len(x_0), program.steps()
        k = torch.tensor(steps, device=x_0.device).repeat_interleave(rows * self.num_particles)
        row = torch.arange(rows, device=x_0.device).repeat(self.num_particles * len(steps))
        chunks = list(zip(row.split(self.batch_size), k.split(self.batch_size), strict=True))
        parts: list[Tensor] = []
        with ticker(describe(self), len(chunks), progress) as update:
            for some, at in chunks:
                update(len(parts))
                conditioned = given(program, None if condition is None else condition[some])
                parts.append(conditioned.step_term(x_0[some], at).double())
            update(len(parts))
        lost = torch.cat(parts)
        by_step = dict(zip(steps, lost.reshape(len(steps), self.num_particles, rows), strict=True))
        shape = (self.num_particles, rows)
        ends = {name: -value.double().expand(shape) for name, value in program.end_terms(x_0).items()}
        terms = {name: value for name, value in ends.items() if name != "x"}
        terms |= {f"x_{k - 1}" if k > 1 else "x": -by_step[k] for k in reversed(steps)}
        terms |= {name: value for name, value in ends.items() if name == "x"}
        return terms, len(chunks)


def drawn_weights(
    target: Target, num_draws: int, at_once: int, update: Update
) -> Iterator[dict[str, Tensor]]:
    """`log_weights` of batches of draws from the guide, `num_draws` in all.

    Args:
        target: a program with a guide.
        num_draws: how many in all.
        at_once: how many are drawn side by side, where the program can.
        update: is told how many are done.
    """
    assert target.guide is not None
    vectorised = vectorises(target)
    size = at_once if vectorised else 1
    for done in range(0, num_draws, size):
        update(done)
        yield log_weights(target.model, target.guide, target.args, min(size, num_draws - done), vectorised)
    update(num_draws)


def average_terms(terms: dict[str, Tensor]) -> Terms:
    """Terms `(particle, row)` averaged, the standard error over particles and rows together."""
    stacked = torch.stack(list(terms.values()))
    by_row = stacked.mean(1)
    rows = by_row.shape[1]
    error = by_row.std(1) / rows**0.5 if rows > 1 else stacked.std(1)[:, 0] / stacked.shape[1] ** 0.5
    return Terms(tuple(terms), by_row.mean(1), error)


def needs_guide(program: object) -> Support:
    """Supported where the program has a guide."""
    if getattr(program, "guide", None) is None:
        return Support(False, "it needs a guide q(z | x), a method guide(batch) of the program")
    return Support(True)


def bound_kind(target: Target) -> EstimateKind:
    """A bound on log p(x), or on log p(x) + log Z where the program's Z is unknown."""
    return "unnormalised" if isinstance(target.program, Pairwise) else "lower bound"


def vectorises(target: Target) -> bool:
    """Whether rows have weights of their own and particles can run side by side."""
    return target.per_row and hasattr(target.program, "event_shape")


def event_size(target: Target) -> int:
    """Number of observed coordinates of one value: of a row, or of all data where rows are not independent."""
    return sum(value[0].numel() if target.per_row else value.numel() for value in target.data.values())


def example() -> ELBOEstimate:
    """Two repeats."""
    return ELBOEstimate(num_particles=2)
