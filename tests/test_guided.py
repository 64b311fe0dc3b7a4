"""Engines that follow a guidance: the laws they draw from, what they say of themselves, and what they refuse.

Tolerances: 4.5 standard errors. From 4,096 draws of 8 independent coordinates that is an error of 0.025 of a mean
and 0.018 of a standard deviation, in standard deviations and for all coordinates together; for one, 0.07 and 0.05.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import Tensor, nn

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
from probgen import infer
from probgen.conditioning import Labels
from probgen.core import Batch, DataSets, InputError, NonFiniteWarning, ProbgenError, UnsupportedError
from probgen.denoising import DenoisingProgram
from probgen.inference.guided_ode import GuidedODE
from probgen.inference.guided_sde import GuidedSDE
from probgen.models.gaussian_mixture import GaussianMixture
from probgen.models.score_sde import ScoreSDE
from probgen.nets import UNet
from probgen.priors import guidance as guidance_module
from probgen.priors.classifier import ClassifierGuidance
from probgen.priors.classifier_free import ClassifierFree
from probgen.priors.conditioned import Conditioned, Covariance, Isotropic, Marginal
from probgen.priors.dps import DPS
from probgen.priors.engine import GuidedEngine, guided_steps
from probgen.priors.guidance import Denoised, Guidance, Guided, Jensen, PiGDM, denoised
from probgen.priors.moment_matching import MomentMatching, Tweedie, positive
from probgen.priors.noise_aware import NoiseAware
from probgen.priors.prior import Prior
from probgen.processes import OU, VE, VP, as_grid
from probgen.targets import read

ALLOWED_Z = 4.5
NUM_DRAWS = 4096
ONE_BY_ONE: list[Guidance] = [PiGDM(), MomentMatching(), Jensen(), DPS()]


def worst_z(x: Tensor, mean: Tensor | float, sd: Tensor | float) -> float:
    """The largest of all errors of means and standard deviations, in standard errors; NaN is infinite."""
    z = torch.cat((mean_z(x, mean), sd_z(x, sd))).abs()
    return float(z.nan_to_num(math.inf).max())


def gaussian_z(engine: GuidedEngine, num_draws: int = NUM_DRAWS) -> float:
    """How far an engine is from the posterior of `white_gaussian`, coordinate by coordinate and all together."""
    case = white_gaussian()
    x = infer(case.program, engine, data=case.data, num_draws=num_draws).flat("x")
    return max(worst_z(part, case.mean, case.sd) for part in (x, pooled(x)))


# --- the law ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class WrongSign(PiGDM):
    """A broken twin: away from what was observed."""

    def shift(self, guided: Guided, factor: float) -> Tensor:
        return -super().shift(guided, factor)


@dataclass(frozen=True)
class FirstOrder(PiGDM):
    """A twin whose steps do not look back."""

    @property
    def smooth(self) -> bool:
        return False


@dataclass(frozen=True)
class Unwhitened(PiGDM):
    """A broken twin: it forgets the spread of x_0 given x_t."""

    def covariance(self, conditioned: Conditioned, look: Denoised) -> Covariance:
        return Isotropic(0.0)


@pytest.mark.parametrize(
    "engine",
    [
        GuidedSDE(steps=100),
        GuidedODE(steps=50),
        GuidedODE(MomentMatching(), steps=40),
        GuidedODE(MomentMatching(max_rows=1), steps=40),
    ],
    ids=str,
)
def test_gaussian_posteriors_are_exact(engine: GuidedEngine) -> None:
    """x ~ N(0, I_8), y = 1, noise 0.5: mean 0.80, standard deviation 0.447."""
    assert gaussian_z(engine) < ALLOWED_Z


@pytest.mark.slow
@pytest.mark.parametrize("engine", [GuidedSDE(MomentMatching()), GuidedODE(MomentMatching())], ids=str)
def test_moment_matching_is_exact_by_default(engine: GuidedEngine) -> None:
    assert gaussian_z(engine) < ALLOWED_Z


@pytest.mark.parametrize("guidance", [WrongSign(), FirstOrder(), Unwhitened(), Jensen()], ids=str)
def test_broken_guidances_are_noticed(guidance: Guidance) -> None:
    assert gaussian_z(GuidedSDE(guidance, steps=50)) > ALLOWED_Z


@pytest.mark.parametrize("process", [VE(sigma_max=20.0), OU()], ids=lambda process: type(process).__name__)
def test_other_processes(process: Any) -> None:
    prior = gaussian_prior(2, process)

    def program() -> None:
        x = pyro.sample("x", Prior(prior))
        pyro.sample("y", dist.Normal(x, 0.5).to_event(1))

    data = {"y": torch.tensor([1.0, -1.0], dtype=DTYPE)}
    x = infer(program, GuidedODE(grid="logsnr"), data=data, num_draws=2000).flat("x")
    assert worst_z(x, 0.8 * data["y"], math.sqrt(0.2)) < ALLOWED_Z


def test_the_bias_of_dps_is_there_and_is_said(capsys: pytest.CaptureFixture[str]) -> None:
    """Its draws gather round y: mean 1.00 and standard deviation 0.19 for 0.80 and 0.45, at 100 steps as at 1,000."""
    case = white_gaussian()
    said = ""
    for steps in (100, 1000):
        posterior = infer(case.program, GuidedSDE(DPS(), steps=steps), data=case.data, num_draws=100)
        x, said = pooled(posterior.flat("x")), str(posterior)
        print(
            f"DPS, {steps} steps: mean {x.mean():.2f} for {case.mean:.2f}, sd {x.std():.2f} for {case.sd:.3f}"
        )
        assert mean_z(x, case.mean).abs() > ALLOWED_Z
        assert sd_z(x, case.sd).abs() > ALLOWED_Z
        assert (posterior.kind, posterior.guarantee) == ("approximate", "approximate")
    assert "DPS, 1000 steps: mean 1.00 for 0.80, sd 0.18 for 0.447" in capsys.readouterr().out
    assert "more draws do not mend" in said


def test_mixtures_are_approximated() -> None:
    """An asymmetric mixture in 4 dimensions, noise 0.5: errors of half a standard deviation at most; DPS has more."""
    found = {}
    for guidance in (PiGDM(), MomentMatching(), DPS()):
        cases = [mixture(4, 0.5, seed) for seed in (0, 2)]
        engine = GuidedSDE(guidance, steps=40)
        draws = [infer(case.program, engine, data=case.data, num_draws=500).flat("x") for case in cases]
        found[str(guidance)] = max(
            max(errors(x, case.posterior)) for x, case in zip(draws, cases, strict=True)
        )
    assert found["PiGDM"] < 1 / 2
    assert found["MomentMatching"] < 1 / 2
    assert found["DPS"] > 1


# --- one draw, many draws, many data sets ---------------------------------------------------------------------------


@dataclass(frozen=True)
class BatchNorm(DPS):
    """The slip that made a well-known DPS depend on its batch: one norm for all draws."""

    def seen(
        self, conditioned: Conditioned, x_0: Tensor, covariance: Covariance, z: Tensor | None
    ) -> Marginal:
        distance, grad = conditioned.distance(x_0)
        together = distance.square().sum().sqrt()
        return Marginal(-distance, -grad * (distance / together)[:, None])


def same_one_by_one(engine: GuidedEngine) -> bool:
    """Whether draws are what they are, however many are made, and however they are cut into batches."""
    case = mixture(4)
    draws = [
        infer(case.program, replace(engine, batch_size=size), data=case.data, num_draws=5, num_chains=2)["x"]
        for size in (None, 1, 2)
    ]
    first = infer(case.program, engine, data=case.data, num_draws=1, num_chains=2)["x"]
    return all(torch.allclose(x, draws[0], rtol=0, atol=1e-10) for x in draws) and torch.allclose(
        first, draws[0][:, :1], rtol=0, atol=1e-10
    )


@pytest.mark.parametrize("engine", [GuidedSDE, GuidedODE])
@pytest.mark.parametrize("guidance", ONE_BY_ONE, ids=str)
def test_draws_do_not_depend_on_the_batch(guidance: Guidance, engine: type[GuidedEngine]) -> None:
    assert same_one_by_one(engine(guidance, steps=12))


def test_a_norm_over_the_batch_is_noticed() -> None:
    assert not same_one_by_one(GuidedSDE(BatchNorm(), steps=12))


def test_data_sets_have_posteriors_of_their_own() -> None:
    """40 data sets side by side: z of the mean of each against its own exact posterior."""
    testbed = linear(2, 0.5, num_seen=2)
    testbed = testbed._replace(prior=gaussian_prior(2))
    _, y = testbed.pairs(40)
    posterior = infer(
        testbed.program, GuidedODE(steps=50), data=DataSets({"y": y}), num_draws=200, num_chains=2
    )
    assert posterior["x"].shape == (2, 200, 40, 2)
    assert posterior.dims["x"] == ("data_set", "x_dim_0")
    for i in range(40):
        exact = testbed.given(y[i]).posterior
        assert worst_z(posterior.flat("x")[:, i], exact.mean, exact.covariance.diagonal().sqrt()) < ALLOWED_Z


def plated(num_images: int, noise: float = 0.5) -> Callable[[], None]:
    prior = gaussian_prior(2)

    def program() -> None:
        with pyro.plate("images", num_images):
            x = pyro.sample("x", Prior(prior))
            pyro.deterministic("total", x.sum(-1))
            pyro.sample("y", dist.Normal(x, noise).to_event(1))

    return program


def test_priors_in_plates() -> None:
    """Three images, each seen with its own y; deterministic sites come along."""
    y = torch.tensor([[1.0, 0.0], [0.0, -1.0], [2.0, 2.0]], dtype=DTYPE)
    posterior = infer(plated(3), GuidedODE(), data={"y": y}, num_draws=1000)
    assert posterior["x"].shape == (1, 1000, 3, 2)
    assert posterior.dims["x"] == ("images", "x_dim_0")
    assert torch.allclose(posterior["total"], posterior["x"].sum(-1))
    assert worst_z(posterior.flat("x").flatten(1), 0.8 * y.flatten(), math.sqrt(0.2)) < ALLOWED_Z


def test_norms_are_those_of_one_image() -> None:
    """DPS in a plate steps down the distance of each image, not that of all."""
    y = torch.tensor([[3.0, 4.0], [0.0, 2.0]], dtype=DTYPE)
    conditioned = Conditioned(read(plated(2), {"y": y}))
    distance, grad = conditioned.distance(torch.zeros(1, 2, 2, dtype=DTYPE))
    assert torch.allclose(distance, torch.tensor([7.0], dtype=DTYPE))
    assert torch.allclose(grad[0], -y / y.norm(dim=1, keepdim=True))
    at_the_goal = conditioned.distance(y[None])
    assert all(bool(value.eq(0).all()) for value in at_the_goal)  # not NaN


def test_masked_observations_count_for_nothing() -> None:
    """A pixel behind a mask, and one that is not there at all, give the same draws."""
    prior = GaussianMixture.example(3)
    seen: Any = torch.tensor([True, False, True])

    def masked() -> None:
        x = pyro.sample("x", Prior(prior))
        with pyro.plate("pixels", 3), pyro.poutine.mask(mask=seen):
            pyro.sample("y", dist.Normal(x, 0.3))

    def missing() -> None:
        x = pyro.sample("x", Prior(prior))
        pyro.sample("y", dist.Normal(x[..., seen], 0.3).to_event(1))

    y = torch.tensor([0.3, 9.0, -0.2], dtype=DTYPE)
    for guidance in ONE_BY_ONE:
        engine = GuidedSDE(guidance, steps=20)
        first = infer(masked, engine, data={"y": y}, num_draws=3)["x"]
        assert torch.allclose(first, infer(missing, engine, data={"y": y[seen]}, num_draws=3)["x"], atol=1e-8)


def test_images_in_single_precision() -> None:
    """A small network of images, half of one seen: shapes, dtypes, and the network outside of vmap."""
    prior = ScoreSDE(UNet((1, 8, 8), widths=(8, 8)), VP(), prediction="v")

    def program() -> None:
        x = pyro.sample("x", Prior(prior))
        pyro.sample("y", dist.Normal(x[..., :4, :], 0.1).to_event(3))

    data = DataSets({"y": torch.zeros(2, 1, 4, 8)})
    for guidance in ONE_BY_ONE:
        posterior = infer(program, GuidedODE(guidance, steps=3), data=data, num_draws=2)
        assert posterior["x"].shape == (1, 2, 2, 1, 8, 8)
        assert posterior["x"].dtype == torch.float32
        assert torch.isfinite(posterior["x"]).all()


# --- labels -------------------------------------------------------------------------------------------------------


def exact_classifier(prior: GaussianMixture) -> Callable[[Tensor, Tensor], Tensor]:
    """log p(component | x_t, t), which is known."""
    return lambda x, t: prior.responsibilities(x, t).log()


def labelled(prior: GaussianMixture, noise: float | None = None) -> Callable[[], None]:
    classifier = exact_classifier(prior)

    def program() -> None:
        x = pyro.sample("x", Prior(prior))
        pyro.sample("label", NoiseAware(classifier, x))
        if noise is not None:
            pyro.sample("y", dist.Normal(x, noise).to_event(1))

    return program


def test_labels_through_an_exact_classifier() -> None:
    """x given its component is that component; scale 2 goes further, and is something else."""
    prior = GaussianMixture.example(2)
    data = {"label": torch.tensor(1)}
    sd = prior.covariances[1].diagonal().sqrt()
    x, same, further = (
        infer(labelled(prior), GuidedODE(guidance, steps=30), data=data, num_draws=500).flat("x")
        for guidance in (PiGDM(), ClassifierGuidance(), ClassifierGuidance(3.0))
    )
    assert torch.equal(x, same)
    assert worst_z(x, prior.locs[1], sd) < ALLOWED_Z < worst_z(further, prior.locs[1], sd)
    log_probs = [
        exact_classifier(prior)(draws, torch.zeros(1, dtype=DTYPE))[:, 1].mean() for draws in (x, further)
    ]
    assert log_probs[1] > log_probs[0]


def test_labels_beside_other_observations() -> None:
    """A Gaussian component seen with noise: conjugate.

    If label and y were taken to be independent given x_t, as they are given x_0, errors would be 0.4 here.
    """
    prior = GaussianMixture.example(2)
    y = prior.locs[1] + 0.3
    one = GaussianMixture(torch.ones(1, dtype=DTYPE), prior.locs[1:2], prior.covariances[1:2])
    exact = one.posterior(y, torch.eye(2, dtype=DTYPE), 0.5)
    engine = GuidedODE(ClassifierGuidance(guidance=MomentMatching()), steps=50)
    data = {"label": torch.tensor(1), "y": y}
    x = infer(labelled(prior, 0.5), engine, data=data, num_draws=1000).flat("x")
    assert max(errors(x, exact)) < 0.15


class ShiftedGaussian(DenoisingProgram):
    """p(x | c) = N(c, I) for c = 0, 1, 2, and N(0, I) where c is missing: everything guided is Gaussian."""

    def __init__(self) -> None:
        super().__init__(_ShiftedNet(), VP(), "x0", event_shape=(2,), condition=Labels(3))

    def model(self, batch: Batch) -> Tensor:
        assert batch.condition is not None
        with batch.plate():
            return pyro.sample("x", dist.Normal(batch.condition[:, None].expand(-1, 2), 1.0).to_event(1))


class _ShiftedNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.locs = nn.Parameter(torch.arange(3, dtype=DTYPE))

    def forward(self, x: Tensor, t: Tensor, c: Tensor) -> Tensor:
        loc = torch.where(c < 0, 0.0, self.locs[c])[:, None]
        alpha = VP().alpha(t)[:, None]
        return loc + alpha * (x - alpha * loc)


def test_classifier_free_guidance_goes_beyond_the_condition() -> None:
    """Here its field is the score of N((1 + w) c, I), so that there is something to compare with."""
    program = ShiftedGaussian()
    prior = Prior(program, condition=torch.tensor([1, 2]))

    def images() -> None:
        with pyro.plate("images", 2):
            pyro.sample("x", prior)

    for guidance, factor in ((PiGDM(), 1.0), (ClassifierFree(0.5), 1.5)):
        posterior = infer(images, GuidedODE(guidance, steps=50), num_draws=1000)
        assert posterior["x"].shape == (1, 1000, 2, 2)
        mean = factor * torch.tensor([1.0, 1.0, 2.0, 2.0], dtype=DTYPE)
        assert worst_z(posterior.flat("x").flatten(1), mean, 1.0) < ALLOWED_Z
        assert posterior.cost.network_calls == (50 if factor == 1.0 else 100)


def test_classifier_free_guidance_beside_observations() -> None:
    """N(3, I) seen as 1 with noise 0.5: mean (3 + 4) / 5, standard deviation 0.447."""
    prior = Prior(ShiftedGaussian(), condition=torch.tensor([2])[0:1])

    def seen() -> None:
        with pyro.plate("images", 1):
            x = pyro.sample("x", prior)
            pyro.sample("y", dist.Normal(x, 0.5).to_event(1))

    data = {"y": torch.ones(1, 2, dtype=DTYPE)}
    x = infer(seen, GuidedODE(ClassifierFree(0.5)), data=data, num_draws=2000).flat("x").flatten(1)
    assert worst_z(x, 1.4, math.sqrt(0.2)) < ALLOWED_Z


# --- the parts ----------------------------------------------------------------------------------------------------


def test_moment_matching_knows_the_covariance() -> None:
    """J C J' against Cov[x_0 | x_t] by numerical integration over x_0, to 1e-6; and its row sums."""
    case = mixture(2, 0.5, num_seen=2)
    conditioned = Conditioned(read(case.program, case.data))
    t, x_t = 0.4, torch.tensor([[0.3, -0.2]], dtype=DTYPE)
    look = denoised(conditioned, x_t, t)
    jacobian = torch.tensor([[1.0, 0.5], [0.0, 2.0]], dtype=DTYPE)
    exact = jacobian @ integrated_covariance(conditioned, look) @ jacobian.mT
    assert torch.allclose(Tweedie(look, 64).between(jacobian)[0], exact, atol=1e-6)
    sums = Tweedie(look, 1).between(jacobian)[0]
    assert torch.allclose(sums, exact.sum(1).clamp_min(0).diag(), atol=1e-6)


def integrated_covariance(conditioned: Conditioned, look: Denoised) -> Tensor:
    grid = torch.linspace(-6, 6, 1201, dtype=DTYPE)
    x_0 = torch.cartesian_prod(grid, grid)
    log_joint = conditioned.program.log_prob(x_0)
    log_joint = log_joint - 0.5 * ((look.x_t - look.alpha * x_0) / look.sigma).square().sum(1)
    centred = x_0 - look.x_0
    weights = log_joint.softmax(0)
    return (weights[:, None] * centred).mT @ centred


def test_negative_eigenvalues_are_cut_off() -> None:
    values = torch.tensor([[2.0, -1.0, 0.5], [3.0, 2.0, 1.0]], dtype=DTYPE)
    axes = torch.linalg.qr(torch.randn(2, 3, 3, dtype=DTYPE, generator=torch.Generator().manual_seed(0))).Q
    found = positive((axes * values[:, None]) @ axes.mT)
    assert torch.allclose(found, (axes * values.clamp_min(0)[:, None]) @ axes.mT)


@pytest.mark.parametrize("guidance", [PiGDM(), MomentMatching()], ids=str)
def test_linear_observations_take_a_short_cut_to_the_same(guidance: Guidance) -> None:
    case = mixture(4)
    conditioned = Conditioned(read(case.program, case.data))
    x_t = torch.randn(3, 4, dtype=DTYPE, generator=torch.Generator().manual_seed(0))
    quick = guidance(conditioned, x_t, 0.4)
    assert conditioned.linear is not None
    conditioned.linear = None
    slow = guidance(conditioned, x_t, 0.4)
    assert torch.allclose(quick.log_prob, slow.log_prob)
    assert torch.allclose(quick.grad, slow.grad)


def test_nonlinear_observations_and_counts() -> None:
    """Near the truth; every guidance but DPS takes counts."""
    prior = gaussian_prior(2)

    def program() -> None:
        x = pyro.sample("x", Prior(prior))
        pyro.sample("y", dist.Normal(x.sin(), 0.1).to_event(1))
        pyro.sample("count", dist.Poisson((2 * x).exp()).to_event(1))

    data = {"y": torch.tensor([0.5, -0.5], dtype=DTYPE), "count": torch.tensor([3.0, 0.0], dtype=DTYPE)}
    for guidance in (PiGDM(), MomentMatching(), Jensen()):
        x = infer(program, GuidedSDE(guidance, steps=50), data=data, num_draws=200).flat("x")
        assert (x.mean(0) - data["y"].asin()).abs().max() < 0.1
    with pytest.raises(UnsupportedError, match="other sites: 'count'. Guidances for any likelihood: Jensen"):
        infer(program, GuidedSDE(DPS()), data=data, num_draws=2)


class Careless(nn.Module):
    """The exact eps of N(0, I), and an error as of a network."""

    takes_one_time = True

    def __init__(self, dim: int) -> None:
        super().__init__()
        error = torch.randn(dim, dim, dtype=DTYPE, generator=torch.Generator().manual_seed(0))
        self.error = nn.Parameter(error / math.sqrt(dim))

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        return VP().sigma(t) * x + 0.2 * (x @ self.error).sin()


def careless_error(monkeypatch: pytest.MonkeyPatch, guidance: Guidance, *, careful: bool) -> float:
    """The largest error of a mean or standard deviation with such a network, NaN and failures infinite."""
    if not careful:
        monkeypatch.setattr(guidance_module, "not_beyond", lambda move, *_: torch.ones_like(move[:, 0]))
    prior = ScoreSDE(Careless(8), VP(), event_shape=(8,), prediction="eps")

    def program() -> None:
        x = pyro.sample("x", Prior(prior))
        pyro.sample("y", dist.Normal(x, 0.1).to_event(1))

    try:
        engine = GuidedSDE(guidance, steps=60)
        x = infer(program, engine, data={"y": torch.ones(8, dtype=DTYPE)}, num_draws=300).flat("x")
    except ProbgenError:
        return math.inf
    scale = 1 / math.sqrt(1.01)
    gaps = torch.cat(((x.mean(0) - scale**2) / (0.1 * scale), x.std(0) / (0.1 * scale) - 1))
    return float(gaps.abs().nan_to_num(math.inf).max())


def test_errors_of_a_network_are_kept_small(monkeypatch: pytest.MonkeyPatch) -> None:
    """At t = 1 they are multiplied by sigma^2/alpha^2 = 23,000; but no step goes beyond what was seen."""
    assert careless_error(monkeypatch, PiGDM(), careful=True) < 1 / 3
    assert careless_error(monkeypatch, MomentMatching(), careful=True) < 1 / 3
    assert careless_error(monkeypatch, MomentMatching(), careful=False) > 1000


@pytest.mark.parametrize("count", [0.0, 3.0, 20.0])
def test_counts_have_a_spread(count: float) -> None:
    """x ~ N(0, 1), count ~ Poisson(e^2x), against integration: evaluated at x_0hat alone, draws would be one point."""
    prior = gaussian_prior(1)

    def program() -> None:
        x = pyro.sample("x", Prior(prior))
        pyro.sample("count", dist.Poisson((2 * x).exp()).to_event(1))

    grid = torch.linspace(-6, 6, 2001, dtype=DTYPE)
    log_joint = dist.Poisson((2 * grid).exp()).log_prob(torch.tensor(count)) - 0.5 * grid.square()
    weights = log_joint.softmax(0)
    mean = weights @ grid
    sd = (weights @ (grid - mean).square()).sqrt()
    for engine in (GuidedSDE(steps=50), GuidedODE(steps=50)):
        x = infer(program, engine, data={"count": torch.tensor([count])}, num_draws=500).flat("x")
        assert (x.mean() - mean).abs() < 0.5 * sd
        assert 0.8 < x.std() / sd < 1.6


def test_curvature_leaves_the_density_as_it_is() -> None:
    """At any point log p and its gradient are those of the program, whatever the residual of counts."""
    prior = gaussian_prior(2)
    played: Any = torch.tensor([True, False])

    def program() -> None:
        x = pyro.sample("x", Prior(prior))
        with pyro.poutine.scale(scale=0.7):
            pyro.sample("count", dist.Poisson((2 * x).exp()).to_event(1))
        pyro.sample("coin", dist.Bernoulli(logits=x.sum(-1)))
        with pyro.plate("players", 2), pyro.poutine.mask(mask=played):
            pyro.sample("wins", dist.Binomial(5, logits=x))

    data = {"count": torch.tensor([3.0, 0.0]), "coin": torch.tensor(1.0), "wins": torch.tensor([5.0, 2.0])}
    conditioned = Conditioned(read(program, data))
    x = torch.randn(6, 2, dtype=DTYPE, generator=torch.Generator().manual_seed(0))
    found, exact = conditioned.marginal(x, Isotropic(0.0)), conditioned.log_lik(x)
    assert torch.allclose(found.log_prob, exact.log_prob)
    assert found.residual is not None
    assert found.jacobian is not None
    assert torch.allclose((found.residual[:, None] @ found.jacobian)[:, 0], exact.grad)


@pytest.mark.parametrize("num_steps", [1, 2, 3])
@pytest.mark.parametrize("guidance", [PiGDM(), DPS()], ids=str)
def test_few_steps(num_steps: int, guidance: Guidance) -> None:
    case = white_gaussian(2)
    posterior = infer(case.program, GuidedSDE(guidance, steps=num_steps), data=case.data, num_draws=3)
    assert torch.isfinite(posterior["x"]).all()
    assert posterior.cost.network_calls == posterior.cost.gradients == num_steps


def test_steps_of_first_order_are_those_of_the_bridge() -> None:
    """q(x_s | x_t, x_0), the step of every paper on guidance."""
    steps = guided_steps(VP(), as_grid("quadratic"), 6, stochasticity=1.0, order=1)
    t, s = (torch.tensor([step.t for step in part], dtype=DTYPE) for part in (steps[:-1], steps[1:]))
    on_x, on_x_0, variance = VP().bridge_coefficients(s, t)
    for i, step in enumerate(steps[:-1]):
        expected = (on_x[i], on_x_0[i], variance[i].sqrt())
        assert (step.on_x, step.on_x_0, step.scale) == pytest.approx([float(value) for value in expected])
        assert step.on_before == 0


def test_the_network_is_left_as_it_was() -> None:
    """Inside a run weights are frozen and layers in evaluation mode; afterwards as they were."""
    program = ShiftedGaussian().train()
    prior = Prior(program, condition=torch.tensor([1]))

    def seen() -> None:
        with pyro.plate("images", 1):
            x = pyro.sample("x", prior)
            pyro.sample("y", dist.Normal(x, 0.5).to_event(1))

    infer(seen, GuidedSDE(steps=3), data={"y": torch.ones(1, 2, dtype=DTYPE)}, num_draws=2)
    assert program.training
    assert all(weight.requires_grad and weight.grad is None for weight in program.parameters())


# --- refusals -----------------------------------------------------------------------------------------------------


def test_other_latents_are_refused_by_name() -> None:
    prior = gaussian_prior(2)

    def program() -> None:
        x = pyro.sample("x", Prior(prior))
        scale = pyro.sample("scale", dist.Gamma(2.0, 2.0))
        pyro.sample("y", dist.Normal(x, scale).to_event(1))

    with pytest.raises(
        UnsupportedError, match="'scale'. Engines that draw them beside a prior: TwistedSMC, SplitGibbs"
    ):
        infer(program, GuidedSDE(), data={"y": torch.ones(2, dtype=DTYPE)}, num_draws=2)


def test_programs_without_a_prior_are_refused() -> None:
    def program() -> None:
        x = pyro.sample("x", dist.Normal(0.0, 1.0))
        pyro.sample("y", dist.Normal(x, 1.0))

    with pytest.raises(InputError, match="Write it as"):
        infer(program, GuidedSDE(), data={"y": torch.tensor(1.0)}, num_draws=2)
    with pytest.raises(UnsupportedError, match="Prior\\(GaussianMixture\\)"):
        infer(GaussianMixture.example(), GuidedODE(), num_draws=2)


def test_a_mask_that_hides_everything_is_refused() -> None:
    prior = gaussian_prior(2)

    def program() -> None:
        x = pyro.sample("x", Prior(prior))
        with pyro.poutine.mask(mask=False):
            pyro.sample("y", dist.Normal(x, 0.5).to_event(1))

    with pytest.raises(InputError, match="Is everything masked"):
        infer(program, GuidedSDE(), data={"y": torch.ones(2, dtype=DTYPE)}, num_draws=2)


def test_no_noise_is_refused() -> None:
    prior = gaussian_prior(2)

    def program() -> None:
        x = pyro.sample("x", Prior(prior))
        pyro.sample("y", dist.Normal(x, 0.0).to_event(1))

    with pytest.raises(InputError, match="scale"):
        infer(program, GuidedSDE(), data={"y": torch.ones(2, dtype=DTYPE)}, num_draws=2)


def test_a_likelihood_that_is_nan_is_named() -> None:
    """The site, the time and the draws; where some survive they stand, and the others are NaN."""
    prior = gaussian_prior(1)

    def program(largest: float) -> None:
        x = pyro.sample("x", Prior(prior))
        pyro.sample("seen", dist.Normal((largest - x).sqrt(), 0.5, validate_args=False).to_event(1))

    data = {"seen": torch.ones(1, dtype=DTYPE)}
    found = r"the log density of site 'seen' turned NaN or infinite at t = [\d.]+, in draws \d+"
    with pytest.raises(ProbgenError, match=found):
        infer(program, GuidedSDE(steps=20), args=(-9.0,), data=data, num_draws=4)
    with pytest.warns(NonFiniteWarning, match=found):
        x = infer(program, GuidedSDE(steps=20), args=(0.6,), data=data, num_draws=50).flat("x")
    assert 0 < int(x.isnan().any(1).sum()) < 50


def test_guidances_say_what_they_miss() -> None:
    case = white_gaussian(2)
    with pytest.raises(InputError, match="NoiseAware\\(classifier, x\\)"):
        infer(case.program, GuidedSDE(ClassifierGuidance()), data=case.data, num_draws=2)
    with pytest.raises(InputError, match="condition=c"):
        infer(case.program, GuidedSDE(ClassifierFree()), data=case.data, num_draws=2)
    with pytest.raises(UnsupportedError, match="'label'"):
        infer(
            labelled(GaussianMixture.example(2)),
            GuidedSDE(DPS()),
            data={"label": torch.tensor(1)},
            num_draws=2,
        )


@pytest.mark.parametrize(
    "wrong",
    [
        lambda: DPS(zeta=0.0),
        lambda: PiGDM(prior_scale=-1.0),
        lambda: MomentMatching(max_rows=0),
        lambda: ClassifierGuidance(scale=math.inf),
        lambda: ClassifierFree(scale=math.nan),
        lambda: GuidedSDE(guidance="PiGDM"),  # type: ignore[arg-type]
        lambda: GuidedSDE(steps=0),
        lambda: GuidedODE(grid="fine"),
        lambda: GuidedODE(batch_size=0),
    ],
)
def test_wrong_settings(wrong: Callable[[], Any]) -> None:
    with pytest.raises(InputError):
        wrong()
