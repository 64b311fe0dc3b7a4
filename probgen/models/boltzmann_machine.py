"""The Boltzmann machine: binary units, each coupled to every other, some of them never seen."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Annotated, Any, ClassVar

import pyro
import torch
from pyro.distributions import ImproperUniform, constraints
from torch import Tensor, nn

from probgen.core import Batch, InputError, Positive, Size, UnsupportedError, Within
from probgen.couplings import Couplings
from probgen.recorded import Recorded

FIRST_WEIGHTS = 0.01  # standard deviation before fitting (Hinton 2010, section 8)
MAX_UNITS = 20_000
_TOO_MANY = "the couplings of each unit with each other one would not fit memory"


class BoltzmannMachine(Recorded):
    """p(x, h) = exp(-E(s) / T) / Z, s = (x, h) in {0, 1}^n, E(s) = -1/2 s'W s - b's, W symmetric with zero diagonal.

    Args:
        event_shape: shape of one x; its units are coupled in the order in which they lie in memory.
        num_hidden: units that no data show, >= 0.
        temperature: T > 0.

    Raises:
        InputError: a temperature that is not > 0, a negative number of units.

    Source: Ackley, Hinton & Sejnowski (1985), Cognitive Science 9.

    >>> from probgen import infer
    >>> from probgen.inference.gibbs import Gibbs
    >>> infer(BoltzmannMachine((4,)), Gibbs(num_warmup=5), num_draws=3, num_chains=2)["x"].shape
    torch.Size([2, 3, 4])
    """

    paper: ClassVar[str] = "Ackley, Hinton & Sejnowski 1985, Cognitive Science 9"
    offers: ClassVar[str] = "any pairwise law of binary units; memory that completes patterns"
    gives_up: ClassVar[str] = "Z beyond 25 units; Gibbs moves one unit at a time"

    def __init__(
        self,
        event_shape: Sequence[Size],
        num_hidden: Annotated[int, Within(0, MAX_UNITS, why=_TOO_MANY)] = 0,
        temperature: Positive = 1.0,
    ) -> None:
        super().__init__()
        self.event_shape, self.temperature = tuple(event_shape), temperature
        self.num_visible, self.num_hidden = math.prod(self.event_shape), num_hidden
        size = self.num_visible + num_hidden
        if size > MAX_UNITS:
            raise InputError(
                f"event_shape and num_hidden make {size:,} units, expected at most {MAX_UNITS:,}: "
                f"{_TOO_MANY}. Take an RBM."
            )
        self.weight = nn.Parameter(FIRST_WEIGHTS * torch.randn(size, size))
        self.bias = nn.Parameter(torch.zeros(size))

    @classmethod
    def of(cls, weight: Tensor, bias: Tensor, temperature: float = 1.0) -> BoltzmannMachine:
        """The machine without hidden units that has these couplings `(n, n)` and biases `(n,)`."""
        size = len(bias)
        if weight.shape != (size, size):
            raise InputError(
                f"weight must be of shape ({size}, {size}) as bias has {size} units, got {tuple(weight.shape)}."
            )
        off = float((weight - weight.mT).abs().max())
        if off > 0 or bool(weight.diagonal().any()):
            raise InputError(
                f"weight must be symmetric with a zero diagonal: it differs from its transpose by up to {off:.3g}, its "
                f"diagonal reaches {float(weight.diagonal().abs().max()):.3g}. Take (W + W') / 2 without the diagonal."
            )
        machine = cls((size,), temperature=temperature).to(weight)
        with torch.no_grad():
            machine.weight.copy_(weight)
            machine.bias.copy_(bias)
        return machine

    @classmethod
    def hebbian(cls, patterns: Tensor, temperature: float = 1.0) -> BoltzmannMachine:
        """The machine that remembers patterns `(p, *event)` of 0 and 1: low temperatures complete them from a part.

        Units that agree in more patterns pull one another up and down: with s = 2x - 1 in {-1, 1}^n, E = -1/2 s'J s and
        J = 1/n sum_m s_m s_m' without its diagonal. Patterns without correlations are remembered up to p of about
        0.138 n.

        Source: Hopfield (1982), PNAS 79; Amit, Gutfreund & Sompolinsky (1985), PRL 55.

        >>> pattern = torch.tensor([[1.0, 1, 0, 0, 1, 0]])
        >>> energies = BoltzmannMachine.hebbian(pattern).couplings().energy({"x": torch.cat([pattern, 1 - pattern])})
        >>> torch.allclose(*energies)
        True
        """
        if patterns.ndim < 2 or not patterns.numel():
            raise InputError(f"patterns must be (p, *event) with p >= 1, got shape {tuple(patterns.shape)}.")
        if not bool(((patterns == 0) | (patterns == 1)).all()):
            raise InputError(
                f"patterns must be of 0 and 1, got values {patterns.min().item():.4g}..{patterns.max().item():.4g}."
            )
        patterns = patterns if patterns.is_floating_point() else patterns.to(torch.get_default_dtype())
        spins = 2 * patterns.flatten(1) - 1
        pull = (spins.mT @ spins / spins.shape[1]).fill_diagonal_(0)
        machine = cls(patterns.shape[1:], temperature=temperature).to(patterns)
        with torch.no_grad():
            machine.weight.copy_(4 * pull)
            machine.bias.copy_(-2 * pull.sum(1))
        return machine

    def couplings(self) -> Couplings:
        """Its energy over T: layers "x" and, where there are hidden units, "h"."""
        upper = self.weight.triu(1) / self.temperature
        whole, bias, seen = upper + upper.mT, self.bias / self.temperature, self.num_visible
        if not self.num_hidden:
            return Couplings({("x", "x"): whole}, {"x": bias})
        weights = {
            ("x", "x"): whole[:seen, :seen],
            ("x", "h"): whole[:seen, seen:],
            ("h", "h"): whole[seen:, seen:],
        }
        return Couplings(weights, {"x": bias[:seen], "h": bias[seen:]})

    def model(self, batch: Batch) -> Tensor:
        """x, then h where there are hidden units, with a factor exp(-E / T) a row."""
        return pairwise_model(self, batch)


class Units(ImproperUniform):
    """Binary units without a law of their own. Asked for a draw they say who draws."""

    def __init__(self, event_shape: Sequence[int], batch_shape: Sequence[int] = ()) -> None:
        support = constraints.independent(constraints.boolean, len(event_shape))
        super().__init__(support, torch.Size(batch_shape), torch.Size(event_shape))

    def expand(self, batch_shape: Any, _instance: Any = None) -> Units:
        return Units(self.event_shape, batch_shape)

    def stand_in(self) -> Tensor:
        """Something of its shape."""
        return torch.zeros(self.event_shape)

    def sample(self, sample_shape: Any = ()) -> Tensor:
        raise UnsupportedError(
            "A Boltzmann machine cannot be drawn from by running it forwards: its normaliser is unknown. Draw by "
            "Gibbs moves: infer(program, Gibbs())."
        )


def pairwise_model(machine: Any, batch: Batch) -> Tensor:
    """Every layer flat, x in the shape of an event, with a factor exp(-E) a row: a density up to a constant."""
    couplings = machine.couplings()
    with batch.plate():
        x = pyro.sample("x", Units(machine.event_shape))
        state = {"x": seen(x, machine).to(couplings.biases["x"].dtype)}
        for site in couplings.sites[1:]:
            state[site] = pyro.sample(site, Units(couplings.biases[site].shape)).nan_to_num(nan=0.0)
        pyro.factor("-energy", -couplings.energy(state))
    return x


def seen(x: Tensor, machine: Any) -> Tensor:
    """x flat, units that were not seen off: a program that is only read needs some value there."""
    return x.nan_to_num(nan=0.0).flatten(-len(machine.event_shape))


def log_odds(x: Tensor) -> Tensor:
    """Biases at which independent units are on as often as in data x `(n, *event)`, flat; finite for all data."""
    rate = x.flatten(1).mean(0)
    return rate.clamp(0.5 / len(x), 1 - 0.5 / len(x)).logit()


def example() -> BoltzmannMachine:
    """Five units that pull one another up and down, one of them hidden."""
    machine = BoltzmannMachine((4,), num_hidden=1)
    with torch.no_grad():
        machine.weight.copy_(torch.linspace(-1.5, 1.0, 25).reshape(5, 5))
        machine.bias.copy_(torch.linspace(-0.5, 0.7, 5))
    return machine
