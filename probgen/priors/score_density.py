"""The gradient of a posterior from the score of its prior, where the prior's density is not known, or not cheap."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from probgen.core import Diffusion, Scored, Target, process_support
from probgen.noising import score_at
from probgen.priors.conditioned import Conditioned
from probgen.priors.prior import Prior
from probgen.priors.sites import priors_of
from probgen.targets import Density, density
from probgen.targets.point import Values


class ScoreDensity(Density):
    """grad log p(x, z | y) = score(x) + grad log p(y, z | x), for a prior that is a diffusion; the density is unknown.

    The score is that of x_t at t_min, below which no network is trained; of oracles that of the data. It may be the
    gradient of nothing, so engines that accept or refuse by the density are not served.

    Args:
        target: a program with one site whose law is a `Prior` of a diffusion.

    Raises:
        InputError: no prior, or several, or nothing observed depends on it.

    Source: Song & Ermon (2019), arXiv 1907.05600.
    """

    has_log_prob = False

    def __init__(self, target: Target) -> None:
        self.conditioned = Conditioned(target)
        self.rest = self.conditioned.density
        self.dim, self.dtype, self.device = self.rest.dim, self.rest.dtype, self.rest.device
        self.num_sets, self.sets_shown, self.dims = self.rest.num_sets, self.rest.sets_shown, self.rest.dims
        self.network_calls = 1
        program = self.conditioned.program
        start = 0.0 if isinstance(program, Scored) else program.process().t_min
        self._score = score_at(program, torch.full((1,), start, dtype=torch.float64))

    def value_and_grad(self, u: Tensor) -> tuple[Tensor, Tensor]:
        return self._value_and_grad(u, self.rest.value_and_grad)

    def function(self, u: Tensor) -> Callable[[Tensor], tuple[Tensor, Tensor]]:
        rest = self.rest.function(u)
        return lambda u: self._value_and_grad(u, rest)

    def constrain(self, u: Tensor) -> Values:
        return self.rest.constrain(u)

    def unconstrain(self, values: Mapping[str, Tensor]) -> Tensor:
        return self.rest.unconstrain(values)

    def blame(self, u: Tensor) -> str:
        return self.rest.blame(u)

    def _value_and_grad(
        self, u: Tensor, rest: Callable[[Tensor], tuple[Tensor, Tensor]]
    ) -> tuple[Tensor, Tensor]:
        value, grad = rest(u)
        x, _ = self.conditioned.split(u)
        with torch.no_grad():
            score = self._score(x.reshape(-1, *self.conditioned.prior.event_shape).to(self._like))
        padding = torch.zeros_like(grad)
        padding[self.conditioned.rows] = score.reshape(len(x), -1).mT.to(grad)
        return torch.full_like(value, torch.nan), grad + padding

    @property
    def _like(self) -> Tensor:
        return self.conditioned.prior.like


def scored_density(target: Target) -> Density:
    """The density for engines that need its gradient alone: by the score of the one prior, where it is a diffusion."""
    priors = priors_of(target)
    by_score = len(priors) == 1 and all(map(_is_diffusion, priors.values()))
    return ScoreDensity(target) if by_score else density(target)


def _is_diffusion(prior: Prior) -> bool:
    return isinstance(prior.program, Diffusion) and bool(process_support(prior.program))
