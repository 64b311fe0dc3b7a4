"""The program's own guide as an engine."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any, ClassVar

import pyro
import torch

from probgen.bounds import check_pair, plate_nesting, sample_sites, trace_pair
from probgen.core import Cost, Engine, Guided, InputError, Posterior, Support, Target, describe
from probgen.targets import site_dims


@dataclass(frozen=True)
class Guide(Engine):
    """Draws z ~ q(z | x) from the program's guide: amortised, one network call, as good as the fit.

    Source: Kingma & Welling (2013), arXiv 1312.6114.

    >>> Guide().guarantee
    'approximate'
    """

    needs = (Guided,)
    kind = "approximate"
    shares = "draws"
    guarantee = "approximate"
    conditions = True
    paper: ClassVar[str] = "Kingma & Welling 2013, arXiv 1312.6114"
    offers: ClassVar[str] = "posterior draws at the price of one encoder call"
    gives_up: ClassVar[str] = "correctness: the gap between q(z | x) and p(z | x)"

    def supports(self, program: Any) -> Support:
        """Whether the program has a guide."""
        if getattr(program, "guide", None) is None:
            return Support(False, "it needs a guide q(z | x), a method guide(batch) of the program")
        return super().supports(program)

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
        """Draw from the guide; see `Engine.run`."""
        if not target.data:
            raise InputError(
                f"Guide draws latents given data, and nothing was observed of {describe(target.program)}."
            )
        started = time.perf_counter()
        assert target.guide is not None
        with torch.no_grad():
            model_trace, guide_trace = trace_pair(target.model, target.guide, target.args)
            check_pair(sample_sites(model_trace), sample_sites(guide_trace))
            nesting = plate_nesting(model_trace, guide_trace)
            plate = pyro.plate("draws", num_chains * num_draws, dim=-1 - nesting)
            wide = pyro.poutine.trace(plate(target.guide)).get_trace(*target.args)
        draws, dims = {}, {}
        for name, site in sample_sites(wide).items():
            value = site["value"]
            event = value.shape[value.ndim - site["fn"].event_dim :]
            batch = guide_trace.nodes[name]["fn"].batch_shape
            draws[name] = value.reshape(num_chains, num_draws, *batch, *event)
            if name in target.latents:
                dims[name] = site_dims(target.latents[name])
        cost = Cost(network_calls=1, seconds=time.perf_counter() - started)
        return Posterior(draws, self.kind, self.guarantee, str(self), cost, dims=dims, target=target)


def example() -> Guide:
    """The engine has no settings."""
    return Guide()
