"""Distributions that Pyro lacks, or has at a price."""

from __future__ import annotations

import math
from typing import Any

import torch
from pyro.distributions import TorchDistribution, constraints
from torch import Tensor


class DiagonalNormal(TorchDistribution):
    """N(loc, diag scale^2) over the last `event_dim` dimensions, the scale as small as it is given.

    log p(x) = -1/2 sum ((x - loc)/scale)^2 - sum log scale - d/2 log(2 pi). `Normal(loc, scale).to_event(n)` is the
    same law; it first spreads the scale over the data and then evaluates every term at every coordinate, which for
    images costs more than a layer of the network.

    Args:
        loc: `(*batch, *event)`.
        scale: > 0, broadcastable to the event: `()` or of its shape.
        event_dim: number of event dimensions; `to_event` adds to it.
        validate_args: check the arguments; None takes torch's setting.

    >>> law = DiagonalNormal(torch.zeros(2, 3), torch.tensor(0.5)).to_event(1)
    >>> law.log_prob(torch.ones(2, 3)).shape
    torch.Size([2])
    """

    arg_constraints = {"loc": constraints.real, "scale": constraints.positive}  # noqa: RUF012 - as torch declares it
    has_rsample = True

    def __init__(
        self, loc: Tensor, scale: Tensor, event_dim: int = 0, validate_args: bool | None = None
    ) -> None:
        self.loc, self.scale = loc, scale
        split = loc.ndim - event_dim
        super().__init__(loc.shape[:split], loc.shape[split:], validate_args=validate_args)

    @property
    def support(self) -> Any:
        """Real numbers, `event_dim` dimensions of them."""
        return constraints.independent(constraints.real, self.event_dim)

    @property
    def mean(self) -> Tensor:
        """loc."""
        return self.loc

    @property
    def variance(self) -> Tensor:
        """scale^2 at every coordinate."""
        return self.scale.square().expand_as(self.loc)

    def to_event(self, reinterpreted_batch_ndims: int | None = None) -> DiagonalNormal:
        """The same with more (or, if negative, fewer) dimensions in the event; None means all."""
        more = len(self.batch_shape) if reinterpreted_batch_ndims is None else reinterpreted_batch_ndims
        return DiagonalNormal(self.loc, self.scale, self.event_dim + more, validate_args=False)

    def expand(self, batch_shape: Any, _instance: Any = None) -> DiagonalNormal:
        """The same law for a larger batch."""
        loc = self.loc.expand(torch.Size(batch_shape) + self.event_shape)
        return DiagonalNormal(loc, self.scale, self.event_dim, validate_args=False)

    def rsample(self, sample_shape: Any = ()) -> Tensor:
        """loc + scale z, differentiable."""
        shape = self.shape(torch.Size(sample_shape))
        return self.loc + self.scale * torch.randn(shape, dtype=self.loc.dtype, device=self.loc.device)

    def log_prob(self, value: Tensor) -> Tensor:
        """Nats, `(*batch,)`."""
        if self._validate_args:
            self._validate_sample(value)
        dims = tuple(range(-self.event_dim, 0))
        squares = ((value - self.loc) / self.scale).square()
        size = math.prod(self.event_shape)
        log_scale = self.scale.log()
        constant = log_scale.sum() * (size / log_scale.numel()) if self.event_dim else log_scale
        squares = squares.sum(dims) if dims else squares
        return -0.5 * (squares + size * math.log(2 * math.pi)) - constant
