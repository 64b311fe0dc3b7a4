"""Denoising diffusion implicit models: from x0hat and epshat straight to the next noise level."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, ClassVar

from torch import Tensor

from probgen.core import Within
from probgen.dynamics import AffineDenoiser, FlowEngine, GaussianInitial
from probgen.dynamics.fields import Steps
from probgen.dynamics.multistep import Weights, call_times, last_weights, network_steps, take_steps
from probgen.processes import Grid, Process, as_grid
from probgen.randomness import Noise


@dataclass(frozen=True)
class DDIM(FlowEngine):
    """x_s = alpha_s x0hat + sqrt(sigma_s^2 - tau^2) epshat + tau z, tau^2 = eta^2 Var[x_s | x_t, x_0], s < t.

    n steps cost n network calls: they begin at progress 0, 1/n, .., (n - 1)/n of the grid, and the last one ends at
    sigma = 0, in x0hat of the n-th call.

    Args:
        steps: n >= 1.
        eta: in [0, 1]; 0 is deterministic, a solver of first order of the probability-flow ODE, 1 draws x_s from
            q(x_s | x_t, x_0) at x_0 = x0hat as the chain of Ho et al. does.
        grid: how steps are spread over time: "uniform", "quadratic", "karras", "logsnr" or a `Grid`.
        batch_size, compile: as for every `FlowEngine`.

    Source: Song et al. (2020), arXiv 2010.02502, eq. 12 and 16, there for variance-preserving laws.

    >>> str(DDIM(steps=20, eta=1.0))
    'DDIM(steps=20, eta=1.0)'
    """

    steps: Steps = 50
    eta: Annotated[float, Within(0, 1, why="0 is deterministic, 1 ancestral")] = 0.0
    grid: Grid | str = "uniform"
    paper: ClassVar[str] = "Song et al. 2020, arXiv 2010.02502"
    offers: ClassVar[str] = "few network calls; any mixture of a smooth map and fresh noise"
    gives_up: ClassVar[str] = "exactness at finite steps; first order only"

    def __post_init__(self) -> None:
        super().__post_init__()
        as_grid(self.grid)

    def num_calls(self) -> int:
        """One a step."""
        return self.steps

    def draw(self, field: AffineDenoiser, noise: Noise) -> Tensor:
        """One batch; see `FlowEngine.draw`."""
        times = call_times(field.process, as_grid(self.grid), self.steps)
        weights = [*self._weights(field.process, times), last_weights(field.process, times[-1:])]
        x = GaussianInitial(field.process.terminal_scale()).draw(noise)
        return take_steps(
            field.output, network_steps(field, times, weights), x, noise.each(range(1, self.steps))
        )

    def _weights(self, process: Process, times: Tensor) -> list[Weights]:
        """Of each step between the times `(n,)`: epshat = (x_t - alpha_t x0hat)/sigma_t put in."""
        t, s = times[:-1], times[1:]
        _, _, variance = process.bridge_coefficients(s, t)
        on_x = (process.sigma(s).square() - self.eta**2 * variance).sqrt() / process.sigma(t)
        on_x0 = process.alpha(s) - process.alpha(t) * on_x
        scale = self.eta * variance.sqrt()
        return [Weights(a, [b], c) for a, b, c in zip(on_x, on_x0, scale, strict=True)]


def example() -> DDIM:
    """A few steps."""
    return DDIM(steps=5)
