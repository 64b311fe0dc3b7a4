"""Tweedie's formula and the law of a finite data set, against autograd, sums written out, and each other."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

from probgen import (
    Batch,
    DenoisingScoreMatching,
    Empirical,
    GaussianMixture,
    InputError,
    ReverseSDE,
    UnsupportedError,
    infer,
)
from probgen.models import empirical
from probgen.processes import EDM, OU, VE, VP, CosineVP, OTPath, Process, SubVP, over_event
from statistics_tools import ALLOWED_Z, z_of_mean


@dataclass(frozen=True)
class ByCoordinate(Process):
    """Another alpha and sigma for each of two coordinates."""

    rates = torch.tensor([1.0, 4.0], dtype=torch.float64)

    def alpha(self, t: Tensor) -> Tensor:
        return torch.exp(-t[:, None] * self.rates)

    def sigma(self, t: Tensor) -> Tensor:
        return (-torch.expm1(-2 * t[:, None] * self.rates)).sqrt()


ISOTROPIC = [VP(), CosineVP(), SubVP(), OU(), OTPath(), VE(), EDM()]
PROCESSES = [*ISOTROPIC, ByCoordinate()]
TIMES = torch.tensor([0.05, 0.2, 0.5, 0.9], dtype=torch.float64)
DATA = torch.tensor([[0.0, 1.0], [2.0, 0.5], [-1.0, -1.0], [-1.5, 1.0], [0.3, 0.0]], dtype=torch.float64)
by_name = pytest.mark.parametrize("process", PROCESSES, ids=lambda process: type(process).__name__)
isotropic_by_name = pytest.mark.parametrize("process", ISOTROPIC, ids=lambda process: type(process).__name__)


def noisy(x_0: Tensor, process: Process, t: Tensor) -> Tensor:
    law = process.marginal(x_0, t)
    return law.loc + law.scale * torch.randn_like(x_0)


def close(found: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(found, expected, rtol=1e-7, atol=1e-9)


def jacobian(function: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """d function / dx of each row, `(batch, d, d)`."""
    return torch.stack([torch.autograd.functional.jacobian(lambda z: function(z[None])[0], row) for row in x])


# --- Tweedie ------------------------------------------------------------------------------------------------------


@isotropic_by_name
def test_tweedie_on_a_mixture(process: Process) -> None:
    """Mean and covariance of x_0 given x_t by Bayes's rule, component by component, from the score and its slope."""
    mixture, eye = GaussianMixture.example(process=process), torch.eye(2, dtype=torch.float64)
    for t in TIMES[:3, None]:  # at 0.9 sigma is 1 to three digits, and the wrong formula right
        alpha, sigma = process.alpha(t), process.sigma(t)
        x_t = noisy(mixture.model(Batch(num_rows=4)), process, t)
        slope = jacobian(lambda x: mixture.denoise(x, t), x_t)  # noqa: B023 - called at once
        x0hat = (x_t + sigma**2 * mixture.score(x_t, t)) / alpha
        for row, mean, derivative in zip(x_t, x0hat, slope, strict=True):
            posterior = mixture.posterior(row, alpha * eye, float(sigma))
            torch.testing.assert_close(mean, posterior.mean, rtol=1e-6, atol=1e-6)
            covariance = sigma**2 / alpha * derivative
            torch.testing.assert_close(covariance, posterior.covariance, rtol=1e-5, atol=1e-6)
            wrong = sigma / alpha * derivative
            assert not torch.allclose(wrong, posterior.covariance, rtol=1e-3)


# --- the oracle ---------------------------------------------------------------------------------------------------


def written_out(process: Process, x_t: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
    """log q(x_t | x^i) `(batch, n)` and grad log q(x_t | x^i) `(batch, n, d)`."""
    alpha, sigma = (over_event(f(t), x_t).expand_as(x_t)[:, None] for f in (process.alpha, process.sigma))
    offset = x_t[:, None] - alpha * DATA
    log_q = (-0.5 * (offset / sigma) ** 2 - sigma.log() - 0.5 * math.log(2 * math.pi)).sum(-1)
    return log_q, -offset / sigma**2


@by_name
def test_averages_over_the_data(process: Process) -> None:
    """denoise, score and density are what the sums say; the score averages grad log q(x_t | x_0) over the posterior."""
    oracle, t = Empirical(DATA, process), TIMES.repeat_interleave(5)
    x_t = noisy(DATA.repeat(4, 1), process, t)
    log_q, grad_log_q = written_out(process, x_t, t)
    weights = log_q.softmax(1)
    close(oracle.denoise(x_t, t), weights @ DATA)
    close(oracle.score(x_t, t), (weights[:, :, None] * grad_log_q).sum(1))
    close(oracle.log_prob(x_t, t), log_q.logsumexp(1) - math.log(5))
    close(oracle.denoise(x_t, t[:1]), written_out(process, x_t, t[:1])[0].softmax(1) @ DATA)


@by_name
def test_score_is_the_slope_of_the_density(process: Process) -> None:
    oracle, t = Empirical(DATA, process), TIMES.repeat_interleave(5)
    x_t = noisy(DATA.repeat(4, 1), process, t).requires_grad_()
    (slope,) = torch.autograd.grad(oracle.log_prob(x_t, t).sum(), x_t)
    close(oracle.score(x_t, t).detach(), slope)
    alpha, sigma = (over_event(f(t), x_t) for f in (process.alpha, process.sigma))
    close((x_t + sigma**2 * oracle.score(x_t, t)).detach() / alpha, oracle.denoise(x_t, t).detach())


@isotropic_by_name
def test_slope_of_the_denoiser_is_the_posterior_covariance(process: Process) -> None:
    oracle = Empirical(DATA, process)
    for t in TIMES[:, None]:
        x_t = noisy(DATA, process, t)
        weights = written_out(process, x_t, t)[0].softmax(1)
        centred = DATA - (weights @ DATA)[:, None]
        covariance = torch.einsum("bn,bni,bnj->bij", weights, centred, centred)
        slope = jacobian(lambda x: oracle.denoise(x, t), x_t)  # noqa: B023 - called at once
        close(process.sigma(t) ** 2 / process.alpha(t) * slope, covariance)


@isotropic_by_name
def test_it_is_a_mixture_of_very_narrow_gaussians(process: Process) -> None:
    narrow = 1e-12 * torch.eye(2, dtype=torch.float64).expand(5, 2, 2)
    mixture = GaussianMixture(torch.full((5,), 0.2, dtype=torch.float64), DATA, narrow, process)
    oracle, x_t = Empirical(DATA, process), noisy(DATA.repeat(4, 1), process, TIMES.repeat_interleave(5))
    for name in ("denoise", "score", "log_prob"):
        found, expected = (getattr(law, name)(x_t, TIMES.repeat_interleave(5)) for law in (oracle, mixture))
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def test_chunks_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    data, x_t, t = torch.randn(30, 1, 3, 3), torch.randn(17, 1, 3, 3), torch.rand(17) + 1e-3
    oracle = Empirical(data)
    whole = [method(x_t, t) for method in (oracle.denoise, oracle.score, oracle.log_prob)]
    monkeypatch.setattr(empirical, "_CELLS", 100)  # three rows at a time
    assert len(list(oracle._chunks(x_t, t))) == 6
    parts = [method(x_t, t) for method in (oracle.denoise, oracle.score, oracle.log_prob)]
    assert [len(part) for part in parts] == [17, 17, 17]
    for one, other in zip(whole, parts, strict=True):
        torch.testing.assert_close(one, other)


def test_single_precision_at_little_noise() -> None:
    """sigma = 0.002: a datum and its noise are told apart, which sums of squares in single precision cannot."""
    data = 3 * torch.randn(50, 64)
    oracle, t = Empirical(data, EDM()), torch.zeros(1)
    x_t = data + 0.002 * torch.randn_like(data)
    torch.testing.assert_close(oracle.denoise(x_t, t), data)
    torch.testing.assert_close(0.002 * oracle.score(x_t, t), (data - x_t) / 0.002, rtol=1e-3, atol=1e-3)
    squares = x_t @ data.mT - 0.5 * data.square().sum(1)
    assert oracle.denoise(x_t, t).dtype == squares.dtype == torch.float32
    density = oracle.log_prob(x_t, t)
    exact = (
        -0.5 * ((x_t - data) / 0.002).square().sum(1)
        - 64 * math.log(0.002 * math.sqrt(2 * math.pi))
        - math.log(50)
    )
    torch.testing.assert_close(density, exact, rtol=1e-4, atol=1e-2)


def test_draws_are_the_data_each_as_often() -> None:
    """20,000 draws: nine times of ten, a row drawn 8 % too often or too rarely is seen."""
    x = Empirical(DATA).model(Batch(num_rows=20_000))
    shares = (x[:, None] == DATA).all(-1).double()
    assert shares.sum() == 20_000
    assert max(abs(z_of_mean(share, 0.2)) for share in shares.mT) < ALLOWED_Z
    biased = torch.cat((x, DATA[:1].expand(600, 2)))
    assert (
        max(abs(z_of_mean(share, 0.2)) for share in (biased[:, None] == DATA).all(-1).double().mT) > ALLOWED_Z
    )


def test_engines_give_the_data_back() -> None:
    """All 400 draws of the reverse SDE end on a datum, and each datum is found."""
    draws = infer(Empirical(DATA), ReverseSDE(steps=100), num_draws=400, progress=False).flat("x")
    distances, nearest = torch.cdist(draws.double(), DATA).min(1)
    assert distances.max() < 0.05
    assert sorted(nearest.unique().tolist()) == [0, 1, 2, 3, 4]


def test_it_minimises_denoising_score_matching_on_its_data() -> None:
    """Against the mixture the data came from, on the data themselves: memory beats knowledge."""
    mixture = GaussianMixture.example()
    data = mixture.model(Batch(num_rows=20))
    batch = Batch({"x": data.repeat(50, 1)})
    differences = []
    for _ in range(20):
        state = torch.get_rng_state()
        known = DenoisingScoreMatching().loss(mixture, batch)
        torch.set_rng_state(state)
        differences.append(known - DenoisingScoreMatching().loss(Empirical(data), batch))
    assert z_of_mean(torch.stack(differences)) > ALLOWED_Z


@pytest.mark.parametrize(
    ("make", "error", "complaint"),
    [
        (lambda: Empirical(torch.zeros(0, 2)), InputError, r"n >= 1, got torch.float32 of shape \(0, 2\)"),
        (lambda: Empirical(torch.zeros(3, 2, dtype=torch.long)), InputError, "floating point"),
        (lambda: Empirical(torch.tensor([[0.0], [math.nan]])), InputError, r"first at index \(1, 0\)"),
        (lambda: Empirical(DATA).log_prob(DATA), UnsupportedError, "no density of its own"),
        (lambda: Empirical(DATA).score(DATA, torch.zeros(1)), UnsupportedError, "such as t >= 0.001"),
    ],
)
def test_bad_input_is_named(make: Callable[[], Any], error: type[Exception], complaint: str) -> None:
    with pytest.raises(error, match=complaint):
        make()
