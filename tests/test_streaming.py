"""Moments of chains none of whose draws is kept: those of the draws, whatever the chunk."""

from __future__ import annotations

import math
import warnings
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import Tensor

from probgen import infer
from probgen.core import DataSets, InputError, UnsupportedError
from probgen.inference.guide import Guide
from probgen.inference.hmc import HMC
from probgen.inference.ula import ULA
from probgen.kernels.keeping import Draws
from probgen.kernels.noise import Normals
from probgen.kernels.run import Chains
from probgen.kernels.streaming import Moments, moments
from probgen.targets import read

with warnings.catch_warnings():
    warnings.simplefilter("ignore", FutureWarning)
    import arviz

ENGINE = ULA(step_size=0.01, num_warmup=10)
FIELDS = ("mean", "sd", "mean_error", "sd_error", "r_hat", "ess")


def crescent() -> None:
    """x ~ N(1, 0.5^2), scale = exp(x) as a record, y a vector that follows x."""
    x = pyro.sample("x", dist.Normal(torch.tensor(1.0, dtype=torch.float64), 0.5))
    pyro.deterministic("scale", x.exp())
    pyro.sample(
        "y", dist.Normal(x[..., None] * torch.tensor([1.0, -2.0], dtype=torch.float64), 0.3).to_event(1)
    )


def one_mean() -> None:
    z = pyro.sample("z", dist.Normal(torch.tensor(0.0, dtype=torch.float64), 1.0))
    pyro.sample("y", dist.Normal(z, 0.5))


def run(chunk: int, num_chains: int = 30, num_draws: int = 41, engine: Any = ENGINE) -> Moments:
    return moments(crescent, engine, num_draws=num_draws, num_chains=num_chains, chunk=chunk, seed=3)


@pytest.mark.parametrize("num_draws", [40, 41])
def test_they_are_the_moments_of_the_draws(num_draws: int) -> None:
    """Mean and sd to rounding, split R-hat as ArviZ has it, errors by the spread of independent chains."""
    found = run(30, num_draws=num_draws)
    draws = infer(crescent, ENGINE, num_draws=num_draws, num_chains=30, seed=3).draws
    assert found.mean.keys() == draws.keys() == {"x", "scale", "y"}
    for name, value in draws.items():
        means, overall = value.mean(1), value.mean((0, 1))
        error = means.std(0) / math.sqrt(30)
        squares = (value - overall).square().mean(1).std(0) / math.sqrt(30)
        sd = value.flatten(0, 1).std(0)
        torch.testing.assert_close(found.mean[name], overall)
        torch.testing.assert_close(found.sd[name], sd)
        torch.testing.assert_close(found.mean_error[name], error)
        torch.testing.assert_close(found.ess[name], (sd / error).square())
        torch.testing.assert_close(found.sd_error[name], squares / (2 * sd))
        columns = value.flatten(2) if value.ndim > 2 else value[..., None]
        r_hat = [arviz.rhat(columns[..., i].numpy(), method="split") for i in range(columns.shape[2])]
        torch.testing.assert_close(found.r_hat[name].flatten(), torch.tensor(r_hat, dtype=torch.float64))


@pytest.mark.parametrize("chunk", [1, 7, 10, 1000])
def test_chains_do_not_depend_on_the_chunk(chunk: int) -> None:
    """Nor do their moments, but for rounding."""
    expected, found = run(30), run(chunk)
    for field in FIELDS:
        for name, value in getattr(expected, field).items():
            torch.testing.assert_close(getattr(found, field)[name], value, rtol=1e-9, atol=0)
    assert found.cost.gradients == expected.cost.gradients == 30 * 41


def test_draws_of_chains_are_the_same_in_another_chunk() -> None:
    target = read(crescent)
    with torch.no_grad():
        alone, all_chains = (
            Chains(ENGINE, target, number, 3, first_chain=first) for number, first in ((2, 4), (9, 0))
        )
        for chains in (alone, all_chains):
            chains.draws = Draws(12)
            chains.begin()
            chains.warm_up()
            chains.draw()
    part, draws = alone.draws.values["u"], all_chains.draws.values["u"]
    torch.testing.assert_close(part, draws[:, :, 4:6], rtol=1e-12, atol=1e-12)


def test_noise_of_a_chain_is_its_own() -> None:
    """The same among fewer chains and from another first chain; standard normal and uncorrelated over all rows."""
    like = torch.zeros((), dtype=torch.float64)
    for rows in (1, 2, 3, 5, 8):
        whole = Normals(0, rows, 50, like, independent=True)
        part = Normals(0, rows, 7, like, independent=True, first_column=20)
        assert torch.equal(part.of(5, 9), whole.of(5, 9)[..., 20:27])
    z = Normals(1, 3, 20_000, like, independent=True).of(2, 6).flatten(0, 1)
    covariance = z @ z.mT / z.shape[1] - torch.eye(len(z))
    assert float(covariance.abs().max()) < 4.5 * math.sqrt(2 / z.shape[1])
    assert float(z.mean(1).abs().max()) < 4.5 / math.sqrt(z.shape[1])


def test_chunks_that_share_noise_have_streams_of_their_own() -> None:
    """Engines that adapt draw the noise of all their chains together: chunk by chunk it must differ."""
    like = torch.zeros(())
    first, second = (Normals(0, 2, 100, like, first_column=column).of(0, 3) for column in (0, 100))
    assert abs(float((first * second).mean())) < 4.5 / math.sqrt(first.numel())
    assert bool((first != second).any())


def test_ula_on_a_gaussian_has_the_variance_it_should() -> None:
    """1/(1 - h/2) for N(0, 1) within 4.5 errors, which are 1 % of it: h = 0.2 without its bias would be 10 off."""

    def program() -> None:
        pyro.sample("z", dist.Normal(2.0, 1.0))

    found = moments(program, ULA(step_size=0.2, num_warmup=50), num_draws=100, num_chains=4000, chunk=1500)
    sd = 1 / math.sqrt(1 - 0.2 / 2)
    assert abs(float(found.mean["z"] - 2)) < 4.5 * float(found.mean_error["z"])
    assert abs(float(found.sd["z"]) - sd) < 4.5 * float(found.sd_error["z"])
    assert abs(float(found.sd["z"]) - 1) > 10 * float(found.sd_error["z"])
    assert float(found.r_hat["z"]) < 1.1


def test_stuck_chains_are_seen() -> None:
    """Chains too slow to forget their starts: R-hat says so."""
    found = run(10, engine=ULA(step_size=1e-6, num_warmup=0))
    assert float(found.r_hat["x"]) > 2


def test_data_sets_have_moments_of_their_own() -> None:
    y = torch.tensor([-1.0, 0.0, 3.0], dtype=torch.float64)
    engine = HMC(num_steps=3, step_size=0.4, num_warmup=20)
    found = moments(one_mean, engine, data=DataSets({"y": y}), num_draws=200, num_chains=40, chunk=20)
    assert found.mean["z"].shape == (3,)
    assert float(((found.mean["z"] - 0.8 * y) / found.mean_error["z"]).abs().max()) < 4.5
    assert float(((found.sd["z"] - math.sqrt(0.2)) / found.sd_error["z"]).abs().max()) < 4.5


def test_it_explains_itself() -> None:
    text = str(run(10))
    assert text.startswith("30 chains x 41 draws by ULA")
    assert "y: 2, R-hat up to" in text
    assert "x: " in text
    assert "+-" in text


@pytest.mark.parametrize(
    "wrong", [{"num_draws": 3}, {"num_chains": 1}, {"chunk": 0}, {"seed": -1}, {"num_draws": 2.5}]
)
def test_arguments_out_of_range(wrong: dict[str, Any]) -> None:
    with pytest.raises(InputError, match=next(iter(wrong))):
        moments(crescent, ENGINE, **({"num_draws": 10, "num_chains": 5} | wrong))


def test_engines_without_chains_are_refused() -> None:
    with pytest.raises(UnsupportedError, match="Markov chains"):
        moments(crescent, Guide(), num_draws=10, num_chains=5)  # type: ignore[arg-type]


def test_chains_that_run_away_are_an_error() -> None:
    with pytest.raises(InputError, match="ran away"):
        run(10, engine=ULA(step_size=50.0, num_warmup=0), num_draws=400)


def test_threads_are_given_back(monkeypatch: pytest.MonkeyPatch) -> None:
    threads: list[int] = []
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    monkeypatch.setattr(torch, "set_num_threads", threads.append)
    expected = run(30)
    found = run(5)
    assert threads[-1] == 2
    torch.testing.assert_close(found.mean, expected.mean)


def test_energies_have_moments_too() -> None:
    """Where the target is no Pyro program."""
    energies = pytest.importorskip("probgen.targets.energies")
    assert energies

    class Bowl:
        event_shape = (2,)

        def model(self, batch: Any) -> None:
            raise NotImplementedError

        def energy(self, x: Tensor) -> Tensor:
            return 0.5 * (x - 1).square().sum(1)

    found = moments(Bowl(), ULA(step_size=0.1, num_warmup=50), num_draws=50, num_chains=400, chunk=150)
    z = (found.mean["x"] - 1) / found.mean_error["x"]
    assert z.shape == (2,)
    assert float(z.abs().max()) < 4.5
