"""Chains in the noise that a fitted program makes its draws of, where the prior is simple whatever the data are."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from probgen.core import InputError, Target, check_fields, did_you_mean
from probgen.dynamics import FIXED_STEP
from probgen.dynamics.fields import Steps
from probgen.priors.conditioned import Conditioned
from probgen.priors.noise_maps import Carried, Solver, noise_map
from probgen.processes import Grid, as_grid
from probgen.targets import Density
from probgen.targets.point import Values
from probgen.targets.routes import faithfully_recorded

_COLUMNS_AT_ONCE = 4096
_SMALL = 64  # coordinates of noise of which the whole path is recorded; beyond, networks cost more than what calls them


@dataclass(frozen=True)
class NoiseSpace:
    """Chains move in eps of x = f(eps), and in the other latents z: log p = log N(eps; 0, I) + log p(y, z | f(eps)).

    f carries noise to data: along the probability-flow ODE of a diffusion or a flow, in fixed steps, or through the
    sites of any other program (of a VAE eps are z and the noise of p(x | z)). The law of x = f(eps) is that of the
    program, of a flow up to the error of the solver. No density of x is needed, and modes of the data far apart are
    neighbours in eps; where observations are sharp they cut eps into modes again, for `ParallelTempering`.

    A gradient takes `steps` times 1 ("euler"), 2 ("heun") or 4 ("rk4") network calls, and one, forwards and backwards;
    memory for as many. Small networks cost more to call than to run: hundreds of chains take hardly longer than one,
    and compile=True was ten times faster, after a quarter of a minute.

    Args:
        steps: of the ODE, >= 1. Of a mixture in 8 dimensions 6 steps of "rk4" were off by 0.001 standard deviations,
            12 of "heun", at the same cost, by 0.005.
        method: "euler", "heun" or "rk4".
        grid: how steps are spread over time: "uniform", "quadratic", "karras" or a `Grid`.

    Raises:
        InputError: an unknown method or grid, steps < 1.

    Source: Parno & Marzouk (2018), arXiv 1412.5492, for chains in the reference space of a map; Song et al. (2021),
    arXiv 2011.13456, for the map.

    >>> NoiseSpace(steps=12).method
    'rk4'
    """

    steps: Steps = 6
    method: str = "rk4"
    grid: Grid | str = "quadratic"

    def __post_init__(self) -> None:
        check_fields(self)
        as_grid(self.grid)
        if self.method not in FIXED_STEP:
            raise InputError(
                f"Unknown method {self.method!r} of the flow ODE; {did_you_mean(str(self.method), FIXED_STEP)}"
            )

    @property
    def solver(self) -> Solver:
        """The steps of the ODE."""
        return Solver(self.steps, self.method, self.grid)


Space = Literal["data", "noise"] | NoiseSpace
"""Where chains move: among the values of the sites, or in the noise that a prior makes them of, `NoiseSpace()`."""


def as_space(space: Space) -> NoiseSpace | None:
    """The noise space that is meant, None for "data"; `InputError` for anything else.

    >>> as_space("noise"), as_space("data")
    (NoiseSpace(steps=6, method='rk4', grid='quadratic'), None)
    """
    if isinstance(space, NoiseSpace):
        return space
    if space not in ("data", "noise"):
        raise InputError(
            f"space must be 'data', 'noise' or a NoiseSpace, got {space!r}; "
            f"{did_you_mean(str(space), ('data', 'noise'))}"
        )
    return NoiseSpace() if space == "noise" else None


class NoiseDensity(Density):
    """log p of w = (noise of x, unconstrained z): log p(noise) + log p(y, z | x = f(noise)).

    Args:
        target: a program with one site whose law is a `Prior`.
        space: how noise becomes x.

    Raises:
        InputError: no prior, or several, or nothing observed depends on it.
        UnsupportedError: a prior that makes its draws of no noise.
    """

    def __init__(self, target: Target, space: NoiseSpace) -> None:
        self.conditioned = conditioned = Conditioned(target)
        self.map = noise_map(conditioned.prior, space.solver)
        self.like = conditioned.prior.like
        self.copies = conditioned.size // max(1, _size(conditioned.prior.event_shape))
        self.num_noise = self.copies * self.map.size
        self.dim = self.num_noise + conditioned.num_others
        self.dtype, self.device = conditioned.dtype, conditioned.device
        self.num_sets, self.sets_shown = conditioned.num_sets, conditioned.sets_shown
        self.dims = conditioned.dims
        self.network_calls = self.map.num_calls

    # --- the path from noise to data ---

    def carried(self, noise: Tensor) -> Carried:
        """x `(n, *shape)` of noise `(n, num_noise)`, and the log density of the noise."""
        x, log_prob = self.map(noise.reshape(-1, self.map.size).to(self.like))
        return Carried(
            x.reshape(-1, *self.conditioned.shape), log_prob.reshape(-1, self.copies).sum(1).to(noise)
        )

    def split(self, w: Tensor) -> tuple[Tensor, Tensor]:
        """Noise `(n, num_noise)` and z `(n, k)` of w `(dim, n)`."""
        return w[: self.num_noise].mT, w[self.num_noise :].mT

    # --- the density ---

    def value_and_grad(self, u: Tensor) -> tuple[Tensor, Tensor]:
        return self._value_and_grad(u.detach(), self.conditioned.density.value_and_grad)

    def function(self, u: Tensor) -> Callable[[Tensor], tuple[Tensor, Tensor]]:
        like = u.new_zeros(self.conditioned.density.dim, u.shape[1])
        likelihood = self.conditioned.density.function(like)

        def evaluate(u: Tensor) -> tuple[Tensor, Tensor]:
            return self._value_and_grad(u, likelihood)

        if self.num_noise > _SMALL:
            return evaluate
        evaluate(u)  # works out what is to be no part of the recording
        return faithfully_recorded(evaluate, u) or evaluate

    def _value_and_grad(
        self, w: Tensor, likelihood: Callable[[Tensor], tuple[Tensor, Tensor]]
    ) -> tuple[Tensor, Tensor]:
        noise, z = self.split(w)
        with torch.enable_grad():
            pulled: Any = torch.func.vjp(self.carried, noise)
        (x, log_prob), pullback = pulled
        value, grad = likelihood(self.conditioned.join(x.detach(), z))
        x_grad, z_grad = self._parts(grad)
        (noise_grad,) = pullback(Carried(x_grad.to(x), torch.ones_like(log_prob)))
        return value + log_prob.detach(), torch.cat((noise_grad.mT, z_grad)).contiguous()

    def _parts(self, grad: Tensor) -> tuple[Tensor, Tensor]:
        """Gradients in x `(n, *shape)` and in z `(k, n)`."""
        x_grad, z_grad = self.conditioned.split(grad)
        return x_grad, z_grad.mT

    # --- there and back ---

    def constrain(self, u: Tensor) -> Values:
        step = max(1, _COLUMNS_AT_ONCE // self.num_sets) * self.num_sets
        parts = [self._constrained(part) for part in u.split(step, dim=1)]
        return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}

    def unconstrain(self, values: Mapping[str, Tensor]) -> Tensor:
        u = self.conditioned.density.unconstrain(values)
        x, z = self.conditioned.split(u)
        with torch.no_grad():
            rows = x.reshape(-1, *self.conditioned.prior.event_shape).to(self.like)
            noise = self.map.inverse(rows).reshape(len(x), -1)
        return torch.cat((noise.to(u), z), 1).mT

    def blame(self, u: Tensor) -> str:
        noise, z = self.split(u)
        with torch.no_grad():
            x, _ = self.carried(noise)
        if not bool(torch.isfinite(x).all()):
            return f"the value of site {self.conditioned.name!r} that the prior makes of noise"
        return self.conditioned.density.blame(self.conditioned.join(x, z))

    def _constrained(self, u: Tensor) -> Values:
        noise, z = self.split(u)
        with torch.no_grad():
            x, _ = self.carried(noise)
        return self.conditioned.values(x, z)


def _size(shape: tuple[int, ...]) -> int:
    return torch.Size(shape).numel()
