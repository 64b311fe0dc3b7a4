"""Pairwise energies over layers of units: what Boltzmann machines of every depth have in common.

    E(s) = -sum_(l,m) s_l' W_lm s_m - sum_l b_l' s_l,    s_l in {0, 1}^(n_l),    p(s) = exp(-E(s)) / Z

A layer may be Gaussian instead: its -b's is then (s - b)^2 / (2 scale^2), and s / scale stands in its products.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import cached_property

import pyro.distributions as dist
import torch
import torch.nn.functional as F
from torch import Tensor

from probgen.core import InputError, Pairwise, UnsupportedError, describe

_FAR = 10  # root mean square distance of data from a Gaussian layer's biases, in scales

State = Mapping[str, Tensor]
"""Values of the layers by name, each `(batch, n_l)`."""


@dataclass(frozen=True)
class Couplings:
    """The energy of a pairwise machine: its conditionals, sums over layers, and paths between two of them.

    Args:
        weights: W by the pair of layers it couples, `(n_l, n_m)`; symmetric with zero diagonal where l is m.
        biases: b by layer, `(n_l,)`, or one a row, `(batch, n_l)`; every layer has one.
        scales: standard deviations of the Gaussian layers, `()` or `(n_l,)`.
        beta: inverse temperature of all weights, a number or one a row, `(batch, 1)`: at 0 the units are independent.

    >>> pair = Couplings({("x", "h"): torch.ones(2, 1)}, {"x": torch.zeros(2), "h": torch.zeros(1)})
    >>> pair.energy({"x": torch.ones(1, 2), "h": torch.ones(1, 1)})
    tensor([-2.])
    >>> pair.field("h", {"x": torch.ones(1, 2)})
    tensor([[2.]])
    """

    weights: Mapping[tuple[str, str], Tensor]
    biases: Mapping[str, Tensor]
    scales: Mapping[str, Tensor] = field(default_factory=dict)
    beta: Tensor | float = 1.0

    @property
    def sites(self) -> tuple[str, ...]:
        """The layers."""
        return tuple(self.biases)

    @cached_property
    def colours(self) -> tuple[tuple[str, ...], ...]:
        """Groups of layers that are independent of one another given the other groups; two for a chain of layers."""
        groups: list[list[str]] = []
        for site in self.sites:
            free = [group for group in groups if not any(self._coupled(site, other) for other in group)]
            (free[0] if free else groups.append([]) or groups[-1]).append(site)  # type: ignore[func-returns-value]
        return tuple(map(tuple, groups))

    def field(self, site: str, state: State) -> Tensor:
        """What a layer feels from the others: log odds of its units, `(batch, n_l)`; for Gaussian ones their means."""
        felt = [
            self._unit(right, state) @ weight.mT if left == site else self._unit(left, state) @ weight
            for (left, right), weight in self.weights.items()
            if site in (left, right)
        ]
        return self.biases[site] + self._scaled(site, sum(felt[1:], felt[0])) if felt else self.biases[site]

    def mean(self, site: str, state: State) -> Tensor:
        """E[s_l | the others], `(batch, n_l)`; for layers without couplings inside."""
        felt = self.field(site, state)
        return felt if site in self.scales else felt.sigmoid()

    def law(self, site: str, state: State) -> dist.TorchDistribution:
        """p(s_l | the others), the layer as one event; for layers without couplings inside."""
        felt = self.field(site, state)
        if site in self.scales:
            return dist.Normal(felt, self.scales[site]).to_event(1)
        return dist.Bernoulli(logits=felt).to_event(1)

    def draw(self, site: str, state: State, held: Tensor | None = None) -> Tensor:
        """One Gibbs move of a layer: s_l ~ p(s_l | the others), unit after unit where they are coupled.

        Units that are `held`, `(batch, n_l)`, stay while the others of a coupled layer move.
        """
        if (site, site) in self.weights:
            return self._draw_one_by_one(site, state, held)
        mean = self.mean(site, state)
        if site in self.scales:
            return mean + self.scales[site] * torch.randn_like(mean)
        return torch.rand_like(mean).lt_(mean)  # three times as fast as mean.bernoulli()

    def settled(self, x: Tensor, sweeps: int) -> dict[str, Tensor]:
        """x `(batch, n_x)`, and all other layers after so many sweeps with x held, from nothing on."""
        state = self.zeros(len(x)) | {"x": x}
        for _ in range(sweeps):
            for site in self.sites:
                if site != "x":
                    state[site] = self.draw(site, state)
        return state

    def energy(self, state: State) -> Tensor:
        """E(s) in nats, `(batch,)`."""
        energy = sum((self._own_energy(site, state[site]) for site in self.sites), torch.zeros(()))
        for (left, right), weight in self.weights.items():
            product = self._row_beta * ((self._unit(left, state) @ weight) * self._unit(right, state)).sum(-1)
            energy = energy - (product / 2 if left == right else product)
        return energy

    def free_energy(self, state: State) -> Tensor:
        """-log of the sum of exp(-E) over the layers that `state` does not hold, which may not be coupled: `(batch,)`.

        With an empty state it is -log Z of layers without couplings, `()`.
        """
        hidden = [site for site in self.sites if site not in state]
        self._check_uncoupled(hidden)
        seen = Couplings(
            {pair: w for pair, w in self.weights.items() if not set(pair) & set(hidden)},
            {site: b for site, b in self.biases.items() if site in state},
            self.scales,
            self.beta,
        )
        return seen.energy(state) - sum(self._log_sum(site, self.field(site, state)) for site in hidden)

    def between(self, base: Mapping[str, Tensor], beta: Tensor | float) -> Couplings:
        """beta E + (1 - beta) E_0 with E_0 without couplings and with the biases `base`, Gaussian scales the same."""
        biases = {site: beta * bias + (1 - beta) * base[site] for site, bias in self.biases.items()}
        return Couplings(self.weights, biases, self.scales, beta)

    def statistics(self, state: State, share: Tensor) -> Couplings:
        """Sums over rows of what multiplies each parameter in -E: their gradients, without autograd.

        A row counts as often as its `share`, `(batch,)`, says: 1 / batch each for averages.
        """
        return Couplings(
            {
                (left, right): (share[:, None] * self._unit(left, state)).mT @ self._unit(right, state)
                for left, right in self.weights
            },
            {site: share @ self._bias_statistic(site, state[site]) for site in self.sites},
        )

    def dot(self, statistics: Couplings) -> Tensor:
        """sum of parameters times statistics, `()`: -E summed over a batch, up to what no parameter multiplies."""
        total = torch.zeros(())
        for (left, right), weight in self.weights.items():
            product = weight.flatten() @ statistics.weights[left, right].flatten()
            total = total + (product / 2 if left == right else product)
        for site, bias in self.biases.items():
            total = total + bias @ statistics.biases[site]
        return total

    def check(self, site: str, value: Tensor) -> None:
        """Raise `InputError` unless a layer can have these values, `(batch, n_l)`: 0 and 1, or within its reach."""
        if site in self.scales:
            far = float(((value - self.biases[site]) / self.scales[site]).detach().square().mean().sqrt())
            if far > _FAR:
                raise InputError(
                    f"Site {site!r}: values {value.min():.4g}..{value.max():.4g} are {far:.3g} scales from the biases "
                    "of a Gaussian layer (root mean square; expected about 1). Standardise the data, (x - mean) / sd, "
                    "begin at their means by set_rates(x), or make the machine with a larger scale."
                )
        elif not torch.equal(value, value.bool().to(value.dtype)):
            raise InputError(
                f"Site {site!r}: binary units are 0 or 1, got values {value.min():.4g}..{value.max():.4g}. Binarise "
                "the data, e.g. by probgen.data.binarise_threshold, or take Gaussian units, GaussianRBM."
            )

    def independent(self, sites: Iterable[str]) -> bool:
        """Whether units of these layers are independent of one another given those of the others."""
        return not any(set(pair) <= set(sites) for pair in self.weights)

    def zeros(self, rows: int) -> dict[str, Tensor]:
        """A state of `rows` rows with nothing on."""
        return {site: bias.new_zeros(rows, bias.shape[-1]) for site, bias in self.biases.items()}

    def _coupled(self, one: str, other: str) -> bool:
        return (one, other) in self.weights or (other, one) in self.weights

    @property
    def _row_beta(self) -> Tensor | float:
        """beta of each row, `(batch,)`, or of all."""
        return self.beta.squeeze(-1) if isinstance(self.beta, Tensor) else self.beta

    def _check_uncoupled(self, sites: Iterable[str]) -> None:
        for one, other in self.weights:
            if {one, other} <= set(sites):
                raise InputError(
                    f"Layers {one!r} and {other!r} are coupled: they cannot be summed out together."
                )

    def _scaled(self, site: str, felt: Tensor) -> Tensor:
        """beta times the layer's scale times this; nothing is done where both are 1."""
        felt = self.scales[site] * felt if site in self.scales else felt
        return felt if isinstance(self.beta, float) and self.beta == 1 else self.beta * felt

    def _unit(self, site: str, state: State) -> Tensor:
        return state[site] / self.scales[site] if site in self.scales else state[site]

    def _own_energy(self, site: str, value: Tensor) -> Tensor:
        if site in self.scales:
            return 0.5 * ((value - self.biases[site]) / self.scales[site]).square().sum(-1)
        return -(value * self.biases[site]).sum(-1)

    def _log_sum(self, site: str, felt: Tensor) -> Tensor:
        """log of the sum, or integral, of exp(-E) over a layer that feels this, `(batch,)`."""
        if site not in self.scales:
            return F.softplus(felt).sum(-1)
        scale, bias = self.scales[site], self.biases[site]
        width = 0.5 * math.log(2 * math.pi) + scale.log()
        return (width + (felt.square() - bias.square()) / (2 * scale.square())).sum(-1)

    def _bias_statistic(self, site: str, value: Tensor) -> Tensor:
        if site in self.scales:
            return (value - self.biases[site].detach()) / self.scales[site].square()
        return value

    def _draw_one_by_one(self, site: str, state: State, held: Tensor | None) -> Tensor:
        inside = self.weights[site, site]
        value = state[site].clone()
        outside = {pair: w for pair, w in self.weights.items() if pair != (site, site)}
        rest = Couplings(outside, self.biases, self.scales, self.beta).field(site, state).expand_as(value)
        beta, uniform = self._row_beta, torch.rand_like(value)
        for unit in range(value.shape[-1]):
            odds = rest[:, unit] + beta * (value @ inside[:, unit])
            drawn = (uniform[:, unit] < odds.sigmoid()).to(value.dtype)
            value[:, unit] = drawn if held is None else torch.where(held[:, unit], value[:, unit], drawn)
        return value


def seen_couplings(program: Pairwise) -> Couplings:
    """The energy of a program whose data are units of it; `UnsupportedError` where they are below its top."""
    couplings = program.couplings()
    if "x" not in couplings.sites:
        raise UnsupportedError(
            f"{describe(program)} is a Boltzmann machine in its layers {', '.join(couplings.sites)} alone, of which no "
            "data show anything. Fit it by pretrain(), and take its evidence by AIS()."
        )
    return couplings
