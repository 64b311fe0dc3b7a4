"""Paths in time: the states on the way from noise to data or back, along any member of the family."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from probgen.core import Diffusion, InputError, check_count, describe
from probgen.dynamics.engine import floating_weight
from probgen.dynamics.fields import (
    AffineDenoiser,
    ClockedField,
    Velocity,
    family_field,
    flow_field,
    reversed_schedule,
)
from probgen.dynamics.torch_sde import sde_states, warn_of_non_finite
from probgen.processes import Grid, Schedule, as_grid
from probgen.randomness import BrownianSteps, Noise


def trajectories(
    program: Any,
    x: Tensor,
    *,
    t_from: float,
    t_to: float,
    num_steps: int,
    stochasticity: float = 0.0,
    grid: Grid | str = "uniform",
    seed: int = 0,
    every: int = 1,
) -> tuple[Tensor, Tensor]:
    """Follow the family of SDEs with the marginals of the program from x, in either direction of time.

    dx = [f x - (1 - a)/2 g^2 score] dt + sqrt(a) g dW where t_to > t_from (data to noise), and
    dx = [f x - (1 + a)/2 g^2 score] dt + sqrt(a) g dW where t_to < t_from; both carry p_t for every a. Steps are
    Heun's: 2 network calls, of second order for a = 0.

    Args:
        program: a diffusion, or a flow for a = 0.
        x: the state at `t_from`, `(batch, *event)`; it is brought to the dtype and device of the program.
        t_from, t_to: different times, both in [t_min, t_max] of the process (or the span of the flow).
        num_steps: number of steps, 1..1,000,000.
        stochasticity: a >= 0; 1 is the SDE and Anderson's reversal, 0 the probability-flow ODE.
        grid: how the steps are spread over time, "uniform", "quadratic", "karras" or a `Grid`.
        seed: of the noise; row i has the same noise in any batch.
        every: keep the state after each `every` steps; the first and the last are always kept.

    Returns:
        times `(m,)`, float64, from t_from to t_to, and states `(m, batch, *event)`.

    Raises:
        InputError: times out of range or equal, stochasticity < 0, a count below 1.

    Source: Anderson (1982); Song et al. (2021), arXiv 2011.13456, appendix D.

    >>> from probgen.models.gaussian_mixture import GaussianMixture
    >>> mixture = GaussianMixture.example()
    >>> times, states = trajectories(mixture, torch.zeros(5, 2), t_from=1.0, t_to=0.5, num_steps=8, every=4)
    >>> times.tolist(), states.shape
    ([1.0, 0.75, 0.5], torch.Size([3, 5, 2]))
    """
    check_count("num_steps", num_steps)
    check_count("every", every)
    if not stochasticity >= 0:
        raise InputError(f"stochasticity must be >= 0, got {stochasticity!r}.")
    velocity = Velocity.of(program)
    _check_span(velocity, t_from, t_to)
    schedule = _schedule(as_grid(grid), velocity, t_from, t_to)
    field = _member(program, velocity, schedule, num_steps, stochasticity)
    x = x.to(floating_weight(program))
    noise = Noise(seed, 1, len(x), tuple(x.shape[1:]), x.dtype, x.device)
    kept = sorted({0, num_steps, *range(0, num_steps, every)})
    with torch.no_grad():
        states = dict.fromkeys(kept, x)
        for k, state in enumerate(sde_states(field, x, BrownianSteps(noise, num_steps), "heun"), 1):
            if k in states:
                states[k] = state
    times = schedule.time(torch.tensor(kept, dtype=torch.float64) / num_steps)
    path = torch.stack(list(states.values()))
    warn_of_non_finite(times, path)
    return times, path


def _check_span(velocity: Velocity, t_from: float, t_to: float) -> None:
    if t_from == t_to or not all(velocity.t_min <= t <= velocity.t_max for t in (t_from, t_to)):
        raise InputError(
            f"t_from and t_to must differ and lie in [{velocity.t_min:g}, {velocity.t_max:g}], where the program is "
            f"clamped (0 is data, 1 is noise), got t_from={t_from!r}, t_to={t_to!r}."
        )


def _schedule(grid: Grid, velocity: Velocity, t_from: float, t_to: float) -> Schedule:
    if t_from > t_to:
        return grid.between(t_from, t_to, velocity.process)
    return reversed_schedule(grid.between(t_to, t_from, velocity.process))


def _member(
    program: Any, velocity: Velocity, schedule: Schedule, num_steps: int, stochasticity: float
) -> ClockedField:
    if stochasticity == 0:
        return flow_field(velocity, schedule, num_steps)
    if not isinstance(program, Diffusion):
        raise InputError(
            f"stochasticity={stochasticity!r} needs the score, which {describe(program)} has not: it is a flow and no "
            "diffusion. Use stochasticity=0."
        )
    denoiser = AffineDenoiser.of(program)
    return family_field(
        denoiser, schedule, num_steps, lambda t: stochasticity * denoiser.process.diffusion2(t)
    )
