"""The deep belief net: directed layers of binary units below a restricted Boltzmann machine."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import pairwise
from typing import ClassVar, cast

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor, nn

from probgen.core import Batch, Count, EstimateKind, InputError, Size
from probgen.couplings import Couplings
from probgen.models.boltzmann_machine import Units
from probgen.models.rbm import RBM
from probgen.recorded import Recorded


class DeepBeliefNet(Recorded):
    """p(x, h_1, .., h_L) = p(x | h_1) .. p(h_{L-2} | h_{L-1}) p(h_{L-1}, h_L), the last an RBM, all units binary.

    p(h_{l-1} | h_l) = Bernoulli(sigmoid(b_{l-1} + W_l h_l)) downwards, and upwards the guide q(h_l | h_{l-1}) =
    Bernoulli(sigmoid(c_l + h_{l-1}' W_l)): both are conditionals of the l-th of a stack of RBMs, which `pretrain` fits
    one after another. Its bound on log p(x) is E_q[log p(x, .., h_{L-2} | h_{L-1}) - F(h_{L-1})] + H(q) - log Z, where
    F and Z are those of the top.

    Gibbs moves draw the top, and the layers below follow from it.

    Args:
        event_shape: shape of one x.
        widths: hidden units of each layer, from the data upwards; at least two layers (one is an RBM).

    Raises:
        InputError: fewer than two layers, a layer without units.

    Source: Hinton, Osindero & Teh (2006), Neural Computation 18.

    >>> from probgen import infer
    >>> from probgen.inference.gibbs import Gibbs
    >>> infer(DeepBeliefNet((4,), widths=(3, 2)), Gibbs(num_warmup=5), num_draws=3, num_chains=2)["x"].shape
    torch.Size([2, 3, 4])
    """

    paper: ClassVar[str] = "Hinton, Osindero & Teh 2006, Neural Computation 18"
    offers: ClassVar[str] = "each layer is fitted alone and raises a bound; p(x | h) is drawn in one pass"
    gives_up: ClassVar[str] = "p(h | x), for which one pass upwards stands; Z of its top"
    weight_kind: ClassVar[EstimateKind] = "lower bound"

    def __init__(self, event_shape: Sequence[Size], widths: Sequence[Size] = (128, 64)) -> None:
        super().__init__()
        if len(widths) < 2:
            raise InputError(
                f"A deep belief net has at least two hidden layers, got widths={tuple(widths)}; take RBM."
            )
        self.event_shape = tuple(event_shape)
        shapes = [self.event_shape, *((width,) for width in widths)]
        self.machines = nn.ModuleList(RBM(lower, num_hidden=upper[0]) for lower, upper in pairwise(shapes))

    @property
    def layers(self) -> list[str]:
        """The sites, from the data upwards: "x", "h1", "h2", ..."""
        return ["x", *(f"h{level}" for level in range(1, len(self.machines) + 1))]

    def couplings(self) -> Couplings:
        """The energy of its top, the two highest layers."""
        lower, upper = self.layers[-2:]
        top = self.stack()[-1]
        return Couplings({(lower, upper): top.weight}, {lower: top.visible_bias, upper: top.hidden_bias})

    def log_weight(self, x: Tensor, num_draws: Count = 100) -> Tensor:
        """E_q[log p(x, .., h_{L-2} | h_{L-1}) - F(h_{L-1})] + H(q) in nats, at most log p(x) + log Z on average.

        x `(batch, *event)` -> `(batch,)`, the average over `num_draws` of q.
        """
        return torch.stack([self._one_draw(x.flatten(1)) for _ in range(num_draws)]).mean(0)

    def stack(self) -> list[RBM]:
        """Its RBMs, to be fitted one after another; see `pretrain`."""
        return [cast(RBM, machine) for machine in self.machines]

    def assemble(self, stack: Sequence[RBM]) -> None:
        """Take over the weights of RBMs, from the data upwards."""
        for own, fitted in zip(self.stack(), stack, strict=True):
            own.load_state_dict(fitted.state_dict())

    def model(self, batch: Batch) -> Tensor:
        """The top with its factor exp(-F), then each layer below given the one above: their joint law up to Z."""
        top = self.couplings()
        lower, upper = top.sites
        with batch.plate():
            value = pyro.sample(lower, Units(top.biases[lower].shape)).to(top.biases[lower].dtype)
            pyro.factor("-free_energy", -top.free_energy({lower: value}))
            pyro.sample(upper, top.law(upper, {lower: value}))
            for site, machine in self._downwards():
                odds = machine.couplings().field("x", {"h": value})
                shape = self.event_shape if site == "x" else odds.shape[-1:]
                law = dist.Bernoulli(logits=odds.unflatten(-1, shape)).to_event(len(shape))
                value = pyro.sample(site, law)
        return value

    def guide(self, batch: Batch) -> None:
        """q(h | x): a pass upwards, each layer given the one below."""
        value = batch.data["x"].flatten(1)
        with batch.plate():
            for site, machine in zip(self.layers[1:], self.stack(), strict=True):
                value = pyro.sample(site, machine.couplings().law("h", {"x": value}))

    def _downwards(self) -> Iterator[tuple[str, RBM]]:
        """The directed layers and their RBMs, from the top to the data."""
        return zip(self.layers[-3::-1], self.stack()[-2::-1], strict=True)

    def _one_draw(self, value: Tensor) -> Tensor:
        gained = torch.zeros(len(value), dtype=value.dtype, device=value.device)
        *directed, top = self.stack()
        for machine in directed:
            couplings = machine.couplings()
            upwards = couplings.law("h", {"x": value})
            above = upwards.sample()
            gained = gained + couplings.law("x", {"h": above}).log_prob(value) + upwards.entropy()
            value = above
        return gained - top.free_energy(value)


def example() -> DeepBeliefNet:
    """Four units below three below two."""
    net = DeepBeliefNet((4,), widths=(3, 2))
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.copy_(torch.linspace(-1.5, 1.2, parameter.numel()).reshape(parameter.shape))
    return net
