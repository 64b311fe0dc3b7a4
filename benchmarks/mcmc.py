"""Markov chains: effective draws per second of ours over those of other libraries, on the same densities.

    python -m benchmarks.mcmc --peers

All samplers take turns in this process, one thread each, in rounds of their own seed; a key is the median over rounds.
Effective draws are ArviZ's bulk ESS, the least of all parameters, and the seconds those of drawing: warm-up and
compilation are reported apart.

- `banana/over_*`: HMC of the same step size and number of steps, 1,000 chains (Pyro's: one).
- `schools`, `logistic`, `gauss100`: ChEES with 256 chains over NUTS of one chain (`over_blackjax_256`: of 256).
- `schools4`, `logistic4`: NUTS with 4 chains over Pyro's with one; as Pyro runs chains one after another, four of them
  have the ESS per second of one. `_end_to_end` counts warm-up, as many transitions on either side, but no compilation.
- `network/over_bare`: seconds per gradient inside HMC on the energy of a U-Net over the bare gradient.
- `million`: 10^6 chains of 1,000 steps of ULA, in a process of its own with two threads.

`--peers` needs blackjax, numpyro and torchebm beside probgen.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import subprocess
import sys
import time
import warnings
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.mcmc_targets import PROBLEMS, Problem, Run, Sampler, Skipped
from benchmarks.timing import interleaved, keep_freed_memory, seconds_each
from probgen import UNet, infer
from probgen.core import Batch, Engine
from probgen.inference import HMC, NUTS, ULA, ChEES
from probgen.kernels.streaming import moments
from probgen.randomness import forked_rng

with warnings.catch_warnings():
    warnings.simplefilter("ignore", FutureWarning)  # announces its next generation
    import arviz

ROOT = Path(__file__).parent.parent
STEP_SIZE, NUM_STEPS = 0.1, 10  # of the banana; the network has as many steps
AT_LEAST = {
    "banana/over_pyro": 500,
    "banana/over_torchebm": 10,
    "banana/over_numpyro": 2,
    "banana/over_blackjax": 0.7,
    **{f"{name}/over_pyro": 200 for name in ("schools", "logistic", "gauss100")},
    **{f"{name}/over_blackjax": 1.5 for name in ("schools", "logistic", "gauss100")},
    **{f"{name}/over_blackjax_256": 1 for name in ("schools", "logistic", "gauss100")},
    **{f"{name}4/over_pyro": 10 for name in ("schools", "logistic")},
    **{f"{name}4/over_pyro_end_to_end": 5 for name in ("schools", "logistic")},
}
AT_MOST = {
    "banana/gradients_over_steps": 1.0,
    "network/over_bare": 1.1,
    "million/seconds": 120,
    "million/gigabytes": 2,
}


@dataclass(frozen=True)
class Sizes:
    """How much of everything."""

    rounds: int = 5
    compile: bool = True
    chains: int = 256
    warmup: int = 500
    draws: int = 500
    draws_of_four: int = 1000
    banana_chains: int = 1000
    banana_draws: int = 2000
    pyro_draws: dict[str, int] = field(
        default_factory=lambda: {"schools": 1000, "logistic": 1000, "gauss100": 500}
    )
    limit_s: float = 60.0
    widths: tuple[int, ...] = (16, 32)
    images: int = 8
    pairs: int = 15
    million: tuple[int, int] = (1_000_000, 1000)


TINY = Sizes(
    rounds=1,
    compile=False,
    chains=8,
    warmup=10,
    draws=20,
    draws_of_four=20,
    banana_chains=10,
    banana_draws=20,
    widths=(8, 8),
    images=2,
    pairs=2,
    million=(1000, 20),
)


@dataclass
class Results:
    """Everything measured, by key."""

    medians: dict[str, float] = field(default_factory=dict)
    quartiles: dict[str, tuple[float, float]] = field(default_factory=dict)
    samplers: dict[str, dict[str, float]] = field(default_factory=dict)
    skipped: dict[str, str] = field(default_factory=dict)

    def add(self, key: str, values: list[float]) -> None:
        lower, median, upper = (
            statistics.quantiles(values, n=4, method="inclusive") if len(values) > 1 else values * 3
        )
        self.add_ratio(key, median, lower, upper)

    def add_ratio(self, key: str, median: float, lower: float, upper: float) -> None:
        self.medians[key], self.quartiles[key] = median, (lower, upper)
        sign, goal = (">=", AT_LEAST[key]) if key in AT_LEAST else ("<=", AT_MOST.get(key, math.nan))
        wanted = "" if math.isnan(goal) else f"{sign} {goal:g}"
        print(f"{key:34}{wanted:>10}{median:12.4g}{f'{lower:.4g} .. {upper:.4g}':>24}", flush=True)


def main() -> None:
    options = arguments()
    torch.set_num_threads(1)
    keep_freed_memory()
    print(f"{'':34}{'goal':>10}{'reached':>12}{'quartiles':>24}")
    results = Results()
    for name in options.only:
        SECTIONS[name](name, options.sizes, options.peers, results)
    if not options.peers:
        results.skipped["peers"] = "run with --peers where blackjax, numpyro and torchebm are installed"
    show_samplers(results)
    rest = {name: value for name, value in asdict(results).items() if name != "medians"}
    print(json.dumps(results.medians | rest))


# --- samplers in turns --------------------------------------------------------------------------------------------


def of_banana(name: str, sizes: Sizes, peers: bool, results: Results) -> None:
    """HMC with everything given."""
    problem = PROBLEMS[name]()
    engine = HMC(
        num_steps=NUM_STEPS,
        step_size=STEP_SIZE,
        num_warmup=sizes.warmup,
        metric="identity",
        jitter=0.0,
        compile=sizes.compile,
    )
    samplers = {"ours": exact_gradients(problem, engine, sizes, results)}
    if peers:
        from benchmarks.peers.mcmc import hmc_samplers

        samplers |= hmc_samplers(problem, STEP_SIZE, NUM_STEPS, sizes.banana_chains, sizes.banana_draws)
    runs = in_turns(name, samplers, sizes.rounds, results)
    for peer in list(runs)[1:]:
        results.add(f"{name}/over_{peer}", ratios(runs["ours"], runs[peer], ess_per_second))


def exact_gradients(problem: Problem, engine: HMC, sizes: Sizes, results: Results) -> Sampler:
    """Ours, with its gradients counted."""

    def sample(seed: int) -> Run:
        posterior = draws_of(problem, engine, sizes.banana_chains, sizes.banana_draws, seed)
        transitions = sizes.banana_chains * sizes.banana_draws
        counted = posterior.cost.gradients / transitions
        assert counted == posterior.stats["n_steps"].double().mean(), "the two counts of gradients differ"
        if seed == 0:
            results.add("banana/gradients_over_steps", [counted / NUM_STEPS])
        return run_of(problem, posterior)

    return sample


def of_problem(name: str, sizes: Sizes, peers: bool, results: Results) -> None:
    """ChEES with many chains, and NUTS with four where there is a goal."""
    problem = PROBLEMS[name]()
    samplers = {
        "ours": ours(
            problem, ChEES(num_warmup=sizes.warmup, compile=sizes.compile), sizes.chains, sizes.draws
        )
    }
    with_four = f"{name}4/over_pyro" in AT_LEAST
    if with_four:
        engine = NUTS(num_warmup=sizes.warmup, compile=sizes.compile)
        samplers["ours_4"] = ours(problem, engine, 4, sizes.draws_of_four)
    if peers:
        from benchmarks.peers.mcmc import nuts_samplers

        samplers |= nuts_samplers(problem, sizes.warmup, sizes.pyro_draws[name], sizes.limit_s)
    runs = in_turns(name, samplers, sizes.rounds, results)
    for peer in [key for key in runs if not key.startswith("ours")]:
        results.add(f"{name}/over_{peer}", ratios(runs["ours"], runs[peer], ess_per_second))
        if with_four and peer.startswith("pyro"):
            pair = runs["ours_4"], runs[peer]
            results.add(f"{name}4/over_{peer}", ratios(*pair, ess_per_second))
            results.add(f"{name}4/over_{peer}_end_to_end", ratios(*pair, ess_per_second_with_warmup))


def ours(problem: Problem, engine: Engine, num_chains: int, num_draws: int) -> Sampler:
    return lambda seed: run_of(problem, draws_of(problem, engine, num_chains, num_draws, seed))


def draws_of(problem: Problem, engine: Engine, num_chains: int, num_draws: int, seed: int) -> Any:
    return infer(
        problem.program, engine, data=problem.data, num_chains=num_chains, num_draws=num_draws, seed=seed
    )


def run_of(problem: Problem, posterior: Any) -> Run:
    cost = posterior.cost
    return Run(problem.vectors(posterior.draws), cost.seconds, cost.warmup_seconds, cost.compile_seconds)


@dataclass(frozen=True)
class Measured:
    """What is kept of a run."""

    ess: float
    draws: int
    seconds: float
    warmup_seconds: float
    compile_seconds: float


def ess_per_second(run: Measured) -> float:
    return run.ess / run.seconds


def ess_per_second_with_warmup(run: Measured) -> float:
    return run.ess / (run.seconds + run.warmup_seconds)


def ratios(own: list[Measured], theirs: list[Measured], rate: Callable[[Measured], float]) -> list[float]:
    """Round by round."""
    return [rate(a) / rate(b) for a, b in zip(own, theirs, strict=True)]


def in_turns(
    name: str, samplers: dict[str, Sampler], rounds: int, results: Results
) -> dict[str, list[Measured]]:
    """Runs of each sampler, every round in the other direction; one that gives up is left out."""
    runs: dict[str, list[Measured]] = {key: [] for key in samplers}
    means: dict[str, tuple[Any, Any]] = {}
    for seed in range(rounds):
        for key in list(runs) if seed % 2 else list(runs)[::-1]:
            try:
                run = samplers[key](seed)
            except Skipped as reason:
                results.skipped[f"{name}/{key}"] = str(reason)
                del runs[key]
                continue
            runs[key].append(measured(run))
            means[key] = means_of(run)
            rate = ess_per_second(runs[key][-1])
            print(f"round {seed}: {name}/{key}: {rate:.0f} ESS/s", file=sys.stderr, flush=True)
    for key, kept in runs.items():
        summary = {f: statistics.median(asdict(m)[f] for m in kept) for f in asdict(kept[0])}
        summary["ess_per_second"] = statistics.median(map(ess_per_second, kept))
        summary["worst_z_of_means"] = worst_z(means[key], means["ours"])
        results.samplers[f"{name}/{key}"] = summary
    return runs


def measured(run: Run) -> Measured:
    chains, draws, size = run.draws.shape
    ess = min(float(arviz.ess(run.draws[..., i], method="bulk")) for i in range(size))
    return Measured(ess, chains * draws, run.seconds, run.warmup_seconds, run.compile_seconds)


def means_of(run: Run) -> tuple[Any, Any]:
    """Means of all parameters with their standard errors."""
    coordinates = torch.from_numpy(run.draws.copy()).double()
    errors = [float(arviz.mcse(one.numpy(), method="mean")) for one in coordinates.unbind(-1)]
    return coordinates.mean((0, 1)), torch.tensor(errors, dtype=torch.float64)


def worst_z(one: tuple[Tensor, Tensor], other: tuple[Tensor, Tensor]) -> float:
    """The largest difference of means in standard errors: whether two drew from the same law."""
    return ((one[0] - other[0]).abs() / torch.hypot(one[1], other[1])).max().item()


def show_samplers(results: Results) -> None:
    print(
        f"\n{'':28}{'ESS/s':>11}{'ESS/draw':>10}{'drawing':>10}{'warm-up':>10}{'compiling':>11}{'worst z':>9}"
    )
    for key, found in results.samplers.items():
        print(
            f"{key:28}{found['ess_per_second']:11.0f}{found['ess'] / found['draws']:10.3f}"
            f"{found['seconds']:9.2f}s{found['warmup_seconds']:9.2f}s{found['compile_seconds']:10.2f}s"
            f"{found['worst_z_of_means']:9.1f}"
        )
    for key, reason in results.skipped.items():
        print(f"skipped: {key}: {reason}")


# --- a network ----------------------------------------------------------------------------------------------------


class NetworkEnergy(nn.Module):
    """E(x) = |x - u(x)|^2/2 with a U-Net u."""

    event_shape = (1, 28, 28)

    def __init__(self, widths: tuple[int, ...]) -> None:
        super().__init__()
        self.net = UNet(self.event_shape, widths)
        nn.init.normal_(self.net.out[-1].weight, std=0.1)  # it starts at zero
        self.requires_grad_(False)

    def model(self, batch: Batch) -> None:
        raise NotImplementedError

    def energy(self, x: Tensor) -> Tensor:
        t = torch.full((len(x),), 0.5)
        return 0.5 * (x - self.net(x, t)).square().flatten(1).sum(1)


def of_network(name: str, sizes: Sizes, peers: bool, results: Results) -> None:
    """A gradient inside HMC over a bare one, in CPU seconds: twice the transitions less the transitions."""
    with forked_rng(0):
        program = NetworkEnergy(sizes.widths).eval()
        x = torch.randn(sizes.images, *program.event_shape, requires_grad=True)
    engine = HMC(num_steps=NUM_STEPS, step_size=0.01, num_warmup=0)
    transitions = 5

    def seconds(num_draws: int) -> float:
        return seconds_each(lambda: infer(program, engine, num_chains=sizes.images, num_draws=num_draws), 1)

    def inside() -> float:
        return (seconds(2 * transitions) - seconds(transitions)) / (transitions * NUM_STEPS)

    def bare() -> float:
        return seconds_each(lambda: torch.autograd.grad(program.energy(x).sum(), x), transitions * NUM_STEPS)

    ratio = interleaved(inside, bare, sizes.pairs)
    results.add_ratio(f"{name}/over_bare", ratio.median, ratio.lower, ratio.upper)


# --- a million chains ---------------------------------------------------------------------------------------------


def of_million(name: str, sizes: Sizes, peers: bool, results: Results) -> None:
    """In a process of its own, whose peak memory is then that of this run."""
    call = f"from benchmarks.mcmc import million; million(*{sizes.million}, compile={sizes.compile})"
    done = subprocess.run(
        [sys.executable, "-c", call], cwd=ROOT, stdout=subprocess.PIPE, text=True, check=True
    )
    for key, value in json.loads(done.stdout.splitlines()[-1]).items():
        results.add(f"{name}/{key}", [value])


def million(num_chains: int, num_steps: int, compile: bool) -> None:  # noqa: A002
    """Print the seconds, compiling included, and the peak memory of the moments of `num_chains` chains."""
    torch.set_num_threads(2)
    problem = PROBLEMS["banana"]()
    started = time.perf_counter()
    engine = ULA(step_size=0.01, num_warmup=0, compile=compile)
    moments(problem.program, engine, num_chains=num_chains, num_draws=num_steps)
    seconds = time.perf_counter() - started
    print(json.dumps({"seconds": seconds, "gigabytes": peak_gigabytes()}))


def peak_gigabytes() -> float:
    """Of this process: `getrusage` alone would count what its parent held when it was forked, on Linux."""
    status = Path("/proc/self/status")
    if status.exists():
        (line,) = [line for line in status.read_text().splitlines() if line.startswith("VmHWM")]
        return float(line.split()[1]) * 1024 / 1e9
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / 1e9 if sys.platform == "darwin" else peak / 1e6


SECTIONS: dict[str, Callable[[str, Sizes, bool, Results], None]] = {
    "banana": of_banana,
    "schools": of_problem,
    "logistic": of_problem,
    "gauss100": of_problem,
    "network": of_network,
    "million": of_million,
}


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Markov chains beside other libraries.")
    parser.add_argument("--peers", action="store_true", help="run the others too")
    parser.add_argument("--only", nargs="+", choices=SECTIONS, default=list(SECTIONS), help="parts to run")
    parser.add_argument("--rounds", type=int, help="turns of each sampler (5)")
    parser.add_argument("--tiny", action="store_true", help="see that it runs, not how fast")
    options = parser.parse_args()
    options.sizes = TINY if options.tiny else Sizes()
    if options.rounds is not None:
        options.sizes = replace(options.sizes, rounds=options.rounds)
    return options


if __name__ == "__main__":
    main()
