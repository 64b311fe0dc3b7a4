"""azula's samplers of x given y, as engines: what judges ours judges them.

Each has the exact denoiser of the testbed, at the noise levels of its process, in steps of equal time, the default
there. Settings are azula's defaults where it has any.

- `azula_DPS`: zeta = 1. The norm is taken for each draw, as if drawn one by one: azula takes one over a whole batch.
- `azula_PiGDM`: eta = 1, the pseudo-inverse of A; it knows nothing of the noise on y.
- `azula_TMPD`, `azula_MMPS`: DDPM steps; MMPS solves with as many iterations of GMRES as y has numbers.
- `azula_TDS`: populations for one y at a time, with the twist of our `PiGDM`, N(y; A x0hat, noise^2 I + r^2 A A').
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from azula.denoise import Denoiser, DiracPosterior
from azula.guidance import DPSSampler, MMPSDenoiser, PGDMSampler, TDSSampler, TMPDenoiser
from azula.linalg.covariance import IsotropicCovariance
from azula.noise import Schedule
from azula.sample import DDPMSampler
from torch import Tensor

from benchmarks.calibration_testbeds import DTYPE, Testbed
from probgen.core import Cost, Engine, Posterior, Target, UnsupportedError
from probgen.randomness import forked_rng


class ProcessSchedule(Schedule):
    """alpha and sigma of the testbed's process."""

    def __init__(self, bed: Testbed) -> None:
        self.process = bed.prior.process()

    def __call__(self, t: Tensor) -> tuple[Tensor, Tensor]:
        return self.process.alpha(t), self.process.sigma(t)


class Exact(Denoiser):
    """E[x_0 | x_t], its calls counted."""

    def __init__(self, bed: Testbed) -> None:
        super().__init__()
        self.prior, self.schedule, self.calls = bed.prior, ProcessSchedule(bed), 0

    def forward(self, x_t: Tensor, t: Tensor, **_: Any) -> DiracPosterior:
        self.calls += 1
        return DiracPosterior(self.prior.denoise(x_t, t.reshape(1)))


@dataclass(frozen=True)
class Azula(Engine):
    """Draws by one of `SAMPLERS` for all rows of y side by side, or one y after another.

    Args:
        name: of the sampler.
        bed: whose program it is given.
        steps: network calls, each with one way back or more.
        particles: of a population.
    """

    name: str
    bed: Testbed
    steps: int
    particles: int
    kind = "approximate"
    guarantee = "approximate"
    conditions: ClassVar[bool] = True
    data_sets: ClassVar[bool] = True

    def run(self, target: Target, *, num_draws: int, num_chains: int, seed: int, **_: Any) -> Posterior:
        """See `Engine.run`."""
        if not is_linear(self.bed):
            raise UnsupportedError("azula's samplers are given y that is linear in x.")
        started, denoiser = time.perf_counter(), Exact(self.bed)
        total = num_chains * num_draws
        with forked_rng(seed):
            x = self._draw(denoiser, target.sets["y"], total)
        draws = x.unflatten(0, (num_chains, num_draws))
        ways_back = {"TMPD": 2, "MMPS": 1 + target.sets["y"].shape[1]}.get(self.name, 1)
        cost = Cost(denoiser.calls, ways_back * denoiser.calls, time.perf_counter() - started)
        return Posterior({"x": draws}, self.kind, self.guarantee, self.name, cost, target=target)

    def _draw(self, denoiser: Exact, y: Tensor, total: int) -> Tensor:
        """`(total, num_sets, dim)`."""
        if self.name == "TDS":
            return torch.stack([self._populations(denoiser, row, total) for row in y], 1)
        sampler = SAMPLERS[self.name](self.bed, denoiser, y.repeat(total, 1), self._options)
        return sampler(self._start(total * len(y))).unflatten(0, (total, len(y)))

    def _populations(self, denoiser: Exact, y: Tensor, total: int) -> Tensor:
        """As many as it takes for `total` draws."""
        sampler = tds(self.bed, denoiser, y, self._options)
        count = -(-total // self.particles)
        x = torch.cat([sampler(self._start(self.particles)) for _ in range(count)])
        return x[torch.randperm(len(x))[:total]]

    def _start(self, rows: int) -> Tensor:
        return torch.randn(rows, self.bed.prior.event_shape[0], dtype=DTYPE)

    @property
    def _options(self) -> dict[str, Any]:
        process = self.bed.prior.process()
        ends = {"start": process.t_max, "stop": process.t_min}
        return {"steps": self.steps, "silent": True, "dtype": DTYPE, **ends}


def dps(bed: Testbed, denoiser: Exact, y: Tensor, options: dict[str, Any]) -> DPSSampler:
    """Sees the sum of the norms of all rows, whose gradient is that of each row's own."""

    def total(x: Tensor) -> Tensor:
        return torch.linalg.vector_norm(y - bed.observe(x), dim=1).sum().reshape(1)

    return DPSSampler(denoiser, y=torch.zeros(1, dtype=DTYPE), A=total, **options)


def pigdm(bed: Testbed, denoiser: Exact, y: Tensor, options: dict[str, Any]) -> PGDMSampler:
    inverse = torch.linalg.pinv(matrix(bed))
    return PGDMSampler(denoiser, y=y, A=bed.observe, A_inv=lambda v: v @ inverse.mT, eta=1.0, **options)


def tmpd(bed: Testbed, denoiser: Exact, y: Tensor, options: dict[str, Any]) -> DDPMSampler:
    guided = TMPDenoiser(denoiser, y=y, A=bed.observe, var_y=bed.noise**2)
    return DDPMSampler(guided, **options)


def mmps(bed: Testbed, denoiser: Exact, y: Tensor, options: dict[str, Any]) -> DDPMSampler:
    noise = IsotropicCovariance(torch.tensor(bed.noise**2, dtype=DTYPE))
    guided = MMPSDenoiser(denoiser, y=y, A=bed.observe, cov_y=noise, iterations=y.shape[1])
    return DDPMSampler(guided, **options)


def tds(bed: Testbed, denoiser: Exact, y: Tensor, options: dict[str, Any]) -> TDSSampler:
    operator = matrix(bed)
    seen, noise = operator @ operator.mT, bed.noise**2 * torch.eye(len(operator), dtype=DTYPE)

    def twist(x_hat: Tensor, ratio: Tensor) -> Tensor:
        covariance = noise + ratio**2 / (1 + ratio**2) * seen
        return torch.distributions.MultivariateNormal(bed.observe(x_hat), covariance).log_prob(y)

    return TDSSampler(denoiser, twist, **options)


def is_linear(bed: Testbed) -> bool:
    x = torch.eye(bed.prior.event_shape[0], dtype=DTYPE)
    return torch.allclose(bed.observe(2 * x), 2 * bed.observe(x))


def matrix(bed: Testbed) -> Tensor:
    """A `(m, dim)` of a linear observation."""
    return bed.observe(torch.eye(bed.prior.event_shape[0], dtype=DTYPE)).mT


SAMPLERS: dict[str, Callable[[Testbed, Exact, Tensor, dict[str, Any]], Callable[[Tensor], Tensor]]] = {
    "DPS": dps,
    "PiGDM": pigdm,
    "TMPD": tmpd,
    "MMPS": mmps,
    "TDS": tds,
}
