"""The latent SDE: its bound against a recursion written from the SDE itself, its weight, its draws, its limits."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from itertools import combinations
from typing import Any

import pyro
import pytest
import torch
from pyro.infer import TraceMeanField_ELBO
from torch import Tensor, nn

from probgen import (
    ELBO,
    VP,
    Ancestral,
    Batch,
    ELBOEstimate,
    InputError,
    Labels,
    NeuralSDE,
    Optim,
    ProbabilityFlowODE,
    TimeMLP,
    evidence,
    fit,
    infer,
)
from probgen.core import Chained, Stepwise
from probgen.models import neural_sde
from probgen.processes import OU, VE, OTPath, Process
from probgen.randomness import forked_rng
from statistics_tools import ALLOWED_Z, z_of_mean

LOC, VARIANCE = 0.7, 0.3
Width = Callable[[Tensor], Tensor]


def g(t: Tensor) -> Tensor:
    return VP().diffusion2(t).sqrt()


WIDTHS: dict[str, Width] = {"g": g, "0.7 g": lambda t: 0.7 * g(t), "2 sigma": lambda t: 2 * VP().sigma(t)}


class Exact(nn.Module):
    """E[x_0 | x_t] for data N(LOC, VARIANCE), or the drift that follows from it for diffusion w."""

    event_shape = (1,)

    def __init__(self, process: Process, width: Width | None = None) -> None:
        super().__init__()
        self.process, self.width = process, width

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        alpha, sigma = self.process.alpha(t)[:, None], self.process.sigma(t)[:, None]
        gain = alpha * VARIANCE / (alpha**2 * VARIANCE + sigma**2)
        x0hat = LOC + gain * (x - alpha * LOC)
        if self.width is None:
            return x0hat
        on_x, on_x_0 = (value[:, None] for value in conditional_drift(self.process, self.width(t), t))
        return on_x * x + on_x_0 * x0hat


class Zero(nn.Module):
    """No data but 0."""

    event_shape = (1,)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        return 0 * x


def conditional_drift(process: Process, w: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
    """Factors on x and x_0 of v - w^2/2 score, from alpha, sigma and their rates alone."""
    alpha, sigma = process.alpha(t), process.sigma(t)
    sigma_rate = process.variance_rate(t) / (2 * sigma)
    # v = alpha' x_0 + sigma' (x - alpha x_0)/sigma,  score = (alpha x_0 - x)/sigma^2
    on_x = sigma_rate / sigma + 0.5 * w**2 / sigma**2
    return on_x, process.alpha_rate(t) - sigma_rate / sigma * alpha - 0.5 * w**2 * alpha / sigma**2


@dataclass
class Recursion:
    """The chain on Gaussian data with the exact drift, one scalar at a time: E[ELBO], and the law of its draws."""

    elbo: float
    mean: float
    variance: float


def recursion(width: Width, num_steps: int, last_scale: float) -> Recursion:
    """Steps of Euler and Maruyama on sqrt(t) uniform, written out."""
    process = VP()
    roots = torch.linspace(1.0, math.sqrt(process.t_min), num_steps, dtype=torch.float64)
    times = roots**2
    alphas, sigmas, widths = (f(times).tolist() for f in (process.alpha, process.sigma, width))
    drifts = [tuple(v.item() for v in conditional_drift(process, width(t[None]), t[None])) for t in times]
    a, v = alphas[0], sigmas[0] ** 2  # of x_k given x_0
    mean, variance = 0.0, sigmas[0] ** 2  # of x_k drawn by the model
    elbo = -0.5 * (a**2 * (VARIANCE + LOC**2)) / sigmas[0] ** 2
    for i in range(num_steps - 1):
        dt = (times[i] - times[i + 1]).item()
        (p, q), w2, alpha = drifts[i], widths[i] ** 2, alphas[i]
        gain = alpha * VARIANCE / (alpha**2 * VARIANCE + sigmas[i] ** 2)
        error = VARIANCE * (1 - gain * a) ** 2 + (gain * (a - alpha) * LOC) ** 2 + gain**2 * v
        elbo -= 0.5 * q**2 * error * dt / w2
        slope = 1 - dt * (p + q * gain)
        mean = slope * mean - dt * q * LOC * (1 - gain * alpha)
        variance = slope**2 * variance + w2 * dt
        a, v = (1 - p * dt) * a - q * dt, (1 - p * dt) ** 2 * v + w2 * dt
    last = last_scale**2
    elbo -= 0.5 * (math.log(2 * math.pi * last) + ((1 - a) ** 2 * (VARIANCE + LOC**2) + v) / last)
    return Recursion(elbo, mean, variance + last)


def data(rows: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return LOC + math.sqrt(VARIANCE) * torch.randn(rows, 1, dtype=torch.float64, generator=generator)


def exact_sde(width: Width, num_steps: int) -> NeuralSDE:
    sde = NeuralSDE(Exact(VP()), VP(), width, num_steps, prediction="x0").double()
    sde.calibrate(data(5000))
    return sde


def z_of_bound(width: Width, num_steps: int = 25) -> float:
    """The bound of 4,000 data against the recursion, in standard errors."""
    sde, rows = exact_sde(width, num_steps), data(4000, seed=1)
    found = evidence(sde, ELBOEstimate(num_particles=2), rows)
    expected = recursion(width, num_steps, sde.log_last_scale.exp().item())
    return (found.mean - expected.elbo) / math.hypot(found.mean_error, found.monte_carlo_error)


# --- the bound ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", WIDTHS)
def test_the_bound_meets_the_recursion(name: str) -> None:
    """A bias of 4.5 standard errors, about 0.1 nats, fails."""
    assert abs(z_of_bound(WIDTHS[name])) < ALLOWED_Z


@pytest.mark.parametrize("mutant", ["score's sign", "its 1/2"])
def test_a_wrong_drift_is_seen(monkeypatch: pytest.MonkeyPatch, mutant: str) -> None:
    def broken(denoiser: Any, t: Tensor, noise2: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        if mutant == "score's sign":
            return reverse_drift(denoiser, t, noise2, direction=1)
        return *reverse_drift(denoiser, t, 2 * noise2)[:2], noise2

    reverse_drift = neural_sde.reverse_drift
    monkeypatch.setattr(neural_sde, "reverse_drift", broken)
    assert abs(z_of_bound(WIDTHS["0.7 g"])) > 3 * ALLOWED_Z


@pytest.mark.parametrize(
    "process", [VP(), OU(), VE(sigma_min=0.1, sigma_max=5.0), OTPath(t_min=0.02, t_max=0.9)]
)
@pytest.mark.parametrize("factor", [0.5, 1.0, 1.5])
def test_the_weight_is_that_of_girsanov(process: Process, factor: float) -> None:
    """alpha^2 (g^2 + w^2)^2 dt / (8 w^2 sigma^4) nats on |x_0 - x0hat|^2, exactly, for any process and diffusion."""
    sde = NeuralSDE(Exact(process), process, lambda t: factor * process.diffusion2(t).sqrt(), num_steps=400)
    table = sde._table
    t, dt = table.times[1:], table.times.diff()
    g2, alpha, sigma = process.diffusion2(t), process.alpha(t), process.sigma(t)
    w2 = factor**2 * g2
    expected = alpha**2 * (g2 + w2) ** 2 * dt / (8 * w2 * sigma**4)
    torch.testing.assert_close(0.5 * table.on_x_0[1:] ** 2 / table.model_variance[1:], expected)


def test_the_bound_is_tight_where_the_guide_is_the_noising_law() -> None:
    """With w = g the gap to the exact likelihood halves as steps double; with w = 2 g it stays above 1 nat."""
    entropy = 0.5 * math.log(2 * math.pi * math.e * (VARIANCE + VP().t_min * 0.1))

    def gap(width: Width, num_steps: int) -> float:
        scale = exact_sde(width, num_steps).log_last_scale.exp().item()
        return -entropy - recursion(width, num_steps, scale).elbo

    coarse, fine = gap(g, 1000), gap(g, 2000)
    assert 0.01 < fine < 0.03
    assert 1.8 < coarse / fine < 2.2
    assert gap(lambda t: 2 * g(t), 2000) > 1


def test_the_full_chain_and_its_terms_are_one_bound() -> None:
    """Pyro's closed-form KLs over T sites, one term a row, and all terms, on the same data: 0.2 nats off fails."""
    sde, x = exact_sde(WIDTHS["0.7 g"], 8), data(4000, seed=2)
    batch = Batch({"x": x})
    model = pyro.condition(sde.model, data=batch.data)
    sites = TraceMeanField_ELBO(max_plate_nesting=1)
    with forked_rng(3), torch.no_grad():
        bounds = {
            "sites": [-sites.differentiable_loss(model, sde.guide, batch) / len(x) for _ in range(20)],
            "one step": [-ELBO().loss(sde, batch) for _ in range(60)],
            "steps": [evidence(sde, ELBOEstimate(num_particles=2), x, seed=i).mean for i in range(12)],
        }
    values = {name: torch.as_tensor(found) for name, found in bounds.items()}
    for one, other in combinations(values.values(), 2):
        error = math.hypot(one.std() / len(one) ** 0.5, other.std() / len(other) ** 0.5)
        assert abs(one.mean() - other.mean()) < ALLOWED_Z * error
        assert error < 0.045


# --- draws --------------------------------------------------------------------------------------------------------


def test_ancestral_draws_follow_the_recursion() -> None:
    """Mean and variance of 20,000 draws: 2 % in either fails."""
    for width in WIDTHS.values():
        sde = exact_sde(width, 15)
        law = recursion(width, 15, sde.log_last_scale.exp().item())
        x = infer(sde, Ancestral(), num_draws=20_000)["x"][0, :, 0]
        assert abs(z_of_mean(x, law.mean)) < ALLOWED_Z
        assert abs(z_of_mean((x - law.mean) ** 2, law.variance)) < ALLOWED_Z


def test_noise_starts_as_wide_as_the_process_ends() -> None:
    """Data 0 and no variance left to learn: x_T alone, N(0, 5^2), shrunk by one step; 5 % in its scale fails."""
    process = VE(sigma_min=2.0, sigma_max=5.0)
    sde = NeuralSDE(Zero(), process, diffusion=1e-6, num_steps=2, prediction="x0").double()
    x = infer(sde, Ancestral(), num_draws=20_000)["x"][0, :, 0]
    chain = sde.reverse_chain()
    assert (
        abs(z_of_mean(x**2, 25 * chain.on_x[0].item() ** 2 + chain.scale.square().sum().item())) < ALLOWED_Z
    )


def test_a_learned_drift_holds_the_denoiser() -> None:
    """Where the network is the exact drift, E[x_0 | x] follows, and other engines serve the program."""
    width = WIDTHS["0.7 g"]
    sde = NeuralSDE(Exact(VP(), width), VP(), width, num_steps=20).double()
    assert isinstance(sde, Stepwise) and isinstance(sde, Chained)  # noqa: PT018
    x, t = data(50, seed=4), torch.linspace(0.01, 1, 50, dtype=torch.float64)
    torch.testing.assert_close(sde.denoise(x, t), Exact(VP())(x, t))
    draws = infer(sde, ProbabilityFlowODE(steps=10), num_draws=2000)["x"][0, :, 0]
    assert abs(z_of_mean(draws, LOC)) < ALLOWED_Z
    assert abs(z_of_mean((draws - LOC) ** 2, VARIANCE)) < ALLOWED_Z


# --- fitted -------------------------------------------------------------------------------------------------------


def test_it_learns_by_its_bound_given_a_class() -> None:
    """Two classes at -1.5 and 1.5: means within 0.25 of them."""
    generator = torch.Generator().manual_seed(5)
    c = torch.randint(2, (1000,), generator=generator)
    x = (3.0 * c - 1.5)[:, None] + 0.3 * torch.randn(1000, 1, generator=generator)
    with forked_rng(6):
        network = TimeMLP((1,), width=32, num_blocks=1, condition=Labels(2))
    sde = NeuralSDE(network, num_steps=30, prediction="v")
    fit(sde, x, ELBO(), condition=c, num_steps=300, optim=Optim(lr=5e-3), progress=False)
    draws = infer(sde, Ancestral(), args=(torch.tensor([0, 1]),), num_draws=400)["x"][0, :, :, 0]
    torch.testing.assert_close(draws.mean(0), torch.tensor([-1.5, 1.5]), rtol=0, atol=0.25)


def test_the_bound_is_asked_at_the_condition_of_each_row() -> None:
    with forked_rng(7):
        network = TimeMLP((1,), width=8, num_blocks=1, condition=Labels(3))
        for parameter in network.parameters():
            parameter.data.normal_(std=0.3)
    sde, x, c = (
        NeuralSDE(network, num_steps=20, prediction="x0"),
        data(4).float(),
        torch.tensor([0, 1, 2, -1]),
    )
    asked = evidence(sde, ELBOEstimate(num_particles=2), x, args=(c,)).value
    for i in range(4):
        alone = evidence(sde.eval().given(c[i : i + 1]), ELBOEstimate(num_particles=2), x).value
        assert (alone == asked).tolist() == [i == j for j in range(4)]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"diffusion": 0.0}, "must be > 0"),
        ({"diffusion": lambda t: t * math.nan}, "must be > 0"),
        ({"diffusion": 20.0, "num_steps": 10}, "would blow up"),
        ({"process": OTPath(), "num_steps": 10}, "would blow up"),
        ({"num_steps": 1}, "num_steps"),
        ({"prediction": "noise"}, "Unknown prediction"),
        ({"last_step": "x2"}, "Unknown last_step"),
        ({"grid": "cubic"}, "Unknown grid"),
    ],
)
def test_bad_settings_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        NeuralSDE(TimeMLP((1,), width=8), **options)
