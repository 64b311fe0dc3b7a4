"""A density on a regular mesh of the line or the plane: its derivatives, its change in time, its cells."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Annotated, NamedTuple

import torch
from torch import Tensor

from probgen.core import InputError, ProbgenError, Within, check_fields, check_finite

MAX_STEPS = 100_000


@dataclass(frozen=True)
class Mesh:
    """`num_points` points low + i (high - low)/num_points along each axis, i = 0, 1, ...; values `(*shape)` on them.

    Derivatives are those of the trigonometric polynomial through the points (Trefethen 2000, doi
    10.1137/1.9780898719598): where a density is wider than two spacings and vanishes before the edges, their error is
    of the order of rounding. Everything is float64.

    Args:
        low, high: the box, one number an axis, one or two axes.
        num_points: points along each axis, a power of two, >= 8.

    Raises:
        InputError: more than two axes, an empty box, a count that is no power of two.

    >>> mesh = Mesh((-8.0,), (8.0,), num_points=64)
    >>> p = (-0.5 * mesh.axes[0].square()).exp()
    >>> bool(torch.allclose(mesh.derivative(p, 0), -mesh.axes[0] * p, atol=1e-12))
    True
    """

    low: tuple[float, ...]
    high: tuple[float, ...]
    num_points: Annotated[int, Within(8, 4096)]

    def __post_init__(self) -> None:
        check_fields(self)
        if self.num_points & (self.num_points - 1):
            raise InputError(f"num_points must be a power of two, got {self.num_points}.")
        if len(self.low) not in (1, 2) or len(self.high) != len(self.low):
            raise InputError(f"A mesh has one axis or two, got low={self.low} and high={self.high}.")
        if not all(a < b for a, b in zip(self.low, self.high, strict=True)):
            raise InputError(f"low must lie below high on each axis, got {self.low} and {self.high}.")

    @classmethod
    def around(cls, x: Tensor, num_points: int, widen: float = 1.0, margin: float = 0.0) -> Mesh:
        """The box of draws x `(n, d)`, `widen` times as wide about its centre, and `margin` wider on each side.

        >>> Mesh.around(torch.tensor([[0.0], [2.0]]), 8, widen=2.0, margin=1.0).high
        (4.0,)
        """
        if x.ndim != 2:
            raise InputError(f"Expected draws (n, 1) or (n, 2), got {tuple(x.shape)}.")
        check_finite("the draws", x)
        low, high = x.double().amin(0), x.double().amax(0)
        centre, half = 0.5 * (low + high), 0.5 * widen * (high - low) + margin
        return cls(tuple((centre - half).tolist()), tuple((centre + half).tolist()), num_points)

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of values on the mesh."""
        return (self.num_points,) * len(self.low)

    @property
    def spacing(self) -> tuple[float, ...]:
        """Distance of neighbours along each axis."""
        return tuple((b - a) / self.num_points for a, b in zip(self.low, self.high, strict=True))

    @cached_property
    def axes(self) -> tuple[Tensor, ...]:
        """Coordinates along each axis, `(num_points,)` each."""
        steps = torch.arange(self.num_points, dtype=torch.float64)
        return tuple(a + h * steps for a, h in zip(self.low, self.spacing, strict=True))

    @property
    def points(self) -> Tensor:
        """All points, `(num_points^d, d)`, the last axis fastest."""
        return torch.stack(torch.meshgrid(*self.axes, indexing="ij"), -1).reshape(-1, len(self.low))

    @cached_property
    def waves(self) -> tuple[Tensor, ...]:
        """Wave numbers 2 pi m / (high - low) along each axis, `(num_points // 2 + 1,)` each."""
        return tuple(
            2 * math.pi * torch.fft.rfftfreq(self.num_points, h, dtype=torch.float64) for h in self.spacing
        )

    def refined(self) -> Mesh:
        """The same box with twice the points: values on it, `[::2]` along each axis, are those on this mesh."""
        return replace(self, num_points=2 * self.num_points)

    def integral(self, values: Tensor) -> float:
        """Their integral over the box; over periodic values the sum is as exact as the derivatives."""
        return values.sum().item() * math.prod(self.spacing)

    def derivative(self, values: Tensor, axis: int, order: int = 1) -> Tensor:
        """d^order/dx_axis^order of values `(..., *shape)`."""
        factor = (1j * self.waves[axis]) ** order
        if order % 2:
            factor[-1] = 0  # the finest wave is a cosine; its derivative vanishes at every point
        dim = axis - len(self.low)  # counted from the end
        factor = factor.reshape(-1, *[1] * (-1 - dim))
        return torch.fft.irfft(torch.fft.rfft(values, dim=dim) * factor, n=self.num_points, dim=dim)

    def divergence(self, flux: Tensor) -> Tensor:
        """div of vector fields `(..., *shape, d)`."""
        return torch.stack([self.derivative(flux[..., i], i) for i in range(flux.shape[-1])]).sum(0)

    def laplacian(self, values: Tensor, weights: Tensor | float = 1.0) -> Tensor:
        """sum_i w_i d^2/dx_i^2 of values `(..., *shape)`, weights a number or `(d,)`."""
        weights = torch.as_tensor(weights, dtype=torch.float64).expand(len(self.low))
        return torch.stack([w * self.derivative(values, i, 2) for i, w in enumerate(weights)]).sum(0)

    def cells(self, values: Tensor, size: int) -> Tensor:
        """Integrals of values over cells of `size` points along each axis: `(num_points // size, ...)`."""
        blocks = values
        for axis in range(values.ndim):
            blocks = blocks.unflatten(axis, (-1, size)).sum(axis + 1)
        return blocks * math.prod(self.spacing)

    def count(self, x: Tensor, size: int) -> Tensor:
        """How many of the draws x `(n, d)` lie in each of those cells; draws outside the box are in none."""
        low, h = (torch.tensor(value, dtype=torch.float64) for value in (self.low, self.spacing))
        # A point stands for the space half a spacing around it.
        index = ((x.double() - low) / h + 0.5).div(size).floor().long()
        per_axis = self.num_points // size
        index = index[((index >= 0) & (index < per_axis)).all(1)]
        strides = torch.tensor([per_axis**i for i in reversed(range(len(self.low)))])
        counts = torch.bincount((index * strides).sum(1), minlength=per_axis ** len(self.low))
        return counts.reshape((per_axis,) * len(self.low))


class Motion(NamedTuple):
    """dp/dt = -div(drift p) + sum_i diffusion_i d^2p/dx_i^2 at one time.

    Args:
        drift: on the mesh, `(*shape, d)`.
        diffusion: half the variance of the noise a unit of time, `()` or `(d,)`; negative where time runs backwards.
    """

    drift: Tensor
    diffusion: Tensor

    def rate(self, mesh: Mesh, p: Tensor) -> Tensor:
        """dp/dt."""
        return mesh.laplacian(p, self.diffusion) - mesh.divergence(self.drift * p[..., None])

    def fastest(self, mesh: Mesh) -> float:
        """The largest rate at which a wave on the mesh grows, decays or turns."""
        finest = torch.stack([wave[-1] for wave in mesh.waves])
        speeds = self.drift.abs().reshape(-1, len(finest)).amax(0)
        return (finest.square() * self.diffusion.abs() + finest * speeds).sum().item()


def evolve(mesh: Mesh, p: Tensor, motion: Callable[[float], Motion], t_from: float, t_to: float) -> Tensor:
    """Carry densities on the mesh from t_from to t_to, forwards or backwards, by the Runge-Kutta scheme of order four.

    A step is as long as the reciprocal of the fastest rate on the mesh at its beginning, so that what grows does so
    because the equation wants it. Twice the points take four times the steps.

    Args:
        mesh: where the densities live.
        p: one or several at t_from, `(..., *mesh.shape)`, float64.
        motion: time -> drift and diffusion on the mesh.
        t_from, t_to: times.

    Returns what p has become at t_to. Raises `ProbgenError` where it would take more than 100,000 steps.

    >>> mesh, heat = Mesh((-9.0,), (9.0,), 64), Motion(torch.zeros(64, 1), torch.tensor(0.5))
    >>> p = (-0.5 * mesh.axes[0].square()).exp()                       # variance 1; the heat equation adds t
    >>> p = evolve(mesh, p, lambda t: heat, 0.0, 1.0)
    >>> round((mesh.integral(mesh.axes[0].square() * p) / mesh.integral(p)), 6)
    2.0
    """
    t, now = t_from, motion(t_from)
    for _ in range(MAX_STEPS):
        if t == t_to:
            return p
        longest = 1 / max(now.fastest(mesh), 1e-300)
        t_next = t_to if abs(t_to - t) <= longest else t + math.copysign(longest, t_to - t)
        halfway, then = motion(0.5 * (t + t_next)), motion(t_next)
        p = _runge_kutta(mesh, p, t_next - t, now, halfway, then)
        t, now = t_next, then
    raise ProbgenError(
        f"Evolving from t = {t_from:g} to {t_to:g} on {mesh.num_points} points an axis takes more than {MAX_STEPS:,} "
        f"steps (arrived at t = {t:.4g}). Use a coarser mesh or a shorter time."
    )


def _runge_kutta(mesh: Mesh, p: Tensor, dt: float, now: Motion, halfway: Motion, then: Motion) -> Tensor:
    k1 = now.rate(mesh, p)
    k2 = halfway.rate(mesh, p + 0.5 * dt * k1)
    k3 = halfway.rate(mesh, p + 0.5 * dt * k2)
    k4 = then.rate(mesh, p + dt * k3)
    return p + dt / 6 * (k1 + 2 * k2 + 2 * k3 + k4)


def example() -> Mesh:
    """The square [-4, 4)^2 with 32 points along each side."""
    return Mesh((-4.0, -4.0), (4.0, 4.0), 32)
