"""Score matching against a score that is known."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor

from probgen.core import Batch, Diffusion, check_fields, check_shape
from probgen.noising import admitted, noised, score_at, training_times
from probgen.processes import Time, Weighting, over_event
from probgen.unnoised import unnoised


@dataclass(frozen=True)
class ExplicitScoreMatching:
    """1/2 E lambda(t) |s(x_t, t) - grad log p_t(x_t)|^2, the mean over t uniform and x_t ~ q(x_t | x_0).

    What implicit, sliced and denoising score matching equal up to a constant: for oracles, and for learning a network
    from another one.

    Energies, with s = -grad E, and scores without noise levels are matched at the data themselves: lambda is 1, no t.

    Args:
        target: grad log p_t, x_t `(batch, *event)` and t `(batch,)` -> `(batch, *event)`, an oracle's `score`.
        weighting: lambda, "sigma2" (no unit), "g2" (nats per unit of t) or "uniform" (1 over data squared).
        t: one noise level in [t_min, t_max] of the process instead of all.

    Raises:
        InputError: an unknown weighting, a time out of range.
        UnsupportedError: by `loss`, for programs without a process and a denoiser, an energy or a score.

    Source: Hyvärinen (2005), Journal of Machine Learning Research 6, eq. 2.

    >>> from probgen import Batch, GaussianMixture
    >>> mixture = GaussianMixture.example()
    >>> ExplicitScoreMatching(mixture.score).loss(mixture, Batch({"x": mixture.locs})).item()
    0.0
    """

    target: Callable[[Tensor, Tensor], Tensor]
    weighting: Weighting = "sigma2"
    t: Time | None = None
    needs: ClassVar[tuple[type, ...]] = (Diffusion,)
    paper: ClassVar[str] = "Hyvärinen 2005, JMLR 6"
    offers: ClassVar[str] = "no noise but that of the data: the objective the others estimate"
    gives_up: ClassVar[str] = "data alone: the score must be known"

    def __post_init__(self) -> None:
        check_fields(self)

    def loss(self, program: Any, batch: Batch) -> Tensor:
        """Half the weighted squared error, summed over coordinates: a differentiable scalar."""
        program, x_0 = admitted(self, unnoised(program, self.t), batch)
        process, t = program.process(), training_times(program, len(x_0), self.t)
        x_t = noised(process, x_0, t)
        target = self.target(x_t, t.to(x_t))
        check_shape("ExplicitScoreMatching: target(x_t, t)", target, x_t.shape)
        error = score_at(program, t)(x_t) - target
        weight = over_event(process.weight(t, self.weighting), x_0)
        return 0.5 * (weight * error.square()).sum() / len(x_0)


def standard_normal_score(x_t: Tensor, _: Tensor) -> Tensor:
    """-x_t: data from N(0, I) stay so under a variance-preserving process."""
    return -x_t


def example() -> ExplicitScoreMatching:
    """For standard normal data."""
    return ExplicitScoreMatching(standard_normal_score)
