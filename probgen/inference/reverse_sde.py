"""Anderson's reverse SDE, through torchsde."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from probgen.core import Cost, Diffusion, Engine, InputError, Posterior, Target, check_count
from probgen.dynamics import AffineDenoiser, ReverseField, draws_in_batches, solve_sde
from probgen.processes import Grid
from probgen.randomness import BrownianSteps, Noise


@dataclass(frozen=True)
class ReverseSDE(Engine):
    """Draws by integrating dx = [f x - g^2 score] dt + g dW from t = 1 down to t_min, then taking E[x_0 | x].

    Args:
        steps: number of solver steps, >= 1.
        power: times are t(u) = (1 - u (1 - t_min^{1/power}))^power: 1 is uniform, 2 denser near the data.
        method: torchsde's fixed-step method, "euler" (Euler-Maruyama).
        batch_size: draws made side by side, to bound memory; None makes all at once.

    The same seed gives draw i the same noise in any batch.

    Source: Anderson (1982); Song et al. (2021), arXiv 2011.13456.

    >>> ReverseSDE(steps=200)
    ReverseSDE(steps=200, power=1.0, method='euler', batch_size=None)
    """

    steps: int = 500
    power: float = 1.0
    method: str = "euler"
    batch_size: int | None = None
    needs = (Diffusion,)
    kind = "iid"
    guarantee = "discretised"
    paper: ClassVar[str] = "Song et al. 2021, arXiv 2011.13456"
    offers: ClassVar[str] = "any number of steps from one fitted network; forgives errors of the score"
    gives_up: ClassVar[str] = "exactness at finite steps; the density"

    def __post_init__(self) -> None:
        check_count("steps", self.steps)
        if not self.power > 0:
            raise InputError(f"power must be > 0, got {self.power!r}.")
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
        field = ReverseField(
            denoiser, Grid(denoiser.process.t_min, self.power), self.steps, stochasticity=1.0
        )

        def solve(noise: Noise) -> Tensor:
            return field.finish(solve_sde(field, field.start(noise(0)), BrownianSteps(noise), self.method))

        counts = {"seed": seed, "num_chains": num_chains, "num_draws": num_draws}
        with torch.no_grad():
            x = draws_in_batches(target.program, solve, **counts, batch_size=self.batch_size)
        cost = Cost(network_calls=field.calls, seconds=time.perf_counter() - started)
        return Posterior({"x": x}, self.kind, self.guarantee, str(self), cost, target=target)


def example() -> ReverseSDE:
    """A few steps."""
    return ReverseSDE(steps=20)
