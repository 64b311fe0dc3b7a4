"""A small asymmetric program with a constrained parameter, and how kernels and engines are tried on it."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor

from mcmc_tools import Moments, Statistics, Uniformity, geweke_z, ranks, uniformity
from probgen import infer
from probgen.core import DataSets, Engine
from probgen.kernels import Coordinates, Kernel, Tuning
from probgen.randomness import forked_rng
from statistics_tools import Worst

# --- the program, and its density by hand -------------------------------------------------------------------------

NUM_DATA = 5
LOC_PRIOR = (1.0, 0.7)
SCALE_PRIOR = (5.0, 4.0)  # concentration and rate


def parameters() -> tuple[Tensor, Tensor]:
    """loc ~ N(1, 0.7^2), scale ~ Gamma(5, 4): a program by itself, whose moments are known."""
    return pyro.sample("loc", dist.Normal(*LOC_PRIOR)), pyro.sample("scale", dist.Gamma(*SCALE_PRIOR))


PARAMETER_MOMENTS = {"loc": Moments(1.0, 0.7), "scale": Moments(1.25, math.sqrt(5) / 4)}


def location_and_scale() -> None:
    """The parameters, and five y ~ N(loc, scale^2)."""
    loc, scale = parameters()
    with pyro.plate("datum", NUM_DATA):
        pyro.sample("y", dist.Normal(loc, scale))


class Simulated(NamedTuple):
    """Independent draws of the program: loc and scale `(n,)`, y `(n, NUM_DATA)`."""

    loc: Tensor
    scale: Tensor
    y: Tensor


def simulate(n: int) -> Simulated:
    """n draws of prior and data, from torch's global stream."""
    loc = dist.Normal(*LOC_PRIOR).sample((n,)).double()
    scale = dist.Gamma(*SCALE_PRIOR).sample((n,)).double()
    return Simulated(loc, scale, observe(loc, scale))


def observe(loc: Tensor, scale: Tensor) -> Tensor:
    """y | loc, scale, one data set for each."""
    return loc[:, None] + scale[:, None] * torch.randn(len(loc), NUM_DATA, dtype=loc.dtype)


def evaluate_by_hand(y: Tensor, u: Tensor) -> tuple[Tensor, Tensor]:
    """log p `(n,)` up to a constant and its gradient `(2, n)` at u = (loc, log scale) `(2, n)`, given y `(n, 5)`."""
    loc, log_scale = u
    scale, (prior_loc, prior_scale), (concentration, rate) = log_scale.exp(), LOC_PRIOR, SCALE_PRIOR
    from_prior, residual = (loc - prior_loc) / prior_scale, (y.mT - loc) / scale
    squares = residual.square().sum(0)
    # The Jacobian of scale = exp(log_scale) adds one power of the scale to Gamma's concentration - 1.
    power = concentration - NUM_DATA
    value = -0.5 * from_prior.square() + power * log_scale - rate * scale - 0.5 * squares
    grad = torch.stack([-from_prior / prior_scale + residual.sum(0) / scale, power - rate * scale + squares])
    return value, grad


# --- Geweke's test of a kernel ------------------------------------------------------------------------------------


class Joint(NamedTuple):
    """Chains of the kernel, and the data that each is conditioned on."""

    chains: Any
    y: Tensor


Evaluation = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]


class Simulator(NamedTuple):
    """The successive-conditional simulator: a kernel step on u | y, then y | u afresh.

    Args:
        kernel: moves the chains.
        tuning: its step size and trajectory length, the same for all chains.
        evaluate: the density, y `(n, 5)` and u `(2, n)`.
    """

    kernel: Kernel
    tuning: Tuning
    evaluate: Evaluation = evaluate_by_hand

    def begin(self, n: int) -> Joint:
        drawn = simulate(n)
        u = torch.stack([drawn.loc, drawn.scale.log()])
        return Joint(self.kernel.start(partial(self.evaluate, drawn.y), u, self._noise(n)), drawn.y)

    def step(self, joint: Joint) -> Joint:
        chains, y = joint
        evaluate = partial(self.evaluate, y)
        log_prob, grad = evaluate(chains.position)
        chains = chains._replace(log_prob=log_prob, grad=grad)
        chains, _ = self.kernel.step(evaluate, chains, self.tuning, self._noise(len(y)))
        loc, log_scale = chains.position
        return Joint(chains, observe(loc, log_scale.exp()))

    def _noise(self, n: int) -> Tensor:
        return torch.randn(self.kernel.normals(2), n, dtype=torch.float64)


def tuning(step_size: float, length: float = 1.0) -> Tuning:
    like = torch.tensor(step_size, dtype=torch.float64)
    return Tuning(like, Coordinates.identity(2, like), torch.tensor(length, dtype=torch.float64))


def statistics(joint: Joint) -> Statistics:
    """First and second moments of parameters and data, and how they go together."""
    loc, log_scale = joint.chains.position
    scale, mean, spread = log_scale.exp(), joint.y.mean(1), joint.y.std(1)
    return {
        "loc": loc,
        "loc^2": loc.square(),
        "log scale": log_scale,
        "scale": scale,
        "scale^2": scale.square(),
        "mean of y": mean,
        "mean of y^2": joint.y.square().mean(1),
        "loc times mean of y": loc * mean,
        "scale times spread of y": scale * spread,
        "loc times scale": loc * scale,
    }


def geweke(simulator: Simulator, num_chains: int = 4000, num_steps: int = 20) -> Worst:
    return geweke_z(simulator.begin, simulator.step, statistics, num_chains=num_chains, num_steps=num_steps)


# --- calibration of an engine -------------------------------------------------------------------------------------

NUM_CHAINS, DRAWS_OF_EACH = 3, 33  # some engines adapt from several chains
NUM_DRAWS = NUM_CHAINS * DRAWS_OF_EACH


@dataclass(frozen=True)
class Calibration:
    """Draws `(draw, set)` for data sets whose parameters are known, in coordinates that can be widened."""

    truth: dict[str, Tensor]
    draws: dict[str, Tensor]

    def uniformity(self) -> dict[str, Uniformity]:
        """p-values by parameter."""
        return {
            name: uniformity(ranks(self.truth[name], draws), NUM_DRAWS) for name, draws in self.draws.items()
        }

    def widened(self, factor: float) -> Calibration:
        """The same with the sd of each data set's draws off by a factor."""
        means = {name: draws.mean(0) for name, draws in self.draws.items()}
        wide = {name: means[name] + factor * (draws - means[name]) for name, draws in self.draws.items()}
        return Calibration(self.truth, wide)


def calibrate(engine: Engine, num_sets: int, seed: int) -> Calibration:
    """Three chains of the engine for each of `num_sets` data sets, all in one run."""
    with forked_rng(seed):
        truth = simulate(num_sets)
    data = DataSets({"y": truth.y.float()})
    posterior = infer(
        location_and_scale, engine, data=data, num_draws=DRAWS_OF_EACH, num_chains=NUM_CHAINS, seed=seed
    )
    return Calibration(
        {"loc": truth.loc, "log scale": truth.scale.log()},
        {"loc": posterior.flat("loc").double(), "log scale": posterior.flat("scale").double().log()},
    )


SLOPE_AT = torch.linspace(-0.5, 1.5, NUM_DATA)


def lines(num_sets: int) -> None:
    """For every data set a line and five y ~ N(loc + slope t, 1), two of them at a time: one posterior of all lines."""
    with pyro.plate("set", num_sets, dim=-2):
        loc, slope = pyro.sample("loc", dist.Normal(*LOC_PRIOR)), pyro.sample("slope", dist.Normal(0.0, 1.0))
        with pyro.plate("datum", NUM_DATA, subsample_size=2, dim=-1) as rows:
            pyro.sample("y", dist.Normal(loc + slope * SLOPE_AT[rows], 1.0))


def calibrate_on_minibatches(engine: Engine, num_sets: int, seed: int) -> Calibration:
    """The same for engines of minibatches, which take no data sets: each is a line of one posterior."""
    with forked_rng(seed):
        truth = {"loc": simulate(num_sets).loc, "slope": torch.randn(num_sets, dtype=torch.float64)}
        y = observe(truth["loc"], torch.ones(num_sets)) + truth["slope"][:, None] * SLOPE_AT
    posterior = infer(
        partial(lines, num_sets),
        engine,
        data={"y": y.float()},
        num_draws=DRAWS_OF_EACH,
        num_chains=NUM_CHAINS,
        seed=seed,
    )
    return Calibration(truth, {name: posterior.flat(name).double().squeeze(-1) for name in truth})


def smallest(found: dict[str, Uniformity]) -> float:
    return min(min(p_values) for p_values in found.values())
