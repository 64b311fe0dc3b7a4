"""Verdicts: each alarm rings for a posterior broken on purpose, and for no sound one."""

import math
import re
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import Tensor

from probgen.core import Batch, Cost, Estimate, InputError, Posterior
from probgen.diagnostics.loo import example as exact_mean
from probgen.diagnostics.loo import loo
from probgen.diagnostics.predict import example as expected_data
from probgen.diagnostics.predict import predict
from probgen.diagnostics.summary import example as chains
from probgen.diagnostics.summary import summary
from probgen.targets import Pair, read


def of_kind(kind: str, draws: Tensor, guarantee: str = "exact") -> Posterior:
    return Posterior({"z": draws}, kind, guarantee, "Made by hand", Cost())  # type: ignore[arg-type]


def autoregressive(num_chains: int, num_draws: int, rho: float, seed: int) -> Tensor:
    """Chains of N(0, 1) whose neighbours correlate by rho."""
    noise = torch.randn(num_draws, num_chains, generator=torch.Generator().manual_seed(seed))
    x = [noise[0]]
    for z in noise[1:]:
        x.append(rho * x[-1] + math.sqrt(1 - rho**2) * z)
    return torch.stack(x, dim=1)


# --- summary -------------------------------------------------------------------------------------------------------


def test_sound_chains_pass() -> None:
    verdict = summary(chains())
    assert verdict.ok
    assert verdict.advice == []
    assert list(verdict.table.index) == ["tau", "z[north]", "z[east]", "z[south]"]
    assert verdict.table.loc["z[south]", "mean"] == pytest.approx(
        float(chains()["z"][..., 2].mean()), rel=1e-5
    )
    assert "Nothing that was checked is wrong." in str(verdict)


def moved(p: Posterior, by: float) -> Posterior:
    return replace(p, draws=p.draws | {"z": p["z"] + by * torch.tensor([0.0, 0, 0, 1])[:, None, None]})


def with_stats(p: Posterior, **stats: Tensor) -> Posterior:
    return replace(p, stats=p.stats | stats)


BROKEN: dict[str, tuple[Callable[[Posterior], Posterior], str]] = {
    "one chain moved by one sd": (lambda p: moved(p, 1.0), r"R-hat is 1\.\d+ for z\[.*reparameterise"),
    "few draws": (
        lambda p: replace(p, draws={"z": p["z"][:, :50]}, stats={}),
        "bulk effective sample size is .* Draw",
    ),
    "one chain": (lambda p: replace(p, draws={"z": p["z"][:1]}, stats={}), "One chain only.*num_chains=4"),
    "one divergence": (
        lambda p: with_stats(p, diverging=torch.arange(2000).reshape(4, 500) == 7),
        "There was 1 divergence after warm-up.*target_accept",
    ),
    "six divergences": (
        lambda p: with_stats(p, diverging=torch.arange(2000).reshape(4, 500) < 6),
        "There were 6 divergences after warm-up.*target_accept.*non-centred",
    ),
    "deep trees": (
        lambda p: with_stats(p, reached_max_tree_depth=torch.arange(2000).reshape(4, 500) < 100),
        "5% of the transitions reached the maximum tree depth.*max_tree_depth",
    ),
    "slow energy": (
        lambda p: with_stats(p, energy=autoregressive(4, 500, 0.99, seed=0)),
        "E-BFMI is 0.0.*Reparameterise",
    ),
    "a site that never moved": (
        lambda p: replace(p, draws=p.draws | {"c": torch.ones(4, 500)}),
        "c never moved",
    ),
    "NaN": (lambda p: replace(p, draws=p.draws | {"z": p["z"] / 0.0 * 0.0}), "Draws of z hold NaN"),
    "evidence in doubt": (
        lambda p: replace(
            p,
            evidence=Estimate(
                torch.zeros(1), torch.ones(1), "unbiased", 1, trusted=False, reason="k-hat 0.9."
            ),
        ),
        "evidence .* not to be trusted: k-hat 0.9",
    ),
}


@pytest.mark.parametrize("name", BROKEN)
@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")  # NaN draws, handed to ArviZ on purpose
def test_each_alarm_rings(name: str) -> None:
    breaking, sentence = BROKEN[name]
    verdict = summary(breaking(chains()))
    assert not verdict.ok
    assert any(re.search(sentence, line) for line in verdict.problems), verdict.problems


def test_energy_of_independent_draws_is_fine() -> None:
    assert summary(with_stats(chains(), energy=torch.randn(4, 500))).ok


@pytest.mark.parametrize("kind", ["iid", "approximate", "weighted"])
def test_independent_draws_have_no_r_hat(kind: str) -> None:
    x = torch.randn(2, 3000, 2) * torch.tensor([1.0, 3.0])
    table = summary(of_kind(kind, x)).table
    assert list(table.columns) == ["mean", "sd", "5%", "50%", "95%", "mcse_mean"]
    assert list(table.index) == ["z[0]", "z[1]"]
    flat = x.flatten(0, 1).numpy()
    np.testing.assert_allclose(table["95%"], np.quantile(flat, 0.95, axis=0), rtol=1e-5)
    np.testing.assert_allclose(table["mcse_mean"], flat.std(0, ddof=1) / math.sqrt(6000), rtol=1e-3)


def test_what_draws_cannot_tell_is_noted() -> None:
    approximate = summary(of_kind("approximate", torch.randn(1, 100), "approximate"))
    assert approximate.ok
    assert "ImportanceWeighted" in approximate.advice[0]
    assert (
        "double the number of steps" in summary(of_kind("iid", torch.randn(1, 100), "discretised")).advice[0]
    )
    assert "One run only" in summary(of_kind("weighted", torch.randn(1, 100))).advice[0]


def test_long_tables_show_the_worst() -> None:
    x = torch.randn(4, 200, 30)
    x[0, :, 17] += 2
    text = str(summary(of_kind("mcmc", x, "asymptotic")))
    assert text.splitlines()[3].startswith("z[17]")
    assert "and 18 entries with a smaller r_hat" in text
    assert max(map(len, text.splitlines())) <= 110


def test_summary_refuses_what_it_cannot_judge() -> None:
    with pytest.raises(InputError, match="at least 4 draws a chain, got 3"):
        summary(of_kind("mcmc", torch.randn(4, 3)))
    with pytest.raises(InputError, match="did you mean 'tau'"):
        summary(chains(), sites=["tua"])
    assert list(summary(chains(), sites=["tau"]).table.index) == ["tau"]


# --- predict -------------------------------------------------------------------------------------------------------


def slope(x: Tensor) -> None:
    w = pyro.sample("w", dist.Normal(0.0, 1.0))
    with pyro.plate("row", len(x)):
        pyro.sample("y", dist.Normal(w * x, 0.1))


def slope_posterior() -> Posterior:
    draws = {"w": 2 + 0.01 * torch.randn(2, 300, generator=torch.Generator().manual_seed(0))}
    return Posterior(
        draws,
        "mcmc",
        "asymptotic",
        "hand",
        Cost(),
        target=read(slope, {"y": torch.ones(3)}, (torch.ones(3),)),
    )


def test_prior_predictive_has_the_law_of_the_program() -> None:
    """y ~ N(1, 5) over 2,000 draws, within 4.5 standard errors; noise left out (variance 4) is seen."""
    y = expected_data()["y"].flatten()
    error = 5 * math.sqrt(2 / len(y))
    assert abs(y.mean() - 1) < 4.5 * math.sqrt(5 / len(y))
    assert abs(y.var() - 5) < 4.5 * error
    assert abs(expected_data()["z"].var() - 5) > 4.5 * error
    assert (expected_data().kind, expected_data().guarantee) == ("iid", "exact")


def test_posterior_predictive_keeps_chains_and_kind() -> None:
    found = predict(slope_posterior(), seed=1)
    assert found["y"].shape == (2, 300, 3)
    assert (found.kind, found.dims["y"]) == ("mcmc", ("row",))
    assert found["y"].std() == pytest.approx(0.1, rel=0.1)
    assert torch.equal(found["y"], predict(slope_posterior(), seed=1)["y"])
    assert predict(slope_posterior(), num_draws=7)["y"].shape == (2, 7, 3)


def test_posterior_predictive_at_new_inputs() -> None:
    found = predict(slope_posterior(), args=(torch.tensor([0.0, 10.0]),))
    assert found["y"].mean((0, 1)).tolist() == pytest.approx([0.0, 20.0], abs=0.05)


def test_latents_of_a_row_are_not_carried_to_other_rows() -> None:
    def program(size: int) -> None:
        with pyro.plate("row", size):
            pyro.sample("y", dist.Normal(pyro.sample("z", dist.Normal(0.0, 1.0)), 1.0))

    p = Posterior(
        {"z": torch.zeros(1, 9, 3)},
        "iid",
        "exact",
        "hand",
        Cost(),
        target=read(program, {"y": torch.ones(3)}, (3,)),
    )
    with pytest.raises(InputError, match=r"'z'.*\(5,\).*\(3,\)"):
        predict(p, args=(5,))


def test_predicting_rows_of_a_program() -> None:
    def model(batch: Batch) -> None:
        w = pyro.sample("w", dist.Normal(0.0, 1.0))
        with batch.plate():
            pyro.sample("x", dist.Normal(w, 1.0).expand((4,)).to_event(1))

    program = Pair(model)
    found = predict(program, num_draws=20)
    assert {name: tuple(value.shape) for name, value in found.draws.items()} == {
        "w": (1, 20),
        "x": (1, 20, 4),
    }
    p = Posterior(
        {"w": torch.zeros(1, 9)}, "iid", "exact", "hand", Cost(), target=read(program, torch.ones(3, 4))
    )
    assert predict(p)["x"].shape == (1, 9, 3, 4)


@pytest.mark.parametrize(
    ("call", "complaint"),
    [
        (lambda: predict(slope), "Pass num_draws="),
        (lambda: predict(slope, num_draws=0), "num_draws must be an integer >= 1"),
        (lambda: predict(slope_posterior(), num_draws=301), r"1\.\.300"),
        (lambda: predict(chains()), "does not know its program"),
        (
            lambda: predict(replace(slope_posterior(), target=read(slope, None, (torch.ones(3),)))),
            "Nothing was observed",
        ),
        (lambda: predict(slope, num_draws=5, seed=-1), "seed"),
        (lambda: predict(slope, num_draws=5), "Running slope .* failed"),
    ],
)
def test_predict_refuses(call: Callable[[], Posterior], complaint: str) -> None:
    with pytest.raises(InputError, match=complaint):
        call()


# --- leave one out -------------------------------------------------------------------------------------------------


def exact_elpd(y: Tensor) -> float:
    """sum_i log p(y_i | y_-i) for y ~ N(loc, 1), loc ~ N(0, 10^2)."""
    total = 0.0
    for i in range(len(y)):
        rest = torch.cat([y[:i], y[i + 1 :]])
        precision = len(rest) + 0.01
        total += float(dist.Normal(rest.sum() / precision, math.sqrt(1 + 1 / precision)).log_prob(y[i]))
    return total


def test_loo_meets_the_exact_answer() -> None:
    """Within 0.1 nats, three times its Monte Carlo error; log p given all rows, the broken twin, is 1 nat off."""
    posterior = exact_mean()
    found = loo(posterior)
    assert posterior.target is not None
    y = posterior.target.data["y"]
    assert found.elpd == pytest.approx(exact_elpd(y), abs=0.1)
    within = dist.Normal(posterior.flat("loc")[:, None], 1.0).log_prob(y).exp().mean(0).log().sum()
    assert abs(float(within) - exact_elpd(y)) > 0.5
    assert found.ok
    assert found.p_loo == pytest.approx(1, abs=0.5)
    assert found.elpd_i.shape == found.pareto_k.shape == (20,)
    assert "Every Pareto k is below" in str(found)


def test_a_row_that_decides_everything_has_a_bad_k() -> None:
    posterior = exact_mean()
    assert posterior.target is not None
    y = posterior.target.data["y"].clone()
    y[3] = 60.0
    loc = y.sum() / 20.01 + torch.randn(1, 2000) / 20.01**0.5
    found = loo(replace(posterior, draws={"loc": loc}, target=read(posterior.target.program, {"y": y})))
    assert not found.ok
    assert "1 of 20 rows of y" in found.advice[0]
    assert "row 3)" in found.advice[0]


def test_loo_asks_which_site() -> None:
    def program() -> None:
        w = pyro.sample("w", dist.Normal(0.0, 1.0))
        with pyro.plate("row", 4):
            pyro.sample("a", dist.Normal(w, 1.0))
            pyro.sample("b", dist.Normal(w, 1.0))
        pyro.sample("whole", dist.Normal(w, 1.0).expand([3]).to_event(1))

    data = {"a": torch.zeros(4), "b": torch.ones(4), "whole": torch.zeros(3)}
    p = Posterior(
        {"w": torch.randn(1, 100)}, "approximate", "approximate", "hand", Cost(), target=read(program, data)
    )
    assert loo(p, "b").site == "b"
    assert "approximation" in loo(p, "a").advice[-1]
    for site, complaint in ((None, "name one"), ("w", "was not observed"), ("whole", "no row to leave out")):
        with pytest.raises(InputError, match=complaint):
            loo(p, site)
