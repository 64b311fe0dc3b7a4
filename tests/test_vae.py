"""The variational autoencoder: its bound against exact values, shapes, replaceable parts, refusals."""

import math
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import Trace_ELBO, TraceMeanField_ELBO
from torch import Tensor, nn

from probgen.core import Batch, Decoding, Guided, InputError
from probgen.models.vae import (
    VAE,
    BernoulliLikelihood,
    GaussianLikelihood,
    MixturePrior,
    over_rows,
    point_posterior,
)
from probgen.nets import MLP, GaussianMLP

LIKELIHOODS = {"gaussian": GaussianLikelihood, "bernoulli": BernoulliLikelihood}


def mean_loss(program: Any, batch: Batch, elbo: Any = None) -> Tensor:
    """Negative ELBO per row of the full data set."""
    model = pyro.condition(program.model, data=batch.data)
    return (elbo or TraceMeanField_ELBO()).differentiable_loss(model, program.guide, batch) / batch.total


# --- the bound ----------------------------------------------------------------------------------------------------


def ppca_data(num: int) -> tuple[Tensor, float]:
    """Draws of probabilistic PCA, 5 coordinates from 2 latents, and their maximal log-likelihood per datum."""
    weight = torch.tensor([[1.2, 0.0], [-0.8, 0.5], [0.3, 0.9], [0.0, -0.7], [0.5, 0.4]])
    x = torch.randn(num, 2) @ weight.mT + 0.4 * torch.randn(num, 5) + 0.5
    sample = (x - x.mean(0)).mT @ (x - x.mean(0)) / num
    eigenvalues = torch.linalg.eigvalsh(sample).flip(0)
    kept, noise = eigenvalues[:2], eigenvalues[2:].mean()  # Tipping & Bishop (1999)
    return x, -0.5 * float(5 * math.log(2 * math.pi) + kept.log().sum() + 3 * noise.log() + 5)


class LinearEncoder(nn.Module):
    """x -> (affine in x, a scale of its own): what contains the posterior of probabilistic PCA."""

    def __init__(self) -> None:
        super().__init__()
        self.loc, self.log_scale = nn.Linear(5, 2), nn.Parameter(torch.zeros(2))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        loc = self.loc(x)
        return loc, self.log_scale.exp().expand_as(loc)


def fitted_loss(program: VAE, x: Tensor) -> float:
    """The negative bound per datum after 300 full-batch steps."""
    optim = torch.optim.Adam([p for p in program.parameters() if p.requires_grad], lr=0.05)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optim, 300)
    for _ in range(300):
        optim.zero_grad()
        mean_loss(program, Batch({"x": x})).backward()
        optim.step()
        schedule.step()
    return float(torch.stack([mean_loss(program, Batch({"x": x})).detach() for _ in range(20)]).mean())


def test_linear_vae_reaches_the_likelihood_of_probabilistic_pca() -> None:
    """Within 0.02 nats, the noise of the average being 0.005; a sigma that is not learned misses by more."""
    x, best = ppca_data(2000)
    linear = VAE((5,), 2, LinearEncoder(), nn.Linear(2, 5))
    assert fitted_loss(linear, x) == pytest.approx(-best, abs=0.02)
    stuck = VAE((5,), 2, LinearEncoder(), nn.Linear(2, 5))
    stuck.likelihood.log_scale.requires_grad_(False)  # type: ignore[union-attr]
    assert fitted_loss(stuck, x) > -best + 0.02


def log_evidence_by_quadrature(vae: VAE, x: Tensor) -> Tensor:
    """log int p(x | z) p(z) dz over a fine grid of the one latent."""
    z = torch.linspace(-8, 8, 4001)[:, None]
    log_joint = vae.law_of_x(z[:, None]).log_prob(x) + vae.prior().log_prob(z)[:, None]
    return log_joint.logsumexp(0) + math.log(16 / 4000)


@pytest.mark.parametrize("likelihood", LIKELIHOODS)
@pytest.mark.parametrize("prior", ["normal", "mixture"])
def test_importance_weights_average_to_the_evidence(likelihood: str, prior: str) -> None:
    """20,000 particles: p(x, z)/q(z | x) has mean p(x), at 4.5 standard errors; a guide 2 % off in log q fails.

    The guide's scale is 1.5, wide enough for finite variance.
    """
    encoder = GaussianMLP((3,), (1,), (8,), min_scale=1.5)
    law = MixturePrior(1, num_components=3) if prior == "mixture" else None
    vae = VAE((3,), 1, encoder, MLP((1,), (3,), (8,)), likelihood=LIKELIHOODS[likelihood](), prior=law)
    x = torch.tensor([[1.0, 0.0, 1.0]])
    with torch.no_grad():
        q = vae.law_of_z(x)
        z = q.sample((20_000,))
        log_joint = vae.law_of_x(z).log_prob(x) + vae.prior().log_prob(z)
        ratio = (log_joint - q.log_prob(z) - log_evidence_by_quadrature(vae, x)).exp()

    def distance(ratio: Tensor) -> float:
        return float((ratio.mean() - 1).abs() / (ratio.std() / math.sqrt(len(ratio))))

    assert distance(ratio) < 4.5
    assert distance(ratio * 1.1) > 4.5


@pytest.mark.parametrize("posterior", ["gaussian", "point"])
def test_trace_and_mean_field_bounds_agree(posterior: str) -> None:
    heads: dict[str, Any] = {"posterior": point_posterior} if posterior == "point" else {}
    vae, batch = VAE.mlp((4,), 2, widths=(8,), **heads), Batch({"x": torch.randn(3000, 4)})
    with torch.no_grad():
        estimates = [
            torch.stack([mean_loss(vae, batch, Trace_ELBO()) for _ in range(10)]),
            torch.stack([mean_loss(vae, batch, TraceMeanField_ELBO()) for _ in range(10)]),
        ]
    error = sum(e.var() / 10 for e in estimates).sqrt()  # type: ignore[union-attr]
    assert float((estimates[0].mean() - estimates[1].mean()).abs()) < 4.5 * float(error) + 1e-5


def test_a_point_posterior_without_its_prior_is_an_autoencoder() -> None:
    """Trace of model and guide: log q = 0, z is the encoder's loc, what is left is -log p(x | z)."""
    vae, x = VAE.mlp((4,), 2, widths=(8,), posterior=point_posterior), torch.randn(6, 4)
    guide = pyro.poutine.trace(vae.guide).get_trace(Batch({"x": x}))
    assert float(guide.log_prob_sum()) == 0
    torch.testing.assert_close(guide.nodes["z"]["value"], vae.encoder(x)[0])
    reconstruction = vae.decode(vae.encoder(x)[0])
    scale = vae.likelihood(x).stddev
    expected = -dist.Normal(reconstruction, scale).log_prob(x).sum() / 6
    with pyro.poutine.block(), pyro.poutine.replay(trace=guide):
        model = pyro.poutine.trace(pyro.condition(vae.model, data={"x": x})).get_trace(Batch({"x": x}))
    model.compute_log_prob()
    torch.testing.assert_close(-model.nodes["x"]["log_prob_sum"] / 6, expected)


def test_minibatches_are_scaled_to_the_data_set() -> None:
    vae, x = VAE.mlp((4,), 2, widths=(8,), posterior=point_posterior), torch.randn(8, 4)
    whole = mean_loss(vae, Batch({"x": x}))
    halves = [mean_loss(vae, Batch({"x": part}, total=8)) for part in x.split(4)]
    torch.testing.assert_close((halves[0] + halves[1]) / 2, whole)


# --- shapes and parts ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("likelihood", LIKELIHOODS)
@pytest.mark.parametrize("event_shape", [(), (4,), (2, 3, 3)])
def test_particles_come_in_on_the_left(likelihood: str, event_shape: tuple[int, ...]) -> None:
    vae = VAE.mlp(event_shape, 2, widths=(8,), likelihood=LIKELIHOODS[likelihood]())
    batch = Batch({"x": torch.zeros(5, *event_shape)})
    elbo = TraceMeanField_ELBO(num_particles=3, vectorize_particles=True, max_plate_nesting=1)
    loss = mean_loss(vae, batch, elbo)
    loss.backward()
    assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in vae.parameters())
    with pyro.plate("particles", 3, dim=-2):
        assert vae.model(batch).shape == (3, 5, *event_shape)
    assert vae.decode(torch.zeros(3, 5, 2)).shape == (3, 5, *event_shape)
    assert vae.decode(torch.zeros(2)).shape == event_shape


def test_networks_see_one_batch_dimension() -> None:
    seen = []

    def decoder(z: Tensor) -> Tensor:
        seen.append(z.shape)
        return z @ torch.ones(2, 4)

    vae = VAE((4,), 2, GaussianMLP((4,), (2,)), decoder)
    z = torch.randn(3, 5, 2)
    torch.testing.assert_close(vae.decode(z), z @ torch.ones(2, 4))
    assert seen == [(15, 2)]


def test_over_rows_broadcasts_batch_shapes() -> None:
    a, b = torch.randn(3, 1, 2), torch.randn(5, 2)
    (total,) = over_rows(torch.add, [(a, 1), (b, 1)])
    torch.testing.assert_close(total, a + b)


def test_every_weight_is_a_plain_parameter_with_a_gradient() -> None:
    vae = VAE.mlp((4,), 2, widths=(8,), prior=MixturePrior(2, num_components=3))
    mean_loss(vae, Batch({"x": torch.randn(5, 4)}), Trace_ELBO()).backward()
    assert {"likelihood.log_scale", "prior.locs"} <= dict(vae.named_parameters()).keys()
    assert all(p.grad is not None for p in vae.parameters())
    assert not pyro.get_param_store().keys()


def test_double_precision_all_the_way() -> None:
    vae = VAE.mlp((4,), 2, widths=(8,)).double()
    assert mean_loss(vae, Batch({"x": torch.randn(5, 4, dtype=torch.float64)})).dtype == torch.float64


def test_capabilities() -> None:
    vae = VAE.mlp((4,), 2)
    assert isinstance(vae, Guided)
    assert isinstance(vae, Decoding)


# --- refusals -----------------------------------------------------------------------------------------------------


def test_refuses_data_of_another_shape() -> None:
    with pytest.raises(InputError, match=r"site 'x' .* expected \(\.\.\., \*\(4,\)\), got \(5, 3\)"):
        VAE.mlp((4,), 2).guide(Batch({"x": torch.zeros(5, 3)}))


def test_refuses_a_guide_without_data() -> None:
    with pytest.raises(InputError, match="needs site 'x' observed"):
        VAE.mlp((4,), 2).guide(Batch({"y": torch.zeros(5, 4)}))


def test_refuses_a_decoder_of_another_shape() -> None:
    vae = VAE((4,), 2, GaussianMLP((4,), (2,)), nn.Linear(2, 3))
    with pytest.raises(InputError, match="decoder"):
        vae.decode(torch.zeros(5, 2))


def test_refuses_a_prior_of_another_shape() -> None:
    with pytest.raises(InputError, match="prior"):
        VAE.mlp((4,), 2, prior=MixturePrior(3))


@pytest.mark.parametrize(
    "make", [lambda: VAE.mlp((4,), 0), lambda: GaussianLikelihood(0.0), lambda: MixturePrior(2, 0)]
)
def test_refuses_sizes_out_of_range(make: Any) -> None:
    with pytest.raises(InputError):
        make()
