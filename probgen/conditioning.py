"""What a program may be conditioned on: labels or arrays, either of which may be missing in some rows."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor, nn

from probgen.core import InputError, Probability, Size, check_arguments, check_fields
from probgen.recorded import nameable


class Condition(Protocol):
    """The kind of c that a program takes. Yours is any frozen object with these four methods."""

    def check(self, c: Tensor) -> None:
        """Raise `InputError` unless c, `(rows, ...)`, is of this kind."""

    def missing(self, num_rows: int, like: Tensor) -> Tensor:
        """A c of that many rows, all of them missing, on the device and in the floating point type of `like`."""

    def draw(self, num_rows: int) -> Tensor:
        """Some c of this kind at random, for trying a program out."""

    def embedding(self, width: int) -> nn.Module:
        """A network c -> features `(rows, width)`, those of a missing c learned."""


@nameable
@dataclass(frozen=True)
class Labels:
    """c is a class, int64 `(rows,)` in [0, num_classes); -1 is missing.

    Args:
        num_classes: > 0.

    >>> Labels(3).missing(2, like=torch.zeros(1))
    tensor([-1, -1])
    """

    num_classes: Size

    def __post_init__(self) -> None:
        check_fields(self)

    def check(self, c: Tensor) -> None:
        """See `Condition.check`."""
        expected = (
            f"condition: expected int64 labels `(rows,)` in 0..{self.num_classes - 1}, or -1 for missing"
        )
        if c.dtype != torch.int64 or c.ndim != 1:
            raise InputError(f"{expected}; got {c.dtype} of shape {tuple(c.shape)}.")
        wrong = c[(c < -1) | (c >= self.num_classes)]
        if wrong.numel():
            raise InputError(f"{expected}; got {int(wrong[0])} among {wrong.numel()} wrong ones.")

    def missing(self, num_rows: int, like: Tensor) -> Tensor:
        """See `Condition.missing`."""
        return torch.full((num_rows,), -1, device=like.device)

    def draw(self, num_rows: int) -> Tensor:
        """See `Condition.draw`."""
        return torch.randint(self.num_classes, (num_rows,))

    def embedding(self, width: int) -> nn.Module:
        """See `Condition.embedding`."""
        return _LabelEmbedding(self.num_classes, width)


@nameable
@dataclass(frozen=True)
class Vector:
    """c is an array, float `(rows, *shape)`; a row of NaN is missing.

    Args:
        shape: shape of one c, a number for that of a vector.

    >>> Vector(3).shape, Vector((1, 8, 8)).draw(2).shape
    ((3,), torch.Size([2, 1, 8, 8]))
    """

    shape: Size | Sequence[Size]

    def __post_init__(self) -> None:
        check_fields(self)
        object.__setattr__(self, "shape", (self.shape,) if isinstance(self.shape, int) else tuple(self.shape))

    @property
    def _event(self) -> tuple[int, ...]:
        assert not isinstance(self.shape, int)
        return tuple(self.shape)

    def check(self, c: Tensor) -> None:
        """See `Condition.check`."""
        if not c.is_floating_point() or c.shape[1:] != self._event or c.ndim == 0:
            wanted = ", ".join(("rows", *map(str, self._event)))
            raise InputError(
                f"condition: expected floats `({wanted})`, got {c.dtype} of shape {tuple(c.shape)}."
            )
        bad = (~c.isfinite()).flatten(1)
        partly = (bad.any(1) & ~c.isnan().flatten(1).all(1)).nonzero()
        if partly.numel():
            raise InputError(
                f"condition: {len(partly)} rows hold NaN or Inf beside numbers, the first is row {int(partly[0])}. A "
                "missing condition is NaN throughout."
            )

    def missing(self, num_rows: int, like: Tensor) -> Tensor:
        """See `Condition.missing`."""
        return like.new_full((num_rows, *self._event), math.nan)

    def draw(self, num_rows: int) -> Tensor:
        """See `Condition.draw`."""
        return torch.randn(num_rows, *self._event)

    def embedding(self, width: int) -> nn.Module:
        """See `Condition.embedding`."""
        return _ArrayEmbedding(math.prod(self._event), width)


def drop(condition: Condition, c: Tensor, probability: Probability) -> Tensor:
    """c with each row missing with this probability (Ho & Salimans 2022, arXiv 2207.12598).

    >>> drop(Labels(3), torch.tensor([0, 1, 2]), probability=1.0)
    tensor([-1, -1, -1])
    """
    check_arguments(drop, locals())
    keep = torch.rand(len(c), device=c.device) >= probability
    return torch.where(keep.reshape(-1, *[1] * (c.ndim - 1)), c, condition.missing(len(c), c))


class _LabelEmbedding(nn.Module):
    """A row of a table for each class; the last row, which label -1 picks, is that of a missing label."""

    def __init__(self, num_classes: int, width: int) -> None:
        super().__init__()
        self.table = nn.Parameter(torch.randn(num_classes + 1, width))

    def forward(self, c: Tensor) -> Tensor:
        return self.table[c]


class _ArrayEmbedding(nn.Module):
    """An MLP of the flattened array; rows of NaN have features of their own."""

    def __init__(self, size: int, width: int) -> None:
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(size, width), nn.SiLU(), nn.Linear(width, width))
        self.null = nn.Parameter(torch.zeros(width))

    def forward(self, c: Tensor) -> Tensor:
        flat = c.flatten(1).to(self.null)
        missing = flat.isnan()
        # A NaN inside `where` would reach the gradient of the other branch.
        return torch.where(missing.all(1, keepdim=True), self.null, self.mlp(flat.masked_fill(missing, 0.0)))
