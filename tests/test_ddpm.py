"""The diffusion chain: one bound by three routes, and the exact recursion on Gaussian data."""

from __future__ import annotations

import math
from dataclasses import dataclass

import pyro
import pytest
import torch
from pyro import poutine
from pyro.infer import Trace_ELBO, TraceMeanField_ELBO
from torch import Tensor, nn

from probgen import (
    DDPM,
    ELBO,
    VP,
    Ancestral,
    Batch,
    CosineVP,
    ELBOEstimate,
    GaussianChain,
    ImportanceWeighted,
    InputError,
    Optim,
    SimpleLoss,
    TimeMLP,
    evidence,
    fit,
    infer,
)
from probgen.bounds import sample_sites

VARIANCES = ("posterior", "beta", "analytic")
LAST_STEPS = ("x1", "x0hat")
SIGMAS = 4.0


@dataclass
class Mean:
    """A Monte Carlo mean with its standard error."""

    value: float
    error: float

    @staticmethod
    def of(values: Tensor) -> Mean:
        return Mean(float(values.mean()), float(values.std() / math.sqrt(len(values))))

    def z(self, other: Mean) -> float:
        return abs(self.value - other.value) / math.hypot(self.error, other.error)


def correlated_data(rows: int = 32) -> Tensor:
    """Three coordinates of unlike means and spreads."""
    generator = torch.Generator().manual_seed(1)
    return torch.randn(rows, 3, generator=generator) * torch.tensor([0.5, 1.0, 0.2]) + torch.tensor(
        [1.0, 0.0, -0.5]
    )


def fitted(reverse_variance: str, last_step: str, process: VP | CosineVP = VP()) -> DDPM:  # noqa: B008
    ddpm = DDPM(
        TimeMLP((3,), width=32, num_blocks=1),
        process,
        num_steps=10,
        prediction="v",
        reverse_variance=reverse_variance,
        last_step=last_step,
    )
    fit(ddpm, correlated_data(), ELBO(), num_steps=100, optim=Optim(lr=3e-3), progress=False)
    return ddpm


def full_chain(ddpm: DDPM, x: Tensor, estimator: type, repeats: int) -> Mean:
    """The pair's T sites as Pyro sees them."""
    rows = Batch({"x": x.repeat(repeats, 1)})
    model = pyro.condition(ddpm.model, data=rows.data)
    with torch.no_grad():
        losses = [
            estimator(max_plate_nesting=1).differentiable_loss(model, ddpm.guide, rows) / rows.size
            for _ in range(20)
        ]
    return Mean.of(torch.stack(losses))


def subsampled(ddpm: DDPM, x: Tensor, repeats: int) -> Mean:
    """One stratified step a row, drawn by importance, as fitting sees it."""
    rows = Batch({"x": x.repeat(repeats, 1)})
    with torch.no_grad():
        return Mean.of(torch.stack([ELBO().loss(ddpm, rows) for _ in range(40)]))


def uniform(ddpm: DDPM, x: Tensor, repeats: int) -> Mean:
    """The pair itself with steps drawn uniformly."""
    rows = Batch({"x": x.repeat(repeats, 1)})
    steps = torch.tensor(ddpm.steps())
    model = pyro.condition(ddpm.model, data=rows.data)
    losses = []
    with torch.no_grad():
        for _ in range(40):
            k = steps[torch.randint(len(steps), (rows.size,))]
            losses.append(
                Trace_ELBO(max_plate_nesting=1).differentiable_loss(model, ddpm.guide, rows, t=k) / rows.size
            )
    return Mean.of(torch.stack(losses))


def written_out(ddpm: DDPM, x: Tensor, repeats: int) -> Mean:
    """The bound as the paper writes it, from alpha, sigma and the network alone."""
    total, process, steps = (
        ddpm.num_steps,
        ddpm.process(),
        torch.arange(ddpm.num_steps + 1).double() / ddpm.num_steps,
    )
    abar = process.alpha(steps).square()
    x_0 = x.repeat(repeats * 20, 1).double()
    shape = (20, -1)

    def normal(x: Tensor, loc: Tensor, variance: float) -> Tensor:
        return (-0.5 * ((x - loc) ** 2 / variance + math.log(2 * math.pi * variance))).sum(1)

    def denoised(x_k: Tensor, k: int) -> Tensor:
        return ddpm.denoise(x_k.float(), torch.tensor([k / total])).double()

    bound = -0.5 * (abar[-1] * x_0**2 - abar[-1] - torch.log(1 - abar[-1])).sum(1)
    with torch.no_grad():
        for k in range(1, total + 1):
            x_k = abar[k].sqrt() * x_0 + (1 - abar[k]).sqrt() * torch.randn_like(x_0)
            if k == 1:
                loc = denoised(x_k, 1) if ddpm.last_step == "x0hat" else x_k
                bound += normal(x_0, loc, float(ddpm.log_last_scale.exp() ** 2))
                continue
            beta = 1 - abar[k] / abar[k - 1]
            c_0 = abar[k - 1].sqrt() * beta / (1 - abar[k])
            tilde = beta * (1 - abar[k - 1]) / (1 - abar[k])
            variance = {
                "posterior": tilde,
                "beta": beta,
                "analytic": tilde + c_0**2 * ddpm.x0_variance[k - 1],
            }
            v = variance[ddpm.reverse_variance]
            error = (x_0 - denoised(x_k, k)).square().sum(1)
            bound -= 0.5 * (3 * (tilde / v - 1 - torch.log(tilde / v)) + c_0**2 / v * error)
    return Mean.of(-bound.reshape(shape).mean(1))


@pytest.mark.parametrize("last_step", LAST_STEPS)
@pytest.mark.parametrize("reverse_variance", VARIANCES)
def test_one_bound_by_every_route(reverse_variance: str, last_step: str) -> None:
    """Full chain, subsampled steps and the written-out bound agree within 4 errors, each at most 1 % of the value."""
    ddpm, x = fitted(reverse_variance, last_step), correlated_data()
    routes = {
        "pyro": full_chain(ddpm, x, Trace_ELBO, 40),
        "closed-form KL": full_chain(ddpm, x, TraceMeanField_ELBO, 40),
        "subsampled": subsampled(ddpm, x, 60),
        "uniform steps": uniform(ddpm, x, 200),
        "written out": written_out(ddpm, x, 25),
    }
    estimate = evidence(ddpm, ELBOEstimate(num_particles=400), x)
    routes["evidence"] = Mean(-estimate.mean, estimate.monte_carlo_error)
    reference = routes["written out"]
    for name, route in routes.items():
        assert route.error <= 0.01 * abs(route.value), (name, route)
        assert route.z(reference) < SIGMAS or name == "written out", (name, route, reference)


@pytest.mark.parametrize("wrong", ["scaled by T", "one step missing", "x_k shared", "prior forgotten"])
def test_wrong_bounds_do_not_agree(wrong: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The check above sees each classical mistake."""
    ddpm, x = fitted("posterior", "x1", VP(beta_max=2.0)), correlated_data()
    right = written_out(ddpm, x, 25)
    if wrong == "scaled by T":
        monkeypatch.setattr(DDPM, "_collapsed", lambda self, x_0, k, w: pyro.factor("b", -(
            self.num_steps * self.step_term(x_0, k) + sum(self.end_terms(x_0).values()))))  # fmt: skip
    elif wrong == "one step missing":
        everything = DDPM.step_probabilities
        monkeypatch.setattr(DDPM, "steps", lambda self: range(3, self.num_steps + 1))
        monkeypatch.setattr(
            DDPM, "step_probabilities", lambda self: everything(self)[1:] / everything(self)[1:].sum()
        )
    elif wrong == "x_k shared":
        monkeypatch.setattr(torch, "randn_like", lambda x: torch.randn(1, 1).expand_as(x))
    else:
        ends = DDPM.end_terms
        monkeypatch.setattr(DDPM, "end_terms", lambda self, x_0: {"x": ends(self, x_0)["x"]})
    broken = subsampled(ddpm, x, 60)
    if wrong == "x_k shared":  # still unbiased: what it costs is variance, which the width gate sees
        assert broken.error > 4 * right.error
    else:
        assert broken.z(right) > SIGMAS


def test_every_site_meets_its_twin() -> None:
    """Model and guide visit the same sites in the same order, and the data come last."""
    ddpm, rows = DDPM(TimeMLP((3,), width=8, num_blocks=1), num_steps=4), Batch({"x": correlated_data()})
    guide = list(sample_sites(poutine.trace(ddpm.guide).get_trace(rows)))
    model = list(sample_sites(poutine.trace(ddpm.model).get_trace(rows)))
    assert guide == ["x_4", "x_3", "x_2", "x_1"]
    assert model == [*guide, "x"]


def test_calibration_finds_the_best_last_scale() -> None:
    """Moving s away from its calibrated value, either way, loses nats."""
    x = correlated_data(512)
    ddpm = DDPM(TimeMLP((3,), width=8, num_blocks=1), num_steps=10)
    ddpm.calibrate(x)
    at_optimum = ddpm.end_terms(x)["x"].mean().item()
    for shift in (-0.1, 0.1):
        with torch.no_grad():
            ddpm.log_last_scale.add_(shift)
            assert ddpm.end_terms(x)["x"].mean().item() > at_optimum + 0.005
            ddpm.log_last_scale.sub_(shift)


def test_every_weight_gets_a_gradient() -> None:
    for last_step in LAST_STEPS:
        ddpm = DDPM(TimeMLP((3,), width=8, num_blocks=1), num_steps=10, last_step=last_step)
        nn.init.normal_(next(p for name, p in reversed(list(ddpm.named_parameters())) if "weight" in name))
        ELBO().loss(ddpm, Batch({"x": correlated_data()})).backward()
        assert all(p.grad is not None and bool(p.grad.abs().sum() > 0) for p in ddpm.parameters())


# --- Gaussian data with the exact denoiser: everything is known -------------------------------------------------


def exact_pair(num_steps: int, reverse_variance: str, last_step: str) -> tuple[GaussianChain, DDPM]:
    """The recursion, and a chain whose network is the same exact denoiser."""
    options = {"reverse_variance": reverse_variance, "last_step": last_step}
    oracle = GaussianChain.example(VP(), num_steps, **options)
    ddpm = DDPM(oracle, VP(), num_steps, prediction="x0", **options).double()
    with torch.no_grad():
        law = oracle.data
        k = torch.arange(1, num_steps + 1, dtype=torch.float64) / num_steps
        alpha2, sigma2 = ddpm.process().alpha(k).square(), ddpm.process().sigma(k).square()
        spread = law.eigenvalues[0]
        ddpm.x0_variance.copy_(
            (spread * sigma2[:, None] / (alpha2[:, None] * spread + sigma2[:, None])).mean(1)
        )
        moment = float((spread + law.centres[0].square()).mean())
        identity = (1 - alpha2[0].sqrt()) ** 2 * moment + sigma2[0]
        last = identity if last_step == "x1" else ddpm.x0_variance[0]
        ddpm.log_last_scale.copy_(0.5 * last.log())
    return oracle, ddpm


def exact_data(oracle: GaussianChain, rows: int) -> Tensor:
    law = torch.distributions.MultivariateNormal(oracle.data.mean, oracle.data.covariance)
    return law.sample((rows,))


@pytest.mark.parametrize("num_steps", [10, 100, 1000])
@pytest.mark.parametrize("reverse_variance", VARIANCES)
@pytest.mark.parametrize("last_step", LAST_STEPS)
def test_bound_meets_the_recursion(num_steps: int, reverse_variance: str, last_step: str) -> None:
    """ELBO of each datum and each of its terms within 4.5 errors; sees a term wrong by 1 %."""
    oracle, ddpm = exact_pair(num_steps, reverse_variance, last_step)
    x = exact_data(oracle, 20)
    estimate = evidence(ddpm, ELBOEstimate(num_particles=50, batch_size=50_000), x)
    z = (estimate.value - oracle.elbo(x)) / estimate.standard_error
    assert float(z.abs().max()) < 4.5
    assert float(z.mean().abs()) < 4.5 / math.sqrt(len(z))
    lost = -estimate.terms.value
    exact = oracle.terms(x).mean(0)
    in_order = torch.cat((exact[:1], exact[2:].flip(0), exact[1:2]))  # prior, k = T..2, then k = 1
    assert torch.allclose(lost, in_order, rtol=0.5, atol=0.05)
    assert float(lost.sum()) == pytest.approx(float(in_order.sum()), abs=5 * estimate.monte_carlo_error)


@pytest.mark.parametrize("num_steps", [10, 100, 1000])
@pytest.mark.parametrize("reverse_variance", VARIANCES)
def test_likelihood_meets_the_recursion(num_steps: int, reverse_variance: str) -> None:
    """log p_theta by importance sampling of the whole chain, where its weights can be trusted, and the law drawn."""
    oracle, ddpm = exact_pair(num_steps, reverse_variance, "x1")
    draws = infer(ddpm, Ancestral(), num_draws=4_000 if num_steps == 1000 else 20_000).flat("x")
    error = (oracle.covariance.diagonal() / len(draws)).sqrt()
    assert float(((draws.mean(0) - oracle.mean) / error).abs().max()) < 4.5
    pairs = oracle.covariance.diagonal()[:, None] * oracle.covariance.diagonal() + oracle.covariance.square()
    z = (draws.T.cov() - oracle.covariance) / (pairs / len(draws)).sqrt()
    assert float(z.abs().max()) < 4.5
    if reverse_variance == "posterior":
        return  # its weights have heavy tails; the estimator says so in test_evidence
    x = exact_data(oracle, 4)
    estimate = evidence(ddpm, ImportanceWeighted(2000 if num_steps == 10 else 200, batch_size=200), x)
    z = (estimate.value - oracle.log_prob(x)) / estimate.standard_error
    assert float(z.abs().max()) < 4.5


def test_the_gap_of_each_variance() -> None:
    """What a perfect denoiser still loses, in nats a dimension, against the entropy of the data."""

    def gap(num_steps: int, reverse_variance: str) -> float:
        scale = torch.full((1,), 0.25, dtype=torch.float64)
        chain = GaussianChain(0 * scale, scale[:, None], VP(), num_steps, reverse_variance=reverse_variance)
        return chain.model_gap + chain.inference_gap

    assert gap(1000, "posterior") == pytest.approx(0.443, abs=0.002)
    assert gap(1_000_000, "posterior") == pytest.approx(0.2886, abs=0.001)
    assert gap(1000, "beta") < 0.002
    assert gap(1000, "analytic") < 0.0005


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_steps": 0}, "num_steps must be an integer in .2, 1,000,000., got 0"),
        ({"num_steps": 1}, "num_steps must be an integer in .2, 1,000,000., got 1"),
        ({"prediction": "epsilon"}, "did you mean 'eps'"),
        ({"reverse_variance": "betas"}, "did you mean 'beta'"),
        ({"last_step": "x0"}, "known: 'x1', 'x0hat'"),
    ],
)
def test_bad_options_are_refused(options: dict[str, object], message: str) -> None:
    with pytest.raises(InputError, match=message):
        DDPM(TimeMLP((2,), width=8, num_blocks=1), **options)


def test_a_network_without_a_shape_needs_one() -> None:
    with pytest.raises(InputError, match="event_shape"):
        DDPM(nn.Linear(2, 2))


def test_simple_loss_is_the_noise_error() -> None:
    """With an eps network the loss is |eps - epshat|^2 / d, which a silent network answers with 1."""

    class Silent(nn.Module):
        event_shape = (3,)

        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.zeros(1))

        def forward(self, x: Tensor, t: Tensor) -> Tensor:
            return x * self.weight

    ddpm = DDPM(Silent(), num_steps=50)
    losses = torch.stack(
        [SimpleLoss().loss(ddpm, Batch({"x": correlated_data()})).detach() for _ in range(300)]
    )
    mean = Mean.of(losses)
    assert abs(mean.value - 1) < 4.5 * mean.error
    assert mean.error < 0.02
