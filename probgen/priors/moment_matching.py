"""Moment matching: the covariance of x_0 given x_t as the denoiser itself knows it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from probgen.core import Count
from probgen.priors.conditioned import Conditioned, Covariance
from probgen.priors.guidance import Denoised, Guidance


@dataclass(frozen=True)
class MomentMatching(Guidance):
    """C = Cov[x_0 | x_t] = (sigma^2/alpha) d x_0hat/d x_t, by Tweedie's formula: exact where x_0 given x_t is Gaussian.

    Each step calls the network once and goes back through it once for each of m observations, and once more for the
    gradient. A network's derivative is neither quite symmetric nor quite positive: J C J' is made so.

    Args:
        max_rows: where more is observed, J C J' is replaced by the diagonal matrix of its row sums, which needs one way
            back: exact where C is a multiple of the identity and J keeps coordinates.

    Source: Tweedie's formula: Efron (2011), doi 10.1198/jasa.2011.tm11181; as guidance Rozet et al. (2024), arXiv
    2405.13712; row sums: Boys et al. (2023), arXiv 2310.06721.

    >>> MomentMatching().max_rows
    64
    """

    max_rows: Count = 64
    paper: ClassVar[str] = "Rozet et al. 2024, arXiv 2405.13712; Boys et al. 2023, arXiv 2310.06721"
    offers: ClassVar[str] = "the spread and the correlations of x_0 given x_t, for any prior"
    gives_up: ClassVar[str] = "time: as many ways back through the network as numbers were observed"

    def covariance(self, conditioned: Conditioned, look: Denoised) -> Covariance:
        """See `Guidance.covariance`."""
        return Tweedie(look, self.max_rows)


@dataclass(frozen=True)
class Tweedie:
    """C = (sigma^2/alpha) d x_0hat/d x_t, of which only products with C are worked out: a `Covariance`."""

    look: Denoised
    max_rows: Count

    def between(self, jacobian: Tensor) -> Tensor:
        """J C J', symmetric and positive, or its row sums on the diagonal; see `Covariance.between`."""
        rows = jacobian.expand(len(self.look.x_t), *jacobian.shape[-2:])
        if rows.shape[1] > self.max_rows:
            sums = (rows @ self.times(rows.sum(1))[..., None])[..., 0]
            return torch.diag_embed(sums.clamp_min(0))
        products = [self.times(rows[:, i]) for i in range(rows.shape[1])]
        return positive(rows @ torch.stack(products, -1) if products else rows @ rows.mT)

    def times(self, v: Tensor) -> Tensor:
        """C v for v `(n, size)`: one way back through the network."""
        look = self.look
        pulled = look.pullback(v.reshape(look.x_0.shape).to(look.x_0))
        return (look.sigma**2 / look.alpha) * pulled.reshape(v.shape).to(v)


def positive(matrix: Tensor) -> Tensor:
    """The symmetric part of each matrix `(n, m, m)`, its negative eigenvalues set to zero.

    >>> positive(torch.tensor([[[1.0, 0.0], [0.0, -1.0]]]))
    tensor([[[1., 0.],
             [0., 0.]]])
    """
    matrix = 0.5 * (matrix + matrix.mT)
    _, failed = torch.linalg.cholesky_ex(matrix)  # far cheaper than eigenvalues, and most pass
    bad = (failed != 0) & torch.isfinite(matrix).flatten(1).all(1)
    if bool(bad.any()):
        values, vectors = torch.linalg.eigh(matrix[bad])
        matrix[bad] = (vectors * values.clamp_min(0)[:, None]) @ vectors.mT
    return matrix
