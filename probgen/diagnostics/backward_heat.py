"""Can noising be run backwards? Not by its heat equation, which blows up; by the family that knows the score."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Annotated, Any

import torch
from torch import Tensor

from probgen.core import Count, InputError, Positive, Within, check_arguments, describe
from probgen.diagnostics.densities import Density, box, coordinates, density_of, on_mesh
from probgen.diagnostics.mesh import Mesh, Motion, evolve
from probgen.dynamics import Velocity
from probgen.processes import Process

_NUM_POINTS = {1: 128, 2: 64}
_LOST = 0.1  # of the mass, where a mesh is too coarse or too narrow to mean anything


@dataclass(frozen=True)
class BackwardHeat:
    """How two equations fared backwards: what they made of a ripple, and how far from the density they arrived.

    Args:
        program: its name.
        ratios: sigma/alpha at the beginning and at the end.
        stochasticity: a of the member of the family.
        heat_growth, family_growth: log of the factor by which the finest wave of the mesh, added to the density, grew.
        theory: the same for the heat equation, k^2/2 times the decrease of (sigma/alpha)^2.
        heat_error, family_error: integral of |evolved - density| at the end, without the ripple.
    """

    program: str
    ratios: tuple[float, float]
    stochasticity: float
    heat_growth: float
    theory: float
    family_growth: float
    heat_error: float
    family_error: float

    def __str__(self) -> str:
        first, last = self.ratios
        return (
            f"{self.program} from sigma/alpha = {first:.3g} back to {last:.3g}:\n"
            f"  the heat equation multiplies the finest wave by e^{self.heat_growth:.1f} (theory e^{self.theory:.1f}) "
            f"and arrives {self.heat_error:.1g} from the density;\n"
            f"  the family with a = {self.stochasticity:g} multiplies it by e^{self.family_growth:.1f} and arrives "
            f"{self.family_error:.1g} from it."
        )


def backward_heat(
    program: Any,
    data: Tensor,
    *,
    t_from: float,
    t_to: float,
    stochasticity: Annotated[float, Within(0, 1000)] = 1.0,
    density: Density | None = None,
    num_points: Count | None = None,
    ripple: Positive = 1e-9,
) -> BackwardHeat:
    """Run the heat equation of a process backwards on a mesh, and beside it a member of the family with its marginals.

    In y = x/alpha, by the clock s = (sigma/alpha)^2, every process is the heat equation dp/ds = 1/2 Lap p. Backwards it
    makes a wave of number k grow by e^{k^2 |ds|/2}, and what is finest in the rounding errors fastest. The member
    a > 0 of the family, dp/ds = div((1 + a)/2 score p) - a/2 Lap p, is the same equation where the score is right, and
    smooths when it is run backwards.

    Args:
        program: a diffusion of one or two coordinates, with one alpha and sigma for both.
        data: draws from the law at t = 0, `(n, *event)`; they say how wide the mesh must be.
        t_from, t_to: in [t_min, t_max], t_from > t_to.
        stochasticity: a >= 0.
        density: p(mesh, t); as for `fokker_planck`.
        num_points: of the mesh, along each axis; 128 for the line and 64 for the plane by default.
        ripple: size of the finest wave when it is added, relative to the largest density.

    Returns a `BackwardHeat`. Raises `InputError` for other shapes, other programs, times out of order, or a mesh
    that does not see the density.

    Source: Evans (2010), Partial Differential Equations, section 2.3; Anderson (1982), doi
    10.1016/0304-4149(82)90051-5.

    >>> from probgen.models.gaussian_mixture import GaussianMixture
    >>> from probgen import Ancestral, infer
    >>> from probgen.processes import OTPath
    >>> mixture = GaussianMixture.example(dim=1, process=OTPath())
    >>> data = infer(mixture, Ancestral(), num_draws=1000).flat("x")
    >>> found = backward_heat(mixture, data, t_from=0.4, t_to=0.35, num_points=64)
    >>> found.heat_growth > 5, found.family_growth < 2
    (True, True)
    """
    check_arguments(backward_heat, locals())
    x_0 = coordinates(program, data)
    velocity = Velocity.of(program)
    scaled = _Scaled(program, velocity, density_of(program, x_0, velocity.process, density))
    if not stochasticity >= 0:
        raise InputError(f"stochasticity must be >= 0, got {stochasticity!r}.")
    if not velocity.t_min <= t_to < t_from <= velocity.t_max:
        raise InputError(
            f"Backwards needs {velocity.t_min:g} <= t_to < t_from <= {velocity.t_max:g}, got t_from={t_from!r}, "
            f"t_to={t_to!r}."
        )
    clock = [scaled.clock(t) for t in (t_from, t_to)]
    mesh = scaled.mesh(x_0, t_from, num_points or _NUM_POINTS[x_0.shape[1]])
    _check_seen(mesh, scaled.density, (t_from, t_to))
    start, end = scaled.density(mesh, t_from), scaled.density(mesh, t_to)
    wave = ripple * start.max() * _finest_wave(mesh)
    still = heat(mesh)

    def run(motion: Callable[[float], Motion]) -> tuple[float, float]:
        """Growth of the wave, and the distance from the density without it."""
        plain, rippled = evolve(mesh, torch.stack([start, start + wave]), motion, *clock)
        grown = ((rippled - plain).norm() / wave.norm()).log().item()
        return grown, mesh.integral((plain - end).abs())

    heat_growth, heat_error = run(lambda _: still)
    family_growth, family_error = run(lambda s: scaled.family(mesh, s, stochasticity))
    finest = sum(wave[-1].item() ** 2 for wave in mesh.waves)
    return BackwardHeat(
        describe(program),
        (clock[0] ** 0.5, clock[1] ** 0.5),
        stochasticity,
        heat_growth,
        0.5 * finest * (clock[0] - clock[1]),
        family_growth,
        heat_error,
        family_error,
    )


def _check_seen(mesh: Mesh, density: Density, times: Sequence[float]) -> None:
    """`InputError` where the mesh is too coarse for the density at one of the times."""
    for t in times:
        mass = mesh.integral(density(mesh, t))
        if not abs(mass - 1) <= _LOST:
            raise InputError(
                f"backward_heat: on {mesh.num_points} points an axis the density has mass {mass:.3g} at t = {t:g}, not "
                "1: they are too few for a mesh as wide as the data noised to t_from. Use more num_points, a t_from "
                "nearer to t_to, or leave outliers out."
            )


def heat(mesh: Mesh) -> Motion:
    """dp/ds = 1/2 Lap p."""
    drift = torch.zeros(*mesh.shape, len(mesh.low), dtype=torch.float64)
    return Motion(drift, torch.tensor(0.5, dtype=torch.float64))


@dataclass(frozen=True)
class _Scaled:
    """A diffusion in y = x/alpha, by the clock s = (sigma/alpha)^2."""

    program: Any
    velocity: Velocity
    density_of_x: Density

    @property
    def process(self) -> Process:
        if self.velocity.process is None:
            raise InputError(f"{describe(self.program)} has no noising law to be run backwards.")
        return self.velocity.process

    def alpha(self, t: float) -> float:
        alpha = self.process.alpha(_at(t))
        if alpha.numel() > 1:
            raise InputError(
                "Laws that differ by coordinate have no one clock: give one alpha and sigma a time."
            )
        return alpha.item()

    def clock(self, t: float) -> float:
        return (self.process.sigma(_at(t)).item() / self.alpha(t)) ** 2

    def mesh(self, data: Tensor, t: float, num_points: int) -> Mesh:
        return _stretched(box(self.process, data, t, num_points), 1 / self.alpha(t))

    def density(self, mesh: Mesh, t: float) -> Tensor:
        alpha = self.alpha(t)
        return alpha ** len(mesh.low) * self.density_of_x(_stretched(mesh, alpha), t)

    def family(self, mesh: Mesh, s: float, stochasticity: float) -> Motion:
        """The member a of the family for ds < 0."""
        t = self.process.time_at(torch.tensor([s**0.5], dtype=torch.float64)).item()
        drift = -0.5 * (1 + stochasticity) * self.score(mesh, t)
        return Motion(drift, torch.tensor(-0.5 * stochasticity, dtype=torch.float64))

    def score(self, mesh: Mesh, t: float) -> Tensor:
        """alpha score(alpha y), from v = f x - g^2/2 score."""
        alpha, at = self.alpha(t), _at(t)
        there = _stretched(mesh, alpha)
        x = there.points.reshape(*there.shape, -1)
        v = on_mesh(self.program, self.velocity, there, t)
        return alpha * 2 * (self.process.drift(at) * x - v) / self.process.diffusion2(at)


def _stretched(mesh: Mesh, factor: float) -> Mesh:
    low, high = (tuple(factor * end for end in ends) for ends in (mesh.low, mesh.high))
    return Mesh(low, high, mesh.num_points)


def _finest_wave(mesh: Mesh) -> Tensor:
    """+1 and -1 in turn along each axis."""
    sign = 1 - 2 * (torch.arange(mesh.num_points) % 2).double()
    return sign if len(mesh.low) == 1 else sign[:, None] * sign


def _at(t: float) -> Tensor:
    return torch.tensor([t], dtype=torch.float64)


def example() -> BackwardHeat:
    """What one such run said."""
    return BackwardHeat("GaussianMixture", (0.9, 0.4), 1.0, 60.0, 60.1, -3.0, 1e10, 1e-6)
