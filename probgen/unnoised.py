"""Energies and scores as score matching sees them: diffusions that are never noised."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from probgen.core import Batch, Diffusion, Energetic, InputError, ScoreOnly, describe, given
from probgen.processes import Process, Time, Weighting


def score_of(program: Energetic | ScoreOnly, x: Tensor) -> Tensor:
    """s(x) = -grad E(x), or the score there is, differentiable in the weights: x `(batch, *event)` -> the same.

    >>> from probgen.models.energy import Energy
    >>> score_of(Energy(lambda x: x.square().sum(-1), (2,)), torch.ones(1, 2))
    tensor([[-2., -2.]], grad_fn=<NegBackward0>)
    """
    if not isinstance(program, Energetic):
        return program.grad_log_prob(x)
    with torch.enable_grad():
        at = x if x.requires_grad else x.detach().requires_grad_()
        (grad,) = torch.autograd.grad(program.energy(at).sum(), at, create_graph=True)
        return -grad


def unnoised(program: Any, t: Time | None) -> Any:
    """A diffusion as it is; an energy or a score as one that is never noised, which has no times to choose from."""
    if isinstance(program, Diffusion) or not isinstance(program, Energetic | ScoreOnly):
        return program
    if t is not None:
        raise InputError(f"{describe(program)} has no noise levels to take t={t:g} of: leave t out.")
    return Unnoised(program)


@dataclass(frozen=True)
class Clean(Process):
    """alpha = 1 and sigma = 0 at every time; lambda = 1, whatever the weighting."""

    t_min: Time = 0.0

    def _noisy_at_zero(self) -> bool:
        return True  # no end needs a clamp: there is no score of noise

    def alpha(self, t: Tensor) -> Tensor:
        return torch.ones_like(t)

    def sigma(self, t: Tensor) -> Tensor:
        return torch.zeros_like(t)

    def weight(self, t: Tensor, weighting: Weighting = "sigma2") -> Tensor:
        """1."""
        return torch.ones_like(t)


class Unnoised:
    """An energy or a score with the methods of a diffusion that knows its score."""

    def __init__(self, program: Energetic | ScoreOnly) -> None:
        self.program = program

    def model(self, batch: Batch) -> Any:
        """Its own."""
        return self.program.model(batch)

    def given(self, condition: Tensor | None) -> Unnoised:
        """The same at a condition."""
        return Unnoised(given(self.program, condition))

    def process(self) -> Process:
        """No noise."""
        return Clean()

    def denoise(self, x_t: Tensor, t: Tensor) -> Tensor:
        """x_t itself: there is nothing to remove."""
        return x_t

    def score(self, x_t: Tensor, t: Tensor) -> Tensor:
        """The same at every t."""
        return score_of(self.program, x_t)
