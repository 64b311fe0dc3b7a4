"""Flow matching: regression on the velocity of paths between pairs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from probgen.core import Batch, Coupled, check_fields
from probgen.noising import admitted, combined, strata

TimeLaw = Literal["uniform", "logit-normal"]


@dataclass(frozen=True)
class ConditionalFlowMatching:
    """E |u(x_t, t) - (alpha' x_0 + sigma' x_1)|^2 / d at x_t = alpha x_0 + sigma x_1, pairs as the program couples.

    The mean of alpha' x_0 + sigma' x_1 given x_t is the velocity that carries the law of x_1 to that of x_0, so the
    loss is E |u - velocity|^2 / d plus a constant.

    Args:
        times: law of t over the program's span, stratified: "uniform", or "logit-normal", logit(t) ~ N(0, 1), which
            dwells on the middle, where the velocity is hard to tell; the loss is then weighted so as well.

    Raises:
        InputError: an unknown law of times.
        UnsupportedError: by `loss`, for programs without a velocity, a coupling and a path.

    Source: Lipman et al. (2022), arXiv 2210.02747, eq. 9 (their time is 1 - t); Liu et al. (2022), arXiv 2209.03003;
    Esser et al. (2024), arXiv 2403.03206, for logit-normal times.

    >>> ConditionalFlowMatching()
    ConditionalFlowMatching(times='uniform')
    """

    times: TimeLaw = "uniform"
    needs: ClassVar[tuple[type, ...]] = (Coupled,)
    paper: ClassVar[str] = "Lipman et al. 2022, arXiv 2210.02747"
    offers: ClassVar[str] = "a flow between any two laws from one network call a row"
    gives_up: ClassVar[str] = "straight paths, unless the pairs are coupled"

    def __post_init__(self) -> None:
        check_fields(self)

    def loss(self, program: Any, batch: Batch) -> Tensor:
        """Mean squared error of the velocity a coordinate, in units of the data squared: a differentiable scalar."""
        program, x_0 = admitted(self, program, batch)
        path, x_1, t = program.path(), program.couple(batch), self._times(program.span(), len(x_0))
        x_t = combined((path.alpha(t), x_0), (path.sigma(t), x_1))
        target = combined((path.alpha_rate(t), x_0), (path.sigma_rate(t), x_1))
        return (program.velocity(x_t, t.to(x_0)) - target).square().mean()

    def _times(self, span: tuple[float, float], size: int) -> Tensor:
        u = strata(size)
        if self.times == "logit-normal":
            u = torch.special.ndtri(u).sigmoid()
        return span[0] + (span[1] - span[0]) * u


def example() -> ConditionalFlowMatching:
    """Times uniform."""
    return ConditionalFlowMatching()
