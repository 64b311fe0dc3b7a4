"""Advice on Markov chains: each sign is seen where it is, told with its remedy, and not seen where it is not."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import Tensor

from probgen.arviz_io import to_arviz
from probgen.core import Cost, DataSets, InputError, Posterior
from probgen.diagnostics.agreement import agree
from probgen.diagnostics.loo import loo
from probgen.diagnostics.plots import plot_ranks, plot_traces
from probgen.diagnostics.predict import predict
from probgen.diagnostics.summary import example as chains
from probgen.diagnostics.summary import summary
from probgen.inference.hmc import HMC
from probgen.replay import log_likelihood
from probgen.targets import read
from probgen.verbs import infer

CHAINS, DRAWS = 4, 500


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def of_chains(z: Tensor, engine: str = "HMC", **stats: Tensor) -> Posterior:
    return Posterior({"z": z}, "mcmc", "asymptotic", engine, Cost(), stats=stats)


def sound(**stats: Tensor) -> Posterior:
    """Well-mixed chains that accept 80 % of their proposals."""
    rate = torch.full((CHAINS, DRAWS), 0.8)
    return replace(chains(), stats=chains().stats | {"acceptance_rate": rate} | stats)


def rates(*each: float) -> Tensor:
    return torch.tensor(each)[:, None].expand(len(each), DRAWS)


def trips(*each: int) -> Tensor:
    """How many round trips each chain made, at its first draws."""
    return torch.arange(DRAWS) < torch.tensor(each)[:, None]


def with_stuck(*which: int) -> Posterior:
    z = noise(CHAINS, DRAWS)
    z[list(which)] = z[list(which), :1]
    return of_chains(z)


def in_modes(apart: float, engine: str = "HMC") -> Posterior:
    return of_chains(noise(CHAINS, DRAWS) + apart * torch.tensor([0.0, 0, 1, 0])[:, None], engine)


def tempered(rounds: Tensor, swap_rate: float) -> Posterior:
    posterior = sound(round_trip=rounds)
    swaps = torch.tensor([0.9, swap_rate, 0.0]).expand(CHAINS, 3)
    return replace(posterior, run_stats={"swap_rates": swaps})


SIGNS: dict[str, tuple[Callable[[], Posterior], str]] = {
    "all stuck": (lambda: with_stuck(0, 1, 2, 3), r"None of the 4 chains ever moved.*step_size=None"),
    "some stuck": (lambda: with_stuck(2, 3), r"2 of 4 chains never moved \(the first is chain 2\).*init"),
    "nothing accepted": (
        lambda: replace(
            sound(acceptance_rate=rates(0, 0, 0, 0.01)), run_stats={"step_size": torch.full((4,), 3.2)}
        ),
        r"Next to no proposal was accepted \(0.25% at step size 3.2\).*Divide step_size by ten",
    ),
    "little accepted": (
        lambda: sound(acceptance_rate=rates(0.3, 0.3, 0.2, 0.4)),
        "Only 30% of the proposals.*smaller",
    ),
    "one chain in a narrow place": (
        lambda: sound(acceptance_rate=rates(0.8, 0.8, 0.8, 0.05)),
        "1 chain of 4 accepted less than 10%.*narrower.*target_accept",
    ),
    "modes": (
        lambda: in_modes(8.0),
        r"settle in separate places \(3 near -?0\.\d+, 1 near [78]\.?\d*\).*ParallelTempering",
    ),
    "modes that tempering did not join": (
        lambda: in_modes(8.0, "ParallelTempering(num_temperatures=2)"),
        "separate places.*take more temperatures",
    ),
    "drift": (
        lambda: of_chains(noise(CHAINS, DRAWS).cumsum(1)),
        r"still drift; their spread was [\d.]+ in the first half and [\d.]+ in the second.*proper prior",
    ),
    "another spread": (
        lambda: of_chains(noise(CHAINS, DRAWS) * torch.tensor([1.0, 1, 1, 3])[:, None]),
        "the chains disagree.*several modes.*reparameterise",
    ),
    "an improper posterior": (
        lambda: of_chains((10 * noise(CHAINS, DRAWS).cumsum(1)).double().exp()),
        r"Draws of z reach \d.*more than 1e\+10 times their median: the posterior is improper.*proper prior",
    ),
    "no round trips": (
        lambda: tempered(trips(10, 12, 0, 9), 0.02),
        "1 chain of 4 saw no round trip.*2% of the time: add temperatures",
    ),
    "few round trips": (
        lambda: tempered(trips(0, 0, 3, 2), 0.5),
        "2 chains of 4.*50% of the time: run longer",
    ),
    "divergences": (
        lambda: sound(diverging=torch.arange(CHAINS * DRAWS).reshape(CHAINS, DRAWS) < 3),
        "There were 3 divergences after warm-up, 0.0015 of 2,000 transitions",
    ),
}


@pytest.mark.parametrize("name", SIGNS)
def test_each_sign_is_told_with_its_remedy(name: str) -> None:
    made, sentence = SIGNS[name]
    verdict = summary(made())
    assert not verdict.ok
    assert any(re.search(sentence, line) for line in verdict.problems), verdict.problems


def test_sound_chains_hear_nothing() -> None:
    assert summary(sound()).advice == []
    assert summary(tempered(trips(10, 12, 3, 9), 0.02)).advice == []
    assert (
        summary(sound(energy=torch.full((CHAINS, DRAWS), 2.0))).advice == []
    )  # no spread, no division by it


def test_a_lonely_place_is_no_mode() -> None:
    """Slow chains, 10 to a posterior, whose R-hat is high: no more than 2 of 50 look settled in separate places."""
    claimed = 0
    for seed in range(50):
        x = [noise(10, seed=seed)]
        for z in noise(300, 10, seed=1000 + seed):
            x.append(0.98 * x[-1] + math.sqrt(1 - 0.98**2) * z)
        verdict = summary(of_chains(torch.stack(x, 1)))
        assert any("R-hat is" in line for line in verdict.problems)
        claimed += any("separate places" in line for line in verdict.problems)
    assert claimed <= 2


def test_chains_with_a_step_are_noted_to_be_off() -> None:
    verdict = summary(replace(sound(), guarantee="discretised"))
    assert verdict.ok
    assert re.search("halve the step size.*agree", verdict.notes[0])
    few = replace(sound(acceptance_rate=rates(0.1, 0.1, 0.1, 0.1)), guarantee="discretised")
    assert summary(few).ok  # nothing was there to accept


def test_rare_divergences_are_noted_not_alarmed() -> None:
    diverging = torch.arange(256 * 1000).reshape(256, 1000) % 15_000 == 7
    posterior = Posterior(
        {"z": noise(256, 1000)}, "mcmc", "asymptotic", "HMC", Cost(), stats={"diverging": diverging}
    )
    verdict = summary(posterior)
    assert verdict.ok
    assert re.search(r"18 transitions of 256,000 diverged \(7e-05\): rare", verdict.notes[0])
    assert "18 of 256,000 transitions diverged (7e-05): see `summary`" in str(posterior)


def test_many_short_chains_are_judged() -> None:
    """A thousand chains need not be long each; four draws are the fewest that R-hat takes."""
    assert summary(of_chains(noise(1000, 20))).ok
    assert "z" in summary(of_chains(noise(1000, 4))).table.index
    with pytest.raises(InputError, match="at least 4 draws a chain, got 2"):
        summary(of_chains(noise(1000, 2)))


# --- several data sets side by side ---------------------------------------------------------------------------------


def schools() -> None:
    """A mean and a spread, what they make of each school, and three schools."""
    loc = pyro.sample("loc", dist.Normal(0.0, 2.0))
    scale = pyro.sample("scale", dist.Gamma(3.0, 3.0))
    pyro.deterministic("ratio", loc / scale)
    with pyro.plate("school", 3):
        pyro.sample("y", dist.Normal(loc, scale))


SETS = DataSets({"y": torch.tensor([[0.0, 1.0, 2.0], [3.0, 3.5, 2.0]])})
ENGINE = HMC(num_steps=4, num_warmup=100)


@pytest.fixture(scope="module")
def side_by_side() -> Posterior:
    return infer(schools, ENGINE, data=SETS, num_draws=60, num_chains=4)


def test_data_sets_are_summarised_each(side_by_side: Posterior) -> None:
    verdict = summary(side_by_side)
    assert list(verdict.table.index) == ["loc[0]", "loc[1]", "scale[0]", "scale[1]", "ratio[0]", "ratio[1]"]
    assert "4 x 60 draws of each of 2 data sets by HMC" in str(verdict)
    assert "loc: 2, mean" in str(side_by_side)
    assert agree({"one": side_by_side, "the same": side_by_side}).ok


def test_a_chain_stuck_in_one_data_set_is_named(side_by_side: Posterior) -> None:
    draws = {name: value.clone() for name, value in side_by_side.draws.items()}
    for value in draws.values():
        value[3, :, 1] = value[3, :1, 1]
    lines = summary(replace(side_by_side, draws=draws)).problems
    assert any("1 of 8 chains never moved (the first is chain 3 of data set 1)" in line for line in lines)


def test_data_sets_open_in_arviz(side_by_side: Posterior, tmp_path: Path) -> None:
    data = to_arviz(side_by_side)
    assert data.posterior["ratio"].dims == ("chain", "draw", "data_set")
    assert data.sample_stats["energy"].dims == ("chain", "draw", "data_set")
    assert data.sample_stats["step_size"].dims == ("chain", "draw", "data_set")
    np.testing.assert_array_equal(data.sample_stats["lp"].values, side_by_side.stats["lp"].numpy())
    data.to_netcdf(str(tmp_path / "posterior.nc"))
    for plot in (plot_traces, plot_ranks):
        assert plot(side_by_side, tmp_path / "plot.png").stat().st_size > 1000


@pytest.mark.parametrize("replay", [loo, predict, lambda p: to_arviz(p, groups=["log_likelihood"])])
def test_replays_of_data_sets_are_refused_by_name(
    replay: Callable[[Posterior], Any], side_by_side: Posterior
) -> None:
    with pytest.raises(InputError, match="2 data sets side by side"):
        replay(side_by_side)


# --- what the program computes is computed again --------------------------------------------------------------------


def test_replays_hold_latents_and_compute_the_rest() -> None:
    """With the deterministic site among the draws, or without it, data are scored and predicted the same."""
    posterior = infer(schools, ENGINE, data={"y": torch.tensor([0.0, 1.0, 2.0])}, num_draws=60, num_chains=4)
    assert torch.allclose(posterior["ratio"], posterior["loc"] / posterior["scale"])
    bare = replace(posterior, draws={name: posterior[name] for name in ("loc", "scale")})
    assert loo(posterior).elpd == pytest.approx(loo(bare).elpd, abs=0.05)  # ArviZ takes ESS over all sites
    assert torch.equal(log_likelihood(posterior)["y"], log_likelihood(bare)["y"])
    assert torch.equal(predict(posterior, seed=1)["y"], predict(bare, seed=1)["y"])
    groups = ["posterior", "log_likelihood", "posterior_predictive", "prior_predictive"]
    assert to_arviz(posterior, groups=groups).log_likelihood["y"].shape == (4, 60, 3)
    wrong = replace(posterior, draws=posterior.draws | {"ratio": torch.zeros(4, 60)})
    assert torch.equal(predict(wrong, seed=1)["y"], predict(bare, seed=1)["y"])


def test_programs_with_improper_sites_are_replayed_but_not_simulated() -> None:
    def flat() -> None:
        loc = pyro.sample("loc", dist.ImproperUniform(dist.constraints.real, (), ()))
        with pyro.plate("row", 3):
            pyro.sample("y", dist.Normal(loc, 1.0))

    posterior = infer(flat, ENGINE, data={"y": torch.arange(3.0)}, num_draws=20, num_chains=2)
    data = to_arviz(posterior)
    assert set(data.groups()) == {
        "posterior", "posterior_predictive", "log_likelihood", "sample_stats", "observed_data",
    }  # fmt: skip
    with pytest.raises(InputError, match="Group 'prior' cannot be given: sites 'loc' have improper priors"):
        to_arviz(posterior, groups=["prior"])
    with pytest.raises(InputError, match="flat cannot be simulated: 'loc' has an improper law"):
        predict(flat, num_draws=3)


def test_a_program_with_other_inputs_computes_its_records_anew() -> None:
    """A record whose shape follows the inputs does not stand in the way of new ones."""

    def line(x: Tensor) -> None:
        slope = pyro.sample("slope", dist.Normal(0.0, 1.0))
        mean = pyro.deterministic("mean", slope * x)
        with pyro.plate("row", len(x)):
            pyro.sample("y", dist.Normal(mean, 0.1))

    x = torch.linspace(0, 1, 5)
    draws = {"slope": torch.full((1, 50), 2.0), "mean": (2 * x).expand(1, 50, 5)}
    posterior = Posterior(draws, "iid", "exact", "Exact", Cost(), target=read(line, {"y": 2 * x}, (x,)))
    y = predict(posterior, args=(torch.tensor([10.0, 20.0]),))["y"]
    assert y.shape == (1, 50, 2)
    assert torch.allclose(y.mean((0, 1)), torch.tensor([20.0, 40.0]), atol=0.1)
