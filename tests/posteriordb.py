"""Six posteriors of posteriordb as Pyro programs, each with the density its Stan file states, and their references.

Data and reference moments are no part of probgen: they are read from `posteriordb/references.json` in the folder
that PROBGEN_DATA names. Eight schools also stands here centred, where chains must report divergences.

Source: Magnusson, Torgander, Buerkner, Zhang, Carpenter & Vehtari (2024), arXiv 2407.04967.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.distributions import constraints
from torch import Tensor

from mcmc_tools import Moments

REFERENCE_ESS = 10_000  # 10 chains of 1,000 draws, thinned until they are nearly independent

Data = Mapping[str, Any]


class Case(NamedTuple):
    """A program and its observed sites."""

    program: Callable[[], None]
    observed: dict[str, Tensor]


def real(value: Any) -> Tensor:
    """A float64 tensor: posteriors as narrow as 0.001 are approached from far away."""
    return torch.tensor(value, dtype=torch.float64)


def flat(support: Any, *event_shape: int) -> Any:
    """Stan's parameter without a prior: density 1 on its support."""
    return dist.ImproperUniform(support, (), event_shape)


# --- programs -----------------------------------------------------------------------------------------------------


def eight_schools_noncentered(data: Data) -> Case:
    """Treatment effects theta_j = mu + tau theta_trans_j of eight schools, each measured with known error."""
    y, sigma = real(data["y"]), real(data["sigma"])

    def program() -> None:
        mu = pyro.sample("mu", dist.Normal(real(0.0), 5.0))
        tau = pyro.sample("tau", dist.HalfCauchy(real(5.0)))
        with pyro.plate("school", len(y)):
            theta_trans = pyro.sample("theta_trans", dist.Normal(real(0.0), 1.0))
            theta = pyro.deterministic("theta", mu + tau * theta_trans)
            pyro.sample("y", dist.Normal(theta, sigma))

    return Case(program, {"y": y})


def eight_schools_centered(data: Data) -> Case:
    """The same posterior with theta itself as latent: a funnel, whose neck no fixed step size enters."""
    y, sigma = real(data["y"]), real(data["sigma"])

    def program() -> None:
        mu = pyro.sample("mu", dist.Normal(real(0.0), 5.0))
        tau = pyro.sample("tau", dist.HalfCauchy(real(5.0)))
        with pyro.plate("school", len(y)):
            theta = pyro.sample("theta", dist.Normal(mu, tau))
            pyro.sample("y", dist.Normal(theta, sigma))

    return Case(program, {"y": y})


def ark(data: Data) -> Case:
    """Autoregression of order K, conditional on the first K values."""
    series, order = real(data["y"]), int(data["K"])
    lags = series.unfold(0, order, 1)[:-1].flip(-1)

    def program() -> None:
        alpha = pyro.sample("alpha", dist.Normal(real(0.0), 10.0))
        beta = pyro.sample("beta", dist.Normal(real(0.0), 10.0).expand([order]).to_event(1))
        sigma = pyro.sample("sigma", dist.HalfCauchy(real(2.5)))
        with pyro.plate("time", len(lags)):
            pyro.sample("y", dist.Normal(alpha + lags @ beta, sigma))

    return Case(program, {"y": series[order:]})


def low_dim_gauss_mix(data: Data) -> Case:
    """Two Gaussians in one dimension, told apart by the order of their means; theta is the weight of the first."""
    y = real(data["y"])

    def program() -> None:
        mu = pyro.sample("mu", flat(constraints.ordered_vector, 2))
        pyro.factor("mu_prior", dist.Normal(real(0.0), 2.0).log_prob(mu).sum(-1))
        sigma = pyro.sample("sigma", dist.HalfNormal(real(2.0)).expand([2]).to_event(1))
        theta = pyro.sample("theta", dist.Beta(real(5.0), 5.0))
        weights = dist.Categorical(torch.stack([theta, 1 - theta], -1))
        with pyro.plate("datum", len(y)):
            pyro.sample("y", dist.MixtureSameFamily(weights, dist.Normal(mu, sigma)))

    return Case(program, {"y": y})


def blr(data: Data) -> Case:
    """Linear regression with priors on coefficients and error."""
    inputs, y = real(data["X"]), real(data["y"])

    def program() -> None:
        beta = pyro.sample("beta", dist.Normal(real(0.0), 10.0).expand([inputs.shape[1]]).to_event(1))
        sigma = pyro.sample("sigma", dist.HalfNormal(real(10.0)))
        with pyro.plate("datum", len(y)):
            pyro.sample("y", dist.Normal(inputs @ beta, sigma))

    return Case(program, {"y": y})


def kidscore_momiq(data: Data) -> Case:
    """A child's test score against the mother's, with flat priors on the line."""
    score, mom_iq = real(data["kid_score"]), real(data["mom_iq"])

    def program() -> None:
        beta = pyro.sample("beta", flat(constraints.real_vector, 2))
        sigma = pyro.sample("sigma", dist.HalfCauchy(real(2.5)))
        with pyro.plate("child", len(score)):
            pyro.sample("kid_score", dist.Normal(beta[..., 0] + beta[..., 1] * mom_iq, sigma))

    return Case(program, {"kid_score": score})


def garch11(data: Data) -> Case:
    """Volatility that feeds on past surprises; flat on alpha1 + beta1 <= 1, so that a support depends on a draw."""
    y, first_sigma = real(data["y"]), real(data["sigma1"])

    def program() -> None:
        mu = pyro.sample("mu", flat(constraints.real))
        alpha0 = pyro.sample("alpha0", flat(constraints.positive))
        alpha1 = pyro.sample("alpha1", flat(constraints.unit_interval))
        beta1 = pyro.sample("beta1", flat(constraints.interval(real(0.0), 1 - alpha1)))
        sigmas = [first_sigma]
        for past in y[:-1]:
            sigmas.append((alpha0 + alpha1 * (past - mu).square() + beta1 * sigmas[-1].square()).sqrt())
        with pyro.plate("time", len(y)):
            pyro.sample("y", dist.Normal(mu, torch.stack(sigmas, -1)))

    return Case(program, {"y": y})


PROGRAMS: dict[str, Callable[[Data], Case]] = {
    "eight_schools-eight_schools_noncentered": eight_schools_noncentered,
    "arK-arK": ark,
    "low_dim_gauss_mix-low_dim_gauss_mix": low_dim_gauss_mix,
    "sblrc-blr": blr,
    "kidiq-kidscore_momiq": kidscore_momiq,
    "garch-garch11": garch11,
}


# --- data and references ------------------------------------------------------------------------------------------


def load(posterior: str) -> tuple[Case, dict[str, Moments]]:
    """The case on posteriordb's data and its reference moments; skips the test where PROBGEN_DATA names no folder."""
    entry = _references()[posterior]
    moments = {name: Moments(m["mean"], m["sd"], REFERENCE_ESS) for name, m in entry["reference"].items()}
    return PROGRAMS[posterior](entry["data"]), moments


def load_centered() -> Case:
    """Eight schools, centred, on posteriordb's data."""
    return eight_schools_centered(_references()["eight_schools-eight_schools_noncentered"]["data"])


def _references() -> dict[str, Any]:
    folder = os.environ.get("PROBGEN_DATA")
    if folder is None:
        pytest.skip("set PROBGEN_DATA to the folder that holds posteriordb/references.json")
    path = Path(folder) / "posteriordb" / "references.json"
    if not path.is_file():
        pytest.skip(f"{path} does not exist")
    return _read(path)


@cache
def _read(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text(encoding="utf-8"))


def components(sites: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Every scalar under Stan's name, `theta[1]` first: draws `(chain, draw)` of each entry of each site."""
    found: dict[str, Tensor] = {}
    for site, draws in sites.items():
        if draws.ndim == 2:
            found[site] = draws
        else:
            found |= {f"{site}[{i + 1}]": column for i, column in enumerate(draws.flatten(2).unbind(-1))}
    return found
