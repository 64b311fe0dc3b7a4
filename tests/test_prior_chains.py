"""Chains around a fitted prior: in the noise it makes its draws of, on its score, and on its density."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import Tensor, nn

from conditioned_tools import DTYPE, Conjugate, Denoiser, gaussian_prior, linear, mixture, white_gaussian
from mcmc_tools import Moments, max_r_hat, worst_z
from probgen import DataSets, InputError, Posterior, UnsupportedError, infer
from probgen.core import Batch
from probgen.inference.chees import ChEES
from probgen.inference.hmc import HMC
from probgen.inference.mala import MALA
from probgen.inference.nuts import NUTS
from probgen.inference.parallel_tempering import ParallelTempering
from probgen.inference.ula import ULA
from probgen.inference.underdamped_langevin import UnderdampedLangevin
from probgen.models.conditional_vae import ConditionalVAE
from probgen.models.conjugate_gaussian import ConjugateGaussian
from probgen.models.energy import Energy
from probgen.models.flow_matching import FlowMatching
from probgen.models.gaussian_mixture import GaussianMixture
from probgen.models.score_sde import ScoreSDE
from probgen.models.vae import VAE, BernoulliLikelihood, FittedPrior
from probgen.nets import TimeMLP
from probgen.priors.conditioned import Conditioned
from probgen.priors.noise_space import NoiseDensity, NoiseSpace
from probgen.priors.prior import Prior
from probgen.priors.score_density import ScoreDensity
from probgen.targets import read

LIMIT = 4.5  # standard errors
NOISE = NoiseSpace()


def draws(
    program: Callable[[], Any], engine: Any, data: Any, num_draws: int, num_chains: int, **kw: Any
) -> Posterior:
    return infer(
        program, engine, data=data, num_draws=num_draws, num_chains=num_chains, seed=0, progress=False, **kw
    )


def by_coordinate(x: Tensor) -> dict[str, Tensor]:
    """Draws `(chain, draw, d)` as statistics by name."""
    return {f"x[{i}]": x[..., i] for i in range(x.shape[-1])}


def moments_of(exact: GaussianMixture) -> dict[str, Moments]:
    sds = exact.covariance.diagonal().sqrt()
    return {
        f"x[{i}]": Moments(float(m), float(s)) for i, (m, s) in enumerate(zip(exact.mean, sds, strict=True))
    }


# --- x ~ N(0, I), y = 1 ----------------------------------------------------------------------------------------------

FEW = NoiseSpace(steps=2)  # of white data the flow stands still: two steps are as good as many
QUICK = {
    "hmc": HMC(num_steps=4, num_warmup=80, space=FEW),
    "chees": ChEES(num_warmup=80, space=FEW),
    "mala": MALA(num_warmup=150, space=FEW, thin=4),
    "hmc in data space": HMC(num_steps=6, num_warmup=100),
    "underdamped on the score": UnderdampedLangevin(step_size=0.25, num_warmup=100, thin=4),
}
SLOW = {
    "nuts": NUTS(num_warmup=200, space="noise"),
    "tempering": ParallelTempering(HMC(num_steps=4, num_warmup=100, space="noise"), num_temperatures=3),
    "nuts in data space": NUTS(num_warmup=200),
}


def check_white(engine: Any) -> float:
    """The largest z of means and sds of 4,096 draws of x given y; a mean or sd off by 0.04 sd is 4.5 errors or more."""
    program, data, mean, sd = white_gaussian(8)
    x = draws(program, engine, data, 64, 64)["x"]
    assert x.shape == (64, 64, 8)
    return worst_z(by_coordinate(x), {f"x[{i}]": Moments(mean, sd) for i in range(8)}).size


@pytest.mark.parametrize("name", QUICK)
def test_gaussian_posterior(name: str) -> None:
    assert check_white(QUICK[name]) < LIMIT


@pytest.mark.slow
@pytest.mark.parametrize("name", SLOW)
def test_gaussian_posterior_slow(name: str) -> None:
    assert check_white(SLOW[name]) < LIMIT


def test_without_the_law_of_the_noise_the_posterior_is_another(monkeypatch: pytest.MonkeyPatch) -> None:
    """The twin whose density is p(y | f(eps)) alone: sd .5, not .447."""
    right = NoiseDensity.carried

    def flat(self: NoiseDensity, noise: Tensor) -> Any:
        carried = right(self, noise)
        return carried._replace(log_prob=0.0 * carried.log_prob)

    monkeypatch.setattr(NoiseDensity, "carried", flat)
    assert check_white(QUICK["hmc"]) > LIMIT


def test_a_score_of_the_wrong_sign_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    right = GaussianMixture.score
    monkeypatch.setattr(GaussianMixture, "score", lambda self, x, t: -right(self, x, t))
    assert check_white(QUICK["underdamped on the score"]) > LIMIT


# --- mixtures --------------------------------------------------------------------------------------------------------


def check_mixture(case: Conjugate, engine: Any, num_draws: int, num_chains: int) -> Tensor:
    """Means, sds and weights of components within their errors, those of weights from chain to chain."""
    x = draws(case.program, engine, case.data, num_draws, num_chains)["x"]
    worst = worst_z(by_coordinate(x), moments_of(case.posterior))
    assert worst.size < LIMIT, worst
    weights = case.posterior.responsibilities(x.flatten(0, 1)).unflatten(0, x.shape[:2]).mean(1)
    error = weights.std(0) / math.sqrt(num_chains) + 1e-3  # of components that no chain met
    assert float(((weights.mean(0) - case.posterior.weights) / error).abs().max()) < LIMIT
    return x


def test_mixture_posterior() -> None:
    """Chains change between modes, which R-hat sees."""
    x = check_mixture(
        mixture(2, 0.5, num_seen=1), HMC(num_steps=4, num_warmup=50, space="noise", thin=2), 60, 48
    )
    assert max_r_hat(by_coordinate(x)) < 1.1


LONG = HMC(num_steps=8, num_warmup=100, space="noise", thin=2)
FINER = HMC(num_steps=8, num_warmup=200, space=NoiseSpace(steps=8))
TEMPERED = ParallelTempering(FINER, num_temperatures=10, max_temperature=100.0)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("dim", "noise", "engine", "num_draws", "num_chains"),
    [(4, 0.5, LONG, 100, 96), (8, 0.1, TEMPERED, 50, 48)],
    ids=["wide", "sharp"],
)
def test_mixture_posterior_in_more_dimensions(
    dim: int, noise: float, engine: Any, num_draws: int, num_chains: int
) -> None:
    """Sharp observations cut the noise space into modes too: there chains are tempered (HMC gave .35 for .003)."""
    check_mixture(mixture(dim, noise), engine, num_draws, num_chains)


@pytest.mark.slow
def test_coverage() -> None:
    """Central 90 % intervals of 1,000 pairs (x, y) hold x in 87 to 93 %: four standard errors either way."""
    testbed = linear(2, 0.5)
    x, y = testbed.pairs(1000)
    engine = HMC(num_steps=4, num_warmup=150, space="noise")
    flat = draws(testbed.program, engine, DataSets({"y": y}), 50, 4)["x"].flatten(0, 1)
    low, high = (flat.quantile(q, 0) for q in (0.05, 0.95))
    assert 0.87 < float(((low < x) & (x < high)).double().mean()) < 0.93


# --- the density in noise space --------------------------------------------------------------------------------------


class Blurred(nn.Module):
    """z ~ Gamma, x | z ~ N(A z, S), correlated: sites that are Gaussian and not, float64."""

    event_shape = (2,)

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.tensor([[1.0, 0.3], [-0.4, 0.8]], dtype=DTYPE))

    def model(self, batch: Batch) -> Tensor:
        with batch.plate():
            z = pyro.sample("z", dist.Gamma(2.0, torch.ones(2, dtype=DTYPE)).to_event(1))
            return pyro.sample(
                "x", dist.MultivariateNormal(z @ self.weight.mT, scale_tril=self.weight.tril()[:].abs())
            )


def latent_diffusion() -> VAE:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return VAE.mlp((3,), 2, (8,), prior=FittedPrior(GaussianMixture.example())).double()


PRIORS = {
    "diffusion": GaussianMixture.example,
    "decoder": ConjugateGaussian.example,
    "sites that are not Gaussian": Blurred,
    "latent diffusion": latent_diffusion,
}


def scaled(prior: Any) -> Callable[[], None]:
    def program() -> None:
        scale = pyro.sample("scale", dist.LogNormal(torch.zeros((), dtype=DTYPE), 0.5))
        with pyro.plate("images", 2):
            x = pyro.sample("x", Prior(prior))
            pyro.deterministic("sum", x.sum(-1))
            pyro.sample("y", dist.Normal(x[..., 0], scale))

    return program


@pytest.mark.parametrize("name", PRIORS)
def test_gradient_in_noise_space(name: str) -> None:
    """Against differences, with another latent and a plate; recorded and not; there and back."""
    density = NoiseDensity(read(scaled(PRIORS[name]()), {"y": torch.tensor([0.5, -1.0], dtype=DTYPE)}), NOISE)
    u = 0.5 * torch.randn(density.dim, 3, dtype=DTYPE, generator=torch.Generator().manual_seed(0))
    value, grad = density.value_and_grad(u)
    again = density.function(u)(u)
    torch.testing.assert_close(again, (value, grad), rtol=1e-6, atol=1e-6)
    step = 1e-5 * torch.eye(density.dim, dtype=DTYPE)[:, :, None]
    ends = [torch.stack([density.value_and_grad(u + sign * e)[0] for e in step]) for sign in (1, -1)]
    torch.testing.assert_close((ends[0] - ends[1]) / 2e-5, grad, rtol=1e-4, atol=1e-5)
    values = density.constrain(u)
    assert values["x"].shape == (3, 2, *PRIORS[name]().event_shape)
    assert values["sum"].shape == (3, 2)
    assert density.dims["x"] == ("images", "x_dim_0")


def test_back_to_noise() -> None:
    """Draws of another engine are places to start at."""
    program, y = scaled(GaussianMixture.example()), {"y": torch.tensor([0.5, -1.0], dtype=DTYPE)}
    density = NoiseDensity(read(program, y), NoiseSpace(steps=20))
    u = 0.5 * torch.randn(density.dim, 3, dtype=DTYPE, generator=torch.Generator().manual_seed(0))
    values = density.constrain(u)
    torch.testing.assert_close(
        density.constrain(density.unconstrain(values))["x"], values["x"], rtol=1e-2, atol=1e-2
    )
    start = draws(program, ULA(num_warmup=20, step_size=0.01), y, 2, 2)
    posterior = draws(program, HMC(num_steps=2, num_warmup=5, space="noise"), y, 3, 2, init=start)
    further = draws(program, HMC(num_steps=2, num_warmup=5, space="noise"), y, 2, 2, state=posterior.state)
    assert further["x"].shape == (2, 2, 2, 2)


def test_back_through_a_guide() -> None:
    """A program with a guide goes back exactly in x; one without cannot, and says so."""
    for prior, known in ((ConjugateGaussian.example(), True), (Blurred(), False)):
        density = NoiseDensity(read(scaled(prior), {"y": torch.tensor([0.5, -1.0], dtype=DTYPE)}), NOISE)
        values = density.constrain(torch.ones(density.dim, 3, dtype=DTYPE))
        if known:
            torch.testing.assert_close(density.constrain(density.unconstrain(values))["x"], values["x"])
        else:
            with pytest.raises(InputError, match="guide"):
                density.unconstrain(values)


def test_law_of_what_noise_makes() -> None:
    """Without observations chains draw from the prior: a decoder's x has the law of the program, noise included."""
    prior = ConjugateGaussian.example()

    def program() -> None:
        pyro.sample("x", Prior(prior))

    x = draws(program, HMC(num_steps=4, num_warmup=100, space="noise"), None, 64, 64)["x"]
    covariance = prior.marginal_scale_tril @ prior.marginal_scale_tril.mT
    exact = {
        f"x[{i}]": Moments(float(m), math.sqrt(float(covariance[i, i])))
        for i, m in enumerate(prior.decode(prior.prior_loc))
    }
    assert worst_z(by_coordinate(x), exact).size < LIMIT


def test_noise_scale_inferred_with_the_images() -> None:
    """x_i ~ N(0, I), y_i = x_i + s noise: p(s | y) is one-dimensional, log y ~ N(0, 1 + s^2); x follows from s."""
    y = torch.randn(3, 4, dtype=DTYPE, generator=torch.Generator().manual_seed(3)) * 1.3
    prior = gaussian_prior(4)

    def program() -> None:
        scale = pyro.sample("scale", dist.LogNormal(torch.zeros((), dtype=DTYPE), 0.5))
        with pyro.plate("images", 3):
            x = pyro.sample("x", Prior(prior))
            pyro.sample("y", dist.Normal(x, scale).to_event(1))

    found = draws(program, HMC(num_steps=4, num_warmup=80, space=FEW), {"y": y}, 64, 48)
    scale = torch.linspace(0.01, 8, 4000, dtype=DTYPE)
    log_p = dist.LogNormal(torch.zeros((), dtype=DTYPE), 0.5).log_prob(scale)
    log_p = log_p + dist.Normal(0.0, (1 + scale.square()).sqrt()).log_prob(y.reshape(-1, 1)).sum(0)
    p = log_p.softmax(0)
    mean = float((p * scale).sum())
    shrink = (p / (1 + scale.square())).sum()
    exact = {
        "scale": Moments(mean, math.sqrt(float((p * scale.square()).sum()) - mean**2)),
    }
    assert worst_z({"scale": found["scale"]}, exact).size < LIMIT
    errors = found["x"].mean(1) - shrink * y
    z = errors.mean(0) / (errors.std(0) / math.sqrt(48))
    assert float(z.abs().max()) < LIMIT


def test_data_sets_side_by_side() -> None:
    """Each has the posterior it has alone, up to chance: means of 4 sets of a Gaussian within their errors."""
    program, data, _, sd = white_gaussian(2)
    sets = torch.linspace(-2, 2, 4, dtype=DTYPE)[:, None] * data["y"]
    x = draws(program, HMC(num_steps=3, num_warmup=60, space=FEW), DataSets({"y": sets}), 30, 24)["x"]
    assert x.shape == (24, 30, 4, 2)
    for i in range(4):
        exact = {f"x[{j}]": Moments(0.8 * float(sets[i, j]), sd) for j in range(2)}
        assert worst_z(by_coordinate(x[:, :, i]), exact).size < LIMIT


# --- the score -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("oracle", [True, False])
def test_score_of_the_posterior(oracle: bool) -> None:
    """score + grad log p(y | x) is that of the exact posterior; a network is asked at t_min."""
    case = linear(2, 0.5, num_seen=1)
    prior = case.prior if oracle else Denoiser()
    exact = case.given(torch.tensor([0.7], dtype=DTYPE))
    density = ScoreDensity(read(lambda: case._replace(prior=prior).program(), exact.data))
    u = torch.randn(2, 50, dtype=DTYPE, generator=torch.Generator().manual_seed(0))
    value, grad = density.value_and_grad(u)
    zero, t_min = (
        torch.full((1,), t, dtype=DTYPE) for t in (0.0, 0.0 if oracle else case.prior.process().t_min)
    )
    later = case.prior.score(u.mT, t_min) - case.prior.score(u.mT, zero)
    assert bool(value.isnan().all())
    torch.testing.assert_close(grad, (exact.posterior.score(u.mT, zero) + later).mT)
    torch.testing.assert_close(density.function(u)(u)[1], grad)


def test_score_is_the_gradient_of_the_density() -> None:
    """Where a prior knows both they are the same number: differences of log p agree with the score."""
    prior, zero = GaussianMixture.example(), torch.zeros(1, dtype=DTYPE)
    x = torch.randn(20, 2, dtype=DTYPE, generator=torch.Generator().manual_seed(0))
    steps = 1e-5 * torch.eye(2, dtype=DTYPE)
    slope = (
        torch.stack([Prior(prior).log_prob(x + e) - Prior(prior).log_prob(x - e) for e in steps], -1) / 2e-5
    )
    torch.testing.assert_close(prior.score(x, zero), slope, rtol=1e-6, atol=1e-6)


@pytest.mark.slow
def test_density_of_a_flow_under_chains() -> None:
    """A diffusion that has no density but that of its ODE: HMC in data space agrees with the exact posterior."""
    case, y = linear(2, 0.5, num_seen=1), torch.tensor([0.7], dtype=DTYPE)
    law = case._replace(prior=Denoiser())
    x = draws(law.program, HMC(num_steps=3, num_warmup=30), {"y": y}, 40, 32)["x"]
    assert worst_z(by_coordinate(x), moments_of(case.given(y).posterior)).size < LIMIT


# --- weights ---------------------------------------------------------------------------------------------------------


class Dropped(Denoiser):
    """Random in training mode, with a weight."""

    def __init__(self) -> None:
        super().__init__()
        self.dropout, self.weight = nn.Dropout(0.5), nn.Parameter(torch.ones((), dtype=DTYPE))

    def denoise(self, x_t: Tensor, t: Tensor) -> Tensor:
        return self.weight * self.dropout(super().denoise(x_t, t))


@pytest.mark.parametrize("engine", [HMC(num_steps=2, num_warmup=5, space="noise"), ULA(num_warmup=5)])
def test_weights_rest_while_chains_run(engine: Any) -> None:
    """Layers are in evaluation mode and weights need no gradient, and both are as before afterwards."""
    prior = Dropped()

    def program() -> None:
        x = pyro.sample("x", Prior(prior))
        pyro.sample("y", dist.Normal(x[..., 0], 0.5))

    def run() -> Tensor:
        return draws(program, engine, {"y": torch.tensor(1.0)}, 5, 3)["x"]

    x = run()
    assert prior.dropout.training
    assert prior.weight.requires_grad
    assert prior.weight.grad is None
    prior.eval()
    assert torch.equal(run(), x)


# --- what cannot be served -------------------------------------------------------------------------------------------


def seen(prior: Any) -> Callable[[], None]:
    def program() -> None:
        x = pyro.sample("x", Prior(prior))
        pyro.sample("y", dist.Normal(x.reshape(*x.shape[:-1], -1)[..., 0], 0.5))

    return program


def twice() -> None:
    a = pyro.sample("a", Prior(GaussianMixture.example()))
    b = pyro.sample("b", Prior(GaussianMixture.example()))
    pyro.sample("y", dist.Normal((a + b)[..., 0], 0.5))


def none() -> None:
    pyro.sample("y", dist.Normal(pyro.sample("x", dist.Normal(0.0, 1.0)), 0.5))


def moving() -> None:
    c = pyro.sample("c", dist.Normal(torch.zeros(1, 3), 1.0).to_event(2))
    x = pyro.sample("x", Prior(ConditionalVAE.mlp((4,), 2, 3, widths=(8,)), condition=c).to_event(1))
    pyro.sample("y", dist.Normal(x[..., 0, 0], 0.5))


class Shared(nn.Module):
    """A latent that all rows share."""

    event_shape = (2,)

    def __init__(self) -> None:
        super().__init__()
        self.loc = nn.Parameter(torch.zeros(2))

    def model(self, batch: Batch) -> Tensor:
        z = pyro.sample("z", dist.Normal(self.loc, 1.0).to_event(1))
        with batch.plate():
            return pyro.sample("x", dist.Normal(z, 1.0).to_event(1))


REFUSED = {
    "a bound in data space": (
        HMC(),
        seen(VAE.mlp((3,), 2, (8,))),
        UnsupportedError,
        r"lower bound.*space='noise'",
    ),
    "an energy in noise space": (
        NUTS(space="noise"),
        seen(Energy(lambda x: x.square().sum(-1), (2,))),
        UnsupportedError,
        "space='data'",
    ),
    "discrete x": (
        HMC(space="noise"),
        seen(VAE.mlp((3,), 2, (8,), likelihood=BernoulliLikelihood())),
        UnsupportedError,
        "discrete",
    ),
    "rows that share a latent": (HMC(space="noise"), seen(Shared()), UnsupportedError, "all rows"),
    "two priors": (HMC(space="noise"), twice, InputError, "2 sites"),
    "a condition that is drawn too": (HMC(space="noise"), moving, InputError, "changes with other latents"),
    "no prior": (HMC(space="noise"), none, InputError, "no latent site"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refusals(name: str) -> None:
    engine, program, error, words = REFUSED[name]
    with pytest.raises(error, match=words):
        draws(program, engine, {"y": torch.tensor(1.0)}, 2, 2)


def test_settings_out_of_range() -> None:
    with pytest.raises(InputError, match="did you mean 'noise'"):
        HMC(space="nois")  # type: ignore[arg-type]
    with pytest.raises(InputError, match="method"):
        NoiseSpace(method="dopri5")
    with pytest.raises(InputError, match="steps"):
        NoiseSpace(steps=0)
    assert str(HMC(space="noise")) == "HMC(space='noise')"


@pytest.mark.parametrize("prior", [ScoreSDE(TimeMLP((2,), 8, 1)), FlowMatching(TimeMLP((2,), 8, 1))])
def test_networks_in_noise_space(prior: Any) -> None:
    """Single precision, weights and all."""
    posterior = draws(
        seen(prior), HMC(num_steps=2, num_warmup=10, space="noise"), {"y": torch.tensor(1.0)}, 5, 3
    )
    assert posterior["x"].dtype == torch.float32
    assert posterior.cost.network_calls > 0


def test_priors_may_be_read_without_noise() -> None:
    """Reading never draws: the program is read though no draw could be made."""

    class Undrawable(Denoiser):
        def model(self, batch: Batch) -> Tensor:
            raise AssertionError("drawn")

    prior = Prior(Undrawable())

    def program() -> None:
        x = pyro.sample("x", prior)
        pyro.sample("y", dist.Normal(x[..., 0], 0.5))

    assert Conditioned(read(program, {"y": torch.tensor(1.0)})).name == "x"
