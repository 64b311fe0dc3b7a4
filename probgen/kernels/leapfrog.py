"""Hamiltonian dynamics with unit mass: the leapfrog integrator and the accept step."""

from __future__ import annotations

import torch
from torch import Tensor

from probgen.kernels.core import Evaluate, Point

MAX_ENERGY_ERROR = 1000.0  # beyond it a trajectory has left the level set for good (Hoffman & Gelman 2014)


def leapfrog(evaluate: Evaluate, point: Point, momentum: Tensor, step_size: Tensor) -> tuple[Point, Tensor]:
    """One step of p' = grad log p(x), x' = p, time-reversible and volume-preserving; one gradient.

    Args:
        evaluate: the density.
        point, momentum: `(dim, n)` each.
        step_size: `()` or `(n,)`.

    Returns the new point and momentum. The energy error of a trajectory is O(step_size^2).
    """
    half = momentum + 0.5 * step_size * point.grad
    position = point.position + step_size * half
    log_prob, grad = evaluate(position)
    return Point(position, log_prob, grad), half + 0.5 * step_size * grad


def kinetic_energy(momentum: Tensor) -> Tensor:
    """|p|^2 / 2, `(n,)`."""
    return 0.5 * momentum.square().sum(0)


def accept(old: Point, new: Point, log_ratio: Tensor, noise: Tensor) -> tuple[Point, Tensor, Tensor]:
    """Metropolis: the new point with probability min(1, exp(log_ratio)).

    Args:
        old, new: where chains stand and what is proposed.
        log_ratio: `(n,)`; where it is not finite the old point stays.
        noise: two standard normals a chain, `(2, n)`: (z_1^2 + z_2^2)/2 is -log of a uniform number.

    Returns the point, the acceptance probability `(n,)` and which chains moved `(n,)`.
    """
    # A density of +inf would never be left again: it is an overflow, not a likely place.
    log_ratio = torch.where(torch.isfinite(log_ratio), log_ratio, -torch.inf)
    moved = -0.5 * noise.square().sum(0) < log_ratio
    chosen = Point(*(torch.where(moved, b, a) for a, b in zip(old, new, strict=True)))
    return chosen, log_ratio.clamp(max=0).exp(), moved
