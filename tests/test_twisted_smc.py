"""Twisted particles: posteriors and evidence against exact ones, and twins that must fail."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import Tensor

from conditioned_tools import (
    DTYPE,
    errors,
    gaussian_prior,
    linear,
    mean_z,
    mixture,
    pooled,
    sd_z,
    white_gaussian,
)
from probgen.core import Batch, DataSets, Estimate, InputError, Posterior, UnsupportedError
from probgen.evidence.smc import SMCEvidence
from probgen.inference import twisted_smc
from probgen.inference.twisted_smc import TwistedSMC
from probgen.inference.ula import ULA
from probgen.models.gaussian_mixture import GaussianMixture
from probgen.priors import twisted
from probgen.priors.dps import DPS
from probgen.priors.guidance import Jensen
from probgen.priors.moment_matching import MomentMatching
from probgen.priors.noise_aware import NoiseAware
from probgen.priors.particles import CollapsedWarning, systematic
from probgen.priors.prior import Prior
from probgen.priors.steps import Step, reverse_steps
from probgen.priors.twisted import TwistedFilter
from probgen.verbs import evidence, infer

ALLOWED_Z = 4.5
FEW = TwistedSMC(particles=128, steps=40)


def evidence_z(found: Estimate, exact: float) -> float:
    """The error of log p(y) in its standard errors."""
    return float((found.value - exact) / found.standard_error)


def drawn(case: Any, engine: TwistedSMC = FEW, num_draws: int = 128, num_chains: int = 16) -> Posterior:
    """A posterior with all its chains of one run."""
    return infer(case.program, engine, data=case.data, num_draws=num_draws, num_chains=num_chains)


# --- exact posteriors ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("num_chains", "num_draws"), [(1, 4096), pytest.param(4096, 1, marks=pytest.mark.slow)]
)
def test_white_gaussian(num_chains: int, num_draws: int) -> None:
    """Mean .80 and sd .447, in one batch of 4,096 draws or one by one, a run of particles for each.

    4.5 standard errors of one coordinate are .07 sd in the mean and .05 in the sd; of all together .025 and .018.
    """
    case = white_gaussian()
    particles = 256 if num_chains == 1 else 128
    x = drawn(case, TwistedSMC(particles, steps=50), num_draws, num_chains).flat("x")
    assert x.shape == (4096, 8)
    for draws in (x, pooled(x)):
        assert float(mean_z(draws, case.mean).abs().max()) < ALLOWED_Z
        assert float(sd_z(draws, case.sd).abs().max()) < ALLOWED_Z


def test_the_bridge_alone_is_too_narrow(monkeypatch: pytest.MonkeyPatch) -> None:
    """Steps of first order lack the spread of x_0 given x_t: the check above sees it."""
    case = white_gaussian()
    monkeypatch.setattr("probgen.inference.twisted_smc.reverse_steps", _first_order)
    x = drawn(case, TwistedSMC(steps=30), 4096, 1).flat("x")
    assert float(sd_z(pooled(x), case.sd)) < -2 * ALLOWED_Z


def _first_order(*args: Any) -> list[Step]:
    return [step._replace(ahead=0.0) for step in reverse_steps(*args)]


@pytest.mark.parametrize(("dim", "noise"), [(4, 0.5), (8, 0.1)])
def test_mixture(dim: int, noise: float) -> None:
    """Mode weights, means, sds and log p(y) at default settings: the evidence is known to about .01 and .03 nats."""
    case = mixture(dim, noise, seed=1)
    posterior = drawn(case, TwistedSMC(), num_draws=256)
    assert posterior.evidence is not None
    assert posterior.evidence.trusted
    assert float(posterior.evidence.standard_error) < 0.04
    assert abs(evidence_z(posterior.evidence, case.log_evidence)) < 4
    of_mean, of_sd = errors(posterior.flat("x"), case.posterior)
    assert of_mean < 0.1
    assert of_sd < 0.1
    by_chain = torch.stack([case.posterior.responsibilities(x).mean(0) for x in posterior["x"]])
    gap = (by_chain.mean(0) - case.posterior.weights).abs()
    assert bool((gap < ALLOWED_Z * by_chain.std(0) / 4 + 0.002).all())


def test_moment_matching_twist() -> None:
    """The true covariance as twist: the same law, the same evidence."""
    case = mixture(4, 0.5)
    posterior = drawn(case, TwistedSMC(particles=128, steps=30, twist=MomentMatching()))
    assert posterior.evidence is not None
    assert abs(evidence_z(posterior.evidence, case.log_evidence)) < 4
    assert max(errors(posterior.flat("x"), case.posterior)) < 0.15


def test_errors_fall_as_particles_and_steps_grow() -> None:
    """Bias of log p(y) from few steps, and spread from few particles, both shrink."""
    case = mixture(4, 0.5, seed=2)

    def found(particles: int, steps: int, num_chains: int) -> tuple[float, float]:
        posterior = drawn(case, TwistedSMC(particles, steps), 1, num_chains)
        log_z = posterior.run_stats["log_evidence"] - case.log_evidence
        return abs(float(log_z.exp().mean().log())), float(log_z.std())

    coarse, _ = found(512, 8, 16)
    fine, narrow = found(512, 40, 16)
    assert coarse > 0.08
    assert fine < 0.3 * coarse
    _, wide = found(32, 40, 32)
    assert narrow < 0.5 * wide  # 1/4 expected


# --- twins --------------------------------------------------------------------------------------------------------


def _no_ratio(noise: Tensor, shift: Tensor) -> Tensor:
    return torch.zeros(len(noise), dtype=DTYPE)


def _no_denominator(moved: Any) -> Any:
    def without(self: Any, cloud: Any, step: Any, k: int) -> Any:
        return moved(self, cloud._replace(log_psi=0 * cloud.log_psi), step, k)

    return without


def _blind(log_weights: Tensor, uniform: Tensor, count: int) -> Tensor:
    return systematic(0 * log_weights, uniform, count)


@pytest.mark.parametrize("twin", ["ratio", "denominator", "resampling"])
def test_twins_fail(twin: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Weights without p/q, without psi_t, and resampling that ignores weights: evidence or means are far off."""
    case = mixture(4, 0.5)
    if twin == "ratio":
        monkeypatch.setattr(twisted, "log_proposal_ratio", _no_ratio)
    elif twin == "denominator":
        monkeypatch.setattr(TwistedFilter, "_moved", _no_denominator(TwistedFilter._moved))
    else:
        for module in (twisted, twisted_smc):
            monkeypatch.setattr(module, "systematic", _blind)
    posterior = drawn(case)
    assert posterior.evidence is not None
    off = abs(float(posterior.evidence.value) - case.log_evidence)
    assert off > 10 * 0.03 or max(errors(posterior.flat("x"), case.posterior)) > 0.3


def test_systematic_resampling_is_unbiased() -> None:
    """Particle i is taken count w_i times, rounded up or down, and that many times on average."""
    weights = torch.tensor([0.05, 0.6, 0.0, 0.35], dtype=DTYPE)
    uniform = (torch.arange(2000, dtype=DTYPE)[:, None] + 0.5) / 2000
    index = systematic(weights.log().expand(2000, 4)[..., None], uniform, 7)[..., 0]
    counts = torch.stack([(index == i).sum(1) for i in range(4)], 1).double()
    assert torch.allclose(counts.mean(0), 7 * weights, atol=2e-3)
    assert bool(((counts - 7 * weights).abs() < 1).all())


# --- other latents ------------------------------------------------------------------------------------------------

Y = torch.tensor([0.3, -0.8, 2.1, 1.2, -0.2, 0.9], dtype=DTYPE)


def unknown_noise() -> None:
    """x ~ N(0, I), y = x + s noise with s unknown."""
    x = pyro.sample("x", Prior(gaussian_prior(6)))
    s = pyro.sample("s", dist.LogNormal(torch.tensor(-0.7, dtype=DTYPE), 0.6))
    pyro.sample("y", dist.Normal(x, s).to_event(1))


def unknown_noise_by_quadrature() -> tuple[float, float, float]:
    """log p(y), mean and sd of log s given y."""
    grid = torch.linspace(-6, 4, 20001, dtype=DTYPE)
    scale = (1 + (2 * grid).exp()).sqrt()[:, None]
    log_joint = dist.Normal(-0.7, 0.6).log_prob(grid) + dist.Normal(0.0, scale).log_prob(Y).sum(1)
    weights = log_joint.softmax(0)
    mean = weights @ grid
    sd = (weights @ (grid - mean).square()).sqrt()
    return float(log_joint.logsumexp(0) + (grid[1] - grid[0]).log()), float(mean), float(sd)


def test_unknown_noise_scale() -> None:
    """A noise scale beside x, moved by Metropolis steps, against quadrature."""
    log_evidence, mean, sd = unknown_noise_by_quadrature()
    posterior = infer(unknown_noise, FEW, data={"y": Y}, num_draws=128, num_chains=16)
    assert posterior.evidence is not None
    assert abs(evidence_z(posterior.evidence, log_evidence)) < 4
    by_chain = posterior["s"].log().mean(1)
    assert abs(float(by_chain.mean()) - mean) < ALLOWED_Z * float(by_chain.std()) / 4
    assert abs(float(posterior["s"].log().std()) / sd - 1) < 0.1
    assert len(posterior.flat("s").unique()) > 0.5 * posterior["s"].numel()


def test_accepting_every_move_of_the_noise_scale_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    """A random walk that is never refused: z is spread far too widely."""
    tried = TwistedFilter._tried

    def always(*args: Any) -> tuple[Tensor, Tensor]:
        z, log_uniform = tried(*args)
        return z, torch.full_like(log_uniform, -torch.inf)

    monkeypatch.setattr(TwistedFilter, "_tried", always)
    monkeypatch.setattr(twisted_smc, "_FEWEST", 0)  # it collapses, too
    _, _, sd = unknown_noise_by_quadrature()
    posterior = infer(unknown_noise, FEW, data={"y": Y}, num_draws=128, num_chains=16)
    assert abs(float(posterior["s"].log().std()) / sd - 1) > 0.2


def test_regression_weights() -> None:
    """Four weights that y says much of, beside x: drawn from their wide prior alone, all but one particle would die."""
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(6, 4, generator=generator, dtype=DTYPE)
    cov = 1.25 * torch.eye(6, dtype=DTYPE) + 4 * inputs @ inputs.mT
    y = torch.linalg.cholesky(cov) @ torch.randn(6, generator=generator, dtype=DTYPE)

    def program() -> None:
        x = pyro.sample("x", Prior(gaussian_prior(6)))
        with pyro.plate("inputs", 4):
            w = pyro.sample("w", dist.Normal(torch.zeros((), dtype=DTYPE), 2.0))
        pyro.sample("y", dist.Normal(x + (inputs @ w[..., None])[..., 0], 0.5).to_event(1))

    posterior = infer(program, TwistedSMC(steps=60), data={"y": y}, num_draws=256, num_chains=8)
    exact = dist.MultivariateNormal(torch.zeros(6, dtype=DTYPE), cov)
    assert posterior.evidence is not None
    assert posterior.evidence.trusted
    assert abs(evidence_z(posterior.evidence, float(exact.log_prob(y)))) < 4
    gain = torch.linalg.solve(cov, 4 * inputs).mT
    sd = (4 * (torch.eye(4, dtype=DTYPE) - gain @ inputs)).diagonal().sqrt()
    by_chain = posterior["w"].mean(1)
    assert bool(((by_chain.mean(0) - gain @ y).abs() < ALLOWED_Z * by_chain.std(0) / math.sqrt(8)).all())
    assert float((posterior.flat("w").std(0) / sd - 1).abs().max()) < 0.2


def test_other_latents_cost_no_network_call() -> None:
    """One call a step and one at the end, whatever is inferred beside x."""
    engine = TwistedSMC(particles=128, steps=15)
    posterior = infer(unknown_noise, engine, data={"y": Y}, num_draws=32, num_chains=1)
    assert posterior.cost.network_calls == posterior.cost.gradients == 16


# --- programs -----------------------------------------------------------------------------------------------------


def test_any_likelihood() -> None:
    """Counts, a nonlinear map and a label at once, against importance sampling from the prior."""
    mixture = GaussianMixture.example()
    classify = _Classifier(mixture)
    data = {"k": torch.tensor(3.0), "y": torch.tensor(0.8, dtype=DTYPE), "label": torch.tensor(1)}

    def program() -> None:
        x = pyro.sample("x", Prior(mixture))
        pyro.sample("k", dist.Poisson(x[..., 0].exp()))
        pyro.sample("y", dist.Normal((x[..., 1] * x[..., 0]).sin(), 0.3))
        pyro.sample("label", NoiseAware(classify, x))

    with torch.random.fork_rng():
        torch.manual_seed(0)
        x = mixture.model(Batch(num_rows=200_000))
    log_lik = dist.Poisson(x[:, 0].exp()).log_prob(data["k"])
    log_lik = log_lik + dist.Normal((x[:, 1] * x[:, 0]).sin(), 0.3).log_prob(data["y"])
    log_lik = log_lik + classify(x, torch.zeros(1, dtype=DTYPE)).log_softmax(1)[:, 1]
    weights = log_lik.softmax(0)
    mean = weights @ x
    sd = (weights @ (x - mean).square()).sqrt()
    posterior = infer(program, FEW, data=data, num_draws=128, num_chains=16)
    assert posterior.evidence is not None
    assert abs(evidence_z(posterior.evidence, float(log_lik.logsumexp(0)) - math.log(200_000))) < 4
    by_chain = posterior["x"].mean(1)
    assert bool(((by_chain.mean(0) - mean).abs() < ALLOWED_Z * by_chain.std(0) / 4 + 0.01 * sd).all())


class _Classifier:
    """Which component x_t belongs to, exact at every t."""

    event_shape = (2,)

    def __init__(self, mixture: GaussianMixture) -> None:
        self.mixture = mixture

    def __call__(self, x: Tensor, t: Tensor) -> Tensor:
        at_zero = bool((t == 0).all())
        return self.mixture.responsibilities(x, None if at_zero else t[:1]).log()


def test_plated_priors() -> None:
    """Two draws of one prior in a plate, each seen on its own: two posteriors, evidences added."""
    case = linear(2, 0.5, num_seen=1)
    y = torch.tensor([[0.5], [-1.0]], dtype=DTYPE)

    def program() -> None:
        with pyro.plate("images", 2):
            x = pyro.sample("x", Prior(case.prior))
            pyro.sample("y", dist.Normal((case.operator @ x[..., None])[..., 0], 0.5).to_event(1))

    posterior = infer(program, FEW, data={"y": y}, num_draws=128, num_chains=16)
    exact = [case.given(row) for row in y]
    assert posterior.dims["x"][0] == "images"
    assert posterior.evidence is not None
    assert abs(evidence_z(posterior.evidence, sum(each.log_evidence for each in exact))) < 4
    for i, each in enumerate(exact):
        assert max(errors(posterior.flat("x")[:, i], each.posterior)) < 0.15


def test_data_sets_side_by_side() -> None:
    """Each data set has its own posterior and evidence."""
    case = linear(2, 0.5)
    y = case.pairs(20, 1)[1]
    posterior = infer(case.program, FEW, data=DataSets({"y": y}), num_draws=128, num_chains=8)
    assert posterior["x"].shape == (8, 128, 20, 2)
    assert posterior.run_stats["min_ess"].shape == (8, 20)
    assert posterior.evidence is not None
    exact = [case.given(row) for row in y]
    gap = posterior.evidence.value - torch.tensor([each.log_evidence for each in exact])
    assert float((gap / posterior.evidence.standard_error).abs().max()) < 6  # of 20, with 8 runs each
    for i, each in enumerate(exact):
        assert max(errors(posterior.flat("x")[:, i], each.posterior)) < 0.3


def covered(dim: int, engine: TwistedSMC) -> float:
    """How often the central 90 % of 199 draws hold x, over 1,000 pairs from the joint law."""
    case = linear(dim, 0.5)
    x, y = case.pairs(1000, 3)
    draws = infer(case.program, engine, data=DataSets({"y": y}), num_draws=199, num_chains=1)["x"][0]
    rank = (draws < x).sum(0)
    return float(((rank >= 10) & (rank < 190)).double().mean())


def test_coverage() -> None:
    """90 % intervals of 1,000 posteriors: the standard error is below .01."""
    assert 0.87 < covered(2, TwistedSMC(particles=200, steps=15)) < 0.93


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::probgen.priors.particles.CollapsedWarning")
@pytest.mark.parametrize("dim", [2, 16])
def test_coverage_in_full(dim: int) -> None:
    assert 0.87 < covered(dim, TwistedSMC(steps=50)) < 0.93


# --- what a run is ------------------------------------------------------------------------------------------------


def test_draws_do_not_depend_on_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    """Network batches and memory change no draw; nor do chains beside it."""
    case = mixture(4, 0.5)
    engine = TwistedSMC(particles=32, steps=8)
    whole = drawn(case, engine, 40, 4)
    assert torch.allclose(drawn(case, replace(engine, batch_size=7), 40, 4)["x"], whole["x"], atol=1e-10)
    assert torch.allclose(drawn(case, engine, 40, 2)["x"], whole["x"][:2], atol=1e-10)
    monkeypatch.setattr(twisted_smc, "_NUMBERS_AT_ONCE", 1)
    assert torch.allclose(drawn(case, engine, 40, 4)["x"], whole["x"], atol=1e-10)


@pytest.mark.filterwarnings("ignore::probgen.priors.particles.CollapsedWarning")
def test_the_same_seed_gives_the_same_draws() -> None:
    """Bit by bit, other latents too, the global stream untouched; another seed gives others."""
    engine, before = TwistedSMC(particles=32, steps=6), torch.random.get_rng_state()
    first, again, other = (
        infer(unknown_noise, engine, data={"y": Y}, num_draws=40, num_chains=2, seed=seed)
        for seed in (3, 3, 4)
    )
    assert torch.equal(before, torch.random.get_rng_state())
    for site in ("x", "s"):
        assert torch.equal(first[site], again[site])
        assert not torch.equal(first[site], other[site])


def test_chains_never_return_more_draws_than_particles() -> None:
    """100 draws by 32 particles are four runs a chain, pooled; what is known of them is there."""
    case = mixture(4, 0.5)
    posterior = drawn(case, TwistedSMC(particles=32, steps=10), 100, 3)
    assert posterior.kind == "weighted"
    assert posterior["x"].shape == (3, 100, 4)
    assert all(len(chain.unique(dim=0)) > 32 for chain in posterior["x"])
    assert posterior.run_stats["ess"].shape == posterior.run_stats["ancestors"].shape == (3, 12)
    assert torch.equal(posterior.run_stats["min_ess"], posterior.run_stats["ess"].min(1).values)
    assert posterior.evidence is not None
    assert "12 independent" in posterior.evidence.convention


def test_one_run_knows_no_error() -> None:
    case = mixture(4, 0.5)
    found = drawn(case, TwistedSMC(steps=20), 256, 1).evidence
    assert found is not None
    assert not found.trusted
    assert "one run" in found.reason
    assert bool(found.standard_error.isinf())


def test_collapse_is_said() -> None:
    """Jensen at small noise: far too sure of itself, and not believed."""
    case = mixture(8, 0.02)
    with pytest.warns(CollapsedWarning, match="effective size"):
        found = drawn(case, TwistedSMC(particles=64, steps=20, twist=Jensen()), 64, 4).evidence
    assert found is not None
    assert not found.trusted
    assert "collapsed" in found.reason


def test_evidence_by_the_verb() -> None:
    case = mixture(4, 0.5)
    found = evidence(case.program, SMCEvidence(FEW), case.data)
    assert abs(evidence_z(found, case.log_evidence)) < 4
    with pytest.raises(InputError, match="num_runs"):
        SMCEvidence(FEW, num_runs=1)
    with pytest.raises(InputError, match="TwistedSMC"):
        evidence(case.program, SMCEvidence(ULA(num_warmup=5)), case.data)


# --- bad input ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "wrong",
    [
        {"particles": 1},
        {"steps": 0},
        {"ess_threshold": 1.5},
        {"batch_size": 0},
        {"grid": "spiral"},
        {"twist": "PiGDM"},
    ],
)
def test_settings_out_of_range(wrong: dict[str, Any]) -> None:
    with pytest.raises(InputError, match=next(iter(wrong))):
        TwistedSMC(**wrong)


def test_guidance_without_a_density_is_refused() -> None:
    with pytest.raises(InputError, match="DPS.*PiGDM"):
        TwistedSMC(twist=DPS())


def seen(scale: Any = 0.5, likelihood: Any = None) -> Any:
    """A program that sees x with this noise, or by another likelihood."""

    def program() -> None:
        x = pyro.sample("x", Prior(gaussian_prior(2)))
        pyro.sample("y", likelihood(x) if likelihood else dist.Normal(x, scale).to_event(1))

    return program


def test_a_likelihood_that_turns_nan() -> None:
    """Particles whose coordinates sum to less than 0 have no root: said with the time."""
    program = seen(likelihood=lambda x: dist.Normal(x.sum(-1, keepdim=True).sqrt(), 0.5).to_event(1))
    with pytest.raises(InputError, match="NaN.* t = "):
        infer(program, FEW, data={"y": torch.ones(1, dtype=DTYPE)})


def test_fitted_programs_alone_are_refused() -> None:
    with pytest.raises(UnsupportedError, match="Prior"):
        infer(gaussian_prior(2), FEW, num_draws=2)


def test_noise_of_zero() -> None:
    with pytest.raises(InputError):
        infer(seen(0.0), FEW, data={"y": torch.ones(2, dtype=DTYPE)})
