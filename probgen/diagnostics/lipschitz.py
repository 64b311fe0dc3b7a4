"""How steep is the velocity of a flow along its paths? It says how short steps must be, and why there is a t_min."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from probgen.core import Count, NonNegativeInt, Size, check_arguments
from probgen.dynamics import Velocity
from probgen.dynamics.engine import floating_weight
from probgen.dynamics.fields import Steps
from probgen.dynamics.paths import trajectories
from probgen.randomness import Noise


class Lipschitz(NamedTuple):
    """The largest spectral norm of dv/dx over paths, `(m,)`, at times `(m,)` from noise to data, float64."""

    times: Tensor
    largest: Tensor

    def __str__(self) -> str:
        shown = [f"{c:.3g} at t = {t:.3g}" for t, c in zip(*(value.tolist() for value in self), strict=True)]
        return f"largest local Lipschitz constant of the velocity: {', '.join(shown)}"


def lipschitz(
    program: Any,
    *,
    num_paths: Size = 200,
    num_steps: Steps = 100,
    every: Count = 10,
    seed: NonNegativeInt = 0,
) -> Lipschitz:
    """The largest local Lipschitz constant of the velocity, |dv/dx| in the spectral norm, along its paths to the data.

    An ODE has one solution only where its field is Lipschitz, and an explicit solver wants steps shorter than the
    reciprocal of the constant. For data on a thin set the constant is sigma'/sigma or so, 1/(2 t) where the variance
    grows linearly: its integral to t = 0 is infinite. That is why processes stop at t_min.

    Args:
        program: a diffusion or a flow of any event shape; each time looked at costs one backward pass a coordinate.
        num_paths: of the probability flow, from the law it starts from.
        num_steps: of the solver, denser near the data.
        every: look after each `every` steps, and at both ends.
        seed: of the noise.

    Returns a `Lipschitz`.

    >>> from probgen.models.gaussian_mixture import GaussianMixture
    >>> found = lipschitz(GaussianMixture.example(dim=1), num_paths=50, num_steps=20, every=10)
    >>> found.times.shape, bool(found.largest[-1] > found.largest[0])
    (torch.Size([3]), True)
    """
    check_arguments(lipschitz, locals())
    velocity = Velocity.of(program)
    like = floating_weight(program)
    noise = Noise(seed, 1, num_paths, tuple(program.event_shape), like.dtype, like.device)
    times, states = trajectories(
        program,
        velocity.initial.draw(noise),
        t_from=velocity.t_max,
        t_to=velocity.t_min,
        num_steps=num_steps,
        grid="quadratic",
        every=every,
    )
    largest = [_steepest(_jacobian(velocity, x, t)) for t, x in zip(times, states, strict=True)]
    return Lipschitz(times, torch.stack(largest).double().cpu())


def _steepest(jacobians: Tensor) -> Tensor:
    """The largest spectral norm; NaN where a matrix is not finite."""
    norms = torch.linalg.matrix_norm(jacobians.nan_to_num(), 2)
    return torch.where(jacobians.isfinite().all(-1).all(-1), norms, math.nan).max()


def _jacobian(velocity: Velocity, x: Tensor, t: Tensor) -> Tensor:
    """dv/dx of every row, `(batch, d, d)`; a row of v depends on its own row of x alone."""
    with torch.enable_grad():
        at = x.detach().requires_grad_()
        columns = velocity(at, t).flatten(1).unbind(1)
        rows = [torch.autograd.grad(column.sum(), at, retain_graph=True)[0] for column in columns]
    return torch.stack([row.flatten(1) for row in rows], 1)


def example() -> Lipschitz:
    """A made-up finding."""
    return Lipschitz(torch.tensor([1.0, 0.1]).double(), torch.tensor([0.7, 9.1]).double())
