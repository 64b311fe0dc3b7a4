"""Stochastic variational inference for one conditioned program."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, ClassVar

import pyro
import torch
from pyro import poutine
from pyro.infer.autoguide import AutoGuide, AutoNormal
from torch import Tensor, nn

from probgen.bounds import NegativeELBO, sample_sites
from probgen.core import Batch, Cost, Count, Engine, InputError, Objective, Posterior, Target
from probgen.fitting import Optim, fit
from probgen.randomness import forked_rng
from probgen.targets import dims


@dataclass(frozen=True)
class SVI(Engine):
    """Fits a guide q(z) to p(z | data) by maximising the ELBO, then draws from it. The program's weights stay fixed.

    Args:
        guide: an autoguide class of Pyro (`AutoNormal`, `AutoMultivariateNormal`, ...), or a guide of your own: a
            function of the program's arguments (`pyro.param` welcome) or an nn.Module.
        objective: a loss over the pair, e.g. `IWAE(16)`; None is the ELBO.
        num_steps: optimiser steps, >= 1.
        optim: learning rate, schedule, clipping.

    Each chain is a fit of its own. Pyro's parameter store is as it was afterwards.

    Source: Hoffman et al. (2013), arXiv 1206.7051; Kucukelbir et al. (2017), arXiv 1603.00788.

    >>> SVI(num_steps=100).num_steps
    100
    """

    guide: Callable[..., Any] = AutoNormal
    objective: Objective | None = None
    num_steps: Count = 1000
    optim: Optim = field(default_factory=lambda: Optim(lr=0.02, schedule="cosine"))
    kind = "approximate"
    guarantee = "approximate"
    conditions = True
    paper: ClassVar[str] = "Hoffman et al. 2013, arXiv 1206.7051"
    offers: ClassVar[str] = "an approximate posterior of any program, fast"
    gives_up: ClassVar[str] = "correctness: what the guide's family cannot express"

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
    ) -> Posterior:
        """Fit the guide, then draw from it; see `Engine.run`."""
        if not any(not site.discrete or site.enumerated for site in target.latents.values()):
            raise InputError("SVI has nothing to fit: the program has no continuous latent site.")
        started, chains, bounds = time.perf_counter(), [], []
        with pyro.settings.context(module_local_params=True):
            for chain in range(num_chains):
                with forked_rng((seed + chain) % 2**63):
                    pair = _Conditioned(target, self._guide(target))
                    objective = self.objective or _Bound()
                    history = fit(
                        pair,
                        {"row": torch.zeros(1)},
                        objective,
                        num_steps=self.num_steps,
                        optim=self.optim,
                        seed=(seed + chain) % 2**63,
                        progress=progress,
                    )
                    bounds.append(history.loss[-max(self.num_steps // 20, 1) :])
                    chains.append(_draw(pair.guide_of_args, target, num_draws))
        fitted = time.perf_counter() - started
        draws = {name: torch.stack([chain[name] for chain in chains]) for name in chains[0]}
        return Posterior(
            draws,
            self.kind,
            self.guarantee,
            str(self),
            Cost(warmup_gradients=self.num_steps * num_chains, warmup_seconds=fitted),
            dims=dims(target),
            run_stats={"elbo": -torch.tensor([sum(tail) / len(tail) for tail in bounds])},
            target=target,
        )

    def _guide(self, target: Target) -> Callable[..., Any]:
        if isinstance(self.guide, type) and issubclass(self.guide, AutoGuide):
            hidden = [name for name, site in target.latents.items() if site.discrete]
            guide = self.guide(poutine.block(target.model, hide=hidden) if hidden else target.model)
            guide(*target.args)  # its parameters exist only after a first call
            return guide
        return self.guide


class _Conditioned(nn.Module):
    """A conditioned program and a guide for it, as a pair whose only weights are the guide's."""

    def __init__(self, target: Target, guide: Callable[..., Any]) -> None:
        super().__init__()
        self.guide_of_args = guide  # registered if it is a module
        # The program's own pyro.params are not to be fitted.
        self._model, self._args = poutine.block(target.model, hide_types=["param"]), target.args

    def model(self, batch: Batch) -> Any:
        return self._model(*self._args)

    def guide(self, batch: Batch) -> Any:
        return self.guide_of_args(*self._args)


class _Bound:
    """The ELBO of the whole pair."""

    def __init__(self) -> None:
        self._bound = NegativeELBO()

    def loss(self, program: Any, batch: Batch) -> Tensor:
        return self._bound(program.model, program.guide, batch)


def _draw(guide: Callable[..., Any], target: Target, num_draws: int) -> dict[str, Tensor]:
    runs: list[dict[str, Tensor]] = []
    with torch.no_grad():
        for _ in range(num_draws):
            sites = sample_sites(poutine.trace(guide).get_trace(*target.args))
            runs.append({name: sites[name]["value"] for name in target.latents if name in sites})
    return {name: torch.stack([run[name] for run in runs]) for name in runs[0]}


def example() -> SVI:
    """A short fit."""
    return SVI(num_steps=50)
