"""Anderson's reverse SDE and the family of SDEs with the same marginals, through torchsde."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from probgen.core import NonNegative
from probgen.dynamics import AffineDenoiser, FlowEngine, GaussianInitial, family_field, solve_sde
from probgen.dynamics.fields import Steps
from probgen.dynamics.torch_sde import CALLS_PER_STEP, SDEMethod
from probgen.processes import Grid, as_grid
from probgen.randomness import BrownianSteps, Noise


@dataclass(frozen=True)
class ReverseSDE(FlowEngine):
    """Integrates dx = [f x - (1 + a)/2 g^2 score] dt + sqrt(a) g dW from t_max down to t_min, then takes E[x_0 | x].

    Args:
        steps: number of solver steps, 1..1,000,000.
        grid: how they are spread over time: "uniform", "quadratic", "karras", or a `Grid` such as `Power(1.5)`.
        method: torchsde's "euler" (Euler-Maruyama, a network call a step), "heun" or "srk" (two calls; srk has strong
            order 3/2).
        stochasticity: a >= 0; 1 is Anderson's reversal, 0 the probability-flow ODE; all have the same marginals.
        batch_size, compile: as for every `FlowEngine`.

    The same seed gives draw i the same noise in any batch.

    Source: Anderson (1982); Song et al. (2021), arXiv 2011.13456.

    >>> str(ReverseSDE(steps=200))
    'ReverseSDE(steps=200)'
    """

    steps: Steps = 500
    grid: Grid | str = "uniform"
    method: SDEMethod = "euler"
    stochasticity: NonNegative = 1.0
    paper: ClassVar[str] = "Song et al. 2021, arXiv 2011.13456"
    offers: ClassVar[str] = "any number of steps from one fitted network; forgives errors of the score"
    gives_up: ClassVar[str] = "exactness at finite steps; the density"

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
        clocked = family_field(
            field, schedule, self.steps, lambda t: self.stochasticity * process.diffusion2(t)
        )
        x = GaussianInitial(process.terminal_scale()).draw(noise)
        return field(solve_sde(clocked, x, BrownianSteps(noise, self.steps), self.method), process.t_min)


def example() -> ReverseSDE:
    """A few steps."""
    return ReverseSDE(steps=20)
