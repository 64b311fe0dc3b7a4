"""A fitted program as a Pyro distribution: shapes, draws, densities, under Pyro's own engines, inside of a VAE."""

from __future__ import annotations

import math
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer import MCMC, NUTS, SVI, Predictive, Trace_ELBO
from pyro.infer.autoguide import AutoNormal
from torch import Tensor, nn

from conditioned_tools import DTYPE, Denoiser, linear, mean_z, sd_z
from probgen import ELBO, Ancestral, DenoisingScoreMatching, InputError, UnsupportedError, fit, infer
from probgen.core import Batch
from probgen.inference.hmc import HMC
from probgen.inference.reverse_sde import ReverseSDE
from probgen.models.conditional_vae import ConditionalVAE
from probgen.models.conjugate_gaussian import ConjugateGaussian
from probgen.models.energy import Energy
from probgen.models.gaussian_mixture import GaussianMixture
from probgen.models.score_sde import ScoreSDE
from probgen.models.vae import VAE, FittedPrior
from probgen.nets import TimeMLP
from probgen.priors.prior import Prior
from probgen.randomness import forked_rng

LIMIT = 4.5  # standard errors
MIXTURE = GaussianMixture.example()


class Loose(ConjugateGaussian):
    """A guide twice as wide as the posterior: its bound is below the evidence."""

    def guide(self, batch: Batch) -> Tensor:
        exact = self.posterior(batch.data["x"])
        with batch.plate():
            return pyro.sample("z", dist.MultivariateNormal(exact.mean, scale_tril=2 * exact.scale_tril))


PRIORS: dict[str, tuple[Any, str]] = {
    "mixture": (MIXTURE, "exact"),
    "diffusion": (Denoiser(), "exact"),
    "decoder": (VAE.mlp((2,), 2, (8,)), "lower bound"),
}


# --- a distribution --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", PRIORS)
def test_shapes(name: str) -> None:
    program, kind = PRIORS[name]
    prior = Prior(program)
    assert prior.density_kind == kind
    assert prior.event_shape == (2,)
    assert prior.batch_shape == ()
    wide = prior.expand([3]).expand([5, 3])
    x = wide.sample((4,))
    assert x.shape == (4, 5, 3, 2)
    assert wide.log_prob(x).shape == (4, 5, 3)
    assert bool(wide.support.check(x).all())
    assert wide.to_event(1).event_shape == (3, 2)
    assert wide.to_event(1).log_prob(x).shape == (4, 5)
    assert wide.mask(torch.ones(5, 3, dtype=torch.bool)).log_prob(x).shape == (4, 5, 3)
    assert not x.requires_grad


def test_draws_under_plates_and_conditions() -> None:
    """Rows of the condition are the batch; in a plate of theirs each row has its own."""
    with forked_rng(0):
        prior = Prior(ConditionalVAE.mlp((4,), 2, 3, widths=(8,)), condition=torch.randn(5, 3))
    assert prior.batch_shape == (5,)
    with pyro.plate("rows", 5), forked_rng(0):
        x = pyro.sample("x", prior)
    assert x.shape == (5, 4)
    assert prior.expand([2, 5]).sample().shape == (2, 5, 4)
    assert prior.log_prob(x).shape == (5,)


def test_draws_are_those_of_the_program() -> None:
    """Along the flow, by an engine and by the model: moments of the mixture within their errors."""
    for prior in (
        Prior(MIXTURE),
        Prior(MIXTURE, sampler=ReverseSDE(steps=60)),
        Prior(ConjugateGaussian.example()),
    ):
        with forked_rng(0):
            x = prior.sample((4000,))
        if isinstance(prior.program, GaussianMixture):
            mean, sd = MIXTURE.mean, MIXTURE.covariance.diagonal().sqrt()
        else:
            tril = prior.program.marginal_scale_tril
            mean, sd = prior.program.decode(prior.program.prior_loc), (tril @ tril.mT).diagonal().sqrt()
        assert float(mean_z(x, mean).abs().max()) < LIMIT, prior
        assert float(sd_z(x, sd).abs().max()) < LIMIT, prior


def test_draws_follow_the_seed_and_leave_the_stream_alone() -> None:
    """The same seed, the same draws, by an engine too; the outer program's sites stay its own."""
    prior = Prior(MIXTURE, sampler=ReverseSDE(steps=5))
    drawn = []
    for _ in range(2):
        pyro.set_rng_seed(3)
        drawn.append(poutine.trace(lambda: pyro.sample("x", prior)).get_trace())
    assert torch.equal(drawn[0].nodes["x"]["value"], drawn[1].nodes["x"]["value"])
    assert [name for name in drawn[0].nodes if not name.startswith("_")] == ["x"]


def test_differentiable_draws() -> None:
    prior = Prior(ScoreSDE(TimeMLP((2,), 8, 1)))
    assert prior.has_rsample
    prior.rsample((3,)).sum().backward()
    assert any(weight.grad is not None for weight in prior.program.parameters())
    assert not Prior(VAE.mlp((2,), 2, (8,))).has_rsample
    with pytest.raises(UnsupportedError, match="no diffusion"):
        Prior(VAE.mlp((2,), 2, (8,))).rsample()


# --- densities -------------------------------------------------------------------------------------------------------


def test_exact_densities() -> None:
    """What a program knows is given as it is; that of a diffusion's ODE agrees with it, gradients too."""
    with forked_rng(1):
        x = MIXTURE.model(Batch(num_rows=40)).requires_grad_()
    exact, flow = Prior(MIXTURE).log_prob(x), Prior(Denoiser()).log_prob(x)
    assert torch.equal(exact, MIXTURE.log_prob(x))
    assert float((flow - exact).detach().abs().max()) < 0.05  # noise left at t_min, 25 steps
    slopes = [torch.autograd.grad(value.sum(), x)[0] for value in (exact, flow)]
    assert float((slopes[0] - slopes[1]).abs().max()) < 0.3
    torch.testing.assert_close(slopes[0], MIXTURE.score(x.detach(), torch.zeros(1, dtype=DTYPE)))


def test_gradient_of_the_flow_is_that_of_its_density() -> None:
    """Differences of the density in its fixed steps, to rounding: it is deterministic."""
    prior, x = Prior(Denoiser(), num_steps=5), torch.tensor([[0.3, -0.4]], dtype=DTYPE, requires_grad=True)
    (grad,) = torch.autograd.grad(prior.log_prob(x).sum(), x)
    steps = 1e-5 * torch.eye(2, dtype=DTYPE)
    slope = torch.cat([prior.log_prob(x.detach() + e) - prior.log_prob(x.detach() - e) for e in steps]) / 2e-5
    torch.testing.assert_close(grad[0], slope, rtol=1e-5, atol=1e-7)


def test_lower_bounds_lie_below() -> None:
    """With the posterior as its guide the bound is the evidence; with another one it is lower by KL(q || p)."""
    exact, loose = ConjugateGaussian.example(), Loose.example()
    with forked_rng(0):
        x = exact.model(Batch(num_rows=4))
        torch.testing.assert_close(Prior(_Bounded(exact)).log_prob(x), exact.log_prob(x))
        bounds = Prior(_Bounded(loose)).log_prob(x.expand(2000, 4, 3))
    # KL(N(m, 4 P) || N(m, P)) in two dimensions.
    gap = exact.log_prob(x) - bounds.mean(0)
    error = bounds.std(0) / math.sqrt(2000)
    assert Prior(_Bounded(loose)).density_kind == "lower bound"
    assert float(((gap - (4 - 1 - math.log(4))) / error).abs().max()) < LIMIT


class _Bounded(nn.Module):
    """A program whose density is hidden."""

    def __init__(self, program: ConjugateGaussian) -> None:
        super().__init__()
        self.program, self.event_shape = program, program.event_shape

    def model(self, batch: Batch) -> Tensor:
        return self.program.model(batch)

    def guide(self, batch: Batch) -> Tensor:
        return self.program.guide(batch)


def test_energies_are_not_normalised() -> None:
    prior = Prior(Energy(lambda x: 0.5 * x.square().sum(-1), (3,)))
    assert prior.density_kind == "unnormalised"
    assert torch.equal(prior.log_prob(torch.ones(2, 3)), torch.full((2,), -1.5))
    with pytest.raises(UnsupportedError, match="Markov chains"):
        prior.sample()


def test_no_density_at_all() -> None:
    class Simulator(nn.Module):
        event_shape = (2,)

        def model(self, batch: Batch) -> Tensor:
            with batch.plate():
                return pyro.sample("x", dist.Normal(torch.zeros(2), 1.0).to_event(1))

    prior = Prior(Simulator())
    assert prior.density_kind is None
    assert prior.sample((3,)).shape == (3, 2)
    with pytest.raises(UnsupportedError, match="no density"):
        prior.log_prob(torch.zeros(2))


def test_what_is_no_prior() -> None:
    with pytest.raises(InputError, match="event_shape"):
        Prior(lambda: None)
    with pytest.raises(InputError, match="sampler"):
        Prior(MIXTURE, sampler="ancestral")  # type: ignore[arg-type]


# --- under Pyro's own engines ----------------------------------------------------------------------------------------

TESTBED = linear(2, 0.8, num_seen=1)
DATA = {"y": torch.tensor([0.4], dtype=DTYPE)}
EXACT = TESTBED.given(DATA["y"]).posterior
CONDITIONED = pyro.condition(TESTBED.program, data=DATA)


def test_under_pyros_nuts() -> None:
    """The posterior under NUTS of Pyro; a mean off by 0.3 sd would be seen."""
    with forked_rng(0):
        mcmc = MCMC(
            NUTS(CONDITIONED, jit_compile=False), num_samples=150, warmup_steps=40, disable_progbar=True
        )
        mcmc.run()
        found = mcmc.diagnostics()
        x = mcmc.get_samples()["x"]
    effective = found["x"]["n_eff"].double()
    z = (x.mean(0) - EXACT.mean) / (EXACT.covariance.diagonal() / effective).sqrt()
    assert float(z.abs().max()) < LIMIT


def test_under_autoguides_and_predictive() -> None:
    """AutoNormal is fitted by SVI, and Predictive runs the program from it; priors are drawn by Predictive too."""
    with forked_rng(0), pyro.get_param_store().scope({"params": {}, "constraints": {}}):
        guide = AutoNormal(CONDITIONED)
        svi = SVI(CONDITIONED, guide, pyro.optim.Adam({"lr": 0.05}), Trace_ELBO())
        losses = [svi.step() for _ in range(150)]
        ahead = Predictive(TESTBED.program, guide=guide, num_samples=20)()
        fresh = Predictive(TESTBED.program, num_samples=3)()
    assert sum(losses[-20:]) < sum(losses[:20])
    assert ahead["y"].shape == (20, 1)
    assert fresh["x"].shape[0] == 3
    assert fresh["x"].shape[-1] == 2


# --- latent diffusion ------------------------------------------------------------------------------------------------


def test_weights_of_a_prior_inside_a_vae_are_fitted() -> None:
    sde = ScoreSDE(TimeMLP((2,), 8, 1))
    vae = VAE.mlp((3,), 2, (8,), prior=FittedPrior(sde))
    assert {id(weight) for weight in sde.parameters()} <= {id(weight) for weight in vae.parameters()}
    before = [weight.clone() for weight in sde.parameters()]
    fit(vae, torch.randn(16, 3), ELBO(), num_steps=1, seed=0, progress=False)
    assert any(not torch.equal(a, b) for a, b in zip(before, sde.parameters(), strict=True))


def test_latent_diffusion() -> None:
    """A VAE, a diffusion on its latents as its prior: draws are like the data, and decoded x is conditioned."""
    with forked_rng(0):
        bent = torch.randn(1000, 1)
        x = torch.cat([bent, bent.square() - 1, -bent], 1) + 0.1 * torch.randn(1000, 3)
        vae, sde = VAE.mlp((3,), 2, (32,)), ScoreSDE(TimeMLP((2,), 32, 2))
    fit(vae, x, ELBO(), num_steps=250, seed=0, progress=False)
    with torch.no_grad(), forked_rng(1):
        z = vae.law_of_z(x).sample()
    fit(sde, z, DenoisingScoreMatching(), num_steps=300, seed=0, progress=False)
    vae.prior = FittedPrior(sde.eval().requires_grad_(False))
    drawn = infer(vae, Ancestral(), num_draws=400, seed=0, progress=False)["x"][0]
    assert float((drawn.median(0).values - x.median(0).values).abs().max()) < 0.5

    def program() -> None:
        x = pyro.sample("x", Prior(vae))
        pyro.sample("y", dist.Normal(x[..., 0], 0.1))

    posterior = infer(
        program,
        HMC(num_steps=3, num_warmup=40, space="noise"),
        data={"y": torch.tensor(1.0)},
        num_draws=20,
        num_chains=16,
        seed=0,
        progress=False,
    )
    assert posterior["x"].shape == (16, 20, 3)
    middle = posterior["x"].flatten(0, 1).median(0).values
    assert abs(float(middle[0]) - 1) < 0.2
    assert abs(float(middle[2]) + 1) < 0.4  # what was not seen follows what was
