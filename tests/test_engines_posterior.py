"""Engines that condition: NUTS, SVI and the guide on programs whose posterior is known."""

from __future__ import annotations

import math
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer.autoguide import AutoMultivariateNormal, AutoNormal
from torch import Tensor

from global_state import SETTINGS, STREAMS, unchanged
from probgen import (
    DDPM,
    IWAE,
    NUTS,
    SVI,
    VAE,
    Ancestral,
    ConjugateGaussian,
    GaussianMixture,
    Guide,
    InputError,
    Optim,
    Posterior,
    ProbabilityFlowODE,
    ReverseSDE,
    TimeMLP,
    UnsupportedError,
    infer,
    summary,
    to_arviz,
)
from probgen.arviz_io import chain_error

Z = 4.5


def z_scores(posterior: Posterior, site: str, mean: Tensor, sd: Tensor) -> tuple[float, float]:
    """Largest |z| of the means and of the sds, Monte Carlo error counted by effective sample size where chains are."""
    draws = posterior[site]
    if posterior.kind == "mcmc":
        mean_error = torch.as_tensor(chain_error(draws.numpy()))
        square = torch.as_tensor(chain_error((draws - draws.mean((0, 1))).square().numpy()))
    else:
        n = posterior.num_chains * posterior.num_draws
        mean_error, square = sd / math.sqrt(n), sd.square() * math.sqrt(2 / n)
    flat = posterior.flat(site)
    return (
        float(((flat.mean(0) - mean) / mean_error).abs().max()),
        float(((flat.var(0) - sd.square()) / square).abs().max()),
    )


def conjugate() -> tuple[ConjugateGaussian, Tensor, Tensor, Tensor]:
    """An asymmetric conjugate program, three data, and the exact mean and sd of every latent."""
    program = ConjugateGaussian.example()
    x = torch.stack([torch.linspace(-1, 2, program.event_shape[0]) + i for i in range(3)]).to(torch.float64)
    exact = program.posterior(x)
    return program, x, exact.mean, exact.covariance_matrix.diagonal(dim1=-2, dim2=-1).sqrt()


def engines() -> list[Any]:
    return [
        Guide(),
        NUTS(num_warmup=200),
        SVI(guide=AutoMultivariateNormal, num_steps=3000, optim=Optim(lr=0.02, schedule="cosine")),
    ]


DRAWS = {"Guide": 4000, "NUTS": 500, "SVI": 4000}


@pytest.mark.parametrize("engine", engines(), ids=lambda e: type(e).__name__)
def test_engines_meet_the_exact_posterior(engine: Any) -> None:
    """Means and variances within 4.5 errors (for SVI also 0.02 sd of optimiser noise); R-hat < 1.01 for chains."""
    program, x, mean, sd = conjugate()
    name = type(engine).__name__
    posterior = infer(program, engine, data={"x": x}, num_draws=DRAWS[name], seed=3)
    assert posterior["z"].shape == (posterior.num_chains, DRAWS[name], *mean.shape)
    if name == "SVI":
        flat = posterior.flat("z")
        assert float(((flat.mean(0) - mean) / sd).abs().max()) < Z / math.sqrt(DRAWS[name]) + 0.05
        assert float((flat.std(0) / sd).log().abs().max()) < Z / math.sqrt(2 * DRAWS[name]) + 0.05
        return
    z_mean, z_variance = z_scores(posterior, "z", mean, sd)
    assert z_mean < Z
    assert z_variance < Z
    if name == "NUTS":
        table = summary(posterior).table
        assert float(table["r_hat"].max()) < 1.01
        assert int(posterior.stats["diverging"].sum()) == 0


def test_the_check_sees_a_wrong_posterior() -> None:
    """Draws shifted by 0.3 sd, or 10 % too wide, fail it."""
    program, x, mean, sd = conjugate()
    posterior = infer(program, Guide(), data={"x": x}, num_draws=4000)
    posterior.draws["z"] = posterior["z"] + 0.3 * sd
    assert z_scores(posterior, "z", mean, sd)[0] > Z
    posterior.draws["z"] = mean + (posterior["z"] - 0.3 * sd - mean) * 1.1
    assert z_scores(posterior, "z", mean, sd)[1] > Z


def eight_students() -> tuple[Any, Tensor]:
    """mu ~ N(0, 1), y | mu ~ N(mu, 1): the posterior of mu is N(sum y / (n + 1), 1 / (n + 1))."""
    y = torch.tensor([1.2, 0.4, 2.0, 1.1, 0.9, 1.5, 0.2, 1.7])

    def model() -> None:
        mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
        with pyro.plate("student", len(y)):
            pyro.sample("y", dist.Normal(mu, 1.0))

    return model, y


def test_plain_pyro_functions_are_programs() -> None:
    model, y = eight_students()
    mean, sd = y.sum() / 9, torch.tensor(1 / 3)
    for engine, kwargs in ((NUTS(num_warmup=150), {"num_chains": 2}), (SVI(num_steps=1500), {})):
        posterior = infer(model, engine, data={"y": y}, num_draws=400, **kwargs)
        flat = posterior.flat("mu")
        assert float((flat.mean() - mean).abs() / sd) < 0.25
        assert float((flat.std() / sd).log().abs()) < 0.2


def test_own_guides_of_pyro_params_leave_the_store_as_it_was() -> None:
    model, y = eight_students()

    def scaled_model() -> None:
        scale = pyro.param("scale", torch.tensor(1.0))
        mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
        with pyro.plate("student", len(y)):
            pyro.sample("y", dist.Normal(mu, scale))

    def guide() -> None:
        loc = pyro.param("loc", torch.tensor(0.0))
        scale = pyro.param("spread", torch.tensor(1.0), constraint=dist.constraints.positive)
        pyro.sample("mu", dist.Normal(loc, scale))

    store = pyro.get_param_store()
    with store.scope():
        pyro.param("loc", torch.tensor(7.0))
        pyro.param("scale", torch.tensor(1.0))
        with unchanged(SETTINGS), unchanged(STREAMS):
            posterior = infer(scaled_model, SVI(guide=guide, num_steps=1500), data={"y": y}, num_draws=400)
        assert sorted(store.keys()) == ["loc", "scale"]
        assert float(pyro.param("loc").detach()) == 7.0
        assert float(pyro.param("scale").detach()) == 1.0  # the program's own parameter was not fitted
    assert float((posterior.flat("mu").mean() - y.sum() / 9).abs()) < 0.1


def test_svi_takes_an_objective() -> None:
    model, y = eight_students()
    posterior = infer(model, SVI(AutoNormal, num_steps=1000), data={"y": y}, num_draws=50)
    assert float(posterior.run_stats["elbo"]) < 0
    program, x, mean, sd = conjugate()
    posterior = infer(program, SVI(objective=IWAE(4), num_steps=300), data={"x": x}, num_draws=50)
    assert posterior["z"].shape[2:] == mean.shape


@pytest.mark.parametrize("engine", [*engines(), Ancestral(), ReverseSDE(5), ProbabilityFlowODE(5)], ids=repr)
def test_engines_leave_the_world_as_it_was(engine: Any) -> None:
    """Random streams, settings, weights and modes are untouched, and the same seed is bit-identical."""
    if engine.conditions:
        program, data = (
            ConjugateGaussian.example(),
            {"x": torch.zeros(2, ConjugateGaussian.example().event_shape[0], dtype=torch.float64)},
        )
        small = {"NUTS": NUTS(num_warmup=5), "SVI": SVI(num_steps=5)}
        engine = small.get(type(engine).__name__, engine)
    else:
        program, data = DDPM(TimeMLP((2,), width=8, num_blocks=1), num_steps=5), None
    program.train()
    before = {name: value.clone() for name, value in program.state_dict().items()}
    with unchanged(SETTINGS), unchanged(STREAMS):
        first = infer(program, engine, data=data, num_draws=6, num_chains=2, seed=5)
        again = infer(program, engine, data=data, num_draws=6, num_chains=2, seed=5)
        other = infer(program, engine, data=data, num_draws=6, num_chains=2, seed=6)
    for site, draws in first.draws.items():
        assert torch.equal(draws, again[site])
        assert not torch.equal(draws, other[site])
    assert program.training
    assert all(p.requires_grad for p in program.parameters())
    assert all(torch.equal(value, before[name]) for name, value in program.state_dict().items())


def test_chains_start_from_other_draws() -> None:
    model, y = eight_students()
    approximate = infer(model, SVI(num_steps=300), data={"y": y}, num_draws=10)
    posterior = infer(model, NUTS(num_warmup=20), data={"y": y}, num_draws=20, num_chains=2, init=approximate)
    assert posterior["mu"].shape == (2, 20)
    with pytest.raises(InputError, match="no value to start from for 'mu'"):
        infer(model, NUTS(num_warmup=5), data={"y": y}, num_draws=5, num_chains=1, init=Posterior(
            {"nu": torch.zeros(1, 3)}, "iid", "exact", "by hand", approximate.cost))  # fmt: skip


def test_ancestral_draws_follow_the_program() -> None:
    """A global latent is drawn anew for every draw; rows of a program with a plate are independent."""

    def model() -> None:
        mu = pyro.sample("mu", dist.Normal(2.0, 3.0))
        with pyro.plate("row", 2):
            pyro.sample("y", dist.Normal(mu, 1.0))

    posterior = infer(model, Ancestral(), num_draws=3000)
    assert posterior["y"].shape == (1, 3000, 2)
    y = posterior.flat("y")
    correlation = float(y.T.corrcoef()[0, 1])
    assert abs(correlation - 0.9) < Z * (1 - 0.81) / math.sqrt(3000)
    mixture = GaussianMixture.example()
    x = infer(mixture, Ancestral(), num_draws=20_000, num_chains=2)
    assert x["x"].shape == (2, 20_000, 2)
    error = (mixture.covariance.diagonal() / 40_000).sqrt()
    assert float(((x.flat("x").mean(0) - mixture.mean) / error).abs().max()) < Z


def test_everything_opens_in_arviz() -> None:
    program, x, mean, _ = conjugate()
    posterior = infer(program, NUTS(num_warmup=20), data={"x": x}, num_draws=20, num_chains=2)
    tree = to_arviz(posterior, groups=["posterior", "sample_stats", "observed_data"])
    assert tree.posterior["z"].dims == ("chain", "draw", "data", "z_dim_0")
    assert {"diverging", "lp", "energy", "step_size"} <= set(tree.sample_stats.data_vars)


# --- bad input --------------------------------------------------------------------------------------------------


def vae() -> VAE:
    return VAE.mlp((6,), 2, widths=(16,))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_draws": 0}, "num_draws must be an integer >= 1, got 0"),
        ({"num_draws": 2.5}, "num_draws must be an integer >= 1, got 2.5"),
        ({"num_chains": 0}, "num_chains must be an integer >= 1, got 0"),
        ({"seed": "today"}, "seed must be an integer"),
        ({"data": {"x": torch.full((2, 6), math.nan)}}, "Site 'x' holds 12 NaN or Inf"),
        ({"data": {"x": torch.zeros(2, 7)}}, r"Site 'x' of VAE: expected shape \(n, 6\), got \(2, 7\)"),
        ({"data": {"x": torch.zeros(6)}}, r"x\[None\]"),
        ({"data": {"x": torch.zeros(2, 6, dtype=torch.int64)}}, "expected floating point data"),
        ({"data": {"xx": torch.zeros(2, 6)}}, "VAE has no site 'xx'; did you mean 'x'"),
        ({"data": {"x": [1.0]}}, "torch.as_tensor"),
        ({"data": {"x": torch.zeros(0, 6)}}, "no data"),
    ],
)
def test_bad_input_is_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        infer(vae(), Guide(), **({"data": {"x": torch.zeros(2, 6)}} | options))


def test_bernoulli_data_out_of_range_is_named() -> None:
    from probgen.models import BernoulliLikelihood

    program = VAE.mlp((6,), 2, widths=(16,), likelihood=BernoulliLikelihood())
    with pytest.raises(InputError, match="Site 'x'.*leave the support of"):
        infer(program, NUTS(num_warmup=5), data={"x": torch.full((2, 6), 0.5)}, num_draws=5)


def test_engines_that_cannot_serve_say_which_would() -> None:
    for engine in (ReverseSDE(), ProbabilityFlowODE()):
        with pytest.raises(
            UnsupportedError, match=r"cannot serve VAE.*needs Diffusion programs.*What can: .*Ancestral"
        ):
            infer(vae(), engine)
    with pytest.raises(UnsupportedError, match=r"'x' was observed.*Guide.*NUTS.*SVI"):
        infer(vae(), Ancestral(), data={"x": torch.zeros(2, 6)})
    with pytest.raises(UnsupportedError, match="cannot serve GaussianMixture.*needs a guide"):
        infer(GaussianMixture.example(), Guide(), data={"x": torch.zeros(1, 2)})
    with pytest.raises(InputError, match=r"did you mean NUTS\(\)"):
        infer(vae(), NUTS)
    with pytest.raises(InputError, match="A program is a Pyro function"):
        infer(3, NUTS())
    with pytest.raises(InputError, match="Expected an engine"):
        infer(vae(), "nuts")


def test_nuts_names_what_it_cannot_sample() -> None:
    def discrete() -> None:
        c = pyro.sample("c", dist.Categorical(torch.ones(3)))
        pyro.sample("y", dist.Normal(c.float(), 1.0))

    with pytest.raises(InputError, match=r"Nothing to draw.*'c'.*discrete"):
        infer(discrete, NUTS(), data={"y": torch.tensor(1.0)})
    model, y = eight_students()
    with pytest.raises(InputError, match="every site of model is observed"):
        infer(model, NUTS(), data={"y": y, "mu": torch.tensor(0.0)})
    with pytest.raises(InputError, match=r"Site 'y': expected shape \(8,\), got \(7,\)"):
        infer(model, NUTS(), data={"y": y[:7]})
    with pytest.raises(InputError, match="target_accept must lie in"):
        NUTS(target_accept=1.2)
    with pytest.raises(InputError, match="num_warmup"):
        NUTS(num_warmup=0)


def test_a_program_that_fails_is_reported_in_words() -> None:
    def model() -> None:
        pyro.sample("y", dist.Normal(torch.zeros(2) + torch.zeros(3), 1.0))

    with pytest.raises(
        InputError, match="Running model on the given data and arguments failed: RuntimeError"
    ):
        infer(model, NUTS(), data={"y": torch.zeros(3)})


def test_posteriors_explain_themselves() -> None:
    program, x, _, _ = conjugate()
    posterior = infer(program, Guide(), data={"x": x}, num_draws=10)
    text = str(posterior)
    assert "1 x 10 draws by Guide" in text
    assert "approximation" in text
    with pytest.raises(InputError, match="no site 'zz'; did you mean 'z'"):
        posterior["zz"]
