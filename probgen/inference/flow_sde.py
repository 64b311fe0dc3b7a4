"""The SDE of a flow: its marginals with as much noise as one likes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, ClassVar

import torch
from torch import Tensor

from probgen.core import InputError, Within, check_shape
from probgen.dynamics import AffineDenoiser, FlowEngine, GaussianInitial, family_field, solve_sde
from probgen.dynamics.fields import Steps
from probgen.dynamics.torch_sde import CALLS_PER_STEP, SDEMethod
from probgen.processes import Grid, Process, as_grid
from probgen.randomness import BrownianSteps, Noise

Diffusing = Callable[[Tensor], Tensor]
_LARGEST = 1_000_000


@dataclass(frozen=True)
class FlowSDE(FlowEngine):
    """Integrates dx = [u - w^2/2 score] dt + w dW from t_max down to t_min, u the velocity; then takes E[x_0 | x].

    The marginals are those of dx = u dt for every w(t) >= 0; noise forgives errors of u. In the time of the noise,
    dt > 0, the drift is u + w^2/2 score.

    Args:
        steps: number of solver steps, 1..1,000,000.
        diffusion: w in [0, 1e6]: a number, or a function of times `(n,)`, float64 -> `(n,)`, or `(n, *event)` for laws
            that differ by coordinate. None is w^2 = d sigma^2/dt, which is finite at both ends even where
            g^2 is not: w^2 = 2 t for the straight path, g^2 itself where alpha = 1.
        method: "euler" (a network call a step), "heun" or "srk" (two).
        grid: how the steps are spread over time: "uniform", "quadratic", "karras", or a `Grid`.
        batch_size, compile: as for every `FlowEngine`.

    Raises:
        InputError: a setting out of range, or a diffusion that is negative or not finite at some time.

    Source: Song et al. (2021), arXiv 2011.13456, appendix D; Ma et al. (2024), arXiv 2401.08740.

    >>> str(FlowSDE(diffusion=0.5))
    'FlowSDE(diffusion=0.5)'
    """

    steps: Steps = 100
    diffusion: Diffusing | Annotated[float, Within(0, _LARGEST, why="its square must fit float32")] | None = (
        None
    )
    method: SDEMethod = "heun"
    grid: Grid | str = "quadratic"
    paper: ClassVar[str] = "Ma et al. 2024, arXiv 2401.08740"
    offers: ClassVar[str] = (
        "draws of a flow that forgive errors of its velocity; the noise is yours to choose"
    )
    gives_up: ClassVar[str] = "flows whose noise is not Gaussian: they have no score; the density"

    def __post_init__(self) -> None:
        super().__post_init__()
        as_grid(self.grid)

    def num_calls(self) -> int:
        """One or two calls a step and one to finish."""
        return self.steps * CALLS_PER_STEP[self.method] + 1

    def draw(self, field: AffineDenoiser, noise: Noise) -> Tensor:
        """One batch; see `FlowEngine.draw`."""
        process = field.process
        schedule = as_grid(self.grid).between(process.t_max, process.t_min, process)
        clocked = family_field(field, schedule, self.steps, lambda t: self._noise2(process, t))
        x = GaussianInitial(process.terminal_scale()).draw(noise)
        return field(solve_sde(clocked, x, BrownianSteps(noise, self.steps), self.method), process.t_min)

    def _noise2(self, process: Process, t: Tensor) -> Tensor:
        """w^2 at times t, of the shape of sigma."""
        natural = process.variance_rate(t)
        if self.diffusion is None:
            return natural
        w = self.diffusion(t) if callable(self.diffusion) else torch.full_like(t, self.diffusion)
        check_shape("FlowSDE: diffusion(t)", w, t.shape, natural.shape)
        bad = ~((w >= 0) & (w <= _LARGEST)).reshape(len(t), -1).all(1)
        if bool(bad.any()):
            raise InputError(
                f"FlowSDE: diffusion must be finite, in [0, {_LARGEST:,}], at every time; at "
                f"t = {t[bad][0].item():.4g} it is {w[bad][0].min().item():.4g}."
            )
        return w.square().reshape(w.shape + (1,) * (natural.ndim - w.ndim))


def example() -> FlowSDE:
    """A few steps."""
    return FlowSDE(steps=20)
