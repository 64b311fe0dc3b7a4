"""Boltzmann machines on MNIST: test log-likelihoods by annealed importance sampling, beside those that were published.

    PROBGEN_DATA=path/to/data OMP_NUM_THREADS=1 python examples/boltzmann_mnist.py --out runs/boltzmann_mnist

Pixels are binary, on with probability level / 255 and drawn anew at every step (Salakhutdinov & Murray 2008); the test
images are binarised once. Each stage of a fit has a run folder: the same command goes on where it was stopped. Writes
for each machine curve_NAME.json (after each stage: epochs, minutes, log-likelihoods) and figures_NAME.json, and
boltzmann_mnist.png. What one run gave stands in docs/results.md.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from probgen import Estimate, Optim, evidence, fit, infer
from probgen.core import Fraction, InputError, NonNegative, Objective
from probgen.data import Binarised, Quantised
from probgen.data_files import read_data
from probgen.diagnostics.plots import Array, new_figure
from probgen.evidence.ais import AIS
from probgen.greedy import pretrain
from probgen.inference.gibbs import Gibbs
from probgen.models.deep_boltzmann_machine import DeepBoltzmannMachine
from probgen.models.rbm import RBM
from probgen.moves import GibbsMoves
from probgen.objectives.contrastive_divergence import ContrastiveDivergence, PersistentContrastiveDivergence
from probgen.randomness import forked_rng

BATCH_SIZE = 100
PUBLISHED = {"rbm": ("log-likelihood", -86.34), "dbm": ("bound", -84.62)}
PRETRAINING = 5  # epochs of each layer
QUICK = AIS(num_runs=50, num_temperatures=2000)
THOROUGH = AIS(num_runs=100, num_temperatures=10_000)


@dataclass(frozen=True)
class Sizes:
    """Units of the hidden layers (the RBM has the first), share of the epochs that are made, and the estimates."""

    widths: tuple[int, ...] = (500, 1000)
    share: float = 1.0
    quick: AIS = QUICK
    thorough: AIS = THOROUGH
    sweeps: int = 2000

    def steps(self, epochs: int, rows: int) -> int:
        """Steps of so many epochs of data of so many rows."""
        return max(1, int(self.share * epochs * rows / BATCH_SIZE))


FULL = Sizes()


@dataclass(frozen=True)
class Stage:
    """Some epochs of one objective at one learning rate."""

    objective: Objective
    epochs: int
    lr: float


@dataclass(frozen=True)
class Descent(Optim):
    """Gradient descent with momentum and weight decay: Adam makes weights of pixels that are seldom on too restless."""

    momentum: Fraction = 0.5
    weight_decay: NonNegative = 1e-5

    def build(self, parameters: list[Tensor]) -> torch.optim.Optimizer:
        return torch.optim.SGD(parameters, self.lr, self.momentum, weight_decay=self.weight_decay, fused=True)


def read_images(data: str) -> tuple[Binarised, Tensor]:
    """Images to learn from, binarised anew whenever they are looked at, and others, binarised once."""
    train, test = read_data(data, "train"), read_data(data, "held_out")
    if not isinstance(train, Quantised) or not isinstance(test, Quantised):
        raise InputError(f"{data!r} holds no images of integer levels: expected mnist or mnist:FOLDER.")
    with forked_rng(0):
        return Binarised(train), Binarised(test).all()


def rbm_stages() -> list[Stage]:
    """CD-1 to find features, then chains that go on, five sweeps a step, ever slower, twice."""
    chains = PersistentContrastiveDivergence(GibbsMoves(5), num_chains=BATCH_SIZE)
    rates = [(7, 5e-2), (10, 5e-2), (10, 4e-2), (6, 2e-2), (6, 1e-2), (5, 4e-3), (4, 1.5e-3)]
    rates += [(6, 2e-2), (2, 7e-3), (2, 2e-3)]
    return [Stage(ContrastiveDivergence(), 3, 5e-2), *(Stage(chains, epochs, lr) for epochs, lr in rates)]


def dbm_stages() -> list[Stage]:
    """Chains from the start: the machine is pretrained."""
    chains = PersistentContrastiveDivergence(GibbsMoves(3), num_chains=BATCH_SIZE)
    rates = [(2, 2e-2), (5, 1.5e-2), (5, 1e-2), (4, 4e-3), (3, 1.5e-3), (2, 5e-4)]
    return [Stage(chains, epochs, lr) for epochs, lr in rates]


def fit_rbm(train: Binarised, test: Tensor, out: Path, sizes: Sizes) -> RBM:
    """An RBM that begins at the rates of its pixels."""
    torch.manual_seed(0)
    rbm = RBM(train.event_shape, sizes.widths[0])
    rbm.set_rates(train.all())
    fit_in_stages(rbm, train, test, rbm_stages(), out, sizes)
    return rbm


def fit_dbm(train: Binarised, test: Tensor, out: Path, sizes: Sizes) -> DeepBoltzmannMachine:
    """A deep machine, pretrained layer by layer by CD-1; five sweeps of the mean field while it is fitted."""
    torch.manual_seed(0)
    dbm = DeepBoltzmannMachine(train.event_shape, sizes.widths, mean_field_steps=5)
    optim, num_steps = Descent(lr=5e-2, warmup=100, ema_decay=0.999), sizes.steps(PRETRAINING, len(train))
    histories = pretrain(
        dbm,
        train,
        ContrastiveDivergence(),
        num_steps=num_steps,
        batch_size=BATCH_SIZE,
        optim=optim,
        run=out / "pretraining",
    )
    seconds = sum(history.seconds for history in histories)
    fit_in_stages(dbm, train, test, dbm_stages(), out, sizes, seconds)
    dbm.mean_field_steps = 50
    return dbm


def fit_in_stages(
    program: Any,
    train: Binarised,
    test: Tensor,
    stages: Sequence[Stage],
    out: Path,
    sizes: Sizes,
    seconds: float = 0.0,
) -> None:
    """Fit, and write down after every stage how likely test images are by then; `seconds` are those spent before."""
    path = out.with_name(f"curve_{out.name}.json")
    curve = json.loads(path.read_text()) if path.exists() else []
    epochs = 0
    for number, stage in enumerate(stages):
        history = fit(
            program,
            train,
            stage.objective,
            num_steps=sizes.steps(stage.epochs, len(train)),
            batch_size=BATCH_SIZE,
            optim=Descent(lr=stage.lr, warmup=100, ema_decay=0.999),
            seed=number,
            run=out / f"stage{number}",
        )
        epochs, seconds = epochs + stage.epochs, seconds + history.seconds
        if number == len(curve):
            found = figures(evidence(program, sizes.quick, test))
            curve.append({"epochs": epochs, "minutes": seconds / 60, "lr": stage.lr, **found})
            path.write_text(json.dumps(curve, indent=2) + "\n")
            print(json.dumps(curve[-1]), flush=True)


def figures(estimate: Estimate) -> dict[str, float]:
    """Nats a test image: their mean by the forward runs, by the reverse runs, and the error of each kind."""
    forward, reverse = (estimate.diagnostics[f"log_partition_{way}"].mean() for way in ("forward", "reverse"))
    mean = estimate.value.mean()
    return {
        "log_likelihood": float(mean),
        "of_reverse_runs": float(mean + forward - reverse),
        "ais_error": float(estimate.standard_error.mean()),
        "test_error": float(estimate.value.std() / len(estimate.value) ** 0.5),
    }


def draw_picture(programs: dict[str, Any], out: Path, sizes: Sizes) -> None:
    """Learning curves, the first filters of each machine, and ends of Gibbs chains that began at random."""
    with new_figure(out / "boltzmann_mnist.png", size=(9, 3.1 * len(programs))) as figure:
        rows = figure.subplots(len(programs), 3, squeeze=False)
        for (name, program), (curves, filters, fantasies) in zip(programs.items(), rows, strict=True):
            what, published = PUBLISHED[name]
            curve = json.loads((out / f"curve_{name}.json").read_text())
            curves.plot(
                [point["minutes"] for point in curve], [point["log_likelihood"] for point in curve], "o-"
            )
            curves.axhline(published, color="black", linestyle=":")
            curves.set_ylim(max(-115, curves.get_ylim()[0]), published + 5)
            curves.set_xlim(left=0)
            curves.annotate(
                f"published {published}", (0, published), xytext=(2, 4), textcoords="offset points"
            )
            curves.set(xlabel="minutes of fitting", ylabel=f"{what} [nats an image]", title=name.upper())
            weight = program.couplings().weights[
                "x", next(site for site in program.couplings().sites if site != "x")
            ]
            scale = float(weight.detach().abs().quantile(0.995))
            filters.imshow(sheet(weight.detach().mT[:64], 8), cmap="RdBu_r", vmin=-scale, vmax=scale)
            filters.set_title(f"filters of {min(64, weight.shape[1])} units")
            fantasies.imshow(sheet(fantasies_of(program, sizes), 8), cmap="gray_r", vmin=0, vmax=1)
            fantasies.set_title(f"after {sizes.sweeps:,} Gibbs sweeps from noise")
            for axes in (filters, fantasies):
                axes.set(xticks=[], yticks=[])
                axes.grid(visible=False)


def fantasies_of(program: Any, sizes: Sizes) -> Tensor:
    """How likely each pixel is to be on at the ends of 64 chains."""
    end = infer(program, Gibbs(num_warmup=sizes.sweeps - 1), num_draws=1, num_chains=64)
    state = {site: end[site].reshape(64, -1) for site in program.couplings().sites}
    return program.couplings().mean("x", state).detach()


def sheet(images: Tensor, columns: int) -> Array:
    """Images of 28 x 28 side by side, `(height, width)`, a line of nothing between them."""
    framed = torch.nn.functional.pad(images.reshape(-1, columns, 28, 28), (1, 1, 1, 1))
    return framed.transpose(1, 2).flatten(0, 1).flatten(1).numpy()


def main(
    out: str | Path = "runs/boltzmann_mnist",
    *,
    data: str = "mnist",
    machines: Sequence[str] = ("rbm", "dbm"),
    sizes: Sizes = FULL,
) -> dict[str, dict[str, float]]:
    """Fit and measure.

    Args:
        out: where run folders, figures and the picture go.
        data: `mnist` (in the folder that PROBGEN_DATA names) or `mnist:FOLDER`.
        machines: which of "rbm" and "dbm".
        sizes: of machines, fits and estimates.
    """
    out = Path(out)
    out.mkdir(parents=True, exist_ok=True)
    train, test = read_images(data)
    found, programs = {}, {}
    for name in machines:
        programs[name] = program = {"rbm": fit_rbm, "dbm": fit_dbm}[name](train, test, out / name, sizes)
        estimate = evidence(program, sizes.thorough, test)
        print(estimate)
        found[name] = figures(estimate)
        (out / f"figures_{name}.json").write_text(json.dumps(found[name], indent=2) + "\n")
    draw_picture(programs, out, sizes)
    return found


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", default="mnist", help="mnist or mnist:FOLDER (%(default)s)")
    parser.add_argument(
        "--out", default="runs/boltzmann_mnist", help="folder of fits and figures (%(default)s)"
    )
    parser.add_argument("--machines", nargs="+", choices=["rbm", "dbm"], default=["rbm", "dbm"])
    options = parser.parse_args()
    print(json.dumps(main(options.out, data=options.data, machines=options.machines), indent=2))
