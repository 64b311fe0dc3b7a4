"""Noising laws: three consistent conditionals, an SDE that has them, grids, and one network under several names."""

import math
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from probgen.core import InputError
from probgen.dynamics import AffineDenoiser, ClockedField, family_field, solve_ode, solve_sde
from probgen.processes import (
    EDM,
    OU,
    PREDICTIONS,
    VE,
    VP,
    WEIGHTINGS,
    CosineVP,
    Karras,
    OTPath,
    Power,
    Process,
    SubVP,
    as_grid,
    check_times,
    denoiser_coefficients,
    eps_from_denoised,
    output_from_denoised,
    over_event,
    score_from_denoised,
    velocity_coefficients,
)
from probgen.randomness import BrownianSteps, Noise
from statistics_tools import ALLOWED_Z, z_of_mean


@dataclass(frozen=True)
class ByCoordinate(Process):
    """sigma^2 = 1 - alpha^2 with alpha = exp(-rate t), another rate for each of three coordinates."""

    rates = torch.tensor([1.0, 3.0, 6.0], dtype=torch.float64)

    def alpha(self, t: Tensor) -> Tensor:
        return torch.exp(-t[:, None] * self.rates)

    def sigma(self, t: Tensor) -> Tensor:
        return (-torch.expm1(-2 * t[:, None] * self.rates)).sqrt()


PROCESSES = [
    pytest.param(VP(), id="linear"),
    pytest.param(VP(beta_min=5.0, beta_max=5.0), id="constant"),
    pytest.param(CosineVP(), id="cosine"),
    pytest.param(SubVP(), id="sub-VP"),
    pytest.param(OU(theta=0.7, s=1.3, tau_max=4.0), id="OU"),
    pytest.param(OTPath(), id="OT path"),
    pytest.param(VE(), id="VE"),
    pytest.param(EDM(), id="EDM"),
    pytest.param(ByCoordinate(), id="by coordinate"),
]
VARIANCE_PRESERVING = [PROCESSES[i] for i in (0, 1, 2, 8)]
NOISELESS_AT_ZERO = [PROCESSES[i] for i in (0, 1, 2, 3, 4, 5, 8)]
CLOSED_FORMS = PROCESSES[:-1]
TIMES = torch.tensor([0.003, 0.1, 0.37, 0.5, 0.82, 0.99], dtype=torch.float64)
EARLIER = TIMES * torch.tensor([0.5, 0.9, 0.1, 0.999, 0.3, 0.7], dtype=torch.float64)


def close(found: Tensor, expected: Tensor, rtol: float = 1e-9) -> None:
    torch.testing.assert_close(found, expected.expand_as(found).to(found), rtol=rtol, atol=1e-12)


def points(seed: int = 0) -> Tensor:
    return torch.randn(len(TIMES), 3, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


# --- the three laws -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("process", PROCESSES)
def test_noise_then_more_noise_is_the_marginal(process):
    """Chapman-Kolmogorov: q(x_t | x_s) after q(x_s | x_0) is q(x_t | x_0)."""
    x_0 = points()
    at_s, at_t = process.marginal(x_0, EARLIER), process.marginal(x_0, TIMES)
    step = process.transition(at_s.loc, EARLIER, TIMES)
    ratio = over_event(process.alpha(TIMES) / process.alpha(EARLIER), x_0)
    close(step.loc, at_t.loc)
    close(ratio.square() * at_s.scale.square() + step.scale.square(), at_t.scale.square())


@pytest.mark.parametrize("process", PROCESSES)
def test_bridge_is_bayes_rule(process):
    """q(x_s | x_t, x_0) = q(x_t | x_s) q(x_s | x_0) / q(x_t | x_0), wherever the three points are."""
    x_0, x_s, x_t = points(0), points(1), points(2)

    def log_prob(law, x):
        return torch.distributions.Normal(law.loc, law.scale).log_prob(x)

    found = log_prob(process.bridge(x_t, x_0, EARLIER, TIMES), x_s)
    step = log_prob(process.transition(x_s, EARLIER, TIMES), x_t)
    before, after = log_prob(process.marginal(x_0, EARLIER), x_s), log_prob(process.marginal(x_0, TIMES), x_t)
    close(found, step + before - after, 1e-7)


@pytest.mark.parametrize("process", NOISELESS_AT_ZERO)
def test_bridge_starts_at_the_data(process):
    x_0, x_t = points(0), points(2)
    bridge = process.bridge(x_t, x_0, torch.zeros_like(TIMES), TIMES)
    close(bridge.loc, x_0)
    assert not bridge.scale.any()


@pytest.mark.parametrize("process", PROCESSES)
def test_noise_grows(process):
    t = torch.linspace(0, 1, 201, dtype=torch.float64)
    assert (process.snr(t[1:]).diff(dim=0) < 0).all()
    close(process.alpha(t[:1]), torch.ones(1))


@pytest.mark.parametrize("process", NOISELESS_AT_ZERO)
def test_nothing_is_added_to_data(process):
    assert not process.sigma(torch.zeros(1, dtype=torch.float64)).any()


@pytest.mark.parametrize("process", VARIANCE_PRESERVING)
def test_variance_is_preserved(process):
    t = torch.linspace(0, 1, 201, dtype=torch.float64)
    close(process.alpha(t).square() + process.sigma(t).square(), torch.ones(1))


@pytest.mark.parametrize("process", PROCESSES[:3])
def test_sigma_is_precise_next_to_the_data(process):
    """1 - alpha^2 by subtraction has lost every digit at t = 1e-12."""
    t = torch.full((1,), 1e-12, dtype=torch.float64)
    ratio = process.sigma(t).square() / (process.diffusion2(torch.zeros_like(t)) * t)
    close(ratio, torch.ones(1), 1e-6)


# --- the SDE ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("process", PROCESSES)
def test_drift_and_diffusion_are_derivatives(process):
    """f = alpha'/alpha and g^2 = (sigma^2)' - 2 f sigma^2 by central differences; an error of 1e-6 is seen."""
    h = 1e-5
    times = TIMES.clamp(max=0.98)
    f = (process.alpha(times + h).log() - process.alpha(times - h).log()) / (2 * h)
    growth = (process.sigma(times + h).square() - process.sigma(times - h).square()) / (2 * h)
    torch.testing.assert_close(process.drift(times), f, rtol=1e-6, atol=1e-7)
    g2 = growth - 2 * f * process.sigma(times).square()
    torch.testing.assert_close(process.diffusion2(times), g2, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("process", CLOSED_FORMS)
@pytest.mark.parametrize("name", ["alpha_rate", "variance_rate", "drift", "diffusion2"])
def test_closed_forms_are_what_the_base_class_derives(process, name):
    """Which has nothing but alpha and sigma to go by."""

    class Bare(Process):
        alpha, sigma = staticmethod(process.alpha), staticmethod(process.sigma)

    close(getattr(process, name)(TIMES), getattr(Bare(), name)(TIMES), 1e-7)


@pytest.mark.parametrize("process", CLOSED_FORMS)
def test_rates_are_finite_at_both_ends(process):
    """f and g^2 are not, at the end of the OT path: the velocity is made of these alone."""
    ends = torch.tensor([0.0, 1.0], dtype=torch.float64)
    assert torch.isfinite(process.alpha_rate(ends)).all()
    assert torch.isfinite(process.variance_rate(ends)).all()
    assert all(torch.isfinite(c[1]) for c in velocity_coefficients(process, ends))


@pytest.mark.parametrize("process", PROCESSES)
def test_velocity_is_that_of_the_fokker_planck_equation(process):
    """alpha' x0hat + sigma' eps = f x - 1/2 g^2 score."""
    x_t, x0hat = points(0), points(1)
    on_x, on_x0hat = (over_event(c, x_t) for c in velocity_coefficients(process, TIMES))
    f, g2 = (over_event(c, x_t) for c in (process.drift(TIMES), process.diffusion2(TIMES)))
    score = score_from_denoised(process, x_t, x0hat, TIMES)
    close(on_x * x_t + on_x0hat * x0hat, f * x_t - 0.5 * g2 * score, 1e-6)


def test_table_of_the_processes():
    """sigma^2 and g^2 as printed in the papers."""
    t = TIMES
    integral = 0.1 * t + 0.5 * 19.9 * t.square()
    close(SubVP().sigma(t).square(), (1 - torch.exp(-integral)).square())
    close(SubVP().diffusion2(t), (0.1 + 19.9 * t) * (1 - torch.exp(-2 * integral)))
    close(VE(sigma_min=0.1, sigma_max=10.0).sigma(t).square(), 0.01 * 100.0 ** (2 * t))
    close(OU(theta=0.7).alpha(t), torch.exp(-3.5 * t))
    close(OU(theta=0.7, s=1.3).sigma(t).square(), 1.69 * (1 - torch.exp(-7.0 * t)) / 1.4)
    close(OTPath().diffusion2(t), 2 * t / (1 - t))
    close(EDM().sigma(t), (0.002 ** (1 / 7) + t * (80 ** (1 / 7) - 0.002 ** (1 / 7))) ** 7)


@pytest.mark.parametrize("process", CLOSED_FORMS)
def test_time_is_found_again_from_the_noise(process):
    t = TIMES.clamp(process.t_min, process.t_max)
    close(process.time_at(process.sigma(t) / process.alpha(t)), t, 1e-8)


@pytest.mark.parametrize("process", CLOSED_FORMS)
def test_weights_are_what_their_names_say(process):
    found = [process.weight(TIMES, name) for name in WEIGHTINGS]
    for weight, expected in zip(
        found, (process.sigma(TIMES).square(), process.diffusion2(TIMES), torch.ones_like(TIMES)), strict=True
    ):
        close(weight, expected)


def test_terminal_law_is_that_of_the_clamped_end():
    assert VE(sigma_max=30.0).terminal_scale().item() == pytest.approx(30.0)
    assert OTPath().terminal_scale().item() == pytest.approx(0.999)
    assert ByCoordinate().terminal_scale().shape == (3,)


def test_constant_rate_is_in_closed_form():
    close(VP(beta_min=5.0, beta_max=5.0).alpha(TIMES), torch.exp(-2.5 * TIMES))


def test_linear_rate_is_that_of_the_paper():
    """Song et al. (2021), eq. 33: alpha(1) = exp(-(20 - 0.1)/4 - 0.1/2)."""
    assert math.isclose(VP().alpha(torch.ones(1, dtype=torch.float64)).item(), math.exp(-19.9 / 4 - 0.05))


def test_cosine_is_that_of_the_paper_but_for_its_end():
    """Nichol & Dhariwal (2021), eq. 17, with the angle stretched a little less than to pi/2."""
    process, s = CosineVP(), 0.008
    paper = torch.cos((TIMES + s) / (1 + s) * math.pi / 2) / math.cos(s / (1 + s) * math.pi / 2)
    assert (process.alpha(TIMES) - paper).abs().max() < 0.0051
    close(process.alpha(torch.ones(1, dtype=torch.float64)), torch.tensor([0.005], dtype=torch.float64))


# --- one network, several names -----------------------------------------------------------------------------------


@pytest.mark.parametrize("process", PROCESSES)
@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_denoiser_and_output_are_two_readings_of_one_table(process, prediction):
    """Each output as its paper defines it, from x_0 and eps; from it the denoiser, from that the output again."""
    x_0, eps = points(0), points(1)
    alpha, sigma = over_event(process.alpha(TIMES), x_0), over_event(process.sigma(TIMES), x_0)
    x_t = alpha * x_0 + sigma * eps
    total = (alpha.square() + sigma.square()).sqrt()
    alpha_rate, variance_rate = (
        over_event(c(TIMES), x_0) for c in (process.alpha_rate, process.variance_rate)
    )
    output = {
        "x0": x_0,
        "eps": eps,
        "v": alpha * eps - sigma * x_0,
        "score": -eps / sigma,
        "velocity": alpha_rate * x_0 + variance_rate / (2 * sigma) * eps,
        "edm": (total.square() * x_0 - alpha * x_t) / (sigma * total),
    }[prediction]
    on_x, on_output = denoiser_coefficients(process, prediction, TIMES)
    close(over_event(on_x, x_t) * x_t + over_event(on_output, x_t) * output, x_0, 1e-6)
    close(output_from_denoised(process, prediction, x_t, x_0, TIMES), output, 1e-6)


def test_edm_output_is_that_of_the_paper():
    """Karras et al. (2022), table 1 with sigma_data = 1: D = c_skip x + c_out F."""
    sigma = EDM().sigma(TIMES)
    on_x, on_output = denoiser_coefficients(EDM(), "edm", TIMES)
    close(on_x, 1 / (1 + sigma.square()))
    close(on_output, sigma / (1 + sigma.square()).sqrt())


@pytest.mark.parametrize("process", PROCESSES)
def test_score_and_eps_follow_from_the_denoiser(process):
    """The score of q(x_t | x_0) by autograd; and score = -eps/sigma."""
    x_0, x_t = points(0), points(1).requires_grad_()
    law = process.marginal(x_0, TIMES)
    (score,) = torch.autograd.grad(torch.distributions.Normal(law.loc, law.scale).log_prob(x_t).sum(), x_t)
    x_t = x_t.detach()
    close(score_from_denoised(process, x_t, x_0, TIMES), score)
    close(eps_from_denoised(process, x_t, x_0, TIMES), -score * law.scale)


# --- grids --------------------------------------------------------------------------------------------------------


GRIDS = [Power(0.5), Power(1.0), Power(3.0), Karras(), Karras(rho=3.0)]


@pytest.mark.parametrize("grid", GRIDS, ids=str)
@pytest.mark.parametrize("process", CLOSED_FORMS)
def test_grid_runs_from_noise_to_data_with_its_speed(grid, process):
    schedule = grid.between(process.t_max, process.t_min, process)
    u, h = torch.linspace(0, 1, 33, dtype=torch.float64), 1e-6
    ends = torch.tensor([process.t_max, process.t_min], dtype=torch.float64)
    torch.testing.assert_close(schedule.time(u[[0, -1]]), ends, rtol=1e-9, atol=1e-9)
    assert (schedule.time(u).diff() < 0).all()
    inner = u[1:-1]
    speed = (schedule.time(inner + h) - schedule.time(inner - h)) / (2 * h)
    torch.testing.assert_close(schedule.speed(inner), speed, rtol=1e-5, atol=1e-7)


def test_karras_grid_is_uniform_in_a_root_of_the_noise():
    times = Karras().between(1.0, 0.0, VE()).time(torch.linspace(0, 1, 5, dtype=torch.float64))
    close((VE().sigma(times) ** (1 / 7)).diff().diff(), torch.zeros(3), 1.0)


def test_grids_go_by_their_names():
    assert as_grid("uniform") == Power(1.0)
    assert as_grid(grid := Power(1.7)) is grid


# --- laws that differ by coordinate, through the solvers ----------------------------------------------------------


SPREAD2 = torch.tensor([0.25, 2.0, 0.01], dtype=torch.float64)  # x_0 ~ N(0, SPREAD2), coordinates independent


def variance_at(process: Process, t: Tensor) -> Tensor:
    return process.alpha(t).square() * SPREAD2 + process.sigma(t).square()


def gaussian_field(steps: int, stochasticity: float) -> tuple[AffineDenoiser, ClockedField]:
    """With the exact denoiser x0hat = alpha SPREAD2 / (alpha^2 SPREAD2 + sigma^2) x."""
    process = ByCoordinate(t_min=1e-4)
    denoiser = AffineDenoiser(
        lambda x, t: process.alpha(t) * SPREAD2 / variance_at(process, t) * x,
        lambda t: denoiser_coefficients(process, "x0", t),
        process,
    )
    schedule = Power(2.0).between(process.t_max, process.t_min, process)
    return denoiser, family_field(denoiser, schedule, steps, lambda t: stochasticity * process.diffusion2(t))


def shrinkage(process: Process, t: Tensor) -> Tensor:
    """Standard deviation of E[x_0 | x_t]."""
    return process.alpha(t) * SPREAD2 / variance_at(process, t).sqrt()


def test_ode_takes_laws_that_differ_by_coordinate():
    """For a Gaussian the flow is linear: x_1 in standard deviations of its law stays what it is."""
    denoiser, field = gaussian_field(40, 0.0)
    process, last = denoiser.process, torch.tensor([1e-4], dtype=torch.float64)
    x_1 = Noise(0, 1, 100, (3,), torch.float64)(0)
    found = denoiser(solve_ode(field, x_1, "rk4"), 1e-4)
    expected = shrinkage(process, last) * x_1 / variance_at(process, torch.ones_like(last)).sqrt()
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=0)


def test_sde_takes_laws_that_differ_by_coordinate():
    """The variance of 40,000 draws is known to 0.7 %, its bias is below 1 %: an error of 5 % is seen."""
    noise = Noise(0, 1, 40_000, (3,), torch.float64)
    denoiser, field = gaussian_field(400, 1.0)
    x_1 = noise(0) * denoiser.process.terminal_scale()
    draws = denoiser(solve_sde(field, x_1, BrownianSteps(noise)), 1e-4)
    for column in (draws / shrinkage(denoiser.process, torch.tensor([1e-4], dtype=torch.float64))).unbind(1):
        assert abs(z_of_mean(column)) < ALLOWED_Z
        assert abs(column.var().item() - 1) < ALLOWED_Z * math.sqrt(2 / len(column)) + 0.01


# --- errors -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: VP(t_min=0.0), "unbounded at t = 0"),
        (lambda: VP(t_max=1.5), "t_max"),
        (lambda: VE(sigma_min=0.0), "sigma_min"),
        (lambda: VE(sigma_min=2.0, sigma_max=1.0), "sigma_min < sigma_max"),
        (lambda: EDM(rho=0.0), "rho"),
        (lambda: OU(tau_max=-1.0), "tau_max"),
        (lambda: VP().weight(TIMES, "sigma"), "did you mean 'sigma2'"),
        (lambda: Karras().between(1.0, 0.1, None), "has none"),
        (lambda: Karras().between(1.0, 0.1, ByCoordinate()), "one sigma a time"),
        (lambda: as_grid("quadratc"), "did you mean 'quadratic'"),
        (lambda: check_times("denoise", torch.tensor([0.5, 1.25])), "got 1.25"),
        (lambda: CosineVP(t_min=1.0), "t_min"),
        (lambda: VP(beta_min=0.0), "beta_min must lie in"),
        (lambda: VP(beta_max=-1.0), "beta_max must lie in"),
        (lambda: CosineVP(offset=-0.1), "offset"),
        (lambda: CosineVP(alpha_end=0.0), "alpha_end"),
        (lambda: CosineVP(alpha_end=1.0), "alpha_end"),
        (lambda: denoiser_coefficients(VP(), "epsilon", TIMES), "did you mean 'eps'"),
    ],
)
def test_bad_values_are_refused_by_name(build, message):
    with pytest.raises(InputError, match=message):
        build()
