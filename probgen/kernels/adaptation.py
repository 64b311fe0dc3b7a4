"""The step size, found during warm-up from how many proposals are accepted."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from probgen.core import InputError
from probgen.kernels.core import Evaluate, Point, Stats, Tuning, per_chain, per_set
from probgen.kernels.leapfrog import kinetic_energy, leapfrog

_MOST_HALVINGS = 60  # or doublings


class StepSize:
    """Dual averaging (Nesterov 2009) of log step size, towards an acceptance of `target`; one for each data set.

    With H = target - acceptance, averaged over the chains of a data set, after t updates

        log eps_t = log eps_0 - sqrt(t)/gamma Hbar_t,   Hbar_t = (1 - 1/(t + t_0)) Hbar_{t-1} + H/(t + t_0),
        log epsbar_t = t^-kappa log eps_t + (1 - t^-kappa) log epsbar_{t-1},

    eps moves the chains, epsbar is what is kept. The paper is drawn to 10 eps_0 and has gamma = 0.05, for one chain
    whose eps_0 is a guess; here eps_0 is searched for, acceptance averaged, and short warm-ups must not end too bold.

    In the first transitions each chain has a step size of its own: where chains begin far out, one common step that
    suits most of them would leave the others standing where they are.

    Args:
        target: acceptance aimed at, in (0, 1).
        alone: how many transitions each chain has its own step size.
        gamma, t0, kappa: as in the equations.

    Source: Hoffman & Gelman (2014), arXiv 1111.4246, section 3.2.
    """

    def __init__(
        self, target: float, alone: int = 0, gamma: float = 0.1, t0: float = 10.0, kappa: float = 0.75
    ) -> None:
        self.target, self.alone, self.gamma, self.t0, self.kappa = target, alone, gamma, t0, kappa
        self.num_sets = self.groups = 1

    def begin(self, tuning: Tuning, num_sets: int) -> Tuning:
        """Start from the step size there is, each chain with its own."""
        self.num_sets = num_sets
        self.groups = len(tuning.step_size) if self.alone else num_sets
        return self.restart(tuning)

    def restart(self, tuning: Tuning) -> Tuning:
        """Forget, and start from the step size there is: the median of the chains that share one."""
        first = per_set(tuning.step_size.log(), self.groups).median(0).values
        self._start = self._log_mean = first
        self._error, self._count = torch.zeros_like(first), 0
        return self._set(tuning, first, len(tuning.step_size))

    def update(self, step: int, state: Point, stats: Stats, tuning: Tuning) -> Tuning:
        """One update from the acceptance of one transition."""
        if step == self.alone:
            self.groups = self.num_sets
            tuning = self.restart(self.finish(tuning))
        acceptance = per_set(stats["acceptance_rate"], self.groups).mean(0)
        self._count += 1
        weight = 1 / (self._count + self.t0)
        self._error = (1 - weight) * self._error + weight * (self.target - acceptance)
        log_step = self._start - math.sqrt(self._count) / self.gamma * self._error
        fading = self._count**-self.kappa
        self._log_mean = fading * log_step + (1 - fading) * self._log_mean
        return self._set(tuning, log_step, len(stats["acceptance_rate"]))

    def finish(self, tuning: Tuning) -> Tuning:
        """Keep the average."""
        return self._set(tuning, self._log_mean, tuning.step_size.numel())

    def _set(self, tuning: Tuning, log_step: Tensor, num_chains: int) -> Tuning:
        return tuning._replace(step_size=per_chain(log_step.exp(), num_chains))


def find_step_size(evaluate: Evaluate, point: Point, noise: Tensor, num_sets: int) -> Tensor:
    """A step size for each data set at which a single leapfrog step is accepted with probability of about 0.8.

    It is halved or doubled until the acceptance, averaged over the chains of a data set, crosses 0.8. The search begins
    at 1, or where the gradient moves no coordinate by more than 1/2: an ODE solver may take for ever far out.

    Args:
        evaluate: the density.
        point: where the chains stand.
        noise: momenta, `(dim, n)`.
        num_sets: data sets; chain i belongs to set i mod num_sets.

    Returns `(n,)`. Raises `InputError` for a density on which no step is too long.

    Source: Hoffman & Gelman (2014), algorithm 4, over many chains.
    """
    n = point.position.shape[1]
    first = per_set(point.grad.abs().amax(0), num_sets).amax(0).clamp(min=1.0).rsqrt()

    def acceptance(log2_step: Tensor) -> Tensor:
        new, momentum = leapfrog(evaluate, point, noise, per_chain(first * 2.0**log2_step, n))
        change = new.log_prob - kinetic_energy(momentum) - point.log_prob + kinetic_energy(noise)
        return per_set(torch.where(torch.isnan(change), 0.0, change.clamp(max=0).exp()), num_sets).mean(0)

    power = torch.zeros(num_sets, dtype=noise.dtype, device=noise.device)
    growing = acceptance(power) > 0.8
    searching = torch.ones_like(growing)
    for _ in range(_MOST_HALVINGS):
        trial = torch.where(searching, torch.where(growing, power + 1, power - 1), power)
        high = acceptance(trial) > 0.8
        # Growing stops before the step that is too long; shrinking stops at the first that is short enough.
        power = torch.where(searching & (high | ~growing), trial, power)
        searching = searching & (high == growing)
        if not bool(searching.any()):
            return per_chain(first * 2.0**power, n)
    raise InputError(
        f"Steps of length {float(first.min()) * 2.0**_MOST_HALVINGS:.0e} are still accepted: the density does not fall "
        "off in any direction, so the posterior is improper. Give the latents proper priors."
    )
