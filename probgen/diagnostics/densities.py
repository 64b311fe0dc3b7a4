"""What is the density of a diffusion at each time? Known by an oracle, or made of noised data, on a mesh."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from probgen.core import (
    InputError,
    Normalised,
    Scored,
    check_arguments,
    check_finite,
    check_shape,
    describe,
    shown,
)
from probgen.diagnostics.mesh import Mesh
from probgen.dynamics.engine import floating_weight
from probgen.processes import Gaussian, Process

Density = Callable[[Mesh, float], Tensor]
_DRAWS_AT_ONCE = 2000
_FEWEST = 10


def exact_density(program: Any) -> Density:
    """p(mesh, t) of an oracle, whose log_prob(x, t) is known at every time.

    >>> from probgen.models.gaussian_mixture import GaussianMixture
    >>> mesh = Mesh((-6.0, -6.0), (6.0, 6.0), 64)
    >>> round(mesh.integral(exact_density(GaussianMixture.example())(mesh, 0.5)), 6)
    1.0
    """
    check_arguments(exact_density, locals())

    def density(mesh: Mesh, t: float) -> Tensor:
        return on_mesh(program, program.log_prob, mesh, t).squeeze(-1).exp()

    return density


def noised_density(data: Tensor, process: Process) -> Density:
    """p(mesh, t) = 1/n sum_i N(x; alpha x_i, sigma^2 I): exact for n data, an estimate for the law they come from.

    Args:
        data: x_i, `(n, d)`.
        process: the noising law.

    >>> from probgen.processes import VP
    >>> mesh = Mesh((-6.0,), (6.0,), 64)
    >>> round(mesh.integral(noised_density(torch.randn(100, 1), VP())(mesh, 0.5)), 6)
    1.0
    """
    check_arguments(noised_density, locals())

    def density(mesh: Mesh, t: float) -> Tensor:
        parts = data.double().split(_DRAWS_AT_ONCE)
        return torch.stack([_kernels(mesh, law_at(process, part, t)) for part in parts]).sum(0) / len(data)

    return density


def _kernels(mesh: Mesh, law: Gaussian) -> Tensor:
    """The sum of normal densities; each is a product over the axes, so that the sum is one of matrices."""
    scale = law.scale.expand_as(law.loc)
    factors = [
        torch.distributions.Normal(law.loc[:, i, None], scale[:, i, None]).log_prob(axis).exp()
        for i, axis in enumerate(mesh.axes)
    ]
    return factors[0].sum(0) if len(factors) == 1 else factors[0].mT @ factors[1]


def held(density: Density) -> Density:
    """A density of the user's, held to `(*mesh.shape)` numbers."""

    def checked(mesh: Mesh, t: float) -> Tensor:
        p = density(mesh, t)
        check_shape("density(mesh, t)", p, mesh.shape)
        return p.detach().double().cpu()

    return checked


def density_of(program: Any, data: Tensor, process: Process | None, given: Density | None = None) -> Density:
    """The density that was given, else the exact one of an oracle, or that of the noised data `(n, d)`."""
    if given is not None:
        return held(given)
    if isinstance(program, Normalised) and isinstance(program, Scored):
        return exact_density(program)
    if process is None:
        raise InputError(
            f"{describe(program)} is a flow without a noising law: give density=, p(mesh, t) on a mesh."
        )
    return noised_density(data, process)


def law_at(process: Process, data: Tensor, t: float) -> Gaussian:
    """The law of x_t given each row of data `(n, d)`."""
    return process.marginal(data, torch.full((len(data),), t, dtype=torch.float64))


def box(process: Process, data: Tensor, t: float, num_points: int) -> Mesh:
    """A mesh that holds all but a rounding error of the law of the noised data `(n, d)`."""
    law = law_at(process, data, t)
    return Mesh.around(law.loc, num_points, widen=1.7, margin=7 * law.scale.max().item())


def on_mesh(program: Any, field: Callable[[Tensor, Tensor], Tensor], mesh: Mesh, t: float) -> Tensor:
    """A field of a program, asked in its own dtype at all points of a mesh: float64, `(*mesh.shape, m)`."""
    like = floating_weight(program)
    x = mesh.points.reshape(-1, *program.event_shape).to(like)
    with torch.no_grad():
        value = field(x, torch.tensor([t], dtype=torch.float64).to(like))
    return value.double().cpu().reshape(*mesh.shape, -1)


def coordinates(program: Any, data: Tensor) -> Tensor:
    """Data `(n, *event)` of one or two coordinates as `(n, d)`, float64; `InputError` where they are not that."""
    if not hasattr(program, "event_shape"):
        raise InputError(f"program must be one with an event_shape, as probgen's are, got {shown(program)}.")
    event_shape = tuple(program.event_shape)
    if tuple(data.shape[1:]) != event_shape or len(data) < _FEWEST:
        raise InputError(
            f"data must be draws of {describe(program)}, (n, {', '.join(map(str, event_shape))}) with n >= {_FEWEST}, "
            f"got {tuple(data.shape)}."
        )
    flat = data.detach().double().cpu().flatten(1)
    if flat.shape[1] not in (1, 2):
        raise InputError(f"A mesh has one axis or two; the data have {flat.shape[1]} coordinates.")
    check_finite("data", flat)
    return flat


def example() -> Density:
    """A noised pair of points."""
    from probgen.processes import VP

    return noised_density(torch.tensor([[-1.0], [1.5]]), VP())
