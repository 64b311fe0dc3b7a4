"""The three diffusion engines draw from the right law: two checks on an asymmetric mixture, and mutants that fail them.

The *fine* check: with enough steps, 50,000 draws meet the exact means, covariances and component weights within 4.5
standard errors plus a bound on the discretisation, which another test measures by halving the number of steps. The
bound also holds what halving does not see: x_1 starts at N(0, sigma(1)^2) without alpha(1) = 0.0066 of the data (0.005
standard deviations of the mean), and the solvers stop at t = 0.001 (0.003).

The *coarse* check: with ten steps, 50,000 draws meet those of the published loop written out below, on noise of its
own, within 4.5 standard errors and no bound at all. It is there because a stochastic scheme that stops one step short
is still a consistent scheme of first order: at fine steps nothing tells its bias from an honest one.

Power: an average is known to 1/sqrt(50,000) = 0.0045 standard deviations of its statistic, so that, nine times of ten,
the fine check sees what shifts one by 0.026 + bound and the coarse check what shifts one by 0.037. An error of 2 % in
the spread shifts the total variance by 0.04 (in 2-D) and 0.11 (in 16-D) standard deviations.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache
from itertools import islice
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from probgen import DDPM, VP, Ancestral, ProbabilityFlowODE, ReverseSDE, infer
from probgen.dynamics import ClockedField, Velocity, family_field, steppers, torch_sde
from probgen.inference import ancestral, probability_flow_ode, reverse_sde
from probgen.models.gaussian_mixture import GaussianMixture
from probgen.processes import Power, Schedule, over_event
from probgen.randomness import BrownianSteps, forked_rng
from statistics_tools import (
    ALLOWED_Z,
    NUM_DRAWS,
    NoiseOfTwo,
    StepsOfTwo,
    Summary,
    Worst,
    exact_draws,
    exact_law,
    exact_mixture,
    largest_bias,
    largest_z,
    summary_of,
    two_sample_z,
)

COARSE_STEPS = 10
BATCH = 5000  # fits the cache
ENGINES = ("Ancestral", "ReverseSDE", "ProbabilityFlowODE")


# --- what is drawn, and by what -----------------------------------------------------------------------------------


class PredictsX0(nn.Module):
    """The mixture as a network; asked at one time for the whole batch, it is told so, which is three times faster."""

    def __init__(self, mixture: GaussianMixture) -> None:
        super().__init__()
        self.mixture = mixture

    def forward(self, x_t: Tensor, t: Tensor) -> Tensor:
        return self.mixture.denoise(x_t, t[:1] if t.stride() == (0,) else t)


def chain_of(mixture: GaussianMixture, num_steps: int) -> DDPM:
    """The hierarchical chain with the perfect network; its constants are set from exact draws."""
    dim = mixture.event_shape[0]
    options = {"prediction": "x0", "reverse_variance": "analytic", "last_step": "x0hat"}
    ddpm = DDPM(PredictsX0(mixture), VP(), num_steps, event_shape=(dim,), **options)
    with torch.no_grad(), forked_rng(0):
        ddpm.calibrate(exact_draws(dim)[:20_000].to(mixture.locs.dtype))
    return ddpm


@dataclass(frozen=True)
class Setting:
    """An engine with a number of steps on the mixture in `dim` dimensions, and the bias it is allowed, in sd."""

    engine: str
    dim: int
    steps: int
    power: float = 1.0
    method: str = "euler"
    bound: float = 0.0

    def __str__(self) -> str:
        return f"{self.engine}-{self.dim}d"

    def program(self, mixture: GaussianMixture) -> Any:
        return chain_of(mixture, self.steps) if self.engine == "Ancestral" else mixture

    def build(self) -> Any:
        if self.engine == "Ancestral":
            return Ancestral(batch_size=BATCH)
        if self.engine == "ReverseSDE":
            return ReverseSDE(self.steps, Power(self.power), batch_size=BATCH)
        return ProbabilityFlowODE(self.steps, self.method, Power(self.power), batch_size=BATCH)

    def draw(self, program: Any, seed: int = 0) -> Tensor:
        return infer(program, self.build(), num_draws=NUM_DRAWS, seed=seed).flat("x")


FINE = (
    Setting("Ancestral", 2, 500, bound=0.012),
    Setting("Ancestral", 16, 800, bound=0.02),
    Setting("ReverseSDE", 2, 400, power=1.25, bound=0.01),
    Setting("ReverseSDE", 16, 400, power=1.25, bound=0.02),
    Setting("ProbabilityFlowODE", 2, 12, power=2.0, method="rk4", bound=0.01),
    Setting("ProbabilityFlowODE", 16, 12, power=2.0, method="rk4", bound=0.01),
)
COARSE = tuple(Setting(engine, dim, COARSE_STEPS) for engine in ENGINES for dim in (2, 16))


def fresh_mixture(dim: int) -> GaussianMixture:
    return GaussianMixture.example(dim).float()


@cache
def fine_draws(setting: Setting) -> Tensor:
    return setting.draw(setting.program(fresh_mixture(setting.dim)))


@cache
def fine_summary(setting: Setting) -> Summary:
    return summary_of(setting.dim, fine_draws(setting))


def fine_check(setting: Setting, found: Summary) -> Worst:
    """Standard errors by which the worst statistic misses its exact value, beyond the bound."""
    return largest_z(found, exact_law(setting.dim), NUM_DRAWS, setting.bound)


# --- the published loops, as plain as they are printed ------------------------------------------------------------


def textbook_chain(ddpm: DDPM, z: Callable[[], Tensor]) -> Tensor:
    """Ho et al. (2020), algorithm 2, with the mean of q(x_{k-1} | x_k, x_0) at x_0 = x0hat."""
    steps = ddpm.num_steps
    abar = VP().alpha(torch.arange(steps + 1, dtype=torch.float64) / steps).square()
    x = z()
    for k in range(steps, 0, -1):
        x0hat = ddpm.network(x, torch.full((1,), k / steps, dtype=torch.float64))
        beta = 1 - abar[k] / abar[k - 1]
        on_x0 = abar[k - 1].sqrt() * beta / (1 - abar[k])
        mean = on_x0 * x0hat + (1 - beta).sqrt() * (1 - abar[k - 1]) / (1 - abar[k]) * x
        variance = beta * (1 - abar[k - 1]) / (1 - abar[k]) + on_x0.square() * ddpm.x0_variance[k - 1]
        x = mean + (variance.sqrt() if k > 1 else ddpm.log_last_scale.exp()) * z()
    return x.detach()


def textbook_solver(mixture: GaussianMixture, z: Callable[[], Tensor], steps: int, a: int) -> Tensor:
    """Euler-Maruyama on Song et al. (2021): the reverse SDE for a = 1, the probability-flow ODE for a = 0."""
    process = mixture.process()
    times = torch.linspace(1, process.t_min, steps + 1, dtype=torch.float64)
    x = process.sigma(times[:1]) * z()
    for t, dt in zip(times[:-1], times.diff(), strict=True):
        beta = 0.1 + 19.9 * t
        x = x + (-0.5 * beta * x - 0.5 * (1 + a) * beta * mixture.score(x, t[None])) * dt
        x = x + a * (beta * dt.abs()).sqrt() * z()
    return mixture.denoise(x, times[-1:])


@cache
def textbook_summary(setting: Setting) -> Summary:
    generator = torch.Generator().manual_seed(setting.dim)

    def z() -> Tensor:
        return torch.randn(NUM_DRAWS, setting.dim, dtype=torch.float64, generator=generator)

    mixture = exact_mixture(setting.dim)
    if setting.engine == "Ancestral":
        x = textbook_chain(chain_of(mixture, setting.steps), z)
    else:
        x = textbook_solver(mixture, z, setting.steps, a=int(setting.engine == "ReverseSDE"))
    return summary_of(setting.dim, x)


def coarse_check(setting: Setting, found: Summary) -> Worst:
    """Standard errors between the engine's and the published loop's worst statistic."""
    return two_sample_z(found, textbook_summary(setting), NUM_DRAWS)


# --- the engines pass ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("setting", FINE, ids=str)
def test_draws_meet_the_exact_moments(setting):
    assert setting.bound <= 0.02
    z, name = fine_check(setting, fine_summary(setting))
    assert z < ALLOWED_Z, name


@pytest.mark.parametrize("setting", FINE, ids=str)
def test_discretisation_stays_within_its_bound(setting, monkeypatch):
    """At twice the step on the same noise; for a scheme of first order the difference is the bias at the finer step."""
    fine, run_chain = fine_summary(setting), ancestral.run_chain  # drawn before the noise is exchanged
    monkeypatch.setattr(
        ancestral, "run_chain", lambda chain, net, noise: run_chain(chain, net, NoiseOfTwo(**vars(noise)))
    )
    monkeypatch.setattr(reverse_sde, "BrownianSteps", StepsOfTwo)
    coarser = replace(setting, steps=setting.steps // 2)
    found = summary_of(setting.dim, coarser.draw(coarser.program(fresh_mixture(setting.dim))))
    bias, name = largest_bias(found, fine, exact_law(setting.dim))
    assert bias < setting.bound, name


@pytest.mark.parametrize("setting", COARSE, ids=str)
def test_few_steps_follow_the_published_loop(setting):
    draws = setting.draw(setting.program(fresh_mixture(setting.dim)))
    z, name = coarse_check(setting, summary_of(setting.dim, draws))
    assert z < ALLOWED_Z, name


@pytest.mark.parametrize("dim", [2, 16])
def test_exact_draws_pass_the_check(dim):
    """With no bound at all: the statistics themselves are unbiased."""
    z, name = largest_z(exact_law(dim), exact_law(dim), NUM_DRAWS)
    assert z < ALLOWED_Z, name


# --- mutants fail -------------------------------------------------------------------------------------------------
# Each takes a monkeypatch, the setting and the mixture, and returns the program to draw from.

Mutant = Callable[[pytest.MonkeyPatch, Setting, GaussianMixture], Any]


def score_sign_flipped(patch: pytest.MonkeyPatch, setting: Setting, mixture: GaussianMixture) -> Any:
    """alpha x0hat - x becomes x - alpha x0hat."""
    denoise, process = mixture.denoise, mixture.process()
    patch.setattr(mixture, "denoise", lambda x, t: 2 * x / over_event(process.alpha(t), x) - denoise(x, t))
    return setting.program(mixture)


class SquareForgotten(VP):
    """g where g^2 belongs; the drift is right."""

    def drift(self, t: Tensor) -> Tensor:
        return VP().drift(t)

    def diffusion2(self, t: Tensor) -> Tensor:
        return VP().diffusion2(t).sqrt()

    def variance_rate(self, t: Tensor) -> Tensor:
        return self.diffusion2(t) + 2 * self.drift(t) * self.sigma(t).square()


def g_for_g2(patch: pytest.MonkeyPatch, setting: Setting, mixture: GaussianMixture) -> Any:
    patch.setattr(mixture, "_process", SquareForgotten())
    return setting.program(mixture)


def _with_chain(patch: pytest.MonkeyPatch, ddpm: DDPM, **changes: Callable[[Tensor], Tensor]) -> DDPM:
    chain = ddpm.reverse_chain()
    changed = replace(chain, **{name: change(getattr(chain, name)) for name, change in changes.items()})
    patch.setattr(ddpm, "reverse_chain", lambda: changed)
    return ddpm


def variance_for_scale(patch: pytest.MonkeyPatch, setting: Setting, mixture: GaussianMixture) -> Any:
    """What g for g^2 is to a chain: its square root forgotten."""
    return _with_chain(patch, setting.program(mixture), scale=torch.square)


def half_forgotten(patch: pytest.MonkeyPatch, setting: Setting, mixture: GaussianMixture) -> Any:
    """The ODE with the drift of the SDE: f x - g^2 score."""

    def field_of_the_sde(velocity: Velocity, schedule: Schedule, steps: int) -> ClockedField:
        return family_field(velocity.denoiser, schedule, steps, velocity.process.diffusion2)

    patch.setattr(probability_flow_ode, "flow_field", field_of_the_sde)
    return setting.program(mixture)


def half_too_many(patch: pytest.MonkeyPatch, setting: Setting, mixture: GaussianMixture) -> Any:
    """The SDE with the drift of the ODE: f x - 1/2 g^2 score."""

    def of_the_ode(
        denoiser: Any, schedule: Schedule, steps: int, noise2: Callable[[Tensor], Tensor]
    ) -> ClockedField:
        field = family_field(denoiser, schedule, steps, noise2)
        flow = family_field(denoiser, schedule, steps, torch.zeros_like)
        patch.setattr(field, "drift_at", lambda t: (*flow.drift_at(t)[:2], noise2(t)))
        return field

    patch.setattr(reverse_sde, "family_field", of_the_ode)
    return setting.program(mixture)


class QuietSteps(BrownianSteps):
    """sqrt 2 forgotten."""

    def increment(self, a: float, b: float) -> Tensor:
        return super().increment(a, b) / 2**0.5


def noise_too_small(patch: pytest.MonkeyPatch, setting: Setting, mixture: GaussianMixture) -> Any:
    patch.setattr(reverse_sde, "BrownianSteps", QuietSteps)
    program = setting.program(mixture)
    return (
        _with_chain(patch, program, scale=lambda s: s / 2**0.5) if setting.engine == "Ancestral" else program
    )


def one_step_short(patch: pytest.MonkeyPatch, setting: Setting, mixture: GaussianMixture) -> Any:
    """n - 1 of n steps, the last left out."""
    one_step, states = steppers._step, torch_sde.sde_states
    patch.setattr(
        steppers,
        "_step",
        lambda f, tableau, k, x: x if k == f.num_steps - 1 else one_step(f, tableau, k, x),
    )
    patch.setattr(
        torch_sde, "sde_states", lambda field, *rest: islice(states(field, *rest), field.num_steps - 1)
    )
    program = setting.program(mixture)
    if setting.engine != "Ancestral":
        return program
    return _with_chain(
        patch, program, **dict.fromkeys(("times", "on_x", "on_output", "scale"), lambda v: v[:-1])
    )


def asked(shift: int) -> Mutant:
    """The network is asked at the time of the step after (+1) or before (-1) its own."""

    def mutant(patch: pytest.MonkeyPatch, setting: Setting, mixture: GaussianMixture) -> Any:
        at, steps = ClockedField.at, setting.steps

        def shifted(field: ClockedField, u: float, x: Tensor) -> tuple[Any, ...]:
            return at(field, u, x)._replace(t=at(field, min(max(u + shift, 0.0), float(steps)), x).t)

        patch.setattr(ClockedField, "at", shifted)
        program = setting.program(mixture)
        if setting.engine != "Ancestral":
            return program
        return _with_chain(patch, program, times=lambda t: (t - shift / steps).clamp(1e-3, 1))

    return mutant


def wrong_row(patch: pytest.MonkeyPatch, setting: Setting, mixture: GaussianMixture) -> Any:
    """The coefficients of the next step with the network's right time."""
    at, last = ClockedField.at, float(setting.steps)
    patch.setattr(ClockedField, "at", lambda f, u, x: at(f, min(u + 1, last), x)._replace(t=at(f, u, x).t))
    program = setting.program(mixture)
    if setting.engine != "Ancestral":
        return program
    return _with_chain(
        patch, program, **dict.fromkeys(("on_x", "on_output", "scale"), lambda v: torch.cat((v[1:], v[-1:])))
    )


SCHEDULES = {"n - 1 steps": one_step_short, "early": asked(1), "late": asked(-1), "wrong row": wrong_row}
MUTANTS: dict[str, dict[str, Mutant]] = {
    "Ancestral": {
        "score sign": score_sign_flipped,
        "variance for scale": variance_for_scale,
        "missing sqrt 2": noise_too_small,
        **SCHEDULES,
    },
    "ReverseSDE": {
        "score sign": score_sign_flipped,
        "g for g^2": g_for_g2,
        "surplus 1/2": half_too_many,
        "missing sqrt 2": noise_too_small,
        **SCHEDULES,
    },
    "ProbabilityFlowODE": {
        "score sign": score_sign_flipped,
        "g for g^2": g_for_g2,
        "missing 1/2": half_forgotten,
        **SCHEDULES,
    },
}


def mutated(name: str, setting: Setting, patch: pytest.MonkeyPatch) -> Summary:
    program = MUTANTS[setting.engine][name](patch, setting, fresh_mixture(setting.dim))
    return summary_of(setting.dim, setting.draw(program))


INVISIBLE_AT_FINE_STEPS = {
    ("Ancestral", "n - 1 steps"),
    ("ReverseSDE", "n - 1 steps"),
}


def every_mutant(settings: tuple[Setting, ...]) -> list[Any]:
    """In 16-D, or by many steps of a stochastic engine, a mutant costs seconds: those run with the slow tests."""
    return [
        pytest.param(
            setting, name, id=f"{setting}, {name}", marks=[pytest.mark.slow] * (setting.dim == 16 or slow)
        )
        for setting in settings
        for name in MUTANTS[setting.engine]
        for slow in [setting.steps > 100]
    ]


@pytest.mark.parametrize(("setting", "name"), every_mutant(COARSE))
def test_mutants_fail_the_coarse_check(setting, name, monkeypatch):
    assert coarse_check(setting, mutated(name, setting, monkeypatch)).size > ALLOWED_Z


@pytest.mark.parametrize(("setting", "name"), every_mutant(FINE))
def test_mutants_fail_the_fine_check(setting, name, monkeypatch):
    found = mutated(name, setting, monkeypatch)
    assert (fine_check(setting, found).size > ALLOWED_Z) == (
        (setting.engine, name) not in INVISIBLE_AT_FINE_STEPS
    )


@pytest.mark.parametrize("factor", [0.98, 1.02])
@pytest.mark.parametrize("setting", FINE, ids=str)
def test_two_percent_of_the_spread_fail_the_fine_check(setting, factor):
    draws = fine_draws(setting).double()
    centre = exact_mixture(setting.dim).mean
    assert fine_check(setting, summary_of(setting.dim, centre + factor * (draws - centre))).size > ALLOWED_Z
