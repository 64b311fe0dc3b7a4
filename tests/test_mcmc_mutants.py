"""Kernels with a mistake made on purpose: each fails a test that the right one passes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import pytest
import torch
from torch import Tensor
from torch.distributions import ExpTransform

from location_and_scale import PARAMETER_MOMENTS, Simulator, evaluate_by_hand, geweke, parameters, tuning
from mcmc_tools import max_r_hat, worst_z
from probgen import infer
from probgen.inference import hmc, mala
from probgen.inference.hmc import HMCKernel
from probgen.kernels import Evaluate, Kernel, Point, Stats, Tuning
from statistics_tools import ALLOWED_Z, Worst

Mistake = Callable[[pytest.MonkeyPatch, Simulator], Simulator]


# --- mistakes -----------------------------------------------------------------------------------------------------


def always_accept(old: Point, new: Point, log_ratio: Tensor, noise: Tensor) -> tuple[Point, Tensor, Tensor]:
    """Takes every proposal."""
    return new, torch.ones_like(log_ratio), torch.ones_like(log_ratio, dtype=torch.bool)


@dataclass(frozen=True)
class Altered:
    """A kernel that does something else around the steps of a right one."""

    kernel: Kernel
    static: ClassVar[bool] = True

    def normals(self, dim: int) -> int:
        return self.kernel.normals(dim)

    def start(self, evaluate: Evaluate, position: Tensor, noise: Tensor) -> Any:
        return self.kernel.start(evaluate, position, noise)


class StepsByPosition(Altered):
    """The step is the longer, the larger the first coordinate: the way back is proposed with another probability."""

    def step(self, evaluate: Evaluate, state: Any, tuning: Tuning, noise: Tensor) -> tuple[Any, Stats]:
        longer = (1 + 0.8 * torch.tanh(3 * (state.position[0] - 1))) * tuning.step_size
        return self.kernel.step(evaluate, state, tuning._replace(step_size=longer), noise)


class SameMomentum(Altered):
    """Every transition of a chain starts with the same momentum."""

    def step(self, evaluate: Evaluate, state: Any, tuning: Tuning, noise: Tensor) -> tuple[Any, Stats]:
        dim, n = state.position.shape
        momentum = torch.randn(dim, n, generator=torch.Generator().manual_seed(0), dtype=noise.dtype)
        return self.kernel.step(evaluate, state, tuning, torch.cat([momentum, noise[dim:]]))


def evaluate_without_jacobian(y: Tensor, u: Tensor) -> tuple[Tensor, Tensor]:
    """The density of (loc, scale) taken at u for that of u = (loc, log scale)."""
    value, grad = evaluate_by_hand(y, u)
    return value - u[1], grad - torch.tensor([[0.0], [1.0]])


def no_accept_step(module: Any) -> Mistake:
    def make(patch: pytest.MonkeyPatch, simulator: Simulator) -> Simulator:
        patch.setattr(module, "accept", always_accept)
        return simulator

    return make


def asymmetric_proposal(patch: pytest.MonkeyPatch, simulator: Simulator) -> Simulator:
    return simulator._replace(kernel=StepsByPosition(simulator.kernel))


def way_back_left_out(patch: pytest.MonkeyPatch, simulator: Simulator) -> Simulator:
    """Accepts by the ratio of densities alone, as if Langevin proposals were symmetric."""
    patch.setattr(mala, "kinetic_energy", lambda z: torch.zeros_like(z[0]))
    return simulator


def jacobian_dropped(patch: pytest.MonkeyPatch, simulator: Simulator) -> Simulator:
    return simulator._replace(evaluate=evaluate_without_jacobian)


class Mutant(NamedTuple):
    """A simulator of a right kernel, and what goes wrong in it."""

    simulator: Simulator
    mistake: Mistake


# Steps are long, so that the accept step has work to do.
LONG = Simulator(hmc.HMC(num_steps=3, jitter=0.0).kernel(), tuning(0.5))
LANGEVIN = Simulator(mala.MALA().kernel(), tuning(0.2))

MUTANTS = {
    "HMC without accept step": Mutant(LONG, no_accept_step(hmc)),
    "HMC with an asymmetric proposal": Mutant(LONG, asymmetric_proposal),
    "MALA without accept step": Mutant(LANGEVIN, no_accept_step(mala)),
    "MALA with an asymmetric proposal": Mutant(LANGEVIN, asymmetric_proposal),
    "MALA without the way back": Mutant(LANGEVIN, way_back_left_out),
    "Jacobian dropped": Mutant(LONG, jacobian_dropped),
}


# --- Geweke -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", MUTANTS)
def test_geweke_kills_mutants(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The right kernel passes at the same settings; its mutant does not."""
    simulator, mistake = MUTANTS[name]
    right = geweke(simulator, num_chains=10_000)
    assert right.size < ALLOWED_Z, right
    wrong = geweke(mistake(monkeypatch, simulator), num_chains=10_000)
    assert wrong.size > 1.5 * ALLOWED_Z, wrong


# --- through the whole of `infer` ---------------------------------------------------------------------------------

ENGINE = hmc.HMC(num_steps=4, num_warmup=200)


class Verdict(NamedTuple):
    """Of what `infer` draws from the parameters' prior: the worst z, and R-hat."""

    z: Worst
    r_hat: float


def verdict_on_prior() -> Verdict:
    posterior = infer(parameters, ENGINE, num_draws=600, num_chains=32, seed=0)
    draws = {name: posterior[name] for name in PARAMETER_MOMENTS}
    return Verdict(worst_z(draws, PARAMETER_MOMENTS), max_r_hat(draws))


def test_the_prior_is_drawn_right() -> None:
    verdict = verdict_on_prior()
    assert verdict.z.size < ALLOWED_Z, verdict
    assert verdict.r_hat < 1.01


def test_a_jacobian_dropped_from_transforms_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ExpTransform, "log_abs_det_jacobian", lambda self, x, y: torch.zeros_like(x))
    assert verdict_on_prior().z.size > 2 * ALLOWED_Z


def test_a_momentum_that_is_not_refreshed_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    """Chains stay apart; fresh data at every step would hide it from Geweke's test."""
    monkeypatch.setattr(hmc.HMC, "kernel", lambda engine: SameMomentum(HMCKernel(engine.num_steps)))
    assert verdict_on_prior().r_hat > 1.1
