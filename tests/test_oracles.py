"""The oracles against independent calculations: quadrature, dense Gaussians, autograd, grids and simulation.

Monte Carlo means are judged at 4.5 standard errors (false alarms below 1e-5 each); every such test has a twin with a
plausible mistake that must fail it.
"""

import math
from collections.abc import Callable
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import Trace_ELBO
from torch import Tensor

from probgen.core import Batch, InputError, Normalised
from probgen.models.conjugate_gaussian import ConjugateGaussian
from probgen.models.gaussian_chain import GaussianChain
from probgen.models.gaussian_mixture import GaussianMixture
from probgen.processes import VP, CosineVP, Process

VARIANCES = ("posterior", "beta", "analytic")
LAST_STEPS = ("x1", "x0hat")


def z_score(samples: Tensor, expected: Tensor | float) -> float:
    """Largest distance of the mean of `(n, ...)` samples from what is expected, in standard errors."""
    error = samples.std(0) / math.sqrt(len(samples))
    return float(((samples.mean(0) - expected) / error).abs().max())


def second_moments(x: Tensor, loc: Tensor) -> Tensor:
    """Products of centred coordinates, whose mean is the covariance: `(n, d)` -> `(n, d, d)`."""
    centred = x - loc
    return centred[:, :, None] * centred[:, None, :]


def grid(low: float, high: float, num: int) -> tuple[Tensor, float]:
    """Points of the plane `(num^2, 2)` and the area of a cell."""
    axis = torch.linspace(low, high, num, dtype=torch.float64)
    return torch.cartesian_prod(axis, axis), float(axis[1] - axis[0]) ** 2


# --- ConjugateGaussian --------------------------------------------------------------------------------------------


def conjugate_draws(num: int) -> tuple[ConjugateGaussian, Tensor, Tensor]:
    program = ConjugateGaussian.example()
    trace = pyro.poutine.trace(program.model).get_trace(Batch(num_rows=num))
    return program, trace.nodes["z"]["value"], trace.nodes["x"]["value"]


def test_conjugate_posterior_and_evidence_match_the_joint_density() -> None:
    """log p(z, x) = log p(x) + log p(z | x) at every point: an error of 1e-10 shows."""
    program, z, x = conjugate_draws(50)
    data = {"x": x, "z": z + 0.3}
    trace = pyro.poutine.trace(pyro.condition(program.model, data=data)).get_trace(Batch(num_rows=50))
    trace.compute_log_prob()
    joint = trace.nodes["x"]["log_prob"] + trace.nodes["z"]["log_prob"]
    split = program.log_prob(x) + program.posterior(x).log_prob(z + 0.3)
    torch.testing.assert_close(split, joint, rtol=0, atol=1e-10)


def test_conjugate_evidence_by_quadrature() -> None:
    program, _, x = conjugate_draws(3)
    z, area = grid(-9, 9, 400)
    prior = dist.MultivariateNormal(program.prior_loc, scale_tril=program.prior_scale_tril)
    likelihood = dist.MultivariateNormal(program.decode(z), scale_tril=program.noise_scale_tril)
    log_joint = prior.log_prob(z) + likelihood.log_prob(x[:, None])
    torch.testing.assert_close(
        log_joint.logsumexp(1) + math.log(area), program.log_prob(x), rtol=0, atol=1e-8
    )


def test_conjugate_guide_leaves_no_gap_and_a_wrong_one_does() -> None:
    """With the exact posterior every single-draw ELBO is log p(x), whatever z was drawn."""
    program, _, x = conjugate_draws(20)
    batch = Batch({"x": x})
    model = pyro.condition(program.model, data=batch.data)
    assert -Trace_ELBO().loss(model, program.guide, batch) == pytest.approx(float(program.log_prob(x).sum()))

    def wide_guide(batch: Batch) -> None:
        exact = program.posterior(batch.data["x"])
        with batch.plate():
            pyro.sample("z", dist.MultivariateNormal(exact.loc, scale_tril=1.1 * exact.scale_tril))

    assert -Trace_ELBO().loss(model, wide_guide, batch) != pytest.approx(
        float(program.log_prob(x).sum()), abs=0.01
    )


def test_conjugate_refuses_shapes_that_do_not_fit() -> None:
    p = ConjugateGaussian.example()
    eye = torch.eye(2, dtype=torch.float64)
    with pytest.raises(InputError, match="bias"):
        ConjugateGaussian(p.prior_loc, eye, p.weight, p.bias[:2], eye)


# --- GaussianMixture ----------------------------------------------------------------------------------------------


def noised_law(mixture: GaussianMixture, t: float) -> dist.MixtureSameFamily:
    """p_t written down from its definition."""
    time = torch.tensor(t, dtype=torch.float64)
    alpha, sigma = mixture.process().alpha(time), mixture.process().sigma(time)
    eye = torch.eye(mixture.locs.shape[1], dtype=torch.float64)
    components = dist.MultivariateNormal(
        alpha * mixture.locs, alpha**2 * mixture.covariances + sigma**2 * eye
    )
    return dist.MixtureSameFamily(dist.Categorical(mixture.weights), components)


def at_time(t: float) -> Tensor:
    return torch.tensor([t], dtype=torch.float64)


@pytest.mark.parametrize("process", [VP(), CosineVP()])
@pytest.mark.parametrize("dim", [2, 16])
@pytest.mark.parametrize("t", [0.001, 0.2, 0.6, 1.0])
def test_mixture_density_and_score_at_every_time(process: Process, dim: int, t: float) -> None:
    mixture = GaussianMixture.example(dim, process)
    law = noised_law(mixture, t)
    x = law.sample((40,)).requires_grad_()
    (score,) = torch.autograd.grad(law.log_prob(x).sum(), x)
    torch.testing.assert_close(mixture.log_prob(x, at_time(t)), law.log_prob(x))
    torch.testing.assert_close(mixture.score(x, at_time(t)), score)
    torch.testing.assert_close(mixture.score(x, at_time(t).expand(40)), score)
    tweedie = (x + process.sigma(at_time(t)) ** 2 * score) / process.alpha(at_time(t))
    torch.testing.assert_close(mixture.denoise(x, at_time(t)), tweedie, rtol=1e-6, atol=1e-8)
    torch.testing.assert_close(mixture(x, at_time(t).expand(40)), tweedie, rtol=1e-6, atol=1e-8)


def test_mixture_score_by_finite_differences() -> None:
    mixture, t, h = GaussianMixture.example(), at_time(0.3), 1e-5
    x = noised_law(mixture, 0.3).sample((20,))
    for i, step in enumerate(h * torch.eye(2, dtype=torch.float64)):
        slope = (mixture.log_prob(x + step, t) - mixture.log_prob(x - step, t)) / (2 * h)
        torch.testing.assert_close(mixture.score(x, t)[:, i], slope, rtol=1e-6, atol=1e-6)


def test_mixture_takes_one_time_a_row() -> None:
    mixture = GaussianMixture.example(3)
    x, t = torch.randn(7, 3, dtype=torch.float64), torch.linspace(0.05, 1, 7, dtype=torch.float64)
    for method in (mixture.denoise, mixture.score, mixture.log_prob):
        alone = torch.cat([method(x[i : i + 1], t[i : i + 1]) for i in range(7)])
        torch.testing.assert_close(method(x, t), alone)


def test_mixture_denoiser_by_quadrature_in_one_dimension() -> None:
    weights, locs = torch.tensor([0.3, 0.7]).double(), torch.tensor([[-1.0], [0.8]]).double()
    mixture = GaussianMixture(weights, locs, torch.tensor([[[0.04]], [[0.3]]]).double())
    x_0 = torch.linspace(-8, 8, 20_001, dtype=torch.float64)
    x_t, t = torch.tensor([[-1.5], [0.1], [0.9]], dtype=torch.float64), at_time(0.25)
    prior = noised_law(mixture, 0.0).log_prob(x_0[:, None])
    likelihood = dist.Normal(VP().alpha(t) * x_0, VP().sigma(t)).log_prob(x_t)
    posterior = (prior + likelihood).softmax(1)
    torch.testing.assert_close(mixture.denoise(x_t, t), (posterior @ x_0)[:, None])


def moments_z(mixture: GaussianMixture, x: Tensor) -> float:
    """Mean, covariance and component weights of draws against the mixture, in standard errors."""
    return max(
        z_score(x, mixture.mean),
        z_score(second_moments(x, mixture.mean), mixture.covariance),
        z_score(mixture.responsibilities(x), mixture.weights),
    )


@pytest.mark.parametrize("dim", [2, 16])
def test_mixture_draws_have_its_moments(dim: int) -> None:
    """40,000 draws: an error of 5 % in sd, or of 1.2 % in a weight, shows."""
    mixture = GaussianMixture.example(dim)
    x = mixture.model(Batch(num_rows=40_000))
    assert moments_z(mixture, x) < 4.5
    assert moments_z(mixture, mixture.mean + 1.05 * (x - mixture.mean)) > 4.5
    assert moments_z(mixture, -x) > 4.5


def inverse_problem() -> tuple[GaussianMixture, Tensor, Tensor, Tensor]:
    """A mixture on the plane, y, a 1 x 2 operator and the scale of its noise."""
    as_tensor = lambda rows: torch.tensor(rows, dtype=torch.float64)  # noqa: E731
    return GaussianMixture.example(), as_tensor([0.4]), as_tensor([[1.0, -0.6]]), as_tensor([0.5])


def test_mixture_posterior_and_evidence_on_a_grid() -> None:
    mixture, y, operator, noise_scale = inverse_problem()
    x, area = grid(-7, 7, 700)
    log_joint = mixture.log_prob(x) + dist.Normal(x @ operator.mT, noise_scale).log_prob(y).sum(-1)
    posterior = mixture.posterior(y, operator, noise_scale)
    assert float(log_joint.logsumexp(0) + math.log(area)) == pytest.approx(
        float(mixture.evidence(y, operator, noise_scale)), abs=1e-8
    )
    cells = log_joint.softmax(0)
    torch.testing.assert_close(posterior.mean, cells @ x, rtol=0, atol=1e-8)
    by_grid = torch.einsum("n,nij->ij", cells, second_moments(x, cells @ x))
    torch.testing.assert_close(posterior.covariance, by_grid, rtol=0, atol=1e-8)
    density = log_joint - float(mixture.evidence(y, operator, noise_scale))
    torch.testing.assert_close(posterior.log_prob(x), density, rtol=1e-8, atol=1e-8)


def test_mixture_posterior_differs_when_the_noise_is_mistaken() -> None:
    """The grid above tells a noise variance from a noise scale."""
    mixture, y, operator, noise_scale = inverse_problem()
    right, wrong = (mixture.posterior(y, operator, s) for s in (noise_scale, noise_scale**2))
    assert float((right.mean - wrong.mean).abs().max()) > 1e-3


def test_mixture_evidence_takes_many_observations() -> None:
    mixture, y, operator, noise_scale = inverse_problem()
    many = mixture.evidence(torch.stack([y, y + 1]), operator, 0.5)
    assert float(many[1]) == pytest.approx(float(mixture.evidence(y + 1, operator, noise_scale)))


def test_mixture_works_in_single_precision() -> None:
    mixture = GaussianMixture.example(16)
    x = noised_law(mixture, 0.01).sample((100,))
    single = GaussianMixture.example(16).float()
    for t in (0.01, 0.5):
        exact = mixture.denoise(x, at_time(t))
        torch.testing.assert_close(
            single.denoise(x.float(), at_time(t).float()).double(), exact, rtol=0, atol=1e-4
        )


class ByCoordinate(VP):
    """A law with another alpha for each coordinate."""

    def alpha(self, t: Tensor) -> Tensor:
        return super().alpha(t)[:, None].expand(-1, 2)


@pytest.mark.parametrize(
    ("make", "complaint"),
    [
        (lambda m: GaussianMixture(m.weights, m.locs[0], m.covariances), "locs"),
        (lambda m: GaussianMixture(2 * m.weights, m.locs, m.covariances), "sum to 1"),
        (lambda m: GaussianMixture(m.weights, m.locs, -m.covariances), "positive definite"),
        (
            lambda m: GaussianMixture.example(2, ByCoordinate()).denoise(m.locs, at_time(0.5)),
            "one alpha a time",
        ),
        (lambda m: m.posterior(m.mean, torch.eye(3).double(), 0.1), "operator"),
        (lambda m: m.posterior(m.mean, torch.eye(2).double(), 0.0), "noise_scale"),
    ],
)
def test_mixture_refuses(make: Callable[[GaussianMixture], Any], complaint: str) -> None:
    with pytest.raises(InputError, match=complaint):
        make(GaussianMixture.example())


# --- GaussianChain ------------------------------------------------------------------------------------------------


def chain_of(variance: str, last_step: str, num_steps: int = 6, process: Process = VP()) -> GaussianChain:  # noqa: B008
    options: Any = {"reverse_variance": variance, "last_step": last_step}
    return GaussianChain.example(process, num_steps, **options)


def step_law(chain: GaussianChain, x_k: Tensor, k: int, variance: str, last_step: str) -> dist.Normal:
    """p(x_{k-1} | x_k) written down from its definition, constants by moments of the data."""
    process, t, s = chain.process(), at_time(k / chain.num_steps), at_time((k - 1) / chain.num_steps)
    d, cov, loc = len(chain.data.mean), chain.data.covariance, chain.data.mean
    alpha, sigma = process.alpha(t), process.sigma(t)
    gain = alpha * cov @ torch.linalg.inv(alpha**2 * cov + sigma**2 * torch.eye(d))
    x0hat = loc + (x_k - alpha * loc) @ gain.mT
    x0_variance = (cov - gain @ (alpha * cov)).trace() / d
    if k == 1 and last_step == "x1":
        error = (1 - alpha) ** 2 * (cov.trace() + loc @ loc) / d + sigma**2
        return dist.Normal(x_k, error.sqrt())
    if k == 1:
        return dist.Normal(x0hat, x0_variance.sqrt())
    bridge = process.bridge(x_k, x0hat, s, t)
    weight = process.bridge(torch.zeros_like(x_k), torch.ones_like(x_k), s, t).loc[0, 0]
    ratio = process.alpha(t) / process.alpha(s)
    scale2 = {
        "posterior": bridge.scale**2,
        "beta": sigma**2 - ratio**2 * process.sigma(s) ** 2,
        "analytic": bridge.scale**2 + weight**2 * x0_variance,
    }[variance]
    return dist.Normal(bridge.loc, scale2.sqrt())


def simulate_chain(chain: GaussianChain, num: int, variance: str, last_step: str) -> Tensor:
    x = torch.randn(num, *chain.event_shape, dtype=torch.float64)
    for k in range(chain.num_steps, 0, -1):
        x = step_law(chain, x, k, variance, last_step).sample()
    return x


def simulate_log_weights(chain: GaussianChain, x_0: Tensor, variance: str, last_step: str) -> Tensor:
    """log p(x_0..x_T) - log q(x_1..x_T | x_0) at one path for each row: their mean is the ELBO."""
    process, T = chain.process(), chain.num_steps
    noised = process.marginal(x_0, at_time(1.0))
    x = dist.Normal(noised.loc, noised.scale).sample()
    log_weight = dist.Normal(torch.zeros_like(x), 1.0).log_prob(x) - dist.Normal(*noised).log_prob(x)
    for k in range(T, 1, -1):
        bridge = dist.Normal(*process.bridge(x, x_0, at_time((k - 1) / T), at_time(k / T)))
        earlier = bridge.sample()
        model = step_law(chain, x, k, variance, last_step)
        log_weight = log_weight + model.log_prob(earlier) - bridge.log_prob(earlier)
        x = earlier
    return (log_weight + step_law(chain, x, 1, variance, last_step).log_prob(x_0)).sum(-1)


@pytest.mark.parametrize("variance", VARIANCES)
@pytest.mark.parametrize("last_step", LAST_STEPS)
def test_chain_draws_have_the_law_of_the_recursion(variance: str, last_step: str) -> None:
    """20,000 simulated draws: an error of 5 % in sd, or a chain one step short, shows."""
    chain = chain_of(variance, last_step)
    x = simulate_chain(chain, 20_000, variance, last_step)

    def distance(chain: GaussianChain) -> float:
        return max(z_score(x, chain.mean), z_score(second_moments(x, chain.mean), chain.covariance))

    assert distance(chain) < 4.5
    assert distance(chain_of(variance, last_step, num_steps=3)) > 4.5
    wide = chain_of(variance, last_step)
    wide.variance_in_axes *= 1.05**2
    assert distance(wide) > 4.5


@pytest.mark.parametrize("variance", VARIANCES)
@pytest.mark.parametrize("last_step", LAST_STEPS)
def test_chain_elbo_by_simulation(variance: str, last_step: str) -> None:
    """The ELBO at one asymmetric datum from 20,000 paths; the other last step, and log p itself, fail."""
    chain = chain_of(variance, last_step)
    x_0 = torch.tensor([[1.1, -1.3, 0.4]], dtype=torch.float64)
    log_weights = simulate_log_weights(chain, x_0.expand(20_000, 3), variance, last_step)
    assert z_score(log_weights, float(chain.elbo(x_0))) < 4.5
    other = chain_of(variance, {"x1": "x0hat", "x0hat": "x1"}[last_step])
    assert z_score(log_weights, float(other.elbo(x_0))) > 4.5
    assert z_score(log_weights, float(chain.log_prob(x_0))) > 4.5


@pytest.mark.parametrize("variance", VARIANCES)
@pytest.mark.parametrize("last_step", LAST_STEPS)
def test_chain_expectations_are_those_of_its_data(variance: str, last_step: str) -> None:
    """20,000 data against closed forms of the terms and both gaps; data 5 % wider fail, so does the other gap."""
    chain = chain_of(variance, last_step)
    x_0 = chain.data.model(Batch(num_rows=20_000))
    log_q, log_p, elbo = chain.data.log_prob(x_0), chain.log_prob(x_0), chain.elbo(x_0)
    assert z_score(chain.terms(x_0), chain.expected_terms()) < 4.5
    assert z_score(elbo, chain.expected_elbo()) < 4.5
    assert z_score(log_p, chain.expected_log_prob()) < 4.5
    assert z_score(log_q - log_p, chain.model_gap) < 4.5
    assert z_score(log_p - elbo, chain.inference_gap) < 4.5
    assert (elbo < log_p).all()
    wide = chain.data.mean + 1.05 * (x_0 - chain.data.mean)
    assert z_score(chain.terms(wide), chain.expected_terms()) > 4.5
    assert z_score(log_q - log_p, chain.inference_gap) > 4.5


def test_chain_density_is_normalised() -> None:
    chain = GaussianChain(torch.tensor([0.5]).double(), torch.tensor([[0.4]]).double(), num_steps=4)
    x = torch.linspace(-12, 12, 4001, dtype=torch.float64)[:, None]
    assert float(torch.trapezoid(chain.log_prob(x).exp(), x[:, 0])) == pytest.approx(1, abs=1e-9)
    assert isinstance(chain, Normalised)


def gap(variance: str, num_steps: int, data_variance: float, process: Process = VP()) -> float:  # noqa: B008
    """E[log q(x_0)] - E[ELBO] in one dimension."""
    one = torch.ones(1, dtype=torch.float64)
    options: Any = {"reverse_variance": variance}
    chain = GaussianChain(0 * one, data_variance * one[None], process, num_steps, **options)
    return chain.model_gap + chain.inference_gap


@pytest.mark.parametrize(
    ("variance", "expected"), [("posterior", 0.4434), ("beta", 0.0013), ("analytic", 0.0002)]
)
def test_chain_loses_what_its_variance_costs(variance: str, expected: float) -> None:
    """VP, T = 1000, data of variance 1/4, nats a dimension."""
    assert gap(variance, 1000, 0.25) == pytest.approx(expected, abs=5e-5)


def test_posterior_variance_loses_half_of_eulers_constant_in_the_limit() -> None:
    """The excess over gamma/2 falls with T; a constant rate comes nearer sooner: 0.2867 at T = 10,000."""
    limit = 0.5772156649 / 2
    excess = [gap("posterior", num_steps, 0.25) - limit for num_steps in (100, 1000, 10_000)]
    assert excess[0] > excess[1] > excess[2] > 0
    assert excess[2] < 0.03
    constant = gap("posterior", 10_000, 1.0, VP(beta_min=10.0, beta_max=10.0))
    assert constant == pytest.approx(limit, abs=0.003)


def test_chain_is_exact_where_its_steps_can_be() -> None:
    """Standard normal data: with analytic steps down to x0hat the chain is the noising reversed, with no gap."""
    eye = torch.eye(3, dtype=torch.float64)
    chain = GaussianChain(torch.zeros(3, dtype=torch.float64), eye, num_steps=20, last_step="x0hat")
    assert chain.inference_gap == pytest.approx(0, abs=1e-9)
    assert chain.model_gap == pytest.approx(0, abs=1e-9)


def test_chain_denoiser_is_the_conditional_mean() -> None:
    """Regression of x_0 on x_t over 20,000 pairs leaves residuals uncorrelated with x_t."""
    chain, t = GaussianChain.example(), at_time(0.3)
    x_0 = chain.data.model(Batch(num_rows=20_000))
    noised = chain.process().marginal(x_0, t)
    x_t = noised.loc + noised.scale * torch.randn_like(x_0)

    def distance(x0hat: Tensor) -> float:
        residual = x_0 - x0hat
        return max(z_score(residual, 0.0), z_score(residual[:, :, None] * x_t[:, None, :], 0.0))

    assert distance(chain(x_t, t)) < 4.5
    assert distance(chain(x_t, at_time(0.33))) > 4.5


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        ({"num_steps": 0}, "num_steps"),
        ({"reverse_variance": "analytical"}, "did you mean 'analytic'"),
        ({"last_step": "x0"}, "last_step"),
    ],
)
def test_chain_refuses(options: dict[str, Any], complaint: str) -> None:
    with pytest.raises(InputError, match=complaint):
        GaussianChain.example(**options)
