"""The evidence lower bound as a loss."""

from __future__ import annotations

import weakref
from typing import Any, ClassVar

import pyro
import torch
from torch import Tensor

from probgen.bounds import NegativeELBO, ScaledLatents
from probgen.core import (
    Batch,
    Count,
    Guided,
    NonNegative,
    Pairwise,
    Stepwise,
    UnsupportedError,
    check_arguments,
    describe,
)
from probgen.noising import strata

MISSING = -1


class ELBO:
    """-ELBO in nats per row: closed-form KL where Pyro has one, enumeration where sites are discrete, else Monte Carlo.

    loss = -(1/N) E_q [log p(x, z) - log q(z | x)], global latents counted once, the rows of the batch N/B times. For
    a chain of steps one step a row, drawn stratified and by importance, stands for all of them. Rows whose integer
    sites hold -1 are taken with that site latent.

    Args:
        num_particles: Monte Carlo samples a row, >= 1.
        beta: weight of the latents' terms, >= 0 (Higgins et al. 2017); only beta = 1 is a bound.

    Source: Kingma & Welling (2013), arXiv 1312.6114; Ho et al. (2020), arXiv 2006.11239, for chains.

    >>> ELBO(num_particles=2)
    ELBO(num_particles=2, beta=1.0)
    """

    needs: ClassVar[tuple[type, ...]] = (Guided,)
    unit: ClassVar[str] = "nats"  # a row; a bound on log p(x)
    paper: ClassVar[str] = "Kingma & Welling 2013, arXiv 1312.6114"
    offers: ClassVar[str] = "a bound on log p(x) for any model/guide pair"
    gives_up: ClassVar[str] = "the gap KL(q || p(z | x))"

    def __init__(self, num_particles: Count = 1, beta: NonNegative = 1.0) -> None:
        check_arguments(ELBO.__init__, locals())
        self.num_particles, self.beta = num_particles, beta
        self._bounds: weakref.WeakKeyDictionary[Any, dict[frozenset[str], NegativeELBO]] = (
            weakref.WeakKeyDictionary()
        )

    def __reduce__(self) -> Any:
        return type(self), (
            self.num_particles,
            self.beta,
        )  # what was found out about programs stays with them

    def __repr__(self) -> str:
        return f"ELBO(num_particles={self.num_particles}, beta={self.beta})"

    def loss(self, program: Any, batch: Batch) -> Tensor:
        """-ELBO in nats per row of the full data set, a differentiable scalar."""
        parts = split_missing(batch)
        losses = [self._loss(program, part) * (part.size / batch.size) for part in parts]
        return torch.stack(losses).sum() if len(losses) > 1 else losses[0]

    def _loss(self, program: Any, batch: Batch) -> Tensor:
        bound = self._bound(program, frozenset(batch.data))
        model = pyro.condition(program.model, data=batch.data)
        guide = program.guide
        if issubclass(
            type(program), Stepwise
        ):  # at every step: Python remembers its answer, unlike isinstance's
            draws = [stratified_steps(program, batch) for _ in range(self.num_particles)]
            return (
                torch.stack([bound(model, guide, batch, t=k, weight=w) for k, w in draws]).mean()
                / batch.total
            )
        if self.beta != 1:
            model, guide = ScaledLatents(self.beta)(model), ScaledLatents(self.beta)(guide)
        return bound(model, guide, batch) / batch.total

    def _bound(self, program: Any, observed: frozenset[str]) -> NegativeELBO:
        if program not in self._bounds:
            if not isinstance(program, Guided) or program.guide is None:
                raise UnsupportedError(
                    f"ELBO needs a guide q(z | x), and {describe(program)} has none: give it a method guide(batch), "
                    "or use probgen.Pair(model, guide)."
                )
            if isinstance(program, Pairwise):
                raise UnsupportedError(
                    f"{describe(program)} is a density up to a normaliser that moves with its weights: without it ELBO "
                    "would rise for ever. Use PersistentContrastiveDivergence(), or pretrain()."
                )
            if self.beta != 1 and isinstance(program, Stepwise):
                raise UnsupportedError(
                    "beta != 1 weighs latents; a chain's bound has none to weigh. Use SimpleLoss()."
                )
            self._bounds[program] = {}
        by_sites = self._bounds[program]
        if observed not in by_sites:
            particles = 1 if isinstance(program, Stepwise) else self.num_particles
            by_sites[observed] = NegativeELBO(particles, vectorised=hasattr(program, "event_shape"))
        return by_sites[observed]


def stratified_steps(program: Stepwise, batch: Batch) -> tuple[Tensor, Tensor]:
    """A step for each row, spread evenly over the distribution the program asks for, and 1/its probability."""
    x = next(iter(batch.data.values()))
    probabilities = program.step_probabilities()
    index = torch.searchsorted(probabilities.cumsum(0), strata(batch.size)).clamp_max(len(probabilities) - 1)
    return (index + program.steps().start).to(x.device), (1 / probabilities[index]).to(x)


def split_missing(batch: Batch) -> list[Batch]:
    """The batch as parts with the same sites observed: -1 in an integer site means it was not seen.

    >>> batch = Batch({"x": torch.zeros(3, 2), "c": torch.tensor([0, -1, 2])})
    >>> [sorted(part.data) for part in split_missing(batch)]
    [['c', 'x'], ['x']]
    """
    seen = {name: value != MISSING for name, value in batch.data.items() if not value.is_floating_point()}
    seen = {name: mask.flatten(1).all(1) if mask.ndim > 1 else mask for name, mask in seen.items()}
    incomplete = {name: mask for name, mask in seen.items() if not bool(mask.all())}
    if not incomplete:
        return [batch]
    codes = torch.stack(list(incomplete.values()), dim=1)
    parts = []
    for pattern in torch.unique(codes, dim=0).flip(0):
        rows = (codes == pattern).all(1).nonzero()[:, 0]
        hidden = {name for name, is_seen in zip(incomplete, pattern, strict=True) if not is_seen}
        parts.append(_rows(batch, rows, hidden))
    return parts


def _rows(batch: Batch, rows: Tensor, hidden: set[str]) -> Batch:
    data = {name: value[rows] for name, value in batch.data.items() if name not in hidden}
    condition = None if batch.condition is None else batch.condition[rows]
    index = rows if batch.index is None else batch.index[rows]
    return Batch(data, condition, index, batch.total)


def example() -> ELBO:
    """The plain bound."""
    return ELBO()
