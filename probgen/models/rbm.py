"""The restricted Boltzmann machine: two layers, no couplings inside of them, binary or Gaussian data."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Annotated, ClassVar

import pyro
import torch
from pyro.distributions import ImproperUniform
from torch import Tensor, nn

from probgen.core import Batch, EstimateKind, Positive, Size, Within
from probgen.couplings import Couplings
from probgen.models.boltzmann_machine import FIRST_WEIGHTS, Units, log_odds, seen
from probgen.models.energy import Undrawable
from probgen.recorded import Recorded

Copies = Annotated[int, Within(1, 100)]


class RBM(Recorded):
    """p(x, h) = exp(-E(x, h) / T) / Z with E = -x'W h - b'x - c'h, x and h binary.

    Summed over h: p(x) = exp(-F(x)) / Z with F(x) = -b'x / T - sum_j softplus((c_j + x'W_j) / T). Sites "x" and "h".

    Args:
        event_shape: shape of one x.
        num_hidden: hidden units, >= 1.
        temperature: T > 0.

    Raises:
        InputError: a number of units below 1, a temperature that is not > 0.

    Source: Smolensky (1986), Harmony theory; Hinton (2002), Neural Computation 14.

    >>> from probgen import infer
    >>> from probgen.inference.gibbs import Gibbs
    >>> infer(RBM((4,), num_hidden=3), Gibbs(num_warmup=5), num_draws=3, num_chains=2)["h"].shape
    torch.Size([2, 3, 3])
    """

    paper: ClassVar[str] = "Hinton 2002, Neural Computation 14"
    offers: ClassVar[str] = "features h that are independent given x, and exact p(x) up to Z"
    gives_up: ClassVar[str] = "Z beyond 25 units in the smaller layer; draws need Gibbs moves"
    weight_kind: ClassVar[EstimateKind] = "unbiased"

    def __init__(
        self, event_shape: Sequence[Size], num_hidden: Size = 128, temperature: Positive = 1.0
    ) -> None:
        super().__init__()
        self.event_shape, self.num_hidden = tuple(event_shape), num_hidden
        self.temperature = temperature
        size = math.prod(self.event_shape)
        self.weight = nn.Parameter(FIRST_WEIGHTS * torch.randn(size, num_hidden))
        self.visible_bias = nn.Parameter(torch.zeros(size))
        self.hidden_bias = nn.Parameter(torch.zeros(num_hidden))

    def couplings(self) -> Couplings:
        """Its energy over T."""
        values = self.weight, self.visible_bias, self.hidden_bias
        weight, bias, hidden = values if self.temperature == 1 else (v / self.temperature for v in values)
        return Couplings({("x", "h"): weight}, {"x": bias, "h": hidden})

    def free_energy(self, x: Tensor) -> Tensor:
        """F(x) in nats: x `(batch, *event)` -> `(batch,)`."""
        return self.couplings().free_energy({"x": x.flatten(1)})

    def log_weight(self, x: Tensor) -> Tensor:
        """log p(x) + log Z in nats, exact: x `(batch, *event)` -> `(batch,)`."""
        return -self.free_energy(x)

    def set_rates(self, x: Tensor) -> None:
        """Set the visible biases so that with zero weights each unit is on as often as in data x `(n, *event)`."""
        with torch.no_grad():
            self.visible_bias.copy_(self.temperature * log_odds(x))

    def ascend(self, x: Tensor) -> Tensor:
        """A draw of h given x `(batch, *event)`: `(batch, num_hidden)`."""
        return self.couplings().draw("h", {"x": x.flatten(1)})

    def model(self, batch: Batch) -> Tensor:
        """x with a factor exp(-F), then h | x Bernoulli: their joint law up to Z."""
        couplings = self.couplings()
        with batch.plate():
            x = pyro.sample("x", self._flat())
            state = {"x": seen(x, self).to(couplings.biases["x"].dtype)}
            pyro.factor("-free_energy", -couplings.free_energy(state))
            pyro.sample("h", couplings.law("h", state))
        return x

    def _flat(self) -> ImproperUniform:
        return Units(self.event_shape)


class GaussianRBM(RBM):
    """p(x, h) = exp(-E(x, h)) / Z with E = sum_i (x_i - b_i)^2 / (2 s_i^2) - sum_ij x_i W_ij h_j / s_i - c'h, x real.

    x given h is Gaussian around b + s W h: p(x) is a mixture of 2^num_hidden of them, up to Z an energy like any other.

    Args:
        event_shape: shape of one x.
        num_hidden: hidden units, >= 1.
        scale: s > 0, of every coordinate; not learned.

    Raises:
        InputError: a number of units below 1, a scale that is not > 0.

    Source: Hinton & Salakhutdinov (2006), Science 313; Cho, Ilin & Raiko (2011), ICANN.

    >>> GaussianRBM((2,), num_hidden=3).energy(torch.zeros(5, 2)).shape
    torch.Size([5])
    """

    paper: ClassVar[str] = "Hinton & Salakhutdinov 2006, Science 313"
    offers: ClassVar[str] = "features of real data; exact p(x) up to Z, and its gradient"
    gives_up: ClassVar[str] = "Z beyond 25 hidden units; one scale a coordinate, whatever the features"

    def __init__(self, event_shape: Sequence[Size], num_hidden: Size = 128, scale: Positive = 1.0) -> None:
        super().__init__(event_shape, num_hidden)
        self.register_buffer("scale", torch.tensor(float(scale)))
        self.scale: Tensor

    def couplings(self) -> Couplings:
        """Its energy, the layer "x" Gaussian."""
        biases = {"x": self.visible_bias, "h": self.hidden_bias}
        return Couplings({("x", "h"): self.weight}, biases, {"x": self.scale})

    def energy(self, x: Tensor) -> Tensor:
        """F(x) in nats: x `(batch, *event)` -> `(batch,)`."""
        return self.free_energy(x)

    def set_rates(self, x: Tensor) -> None:
        """Set the visible biases to the means of data x `(n, *event)`."""
        with torch.no_grad():
            self.visible_bias.copy_(x.flatten(1).mean(0))

    def _flat(self) -> ImproperUniform:
        return Undrawable(self.event_shape)


class TwinRBM(RBM):
    """An RBM with copies of x, or of h, that share weights: E = -sum_ab x_a'W h_b - sum_a b'x_a - sum_b c'h_b.

    With two copies of x all that h feels from below is doubled, as if as much again came from above: so the lowest and
    the highest layers of a deep Boltzmann machine are pretrained.

    Args:
        event_shape: shape of one copy of x; data are `(batch, visible_copies, *event_shape)`.
        num_hidden: hidden units of one copy, >= 1.
        visible_copies, hidden_copies: in 1..100.

    Raises:
        InputError: a number below 1.

    Source: Salakhutdinov & Hinton (2009), AISTATS, section 3.1.

    >>> TwinRBM((4,), num_hidden=3, visible_copies=2).event_shape
    (2, 4)
    """

    offers: ClassVar[str] = "the halves of a deep Boltzmann machine, one by one"

    def __init__(
        self,
        event_shape: Sequence[Size],
        num_hidden: Size,
        visible_copies: Copies = 1,
        hidden_copies: Copies = 1,
    ) -> None:
        super().__init__(event_shape, num_hidden)
        self.visible_copies, self.hidden_copies = visible_copies, hidden_copies
        self.event_shape = (visible_copies, *self.event_shape)

    def couplings(self) -> Couplings:
        """Its energy, copies side by side in a layer."""
        below, above = self.visible_copies, self.hidden_copies
        biases = {"x": self.visible_bias.repeat(below), "h": self.hidden_bias.repeat(above)}
        return Couplings({("x", "h"): self.weight.repeat(below, above)}, biases)

    def set_rates(self, x: Tensor) -> None:
        """As for an RBM of one copy: x `(n, visible_copies, *event)`."""
        super().set_rates(x[:, 0])


def example() -> RBM:
    """Six units, four seen, that pull one another up and down."""
    rbm = RBM((4,), num_hidden=2)
    with torch.no_grad():
        rbm.weight.copy_(torch.linspace(-2.0, 1.5, 8).reshape(4, 2))
        rbm.visible_bias.copy_(torch.linspace(-0.5, 0.7, 4))
        rbm.hidden_bias.copy_(torch.tensor([0.3, -0.4]))
    return rbm
