"""Short Markov moves by which energies are fitted: how negative examples are made of the program itself."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from probgen.core import (
    Count,
    Energetic,
    NonNegative,
    Pairwise,
    Positive,
    UnsupportedError,
    check_fields,
    describe,
)
from probgen.couplings import Couplings, seen_couplings

State = dict[str, Tensor]


class Moves(Protocol):
    """Transitions that leave the program's law as it is, or nearly so. They use torch's random stream."""

    def start(self, program: Any, x: Tensor) -> State:
        """A state at data x `(batch, *event)`, to move from."""

    def move(self, program: Any, state: State) -> State:
        """The state after the moves, without gradients."""


@dataclass(frozen=True)
class GibbsMoves:
    """Sweeps over the layers of a Boltzmann machine: those above x first, then x.

    Args:
        num_sweeps: k >= 1.

    >>> from probgen.models.rbm import example
    >>> moves, rbm = GibbsMoves(2), example()
    >>> moves.move(rbm, moves.start(rbm, torch.ones(3, 4)))["x"].shape
    torch.Size([3, 4])
    """

    num_sweeps: Count = 1

    def __post_init__(self) -> None:
        check_fields(self)

    def start(self, program: Any, x: Tensor) -> State:
        """x, and every layer above it as it is likely given the ones below; as it may be where x alone moves it."""
        couplings = _couplings(program)
        return couplings.settled(x.flatten(1), sweeps=0 if couplings.independent(couplings.sites[1:]) else 1)

    def move(self, program: Any, state: State) -> State:
        """`num_sweeps` sweeps."""
        couplings, state = _couplings(program), dict(state)
        order = [*couplings.sites[1:], "x"]
        for _ in range(self.num_sweeps):
            for site in order:
                state[site] = couplings.draw(site, state)
        return state


@dataclass(frozen=True)
class LangevinMoves:
    """x' = x - step_size grad E(x) + noise_scale z: unadjusted Langevin where noise_scale^2 = 2 step_size.

    Practice takes longer steps and less noise, which is a law of lower temperature noise_scale^2 / (2 step_size).

    Args:
        num_steps: k >= 1.
        step_size: > 0, in squared units of x a nat.
        noise_scale: >= 0, in units of x; None is sqrt(2 step_size).
        clip: largest change of a coordinate in one step before the noise, or None.

    Source: Du & Mordatch (2019), arXiv 1903.08689; Nijkamp et al. (2019), arXiv 1903.12370.

    >>> from probgen.models.energy import example
    >>> moves = LangevinMoves(num_steps=5, step_size=0.01)
    >>> moves.move(example(), {"x": torch.zeros(3, 2)})["x"].shape
    torch.Size([3, 2])
    """

    num_steps: Count = 20
    step_size: Positive = 0.01
    noise_scale: NonNegative | None = None
    clip: Positive | None = None

    def __post_init__(self) -> None:
        check_fields(self)

    def start(self, program: Any, x: Tensor) -> State:
        """x itself."""
        return {"x": x.detach().clone()}

    def move(self, program: Any, state: State) -> State:
        """`num_steps` steps."""
        if not isinstance(program, Energetic):
            raise UnsupportedError(
                f"LangevinMoves need an energy of real x; {describe(program)} has none: GibbsMoves()?"
            )
        noise = (2 * self.step_size) ** 0.5 if self.noise_scale is None else self.noise_scale
        x = state["x"].detach()
        for _ in range(self.num_steps):
            with torch.enable_grad():
                y = x.requires_grad_()
                (grad,) = torch.autograd.grad(program.energy(y).sum(), y)
            step = self.step_size * grad
            x = x.detach() - (step if self.clip is None else step.clamp(-self.clip, self.clip))
            x = x + noise * torch.randn_like(x)
        return {"x": x}


def _couplings(program: Any) -> Couplings:
    if not isinstance(program, Pairwise):
        raise UnsupportedError(
            f"GibbsMoves need a Boltzmann machine, got {describe(program)}: LangevinMoves()?"
        )
    return seen_couplings(program)
