"""The twisted particle filter: runs of particles from noise to data under a guidance, weighed step by step."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import torch
from torch import Tensor

from probgen.priors.conditioned import Conditioned
from probgen.priors.guidance import Guidance, Guided
from probgen.priors.other_latents import OtherLatents
from probgen.priors.particles import (
    check_weights,
    effective_size,
    num_represented,
    rows_of,
    spread,
    systematic,
)
from probgen.priors.steps import Step
from probgen.randomness import Noise, time_key

_REACH = (
    0.5  # how far guidance may move a particle in one step, in its noise, by the root of the numbers observed
)
_OPENING = 3  # in this part of the steps, the first third, other latents learn of what was observed
_NUMBERS_AT_ONCE = 2**17  # coordinates that a network is given side by side: its own are many times as many
_START, _STEP, _RESAMPLE, _TRY, _ACCEPT = map(float, range(5))  # what noise is for


@dataclass(frozen=True)
class Setup:
    """What all runs share.

    Args:
        conditioned: the program.
        twist: gives log psi_t, with `twist.twist`.
        steps: from noise to data.
        particles: of a run, for each data set.
        ess_threshold: populations are resampled below this share of their size.
        seed: of all noise: what a particle gets does not depend on the runs beside it, but for the z it starts from.
        batch_size: particles that the network is given side by side; None goes by their size.
    """

    conditioned: Conditioned
    twist: Guidance
    steps: list[Step]
    particles: int
    ess_threshold: float
    seed: int
    batch_size: int | None = None

    @cached_property
    def others(self) -> OtherLatents | None:
        """The latents beside the prior, if there are any."""
        return OtherLatents(self.conditioned) if self.conditioned.num_others else None

    @cached_property
    def num_seen(self) -> int:
        """How many numbers were observed, of one data set."""
        return sum(value.numel() for value in self.conditioned.target.data.values())

    @property
    def rows_at_once(self) -> int:
        """Rows that the network is given side by side: row i belongs to data set i mod num_sets."""
        sets = self.conditioned.num_sets
        rows = self.batch_size or _NUMBERS_AT_ONCE // self.conditioned.size
        return max(1, rows // sets) * sets

    def share(self, k: int) -> float:
        """How much of log p(y | x_t, z) is in psi at the start of step k: all, but for other latents at first.

        They are drawn from p(z), from which p(z | y) may be far: psi = p(z) p(y | x_t, z)^share leads there by small
        steps, while x_t is hardly more than noise.
        """
        return min(1.0, (_OPENING * (k + 1) / len(self.steps)) ** 3) if self.others else 1.0


class Ended(NamedTuple):
    """Runs that have ended.

    Args:
        x, z: x_0 `(rows, *shape)` and other latents `(rows, k)` of all particles, rows = runs * particles * sets.
        log_weight: `(runs, particles, sets)`.
        log_evidence: log of the unbiased estimate of p(y) of each run, `(runs, sets)`.
        ess, ancestors: effective size, and how many of the first particles are represented, at the start, after each
            step and at the end: `(runs, steps + 2, sets)`.
    """

    x: Tensor
    z: Tensor
    log_weight: Tensor
    log_evidence: Tensor
    ess: Tensor
    ancestors: Tensor


class _Cloud(NamedTuple):
    """Particles at one time, one a row.

    Args:
        x, z: x_t `(rows, *shape)` and the other latents `(rows, k)`.
        x_0, before: E[x_0 | x_t], and that of one step before.
        pull: what guidance adds to the score.
        log_psi, log_weight: `(rows,)`.
        ancestor: which particle of its population it descends from, `(rows,)`.
    """

    x: Tensor
    z: Tensor
    x_0: Tensor
    before: Tensor
    pull: Tensor
    log_psi: Tensor
    log_weight: Tensor
    ancestor: Tensor

    def take(self, rows: Tensor) -> _Cloud:
        return _Cloud(*(value[rows] for value in self))


class _Look(NamedTuple):
    """What guidance says at x_t: log psi at z as it came, and at z as it was moved."""

    x_0: Tensor
    pull: Tensor
    log_psi: Tensor
    z: Tensor
    log_psi_moved: Tensor


class TwistedFilter:
    """Independent runs side by side.

    Args:
        setup: what they share.
        first, num_runs: which runs they are.
        show: called after each look of the network with what there is to say.

    `run()` gives what became of them.
    """

    def __init__(self, setup: Setup, first: int, num_runs: int, show: Callable[..., None]) -> None:
        self.setup, self.conditioned = setup, setup.conditioned
        self.first, self.show = first, show
        self.shape = (num_runs, setup.particles, setup.conditioned.num_sets)
        self.ess: list[Tensor] = []
        self.ancestors: list[Tensor] = []

    def run(self) -> Ended:
        """All steps."""
        cloud, log_evidence = self._started(), torch.zeros((), dtype=torch.float64)
        for k, step in enumerate(self.setup.steps):
            cloud, gained = self._resampled(cloud, k)
            log_evidence = log_evidence + gained
            cloud = self._moved(cloud, step, k)
        return self._ended(cloud, log_evidence)

    def _started(self) -> _Cloud:
        """x_T ~ N(0, sigma^2), z from the program's own law: weighed by psi_T."""
        process, others = self.conditioned.process, self.setup.others
        noise = self._noise(_START, 0, self.conditioned.shape, self.conditioned.latent.dtype)
        x = process.terminal_scale().to(noise) * noise
        z, log_start = x.new_zeros(len(x), 0), torch.zeros(len(x), dtype=torch.float64, device=x.device)
        if others:
            z = others.draw(len(x), seed=time_key(float(self.setup.seed), float(self.first)) % 2**63)
            log_start = others.log_prob(z).double()
        look = self._look(x, process.t_max, z, torch.zeros_like(log_start), 0)
        ancestor = torch.arange(self.shape[1], device=x.device)[:, None].expand(self.shape).reshape(-1)
        log_weight = look.log_psi - log_start
        cloud = _Cloud(x, look.z, look.x_0, look.x_0, look.pull, look.log_psi_moved, log_weight, ancestor)
        self._note(cloud, process.t_max)
        return cloud

    def _resampled(self, cloud: _Cloud, k: int) -> tuple[_Cloud, Tensor]:
        """Populations of small effective size again of equal weight, and the logarithm of the mean that they had."""
        particles = self.setup.particles
        log_weight = self._by_population(cloud.log_weight)
        poor = self.ess[-1] < self.setup.ess_threshold * particles
        if not bool(poor.any()):
            return cloud, torch.zeros_like(self.ess[-1])
        gained = torch.where(poor, log_weight.logsumexp(1) - math.log(particles), 0.0)
        stay = torch.arange(particles, device=log_weight.device)[:, None]
        chosen = systematic(log_weight, uniform(self._population_noise(_RESAMPLE, k)), particles)
        rows = rows_of(torch.where(poor[:, None], chosen, stay), particles)
        fresh = torch.where(poor[:, None], 0.0, log_weight).reshape(-1)
        return cloud.take(rows)._replace(log_weight=fresh), gained

    def _moved(self, cloud: _Cloud, step: Step, k: int) -> _Cloud:
        """One step: x_s ~ q, weights times p psi_s / (q psi_t)."""
        noise = self._noise(_STEP, k, self.conditioned.shape, cloud.x.dtype)
        x_0 = cloud.x_0 + step.ahead * (cloud.x_0 - cloud.before)
        reach = _REACH * math.sqrt(max(1, self.setup.num_seen))
        shift = within(reach * step.scale, step.on_score * cloud.pull)
        x = step.on_x * cloud.x + step.on_x_0 * x_0 + shift + step.scale * noise
        look = self._look(x, step.s, cloud.z, cloud.log_weight, k + 1)
        gain = log_proposal_ratio(noise, shift / step.scale) + look.log_psi - cloud.log_psi
        moved = cloud._replace(
            x=x,
            z=look.z,
            x_0=look.x_0,
            before=cloud.x_0,
            pull=look.pull,
            log_psi=look.log_psi_moved,
            log_weight=weighed(cloud.log_weight, gain),
        )
        self._note(moved, step.s)
        return moved

    def _ended(self, cloud: _Cloud, log_evidence: Tensor) -> Ended:
        """x_0 = E[x_0 | x_t] at the last time, weighed by the likelihood itself."""
        z = cloud.z if self.setup.others else None
        log_lik = self.conditioned.log_lik(cloud.x_0, z).log_prob.double()
        cloud = cloud._replace(log_weight=weighed(cloud.log_weight, log_lik - cloud.log_psi))
        self._note(cloud, 0.0)
        log_weight = self._by_population(cloud.log_weight)
        log_evidence = log_evidence + log_weight.logsumexp(1) - math.log(self.setup.particles)
        ess, ancestors = torch.stack(self.ess, 1), torch.stack(self.ancestors, 1)
        return Ended(cloud.x_0, cloud.z, log_weight, log_evidence, ess, ancestors)

    # --- guidance ---

    def _look(self, x: Tensor, t: float, z: Tensor, log_weight: Tensor, k: int) -> _Look:
        """Guidance at x_t, and z moved under it: one network call."""
        size, share = self.setup.rows_at_once, self.setup.share(k)
        columns = (x, z, *self._tried(z, log_weight, k))
        parts = [
            self._look_at(t, share, *part)
            for part in zip(*(value.split(size) for value in columns), strict=True)
        ]
        return parts[0] if len(parts) == 1 else _Look(*(torch.cat(y) for y in zip(*parts, strict=True)))

    def _look_at(
        self, t: float, share: float, x: Tensor, z: Tensor, tried: Tensor, log_uniform: Tensor
    ) -> _Look:
        setup = self.setup
        guided = setup.twist(self.conditioned, x, t, z if setup.others else None)
        pull, log_psi = setup.twist.shift(guided, share), share * guided.log_prob.double()
        if setup.others is None:
            return _Look(guided.x_0, pull, log_psi, z, log_psi)
        if share < 1:
            log_psi = log_psi + (1 - share) * setup.others.log_prob(z).double()
        gain = self._log_psi(guided, tried, share) - self._log_psi(guided, z, share)
        accepted = log_uniform < gain
        moved = log_psi + torch.where(accepted, gain, 0.0)
        return _Look(guided.x_0, pull, log_psi, torch.where(accepted[:, None], tried, z), moved)

    def _log_psi(self, guided: Guided, z: Tensor, share: float) -> Tensor:
        """What of log psi depends on z (`NoiseAware` sites know x_t alone): no network call."""
        seen = self.setup.twist.seen(self.conditioned, guided.seen_from, guided.covariance, z)
        log_psi = share * seen.log_prob.double()
        if share < 1 and self.setup.others:
            log_psi = log_psi + (1 - share) * self.setup.others.log_prob(z).double()
        return log_psi

    def _tried(self, z: Tensor, log_weight: Tensor, k: int) -> tuple[Tensor, Tensor]:
        """A random-walk proposal of the width of each population, and the logarithms of uniform numbers."""
        size = z.shape[1]
        if not size:
            return z, z.new_zeros(len(z))
        factor = spread(z.reshape(*self.shape, size), self._by_population(log_weight))
        normal = self._noise(_TRY, k, (size,), z.dtype).reshape(*self.shape, size)
        step = 2.38 / math.sqrt(size) * torch.einsum("rsij,rpsj->rpsi", factor, normal)
        accept = uniform(self._noise(_ACCEPT, k, (), torch.float64))
        return z + step.reshape(len(z), size), accept.log()

    # --- bookkeeping ---

    def _note(self, cloud: _Cloud, t: float) -> None:
        log_weight = self._by_population(cloud.log_weight)
        check_weights(log_weight, t, lambda row: self._blame(cloud, row))
        self.ess.append(effective_size(log_weight))
        self.ancestors.append(num_represented(self._by_population(cloud.ancestor)))
        self.show(smallest_ess=float(self.ess[-1].min()), ancestors=int(self.ancestors[-1].min()))

    def _blame(self, cloud: _Cloud, row: int) -> str:
        """What is not finite at a particle, in words."""
        x_0, z = cloud.x_0[row, None], cloud.z[row, None]
        if not bool(torch.isfinite(x_0).all()):
            return f"E[x_0 | x_t] of the prior at site {self.conditioned.name!r} is not finite"
        u = self.conditioned.join(x_0, z if self.setup.others else None)
        return f"{self.conditioned.density.blame(u)} is not finite"

    def _by_population(self, value: Tensor) -> Tensor:
        """`(rows,)` as `(runs, particles, sets)`."""
        return value.reshape(self.shape)

    def _noise(self, purpose: float, k: int, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """N(0, I) of each particle, `(rows, *shape)`."""
        runs, particles, sets = self.shape
        first, device = self.first * particles, self.conditioned.device
        noise = Noise(self.setup.seed, 1, runs * particles, shape, dtype, device, first, rows=sets)
        return noise(time_key(purpose, float(k)))

    def _population_noise(self, purpose: float, k: int) -> Tensor:
        """N(0, 1) of each population, `(runs, sets)`."""
        runs, _, sets = self.shape
        noise = Noise(self.setup.seed, 1, runs, (sets,), torch.float64, self.conditioned.device, self.first)
        return noise(time_key(purpose, float(k)))


def within(radius: float, shift: Tensor) -> Tensor:
    """Each row of `shift` `(n, *shape)`, no longer than `radius`; 0 where it is not finite.

    Between modes the gradient of log psi is steep for an instant: particles would be thrown beyond what it means.

    >>> within(1.0, torch.tensor([[3.0, 4.0], [0.3, 0.4]]))
    tensor([[0.6000, 0.8000],
            [0.3000, 0.4000]])
    """
    length = shift.flatten(1).norm(dim=1).reshape(-1, *[1] * (shift.ndim - 1))
    return torch.where(length.isfinite(), shift * (radius / length.clamp_min(radius)), 0.0)


def log_proposal_ratio(noise: Tensor, shift: Tensor) -> Tensor:
    """log p - log q at a point drawn from q, N(0, I) moved by `shift`: -z'd - |d|^2/2, `(n, *shape)` -> `(n,)`.

    >>> z, d = torch.tensor([[1.0, 2.0]]), torch.tensor([[0.5, 0.0]])
    >>> law = torch.distributions.Normal(0.0, 1.0)
    >>> torch.allclose(log_proposal_ratio(z, d), (law.log_prob(z + d) - law.log_prob(z)).sum(1).double())
    True
    """
    return -(shift * (noise + 0.5 * shift)).double().flatten(1).sum(1)


def weighed(log_weight: Tensor, gain: Tensor) -> Tensor:
    """log_weight + gain; particles without weight stay so, where the gain is the difference of infinities."""
    return torch.where(log_weight == -torch.inf, log_weight, log_weight + gain)


def uniform(normal: Tensor) -> Tensor:
    """Numbers in (0, 1), from standard normals."""
    return torch.special.ndtr(normal)
