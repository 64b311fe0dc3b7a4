"""The reweighted loss of denoising diffusion."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from probgen.core import Batch, Diffusion, UnsupportedError, describe
from probgen.processes import eps_from_denoised, over_event


@dataclass(frozen=True)
class SimpleLoss:
    """E |eps - epshat(x_t, t)|^2 / d: the bound's terms with their weights dropped. Not a bound.

    x_t = alpha x_0 + sigma eps, t stratified over the chain's times, or uniform in [t_min, 1] where there is no chain.

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
        if not isinstance(program, Diffusion):
            raise UnsupportedError(
                f"SimpleLoss needs a program with process() and denoise(x_t, t); {describe(program)} has none. "
                "Use ELBO()."
            )
        x_0, process = batch.data["x"], program.process()
        t = _times(getattr(program, "num_steps", None), process.t_min, len(x_0)).to(x_0)
        eps = torch.randn_like(x_0)
        x_t = over_event(process.alpha(t), x_0) * x_0 + over_event(process.sigma(t), x_0) * eps
        return (eps - eps_from_denoised(process, x_t, program.denoise(x_t, t), t)).square().mean()


def _times(num_steps: int | None, t_min: float, size: int) -> Tensor:
    u = (torch.randperm(size) + torch.rand(size, dtype=torch.float64)) / size
    return t_min + (1 - t_min) * u if num_steps is None else (u * num_steps).ceil().clamp_min(1) / num_steps


def example() -> SimpleLoss:
    """The loss has no settings."""
    return SimpleLoss()
