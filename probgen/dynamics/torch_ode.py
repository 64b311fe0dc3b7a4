"""Deterministic solvers through torchdiffeq, on an integer clock."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from probgen.core import InputError, did_you_mean
from probgen.dynamics.fields import ClockedField
from probgen.dynamics.steppers import SolverError

ODE_FIXED = ("euler", "midpoint", "heun2", "heun3", "rk4")
ODE_ADAPTIVE = ("dopri5", "bosh3", "adaptive_heun", "dopri8")


def solve_ode(field: ClockedField, x: Tensor, method: str, rtol: float = 1e-5, atol: float = 1e-5) -> Tensor:
    """Integrate the field from x `(batch, *event)` over its clock through torchdiffeq.

    Fixed-step methods take `field.num_steps` steps; adaptive ones choose their steps from `rtol` and `atol`, by a
    norm over the whole batch, so that a draw then depends on its batch mates within the tolerance, and one that turns
    NaN stops all: `SolverError`.
    """
    from torchdiffeq import odeint

    if method not in ODE_FIXED + ODE_ADAPTIVE:
        raise InputError(f"Unknown ODE method {method!r}; {did_you_mean(method, ODE_FIXED + ODE_ADAPTIVE)}")
    clock = torch.tensor([0.0, float(field.num_steps)], dtype=torch.float64)
    if method in ODE_FIXED:
        field.tabulate(x)
        options: dict[str, Any] = {"step_size": 1.0}
    else:  # an adaptive method would step past the end, where there is no time, and interpolate back
        options = {"step_t": clock[1:]}
    asked = [0.0]

    def drift(u: Tensor, y: Tensor) -> Tensor:
        asked[0] = float(u)
        return field.drift(asked[0], y)

    try:
        path = odeint(drift, x, clock, rtol=rtol, atol=atol, method=method, options=options)
    except AssertionError as error:
        raise _named(error, method, field, asked[0], len(x)) from error
    return path[-1]


def _named(error: AssertionError, method: str, field: ClockedField, u: float, batch: int) -> SolverError:
    """torchdiffeq asserts that its step has not become too small, or its state NaN."""
    t = field.schedule.time(torch.tensor([u / field.num_steps], dtype=torch.float64)).item()
    return SolverError(
        f"torchdiffeq's {method} gave up near t = {t:.6g} ({error}). One step serves the whole batch, so that a "
        'single row that is stiff or NaN there stops all: method="dopri5" keeps rows apart. Or raise rtol and atol, '
        "solve in float64, or stop short of the singular time.",
        range(batch),
    )
