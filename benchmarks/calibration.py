"""How right engines are that condition a fitted prior: errors against exact posteriors, and coverage of intervals.

    python -m benchmarks.calibration
    python -m benchmarks.calibration --peers    # in an environment that holds azula beside probgen

Priors have a perfect denoiser, so that every error is the engine's. Keys begin with `ours/<engine>` or
`peer/<library>_<sampler>` and go on with

- `coverage/<dim>`: share of truths in central 90 % intervals, over pairs (x, y) from the joint law of a mixture seen
  through a matrix, averaged over coordinates; 0.87 to 0.93 is asked of those that claim a posterior.
- `<testbed>/<dim>/<error>`: over a few y, from 4,000 draws, errors of the mean and the sd (the worst coordinate, in
  exact sds), of the weights of the prior's components (total variation) and of log p(y) (nats, with its sign, and the
  standard error that the engine gives), as averages over y.

Network calls, ways back through the network and seconds of everything are in the JSON line at the end; calls are of all
rows at once, and seconds are noisy where others compute.
"""

from __future__ import annotations

import argparse
import json
import math
import time
import warnings
from collections.abc import Callable, Collection, Iterator
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.calibration_testbeds import TESTBEDS, Exact, Testbed
from benchmarks.timing import keep_freed_memory
from probgen import infer
from probgen.core import Cost, DataSets, Engine, Posterior, ProbgenError
from probgen.diagnostics import coverage, sbc, simulated_posteriors, tarp
from probgen.inference.guided_ode import GuidedODE
from probgen.inference.guided_sde import GuidedSDE
from probgen.inference.hmc import HMC
from probgen.inference.split_gibbs import SplitGibbs
from probgen.inference.twisted_smc import TwistedSMC
from probgen.priors.dps import DPS
from probgen.priors.moment_matching import MomentMatching
from probgen.priors.noise_space import NoiseSpace

LEVELS = (0.5, 0.8, 0.9, 0.95)
CLAIM_A_POSTERIOR = ("TwistedSMC", "SplitGibbs", "SplitGibbs_tempered", "HMC_noise")
COVERED = (0.87, 0.93)


@dataclass(frozen=True)
class Sizes:
    """How much of everything. Markov chains are many and short, others few: what a draw costs is in the first ones."""

    cases: tuple[tuple[str, int], ...] = (
        ("mixture", 4),
        ("sharp", 8),
        ("gaussian", 16),
        ("tanh", 16),
        ("mixture", 64),
    )
    coverage_dims: tuple[int, ...] = (2, 16)
    num_sets: int = 1000
    chunk_size: int = 250
    draws_of_set: int = 100
    num_y: int = 5
    draws_of_y: int = 4000
    markov_chains: tuple[int, int] = (4, 100)  # of a pair, of a y
    steps: int = 100
    particles: int = 256
    num_warmup: int = 60


SMALL = Sizes(cases=(("mixture", 4), ("sharp", 8)), coverage_dims=(2,), num_sets=250, num_y=2)
TINY = Sizes(
    cases=tuple((testbed, 2) for testbed in TESTBEDS),
    coverage_dims=(2,),
    num_sets=12,
    chunk_size=12,
    draws_of_set=6,
    num_y=1,
    draws_of_y=40,
    markov_chains=(2, 2),
    steps=5,
    particles=16,
    num_warmup=5,
)

Build = Callable[[Sizes, Testbed], Engine]
OURS: dict[str, Build] = {
    "DPS": lambda sizes, _: GuidedSDE(DPS(), steps=sizes.steps),
    "PiGDM": lambda sizes, _: GuidedSDE(steps=sizes.steps),
    "PiGDM_ODE": lambda sizes, _: GuidedODE(steps=sizes.steps),
    "MomentMatching": lambda sizes, _: GuidedSDE(MomentMatching(), steps=sizes.steps),
    "TwistedSMC": lambda sizes, _: TwistedSMC(particles=sizes.particles, steps=sizes.steps),
    "SplitGibbs": lambda sizes, _: SplitGibbs(num_warmup=2 * sizes.num_warmup, thin=8),
    "SplitGibbs_tempered": lambda sizes, _: SplitGibbs(
        num_warmup=2 * sizes.num_warmup, num_temperatures=10, thin=8
    ),
    "HMC_noise": lambda sizes, _: HMC(
        num_warmup=sizes.num_warmup,
        target_accept=0.8,
        metric="identity",  # which noise has under the prior
        space=NoiseSpace(steps=4),
        thin=3,
    ),
}
PEERS = ("azula_DPS", "azula_PiGDM", "azula_TMPD", "azula_MMPS", "azula_TDS")
PAIRS_SHARED_BY = {"azula_TDS": 5}  # it takes one y at a time: so much fewer pairs


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
    for key, build in contestants(options.only, options.peers, results):
        for testbed, dim in options.sizes.cases:
            attempt(of_errors, key, build, testbed, dim, options.sizes, results)
        for dim in options.sizes.coverage_dims:
            attempt(of_coverage, key, build, "mixture", dim, options.sizes, results)
    rest = {name: value for name, value in asdict(results).items() if name != "values"}
    print(json.dumps(results.values | rest))
    if options.plot:
        plot(results.values, options.plot)


def contestants(only: Collection[str], peers: bool, results: Results) -> Iterator[tuple[str, Build]]:
    """Ours, and others where they are asked for and there."""
    yield from ((f"ours/{name}", build) for name, build in OURS.items() if name in only)
    if not peers:
        results.skipped["peer"] = "run with --peers where azula is installed"
        return
    results.skipped["peer/deepinv"] = "it needs torchvision, which this project does without"
    try:
        from benchmarks.peers.calibration import Azula
    except ImportError as error:
        results.skipped["peer/azula"] = str(error)
        return
    for name in PEERS:
        if name in only:
            yield f"peer/{name}", partial(_azula, Azula, name.removeprefix("azula_"))


def _azula(make: Callable[..., Engine], name: str, sizes: Sizes, bed: Testbed) -> Engine:
    return make(name, bed, sizes.steps, sizes.particles)


def attempt(
    section: Callable[..., None],
    key: str,
    build: Build,
    testbed: str,
    dim: int,
    sizes: Sizes,
    results: Results,
) -> None:
    """Run a section; what an engine refuses is written down."""
    bed, started = TESTBEDS[testbed](dim), time.process_time()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # collapsed weights show in the errors
            section(key, build(sizes, bed), testbed, dim, sizes, results)
    except ProbgenError as error:
        results.skipped[f"{key}/{testbed}/{dim}"] = str(error)
        return
    cost = results.costs[f"{key}/{testbed}/{dim}/{section.__name__.removeprefix('of_')}"]
    cost["cpu_seconds"] = time.process_time() - started


def chains(engine: Engine, markov_chains: int, others: int) -> int:
    """How many of them make the draws."""
    return markov_chains if engine.kind == "mcmc" else others


def paid(cost: Cost) -> dict[str, float]:
    return {
        "network_calls": cost.network_calls,
        "gradients": cost.gradients + cost.warmup_gradients,
        "seconds": cost.seconds + cost.warmup_seconds + cost.compile_seconds,
    }


# --- errors against exact posteriors ------------------------------------------------------------------------------


def of_errors(key: str, engine: Engine, testbed: str, dim: int, sizes: Sizes, results: Results) -> None:
    """A few y side by side, and what is off."""
    bed = TESTBEDS[testbed](dim)
    y = bed.data(sizes.num_y, seed=1)
    num_chains = chains(engine, sizes.markov_chains[1], 4)
    posterior = infer(
        bed.program,
        engine,
        data=DataSets({"y": y}),
        num_draws=sizes.draws_of_y // num_chains,
        num_chains=num_chains,
        seed=0,
    )
    found = [dict(errors(bed, posterior, bed.posterior(row), i)) for i, row in enumerate(y)]
    for error in found[0]:
        value = sum(one[error] for one in found) / len(found)
        results.add(f"{key}/{testbed}/{dim}/{error}", value)
    results.costs[f"{key}/{testbed}/{dim}/errors"] = paid(posterior.cost)


def errors(bed: Testbed, posterior: Posterior, exact: Exact, index: int) -> Iterator[tuple[str, float]]:
    """Of data set `index`."""
    x = posterior.flat("x")[:, index].double()
    yield "mean", worst((x.mean(0) - exact.mean) / exact.sd)
    yield "sd", worst(x.std(0) / exact.sd - 1)
    yield "weights", float((bed.prior.responsibilities(x).mean(0) - exact.weights).abs().sum() / 2)
    if posterior.evidence is not None:
        yield "log_evidence", float(posterior.evidence.value[index]) - exact.log_evidence
        yield "log_evidence_se", float(posterior.evidence.standard_error[index])


def worst(values: Tensor) -> float:
    return float(values.abs().max())


# --- coverage -----------------------------------------------------------------------------------------------------


def of_coverage(key: str, engine: Engine, testbed: str, dim: int, sizes: Sizes, results: Results) -> None:
    """Pairs from the joint law, and how many truths lie inside."""
    num_chains = chains(engine, sizes.markov_chains[0], 1)
    posteriors = simulated_posteriors(
        TESTBEDS[testbed](dim).program,
        engine,
        observed="y",
        num_sets=sizes.num_sets // PAIRS_SHARED_BY.get(key.split("/")[1], 1),
        chunk_size=sizes.chunk_size,
        num_draws=sizes.draws_of_set // num_chains,
        num_chains=num_chains,
    )
    found = coverage(posteriors, LEVELS)
    results.add(f"{key}/coverage/{dim}", float(found.average[LEVELS.index(0.9)]))
    results.verdicts[f"{key}/coverage/{dim}"] = {
        "pairs": posteriors.num_sets,
        "levels": LEVELS,
        "central": found.average.tolist(),
        "joint": found.joint.tolist(),
        "sbc_p": sbc(posteriors).p_value,
        "tarp_p": tarp(posteriors).p_value,
        "autocorrelation": posteriors.autocorrelation,
    }
    results.costs[f"{key}/{testbed}/{dim}/coverage"] = paid(posteriors.cost)


# --- a picture -----------------------------------------------------------------------------------------------------


def plot(values: dict[str, float], path: Path) -> None:
    """Coverage, and errors of the mean and the sd, of everybody."""
    from matplotlib.figure import Figure

    names = list(dict.fromkeys("/".join(key.split("/")[:2]) for key in values))
    figure = Figure(figsize=(10, 1.2 + 0.3 * len(names)), layout="constrained")
    left, middle, right = figure.subplots(1, 3, sharey=True)
    left.axvspan(*COVERED, color="0.9")
    left.set(title="Coverage of 90 % intervals", yticks=range(len(names)), yticklabels=names)
    left.invert_yaxis()
    middle.set(title="Error, d = 4, noise 0.5", xscale="log", xlabel="posterior sds")
    right.set(title="Error, d = 8, noise 0.1", xscale="log", xlabel="posterior sds")
    for axes, first, second in (
        (left, "coverage/2", "coverage/16"),
        (middle, "mixture/4/mean", "mixture/4/sd"),
        (right, "sharp/8/mean", "sharp/8/sd"),
    ):
        for key, marker in ((first, "o"), (second, "s")):
            found = [values.get(f"{name}/{key}", math.nan) for name in names]
            axes.plot(found, range(len(names)), marker, label=key)
        axes.legend(fontsize="small")
        axes.grid(axis="y", color="0.9")
    figure.savefig(path)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    names = [*OURS, *PEERS]
    parser.add_argument(
        "--only", nargs="+", choices=names, default=names, metavar="NAME", help="these engines"
    )
    parser.add_argument("--peers", action="store_true", help="run the others too")
    parser.add_argument("--plot", type=Path, help="draw a picture of coverage and errors here")
    parser.add_argument("--quick", dest="sizes", action="store_const", const=SMALL, default=Sizes())
    parser.add_argument("--tiny", dest="sizes", action="store_const", const=TINY)
    return parser.parse_args()


if __name__ == "__main__":
    main()
