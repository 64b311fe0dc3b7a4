"""Noising laws: three consistent conditionals, an SDE that has them, grids, and one network under several names."""

import math
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from probgen.core import InputError
from probgen.dynamics import AffineDenoiser, ReverseField, solve_ode, solve_sde
from probgen.processes import (
    PREDICTIONS,
    VP,
    CosineVP,
    Grid,
    Process,
    denoiser_coefficients,
    eps_from_denoised,
    over_event,
    score_from_denoised,
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
    pytest.param(ByCoordinate(), id="by coordinate"),
]
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


@pytest.mark.parametrize("process", PROCESSES)
def test_bridge_starts_at_the_data(process):
    x_0, x_t = points(0), points(2)
    bridge = process.bridge(x_t, x_0, torch.zeros_like(TIMES), TIMES)
    close(bridge.loc, x_0)
    assert not bridge.scale.any()


@pytest.mark.parametrize("process", PROCESSES)
def test_noise_grows_and_nothing_is_added_to_data(process):
    t = torch.linspace(0, 1, 201, dtype=torch.float64)
    assert (process.snr(t[1:]).diff(dim=0) < 0).all()
    close(process.alpha(t[:1]), torch.ones(1))
    assert not process.sigma(t[:1]).any()
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


@pytest.mark.parametrize("process", PROCESSES[:3])
def test_closed_forms_are_what_the_base_class_derives(process):
    close(process.drift(TIMES), Process.drift(process, TIMES), 1e-8)
    close(process.diffusion2(TIMES), Process.diffusion2(process, TIMES), 1e-8)


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
def test_denoiser_recovers_the_data_from_each_output(process, prediction):
    x_0, eps = points(0), points(1)
    alpha, sigma = over_event(process.alpha(TIMES), x_0), over_event(process.sigma(TIMES), x_0)
    x_t = alpha * x_0 + sigma * eps
    output = {"x0": x_0, "eps": eps, "v": alpha * eps - sigma * x_0}[prediction]
    on_x, on_output = denoiser_coefficients(process, prediction, TIMES)
    close(over_event(on_x, x_t) * x_t + over_event(on_output, x_t) * output, x_0, 1e-7)


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


@pytest.mark.parametrize("power", [0.5, 1.0, 1.5, 2.0, 3.0])
def test_grid_runs_from_noise_to_data_with_its_speed(power):
    grid, u, h = Grid(t_min=1e-3, power=power), torch.linspace(0, 1, 33, dtype=torch.float64), 1e-6
    close(grid.time(u[[0, -1]]), torch.tensor([1.0, 1e-3], dtype=torch.float64))
    assert (grid.time(u).diff() < 0).all()
    inner = u[1:-1]
    speed = (grid.time(inner + h) - grid.time(inner - h)) / (2 * h)
    torch.testing.assert_close(grid.speed(inner), speed, rtol=1e-6, atol=1e-8)


# --- laws that differ by coordinate, through the solvers ----------------------------------------------------------


SPREAD2 = torch.tensor([0.25, 2.0, 0.01], dtype=torch.float64)  # x_0 ~ N(0, SPREAD2), coordinates independent


def variance_at(process: Process, t: Tensor) -> Tensor:
    return process.alpha(t).square() * SPREAD2 + process.sigma(t).square()


def gaussian_field(steps: int, stochasticity: float) -> ReverseField:
    """With the exact denoiser x0hat = alpha SPREAD2 / (alpha^2 SPREAD2 + sigma^2) x."""
    process = ByCoordinate(t_min=1e-4)
    denoiser = AffineDenoiser(
        lambda x, t: process.alpha(t) * SPREAD2 / variance_at(process, t) * x,
        lambda t: denoiser_coefficients(process, "x0", t),
        process,
    )
    return ReverseField(denoiser, Grid(process.t_min, power=2.0), steps, stochasticity)


def shrinkage(process: Process, t: Tensor) -> Tensor:
    """Standard deviation of E[x_0 | x_t]."""
    return process.alpha(t) * SPREAD2 / variance_at(process, t).sqrt()


def test_ode_takes_laws_that_differ_by_coordinate():
    """For a Gaussian the flow is linear: x_1 in standard deviations of its law stays what it is."""
    field = gaussian_field(40, 0.0)
    process, last = field.denoiser.process, torch.tensor([1e-4], dtype=torch.float64)
    x_1 = Noise(0, 1, 100, (3,), torch.float64)(0)
    found = field.finish(solve_ode(field, x_1, "rk4", 1e-6, 1e-6))
    expected = shrinkage(process, last) * x_1 / variance_at(process, torch.ones_like(last)).sqrt()
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=0)


def test_sde_takes_laws_that_differ_by_coordinate():
    """The variance of 40,000 draws is known to 0.7 %, its bias is below 1 %: an error of 5 % is seen."""
    noise = Noise(0, 1, 40_000, (3,), torch.float64)
    field = gaussian_field(400, 1.0)
    draws = field.finish(solve_sde(field, field.start(noise(0)), BrownianSteps(noise)))
    for column in (
        draws / shrinkage(field.denoiser.process, torch.tensor([1e-4], dtype=torch.float64))
    ).unbind(1):
        assert abs(z_of_mean(column)) < ALLOWED_Z
        assert abs(column.var().item() - 1) < ALLOWED_Z * math.sqrt(2 / len(column)) + 0.01


# --- errors -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: VP(t_min=0.0), "t_min"),
        (lambda: CosineVP(t_min=1.0), "t_min"),
        (lambda: VP(beta_min=0.0), "positive rates"),
        (lambda: VP(beta_max=-1.0), "positive rates"),
        (lambda: CosineVP(offset=-0.1), "offset"),
        (lambda: CosineVP(alpha_end=0.0), "alpha_end"),
        (lambda: CosineVP(alpha_end=1.0), "alpha_end"),
        (lambda: denoiser_coefficients(VP(), "epsilon", TIMES), "did you mean 'eps'"),
    ],
)
def test_bad_values_are_refused_by_name(build, message):
    with pytest.raises(InputError, match=message):
        build()
