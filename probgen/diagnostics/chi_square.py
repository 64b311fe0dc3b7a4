"""Do particles come from a density that is known on a mesh? Pearson's test, and the error that it would find."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from probgen.core import InputError, Positive, check_arguments, check_finite, check_shape, shown
from probgen.diagnostics.mesh import Mesh

CELLS = {1: 64, 2: 16}  # cells a mesh is cut into along each axis
FEWEST = 10  # draws expected in a cell that is looked at on its own
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
    size = max(1, mesh.num_points // CELLS[len(mesh.low)])
    expected = len(x) * mesh.cells(density.double(), size).flatten()
    counted = mesh.count(x.detach().cpu(), size).flatten().double()
    alone = expected >= FEWEST
    freedom = int(alone.sum())
    if not freedom:
        raise InputError(
            f"chi_square: {len(x)} draws x are too few: by the density no cell of the mesh expects {FEWEST} of them."
        )
    counted, expected = (_with_rest(value[alone], len(x)) for value in (counted, expected))
    statistic = ((counted - expected).square() / expected.clamp_min(1)).sum().item()
    z, noncentrality = standardised(statistic / freedom, freedom, limit)
    return ChiSquare(z, math.sqrt(noncentrality / len(x)))


def standardised(ratio: float, freedom: float, limit: float) -> tuple[float, float]:
    """A chi-square over its mean as a standard normal, and the noncentrality that is found 9 times of 10.

    Source: Wilson & Hilferty (1931), PNAS 17, 684: the cube root is normal.

    Args:
        ratio: the statistic over its mean K.
        freedom: K, degrees of freedom.
        limit: the z above which an error counts as found.
    """
    spread = 2 / (9 * freedom)
    z = (ratio ** (1 / 3) - 1 + spread) / math.sqrt(spread)
    critical = freedom * (1 - spread + limit * math.sqrt(spread)) ** 3
    # A chi-square of mean K + l and variance 2 (K + 2 l): K + l - c sd = critical is a quadratic equation for sd.
    c = _NINE_OF_TEN
    sd = 2 * c + math.sqrt(4 * c**2 + 2 * freedom + 4 * (critical - freedom))
    return z, (sd**2 - 2 * freedom) / 4


def _with_rest(values: Tensor, total: int) -> Tensor:
    return torch.cat([values, (total - values.sum())[None]])


def example() -> ChiSquare:
    """Normal draws that are 1.1 times too wide: found."""
    mesh = Mesh((-8.0,), (8.0,), 512)
    density = torch.distributions.Normal(0.0, 1.0).log_prob(mesh.axes[0]).exp()
    return chi_square(mesh, density, 1.1 * torch.randn(20_000, 1, generator=torch.Generator().manual_seed(0)))
