"""What law is an energy on the line or on the plane? Its normaliser by quadrature, its distance from another law."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from probgen.core import (
    Energetic,
    InputError,
    UnsupportedError,
    check_arguments,
    check_fields,
    describe,
    given,
)
from probgen.diagnostics.mesh import Mesh
from probgen.dynamics.engine import floating_weight
from probgen.targets import frozen

_LARGEST_RIM = 1e-3  # of the mass, at the outermost points: where there is more, the box cuts the law


@dataclass(frozen=True, eq=False)
class Landscape:
    """E on a mesh, and exp(-E)/Z with log Z by quadrature; made by `landscape`.

    Args:
        mesh: where E is known.
        energy: E in nats, `(*mesh.shape)`, float64.
    """

    mesh: Mesh
    energy: Tensor

    def __post_init__(self) -> None:
        check_fields(self)
        if self.energy.shape != self.mesh.shape:
            raise InputError(
                f"Landscape: energy must have the shape of the mesh, {self.mesh.shape}, got {tuple(self.energy.shape)}."
            )

    @cached_property
    def log_partition(self) -> float:
        """log Z in nats: as exact as rounding where exp(-E) is smooth between the points."""
        return float((-self.energy).logsumexp(tuple(range(self.energy.ndim)))) + math.log(
            math.prod(self.mesh.spacing)
        )

    @property
    def density(self) -> Tensor:
        """exp(-E)/Z, `(*mesh.shape)`."""
        return (-self.energy - self.log_partition).exp()

    def cross_entropy(self, density: Tensor) -> float:
        """E_p[E] + log Z in nats, the mean negative log-likelihood of data from p `(*mesh.shape)`."""
        return self.mesh.integral(density * (self.energy + self.log_partition))

    def divergence_from(self, density: Tensor) -> float:
        """KL(p | exp(-E)/Z) in nats: the cross entropy less the entropy of p."""
        return self.cross_entropy(density) + self.mesh.integral(torch.special.xlogy(density, density))


def landscape(program: Any, mesh: Mesh, condition: Tensor | None = None) -> Landscape:
    """The energy of a program of one or two coordinates on a mesh.

    Args:
        program: with `energy(x)`.
        mesh: a box that holds the law: of its mass, at most a thousandth may lie at the outermost points.
        condition: one row, `(1, ...)`, for programs that take one.

    Returns a `Landscape`.

    Raises:
        UnsupportedError: a program without an energy.
        InputError: one of other coordinates than the mesh has, an energy that is not finite, a box that cuts the law.

    >>> from probgen.models.energy import Energy
    >>> bowl = Energy(lambda x: 0.5 * x.square().sum(-1), (2,))
    >>> found = landscape(bowl, Mesh((-7.0, -7.0), (7.0, 7.0), 64))
    >>> abs(found.log_partition - math.log(2 * math.pi)) < 1e-6
    True
    """
    check_arguments(landscape, locals())
    if not isinstance(program, Energetic):
        raise UnsupportedError(
            f"landscape needs a program with energy(x); {describe(program)} has none. Exact densities of oracles are "
            "put on a mesh by exact_density."
        )
    event_shape = tuple(getattr(program, "event_shape", ()))
    if math.prod(event_shape) != len(mesh.low):
        raise InputError(f"{describe(program)} has events {event_shape}, the mesh {len(mesh.low)} axes.")
    if condition is not None and (condition.ndim == 0 or len(condition) != 1):
        raise InputError(f"condition must be one row, (1, ...), got shape {tuple(condition.shape)}.")
    points = mesh.points.reshape(-1, *event_shape).to(floating_weight(program))
    with torch.no_grad(), frozen(program):
        c = None if condition is None else condition.expand(len(points), *condition.shape[1:])
        energy = given(program, c).energy(points).double().cpu().reshape(mesh.shape)
    found = Landscape(mesh, energy)
    _check(describe(program), found)
    return found


def _check(name: str, found: Landscape) -> None:
    bad = int((~found.energy.isfinite()).sum())
    if bad:
        raise InputError(f"The energy of {name} is not finite at {bad} of {found.energy.numel()} points.")
    inner = found.density[(slice(1, -1),) * found.energy.ndim]
    rim = 1 - found.mesh.integral(inner)
    if rim > _LARGEST_RIM:
        raise InputError(
            f"{rim:.1%} of the mass of {name} in the box {found.mesh.low} to {found.mesh.high} lies at its rim, so "
            "that it reaches beyond: take a larger box. Where no box is large enough, the energy falls without end: "
            "EBM(..., base_scale=2.0) keeps it up."
        )


def example() -> Landscape:
    """A bowl on the plane."""
    mesh = Mesh((-7.0, -7.0), (7.0, 7.0), 64)
    return Landscape(mesh, 0.5 * mesh.points.square().sum(1).reshape(mesh.shape))
