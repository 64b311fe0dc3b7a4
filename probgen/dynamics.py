"""Solving a diffusion backwards in time: the one place that knows torchsde and torchdiffeq.

Same marginals for every a >= 0, dt < 0 (Song et al. 2021, arXiv 2011.13456; Karras et al. 2022, arXiv 2206.00364):

    dx = [f x - (1 + a)/2 g^2 score] dt + sqrt(a) g dW,    score = (alpha x0hat - x)/sigma^2,

with x0hat affine in one network call, so the drift is A(t) x + B(t) output: two numbers a time, worked out in
float64 before the loop. Solvers run in u = 0..n, one unit a step, on a smooth grid t(u): an n-step scheme takes n
steps, whatever rounding does to the clock.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from probgen.core import Diffusion, InputError, Predicting, did_you_mean
from probgen.processes import Grid, Process, denoiser_coefficients
from probgen.randomness import BrownianSteps, Noise

SDE_METHODS = ("euler",)
ODE_FIXED = ("euler", "midpoint", "heun2", "heun3", "rk4")
ODE_ADAPTIVE = ("dopri5", "bosh3", "adaptive_heun", "dopri8")
_NODES_PER_STEP = 6  # every stage of the fixed-step methods falls on a sixth of a step


@dataclass(frozen=True)
class AffineDenoiser:
    """x0hat = a(t) x_t + b(t) output(x_t, t), for any diffusion."""

    output: Callable[[Tensor, Tensor], Tensor]
    coefficients: Callable[[Tensor], tuple[Tensor, Tensor]]
    process: Process

    @staticmethod
    def of(program: Diffusion) -> AffineDenoiser:
        """A program's network with its coefficients, or its `denoise` with a = 0, b = 1."""
        if isinstance(program, Predicting):
            return AffineDenoiser(program.predict, program.denoiser_coefficients, program.process())
        process = program.process()
        return AffineDenoiser(program.denoise, lambda t: denoiser_coefficients(process, "x0", t), process)


class ReverseField:
    """Drift and diffusion of the reverse family as functions of the solver's clock u in [0, num_steps].

    Args:
        denoiser: the network and its coefficients.
        grid: t as a function of u / num_steps.
        num_steps: number of unit steps.
        stochasticity: a >= 0; 0 is the probability-flow ODE, 1 Anderson's reverse SDE.
    """

    def __init__(self, denoiser: AffineDenoiser, grid: Grid, num_steps: int, stochasticity: float) -> None:
        self.denoiser, self.grid, self.num_steps, self.a = denoiser, grid, num_steps, stochasticity
        self.calls = 0
        self._table: dict[int, tuple[Any, ...]] = {}

    def tabulate(self, x: Tensor) -> None:
        """Work out every coefficient a fixed-step method will ask for, before the loop; times in the dtype of x."""
        nodes = torch.arange(self.num_steps * _NODES_PER_STEP + 1, dtype=torch.float64) / _NODES_PER_STEP
        self._table = dict(enumerate(_rows(x, *self._coefficients(nodes))))

    def _coefficients(self, u: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """t, then the factors on x, on the network's output and on unit noise, all per unit of u."""
        t = self.grid.time(u / self.num_steps)
        speed = self.grid.speed(u / self.num_steps) / self.num_steps
        process = self.denoiser.process
        on_x, on_output = self.denoiser.coefficients(t)
        drift, g2, alpha, sigma = process.drift(t), process.diffusion2(t), process.alpha(t), process.sigma(t)
        speed = speed.reshape(speed.shape + (1,) * (alpha.ndim - 1))
        pull = 0.5 * (1 + self.a) * g2 / sigma.square()
        return (
            t,
            speed * (drift + pull * (1 - alpha * on_x)),
            -speed * pull * alpha * on_output,
            (self.a * g2 * speed.abs()).sqrt(),
        )

    def at(self, u: float, x: Tensor) -> tuple[Any, ...]:
        """The four coefficients at clock u: t as a tensor `(1,)` in the dtype of x, on_x, on_output, on_noise."""
        node = round(u * _NODES_PER_STEP)
        if node in self._table and abs(u * _NODES_PER_STEP - node) < 1e-3:
            return self._table[node]
        return _rows(x, *self._coefficients(torch.tensor([u], dtype=torch.float64)))[0]

    def drift(self, u: float, x: Tensor) -> Tensor:
        """dx/du without the noise; x `(batch, *event)`."""
        t, on_x, on_output, _ = self.at(u, x)
        return self._drift(x, t, on_x, on_output)

    def drift_and_noise(self, u: float, x: Tensor, increment: Tensor) -> tuple[Tensor, Tensor]:
        """dx/du and the noise of a step whose Brownian increment is given."""
        t, on_x, on_output, on_noise = self.at(u, x)
        return self._drift(x, t, on_x, on_output), _times(on_noise, increment)

    def _drift(self, x: Tensor, t: Tensor, on_x: Any, on_output: Any) -> Tensor:
        self.calls += 1
        return _times(on_x, x).add_(_times(on_output, self.denoiser.output(x, t)))

    def finish(self, x: Tensor) -> Tensor:
        """E[x_0 | x] at the last time of the grid."""
        self.calls += 1
        t = torch.full((1,), self.grid.t_min, dtype=torch.float64)
        on_x, on_output = (_scalar(value[0]) for value in self.denoiser.coefficients(t))
        return _times(on_x, x) + _times(on_output, self.denoiser.output(x, t.to(x)))

    def start(self, noise: Tensor) -> Tensor:
        """x_1 ~ N(0, sigma(1)^2), the terminal law, from unit noise."""
        sigma = self.denoiser.process.sigma(torch.ones(1, dtype=torch.float64))[0]
        return _times(_scalar(sigma), noise)


def draws_in_batches(
    program: Any,
    draw: Callable[[Noise], Tensor],
    *,
    seed: int,
    num_chains: int,
    num_draws: int,
    batch_size: int | None,
) -> Tensor:
    """Call `draw(noise)` for batches of draws, in the program's dtype and on its device: `(chain, draw, *event)`.

    Noise belongs to the draw, not to the batch, so `batch_size` bounds memory and changes nothing else.
    """
    weights = (*program.parameters(), *program.buffers()) if isinstance(program, torch.nn.Module) else ()
    like = next((weight for weight in weights if weight.is_floating_point()), torch.zeros(()))
    shape = tuple(program.event_shape)
    parts = []
    for first in range(0, num_draws, batch_size or num_draws):
        count = min(batch_size or num_draws, num_draws - first)
        noise = Noise(seed, num_chains, count, shape, like.dtype, like.device, first)
        parts.append(draw(noise).reshape(num_chains, count, *shape))
    return torch.cat(parts, dim=1)


def _scalar(value: Tensor) -> Any:
    """A Python float where a coefficient is one number, a tensor where it differs by coordinate."""
    return value.item() if value.ndim == 0 else value


def _rows(x: Tensor, times: Tensor, *factors: Tensor) -> list[tuple[Any, ...]]:
    columns = (factor.tolist() if factor.ndim == 1 else list(factor) for factor in factors)
    return list(zip(times[:, None].to(x), *columns, strict=True))


def _times(coefficient: Any, x: Tensor) -> Tensor:
    if isinstance(coefficient, Tensor):
        return x * coefficient.to(x).reshape(x.shape[1:])
    return x * coefficient


# --- torchsde ---------------------------------------------------------------------------------------------------


def solve_sde(field: ReverseField, x_1: Tensor, brownian: BrownianSteps, method: str = "euler") -> Tensor:
    """Integrate the reverse SDE from x_1 `(batch, *event)` over the field's grid through torchsde.

    Raises `InputError` for a method that needs more of the Brownian path than disjoint increments.
    """
    import torchsde

    if method not in SDE_METHODS:
        raise InputError(f"Unknown SDE method {method!r}; {did_you_mean(method, SDE_METHODS)}")
    field.tabulate(x_1)
    system = _TorchSDE(field, x_1.shape)
    clock = torch.tensor([0.0, float(field.num_steps)], dtype=torch.float64)
    path = torchsde.sdeint(
        system, x_1.flatten(1), clock, bm=_BrownianAdapter(brownian), method=method, dt=1.0
    )
    return path[-1].reshape(x_1.shape)


class _TorchSDE:
    """The field as torchsde wants it: additive Ito noise, flat states."""

    noise_type, sde_type = "diagonal", "ito"

    def __init__(self, field: ReverseField, shape: torch.Size) -> None:
        self.field, self.shape = field, shape
        self._probed = False

    def f_and_g_prod(self, u: Any, y: Tensor, increment: Tensor) -> tuple[Tensor, Tensor]:
        if not self._probed:  # torchsde's contract check asks for shapes first; no network call for that
            self._probed = True
            return y, y
        x = y.view(self.shape)
        drift, noise = self.field.drift_and_noise(float(u), x, increment.view(self.shape))
        return drift.flatten(1), noise.flatten(1)


class _BrownianAdapter:
    """`BrownianSteps` behind torchsde's interface (which asks a Brownian object for its shape and increments)."""

    levy_area_approximation = "none"

    def __init__(self, steps: BrownianSteps) -> None:
        self.steps = steps
        noise = steps.noise
        self.shape = (noise.num_chains * noise.num_draws, math.prod(noise.shape))
        self.dtype, self.device = noise.dtype, noise.device

    def __call__(self, ta: Any, tb: Any) -> Tensor:
        return self.steps.increment(float(ta), float(tb))


# --- torchdiffeq ------------------------------------------------------------------------------------------------


def solve_ode(field: ReverseField, x_1: Tensor, method: str, rtol: float, atol: float) -> Tensor:
    """Integrate the probability-flow ODE from x_1 `(batch, *event)` over the field's grid through torchdiffeq.

    Fixed-step methods take `field.num_steps` steps; adaptive ones choose their steps from `rtol` and `atol`, by a
    norm over the whole batch, so that a draw then depends on its batch mates within the tolerance.
    """
    from torchdiffeq import odeint

    if method not in ODE_FIXED + ODE_ADAPTIVE:
        raise InputError(f"Unknown ODE method {method!r}; {did_you_mean(method, ODE_FIXED + ODE_ADAPTIVE)}")
    clock = torch.tensor([0.0, float(field.num_steps)], dtype=torch.float64)
    if method in ODE_FIXED:
        field.tabulate(x_1)
        options: dict[str, Any] = {"step_size": 1.0}
    else:  # an adaptive method would step past the end, where there is no time, and interpolate back
        options = {"step_t": clock[1:]}
    path = odeint(
        lambda u, x: field.drift(float(u), x),
        x_1,
        clock,
        rtol=rtol,
        atol=atol,
        method=method,
        options=options,
    )
    return path[-1]
