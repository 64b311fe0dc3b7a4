"""Objectives: each is the number it claims, with the gradient it claims."""

from __future__ import annotations

import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import Tensor, nn

from probgen import (
    ELBO,
    IWAE,
    VAE,
    Batch,
    ConjugateGaussian,
    InputError,
    Optim,
    Pair,
    SemiSupervisedVAE,
    SimpleLoss,
    UnsupportedError,
    fit,
)
from probgen.models import point_posterior
from probgen.objectives.elbo import split_missing

SIGMAS = 4.5


class LinearGaussian(nn.Module):
    """z ~ N(0, 1), x | z ~ N(z, 1/2), with a guide N(slope x, scale) that is exact at slope 2/3, scale^2 1/3."""

    event_shape = ()

    def __init__(self, slope: float, scale: float) -> None:
        super().__init__()
        self.slope = nn.Parameter(torch.tensor(slope))
        self.log_scale = nn.Parameter(torch.tensor(scale).log())

    def model(self, batch: Batch) -> None:
        with batch.plate():
            z = pyro.sample("z", dist.Normal(0.0, 1.0).expand([batch.size]))
            pyro.sample("x", dist.Normal(z, math.sqrt(0.5)))

    def guide(self, batch: Batch) -> None:
        with batch.plate():
            pyro.sample("z", dist.Normal(self.slope * batch.data["x"], self.log_scale.exp()))


def exact_elbo(x: Tensor, slope: float, scale: float) -> float:
    """E_q log p(x, z) + entropy of q, by hand, averaged over rows."""
    m, v = slope * x, scale**2
    prior = -0.5 * (math.log(2 * math.pi) + m**2 + v)
    likelihood = -0.5 * (math.log(math.pi) + 2 * ((x - m) ** 2 + v))
    return float((prior + likelihood + 0.5 * math.log(2 * math.pi * math.e * v)).mean())


X = torch.tensor([0.3, -1.2, 2.0, 0.9])


def losses(objective: object, program: nn.Module, repeats: int = 300) -> Tensor:
    """Losses on 16 copies of X, each with noise of its own."""
    batch = Batch({"x": X.repeat(16)})
    with torch.no_grad():
        return torch.stack([objective.loss(program, batch) for _ in range(repeats)])


def test_elbo_is_the_bound() -> None:
    """Within 4.5 errors of the formula; an error of 1 % of a nat would be seen."""
    program = LinearGaussian(0.5, 0.7)
    found = losses(ELBO(), program)
    error = float(found.std()) / math.sqrt(len(found))
    assert error < 0.01
    assert abs(float(found.mean()) + exact_elbo(X, 0.5, 0.7)) < SIGMAS * error
    wrong = exact_elbo(X, 0.5, 0.7) + 0.1  # what a KL of the wrong sign or scale would be off by, and more
    assert abs(float(found.mean()) + wrong) > SIGMAS * error


def test_iwae_tightens_from_the_elbo_to_the_likelihood() -> None:
    program = LinearGaussian(0.5, 0.7)
    log_likelihood = float(dist.Normal(0.0, math.sqrt(1.5)).log_prob(X).mean())
    bounds = {}
    for k in (1, 5, 500):
        found = -losses(IWAE(k), program, 100)
        bounds[k] = (float(found.mean()), float(found.std()) / math.sqrt(len(found)))
    elbo = exact_elbo(X, 0.5, 0.7)
    assert abs(bounds[1][0] - elbo) < SIGMAS * bounds[1][1]
    assert bounds[1][0] < bounds[5][0] < log_likelihood + SIGMAS * bounds[5][1]
    assert abs(bounds[500][0] - log_likelihood) < SIGMAS * bounds[500][1] + 0.002
    assert log_likelihood - elbo > 0.05  # there was something to tighten


@pytest.mark.parametrize("objective", [ELBO(), ELBO(num_particles=4), IWAE(5)], ids=repr)
def test_fitting_reaches_the_exact_posterior(objective: object) -> None:
    program = LinearGaussian(0.1, 2.0)
    x = torch.linspace(-3, 3, 64)
    fit(program, x, objective, num_steps=600, optim=Optim(lr=0.03, schedule="cosine"), progress=False)
    assert float(program.slope.detach()) == pytest.approx(2 / 3, abs=0.02)
    assert float(program.log_scale.detach().exp()) == pytest.approx(math.sqrt(1 / 3), abs=0.03)


def test_beta_weighs_the_latent_terms() -> None:
    """loss = E[-log p(x | z)] + beta KL: linear in beta, and KL is what the slope says."""
    program = LinearGaussian(0.5, 0.7)
    means = [float(losses(ELBO(beta=beta), program).mean()) for beta in (0.0, 1.0, 3.0)]
    kl = float((0.5 * ((0.5 * X) ** 2 + 0.49 - 1 - math.log(0.49))).mean())
    assert means[1] - means[0] == pytest.approx(kl, abs=0.05)
    assert means[2] - means[0] == pytest.approx(3 * kl, abs=0.05)


def test_beta_zero_with_a_point_guide_is_an_autoencoder() -> None:
    """The loss is the reconstruction alone: it does not see where the prior stands."""
    x = torch.randn(16, 6)
    vae = VAE.mlp((6,), 2, widths=(16,), posterior=point_posterior)
    loss = ELBO(beta=0.0).loss(vae, Batch({"x": x}))
    with torch.no_grad():
        z = vae.encoder(x)[0]
    assert loss.item() == pytest.approx(-vae.law_of_x(z).log_prob(x).mean().item(), rel=1e-5)


def test_gradient_variance_of_two_estimators(capsys: pytest.CaptureFixture[str]) -> None:
    """Score-function and reparametrised gradients have one mean; their variances are tabled, and differ."""

    class Scored(LinearGaussian):
        def guide(self, batch: Batch) -> None:
            with batch.plate():
                law = dist.Normal(self.slope * batch.data["x"], self.log_scale.exp())
                pyro.sample("z", law.has_rsample_(False))

    table = {}
    for name, program, objective in (
        ("reparametrised, closed-form KL", LinearGaussian(0.5, 0.7), ELBO()),
        ("reparametrised, 10 particles", LinearGaussian(0.5, 0.7), ELBO(num_particles=10)),
        ("importance weighted, 10 particles", LinearGaussian(0.5, 0.7), IWAE(10)),
        ("score function", Scored(0.5, 0.7), ELBO()),
        ("score function, 10 particles", Scored(0.5, 0.7), ELBO(num_particles=10)),
    ):
        gradients = []
        for _ in range(600):
            (gradient,) = torch.autograd.grad(objective.loss(program, Batch({"x": X})), program.slope)
            gradients.append(gradient)
        g = torch.stack(gradients)
        table[name] = (float(g.mean()), float(g.std()) / math.sqrt(len(g)), float(g.var()))
    with capsys.disabled():
        print("\nvariance of d loss / d slope")
        for name, (mean, error, variance) in table.items():
            print(f"  {name:34} mean {mean:+.4f} +- {error:.4f}  variance {variance:.5f}")
    slope, h = 0.5, 1e-3
    exact = -(exact_elbo(X, slope + h, 0.7) - exact_elbo(X, slope - h, 0.7)) / (2 * h)
    for name in table.keys() - {"importance weighted, 10 particles"}:
        assert abs(table[name][0] - exact) < SIGMAS * table[name][1], name
    assert table["score function"][2] > 5 * table["reparametrised, closed-form KL"][2]


def test_discrete_sites_are_summed_out() -> None:
    """The enumerated bound of a mixture with an exact guide is its likelihood, with no Monte Carlo noise."""

    class Mixture(nn.Module):
        event_shape = ()

        def __init__(self) -> None:
            super().__init__()
            self.locs = nn.Parameter(torch.tensor([-1.0, 2.0]))

        def model(self, batch: Batch) -> None:
            with batch.plate():
                c = pyro.sample("c", dist.Categorical(torch.tensor([0.3, 0.7])).expand([batch.size]))
                pyro.sample("x", dist.Normal(self.locs[c], 1.0))

        def guide(self, batch: Batch) -> None:
            joint = (
                dist.Normal(self.locs, 1.0).log_prob(batch.data["x"][:, None])
                + torch.tensor([0.3, 0.7]).log()
            )
            with batch.plate():
                pyro.sample("c", dist.Categorical(logits=joint), infer={"enumerate": "parallel"})

    program = Mixture()
    components = dist.Normal(program.locs.detach(), 1.0).log_prob(X[:, None]) + torch.tensor([0.3, 0.7]).log()
    exact = -float(components.logsumexp(1).mean())
    found = losses(ELBO(), program, 5)
    assert torch.allclose(found, torch.full((5,), exact), atol=1e-5)


def test_missing_labels_split_the_batch() -> None:
    """Labelled and unlabelled rows cost what they cost apart, weighted by their number."""
    torch.manual_seed(1)
    program = SemiSupervisedVAE.mlp((6,), 2, 3, widths=(16,), label_weight=0.0)
    x, c = torch.randn(6, 6), torch.tensor([0, -1, 2, -1, -1, 1])
    parts = split_missing(Batch({"x": x, "c": c}, total=60))
    assert [sorted(part.data) for part in parts] == [["c", "x"], ["x"]]
    assert [part.size for part in parts] == [3, 3]
    assert [part.total for part in parts] == [60, 60]

    def mean(batch: Batch) -> tuple[float, float]:
        with torch.no_grad():
            values = torch.stack([ELBO().loss(program, batch) for _ in range(100)])
        return float(values.mean()), float(values.std()) / math.sqrt(100)

    whole, error = mean(Batch({"x": x, "c": c}))
    labelled, unlabelled = mean(Batch({"x": x[c >= 0], "c": c[c >= 0]})), mean(Batch({"x": x[c < 0]}))
    together = 0.5 * (labelled[0] + unlabelled[0])
    assert abs(whole - together) < SIGMAS * (error + labelled[1] + unlabelled[1])
    assert abs(labelled[0] - unlabelled[0]) > 10 * error  # a split that ignored the labels would be seen


# --- bad input --------------------------------------------------------------------------------------------------


def test_a_guide_that_lacks_a_site_is_named() -> None:
    def model(batch: Batch) -> None:
        with batch.plate():
            z = pyro.sample("z", dist.Normal(0.0, 1.0).expand([batch.size]))
            w = pyro.sample("w", dist.Normal(0.0, 1.0).expand([batch.size]))
            pyro.sample("x", dist.Normal(z + w, 1.0))

    def guide(batch: Batch) -> None:
        loc = pyro.param("loc", torch.tensor(0.0))
        with batch.plate():
            pyro.sample("z", dist.Normal(loc, 1.0).expand([batch.size]))

    pair = Pair(model, guide)
    store = pyro.get_param_store()
    with store.scope(), pytest.raises(InputError, match=r"no site 'w'.*observe 'w'"):
        ELBO().loss(pair, Batch({"x": X}))


def test_a_guide_site_that_the_model_lacks_is_named() -> None:
    def guide(batch: Batch) -> None:
        with batch.plate():
            pyro.sample("z", dist.Normal(torch.zeros(batch.size), 1.0))
            pyro.sample("zz", dist.Normal(torch.zeros(batch.size), 1.0))

    with pytest.raises(InputError, match=r"'zz' is not a site of the model; did you mean 'z'"):
        ELBO().loss(Pair(LinearGaussian(0.5, 0.7).model, guide), Batch({"x": X}))


def test_objectives_say_what_they_need() -> None:
    with pytest.raises(UnsupportedError, match="needs a guide"):
        ELBO().loss(Pair(LinearGaussian(0.5, 0.7).model), Batch({"x": X}))
    with pytest.raises(UnsupportedError, match="needs a guide"):
        IWAE().loss(Pair(LinearGaussian(0.5, 0.7).model), Batch({"x": X}))
    with pytest.raises(UnsupportedError, match=r"process\(\) and denoise"):
        SimpleLoss().loss(ConjugateGaussian.example(), Batch({"x": X}))
    with pytest.raises(InputError, match="num_particles must be an integer >= 1, got 0"):
        IWAE(0)
    with pytest.raises(InputError, match="beta must be >= 0"):
        ELBO(beta=-1.0)


def test_iwae_refuses_sites_it_cannot_differentiate_through() -> None:
    program = SemiSupervisedVAE.mlp((6,), 2, 3, widths=(16,))
    with pytest.raises(UnsupportedError, match="'c'.*no reparametrised sampler"):
        IWAE(3).loss(program, Batch({"x": torch.randn(4, 6)}))
