"""Programs around a prior that cannot be served: every engine says so, naming the site, what it got and the way out.

What one engine alone refuses is tested beside that engine.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import Tensor

from conditioned_tools import DTYPE, gaussian_prior
from probgen import DataSets, infer
from probgen.core import Engine, InputError, Posterior, ProbgenError, UnsupportedError
from probgen.inference.ancestral import Ancestral
from probgen.inference.chees import ChEES
from probgen.inference.guided_ode import GuidedODE
from probgen.inference.guided_sde import GuidedSDE
from probgen.inference.hmc import HMC
from probgen.inference.mala import MALA
from probgen.inference.nuts import NUTS
from probgen.inference.parallel_tempering import ParallelTempering
from probgen.inference.reverse_sde import ReverseSDE
from probgen.inference.split_gibbs import SplitGibbs
from probgen.inference.twisted_smc import TwistedSMC
from probgen.models.energy import Energy
from probgen.models.gaussian_mixture import GaussianMixture
from probgen.models.vae import VAE
from probgen.priors.noise_aware import NoiseAware
from probgen.priors.noise_space import NoiseSpace
from probgen.priors.prior import Prior

ENGINES: dict[str, Engine] = {
    "GuidedSDE": GuidedSDE(steps=6),
    "TwistedSMC": TwistedSMC(particles=64, steps=8),
    "SplitGibbs": SplitGibbs(num_steps=4, num_warmup=4),
    "HMC in noise space": HMC(num_steps=2, num_warmup=4, space=NoiseSpace(steps=1, method="euler")),
}
every_engine = pytest.mark.parametrize("engine", ENGINES.values(), ids=ENGINES)
PRIOR = gaussian_prior(2)
ONES = torch.ones(2, dtype=DTYPE)


def run(program: Callable[[], Any], engine: Engine, **data: Tensor) -> Posterior:
    return infer(program, engine, data=data, num_draws=4, num_chains=2)


def seen_by(likelihood: Callable[[Tensor], Any], prior: Any = PRIOR) -> Callable[[], None]:
    """x ~ prior, y seen by this law."""

    def program() -> None:
        x = pyro.sample("x", Prior(prior))
        pyro.sample("y", likelihood(x))

    return program


def noisy(x: Tensor) -> Any:
    return dist.Normal(x, 0.5).to_event(1)


# --- which site is the prior ----------------------------------------------------------------------------------------


def without_prior() -> None:
    x = pyro.sample("x", dist.Normal(torch.zeros(2, dtype=DTYPE), 1.0).to_event(1))
    pyro.sample("y", noisy(x))


def with_two() -> None:
    a, b = (pyro.sample(name, Prior(PRIOR)) for name in ("a", "b"))
    pyro.sample("y", noisy(a + b))


@every_engine
@pytest.mark.parametrize(
    ("program", "observed", "words"),
    [
        (without_prior, {"y": ONES}, r'has no latent site.*Write it as x = pyro.sample\("x", Prior\(program\)\)'),
        (with_two, {"y": ONES}, r"has 2 sites.*'a', 'b'.*with pyro.plate\(\"images\", n\)"),
        (seen_by(noisy), {"x": ONES, "y": ONES}, "Site 'x'.*was observed: nothing is left to infer"),
    ],
    ids=["none", "two", "observed"],
)  # fmt: skip
def test_there_is_one_prior_to_infer(
    engine: Engine, program: Callable[[], None], observed: dict[str, Tensor], words: str
) -> None:
    with pytest.raises(InputError, match=words):
        run(program, engine, **observed)


@pytest.mark.parametrize("engine", [GuidedODE(), TwistedSMC()], ids=["GuidedODE", "TwistedSMC"])
@pytest.mark.parametrize("prior", [VAE.mlp((2,), 2, (4,)), Energy(lambda x: x.square().sum(-1), (2,))])
def test_guided_engines_follow_a_diffusion(engine: Engine, prior: Any) -> None:
    with pytest.raises(UnsupportedError, match=rf"Site 'x' has the law Prior\({type(prior).__name__}\).*HMC"):
        run(seen_by(noisy, prior), engine, y=ONES.float())


@pytest.mark.parametrize("engine", [NUTS(), MALA(), ChEES(), ParallelTempering(HMC())], ids=str)
def test_bounds_are_no_density_to_accept_by(engine: Engine) -> None:
    """HMC is tested beside its noise space."""
    with pytest.raises(UnsupportedError, match=r"Site 'x'.*lower bound.*HMC\(space='noise'\)"):
        run(seen_by(noisy, VAE.mlp((2,), 2, (4,))), engine, y=ONES.float())


@pytest.mark.parametrize("engine", [Ancestral(), ReverseSDE()], ids=str)
def test_engines_that_do_not_condition_name_those_that_do(engine: Engine) -> None:
    with pytest.raises(UnsupportedError, match="GuidedSDE.*SplitGibbs, TwistedSMC"):
        run(seen_by(noisy), engine, y=ONES)


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: Prior(GaussianMixture), "needs a fitted program.*got GaussianMixture"),
        (lambda: Prior(without_prior), "a Pyro function|A Pyro function"),
        (lambda: Prior(PRIOR, condition=torch.tensor(1)), r"one row.*got shape \(\); one row is c\[None\]"),
        (lambda: Prior(PRIOR, condition=3), "condition must be a torch.Tensor.*got 3"),  # type: ignore[arg-type]
        (lambda: Prior(PRIOR, sampler=GuidedSDE), "sampler must be an Engine"),  # type: ignore[arg-type]
    ],
)
def test_what_is_no_prior(make: Callable[[], Prior], words: str) -> None:
    with pytest.raises(InputError, match=words):
        make()


# --- what was observed ----------------------------------------------------------------------------------------------


@every_engine
@pytest.mark.parametrize(
    ("data", "words"),
    [
        ({"y": torch.ones(3, dtype=DTYPE)}, r"Site 'y': expected shape \(2,\), got \(3,\)"),
        (DataSets({"y": torch.ones(5, 3, dtype=DTYPE)}), r"Site 'y': expected shape \(2,\), got \(3,\)"),
        ({"Y": ONES}, "no site 'Y'; known: 'x', 'y'"),
        ({"y": torch.tensor([1.0, torch.nan])}, r"Site 'y' holds 1 NaN.*index \(1,\)"),
        ({"y": [1.0, 2.0]}, "Site 'y': expected a torch.Tensor, got list"),
    ],
    ids=["shape", "shape of sets", "name", "NaN", "list"],
)
def test_observations_that_do_not_fit(engine: Engine, data: Any, words: str) -> None:
    with pytest.raises(InputError, match=words):
        infer(seen_by(noisy), engine, data=data, num_draws=2)


@every_engine
def test_counts_below_zero(engine: Engine) -> None:
    with pytest.raises(InputError, match="Site 'y': values -1..1 .* leave the support"):
        run(seen_by(lambda x: dist.Poisson(x.exp()).to_event(1)), engine, y=torch.tensor([-1.0, 1.0]))


@every_engine
def test_no_noise(engine: Engine) -> None:
    """Refused where the law is checked, and where it is not."""
    with pytest.raises(InputError, match=r"parameter scale.*GreaterThan\(lower_bound=0.0\).*after site 'x'"):
        run(seen_by(lambda x: dist.Normal(x, 0.0).to_event(1)), engine, y=ONES)
    unchecked = seen_by(lambda x: dist.Normal(x, 0.0, validate_args=False).to_event(1))
    with pytest.raises(ProbgenError, match="density of site 'y'.* not finite|density of site 'y' turned NaN"):
        run(unchecked, engine, y=ONES)


@every_engine
def test_a_likelihood_that_is_always_nan(engine: Engine) -> None:
    root_of_less_than_nothing = seen_by(
        lambda x: dist.Normal((-1 - x.square()).sqrt(), 0.5, validate_args=False).to_event(1)
    )
    with pytest.raises(ProbgenError, match="density of site 'y'.* not finite|density of site 'y' turned NaN"):
        run(root_of_less_than_nothing, engine, y=ONES)


@every_engine
def test_random_likelihoods(engine: Engine) -> None:
    with pytest.raises(InputError, match="random density.*Draw random numbers by pyro.sample"):
        run(seen_by(lambda x: dist.Normal(x + torch.randn_like(x), 0.5).to_event(1)), engine, y=ONES)


def pixels_behind(mask: Any) -> Callable[[], None]:
    def program() -> None:
        x = pyro.sample("x", Prior(PRIOR))
        with pyro.plate("pixels", 2), pyro.poutine.mask(mask=mask):
            pyro.sample("y", dist.Normal(x, 0.5))

    return program


@every_engine
def test_masks(engine: Engine) -> None:
    """One that hides everything is refused; one that hides nothing is none."""
    with pytest.raises(InputError, match="No observation depends on site 'x'.*'y'.*Is everything masked"):
        run(pixels_behind(torch.zeros(2, dtype=torch.bool)), engine, y=ONES)
    masked = run(pixels_behind(torch.ones(2, dtype=torch.bool)), engine, y=ONES)
    assert torch.allclose(masked["x"], run(seen_by(noisy), engine, y=ONES)["x"])


@every_engine
def test_observations_of_something_else(engine: Engine) -> None:
    with pytest.raises(InputError, match="No observation depends on site 'x'"):
        run(seen_by(lambda x: noisy(torch.zeros_like(x))), engine, y=ONES)


@pytest.mark.parametrize("engine", [GuidedSDE(), GuidedODE()], ids=str)
def test_guided_engines_ask_for_what_was_seen(engine: Engine) -> None:
    """A site that nobody observed is another latent."""
    with pytest.raises(UnsupportedError, match="other latents: 'y'.*SplitGibbs.*What was seen is observed"):
        run(seen_by(noisy), engine)


# --- labels ---------------------------------------------------------------------------------------------------------


def labelled(classifier: Callable[..., Tensor]) -> Callable[[], None]:
    def program() -> None:
        x = pyro.sample("x", Prior(PRIOR))
        pyro.sample("label", NoiseAware(classifier, x))

    return program


@every_engine
@pytest.mark.parametrize(
    ("classifier", "label", "words"),
    [
        (lambda x: x, 1, r"classifier \(x, t\) -> logits.*takes 1 positional argument.*Categorical"),
        (torch.nn.Linear(2, 2).double(), 1, r"classifier \(x, t\) -> logits.*Linear failed"),
        (lambda x, _: x.sum(), 1, r"expected logits of shape \(1, num_classes\) of the classifier, got \(\)"),
        (lambda x, _: x, 2, "Site 'label': values 2..2 .*leave the support"),
        (lambda x, _: x * torch.nan, 1, "density of site 'label'"),
    ],
    ids=["without t", "a network without t", "no logits", "no such class", "NaN"],
)
def test_classifiers(engine: Engine, classifier: Any, label: int, words: str) -> None:
    with pytest.raises(ProbgenError, match=words):
        run(labelled(classifier), engine, label=torch.tensor(label))
