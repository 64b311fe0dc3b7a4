"""The importance-weighted bound as a loss."""

from __future__ import annotations

import math
import weakref
from dataclasses import dataclass
from typing import Any, ClassVar

import pyro
from torch import Tensor

from probgen.bounds import log_weights, sample_sites, trace_pair
from probgen.core import Batch, Count, Guided, UnsupportedError, check_fields, describe

_CHECKED: weakref.WeakSet[Any] = weakref.WeakSet()


@dataclass(frozen=True)
class IWAE:
    """-E log (1/k) sum_i p(x, z_i)/q(z_i | x), z_i ~ q, in nats per row: tighter than the ELBO, equal to it at k = 1.

    Args:
        num_particles: k >= 1.

    Raises `UnsupportedError` for guides whose sites cannot be reparametrised, and for programs with latents outside
    the plate over the data.

    Source: Burda et al. (2015), arXiv 1509.00519.

    >>> IWAE(num_particles=5)
    IWAE(num_particles=5)
    """

    num_particles: Count = 10
    needs: ClassVar[tuple[type, ...]] = (Guided,)
    unit: ClassVar[str] = "nats"  # a row; a bound on log p(x)
    paper: ClassVar[str] = "Burda et al. 2015, arXiv 1509.00519"
    offers: ClassVar[str] = "a bound that tightens with the number of particles"
    gives_up: ClassVar[str] = "k decoder calls a row; the guide's gradient fades as k grows"

    def __post_init__(self) -> None:
        check_fields(self)

    def loss(self, program: Any, batch: Batch) -> Tensor:
        """The bound's negative in nats per row, a differentiable scalar."""
        if not isinstance(program, Guided) or program.guide is None:
            raise UnsupportedError(f"IWAE needs a guide q(z | x), and {describe(program)} has none.")
        model = pyro.condition(program.model, data=batch.data)
        vectorised = hasattr(program, "event_shape")
        if program not in _CHECKED:
            self._refuse_score_functions(model, program.guide, batch)
            _CHECKED.add(program)
        weights = log_weights(model, program.guide, (batch,), self.num_particles, vectorised)
        total = sum(weights.values(), start=0.0 * next(iter(weights.values())))
        bound = total.logsumexp(0) - math.log(self.num_particles)
        return -bound.sum() / batch.total

    def _refuse_score_functions(self, model: Any, guide: Any, batch: Batch) -> None:
        for name, site in sample_sites(trace_pair(model, guide, (batch,))[1]).items():
            if not site["fn"].has_rsample:
                raise UnsupportedError(
                    f"IWAE differentiates through draws, and guide site {name!r} ({type(site['fn']).__name__}) has no "
                    "reparametrised sampler. Use ELBO(), which enumerates or uses score functions."
                )


def example() -> IWAE:
    """Five particles."""
    return IWAE(num_particles=5)
