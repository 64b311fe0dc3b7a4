"""Estimators of log p(x): right where they say so, and saying so where they are not."""

from __future__ import annotations

import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import Tensor, nn

from global_state import SETTINGS, STREAMS, unchanged
from probgen import (
    VAE,
    Batch,
    ConjugateGaussian,
    ELBOEstimate,
    GaussianMixture,
    ImportanceWeighted,
    InputError,
    Pair,
    Quantised,
    UnsupportedError,
    evidence,
)
from probgen.arviz_io import pareto_khat

Z = 4.5


class Tilted(nn.Module):
    """The conjugate program with its exact guide stretched and shifted."""

    def __init__(self, stretch: float, shift: float) -> None:
        super().__init__()
        self.exact = ConjugateGaussian.example()
        self.event_shape = self.exact.event_shape
        self.stretch, self.shift = stretch, shift

    def model(self, batch: Batch) -> None:
        self.exact.model(batch)

    def guide(self, batch: Batch) -> None:
        law = self.exact.posterior(batch.data["x"])
        with batch.plate():
            loc = law.mean + self.shift
            pyro.sample("z", dist.MultivariateNormal(loc, scale_tril=law.scale_tril * self.stretch))


def data(rows: int = 5) -> Tensor:
    generator = torch.Generator().manual_seed(2)
    return torch.randn(
        rows, ConjugateGaussian.example().event_shape[0], generator=generator, dtype=torch.float64
    )


def test_an_exact_guide_leaves_no_error() -> None:
    """Every weight is p(x) itself: no variance, no gap, k-hat at its floor."""
    program, x = Tilted(1.0, 0.0), data()
    for estimator in (ImportanceWeighted(50), ELBOEstimate(num_particles=4)):
        estimate = evidence(program, estimator, x)
        assert torch.allclose(estimate.value, program.exact.log_prob(x), atol=1e-6)
        assert float(estimate.standard_error.max()) < 1e-6
        assert estimate.trusted


@pytest.mark.parametrize("stretch", [1.3, 1.7])
def test_importance_weighting_meets_the_likelihood(stretch: float) -> None:
    """Within 4.5 of its own standard errors, which are honest: z over data has unit spread; the ELBO is below."""
    program, x = Tilted(stretch, 0.1), data(200)
    estimate = evidence(program, ImportanceWeighted(2000, batch_size=500), x)
    z = (estimate.value - program.exact.log_prob(x)) / estimate.standard_error
    assert float(z.abs().max()) < Z
    assert 0.8 < float(z.std()) < 1.2  # 200 data: an error bar wrong by 25 % is seen
    bound = evidence(program, ELBOEstimate(num_particles=100), x)
    assert bound.mean + Z * bound.monte_carlo_error < estimate.mean


def test_the_elbo_meets_its_formula() -> None:
    """log p - KL(q || posterior), in closed form for Gaussians; a gap wrong by 2 % would be seen."""
    program, x = Tilted(1.5, 0.2), data(50)
    law = program.exact.posterior(x)
    q = dist.MultivariateNormal(law.mean + 0.2, scale_tril=law.scale_tril * 1.5)
    exact = program.exact.log_prob(x) - torch.distributions.kl_divergence(q, law)
    estimate = evidence(program, ELBOEstimate(num_particles=800), x)
    z = (estimate.value - exact) / estimate.standard_error
    assert float(z.abs().max()) < Z
    assert estimate.monte_carlo_error < 0.02 * float((program.exact.log_prob(x) - exact).mean())
    assert estimate.terms.names == ("z", "x")
    assert float(estimate.terms.value.sum()) == pytest.approx(estimate.mean, abs=1e-6)


def test_a_guide_that_misses_the_posterior_is_not_trusted() -> None:
    """Too narrow and off by sds: the answer is wrong by nats, its error bar says little, and k-hat says so."""
    program, x = Tilted(0.25, 1.5), data()
    estimate = evidence(program, ImportanceWeighted(1000), x)
    assert float((program.exact.log_prob(x) - estimate.value).max()) > 1
    assert not estimate.trusted
    assert "k-hat > 0.7" in estimate.reason
    assert "Do not trust it" in str(estimate)
    assert float(estimate.diagnostics["ess"].min()) < 100


def test_khat_grows_with_the_tail() -> None:
    generator = torch.Generator().manual_seed(0)
    exponential = torch.empty(4000, 3, dtype=torch.float64).exponential_(generator=generator)
    shapes = torch.tensor([0.2, 0.5, 0.9])
    khat = pareto_khat(exponential * shapes)  # log of a Pareto tail of that shape
    assert float((khat - shapes).abs().max()) < 0.15
    assert bool((khat[1:] > khat[:-1]).all())


def test_whole_programs_have_an_evidence() -> None:
    """A plain pair with a global latent: one value for all data."""
    y = torch.tensor([1.2, 0.4, 2.0])

    def model(batch: Batch) -> None:
        mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
        with batch.plate():
            pyro.sample("x", dist.Normal(mu, 1.0))

    def guide(batch: Batch) -> None:
        pyro.sample("mu", dist.Normal(batch.data["x"].sum() / 4, 0.6))

    estimate = evidence(Pair(model, guide), ImportanceWeighted(2000), y)
    exact = dist.MultivariateNormal(torch.zeros(3), torch.eye(3) + 1).log_prob(y)
    assert estimate.value.shape == (1,)
    assert abs(float(estimate.value) - float(exact)) < Z * float(estimate.standard_error)


def test_bits_per_dim_follow_the_convention() -> None:
    """Uniform levels under a uniform density cost log2 K bits a dimension, whatever the scaling."""

    class Uniform(nn.Module):
        event_shape = (6,)

        def model(self, batch: Batch) -> None:
            with batch.plate():
                pyro.sample("x", dist.Uniform(-1.0, 1.0).expand([batch.size, 6]).to_event(1))

        def guide(self, batch: Batch) -> None:
            return None

    levels = torch.randint(0, 17, (30, 6))
    estimate = evidence(Uniform(), ELBOEstimate(), Quantised(levels, 17))
    bits, error = estimate.bits_per_dim()
    assert bits == pytest.approx(math.log2(17), abs=1e-5)
    assert error < 1e-6
    assert "17 levels" in str(estimate)
    with pytest.raises(InputError, match="levels=K"):
        evidence(Uniform(), ELBOEstimate(), torch.zeros(3, 6)).bits_per_dim()


def test_estimating_leaves_the_world_as_it_was() -> None:
    program, x = VAE.mlp((6,), 2, widths=(16,)), torch.randn(4, 6)
    with unchanged(SETTINGS), unchanged(STREAMS):
        for estimator in (ELBOEstimate(), ImportanceWeighted(50)):
            first, again = (evidence(program, estimator, x, seed=1) for _ in range(2))
            assert torch.equal(first.value, again.value)
    assert program.training


def test_particles_of_one_run_are_those_of_many() -> None:
    """Vectorised particles follow the law of particles run one by one."""
    program, x = Tilted(1.4, 0.1), data(3)

    class OneByOne(nn.Module):
        """The same pair without a declared event shape: particles are run one after another, rows summed."""

        model, guide = program.model, program.guide

    together = evidence(program, ELBOEstimate(num_particles=400), x)
    apart = evidence(OneByOne(), ELBOEstimate(num_particles=400), x)
    error = math.hypot(3 * together.monte_carlo_error, float(apart.standard_error))
    assert abs(float(together.value.sum() - apart.value)) < Z * error


def test_bad_input_is_refused() -> None:
    program, x = Tilted(1.0, 0.0), data()
    with pytest.raises(UnsupportedError, match="cannot serve GaussianMixture: it needs a guide"):
        evidence(GaussianMixture.example(), ELBOEstimate(), torch.zeros(2, 2))
    with pytest.raises(InputError, match="num_samples must be an integer >= 25, got 3"):
        ImportanceWeighted(3)
    with pytest.raises(InputError, match="num_particles must be an integer >= 2"):
        ELBOEstimate(num_particles=1)
    with pytest.raises(InputError, match="NaN or Inf"):
        evidence(program, ELBOEstimate(), x * math.nan)
    with pytest.raises(InputError, match="did you mean 'x'"):
        evidence(program, ELBOEstimate(), {"xs": x})
    with pytest.raises(InputError, match="nothing to take the evidence of"):
        evidence(program, ELBOEstimate(), {})
    with pytest.raises(InputError, match="Expected an estimator"):
        evidence(program, "elbo", x)
