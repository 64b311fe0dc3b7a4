"""Programs of posteriordb: their densities against ones written by hand, then chains against the references."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import pyro
import pytest
import torch
from pyro import poutine
from scipy import stats
from torch import Tensor

from mcmc_tools import Moments, max_r_hat, worst_z
from posteriordb import (
    PROGRAMS,
    REFERENCE_ESS,
    Case,
    Data,
    components,
    eight_schools_centered,
    load,
    load_centered,
    real,
)
from probgen import Posterior, infer
from probgen.core import Cost, Engine
from probgen.inference.ancestral import Ancestral
from probgen.inference.chees import ChEES
from probgen.inference.hmc import HMC
from probgen.inference.nuts import NUTS
from simulated_posteriors import RATES, SIMULATED, reference
from statistics_tools import ALLOWED_Z

Values = dict[str, Any]


# --- the densities that the Stan files state ----------------------------------------------------------------------


def log_eight_schools_noncentered(data: Data, v: Values) -> float:
    theta = v["mu"] + v["tau"] * v["theta_trans"]
    return (
        stats.norm(0, 5).logpdf(v["mu"])
        + stats.cauchy(0, 5).logpdf(v["tau"])
        + stats.norm().logpdf(v["theta_trans"]).sum()
        + stats.norm(theta, data["sigma"]).logpdf(data["y"]).sum()
    )


def log_eight_schools_centered(data: Data, v: Values) -> float:
    return (
        stats.norm(0, 5).logpdf(v["mu"])
        + stats.cauchy(0, 5).logpdf(v["tau"])
        + stats.norm(v["mu"], v["tau"]).logpdf(v["theta"]).sum()
        + stats.norm(v["theta"], data["sigma"]).logpdf(data["y"]).sum()
    )


def log_ark(data: Data, v: Values) -> float:
    y, order = np.array(data["y"]), data["K"]
    total = stats.norm(0, 10).logpdf([v["alpha"], *v["beta"]]).sum() + stats.cauchy(0, 2.5).logpdf(v["sigma"])
    for t in range(order, len(y)):
        mu = v["alpha"] + sum(v["beta"][k - 1] * y[t - k] for k in range(1, order + 1))
        total += stats.norm(mu, v["sigma"]).logpdf(y[t])
    return total


def log_low_dim_gauss_mix(data: Data, v: Values) -> float:
    prior = stats.norm(0, 2).logpdf([*v["mu"], *v["sigma"]]).sum() + stats.beta(5, 5).logpdf(v["theta"])
    first, second = (stats.norm(m, s).pdf(data["y"]) for m, s in zip(v["mu"], v["sigma"], strict=True))
    return prior + np.log(v["theta"] * first + (1 - v["theta"]) * second).sum()


def log_blr(data: Data, v: Values) -> float:
    prior = stats.norm(0, 10).logpdf([*v["beta"], v["sigma"]]).sum()
    return prior + stats.norm(np.array(data["X"]) @ v["beta"], v["sigma"]).logpdf(data["y"]).sum()


def log_kidscore_momiq(data: Data, v: Values) -> float:
    line = v["beta"][0] + v["beta"][1] * np.array(data["mom_iq"])
    return (
        stats.cauchy(0, 2.5).logpdf(v["sigma"]) + stats.norm(line, v["sigma"]).logpdf(data["kid_score"]).sum()
    )


def log_garch11(data: Data, v: Values) -> float:
    y, sigma, total = data["y"], data["sigma1"], 0.0
    for t, value in enumerate(y):
        if t:
            surprise = (y[t - 1] - v["mu"]) ** 2
            sigma = np.sqrt(v["alpha0"] + v["alpha1"] * surprise + v["beta1"] * sigma**2)
        total += stats.norm(v["mu"], sigma).logpdf(value)
    return total


class ByHand(NamedTuple):
    """What a program is compared with: its density by SciPy, made-up data, and values at random."""

    program: Callable[[Data], Case]
    log_density: Callable[[Data, Values], float]
    data: Callable[[np.random.Generator], Values]
    values: Callable[[np.random.Generator], Values]


def schools(rng: np.random.Generator) -> Values:
    return {"J": 8, "y": rng.normal(5, 10, 8).tolist(), "sigma": rng.uniform(8, 18, 8).tolist()}


BY_HAND = {
    "eight_schools_noncentered": ByHand(
        PROGRAMS["eight_schools-eight_schools_noncentered"],
        log_eight_schools_noncentered,
        schools,
        lambda rng: {"mu": rng.normal(4, 3), "tau": rng.gamma(2, 2), "theta_trans": rng.normal(size=8)},
    ),
    "eight_schools_centered": ByHand(
        eight_schools_centered,
        log_eight_schools_centered,
        schools,
        lambda rng: {"mu": rng.normal(4, 3), "tau": rng.gamma(2, 2), "theta": rng.normal(4, 3, 8)},
    ),
    "arK": ByHand(
        PROGRAMS["arK-arK"],
        log_ark,
        lambda rng: {"K": 5, "T": 30, "y": rng.normal(size=30).tolist()},
        lambda rng: {"alpha": rng.normal(), "beta": rng.normal(0, 0.3, 5), "sigma": rng.gamma(2)},
    ),
    "low_dim_gauss_mix": ByHand(
        PROGRAMS["low_dim_gauss_mix-low_dim_gauss_mix"],
        log_low_dim_gauss_mix,
        lambda rng: {"N": 40, "y": rng.normal(0, 3, 40).tolist()},
        lambda rng: {
            "mu": np.sort(rng.normal(0, 2, 2)),
            "sigma": rng.gamma(3, 0.5, 2),
            "theta": rng.beta(2, 3),
        },
    ),
    "blr": ByHand(
        PROGRAMS["sblrc-blr"],
        log_blr,
        lambda rng: {
            "N": 20,
            "D": 5,
            "X": rng.normal(0, 2, (20, 5)).tolist(),
            "y": rng.normal(size=20).tolist(),
        },
        lambda rng: {"beta": rng.normal(1, 1, 5), "sigma": rng.gamma(3)},
    ),
    "kidscore_momiq": ByHand(
        PROGRAMS["kidiq-kidscore_momiq"],
        log_kidscore_momiq,
        lambda rng: {
            "N": 20,
            "kid_score": rng.normal(87, 20, 20).tolist(),
            "mom_iq": rng.normal(100, 15, 20).tolist(),
        },
        lambda rng: {"beta": rng.normal([26, 0.6], [6, 0.06]), "sigma": rng.gamma(18)},
    ),
    "garch11": ByHand(
        PROGRAMS["garch-garch11"],
        log_garch11,
        lambda rng: {"T": 30, "y": rng.normal(5, 2, 30).tolist(), "sigma1": 0.5},
        lambda rng: {
            "mu": rng.normal(5, 0.3),
            "alpha0": rng.gamma(2),
            "alpha1": rng.uniform(0, 0.6),
            "beta1": rng.uniform(0, 0.4),
        },
    ),
}


def log_density_of_program(case: Case, values: Values) -> float:
    given = {name: real(value) for name, value in values.items()} | case.observed
    return float(poutine.trace(pyro.condition(case.program, given)).get_trace().log_prob_sum())


@pytest.mark.parametrize("name", BY_HAND)
def test_programs_have_the_density_of_their_stan_file(name: str) -> None:
    """log p(z, x) between 20 random points differs as by hand, to 1e-8: a constant is free, as in Stan."""
    by_hand, rng = BY_HAND[name], np.random.default_rng(0)
    data = by_hand.data(rng)
    case = by_hand.program(data)
    points = [by_hand.values(rng) for _ in range(20)]
    gaps = [log_density_of_program(case, v) - by_hand.log_density(data, v) for v in points]
    assert np.ptp(gaps) < 1e-8
    assert np.ptp([by_hand.log_density(data, v) for v in points]) > 1  # the points tell densities apart


def hidden_markov_values(u: np.ndarray) -> Values:
    theta = stats.logistic.cdf(u[:2])
    return {"theta1": [theta[0], 1 - theta[0]], "theta2": [theta[1], 1 - theta[1]], "mu": u[2:]}


# Values of the sites at u, and the logarithm of their Jacobian.
COORDINATES: dict[str, tuple[Callable[[np.ndarray], Values], Callable[[np.ndarray], float]]] = {
    "lotka-volterra": (lambda u: dict(zip([*RATES, "sigma"], np.exp(u), strict=True)), np.sum),
    "hidden-markov": (hidden_markov_values, lambda u: stats.logistic.logpdf(u[:2]).sum()),
}


@pytest.mark.parametrize("name", SIMULATED)
def test_simulated_posteriors_have_the_density_of_their_reference(name: str) -> None:
    """Differences of log p between 10 points agree to 0.01: two ODE solvers, sums by logarithms and by scaling."""
    simulated, rng = SIMULATED[name], np.random.default_rng(0)
    values, log_jacobian = COORDINATES[name]
    points = rng.normal(simulated.start, 0.2, (10, len(simulated.start)))
    case = simulated.case()
    by_hand = [simulated.log_density(u[None])[0] - log_jacobian(u) for u in points]
    gaps = [log_density_of_program(case, values(u)) - b for u, b in zip(points, by_hand, strict=True)]
    assert np.ptp(gaps) < 0.01
    assert np.ptp(by_hand) > 1


@pytest.mark.parametrize("name", SIMULATED)
def test_importance_sampling_is_efficient(name: str) -> None:
    """An effective sample size of a quarter of the draws: the proposal covers the posterior."""
    assert all(moments.ess > 25_000 for moments in reference(name).values())


def test_components_carry_stan_names() -> None:
    draws = {"mu": torch.zeros(2, 3), "beta": torch.arange(2.0).expand(2, 3, 2)}
    found = components(draws)
    assert list(found) == ["mu", "beta[1]", "beta[2]"]
    assert found["beta[2]"].shape == (2, 3)
    assert float(found["beta[2]"].mean()) == 1.0


# --- chains against references ------------------------------------------------------------------------------------


class Run(NamedTuple):
    """An engine, and how much is drawn by it."""

    engine: Engine
    num_chains: int
    num_draws: int


# Short steps, as the neck of eight schools wants them: no trajectory diverges.
# R-hat below 1.01 wants chains of some length; jitter keeps HMC out of step with the period of the posterior.
RUNS = {
    "HMC": Run(HMC(num_steps=16, jitter=0.5, target_accept=0.95), 32, 500),
    "ChEES": Run(ChEES(target_accept=0.95), 32, 500),
    "NUTS": Run(NUTS(target_accept=0.95), 32, 800),
}
# A gradient of 16 chains that solve an ODE costs what that of one costs, but 20 times what others cost: short warm-up
# and trajectories, and a metric that undoes the correlation of 0.95 between rates.
ODE_RUNS = {
    "HMC": Run(HMC(num_steps=5, num_warmup=150, metric="dense", target_accept=0.95), 16, 250),
    "ChEES": Run(ChEES(num_warmup=150, metric="dense", target_accept=0.95), 16, 250),
    "NUTS": Run(NUTS(num_warmup=150, metric="dense", target_accept=0.95, max_tree_depth=6), 16, 250),
}
SCHOOLS = "eight_schools-eight_schools_noncentered"
QUICK = {(SCHOOLS, "ChEES")}


def draw(case: Case, run: Run, init: Posterior | None = None) -> Posterior:
    return infer(
        case.program,
        run.engine,
        data=case.observed,
        num_draws=run.num_draws,
        num_chains=run.num_chains,
        seed=0,
        init=init,
    )


def check(posterior: Posterior, moments: dict[str, Moments]) -> None:
    """|z| <= 4.5 for every mean and sd, R-hat < 1.01, no divergences."""
    draws = components(posterior.draws)
    worst = worst_z(draws, moments)
    assert worst.size < ALLOWED_Z, worst
    assert max_r_hat({name: draws[name] for name in moments}) < 1.01
    assert int(posterior.stats["diverging"].sum()) == 0


@pytest.mark.parametrize(
    ("posterior", "engine"),
    [
        pytest.param(*pair, marks=[] if pair in QUICK else pytest.mark.slow)
        for pair in itertools.product(PROGRAMS, RUNS)
    ],
)
def test_engines_meet_the_references_of_posteriordb(posterior: str, engine: str) -> None:
    """Means off by 0.06 sd and sds off by 5 % would show (ESS of about 10,000 on either side)."""
    case, moments = load(posterior)
    check(draw(case, RUNS[engine]), moments)


@pytest.mark.slow
@pytest.mark.parametrize("engine", RUNS)
def test_engines_meet_importance_sampling_of_a_hidden_chain(engine: str) -> None:
    """The path of a hidden Markov chain is summed out by hand; means increase from near 0."""
    check(draw(SIMULATED["hidden-markov"].case(), RUNS[engine]), reference("hidden-markov"))


@pytest.mark.slow
@pytest.mark.parametrize("engine", ODE_RUNS)
def test_engines_meet_importance_sampling_of_an_ode(engine: str) -> None:
    """Chains begin at draws from the prior: elsewhere the ODE may be stiff, and one stiff chain slows all."""
    case, run = SIMULATED["lotka-volterra"].case(), ODE_RUNS[engine]
    prior = infer(case.program, Ancestral(), num_draws=run.num_chains, seed=1)
    check(draw(case, run, init=prior), reference("lotka-volterra"))


# At the usual acceptance; the funnel's neck wants steps without end.
CENTRED = {
    "HMC": Run(HMC(num_steps=8, num_warmup=150), 32, 100),
    "ChEES": Run(ChEES(num_warmup=150), 32, 100),
    "NUTS": Run(NUTS(num_warmup=150, max_tree_depth=6), 32, 100),
}


@pytest.mark.parametrize(
    "engine",
    ["HMC", pytest.param("ChEES", marks=pytest.mark.slow), pytest.param("NUTS", marks=pytest.mark.slow)],
)
def test_divergences_are_reported_on_centred_eight_schools(engine: str) -> None:
    posterior = draw(load_centered(), CENTRED[engine])
    assert int(posterior.stats["diverging"].sum()) > 0
    assert "diverged" in str(posterior)


def test_the_check_sees_a_wrong_posterior() -> None:
    """Made-up draws of the right law pass; an sd off by 20 %, a mean off by 0.2 sd, and one divergence fail."""
    moments = {"z": Moments(1.0, 2.0, REFERENCE_ESS)}
    z = 1 + 2 * torch.randn(4, 1000, dtype=torch.float64)

    def made_up(z: Tensor, divergences: int = 0) -> Posterior:
        diverging = torch.zeros(4, 1000, dtype=torch.bool)
        diverging[0, :divergences] = True
        return Posterior({"z": z}, "mcmc", "asymptotic", "made up", Cost(), stats={"diverging": diverging})

    check(made_up(z), moments)
    for wrong in (made_up(1 + 1.2 * (z - 1)), made_up(1 + 0.8 * (z - 1)), made_up(z + 0.4), made_up(z, 1)):
        with pytest.raises(AssertionError):
            check(wrong, moments)
