"""The probability-flow ODE, through torchdiffeq."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from probgen.core import Cost, Diffusion, Engine, InputError, Posterior, Target, check_count
from probgen.dynamics import ODE_ADAPTIVE, AffineDenoiser, ReverseField, draws_in_batches, solve_ode
from probgen.processes import Grid
from probgen.randomness import Noise


@dataclass(frozen=True)
class ProbabilityFlowODE(Engine):
    """Draws by integrating dx = [f x - 1/2 g^2 score] dt from t = 1 down to t_min, then taking E[x_0 | x].

    Args:
        steps: number of solver steps of a fixed-step method, >= 1.
        method: torchdiffeq's "euler", "midpoint", "heun2", "heun3", "rk4" (fixed), or "dopri5", "bosh3",
            "adaptive_heun", "dopri8" (adaptive: `steps` is not used). An adaptive step is chosen by a norm over the
            whole batch, so a draw then depends on its batch mates, within the tolerance.
        power: times are t(u) = (1 - u (1 - t_min^{1/power}))^power: 1 is uniform, 2 denser near the data.
        rtol, atol: tolerances of adaptive methods, > 0.
        batch_size: draws made side by side, to bound memory; None makes all at once.

    Source: Song et al. (2021), arXiv 2011.13456; Chen et al. (2018), arXiv 1806.07366.

    >>> ProbabilityFlowODE(steps=20, method="heun2").method
    'heun2'
    """

    steps: int = 25
    method: str = "rk4"
    power: float = 2.0
    rtol: float = 1e-5
    atol: float = 1e-5
    batch_size: int | None = None
    needs = (Diffusion,)
    kind = "iid"
    guarantee = "discretised"
    paper: ClassVar[str] = "Song et al. 2021, arXiv 2011.13456"
    offers: ClassVar[str] = "few network calls; a smooth, invertible map from noise to data"
    gives_up: ClassVar[str] = "exactness at finite steps; errors of the score are not corrected"

    def __post_init__(self) -> None:
        check_count("steps", self.steps)
        for name in ("power", "rtol", "atol"):
            if not getattr(self, name) > 0:
                raise InputError(f"{name} must be > 0, got {getattr(self, name)!r}.")
        if self.batch_size is not None:
            check_count("batch_size", self.batch_size)

    def run(
        self,
        target: Target,
        *,
        num_draws: int,
        num_chains: int,
        seed: int,
        init: Posterior | None = None,
        state: Any = None,
        progress: bool = True,
    ) -> Posterior:
        """Draw from the program; see `Engine.run`."""
        started = time.perf_counter()
        denoiser = AffineDenoiser.of(target.program)
        steps = 1 if self.method in ODE_ADAPTIVE else self.steps
        field = ReverseField(denoiser, Grid(denoiser.process.t_min, self.power), steps, stochasticity=0.0)

        def solve(noise: Noise) -> Tensor:
            return field.finish(solve_ode(field, field.start(noise(0)), self.method, self.rtol, self.atol))

        counts = {"seed": seed, "num_chains": num_chains, "num_draws": num_draws}
        with torch.no_grad():
            x = draws_in_batches(target.program, solve, **counts, batch_size=self.batch_size)
        cost = Cost(network_calls=field.calls, seconds=time.perf_counter() - started)
        return Posterior({"x": x}, self.kind, self.guarantee, str(self), cost, target=target)


def example() -> ProbabilityFlowODE:
    """A few steps."""
    return ProbabilityFlowODE(steps=5)
