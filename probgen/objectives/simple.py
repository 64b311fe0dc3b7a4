"""The reweighted loss of denoising diffusion."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor

from probgen.core import Batch, Diffusion
from probgen.noising import admitted, noise_error, training_times


@dataclass(frozen=True)
class SimpleLoss:
    """E |eps - epshat(x_t, t)|^2 / d: the bound's terms with their weights dropped. Not a bound.

    x_t = alpha x_0 + sigma eps, t stratified over the program's levels, k/T for a chain, or else over [t_min, t_max].

    Raises `UnsupportedError` for programs without a process and a denoiser.

    Source: Ho et al. (2020), arXiv 2006.11239, eq. 14.

    >>> SimpleLoss()
    SimpleLoss()
    """

    needs: ClassVar[tuple[type, ...]] = (Diffusion,)
    paper: ClassVar[str] = "Ho et al. 2020, arXiv 2006.11239"
    offers: ClassVar[str] = "better looking samples: weight on the noisier steps"
    gives_up: ClassVar[str] = "the bound on log p(x)"

    def loss(self, program: Any, batch: Batch) -> Tensor:
        """Mean squared error of the noise, a differentiable scalar (no unit)."""
        program, x_0 = admitted(self, program, batch)
        return noise_error(program, x_0, training_times(program, len(x_0))).square().mean()


def example() -> SimpleLoss:
    """The loss has no settings."""
    return SimpleLoss()
