"""Tests of calibration, tested: exact posteriors pass, those made wrong on purpose fail where they can be seen to."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import Tensor

from probgen.core import Cost, Engine, InputError, Posterior, Target
from probgen.diagnostics.calibration import SimulatedPosteriors, pit, simulated_posteriors
from probgen.diagnostics.coverage import coverage
from probgen.diagnostics.sbc import sbc
from probgen.diagnostics.tarp import tarp
from probgen.diagnostics.uniformity import power, simultaneous_band, uniformity
from probgen.inference.guide import Guide
from probgen.models.conjugate_gaussian import ConjugateGaussian
from probgen.models.gaussian_mixture import GaussianMixture
from probgen.priors.prior import Prior
from probgen.randomness import forked_rng

WEIGHT = torch.tensor([[1.0, 1.0], [1.0, 1.2]], dtype=torch.float64)
NOISE = 0.5
NUM_SETS, NUM_DRAWS = 1000, 99
# The posterior of z ~ N(0, I), y ~ N(W z, NOISE^2 I): its entries correlate by -0.89.
COVARIANCE = torch.linalg.inv(torch.eye(2) + WEIGHT.mT @ WEIGHT / NOISE**2)
SD = COVARIANCE.diagonal().sqrt()
GAIN = COVARIANCE @ WEIGHT.mT / NOISE**2


def gaussian() -> None:
    z = pyro.sample("z", dist.Normal(torch.zeros(2, dtype=torch.float64), 1.0).to_event(1))
    pyro.sample("y", dist.Normal(z @ WEIGHT.mT, NOISE).to_event(1))


Law = Callable[[Tensor, Tensor], Tensor]

EXACT: Law = lambda mean, e: mean + e @ torch.linalg.cholesky(COVARIANCE).mT  # noqa: E731
WRONG: dict[str, Law] = {
    "20 % too wide": lambda mean, e: mean + 1.2 * (EXACT(mean, e) - mean),
    "20 % too narrow": lambda mean, e: mean + 0.8 * (EXACT(mean, e) - mean),
    "0.3 sd too high": lambda mean, e: EXACT(mean, e) + 0.3 * SD,
    "the prior": lambda mean, e: e,
    "correlation dropped": lambda mean, e: mean + SD * e,
}


def posteriors(law: Law, num_sets: int = NUM_SETS, seed: int = 0) -> SimulatedPosteriors:
    """Draws of a law of (exact mean `(set, 2)`, standard normals `(draw, set, 2)`)."""
    with forked_rng(seed):
        z = torch.randn(num_sets, 2, dtype=torch.float64)
        y = z @ WEIGHT.mT + NOISE * torch.randn_like(z)
        draws = law(y @ GAIN.mT, torch.randn(NUM_DRAWS, num_sets, 2, dtype=torch.float64))
    return SimulatedPosteriors({"z": z}, {"z": draws}, {"y": y}, "a law")


def log_likelihood(z: Any, y: Any) -> Tensor:
    return -(y["y"] - z["z"] @ WEIGHT.mT).square().sum(-1) / (2 * NOISE**2)


# --- exact posteriors pass, wrong ones fail -----------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(3))
def test_exact_posteriors_pass(seed: int) -> None:
    exact = posteriors(EXACT, seed=seed)
    data_dependent = exact.data["y"] @ torch.linalg.inv(WEIGHT).mT
    assert sbc(exact).ok
    assert coverage(exact).ok
    assert tarp(exact).ok
    assert tarp(exact, data_dependent).ok
    assert sbc(exact.with_quantity("log p(y | z)", log_likelihood)).ok


SEEN_BY_RANKS = ("20 % too wide", "20 % too narrow", "0.3 sd too high")


@pytest.mark.parametrize("name", WRONG)
def test_ranks_see_wrong_entries_alone(name: str) -> None:
    """p < 1e-6 for what is wrong with an entry by itself; a dropped correlation and the prior pass."""
    found = sbc(posteriors(WRONG[name]))
    assert found.p_value < 1e-6 if name in SEEN_BY_RANKS else found.ok


@pytest.mark.parametrize("name", WRONG)
def test_joint_regions_see_a_dropped_correlation_too(name: str) -> None:
    """All but the prior: the blind spot of every test that does not look at the data."""
    wrong = posteriors(WRONG[name])
    assert coverage(wrong).ok == (name == "the prior")
    assert tarp(wrong).ok == (name == "the prior")


@pytest.mark.parametrize("name", WRONG)
def test_ranks_of_the_log_likelihood_see_everything(name: str) -> None:
    found = sbc(posteriors(WRONG[name]).with_quantity("log p(y | z)", log_likelihood).only(["log p(y | z)"]))
    assert found.p_value < 1e-6


def test_references_that_depend_on_data_see_the_prior() -> None:
    wrong = posteriors(WRONG["the prior"])
    assert tarp(wrong, wrong.data["y"] @ torch.linalg.inv(WEIGHT).mT).p_value < 1e-6


def test_few_data_sets_see_next_to_nothing_and_say_so() -> None:
    """Ten bins find an sd off by 20 % in a tenth of trials of 100; the verdict says how often."""
    found = [sbc(posteriors(WRONG["20 % too wide"], 100, seed)) for seed in range(20)]
    share = np.mean([one.tests["z[0]"].chi_square < 0.01 for one in found])
    assert share < 0.4
    text = " ".join(str(found[0]).split())
    assert re.search("100 data sets are few: .* in 9% of such trials .* 100% with 1,000", text)
    assert "are few" not in str(sbc(posteriors(EXACT)))


def test_power_is_what_is_found() -> None:
    """Ranks of draws that are 1.2 times too wide, 400 data sets, 300 trials: within 4.5 standard errors."""
    z = np.random.default_rng(0).normal(size=(300, 400))
    u = torch.special.ndtr(torch.as_tensor(z / 1.2)).numpy()
    share, expected = np.mean([uniformity(row).chi_square < 0.01 for row in u]), power(400)
    assert abs(share - expected) < 4.5 * math.sqrt(expected * (1 - expected) / 300)


# --- words, pictures, numbers -------------------------------------------------------------------------------------


def test_verdicts_say_what_is_wrong() -> None:
    wide = sbc(posteriors(WRONG["20 % too wide"]))
    assert "too wide, their sd about 1." in str(wide)
    assert "Do not believe these posteriors: 2 of 2 entries have ranks that are not uniform." in str(wide)
    assert "too high, by about 0.3" in str(sbc(posteriors(WRONG["0.3 sd too high"])))
    exact = posteriors(EXACT)
    assert "Nothing speaks against these posteriors." in str(sbc(exact))
    assert "cannot tell a posterior from the prior" in " ".join(str(sbc(exact)).split())
    assert "as many truths as they claim" in str(coverage(exact))
    narrow = str(coverage(posteriors(WRONG["20 % too narrow"])))
    assert re.search(
        r"central intervals of z\[0\] hold \d\d\.\d% \+- \d\.\d% of the truths: too narrow", narrow
    )
    assert "as wholes" in str(tarp(exact))
    for text in (str(wide), narrow, str(tarp(exact))):
        assert max(map(len, text.splitlines())) <= 115


def test_coverage_of_wide_intervals() -> None:
    """A central interval of draws 1.2 times too wide covers 2 Phi(1.2 q) - 1, within 4.5 standard errors."""
    found = coverage(posteriors(WRONG["20 % too wide"]), levels=(0.5, 0.9))
    normal = torch.distributions.Normal(0.0, 1.0)
    for i, level in enumerate(found.levels):
        expected = 2 * float(normal.cdf(1.2 * normal.icdf(torch.tensor(0.5 + level / 2)))) - 1
        for shares in (*found.central.values(), *found.highest.values()):
            assert abs(shares[i] - expected) < 4.5 * math.sqrt(expected * (1 - expected) / NUM_SETS)
    assert found.average.shape == (2,)


def test_highest_density_leaves_the_middle_out() -> None:
    """Two modes 6 sd apart, and truths between them: inside every central interval, in no region of high density."""
    with forked_rng(0):
        draws = 3.0 * torch.randint(0, 2, (99, 200)).mul(2).sub(1) + torch.randn(99, 200)
    found = coverage(SimulatedPosteriors({"z": torch.zeros(200)}, {"z": draws}, {}), levels=[0.9])
    assert found.central["z"] > 0.99
    assert found.highest["z"] < 0.05


def test_discrete_latents_share_their_ties() -> None:
    """z in {0, 1, 2}: ranks with ties broken at random are uniform; without, never."""
    with forked_rng(0):
        z, draws = torch.randint(0, 3, (1000,)), torch.randint(0, 3, (99, 1000))
    assert sbc(SimulatedPosteriors({"z": z}, {"z": draws}, {})).ok
    below = (draws < z).sum(0).double().numpy() / 100
    assert uniformity(below).p_value < 1e-10


def test_ranks_are_exactly_uniform_for_any_number_of_draws() -> None:
    for num_draws in (1, 7):
        z = np.random.default_rng(0).normal(size=(1 + num_draws, 5000))
        assert uniformity(pit(z[0], z[1:])).p_value > 0.001


def test_bands_hold_what_they_claim() -> None:
    """300 uniform samples of 200: 95 % of curves stay inside (4.5 standard errors); pointwise bands hold fewer."""
    band = simultaneous_band(200, num_points=50)
    u = np.random.default_rng(1).uniform(size=(300, 200))
    curves = (u[:, :, None] <= band.at).mean(1)
    inside = ((band.low <= curves) & (curves <= band.high)).all(1).mean()
    assert abs(inside - 0.95) < 4.5 * math.sqrt(0.05 * 0.95 / 300)
    width = 1.96 * np.sqrt(band.at * (1 - band.at) / 200)
    assert (np.abs(curves - band.at) <= width).all(1).mean() < 0.8


def test_false_alarms_are_budgeted() -> None:
    """alpha = 0.05 over 200 trials of uniform numbers: Bonferroni leaves no more than 5 %, and not next to nothing."""
    u = np.random.default_rng(2).uniform(size=(200, 500))
    share = np.mean([uniformity(row).p_value < 0.05 for row in u])
    assert 0.005 < share < 0.05 + 4.5 * math.sqrt(0.05 * 0.95 / 200)


def test_pictures_are_written(tmp_path: Path) -> None:
    few = posteriors(WRONG["20 % too wide"], 200)
    for i, found in enumerate((sbc(few), coverage(few), tarp(few))):
        assert found.plot(tmp_path / f"{i}.png").stat().st_size > 5000


# --- running engines ----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class ExactDraws(Engine):
    """Draws of the exact posterior of `gaussian`, one data set at a time; `copies` of each draw follow one another."""

    copies: int = 1
    kind: ClassVar[Any] = "mcmc"
    guarantee: ClassVar[Any] = "exact"
    conditions: ClassVar[bool] = True

    def run(self, target: Target, *, num_draws: int, num_chains: int, seed: int, **_: Any) -> Posterior:
        y = target.sets["y"] if target.num_sets else target.data["y"]
        shape = (num_chains, -(-num_draws // self.copies), *y.shape)
        draws = EXACT(y @ GAIN.mT, torch.randn(shape, dtype=torch.float64))
        draws = draws.repeat_interleave(self.copies, 1)[:, :num_draws]
        return Posterior({"z": draws}, "mcmc", "exact", str(self), Cost(network_calls=1), target=target)


@dataclass(frozen=True)
class ExactDrawsSideBySide(ExactDraws):
    """The same for many data sets at a time."""

    data_sets: ClassVar[bool] = True


def test_engines_of_one_data_set_and_of_many() -> None:
    one = simulated_posteriors(gaussian, ExactDraws(), observed="y", num_sets=50, num_draws=20, num_chains=2)
    many = simulated_posteriors(gaussian, ExactDrawsSideBySide(), observed=["y"], num_sets=1000)
    chunks = simulated_posteriors(
        gaussian, ExactDrawsSideBySide(), observed="y", num_sets=50, num_draws=20, chunk_size=20
    )
    assert one.draws["z"].shape == (40, 50, 2)
    assert (one.cost.network_calls, many.cost.network_calls, chunks.cost.network_calls) == (50, 1, 3)
    assert torch.equal(one.truth["z"], chunks.truth["z"])
    assert sbc(many).ok
    assert coverage(many).ok
    assert tarp(many).ok


def test_the_same_call_gives_the_same_and_leaves_the_stream() -> None:
    def call(seed: int) -> SimulatedPosteriors:
        return simulated_posteriors(gaussian, ExactDrawsSideBySide(), observed="y", num_sets=20, seed=seed)

    before = torch.random.get_rng_state()
    assert torch.equal(call(3).draws["z"], call(3).draws["z"])
    assert not torch.equal(call(3).draws["z"], call(4).draws["z"])
    assert torch.equal(before, torch.random.get_rng_state())


def test_draws_do_not_reuse_the_noise_of_the_truth() -> None:
    """An engine that draws from the prior by torch's own stream would otherwise return the truths themselves."""

    @dataclass(frozen=True)
    class PriorDraws(ExactDrawsSideBySide):
        def run(self, target: Target, *, num_draws: int, num_chains: int, seed: int, **_: Any) -> Posterior:
            draws = torch.randn(num_chains, num_draws, target.num_sets, 2, dtype=torch.float64)
            return Posterior({"z": draws}, "iid", "exact", "prior", Cost(), target=target)

    found = simulated_posteriors(gaussian, PriorDraws(), observed="y", num_sets=300, num_draws=20)
    assert sbc(found).ok
    assert float((found.truth["z"] - found.draws["z"]).abs().min()) > 0


def test_correlated_draws_are_told() -> None:
    def caveats(copies: int) -> str:
        engine = ExactDrawsSideBySide(copies)
        return str(sbc(simulated_posteriors(gaussian, engine, observed="y", num_sets=1000)))

    assert re.search(r"Neighbouring draws correlate by 0\.7.*thin more", " ".join(caveats(4).split()))
    assert "Neighbouring" not in caveats(1)


def test_programs_of_rows_and_guides() -> None:
    """probgen's own programs: the guide is the exact posterior."""
    found = simulated_posteriors(
        ConjugateGaussian.example(), Guide(), observed="x", num_sets=100, num_draws=20
    )
    assert found.draws["z"].shape == (20, 100, 1, 2)
    assert sbc(found).p_value > 0.001


def test_programs_with_a_prior_site() -> None:
    """A diffusion as the prior: truths by its flow, posteriors by the mixture's own closed form."""
    mixture = GaussianMixture.example()
    operator = torch.tensor([[1.0, 0.5]], dtype=torch.float64)

    def seen() -> None:
        x = pyro.sample("x", Prior(mixture))
        pyro.sample("y", dist.Normal(x @ operator.mT, 0.5).to_event(1))

    @dataclass(frozen=True)
    class Oracle(ExactDraws):
        def run(self, target: Target, *, num_draws: int, num_chains: int, seed: int, **_: Any) -> Posterior:
            exact = mixture.posterior(target.data["y"], operator, 0.5)
            k = dist.Categorical(exact.weights).sample((num_chains, num_draws))
            e = torch.randn(num_chains, num_draws, 2, 1, dtype=torch.float64)
            draws = exact.locs[k] + (exact.scale_trils[k] @ e)[..., 0]
            return Posterior({"x": draws}, "iid", "exact", "oracle", Cost(), target=target)

    found = simulated_posteriors(seen, Oracle(), observed="y", num_sets=200, num_draws=49)
    assert sbc(found).p_value > 1e-4
    assert tarp(found).p_value > 1e-4
    wrong = replace(found, draws={"x": found.draws["x"] + 0.5})
    assert sbc(wrong).p_value < 1e-4


# --- bad input ----------------------------------------------------------------------------------------------------


def observing_itself() -> None:
    z = pyro.sample("z", dist.Normal(0.0, 1.0))
    pyro.sample("y", dist.Normal(z, 1.0))
    pyro.sample("w", dist.Normal(z, 1.0), obs=torch.tensor(1.0))


@pytest.mark.parametrize(
    ("program", "observed", "message"),
    [
        (gaussian, "w", "no site 'w' to observe"),
        (gaussian, [], "Which sites shall the engine see"),
        (gaussian, ["y", "z"], "nothing is left to be inferred"),
        (observing_itself, "y", "observes 'w' by itself"),
    ],
)
def test_sites_that_cannot_be_simulated_are_named(program: Any, observed: Any, message: str) -> None:
    with pytest.raises(InputError, match=message):
        simulated_posteriors(program, ExactDraws(), observed=observed, num_sets=3)


def test_shapes_and_numbers_are_checked() -> None:
    z = torch.zeros(20)
    with pytest.raises(InputError, match="the same sites"):
        SimulatedPosteriors({"z": z}, {"w": torch.zeros(9, 20)}, {})
    with pytest.raises(InputError, match=r"need draws \(num_draws, 20\), got \(9, 10\)"):
        SimulatedPosteriors({"z": z}, {"z": torch.zeros(9, 10)}, {})
    lost = torch.zeros(9, 20)
    lost[3, 7] = math.nan
    with pytest.raises(InputError, match="NaN or Inf for 1 of 20 data sets, the first being 7"):
        SimulatedPosteriors({"z": z}, {"z": lost}, {})
    exact = posteriors(EXACT, 20)
    with pytest.raises(InputError, match="no site 'w'"):
        exact.only(["w"])
    with pytest.raises(InputError, match=r"levels\[0\] must lie"):
        coverage(exact, levels=[1.0])
    with pytest.raises(InputError, match="references must be"):
        tarp(exact, torch.zeros(3, 2))
    with pytest.raises(InputError, match="alpha must lie"):
        sbc(exact, alpha=2.0)
    with pytest.raises(InputError, match="at least 10 numbers"):
        sbc(posteriors(EXACT, 5))
