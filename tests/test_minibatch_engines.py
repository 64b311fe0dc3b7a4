"""Engines that look at a few rows of the data at a time, on quadratics whose stationary law is known exactly."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import cache
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from scipy import stats
from torch import Tensor

from probgen import Batch, InputError, UnsupportedError, infer
from probgen.core import DataSets, Posterior
from probgen.inference.constant_sgd import ConstantSGD
from probgen.inference.hmc import HMC
from probgen.inference.sgld import SGLD
from probgen.inference.ula import ULA
from probgen.randomness import Noise
from probgen.targets import Density, read
from probgen.targets.density import ProgramDensity
from probgen.targets.minibatch import Rows, chosen_rows, minibatch_density

F64 = torch.float64
N, M = 60, 4
SCALE = torch.tensor([0.7, 2.0], dtype=F64)  # of the likelihood
Z = 4.5


@cache
def data() -> Tensor:
    """N correlated rows on the plane."""
    rows = torch.randn(N, 2, generator=torch.Generator().manual_seed(1), dtype=F64)
    return rows @ torch.tensor([[1.0, 0.8], [0.0, 0.6]], dtype=F64) + torch.tensor([1.0, -0.5], dtype=F64)


def location() -> Tensor:
    return pyro.sample("w", dist.Normal(torch.zeros(2, dtype=F64), 1.0).to_event(1))


def plated() -> None:
    """A function whose plate draws M of N rows."""
    w = location()
    with pyro.plate("data", N, subsample_size=M):
        pyro.sample("x", dist.Normal(w, SCALE).to_event(1))


def closed_over() -> None:
    """The same, the data indexed by hand."""
    w = location()
    with pyro.plate("data", N, subsample_size=M) as rows:
        pyro.sample("x", dist.Normal(w, SCALE).to_event(1), obs=data()[rows])


class OfBatch:
    """The same as a program of a `Batch`."""

    event_shape = (2,)

    def model(self, batch: Batch) -> None:
        w = location()
        with batch.plate():
            pyro.sample("x", dist.Normal(w, SCALE).to_event(1))


WAYS: dict[str, tuple[Any, dict[str, Any], int | None]] = {
    "plate": (plated, {"data": {"x": data()}}, None),
    "plate and closure": (closed_over, {}, None),
    "batch": (OfBatch(), {"data": {"x": data()}}, M),
}


def hessian() -> Tensor:
    """A of -log p(w | x)."""
    return torch.diag(1 + N / SCALE.square())


def mode() -> Tensor:
    return torch.linalg.solve(hessian(), data().sum(0) / SCALE.square())


def gradient_noise() -> Tensor:
    """C, the covariance of the gradient from M rows drawn with replacement; it does not depend on w."""
    pull = data() / SCALE.square()
    return N**2 / M * torch.cov(pull.mT, correction=0)


def stationary(step: float, noise: Tensor) -> Tensor:
    """S of x' = x - step A x + noise: S = (I - step A) S (I - step A) + noise."""
    shrink = torch.eye(2, dtype=F64) - step * hessian()
    operator = torch.eye(4, dtype=F64) - torch.kron(shrink, shrink)
    return torch.linalg.solve(operator, noise.reshape(4)).reshape(2, 2)


def worst_z(posterior: Posterior, covariance: Tensor) -> float:
    """The largest |z| of second moments about the mode; chains are independent, so that their spread is the error."""
    away = posterior["w"] - mode()
    moments = (away[..., :, None] * away[..., None, :]).mean(1)
    error = moments.std(0) / len(moments) ** 0.5
    return float(((moments.mean(0) - covariance) / error).abs().max())


def run(way: str, engine: Any, **options: Any) -> Posterior:
    program, given, _ = WAYS[way]
    return infer(program, engine, **given, **({"num_draws": 200, "num_chains": 400, "seed": 0} | options))


# --- stationary laws ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("way", WAYS)
def test_constant_sgd_has_the_covariance_of_its_equation(way: str) -> None:
    """S = (I - tau A) S (I - tau A) + tau^2 C within Monte Carlo error, which is 1 % of S.

    Noise tau instead of tau^2, and the posterior's own covariance, are far outside.
    """
    tau = 4e-3
    posterior = run(way, ConstantSGD(tau, batch_size=WAYS[way][2], num_warmup=300))
    noise = gradient_noise()
    assert worst_z(posterior, stationary(tau, tau**2 * noise)) < Z
    assert worst_z(posterior, stationary(tau, tau * noise)) > 10
    assert worst_z(posterior, torch.linalg.inv(hessian())) > 10


@pytest.mark.parametrize("way", WAYS)
def test_sgld_has_the_covariance_of_its_equation(way: str) -> None:
    """S = (I - h A) S (I - h A) + 2 h I + h^2 C; without the noise of minibatches it is told apart."""
    h = 2e-3
    posterior = run(way, SGLD(h, batch_size=WAYS[way][2], num_warmup=300))
    eye = torch.eye(2, dtype=F64)
    assert worst_z(posterior, stationary(h, 2 * h * eye + h**2 * gradient_noise())) < Z
    assert worst_z(posterior, stationary(h, 2 * h * eye)) > 10


def test_with_decaying_steps_it_comes_to_the_posterior() -> None:
    """After 3,000 steps h_t is a hundredth of h. The draws have the covariance that the recursion says, and this is
    within 10 % of the posterior's; the constant step is off by much more.
    """
    h, eye = 2e-3 / (1 + torch.arange(3000, dtype=F64) / 30), torch.eye(2, dtype=F64)
    decaying = run("batch", SGLD(2e-3, batch_size=M, decay=1.0, offset=30.0, num_warmup=2800))
    torch.testing.assert_close(decaying.stats["step_size"][0], h[2800:])
    expected = [eye]
    for step in h:
        shrink = eye - step * hessian()
        expected.append(shrink @ expected[-1] @ shrink + 2 * step * eye + step**2 * gradient_noise())
    covariance = torch.stack(expected[2801:]).mean(0)
    assert worst_z(decaying, covariance) < Z

    def off(covariance: Tensor) -> float:
        return float((covariance @ hessian() - eye).abs().max())

    assert off(covariance) < 0.1
    assert off(stationary(2e-3, 2 * 2e-3 * eye + 2e-3**2 * gradient_noise())) > 0.4


def test_without_minibatches_it_is_ula() -> None:
    options = {"data": {"x": data()}, "num_draws": 20, "num_chains": 3}
    langevin = infer(OfBatch(), ULA(step_size=1e-3, num_warmup=5), **options)
    stochastic = infer(OfBatch(), SGLD(step_size=1e-3, num_warmup=5), **options)
    torch.testing.assert_close(stochastic["w"], langevin["w"], rtol=0, atol=1e-12)


# --- rows ---------------------------------------------------------------------------------------------------------


def test_every_row_is_drawn_equally_often() -> None:
    """70,000 draws of 7 rows: a row drawn 3 % too often shows, as in a twin that rounds instead of taking the floor."""
    normals = Noise(0, 1, 10_000, (7,), torch.float32)(0).mT
    rows = (Rows("a", 7, 5), Rows("b", 3, 2))
    index = chosen_rows(normals, rows)
    assert stats.chisquare(index[:5].flatten().bincount(minlength=7).numpy()).pvalue > 1e-4
    assert stats.chisquare(index[5:].flatten().bincount(minlength=3).numpy()).pvalue > 1e-4
    rounded = (torch.special.ndtr(normals[:5].double()) * 6).round().long()
    assert stats.chisquare(rounded.flatten().bincount(minlength=7).numpy()).pvalue < 1e-6


def two_plates() -> None:
    """Rows of two plates, a discrete site for each row of one of them, and a value that all share."""
    w = location()
    with pyro.plate("first", N, subsample_size=M) as rows:
        pyro.sample("x", dist.Normal(w, SCALE).to_event(1), obs=data()[rows])
    with pyro.plate("second", 30, subsample_size=3) as rows:
        z = pyro.sample("z", dist.Bernoulli(torch.sigmoid(w[..., 0])))
        pyro.sample("y", dist.Normal(w[..., 1] + z, 1.0), obs=data()[rows, 0])


def two_full_plates() -> None:
    w = location()
    with pyro.plate("first", N):
        pyro.sample("x", dist.Normal(w, SCALE).to_event(1), obs=data())
    with pyro.plate("second", 30):
        z = pyro.sample("z", dist.Bernoulli(torch.sigmoid(w[..., 0])))
        pyro.sample("y", dist.Normal(w[..., 1] + z, 1.0), obs=data()[:30, 0])


class Mixture:
    """A discrete site for each row of a `Batch`, summed out."""

    event_shape = (2,)

    def model(self, batch: Batch) -> None:
        w = location()
        with batch.plate():
            z = pyro.sample("z", dist.Bernoulli(torch.sigmoid(w[..., 0])))
            pyro.sample("x", dist.Normal(w * z[..., None], SCALE).to_event(1))


def full_mixture() -> None:
    Mixture().model(Batch({"x": data()}))


def full_plate() -> None:
    w = location()
    with pyro.plate("data", N):
        pyro.sample("x", dist.Normal(w, SCALE).to_event(1), obs=data())


def minibatches(program: Any, given: dict[str, Any], batch_size: int | None) -> Density:
    return minibatch_density(read(program, given.get("data")), batch_size)


ESTIMATES: dict[str, tuple[Callable[[], Density], Callable[[], None]]] = {
    **{way: (lambda way=way: minibatches(*WAYS[way]), full_plate) for way in WAYS},
    "batch with discrete sites": (lambda: minibatches(Mixture(), {"data": {"x": data()}}, M), full_mixture),
    "two plates, one with discrete sites": (lambda: minibatches(two_plates, {}, None), two_full_plates),
}


@pytest.mark.parametrize("name", ESTIMATES)
def test_estimates_are_unbiased(name: str) -> None:
    """Value and gradient at one point, averaged over 20,000 minibatches; an estimate not scaled by N/m is far off."""
    make, whole = ESTIMATES[name]
    observed = {"x": data()} if whole is full_mixture else None
    density, full = make(), ProgramDensity(read(whole, observed))
    u = torch.tensor([[0.6], [-0.2]], dtype=F64).expand(2, 20_000).contiguous()
    normals = Noise(0, 1, 20_000, (density.num_normals,), F64)(0).mT.contiguous()
    value, grad = density.function(u)(u, normals)
    found = torch.cat([value[None], grad])
    expected = torch.cat([part.reshape(-1, 1) for part in full.value_and_grad(u[:, :1])])
    z = (found.mean(1, keepdim=True) - expected) / (found.std(1, keepdim=True) / 20_000**0.5)
    assert float(z.abs().max()) < Z
    assert float((found / 2 - expected).mean(1).abs().max()) > 0.1 * float(expected.abs().max())


@pytest.mark.parametrize(
    "engine", [SGLD(1e-3, num_warmup=3, decay=0.6), ConstantSGD(1e-3, num_warmup=3)], ids=str
)
@pytest.mark.parametrize("way", WAYS)
def test_chains_know_nothing_of_each_other(way: str, engine: Any) -> None:
    """Chain i is the same among 2 and among 9, and draws rows of its own."""
    engine = replace(engine, batch_size=WAYS[way][2])
    few, many = (run(way, engine, num_draws=8, num_chains=n)["w"] for n in (2, 9))
    torch.testing.assert_close(many[:2], few, rtol=0, atol=1e-10)
    moves = many[:, 1:] - many[:, :-1]
    assert float((moves[0] - moves[1]).abs().max()) > 1e-3


@pytest.mark.parametrize(
    "engine", [SGLD(1e-3, num_warmup=3, decay=0.6), ConstantSGD(1e-3, num_warmup=3)], ids=str
)
def test_a_run_goes_on_as_if_never_stopped(engine: Any) -> None:
    whole = run("plate", engine, num_draws=10, num_chains=2)
    first = run("plate", engine, num_draws=4, num_chains=2)
    rest = run("plate", engine, num_draws=6, num_chains=2, state=first.state)
    assert torch.equal(torch.cat([first["w"], rest["w"]], 1), whole["w"])


def test_a_transition_costs_one_gradient() -> None:
    posterior = run("plate", SGLD(1e-3, num_warmup=7), num_draws=10, num_chains=3)
    assert (posterior.cost.gradients, posterior.cost.warmup_gradients) == (30, 21)


# --- wrong use ----------------------------------------------------------------------------------------------------


def local_plate() -> None:
    with pyro.plate("data", N, subsample_size=M):
        z = pyro.sample("z", dist.Normal(torch.zeros((), dtype=F64), 1.0))
        pyro.sample("x", dist.Normal(z[..., None], SCALE).to_event(1))


class LocalBatch:
    event_shape = (2,)

    def model(self, batch: Batch) -> None:
        with batch.plate():
            z = pyro.sample("z", dist.Normal(torch.zeros((), dtype=F64), 1.0))
            pyro.sample("x", dist.Normal(z[..., None], SCALE).to_event(1))


WRONG: dict[str, tuple[Any, Any, Any, str]] = {
    "a latent a row of a plate": (local_plate, SGLD(), {"x": data()}, "'z' stands in the plate whose rows"),
    "a latent a row of a batch": (LocalBatch(), SGLD(batch_size=M), {"x": data()}, "'z' stands in the plate"),
    "a batch size for a function": (plated, SGLD(batch_size=5), {"x": data()}, "subsample_size"),
    "more than there are": (OfBatch(), SGLD(batch_size=61), {"x": data()}, "there are 60 rows"),
    "nothing observed": (OfBatch(), SGLD(batch_size=1), None, "no rows to draw"),
    "no noise": (OfBatch(), ConstantSGD(), {"x": data()}, "has none: pass batch_size"),
    "no noise in a function": (full_plate, ConstantSGD(), None, "For gradients of all rows there is ULA"),
    "data sets": (OfBatch(), SGLD(batch_size=M), DataSets({"x": data()[None]}), "one data set at a time"),
    "an engine for all rows": (plated, HMC(), {"x": data()}, "use SGLD or ConstantSGD"),
}


@pytest.mark.parametrize("name", WRONG)
def test_wrong_use_is_named(name: str) -> None:
    program, engine, observed, words = WRONG[name]
    with pytest.raises((InputError, UnsupportedError), match=words):
        infer(program, engine, data=observed, num_draws=2)


@pytest.mark.parametrize(
    ("engine", "settings", "words"),
    [
        (SGLD, {"step_size": 0.0}, "step_size must be > 0"),
        (SGLD, {"offset": -1.0}, "offset must be > 0"),
        (SGLD, {"decay": 1.5}, r"decay must lie in \[0, 1\]"),
        (SGLD, {"batch_size": 0}, "batch_size must be an integer >= 1"),
        (ConstantSGD, {"step_size": float("inf")}, "step_size must be > 0"),
        (ConstantSGD, {"num_warmup": -1}, "num_warmup must be an integer >= 0"),
    ],
)
def test_settings_out_of_range_are_named(engine: Any, settings: dict[str, Any], words: str) -> None:
    with pytest.raises(InputError, match=words):
        engine(**settings)


def test_steps_that_are_too_long_run_away_and_say_so() -> None:
    with pytest.raises(InputError, match="ran away to infinity"):
        run("plate", ConstantSGD(1.0, num_warmup=1000), num_draws=2, num_chains=2)
