"""How right engines are that condition a fitted prior: errors against exact posteriors, and coverage of intervals.

    python -m benchmarks.calibration

Priors have a perfect denoiser, so that every error is the engine's. Keys:

- `ours/<engine>/coverage/<dim>`: share of truths in central 90 % intervals, over pairs (x, y) from the joint law of a
  mixture seen through a matrix, averaged over coordinates; 0.87 to 0.93 is asked of those that claim a posterior.
- `ours/<engine>/<testbed>/<dim>/<error>`: over a few y, from 4,000 draws, errors of the mean and the sd (the worst
  coordinate, in exact sds), of the weights of the prior's components (total variation) and of log p(y) (nats), as
  averages over y.

Network calls and seconds of everything are in the JSON line at the end; seconds are noisy where others compute.
"""

from __future__ import annotations

import argparse
import json
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from benchmarks.calibration_testbeds import TESTBEDS, Exact, Testbed
from benchmarks.timing import keep_freed_memory
from probgen import infer
from probgen.core import DataSets, Engine, Posterior, ProbgenError
from probgen.diagnostics import coverage, sbc, simulated_posteriors, tarp
from probgen.inference.guided_ode import GuidedODE
from probgen.inference.guided_sde import GuidedSDE
from probgen.inference.hmc import HMC
from probgen.inference.split_gibbs import SplitGibbs
from probgen.inference.twisted_smc import TwistedSMC
from probgen.priors.dps import DPS
from probgen.priors.moment_matching import MomentMatching

LEVELS = (0.5, 0.8, 0.9, 0.95)
CLAIM_A_POSTERIOR = ("TwistedSMC", "SplitGibbs", "HMC_noise")
COVERED = (0.87, 0.93)


@dataclass(frozen=True)
class Sizes:
    """How much of everything."""

    dims: tuple[int, ...] = (2, 16, 64)
    coverage_dims: tuple[int, ...] = (2, 16)
    num_sets: int = 1000
    chunk_size: int = 250
    num_chains: int = 4
    draws_of_chain: int = 25
    num_y: int = 5
    num_draws: int = 1000  # of each chain; none is thinned away here
    steps: int = 100
    particles: int = 256
    num_warmup: int = 200
    thin: int = 8


TINY = Sizes(
    dims=(2,),
    coverage_dims=(2,),
    num_sets=12,
    chunk_size=12,
    num_chains=2,
    draws_of_chain=3,
    num_y=1,
    num_draws=20,
    steps=5,
    particles=16,
    num_warmup=5,
    thin=1,
)

ENGINES: dict[str, Callable[[Sizes], Engine]] = {
    "DPS": lambda sizes: GuidedSDE(DPS(), steps=sizes.steps),
    "PiGDM": lambda sizes: GuidedSDE(steps=sizes.steps),
    "PiGDM_ODE": lambda sizes: GuidedODE(steps=sizes.steps),
    "MomentMatching": lambda sizes: GuidedSDE(MomentMatching(), steps=sizes.steps),
    "TwistedSMC": lambda sizes: TwistedSMC(particles=sizes.particles, steps=sizes.steps),
    "SplitGibbs": lambda sizes: SplitGibbs(num_warmup=sizes.num_warmup, thin=sizes.thin),
    "HMC_noise": lambda sizes: HMC(num_warmup=sizes.num_warmup, thin=sizes.thin, space="noise"),
}


@dataclass
class Results:
    """Everything measured, by key."""

    values: dict[str, float] = field(default_factory=dict)
    costs: dict[str, dict[str, float]] = field(default_factory=dict)
    verdicts: dict[str, dict[str, Any]] = field(default_factory=dict)
    skipped: dict[str, str] = field(default_factory=dict)

    def add(self, key: str, value: float) -> None:
        self.values[key] = value
        goal = ""
        if "/coverage/" in key and key.split("/")[1] in CLAIM_A_POSTERIOR:
            goal = "{:g} .. {:g}".format(*COVERED)
        print(f"{key:48}{goal:>14}{value:12.4g}", flush=True)


def main() -> None:
    options = arguments()
    torch.set_num_threads(1)
    keep_freed_memory()
    results = Results()
    for name in options.only:
        engine = ENGINES[name](options.sizes)
        for testbed in TESTBEDS:
            for dim in options.sizes.dims:
                attempt(of_errors, name, engine, testbed, dim, options.sizes, results)
        for dim in options.sizes.coverage_dims:
            attempt(of_coverage, name, engine, "mixture", dim, options.sizes, results)
    rest = {name: value for name, value in asdict(results).items() if name != "values"}
    print(json.dumps(results.values | rest))


def attempt(
    section: Callable[..., None], name: str, engine: Engine, testbed: str, dim: int, *rest: Any
) -> None:
    """Run a section; what an engine refuses is written down."""
    results: Results = rest[-1]
    started = time.process_time()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # collapsed weights show in the errors
            section(name, engine, testbed, dim, *rest)
    except ProbgenError as error:
        results.skipped[f"ours/{name}/{testbed}/{dim}"] = str(error)
    key = f"ours/{name}/{testbed}/{dim}/{section.__name__.removeprefix('of_')}"
    results.costs.setdefault(key, {})["cpu_seconds"] = time.process_time() - started


# --- errors against exact posteriors ------------------------------------------------------------------------------


def of_errors(name: str, engine: Engine, testbed: str, dim: int, sizes: Sizes, results: Results) -> None:
    """A few y side by side, and what is off."""
    bed = TESTBEDS[testbed](dim)
    y = bed.data(sizes.num_y, seed=1)
    posterior = infer(
        bed.program,
        replace(engine, thin=1) if hasattr(engine, "thin") else engine,  # type: ignore[type-var]
        data=DataSets({"y": y}),
        num_draws=sizes.num_draws,
        num_chains=sizes.num_chains,
        seed=0,
    )
    found = [dict(errors(bed, posterior, bed.posterior(row), i)) for i, row in enumerate(y)]
    for error in found[0]:
        value = sum(one[error] for one in found) / len(found)
        results.add(f"ours/{name}/{testbed}/{dim}/{error}", value)
    results.costs[f"ours/{name}/{testbed}/{dim}/errors"] = {
        "network_calls": posterior.cost.network_calls,
        "gradients": posterior.cost.gradients,
        "seconds": posterior.cost.seconds + posterior.cost.warmup_seconds,
    }


def errors(bed: Testbed, posterior: Posterior, exact: Exact, index: int) -> Iterator[tuple[str, float]]:
    """Of data set `index`."""
    x = posterior.flat("x")[:, index].double()
    yield "mean", worst((x.mean(0) - exact.mean) / exact.sd)
    yield "sd", worst(x.std(0) / exact.sd - 1)
    yield "weights", float((bed.prior.responsibilities(x).mean(0) - exact.weights).abs().sum() / 2)
    if posterior.evidence is not None:
        yield "log_evidence", abs(float(posterior.evidence.value[index]) - exact.log_evidence)


def worst(values: Tensor) -> float:
    return float(values.abs().max())


# --- coverage -----------------------------------------------------------------------------------------------------


def of_coverage(name: str, engine: Engine, testbed: str, dim: int, sizes: Sizes, results: Results) -> None:
    """Pairs from the joint law, and how many truths lie inside."""
    posteriors = simulated_posteriors(
        TESTBEDS[testbed](dim).program,
        engine,
        observed="y",
        num_sets=sizes.num_sets,
        num_draws=sizes.draws_of_chain,
        num_chains=sizes.num_chains,
        chunk_size=sizes.chunk_size,
    )
    found = coverage(posteriors, LEVELS)
    results.add(f"ours/{name}/coverage/{dim}", float(found.average[LEVELS.index(0.9)]))
    results.verdicts[f"ours/{name}/coverage/{dim}"] = {
        "levels": LEVELS,
        "central": found.average.tolist(),
        "joint": found.joint.tolist(),
        "sbc_p": sbc(posteriors).p_value,
        "tarp_p": tarp(posteriors).p_value,
        "autocorrelation": posteriors.autocorrelation,
        "network_calls": posteriors.cost.network_calls,
    }


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=ENGINES, default=list(ENGINES), help="these engines")
    parser.add_argument("--tiny", dest="sizes", action="store_const", const=TINY, default=Sizes())
    return parser.parse_args()


if __name__ == "__main__":
    main()
