"""Coordinates in which a posterior has about unit scale: u = S x, S diagonal or triangular.

A kernel with unit metric in x is the same kernel with mass matrix (S S')^-1, or preconditioner S S', in u.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor


class Coordinates(NamedTuple):
    """u = S x for chains in columns.

    Args:
        scale: S: `(dim, 1)` diagonal, `(dim, num_sets)` diagonal for each data set, `(num_sets, dim, dim)` lower
            triangular for each data set; chain i belongs to data set i mod num_sets.

    >>> coordinates = Coordinates(torch.tensor([[2.0], [0.5]]))
    >>> coordinates.to_u(torch.ones(2, 3))[:, 0]
    tensor([2.0000, 0.5000])
    """

    scale: Tensor

    @staticmethod
    def identity(dim: int, like: Tensor) -> Coordinates:
        """u = x."""
        return Coordinates(torch.ones(dim, 1, dtype=like.dtype, device=like.device))

    @property
    def is_dense(self) -> bool:
        """Whether S is a matrix for each data set."""
        return self.scale.ndim == 3

    def to_u(self, x: Tensor) -> Tensor:
        """S x, `(dim, n)`."""
        return self._map(x, lambda s, columns: s @ columns, lambda s, columns: s * columns)

    def to_x(self, u: Tensor) -> Tensor:
        """S^-1 u, `(dim, n)`."""
        return self._map(
            u,
            lambda s, columns: torch.linalg.solve_triangular(s, columns, upper=False),
            lambda s, columns: columns / s,
        )

    def pull(self, grad: Tensor) -> Tensor:
        """S' g: the gradient with respect to x of what has the gradient g with respect to u."""
        return self._map(grad, lambda s, columns: s.mT @ columns, lambda s, columns: s * columns)

    def push(self, grad: Tensor) -> Tensor:
        """S'^-1 g, the inverse of `pull`."""
        return self._map(
            grad,
            lambda s, columns: torch.linalg.solve_triangular(s.mT, columns, upper=True),
            lambda s, columns: columns / s,
        )

    def _map(
        self,
        columns: Tensor,
        dense: Callable[[Tensor, Tensor], Tensor],
        diagonal: Callable[[Tensor, Tensor], Tensor],
    ) -> Tensor:
        s = self.scale
        num_sets = len(s) if self.is_dense else s.shape[1]
        if num_sets == 1:
            return dense(s[0], columns) if self.is_dense else diagonal(s, columns)
        split = columns.unflatten(1, (-1, num_sets))
        if self.is_dense:
            return dense(s, split.permute(2, 0, 1)).permute(1, 2, 0).flatten(1)
        return diagonal(s[:, None], split).flatten(1)


class InCoordinates(NamedTuple):
    """A density of u as a function of x: x -> log p(S x) and its gradient with respect to x, log |S| left out.

    Args:
        coordinates: u = S x.
        function: u -> log p `(n,)` and its gradient `(dim, n)`.
    """

    coordinates: Coordinates
    function: Callable[[Tensor], tuple[Tensor, Tensor]]

    def __call__(self, x: Tensor) -> tuple[Tensor, Tensor]:
        log_prob, grad = self.function(self.coordinates.to_u(x))
        return log_prob, self.coordinates.pull(grad)
