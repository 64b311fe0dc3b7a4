"""SplitGibbs against exact posteriors.

The sharpest check needs no convergence: draws of the exact posterior stay draws of it. A few sweeps of thousands of
them change the averages of x and its products by what is random alone, and each row is its own control.

- observations that are Gaussian and linear: 8,000 exact draws of the posterior of an asymmetric mixture. The averages
  of coordinates and their products are compared; what moves one by 4.5/sqrt(8000) = 5 % of the standard deviation of
  its change is seen.
- any program: 3,000 (x, z, y) from the joint law, each y a data set of its own; after a few sweeps (x', z', y) has that
  law. A change of 8 % is seen.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import Tensor

from conditioned_tools import (
    DTYPE,
    Linear,
    errors,
    gaussian_prior,
    linear,
    mean_z,
    mixture,
    sd_z,
    white_gaussian,
)
from probgen import Batch, GaussianMixture, InputError, Posterior, UnsupportedError, infer, summary
from probgen.core import Cost, DataSets
from probgen.inference.split_gibbs import SplitGibbs
from probgen.models import vae
from probgen.priors import split
from probgen.priors.conditioned import Conditioned
from probgen.priors.prior import Prior
from probgen.processes import EDM, VP
from probgen.randomness import Noise, forked_rng
from probgen.targets import read

ALLOWED_Z = 4.5
NUM_ROWS = 8000


def posterior_of(draws: dict[str, Tensor]) -> Posterior:
    """Draws `(n, ...)` as n chains to start from."""
    return Posterior({name: x[:, None] for name, x in draws.items()}, "iid", "exact", "exact", Cost())


def products(*parts: Tensor) -> Tensor:
    """All coordinates and their products, `(n, k)`."""
    x = torch.cat([part.reshape(len(part), -1) for part in parts], 1)
    rows, columns = torch.triu_indices(x.shape[1], x.shape[1])
    return torch.cat((x, x[:, rows] * x[:, columns]), 1)


def change(before: Tensor, after: Tensor) -> float:
    """The largest change of an average from `(n, k)` to `(n, k)`, in standard errors of the change."""
    d = after - before
    return float((d.mean(0) / (d.std(0) / math.sqrt(len(d)))).abs().nan_to_num(0.0).max())


def change_by_a_sweep(testbed: Linear, y: Tensor, engine: SplitGibbs) -> float:
    """How much exact draws of the posterior change, as a z value."""
    case = testbed.given(y)
    with forked_rng(1):
        x = case.posterior.model(Batch(num_rows=NUM_ROWS))
    found = infer(
        testbed.program, engine, data=case.data, num_draws=1, num_chains=NUM_ROWS,
        init=posterior_of({"x": x}),
    )  # fmt: skip
    return change(products(x), products(found["x"][:, 0]))


TESTBED = linear(dim=3, noise=0.7, num_seen=2)
Y = TESTBED.pairs(1, seed=1)[1][0]
STILL = SplitGibbs(num_warmup=0, num_steps=40, thin=5)


@pytest.mark.parametrize(
    "changes",
    [{}, {"rho": 0.15}, {"rho": 0.6}, {"num_temperatures": 2}],
    ids=["largest rho", "smaller rho", "refusing", "swapping"],
)
def test_sweeps_leave_the_posterior_of_a_mixture(changes: dict[str, Any]) -> None:
    assert change_by_a_sweep(TESTBED, Y, replace(STILL, **changes)) < ALLOWED_Z


def broken_pull(draw: Callable[..., Tensor]) -> Callable[[pytest.MonkeyPatch], None]:
    return lambda patch: patch.setattr(split.Pull, "draw", draw)


def in_full(pull: split.Pull, x: Tensor, at: split.Near, noise: Tensor) -> Tensor:
    """v ~ p(y | v) N(v; x, rho^2 I), the noise of y left in full: the split as it was."""
    gain = pull.rho**2 * at.singular / (1 + (pull.rho * at.singular) ** 2)
    left = (1 - gain * at.singular).sqrt()
    return x + at.back(gain * at.along) + pull.rho * (noise - at.back((1 - left) * at.in_rows(noise)))


def uncoupled(pull: split.Pull, x: Tensor, at: split.Near, noise: Tensor) -> Tensor:
    """v about E[x], whatever x is."""
    return TRUE_DRAW(pull, x.mean(0).expand_as(x), at, noise)


def wrong_level(patch: pytest.MonkeyPatch) -> None:
    """The prior denoises from 1.4 rho."""
    right = split.levels
    patch.setattr(
        "probgen.inference.split_gibbs.levels",
        lambda process, rho, n: right(process, min(1.4 * rho, 100.0), n),
    )


def never_refusing(patch: pytest.MonkeyPatch) -> None:
    patch.setattr("probgen.inference.split_gibbs._log_ratio", lambda new, old: torch.zeros_like(new))


def swapping_always(patch: pytest.MonkeyPatch) -> None:
    patch.setattr("probgen.inference.split_gibbs._Rung.log_lik", property(lambda rung: rung.x[:, 0] * 0))


TRUE_DRAW = split.Pull.draw
TWINS: dict[str, tuple[dict[str, Any], Callable[[pytest.MonkeyPatch], None]]] = {
    "R in full": ({}, broken_pull(in_full)),
    "uncoupled": ({}, broken_pull(uncoupled)),
    "wrong level": ({}, wrong_level),
    "never refusing": ({"rho": 0.6}, never_refusing),
    "swapping whatever comes": ({"num_temperatures": 2}, swapping_always),
}


@pytest.mark.parametrize("name", TWINS)
def test_broken_sweeps_are_seen(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    changes, break_it = TWINS[name]
    break_it(monkeypatch)
    assert change_by_a_sweep(TESTBED, Y, replace(STILL, **changes)) > ALLOWED_Z + 1


# --- any program ----------------------------------------------------------------------------------------------------

PRIOR = GaussianMixture.example(2)
SEEN = torch.tensor([[1.0, 0.3], [-0.5, 0.8]], dtype=DTYPE)


def crooked() -> None:
    """Gaussian sites that are not linear in x, counts, and an unknown noise scale."""
    x = pyro.sample("x", Prior(PRIOR))
    scale = pyro.sample("scale", dist.LogNormal(torch.tensor(-0.7, dtype=DTYPE), 0.4))
    loc = (SEEN @ x[..., None])[..., 0]
    pyro.sample("y", dist.Normal(loc + 0.5 * loc.sin(), scale).to_event(1))
    pyro.sample("count", dist.Poisson((0.5 * x[..., 0] + 0.5).exp()))


def joint(n: int) -> dict[str, Tensor]:
    """n draws of all sites of `crooked`."""
    with forked_rng(3):
        x = PRIOR.model(Batch(num_rows=n))
        scale = (-0.7 + 0.4 * torch.randn(n, dtype=DTYPE)).exp()
        loc = x @ SEEN.mT
        y = loc + 0.5 * loc.sin() + scale[:, None] * torch.randn(n, 2, dtype=DTYPE)
        return {"x": x, "scale": scale, "y": y, "count": torch.poisson((0.5 * x[:, 0] + 0.5).exp())}


def change_of_the_joint_law(engine: SplitGibbs) -> float:
    before = joint(3000)
    seen = {name: before[name] for name in ("y", "count")}
    start = {name: before[name][None, None] for name in ("x", "scale")}
    found = infer(
        crooked, engine, data=DataSets(seen), num_draws=1, num_chains=1,
        init=Posterior(start, "iid", "exact", "exact", Cost()),
    )  # fmt: skip
    after = {name: found[name][0, 0] for name in start}
    return change(products(*before.values()), products(*after.values(), *seen.values()))


GENERAL = SplitGibbs(rho=0.25, num_warmup=0, num_steps=40, thin=4)


@pytest.mark.parametrize("num_temperatures", [1, 2])
def test_sweeps_leave_the_joint_law_of_any_program(num_temperatures: int) -> None:
    assert change_of_the_joint_law(replace(GENERAL, num_temperatures=num_temperatures)) < ALLOWED_Z


def test_refusing_is_needed(monkeypatch: pytest.MonkeyPatch) -> None:
    never_refusing(monkeypatch)
    assert change_of_the_joint_law(replace(GENERAL, rho=0.8)) > 2 * ALLOWED_Z


# --- from where chains start ----------------------------------------------------------------------------------------


def test_many_chains_at_once_are_draws_of_the_posterior() -> None:
    """x ~ N(0, I_8), y = 1, noise .5: mean .8, sd .447, with 4,096 chains of one draw."""
    case = white_gaussian()
    engine = SplitGibbs(num_steps=40, num_warmup=4)
    x = infer(case.program, engine, data=case.data, num_draws=1, num_chains=4096).flat("x")
    assert float(mean_z(x, case.mean).abs().max()) < ALLOWED_Z
    assert float(sd_z(x, case.sd).abs().max()) < ALLOWED_Z


def test_one_chain_is_draws_of_the_posterior() -> None:
    """The same by one chain of 250 draws, which rho below its largest makes depend on each other."""
    case = white_gaussian(dim=8)
    engine = SplitGibbs(rho=0.4, num_steps=20, num_warmup=20)
    x = infer(case.program, engine, data=case.data, num_draws=250, num_chains=1).flat("x")
    # A chain x' = a x + noise has a = (1 - rho^2/noise^2)/(1 + rho^2).
    a = (1 - 0.4**2 / 0.5**2) / (1 + 0.4**2)
    of_mean, of_square = math.sqrt((1 + a) / (1 - a)), math.sqrt((1 + a**2) / (1 - a**2))
    assert float(mean_z(x, case.mean).abs().max()) < ALLOWED_Z * of_mean
    assert float(sd_z(x, case.sd).abs().max()) < ALLOWED_Z * of_square
    lagged = (x[1:] - case.mean) * (x[:-1] - case.mean) / case.sd**2
    assert abs(float(lagged.mean()) - a) < 0.1  # 4.5 standard errors over 2,000 products


def test_weights_of_modes_from_many_chains() -> None:
    """Falling rho leaves chains in modes of weights .642, .357, .002 about as often: 300 chains know them to .028."""
    case = mixture(dim=4, noise=0.5)
    x = infer(case.program, SplitGibbs(), data=case.data, num_draws=4, num_chains=300).flat("x")
    weights = case.posterior.responsibilities(x).mean(0)
    assert torch.allclose(weights, case.posterior.weights, atol=ALLOWED_Z * 0.028)
    assert max(errors(x, case.posterior)) < 0.2


@pytest.mark.slow
def test_chains_that_swap_forget_their_modes() -> None:
    """R-hat under 1.03 where without swaps it is over 1.1, and the weights known to .05 from 20 chains."""
    case = mixture(dim=4, noise=0.5)

    def run(num_temperatures: int) -> tuple[float, Tensor]:
        engine = SplitGibbs(num_temperatures=num_temperatures)
        found = infer(case.program, engine, data=case.data, num_draws=200, num_chains=20)
        r_hat = float(summary(found).table["r_hat"].max())
        return r_hat, case.posterior.responsibilities(found.flat("x")).mean(0)

    alone, _ = run(1)
    r_hat, weights = run(2)
    assert alone > 1.1
    assert r_hat < 1.03
    assert torch.allclose(weights, case.posterior.weights, atol=0.06)


@pytest.mark.slow
@pytest.mark.parametrize("dim", [2, 16])
def test_coverage(dim: int) -> None:
    """90 % intervals of 1,000 posteriors side by side cover the truth: 87 to 93 %."""
    testbed = linear(dim)
    x, y = testbed.pairs(1000)
    engine = SplitGibbs(num_warmup=60, thin=3)
    draws = infer(testbed.program, engine, data=DataSets({"y": y}), num_draws=6, num_chains=24).flat("x")
    inside = (x > draws.quantile(0.05, 0)) & (x < draws.quantile(0.95, 0))
    assert 0.87 < float(inside.double().mean()) < 0.93


# --- the prior's step -----------------------------------------------------------------------------------------------


def shortfall(rho: float, num_steps: int) -> float:
    """1 - sd/exact sd of x ~ p(x | v), p = N(0, 1), over 20,000 draws: known to .005."""
    prior = gaussian_prior(1)
    conditioned = Conditioned(
        read(lambda: pyro.sample("y", dist.Normal(pyro.sample("x", Prior(prior)), 1.0)))
    )
    path = split.levels(prior.process(), rho, num_steps)
    noises = Noise(0, 1, 20_000, (1,), DTYPE).each(range(num_steps))
    x = split.draw_prior(conditioned, torch.full((20_000, 1), 0.7, dtype=DTYPE), path, noises)
    assert abs(float(x.mean()) - 0.7 / (1 + rho**2)) < ALLOWED_Z * float(x.std()) / math.sqrt(20_000)
    return 1 - float(x.std()) * math.sqrt(1 + 1 / rho**2)


@pytest.mark.parametrize("rho", [0.45, 2.0])
def test_draws_of_the_prior_given_noise(rho: float, monkeypatch: pytest.MonkeyPatch) -> None:
    coarse, fine = shortfall(rho, 10), shortfall(rho, 20)
    assert abs(fine) < 0.02
    assert fine < 0.5 * coarse
    monkeypatch.setattr(split, "draw_prior", by_the_bridge_alone)
    assert shortfall(rho, 20) > 0.08


def by_the_bridge_alone(conditioned: Conditioned, v: Tensor, path: list[split.Level], noises: Any) -> Tensor:
    """The twin: q(x_s | x_t, x_0hat) as it is, without the spread of x_0."""
    u = v
    for level, lower, z in zip(path[:-1], path[1:], noises, strict=True):
        shrink = (lower.ratio / level.ratio) ** 2
        x_0 = conditioned.denoised(level.alpha * u, level.t)
        u = shrink * u + (1 - shrink) * x_0 + lower.ratio * math.sqrt(1 - shrink) * z
    return conditioned.denoised(path[-1].alpha * u, path[-1].t)


def test_pull_has_the_density_it_says() -> None:
    """log w = log p(y, z | x) + log q(v | x) - log N(v; x, rho^2 I), by explicit normal laws."""
    values = joint(3)
    conditioned = Conditioned(read(crooked, {name: values[name][0] for name in ("y", "count")}))
    x, z = values["x"], values["scale"].log()[:, None]
    at = split.near(conditioned, x, z)
    residual, jacobian = conditioned.linearised(x, z)
    rho = 0.9 / float(at.singular.max())
    eye = torch.eye(2, dtype=DTYPE)
    slope = at.slope / (rho * at.slope.norm(dim=1, keepdim=True) / math.sqrt(2)).clamp_min(1)
    loc = x + rho**2 * (slope + (residual[:, None] @ jacobian)[:, 0])
    law = dist.MultivariateNormal(loc, rho**2 * (eye - rho**2 * jacobian.mT @ jacobian))
    v = x + rho * torch.tensor([[0.3, -1.0], [1.2, 0.4], [-0.7, 0.1]], dtype=DTYPE)
    expected = conditioned.log_lik(x, z).log_prob + law.log_prob(v) - dist.Normal(x, rho).log_prob(v).sum(1)
    assert torch.allclose(split.Pull(rho).log_weight(x, at, v), expected)


# --- what a run keeps to --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("num_temperatures", [1, 2])
def test_a_chain_is_its_own_and_goes_on(num_temperatures: int) -> None:
    case = mixture(dim=2)
    engine = SplitGibbs(num_steps=5, num_warmup=0, num_temperatures=num_temperatures)
    start = posterior_of({"x": torch.tensor([[1.0, 0.5], [-1.0, 0.5], [0.4, -1.3]], dtype=DTYPE)})
    several = infer(case.program, engine, data=case.data, num_draws=6, num_chains=3, init=start)
    rate, rho = several.stats["acceptance_rate"], several.run_stats["rho"]
    assert (rate.shape, rho.shape) == ((3, 6), (3,))
    assert several.cost.network_calls == num_temperatures * 6 * 6
    first = infer(case.program, engine, data=case.data, num_draws=2, num_chains=3, init=start)
    rest = infer(case.program, engine, data=case.data, num_draws=4, state=first.state)
    assert torch.allclose(several["x"], torch.cat((first["x"], rest["x"]), 1), atol=1e-10)
    if num_temperatures == 1:  # where there are more, the hottest depends on all chains
        one = infer(case.program, engine, data=case.data, num_draws=6, num_chains=1, init=first_chain(start))
        assert torch.allclose(several["x"][:1], one["x"], atol=1e-10)


def first_chain(posterior: Posterior) -> Posterior:
    return posterior_of({name: x[:1, 0] for name, x in posterior.draws.items()})


def test_plates_other_latents_and_data_sets_keep_their_shapes() -> None:
    def program() -> None:
        scale = pyro.sample("scale", dist.HalfNormal(torch.ones((), dtype=DTYPE)))
        with pyro.plate("images", 3):
            x = pyro.sample("x", Prior(PRIOR))
            first = pyro.deterministic("first", x[..., 0])
            pyro.sample("y", dist.Normal(first, scale))

    y = torch.linspace(-1, 1, 6, dtype=DTYPE).reshape(2, 3)
    found = infer(
        program, SplitGibbs(num_steps=5, num_warmup=10), data=DataSets({"y": y}), num_draws=4, num_chains=2
    )
    shapes = {name: tuple(value.shape) for name, value in found.draws.items()}
    assert shapes == {"scale": (2, 4, 2), "x": (2, 4, 2, 3, 2), "first": (2, 4, 2, 3)}
    assert found.dims["x"] == ("data_set", "images", "x_dim_0")
    assert torch.equal(found["first"], found["x"][..., 0])
    assert found.stats["others_acceptance_rate"].shape == (2, 4, 2)
    assert found.run_stats["step_size"].shape == (2, 2)


def test_chains_leave_places_where_the_program_fails() -> None:
    """Half of the prior's draws have a likelihood of NaN; none of the posterior's has."""

    def program() -> None:
        x = pyro.sample("x", Prior(PRIOR))
        pyro.sample("y", dist.Exponential(x[..., 0].sqrt(), validate_args=False))

    engine = SplitGibbs(num_steps=5, num_warmup=30)
    found = infer(program, engine, data={"y": torch.ones((), dtype=DTYPE)}, num_draws=4, num_chains=20)
    assert float(found["x"][..., 0].min()) > 0


def test_bad_input_is_refused_in_words() -> None:
    def seen(noise: float, process: Any = VP()) -> Callable[[], None]:  # noqa: B008 - frozen
        prior = gaussian_prior(2, process)

        def program() -> None:
            pyro.sample("y", dist.Normal(pyro.sample("x", Prior(prior)).sin(), noise).to_event(1))

        return program

    data = {"y": torch.zeros(2, dtype=DTYPE)}
    quick = SplitGibbs(num_steps=3, num_warmup=4)

    def run(
        program: Callable[[], Any], engine: SplitGibbs = quick, data: dict[str, Tensor] = data
    ) -> Posterior:
        return infer(program, engine, data=data, num_draws=2)

    with pytest.raises(InputError, match="from 0.0105 at t_min to 152 at t_max"):
        run(seen(0.1), replace(quick, rho=0.001))
    with pytest.raises(InputError, match="smaller t_min"):
        run(linear(dim=2, noise=0.005).program, data={"y": torch.zeros(1, dtype=DTYPE)})
    with pytest.raises(InputError, match="there must be a rho"):
        run(seen(0.1), replace(quick, num_warmup=0))
    with pytest.raises(InputError, match="has no latent site with the law of a fitted program"):
        run(lambda: pyro.sample("y", dist.Normal(pyro.sample("x", dist.Normal(0.0, 1.0)), 1.0).expand([2])))
    decoder = Prior(vae.example())
    pixels = torch.zeros(decoder.event_shape)
    with pytest.raises(UnsupportedError, match="is no diffusion"):
        run(
            lambda: pyro.sample("y", dist.Normal(pyro.sample("x", decoder), 1.0).to_event(pixels.ndim)),
            data={"y": pixels},
        )
    state = run(seen(0.1, EDM())).state
    with pytest.raises(InputError, match="expected"):
        infer(linear(dim=3).program, quick, data={"y": data["y"][:1]}, num_draws=2, state=state)
    for wrong in ({"rho": 0.0}, {"num_steps": 0}, {"num_warmup": -1}, {"target_accept": 1.0}, {"thin": 0}):
        with pytest.raises(InputError, match=next(iter(wrong))):
            SplitGibbs(**wrong)
