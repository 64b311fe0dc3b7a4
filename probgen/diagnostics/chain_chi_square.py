"""Do Markov chains draw from a density that is known on a mesh? Pearson's test, for correlated draws."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from probgen.core import InputError, Positive, check_arguments, check_finite, check_shape
from probgen.diagnostics.chi_square import CELLS, FEWEST, standardised
from probgen.diagnostics.mesh import Mesh

_FEWEST_CHAINS = 20


class ChainChiSquare(NamedTuple):
    """Pearson's statistic of correlated draws as a standard normal.

    Args:
        z: large where the law is another.
        ess: independent draws that would tell shares of cells as sharply.
        detectable: root mean square of (probability - expected)/expected that is found nine times of ten.
    """

    z: float
    ess: float
    detectable: float


def chain_chi_square(mesh: Mesh, density: Tensor, chains: Tensor, limit: Positive = 4.5) -> ChainChiSquare:
    """sum (share - expected)^2 / expected over cells of a mesh, its null law from how much chains differ.

    Chains are independent of one another, draws inside of one are not. The covariance S of the shares of cells in one
    chain gives the mean and the variance of the statistic, tr A and 2 tr A^2 with A = P^-1/2 S P^-1/2 / chains, and so
    the chi-square law that is closest to it. Chains that never leave a mode make S large, and the test blunt.

    Args:
        mesh: where the density is known.
        density: its values, `(*mesh.shape)`.
        chains: draws `(chain, draw, d)` of at least 20 chains that have forgotten their starts; NaN is outside.
        limit: the z above which an error counts as found, in `detectable`.

    Returns a `ChainChiSquare`. Raises `InputError` for fewer chains, or too few draws.

    Source: Rao & Scott (1981), J. Am. Stat. Assoc. 76, 221, the second-order correction.

    >>> mesh = Mesh((-8.0,), (8.0,), 512)
    >>> p = torch.distributions.Normal(0.0, 1.0).log_prob(mesh.axes[0]).exp()
    >>> x = torch.randn(200, 50, 1, generator=torch.Generator().manual_seed(0)).repeat_interleave(4, dim=1)
    >>> found = chain_chi_square(mesh, p, x)
    >>> abs(found.z) < 4.5, 9_000 < found.ess < 11_000, chain_chi_square(mesh, p, 1.2 * x).z > 20
    (True, True, True)
    """
    check_arguments(chain_chi_square, locals())
    check_shape("density", density, mesh.shape)
    check_finite("density", density)
    axes = len(mesh.low)
    if chains.ndim != 3 or len(chains) < _FEWEST_CHAINS or chains.shape[2] != axes:
        raise InputError(
            f"chains must be draws (chain, draw, {axes}) of at least {_FEWEST_CHAINS} chains, as the mesh has {axes} "
            f"axes; got {tuple(chains.shape)}."
        )
    size = max(1, mesh.num_points // CELLS[len(mesh.low)])
    expected = mesh.cells(density.double(), size).flatten()
    counted = torch.stack([mesh.count(x, size).flatten() for x in chains.detach().cpu()]).double()
    shares = counted / chains.shape[1]
    worth = _worth(expected, shares)
    alone = expected * worth >= FEWEST
    if not bool(alone.any()):
        raise InputError(
            f"{tuple(chains.shape[:2])} draws are too few: by the density no cell expects {FEWEST} of them."
        )
    p, shares = _with_rest(expected[alone]), _with_rest(shares[:, alone])
    return _judged(p.clamp_min(1 / worth), shares, limit)  # nothing is so rare that one draw of it decides


def _worth(expected: Tensor, shares: Tensor) -> float:
    """How many independent draws would have shares that vary as little."""
    some = expected > 0
    variance = shares[:, some].var(0) / len(shares)
    return float((1 - expected[some]).sum() / (variance / expected[some]).sum())


def _judged(p: Tensor, shares: Tensor, limit: float) -> ChainChiSquare:
    num_chains = len(shares)
    statistic = float(((shares.mean(0) - p).square() / p).sum())
    scaled = (shares - shares.mean(0)) / (p * num_chains * (num_chains - 1)).sqrt()
    a = scaled.mT @ scaled
    mean, squares = float(a.trace()), float(a.square().sum())
    # Of tr A^2 an estimate from so many chains has (tr A)^2/(chains - 1) too much.
    squares = max(squares - mean**2 / (num_chains - 1), mean**2 / (len(p) - 1))
    unit, freedom = squares / mean, mean**2 / squares
    z, noncentrality = standardised(statistic / mean, freedom, limit)
    return ChainChiSquare(z, float((1 - p).sum()) / mean, math.sqrt(unit * noncentrality))


def _with_rest(shares: Tensor) -> Tensor:
    rest = (1 - shares.sum(-1, keepdim=True)).clamp_min(0)
    return torch.cat([shares, rest], -1)


def example() -> ChainChiSquare:
    """Chains that are 1.1 times too wide: found."""
    mesh = Mesh((-8.0,), (8.0,), 512)
    density = torch.distributions.Normal(0.0, 1.0).log_prob(mesh.axes[0]).exp()
    return chain_chi_square(
        mesh, density, 1.1 * torch.randn(100, 200, 1, generator=torch.Generator().manual_seed(0))
    )
