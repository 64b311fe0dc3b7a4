"""How far solvers of few network calls end from the exact ODE, ours beside other libraries', on one digit network.

    python -m benchmarks.solvers --peers PATH/TO/python

The network predicts the noise in scikit-learn's 8 x 8 digits; it is fitted at the first run (two minutes of one core)
and kept under runs/. All solvers start from the same x_T at t = 1. *Exact* is x0hat at t_min = 1/1000 of the
probability-flow ODE solved to t_min by RK4 in many steps, its own error reported; all count network calls, not steps.

`ours/<budget>` is the root mean square error of one setting a budget, `OURS`, chosen on the network of seed 0 and
reported on that of seed 1 (so is `--seed` by default). `peer/<name>/<budget>` is that of the best of a library's
usual grids and orders, chosen for each budget on the very network reported. `ours_over_best_peer/<budget>` compares
with the best of all peers. "frechet" has the Fréchet distance of all draws, of stochastic solvers too, to the training
digits in a classifier's features, with its standard error (bootstrap over draws).
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from benchmarks.digit_network import EVENT, NUM_LEVELS, PROCESS, digit_network, read_network, write_network
from probgen import DDIM, DDPM, DPMSolver, Optim, SimpleLoss, digits, fit, infer
from probgen.core import Engine
from probgen.diagnostics import frechet_distance
from probgen.dynamics import Velocity, fixed_step, flow_field
from probgen.nets import Classifier
from probgen.processes import VP, LogSNR
from probgen.randomness import Noise, forked_rng

ROOT = Path(__file__).parent.parent
BUDGETS = (5, 10, 20, 50)
BATCH = 500
OURS: dict[int, Engine] = {
    n: DPMSolver(n, exponent=1 / 2 if n < 10 else 1 / 3, batch_size=BATCH) for n in BUDGETS
}
STOCHASTIC = {
    "ddim_eta_1": lambda n: DDIM(n, eta=1.0, batch_size=BATCH),
    "dpm_solver_sde": lambda n: DPMSolver(n, order=2, stochasticity=1.0, batch_size=BATCH),
}


@dataclass(frozen=True)
class Options:
    """The command line."""

    peers: Path | None
    seed: int
    draws: int
    exact_rows: int
    exact_steps: int
    fit_steps: int
    budgets: tuple[int, ...]
    widths: tuple[int, ...]
    folder: Path


def main() -> None:
    torch.set_num_threads(1)
    print(json.dumps(measure(arguments())))


def measure(options: Options) -> dict[str, Any]:
    """All results by key."""
    program = DDPM(fitted_network(options), VP(), NUM_LEVELS)
    x = Noise(options.seed, 1, options.draws, EVENT)(0)  # what every engine starts from with this seed
    x_T = PROCESS.terminal_scale().float() * x
    first = x_T[: options.exact_rows]
    exact, at_t_min = exact_ends(program, first, options.exact_steps)
    coarser, _ = exact_ends(program, first, options.exact_steps // 2)
    judge = Judge(options)
    results: dict[str, Any] = {}
    frechet: dict[str, Any] = {}
    for budget in options.budgets:
        draws = our_draws(program, OURS[budget], budget, options)
        results[f"ours/{budget}"] = rmse(draws[: len(exact)], exact)
        frechet[f"ours/{budget}"] = judge(draws)
        for name, build in STOCHASTIC.items():
            frechet[f"ours_{name}/{budget}"] = judge(our_draws(program, build(budget), budget, options))
        say(f"ours, {budget} calls: rmse {results[f'ours/{budget}']:.5f}")
    if options.peers is None:
        results["skipped"] = "peers: run with --peers PATH/TO/python of an environment that has them"
    else:
        problem = {"x_T": x_T.numpy(), "exact": exact.numpy(), "exact_at_t_min": at_t_min.numpy()}
        peers, draws_of = peer_results(problem, options)
        for key, found in peers.items():
            results[f"peer/{key}"] = found["rmse"]
        frechet |= {f"peer/{key}": judge(torch.from_numpy(draws)) for key, draws in draws_of.items()}
        results |= {f"ours_over_best_peer/{n}": over_best_peer(results, n) for n in options.budgets}
        results["settings"] = {key: found["setting"] for key, found in peers.items()}
    rounded = {key: round(value, 6) if isinstance(value, float) else value for key, value in results.items()}
    return rounded | {"frechet": frechet, "error_of_exact": round(rmse(coarser, exact), 8)}


def over_best_peer(results: dict[str, Any], budget: int) -> float:
    peers = [v for key, v in results.items() if key.startswith("peer/") and key.endswith(f"/{budget}")]
    return results[f"ours/{budget}"] / min(peers)


def rmse(x: Tensor, exact: Tensor) -> float:
    return (x.double() - exact).square().mean().sqrt().item()


def say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


# --- ours ---------------------------------------------------------------------------------------------------------


def our_draws(program: DDPM, engine: Engine, budget: int, options: Options) -> Tensor:
    posterior = infer(program, engine, num_draws=options.draws, seed=options.seed, progress=False)
    batches = -(-options.draws // BATCH)
    assert posterior.cost.network_calls == budget * batches, "a budget was not kept"
    return posterior.flat("x")


@torch.inference_mode()
def exact_ends(program: DDPM, x_T: Tensor, steps: int) -> tuple[Tensor, Tensor]:
    """x0hat at t_min of the probability flow, and the path there."""
    field = Velocity.of(program)
    schedule = LogSNR().between(field.t_max, field.t_min, field.process)
    at_t_min = fixed_step(flow_field(field, schedule, steps), x_T, "rk4")
    return field.finish(at_t_min), at_t_min


# --- theirs -------------------------------------------------------------------------------------------------------


def peer_results(
    problem: dict[str, np.ndarray], options: Options
) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """RMSE and setting by "name/budget", and the draws, from the peers' own environment."""
    with tempfile.TemporaryDirectory() as folder:
        given, drawn = Path(folder, "problem.npz"), Path(folder, "draws.npz")
        with np.load(network_path(options), allow_pickle=False) as weights:
            arrays = problem | dict(weights) | {"budgets": np.array(options.budgets)}
            np.savez(given, **arrays)  # type: ignore[arg-type]
        command = [str(options.peers), "-m", "benchmarks.peers.solvers", str(given), str(drawn)]
        environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
        done = subprocess.run(
            command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True, check=True
        )
        with np.load(drawn, allow_pickle=False) as draws:
            return json.loads(done.stdout.splitlines()[-1]), dict(draws)


# --- the network and the judge ------------------------------------------------------------------------------------


def network_path(options: Options) -> Path:
    size = "x".join(map(str, options.widths))
    return options.folder / f"digits-{size}-{options.fit_steps}-seed{options.seed}.npz"


def fitted_network(options: Options) -> nn.Module:
    """Fitted once for each seed and size, then read."""
    path = network_path(options)
    if not path.exists():
        say(f"fitting the network: {options.fit_steps} steps")
        with forked_rng(options.seed):
            network = digit_network(options.widths)
        program = DDPM(network, VP(), NUM_LEVELS)
        optim = Optim(lr=2e-3, schedule="cosine", ema_decay=0.998 if options.fit_steps > 1000 else None)
        train, _ = digits()
        fit(
            program,
            train,
            SimpleLoss(),
            num_steps=options.fit_steps,
            optim=optim,
            seed=options.seed,
            progress=False,
        )
        path.parent.mkdir(parents=True, exist_ok=True)
        write_network(path, network, options.widths)
    with np.load(path, allow_pickle=False) as arrays:
        return read_network(dict(arrays))


class Judge:
    """Fréchet distance to the training digits in the features of a small classifier, with its standard error."""

    def __init__(self, options: Options, num_resamples: int = 10) -> None:
        self.num_resamples = num_resamples
        train, _ = digits()
        with forked_rng(0):
            self.classifier = fitted_classifier(train, num_steps=min(options.fit_steps, 500))
            self.real = self._features(train.all())

    def __call__(self, x: Tensor) -> dict[str, float]:
        features = self._features(x)
        generator = torch.Generator().manual_seed(0)
        resampled = [
            frechet_distance(features[torch.randint(len(x), (len(x),), generator=generator)], self.real)
            for _ in range(self.num_resamples)
        ]
        distance, error = frechet_distance(features, self.real), torch.tensor(resampled).std().item()
        return {"distance": round(distance, 4), "error": round(error, 4)}

    @torch.inference_mode()
    def _features(self, x: Tensor) -> Tensor:
        return torch.cat([self.classifier.features(part) for part in x.split(BATCH)])


def fitted_classifier(train: Any, num_steps: int) -> Classifier:
    classifier = Classifier(EVENT)
    optimiser = torch.optim.Adam(classifier.parameters(), lr=1e-3)
    for _ in range(num_steps):
        rows = torch.randint(len(train), (128,))
        optimiser.zero_grad()
        nn.functional.cross_entropy(classifier(train[rows]), train.labels[rows]).backward()
        optimiser.step()
    return classifier.eval()


def arguments() -> Options:
    parser = argparse.ArgumentParser(description="Few-call solvers on one digit network.")
    parser.add_argument("--peers", type=Path, help="python with diffusers, k-diffusion and azula")
    parser.add_argument(
        "--seed", type=int, default=1, help="of network and x_T; 0 is for choosing (%(default)s)"
    )
    parser.add_argument("--draws", type=int, default=10_000, help="for the Fréchet distance (%(default)s)")
    parser.add_argument("--exact-rows", type=int, default=256, help="compared with the ODE (%(default)s)")
    parser.add_argument("--tiny", action="store_true", help="see that it runs, not how well")
    chosen = parser.parse_args()
    tiny = chosen.tiny
    return Options(
        peers=chosen.peers,
        seed=chosen.seed,
        draws=20 if tiny else chosen.draws,
        exact_rows=4 if tiny else min(chosen.exact_rows, chosen.draws),
        exact_steps=40 if tiny else 400,
        fit_steps=20 if tiny else 4000,
        budgets=BUDGETS[:2] if tiny else BUDGETS,
        widths=(8, 8) if tiny else (16, 32),
        folder=ROOT / "runs" / "solvers",
    )


if __name__ == "__main__":
    main()
