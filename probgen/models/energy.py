"""An energy as a program: low where data are likely, normalised by nobody."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import pyro
import torch
from pyro.distributions import ImproperUniform, constraints
from torch import Tensor

from probgen.core import Batch, Size, UnsupportedError, check_shape
from probgen.recorded import Recorded, nameable


class Energy(Recorded):
    """p(x) = exp(-E(x)) / Z with any E and Z unknown. Site "x".

    Engines that move Markov chains draw from it: -E is the log density they need, its gradient the score.

    Args:
        function: E, an nn.Module or a function in torch: x `(batch, *event)` -> nats `(batch,)`, low where x is likely.
            One row must not depend on another, nor on chance.
        event_shape: shape of one x.

    Raises:
        InputError: E of another shape than `(batch,)`.

    Source: LeCun, Chopra, Hadsell, Ranzato & Huang (2006), "A tutorial on energy-based learning".

    >>> from probgen import infer
    >>> from probgen.inference.hmc import HMC
    >>> well = Energy(lambda x: (x.square() - 1).square().sum(-1), event_shape=(2,))
    >>> infer(well, HMC(num_warmup=50), num_draws=5, num_chains=3)["x"].shape
    torch.Size([3, 5, 2])
    """

    paper: ClassVar[str] = "LeCun et al. 2006, A tutorial on energy-based learning"
    offers: ClassVar[str] = "any function that is low where data are likely, networks too"
    gives_up: ClassVar[str] = "Z: the density up to a factor; draws need Markov chains"

    def __init__(self, function: Callable[[Tensor], Tensor], event_shape: Sequence[Size]) -> None:
        super().__init__()
        self.function = function
        self.event_shape = tuple(event_shape)

    def energy(self, x: Tensor) -> Tensor:
        """E(x) in nats: x `(batch, *event)` -> `(batch,)`."""
        energy = self.function(x)
        batch = x.shape[: x.ndim - len(self.event_shape)]
        check_shape("Energy: function(x), one number a row,", energy, batch)
        return energy

    def model(self, batch: Batch) -> Tensor:
        """x flat, with a factor exp(-E(x)) a row: a density up to a constant, of which nobody can draw forwards."""
        with batch.plate():
            x = pyro.sample("x", Undrawable(self.event_shape))
            pyro.factor("-energy", -self.energy(x))
        return x


class Undrawable(ImproperUniform):
    """The flat law over an event; asked for a draw it says who draws."""

    def __init__(self, event_shape: tuple[int, ...], batch_shape: tuple[int, ...] = ()) -> None:
        support = constraints.independent(constraints.real, len(event_shape))
        super().__init__(support, torch.Size(batch_shape), torch.Size(event_shape))

    def expand(self, batch_shape: Any, _instance: Any = None) -> Undrawable:
        return Undrawable(self.event_shape, batch_shape)

    def sample(self, sample_shape: Any = ()) -> Tensor:
        raise UnsupportedError(
            "An energy cannot be drawn from by running it forwards: its normaliser is unknown. Draw by Markov chains, "
            "e.g. infer(program, HMC())."
        )


def example() -> Energy:
    """A bent valley on the plane, lower on one side."""
    return Energy(_banana, (2,))


@nameable
def _banana(x: Tensor) -> Tensor:
    return 0.5 * x[..., 0].square() + 2 * (x[..., 1] - 0.5 * x[..., 0].square()).square() - 0.3 * x[..., 1]
