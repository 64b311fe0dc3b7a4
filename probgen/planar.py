"""Laws on the plane that chains find hard, with exact densities and draws: what samplers are tried on."""

from __future__ import annotations

import math
from typing import Any

import pyro.distributions as dist
import torch
from torch import Tensor

from probgen.core import Positive, check_arguments

_POINTS_PER_MOON, _POINTS_PER_RADIUS = 24, 40  # Gaussians that stand in a row


def two_moons(scale: Positive = 0.2) -> Any:
    """Two half circles of radius 1 that reach into one another, blurred with N(0, scale^2 I), as a Pyro distribution.

    Each is a row of 24 Gaussians, which are told apart only where scale < 0.06.

    >>> two_moons().sample((5,)).shape
    torch.Size([5, 2])
    """
    check_arguments(two_moons, locals())
    angle = torch.linspace(0, math.pi, _POINTS_PER_MOON)
    upper = torch.stack([angle.cos(), angle.sin()], 1)
    locs = torch.cat([upper, torch.tensor([1.0, 0.5]) - upper]) - torch.tensor([0.5, 0.25])
    return _mixture(locs, scale, torch.zeros(len(locs)))


def rings(radii: tuple[Positive, ...] = (1.0, 2.5), scale: Positive = 0.2) -> Any:
    """Concentric rings, equally likely, each a circle of 40 Gaussians a unit of radius.

    >>> rings().event_shape
    torch.Size([2])
    """
    check_arguments(rings, locals())
    counts = [math.ceil(_POINTS_PER_RADIUS * radius) for radius in radii]
    locs = [radius * _circle(count) for radius, count in zip(radii, counts, strict=True)]
    logits = [torch.full((count,), -math.log(count)) for count in counts]
    return _mixture(torch.cat(locs), scale, torch.cat(logits))


def _circle(count: int) -> Tensor:
    angle = torch.arange(count) * 2 * math.pi / count
    return torch.stack([angle.cos(), angle.sin()], 1)


def _mixture(locs: Tensor, scale: float, logits: Tensor) -> Any:
    components = dist.Normal(locs, torch.full_like(locs, scale)).to_event(1)
    return dist.MixtureSameFamily(dist.Categorical(logits=logits), components)
