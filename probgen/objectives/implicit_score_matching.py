"""Score matching without the score: by parts, with the exact trace of the Jacobian."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor

from probgen.core import Batch, Diffusion, check_fields
from probgen.noising import admitted, scored, training_times
from probgen.processes import Time, Weighting
from probgen.unnoised import unnoised


@dataclass(frozen=True)
class ImplicitScoreMatching:
    """E lambda(t) [tr(ds/dx_t) + 1/2 |s(x_t, t)|^2], the mean over t uniform and x_t ~ q(x_t | x_0).

    Integrated by parts it is 1/2 E lambda |s - grad log p_t|^2 - 1/2 E lambda |grad log p_t|^2. Only x_t is needed.

    Energies, with s = -grad E, and scores without noise levels are matched at the data themselves: lambda is 1, no t.

    Args:
        weighting: lambda, "sigma2" (no unit), "g2" (nats per unit of t) or "uniform" (1 over data squared).
        t: one noise level in [t_min, t_max] of the process instead of all.

    Raises:
        InputError: an unknown weighting, a time out of range.
        UnsupportedError: by `loss`, for programs without a process and a denoiser, an energy or a score.

    Source: Hyvärinen (2005), Journal of Machine Learning Research 6, theorem 1.

    >>> ImplicitScoreMatching(t=0.1)
    ImplicitScoreMatching(weighting='sigma2', t=0.1)
    """

    weighting: Weighting = "sigma2"
    t: Time | None = None
    needs: ClassVar[tuple[type, ...]] = (Diffusion,)
    paper: ClassVar[str] = "Hyvärinen 2005, JMLR 6"
    offers: ClassVar[str] = "no density of the noise needed: x_t alone"
    gives_up: ClassVar[str] = "d derivatives of the network a step, and second derivatives of it"

    def __post_init__(self) -> None:
        check_fields(self)

    def loss(self, program: Any, batch: Batch) -> Tensor:
        """The mean over rows, summed over coordinates: a differentiable scalar; its least value is negative."""
        program, x_0 = admitted(self, unnoised(program, self.t), batch)
        at = scored(program, x_0, training_times(program, len(x_0), self.t), self.weighting)
        return (at.trace.sum() + 0.5 * (at.weight * at.score.square()).sum()) / len(x_0)


def example() -> ImplicitScoreMatching:
    """Over all noise levels."""
    return ImplicitScoreMatching()
