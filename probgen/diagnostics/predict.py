"""What data does this program, or this posterior, expect?"""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import pyro
import pyro.distributions as dist
from torch import Tensor

from probgen.core import (
    Cost,
    Count,
    InputError,
    NonNegativeInt,
    Posterior,
    Program,
    Site,
    check_arguments,
    describe,
    shown,
)
from probgen.replay import predictions, require_target, simulations
from probgen.targets import read, site_dims


def predict(
    source: Any, *, num_draws: Count | None = None, args: tuple[Any, ...] = (), seed: NonNegativeInt = 0
) -> Posterior:
    """Draw data from a program, or from a posterior.

    A program gives (z, x) ~ p(z) p(x | z), every site of it: the prior predictive. A posterior gives
    x_new ~ p(x | z) with z its draws, every observed site of it: the posterior predictive.

    Args:
        source: a program, or a `Posterior` that knows its target.
        num_draws: how many; for a posterior per chain, evenly spaced among its draws, None means all of them.
        args: arguments of the program; for a posterior other inputs than those it was drawn with.
        seed: the same call gives the same draws; the global random stream is left as it was.

    Returns a `Posterior` of the predicted sites, `(chain, draw, *batch, *event)`.
    Raises `InputError` for a program without num_draws, for a posterior to which nothing was observed or which does
    not know its program, and for arguments that do not fit.

    >>> def model():
    ...     z = pyro.sample("z", dist.Normal(0.0, 1.0))
    ...     pyro.sample("y", dist.Normal(z, 1.0))
    >>> predict(model, num_draws=100)["y"].shape
    torch.Size([1, 100])
    """
    check_arguments(predict, locals())
    if isinstance(source, Posterior):
        return _from_posterior(source, num_draws, args, seed)
    if not isinstance(source, Program) and not callable(source):
        raise InputError(f"source must be a posterior or a program, got {shown(source)}.")
    if num_draws is None:
        raise InputError(f"How many draws of {describe(source)}? Pass num_draws=, e.g. 500.")
    return _from_program(source, num_draws, args, seed)


def example() -> Posterior:
    """Data expected by z ~ N(1, 2^2), y ~ N(z, 1): y has mean 1 and variance 5."""

    def model() -> None:
        z = pyro.sample("z", dist.Normal(1.0, 2.0))
        pyro.sample("y", dist.Normal(z, 1.0))

    return predict(model, num_draws=2000)


def _from_posterior(
    posterior: Posterior, num_draws: int | None, args: tuple[Any, ...], seed: int
) -> Posterior:
    started = time.perf_counter()
    draws = predictions(posterior, args=args, num_draws=num_draws, seed=seed)
    cost = Cost(seconds=time.perf_counter() - started)
    engine = f"predict from {posterior.engine}"
    sites = require_target(posterior).sites
    return Posterior(draws, posterior.kind, posterior.guarantee, engine, cost, dims=_dims(sites, draws))


def _from_program(program: Any, num_draws: int, args: tuple[Any, ...], seed: int) -> Posterior:
    started = time.perf_counter()
    target = read(program, None, args)
    sites = target.sites
    if target.per_row and not args:
        sites = {name: _one_row(site) for name, site in sites.items()}
    draws = {
        name: value.reshape(1, num_draws, *sites[name].batch_shape, *sites[name].event_shape)
        for name, value in simulations(target, num_draws=num_draws, seed=seed).items()
    }
    cost = Cost(seconds=time.perf_counter() - started)
    engine = f"predict from {describe(program)}"
    return Posterior(draws, "iid", "exact", engine, cost, dims=_dims(sites, draws), target=target)


def _one_row(site: Site) -> Site:
    """A site of a program that simulates one row a draw, without the plate of that one row."""
    return replace(site, batch_shape=(), plates=()) if site.batch_shape == (1,) else site


def _dims(sites: Mapping[str, Site], draws: Mapping[str, Tensor]) -> dict[str, tuple[str, ...]]:
    return {name: site_dims(sites[name]) for name in draws}
