"""Maps from unconstrained space onto the support of a law.

PyTorch's own `biject_to` serves declared supports. It has no map for triangular and positive definite matrices, a steep
one for positive increasing vectors, and takes the word of transformed laws, which declare where their last transform
ends and not where their values lie: of 5 * sigmoid(z) the whole line.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
from pyro.distributions import constraints
from pyro.distributions.torch_distribution import ExpandedDistribution, MaskedDistribution
from pyro.distributions.transforms import CholeskyTransform
from torch import Tensor
from torch.distributions import Independent, TransformedDistribution, biject_to
from torch.distributions.transforms import ComposeTransform, IndependentTransform, Transform


def bijection(law: Any) -> Transform:
    """The map from unconstrained space onto the values of a law, parameters included.

    Transformed laws are entered where they begin: unconstrained space -> support of the base law -> their values.

    Args:
        law: a distribution; its batch dimensions are those of the map.

    Raises `NotImplementedError` where there is none: discrete laws, spheres.

    >>> import pyro.distributions as dist
    >>> law = dist.TransformedDistribution(dist.Normal(0.0, 1.0), [dist.transforms.SigmoidTransform(),
    ...                                                            dist.transforms.AffineTransform(0.0, 5.0)])
    >>> float(bijection(law)(torch.tensor(0.0)))
    2.5
    """
    if isinstance(law, (ExpandedDistribution, MaskedDistribution)):
        return bijection(law.base_dist)
    if isinstance(law, Independent):
        return IndependentTransform(bijection(law.base_dist), law.reinterpreted_batch_ndims)
    if _declares_nothing(law):
        return ComposeTransform([bijection(law.base_dist), *law.transforms])
    return _onto(law.support)


def _declares_nothing(law: Any) -> bool:
    """A transformed law that leaves its support to its last transform."""
    return (
        isinstance(law, TransformedDistribution)
        and type(law).support is TransformedDistribution.support
        and all(transform.bijective for transform in law.transforms)
    )


def _onto(support: Any) -> Transform:
    if isinstance(support, type(constraints.lower_triangular)):
        return Triangular("free")
    if isinstance(support, type(constraints.unit_lower_cholesky)):
        return Triangular("one")
    if isinstance(support, (type(constraints.lower_cholesky), type(constraints.softplus_lower_cholesky))):
        return Triangular("positive")
    if isinstance(support, (type(constraints.positive_definite), type(constraints.positive_semidefinite))):
        return ComposeTransform([Triangular("positive"), CholeskyTransform().inv])
    if isinstance(support, type(constraints.positive_ordered_vector)):
        return PositiveOrdered()
    return biject_to(getattr(support, "base_constraint", support) if _is_mixture(support) else support)


def _is_mixture(support: Any) -> bool:
    """The components of a mixture share a support, which the mixture has too."""
    return type(support).__name__ == "MixtureSameFamilyConstraint"


class Triangular(Transform):
    """Vectors `(..., m)` to lower triangular matrices `(..., n, n)`, row by row.

    Args:
        diagonal: "free", "positive" (its logarithm is taken from the vector), or "one" (not in the vector at all).

    The Jacobian is that of the entries in the triangle.

    >>> Triangular("positive")(torch.tensor([0.0, 3.0, 0.0]))
    tensor([[1., 0.],
            [3., 1.]])
    """

    domain = constraints.real_vector
    codomain = constraints.independent(constraints.real, 2)
    bijective = True

    def __init__(self, diagonal: Literal["free", "positive", "one"]) -> None:
        super().__init__()
        self.diagonal = diagonal
        self._beyond = int(diagonal != "one")  # entries of a row from the left: its index, and the diagonal

    def _call(self, x: Tensor) -> Tensor:
        n = self._order(x.shape[-1])
        row, column = torch.arange(n, device=x.device)[:, None], torch.arange(n, device=x.device)
        width = row + self._beyond
        place = torch.where(column < width, row * (row - 1 + 2 * self._beyond) // 2 + column, x.shape[-1])
        matrix = torch.nn.functional.pad(x, (0, 1))[..., place]
        if self.diagonal == "one":
            return matrix + torch.eye(n, dtype=x.dtype, device=x.device)
        if self.diagonal == "positive":
            return matrix.tril(-1) + matrix.diagonal(dim1=-2, dim2=-1).exp().diag_embed()
        return matrix

    def _inverse(self, y: Tensor) -> Tensor:
        if self.diagonal == "positive":
            y = y.tril(-1) + y.diagonal(dim1=-2, dim2=-1).log().diag_embed()
        rows, columns = torch.tril_indices(y.shape[-1], y.shape[-1], self._beyond - 1, device=y.device)
        return y[..., rows, columns]

    def log_abs_det_jacobian(self, x: Tensor, y: Tensor) -> Tensor:
        """The sum of the logarithms on the diagonal where these are what the vector holds, else 0; `(...)`."""
        if self.diagonal == "positive":
            row = torch.arange(y.shape[-1], device=y.device)
            return x[..., row * (row + 3) // 2].sum(-1)
        return torch.zeros_like(x[..., 0])

    def forward_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """`(..., m)` -> `(..., n, n)`."""
        return (*shape[:-1], *[self._order(shape[-1])] * 2)

    def inverse_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """`(..., n, n)` -> `(..., m)`."""
        n = shape[-1]
        return (*shape[:-2], n * (n - 1 + 2 * self._beyond) // 2)

    def _order(self, m: int) -> int:
        """n from m = n (n + 1) / 2, or n (n - 1) / 2."""
        return round((((8 * m + 1) ** 0.5) - 1) / 2) + 1 - self._beyond


class PositiveOrdered(Transform):
    """Vectors x `(..., n)` to positive increasing ones: y_i = exp(x_1) + ... + exp(x_i).

    Pyro's map is exp of an increasing vector. There y_2 = y_1 exp(exp(x_2)) is known from data only where x_2 follows
    log y_1 along a bend, and chains diverge as y_1 nears 0; here y_2 forgets y_1 on the way.

    Source: Stan reference manual, "Positive ordered vector".

    >>> PositiveOrdered()(torch.tensor([0.0, 0.0, 0.0]))
    tensor([1., 2., 3.])
    """

    domain = constraints.real_vector
    codomain = constraints.positive_ordered_vector
    bijective = True

    def _call(self, x: Tensor) -> Tensor:
        return x.exp().cumsum(-1)

    def _inverse(self, y: Tensor) -> Tensor:
        return y.diff(dim=-1, prepend=torch.zeros_like(y[..., :1])).log()

    def log_abs_det_jacobian(self, x: Tensor, y: Tensor) -> Tensor:
        """The sum of x, `(...)`."""
        return x.sum(-1)
