"""Score matching along random directions."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from probgen.core import Batch, Count, Diffusion, check_fields
from probgen.noising import admitted, scored, training_times
from probgen.processes import Time, Weighting
from probgen.unnoised import unnoised

ProjectionLaw = Literal["rademacher", "gaussian"]


@dataclass(frozen=True)
class SlicedScoreMatching:
    """E lambda(t) [v'(ds/dx_t)v + 1/2 (v's(x_t, t))^2] over directions v with E vv' = I.

    Its mean over v is `ImplicitScoreMatching`: v'(ds/dx)v estimates the trace. Variance-reduced, (v's)^2 is replaced by
    what it is on average, |s|^2.

    Energies, with s = -grad E, and scores without noise levels are matched at the data themselves: lambda is 1, no t.

    Args:
        num_projections: directions a row, >= 1; each costs one derivative of the network.
        law: of v, "rademacher" (signs, the least variance) or "gaussian".
        variance_reduced: take |s|^2 for (v's)^2.
        weighting: lambda, "sigma2" (no unit), "g2" (nats per unit of t) or "uniform" (1 over data squared).
        t: one noise level in [t_min, t_max] of the process instead of all.

    Raises:
        InputError: num_projections < 1, an unknown law or weighting, a time out of range.
        UnsupportedError: by `loss`, for programs without a process and a denoiser, an energy or a score.

    Source: Song et al. (2019), arXiv 1905.07088, eq. 7 and 8.

    >>> SlicedScoreMatching(num_projections=2).law
    'rademacher'
    """

    num_projections: Count = 1
    law: ProjectionLaw = "rademacher"
    variance_reduced: bool = True
    weighting: Weighting = "sigma2"
    t: Time | None = None
    needs: ClassVar[tuple[type, ...]] = (Diffusion,)
    paper: ClassVar[str] = "Song et al. 2019, arXiv 1905.07088"
    offers: ClassVar[str] = "implicit score matching at a cost that does not grow with d"
    gives_up: ClassVar[str] = "variance, and second derivatives of the network"

    def __post_init__(self) -> None:
        check_fields(self)

    def loss(self, program: Any, batch: Batch) -> Tensor:
        """The mean over rows and directions, summed over coordinates: a differentiable scalar."""
        program, x_0 = admitted(self, unnoised(program, self.t), batch)
        directions = self._directions(x_0)
        t = training_times(program, len(x_0), self.t)
        at = scored(program, x_0, t, self.weighting, directions)
        return at.trace.mean() + self._half_square(at.weight, at.score, directions)

    def _directions(self, x: Tensor) -> Tensor:
        """v, `(batch, num_projections, *event)`."""
        shape = (len(x), self.num_projections, *x.shape[1:])
        if self.law == "gaussian":
            return torch.randn(shape, dtype=x.dtype, device=x.device)
        return 2.0 * torch.randint(2, shape, dtype=x.dtype, device=x.device) - 1.0

    def _half_square(self, weight: Tensor, score: Tensor, directions: Tensor) -> Tensor:
        """1/2 lambda |s|^2, or its estimate 1/2 (v' sqrt(lambda) s)^2, averaged over rows and directions."""
        if self.variance_reduced:
            return 0.5 * (weight * score.square()).sum() / len(score)
        along = (
            (directions * (weight.sqrt() * score)[:, None])
            .reshape(len(score), self.num_projections, -1)
            .sum(2)
        )
        return 0.5 * along.square().mean()


def example() -> SlicedScoreMatching:
    """One sign vector a row."""
    return SlicedScoreMatching()
