"""p(x | c) by one verb, whoever knows it: a conditional VAE, a conditional diffusion, a diffusion seen through a label.

Two classes, x | c Gaussian, known to each of the three exactly, so that `infer` has one right answer, with c alone and
with a noisy look y at x beside it. 4.5 standard errors of 2,000 draws are 0.10 sd of a mean and 0.07 sd of an sd.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import Tensor, nn

from conditioned_tools import DTYPE, mean_z, sd_z
from probgen import DataSets, Posterior, infer
from probgen.conditioning import Labels
from probgen.core import Engine
from probgen.inference.ancestral import Ancestral
from probgen.inference.guided_ode import GuidedODE
from probgen.inference.guided_sde import GuidedSDE
from probgen.inference.hmc import HMC
from probgen.inference.probability_flow_ode import ProbabilityFlowODE
from probgen.inference.reverse_sde import ReverseSDE
from probgen.inference.split_gibbs import SplitGibbs
from probgen.inference.twisted_smc import TwistedSMC
from probgen.models.conditional_vae import ConditionalVAE
from probgen.models.gaussian_mixture import GaussianMixture
from probgen.models.score_sde import ScoreSDE
from probgen.models.vae import GaussianLikelihood
from probgen.priors.classifier_free import ClassifierFree
from probgen.priors.moment_matching import MomentMatching
from probgen.priors.noise_aware import NoiseAware
from probgen.priors.noise_space import NoiseSpace
from probgen.priors.prior import Prior
from probgen.processes import VP

ALLOWED_Z = 4.5
WEIGHTS = torch.tensor([0.7, 0.3], dtype=DTYPE)
LOCS = torch.tensor([[1.5, -0.5], [-1.0, 0.8]], dtype=DTYPE)
LOADINGS = torch.tensor([[0.8, 0.2], [0.3, 0.6]], dtype=DTYPE)  # x = loc + L z + noise
SCALE = 0.3
COVARIANCE = LOADINGS @ LOADINGS.mT + SCALE**2 * torch.eye(2, dtype=DTYPE)
CLASSES = torch.arange(2)
NOISE, Y = 0.5, torch.tensor([0.4, 0.1], dtype=DTYPE)


def mixture(weights: Tensor) -> GaussianMixture:
    return GaussianMixture(weights, LOCS, COVARIANCE.expand(2, 2, 2))


# --- three that know p(x | c) -------------------------------------------------------------------------------------


def conditional_vae() -> ConditionalVAE:
    """z ~ N(0, I), x ~ N(loc_c + L z, SCALE^2 I)."""

    def decode(z: Tensor, c: Tensor) -> Tensor:
        return c.to(DTYPE) @ LOCS + z.to(DTYPE) @ LOADINGS.mT

    def encode(x: Tensor, c: Tensor) -> tuple[Tensor, Tensor]:
        raise AssertionError("drawing x needs no guide")

    return ConditionalVAE((2,), 2, 2, encode, decode, likelihood=GaussianLikelihood(SCALE).to(DTYPE))


class ByClass(nn.Module):
    """E[x_0 | x_t, c], that of the mixture where c is missing."""

    takes_one_time = True

    def __init__(self) -> None:
        super().__init__()
        self.missing = mixture(WEIGHTS)
        self.classes = nn.ModuleList(
            GaussianMixture(torch.ones(1, dtype=DTYPE), loc[None], COVARIANCE[None]) for loc in LOCS
        )

    def forward(self, x: Tensor, t: Tensor, c: Tensor) -> Tensor:
        found = torch.stack([net(x, t) for net in (*self.classes, self.missing)])
        return found[c, torch.arange(len(x))]


def conditional_diffusion() -> ScoreSDE:
    return ScoreSDE(ByClass(), VP(), event_shape=(2,), prediction="x0", condition=Labels(2))


def labelled(prior: GaussianMixture, *, seen: bool = False) -> Callable[[], None]:
    """A diffusion that knows of no c, and a classifier that knows it at every noise level."""

    def classify(x: Tensor, t: Tensor) -> Tensor:
        return prior.responsibilities(x, t[:1]).log()

    def program() -> None:
        x = pyro.sample("x", Prior(prior))
        pyro.sample("c", NoiseAware(classify, x))
        if seen:
            pyro.sample("y", dist.Normal(x, NOISE).to_event(1))

    return program


def conditioned(program: Any) -> Callable[[], None]:
    """x of each class, seen with noise."""

    def seen() -> None:
        with pyro.plate("class", 2):
            x = pyro.sample("x", Prior(program, condition=CLASSES))
            pyro.sample("y", dist.Normal(x, NOISE).to_event(1))

    return seen


# --- p(x | c) -------------------------------------------------------------------------------------------------------


def of_class(program: Any, engine: Engine) -> Posterior:
    return infer(program, engine, args=(CLASSES,), num_draws=2000, num_chains=1)


def of_label(engine: Engine) -> Posterior:
    data = DataSets({"c": CLASSES})
    return infer(labelled(mixture(WEIGHTS)), engine, data=data, num_draws=2000, num_chains=1)


ROUTES: dict[str, Callable[[], Posterior]] = {
    "conditional VAE": lambda: of_class(conditional_vae(), Ancestral()),
    "conditional diffusion, by its flow": lambda: of_class(conditional_diffusion(), ProbabilityFlowODE()),
    "conditional diffusion, by its SDE": lambda: of_class(conditional_diffusion(), ReverseSDE(steps=200)),
    "label, by the flow": lambda: of_label(GuidedODE(steps=50)),
    "label, by the SDE": lambda: of_label(GuidedSDE(steps=100)),
}


def worst_z(x: Tensor, means: Tensor, covariance: Tensor) -> float:
    """Draws `(n, 2 classes, 2)` against the law of each class; NaN is infinite."""
    sd = covariance.diagonal().sqrt()
    z = torch.cat([part for c in CLASSES for part in (mean_z(x[:, c], means[c]), sd_z(x[:, c], sd))])
    return float(z.abs().nan_to_num(math.inf).max())


@pytest.mark.parametrize("name", ROUTES)
def test_draws_of_each_class(name: str) -> None:
    posterior = ROUTES[name]()
    assert posterior["x"].shape == (1, 2000, 2, 2)
    assert worst_z(posterior.flat("x"), LOCS, COVARIANCE) < ALLOWED_Z


def test_a_mixed_up_label_is_noticed() -> None:
    x = ROUTES["label, by the flow"]().flat("x").flip(1)
    assert worst_z(x, LOCS, COVARIANCE) > 10 * ALLOWED_Z


def test_weighted_particles_know_the_class_and_how_likely_it_is() -> None:
    """Their evidence is p(c), to 0.1 nats or better."""
    data = DataSets({"c": CLASSES})
    engine = TwistedSMC(particles=128, steps=40)
    found = infer(labelled(mixture(WEIGHTS)), engine, data=data, num_draws=128, num_chains=16)
    by_run = found["x"].mean(1)
    z = (by_run.mean(0) - LOCS) / (by_run.std(0) / math.sqrt(16))
    assert float(z.abs().max()) < ALLOWED_Z
    assert found.evidence is not None
    assert float(found.evidence.standard_error.max()) < 0.1 / ALLOWED_Z
    gap = found.evidence.value - WEIGHTS.log()
    assert float((gap / found.evidence.standard_error).abs().max()) < ALLOWED_Z


# --- p(x | c, y) ----------------------------------------------------------------------------------------------------


def exact_given_both() -> tuple[Tensor, Tensor]:
    """Means of x given c and y, `(2, 2)`, and its covariance."""
    gain = torch.linalg.solve(COVARIANCE + NOISE**2 * torch.eye(2, dtype=DTYPE), COVARIANCE).mT
    return LOCS + (Y - LOCS) @ gain.mT, COVARIANCE - gain @ COVARIANCE


NOISE_SPACE = HMC(num_steps=3, num_warmup=40, space=NoiseSpace(steps=2))
BESIDE: dict[str, tuple[Callable[[], Any], Engine]] = {
    "conditional VAE, by its noise": (conditional_vae, NOISE_SPACE),
    "conditional diffusion, by its noise": (conditional_diffusion, NOISE_SPACE),
    "conditional diffusion, by split Gibbs": (conditional_diffusion, SplitGibbs(num_warmup=20)),
    "conditional diffusion, by particles": (conditional_diffusion, TwistedSMC(particles=128, steps=40)),
    "conditional diffusion, guided": (conditional_diffusion, GuidedODE(MomentMatching(), steps=50)),
    "label, by particles": (lambda: mixture(WEIGHTS), TwistedSMC(particles=128, steps=40)),
    "label, by split Gibbs": (lambda: mixture(WEIGHTS), SplitGibbs(num_warmup=40)),
    "label, by the noise": (lambda: mixture(WEIGHTS), NOISE_SPACE),
}


@pytest.mark.parametrize("name", BESIDE)
def test_draws_of_each_class_seen_with_noise(name: str) -> None:
    """The same question about y to all of them: errors of averages from 32 independent runs."""
    make, engine = BESIDE[name]
    settings: dict[str, Any] = {"num_draws": 30, "num_chains": 32}
    if name.startswith("label"):
        data: Any = DataSets({"c": CLASSES, "y": Y.expand(2, 2)})
        found = infer(labelled(make(), seen=True), engine, data=data, **settings)
    else:
        found = infer(conditioned(make()), engine, data={"y": Y.expand(2, 2)}, **settings)
    assert found["x"].shape == (32, 30, 2, 2)
    means, covariance = exact_given_both()
    squares = (found["x"] - means).square().mean(1) / covariance.diagonal()
    for by_run, exact in ((found["x"].mean(1), means), (squares, torch.ones(2, 2))):
        z = (by_run.mean(0) - exact) / (by_run.std(0) / math.sqrt(32))
        assert float(z.abs().max()) < ALLOWED_Z


# --- beyond p(x | c) ------------------------------------------------------------------------------------------------


def test_classifier_free_guidance_leads_from_the_class_further() -> None:
    """From one network: hardly extrapolated it is p(x | c), and the more it is the surer a classifier becomes."""

    def images() -> None:
        with pyro.plate("class", 2):
            pyro.sample("x", Prior(conditional_diffusion(), condition=CLASSES))

    prior = mixture(WEIGHTS)
    sure = []
    for scale in (1e-6, 1.0, 4.0):
        engine = GuidedODE(ClassifierFree(scale), steps=30)
        x = infer(images, engine, num_draws=1000, num_chains=1).flat("x")
        if scale < 1:
            assert worst_z(x, LOCS, COVARIANCE) < ALLOWED_Z
        sure.append([float(prior.responsibilities(x[:, c])[:, c].log().mean()) for c in CLASSES])
    assert all(a < b < c for a, b, c in zip(*sure, strict=True))
