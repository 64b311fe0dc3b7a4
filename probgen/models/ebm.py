"""An energy-based model: a network that gives each x its energy, fitted without its normaliser."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Annotated, ClassVar

import pyro
import torch
from torch import Tensor, nn

from probgen.conditioning import Condition, drop
from probgen.core import Batch, InputError, Size, Within, describe, shown
from probgen.models.energy import Energy, Undrawable
from probgen.nets import MLP
from probgen.recorded import Recorded

BaseScale = Annotated[float, Within(1e-6, 1e6)]


class EBM(Recorded):
    """p(x | c) = exp(-E(x, c)) / Z(c) with E(x, c) = network(x, c) + |x|^2 / (2 base_scale^2). Site "x".

    The second term keeps E from falling for ever far from the data, where no objective has looked: a network with
    outputs that grow more slowly leaves Z finite.

    Args:
        network: x, or x and c, `(batch, *event)` -> `(batch,)` or `(batch, 1)`, in nats.
        event_shape: shape of one x.
        base_scale: in [1e-6, 1e6], in units of x; None leaves the network alone.
        condition: what the network takes beside x: `Labels(num_classes)` or `Vector(shape)`; None is nothing.
        condition_dropout: how often c is missing while fitting, in [0, 1).

    Raises:
        InputError: an output of another shape, a scale or a probability out of its range.

    Source: LeCun et al. (2006), A tutorial on energy-based learning; Du & Mordatch (2019), arXiv 1903.08689.

    >>> ebm = EBM.mlp((2,), widths=(16,))
    >>> ebm.energy(torch.zeros(3, 2)).shape
    torch.Size([3])
    """

    paper: ClassVar[str] = "Du & Mordatch 2019, arXiv 1903.08689"
    offers: ClassVar[str] = (
        "any network as a log density up to Z, conditional too; sums of them are energies again"
    )
    gives_up: ClassVar[str] = "Z; draws, and most fits, need Markov chains"

    def __init__(
        self,
        network: Callable[..., Tensor],
        event_shape: Sequence[Size],
        base_scale: BaseScale | None = None,
        *,
        condition: Condition | None = None,
        condition_dropout: Annotated[float, Within(0, 1, "[)")] = 0.1,
    ) -> None:
        super().__init__()
        self.network, self.event_shape, self.base_scale = network, tuple(event_shape), base_scale
        self.condition, self.condition_dropout = condition, condition_dropout

    @classmethod
    def mlp(
        cls,
        event_shape: Sequence[Size],
        widths: Sequence[Size] = (128, 128),
        base_scale: BaseScale | None = 2.0,
        condition: Condition | None = None,
    ) -> EBM:
        """Fully connected layers on the flat x, and features of c; smooth, so that chains can follow their gradient."""
        if condition is None:
            return cls(MLP(event_shape, (), widths), event_shape, base_scale)
        return cls(_Joined(event_shape, widths, condition), event_shape, base_scale, condition=condition)

    def energy(self, x: Tensor) -> Tensor:
        """E(x) in nats, c missing: x `(batch, *event)` -> `(batch,)`."""
        return self._energy(x, None)

    def given(self, condition: Tensor | None) -> Energy | EBM:
        """The energies at a condition, one row for each row of x."""
        if self.condition is None:
            if condition is None:
                return self
            raise InputError(f"{describe(self)} takes no condition; make it EBM(..., condition=Labels(n)).")
        c = condition
        if c is not None:
            self.condition.check(c)
            c = drop(self.condition, c, self.condition_dropout) if self.training else c
        return Energy(_At(self, c), self.event_shape)

    def model(self, batch: Batch) -> Tensor:
        """x flat, with a factor exp(-E(x, c)) a row."""
        with batch.plate():
            x = pyro.sample("x", Undrawable(self.event_shape))
            pyro.factor("-energy", -self._energy(x, batch.condition))
        return x

    def _energy(self, x: Tensor, c: Tensor | None) -> Tensor:
        flat = x.reshape(-1, *self.event_shape)
        value = self.network(flat) if self.condition is None else self.network(flat, self._condition(c, flat))
        if not isinstance(value, Tensor) or value.shape not in ((len(flat),), (len(flat), 1)):
            raise InputError(
                f"EBM: the network's output for x of shape {tuple(flat.shape)} must hold one number a row, got "
                f"{shown(value)}."
            )
        value = value.reshape(x.shape[: x.ndim - len(self.event_shape)])
        if self.base_scale is None:
            return value
        return value + x.reshape(*value.shape, -1).square().sum(-1) / (2 * self.base_scale**2)

    def _condition(self, c: Tensor | None, x: Tensor) -> Tensor:
        assert self.condition is not None
        return self.condition.missing(len(x), x) if c is None else c


class _Joined(Recorded):
    """Fully connected layers on the flat x beside features of c, as many as the first layer is wide."""

    def __init__(self, event_shape: Sequence[Size], widths: Sequence[Size], condition: Condition) -> None:
        super().__init__()
        width = widths[0] if widths else 1
        self.embed = condition.embedding(width)
        self.layers = MLP((math.prod(event_shape) + width,), (), widths)

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        return self.layers(torch.cat([x.flatten(1), self.embed(c)], dim=1))


class _At(nn.Module):
    """The energy at a condition."""

    def __init__(self, ebm: EBM, c: Tensor | None) -> None:
        super().__init__()
        self.ebm, self.c = ebm, c

    def forward(self, x: Tensor) -> Tensor:
        return self.ebm._energy(x, self.c)


def example() -> EBM:
    """A small one on the plane."""
    return EBM.mlp((2,), widths=(16,))
