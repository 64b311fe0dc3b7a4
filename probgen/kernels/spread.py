"""Means and variances of draws that arrive a few at a time."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Spread(NamedTuple):
    """Number, mean and scatter of draws; those of parts add up to those of the whole (Chan, Golub & LeVeque 1983).

    Args:
        number: of draws, in a shape that broadcasts with that of the mean.
        mean: of any shape; of vectors `(..., dim)`.
        scatter: sum of squared distances from the mean, in its shape, or of all their products, `(..., dim, dim)`.

    >>> both = Spread.of(torch.tensor([1.0, 2.0])).and_(Spread.of(torch.tensor([6.0])))
    >>> both.mean, both.variance
    (tensor(3.), tensor(7.0000))
    """

    number: Tensor
    mean: Tensor
    scatter: Tensor

    @staticmethod
    def none() -> Spread:
        """Of no draws, whatever their shape."""
        return Spread(torch.zeros(()), torch.zeros(()), torch.zeros(()))

    @staticmethod
    def of(draws: Tensor, known: Tensor | None = None, dense: bool = False) -> Spread:
        """Of draws along the first dimension.

        Args:
            draws: `(draw, ...)`, of vectors `(draw, ..., dim)`.
            known: which draws count, of the same number of dimensions; None for all.
            dense: all products of distances, and not their squares alone.
        """
        if known is None:
            known = draws.new_ones(len(draws), *[1] * (draws.ndim - 1), dtype=torch.bool)
        number = known.sum(0).to(draws)
        mean = torch.where(known, draws, 0.0).sum(0) / number.clamp(min=1)
        return Spread(number, mean, _scatter(torch.where(known, draws - mean, 0.0), dense))

    def and_(self, other: Spread) -> Spread:
        """Of both together."""
        number = self.number + other.number
        share, gap = other.number / number.clamp(min=1), other.mean - self.mean
        between = _scatter((gap * (self.number * share).sqrt())[None], other.is_dense)
        return Spread(number, self.mean + gap * share, self.scatter + other.scatter + between)

    @property
    def is_dense(self) -> bool:
        """Whether the scatter holds all products."""
        return self.scatter.ndim > self.mean.ndim

    @property
    def covariance(self) -> Tensor:
        """Unbiased, `(..., dim, dim)`; where that was not kept, its diagonal."""
        degrees = (self.number - 1).clamp(min=1)
        return self.scatter / (degrees[..., None] if self.is_dense else degrees)

    @property
    def variance(self) -> Tensor:
        """Unbiased, in the shape of the mean."""
        return self.covariance.diagonal(dim1=-2, dim2=-1) if self.is_dense else self.covariance


def _scatter(apart: Tensor, dense: bool) -> Tensor:
    """Of distances `(draw, ...)` from the mean."""
    if not dense:
        return apart.square().sum(0)
    columns = apart.movedim(0, -1)
    return columns @ columns.mT
