"""The deep Boltzmann machine: layers of binary units, each coupled to the next, all of them undirected."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise
from typing import Any, ClassVar

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor, nn

from probgen.core import Batch, Count, EstimateKind, InputError, Size
from probgen.couplings import Couplings
from probgen.models.boltzmann_machine import FIRST_WEIGHTS, log_odds, pairwise_model
from probgen.models.rbm import RBM, TwinRBM
from probgen.recorded import Recorded

_PRECISION = 1e-6  # of the mean field


class DeepBoltzmannMachine(Recorded):
    """p(x, h_1, .., h_L) = exp(-E) / Z, E = -x'W_1 h_1 - sum_l h_l'W_{l+1} h_{l+1} - b'x - sum_l c_l'h_l, all binary.

    The guide is the mean field q(h | x) = prod_lj Bernoulli(mu_lj) with mu_l = sigmoid(what layer l feels from the
    means of its neighbours); its bound on log p(x) is E_q[-E] + H(q) - log Z.

    Args:
        event_shape: shape of one x.
        widths: hidden units of each layer, from the data upwards; at least two layers (one is an RBM).
        mean_field_steps: sweeps after which the mean field stops at the latest, >= 1.

    Raises:
        InputError: fewer than two layers, a layer without units.

    Source: Salakhutdinov & Hinton (2009), AISTATS.

    >>> dbm = DeepBoltzmannMachine((4,), widths=(3, 2))
    >>> dbm.mean_field(torch.zeros(5, 4))["h2"].shape
    torch.Size([5, 2])
    """

    paper: ClassVar[str] = "Salakhutdinov & Hinton 2009, AISTATS"
    offers: ClassVar[str] = "layers of features, inferred from above and below"
    gives_up: ClassVar[str] = "exact p(h | x), which is a mean field here; Z; draws need Gibbs moves"
    weight_kind: ClassVar[EstimateKind] = "lower bound"

    def __init__(
        self, event_shape: Sequence[Size], widths: Sequence[Size] = (128, 64), mean_field_steps: Count = 30
    ) -> None:
        super().__init__()
        if len(widths) < 2:
            raise InputError(
                f"A deep Boltzmann machine has at least two hidden layers, got widths={tuple(widths)}; take RBM."
            )
        self.event_shape, self.mean_field_steps = tuple(event_shape), mean_field_steps
        sizes = [math.prod(self.event_shape), *widths]
        self.weights = nn.ParameterList(
            FIRST_WEIGHTS * torch.randn(lower, upper) for lower, upper in pairwise(sizes)
        )
        self.biases = nn.ParameterList(torch.zeros(size) for size in sizes)

    @property
    def layers(self) -> list[str]:
        """The sites, from the data upwards: "x", "h1", "h2", ..."""
        return ["x", *(f"h{level}" for level in range(1, len(self.biases)))]

    def couplings(self) -> Couplings:
        """Its energy."""
        pairs = pairwise(self.layers)
        return Couplings(
            dict(zip(pairs, self.weights, strict=True)), dict(zip(self.layers, self.biases, strict=True))
        )

    def mean_field(self, x: Tensor) -> dict[str, Tensor]:
        """E_q[h_l] by layer, each `(batch, n_l)`: damped by sweeping layer after layer, until nothing moves by 1e-6."""
        couplings = self.couplings()
        state = self._first_guess(couplings, x.flatten(1))
        for _ in range(self.mean_field_steps):
            moved = 0.0
            for site in self.layers[1:]:
                mean = couplings.mean(site, state)
                moved = max(moved, float((mean - state[site]).detach().abs().max()))
                state[site] = mean
            if moved < _PRECISION:
                break
        return {site: state[site] for site in self.layers[1:]}

    def log_weight(self, x: Tensor) -> Tensor:
        """E_q[-E] + H(q) in nats, which is at most log p(x) + log Z: x `(batch, *event)` -> `(batch,)`."""
        mean = self.mean_field(x)
        entropy = sum(dist.Bernoulli(probs=mu).entropy().sum(-1) for mu in mean.values())
        return entropy - self.couplings().energy({"x": x.flatten(1), **mean})

    def set_rates(self, x: Tensor) -> None:
        """Set the visible biases so that with zero weights each unit is on as often as in data x `(n, *event)`."""
        with torch.no_grad():
            self.biases[0].copy_(log_odds(x))

    def stack(self) -> list[RBM]:
        """RBMs to be fitted one after another in its stead; see `pretrain`.

        The lowest has two copies of x and the highest two of its hidden units: in this machine as much again comes from
        the other side.
        """
        shapes = [self.event_shape, *((len(bias),) for bias in list(self.biases)[1:])]
        (lowest, above), *inner, (below, highest) = pairwise(shapes)
        return [
            TwinRBM(lowest, above[0], visible_copies=2),
            *(RBM(lower, upper[0]) for lower, upper in inner),
            TwinRBM(below, highest[0], hidden_copies=2),
        ]

    def assemble(self, stack: Sequence[RBM]) -> None:
        """Make its weights of those of a fitted stack.

        Weights without copies are halved, and a layer's biases are the mean of those in the two machines that share it:
        what a unit feels is then the mean of what it felt in each.
        """
        with torch.no_grad():
            for own, fitted in zip(self.weights, stack, strict=True):
                own.copy_(fitted.weight if isinstance(fitted, TwinRBM) else fitted.weight / 2)
            self.biases[0].copy_(stack[0].visible_bias)
            self.biases[-1].copy_(stack[-1].hidden_bias)
            for own, (lower, upper) in zip(list(self.biases)[1:-1], pairwise(stack), strict=True):
                own.copy_((lower.hidden_bias + upper.visible_bias) / 2)

    def model(self, batch: Batch) -> Any:
        """Every layer with a factor exp(-E) a row: their joint law up to Z."""
        return pairwise_model(self, batch)

    def guide(self, batch: Batch) -> None:
        """q(h | x), the mean field, as Bernoulli sites."""
        with torch.no_grad():
            mean = self.mean_field(batch.data["x"])
        with batch.plate():
            for site, mu in mean.items():
                pyro.sample(site, dist.Bernoulli(probs=mu).to_event(1))

    def _first_guess(self, couplings: Couplings, x: Tensor) -> dict[str, Tensor]:
        """A pass upwards with doubled weights below, where nothing is known yet of what comes from above."""
        state = {
            "x": x,
            **{site: couplings.biases[site].sigmoid().expand(len(x), -1) for site in self.layers[1:]},
        }
        for lower, site in pairwise(self.layers):
            last = site == self.layers[-1]
            push = state[lower] @ couplings.weights[lower, site]
            state[site] = (couplings.biases[site] + (1 if last else 2) * push).sigmoid()
        return state


def example() -> DeepBoltzmannMachine:
    """Four units below three below two."""
    dbm = DeepBoltzmannMachine((4,), widths=(3, 2))
    with torch.no_grad():
        for weight in dbm.weights:
            weight.copy_(torch.linspace(-1.5, 1.2, weight.numel()).reshape(weight.shape))
        for bias in dbm.biases:
            bias.copy_(torch.linspace(-0.4, 0.6, len(bias)))
    return dbm
