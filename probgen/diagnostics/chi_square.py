"""Do particles come from a density that is known on a mesh? Pearson's test, and the error that it would find."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from probgen.core import InputError, Positive, check_arguments, check_finite, check_shape, shown
from probgen.diagnostics.mesh import Mesh

_CELLS = {1: 64, 2: 16}  # cells a mesh is cut into along each axis
_FEWEST = 10  # draws expected in a cell that is looked at on its own
_NINE_OF_TEN = 1.2816  # the standard normal's quantile


class ChiSquare(NamedTuple):
    """Pearson's statistic as a standard normal, and the relative error of a cell that is found 9 times of 10."""

    z: float
    detectable: float


def chi_square(mesh: Mesh, density: Tensor, x: Tensor, limit: Positive = 4.5) -> ChiSquare:
    """sum (counted - expected)^2 / expected over cells of a mesh, for draws x and a density.

    Cells where fewer than ten draws are expected, and all that lies outside of the mesh, are one cell. The statistic is
    made normal by its cube root (Wilson & Hilferty 1931, doi 10.1073/pnas.17.12.684).

    Args:
        mesh: where the density is known.
        density: its values, `(*mesh.shape)`.
        x: independent draws, `(n, d)`; NaN lies outside of the mesh.
        limit: the z above which an error counts as found, in `detectable`: the root mean square of (probability -
            expected)/expected over the law.

    Returns a `ChiSquare`. Raises `InputError` where the draws are too few, and for other shapes.

    >>> mesh = Mesh((-8.0,), (8.0,), 512)
    >>> normal = torch.distributions.Normal(0.0, 1.0)
    >>> p = normal.log_prob(mesh.axes[0]).exp()
    >>> chi_square(mesh, p, normal.sample((5000, 1))).z < 4.5, chi_square(mesh, p, torch.rand(5000, 1)).z > 20
    (True, True)
    """
    check_arguments(chi_square, locals())
    check_shape("chi_square: density", density, mesh.shape)
    check_finite("chi_square: density", density)
    if x.ndim != 2 or x.shape[1] != len(mesh.low):
        raise InputError(f"chi_square: draws x must be (n, {len(mesh.low)}), as the mesh is, got {shown(x)}.")
    size = max(1, mesh.num_points // _CELLS[len(mesh.low)])
    expected = len(x) * mesh.cells(density.double(), size).flatten()
    counted = mesh.count(x.detach().cpu(), size).flatten().double()
    alone = expected >= _FEWEST
    freedom = int(alone.sum())
    if not freedom:
        raise InputError(
            f"chi_square: {len(x)} draws x are too few: by the density no cell of the mesh expects {_FEWEST} of them."
        )
    counted, expected = (_with_rest(value[alone], len(x)) for value in (counted, expected))
    statistic = ((counted - expected).square() / expected.clamp_min(1)).sum().item()
    spread = 2 / (9 * freedom)
    z = ((statistic / freedom) ** (1 / 3) - 1 + spread) / math.sqrt(spread)
    critical = freedom * (1 - spread + limit * math.sqrt(spread)) ** 3
    return ChiSquare(z, math.sqrt(_noncentrality(critical, freedom) / len(x)))


def _with_rest(values: Tensor, total: int) -> Tensor:
    return torch.cat([values, (total - values.sum())[None]])


def _noncentrality(critical: float, freedom: int) -> float:
    """The l whose chi-square, of mean K + l and variance 2 (K + 2 l), is above `critical` 9 times of 10."""
    # K + l - c sd = critical with sd^2 = 2 K + 4 l is a quadratic equation for sd.
    c = _NINE_OF_TEN
    sd = 2 * c + math.sqrt(4 * c**2 + 2 * freedom + 4 * (critical - freedom))
    return (sd**2 - 2 * freedom) / 4


def example() -> ChiSquare:
    """Normal draws that are 1.1 times too wide: found."""
    mesh = Mesh((-8.0,), (8.0,), 512)
    density = torch.distributions.Normal(0.0, 1.0).log_prob(mesh.axes[0]).exp()
    return chi_square(mesh, density, 1.1 * torch.randn(20_000, 1, generator=torch.Generator().manual_seed(0)))
