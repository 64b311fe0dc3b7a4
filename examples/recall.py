"""Claim: a Boltzmann machine is a memory: half of a pattern brings back the whole, as long as they are few, or fitted.

    OMP_NUM_THREADS=1 python examples/recall.py

Patterns of 200 independent pixels are stored by Hebb's rule. Chains that start at a pattern with a tenth of its pixels
turned over find back to it as long as there are few patterns: the overlap with it falls near 0.138 patterns a unit
(Amit, Gutfreund & Sompolinsky 1985). Ten handwritten digits of 8 x 8 pixels, one of each class, overlap by far more:
Hebb's rule mixes them up, and the same machine fitted to them by persistent contrastive divergence does not. Either is
given the upper half of each; unseen pixels are NaN, and Gibbs moves complete them. Checked: the overlap is above 0.95
at 0.05 patterns a unit and below 0.5 at 0.3; of ten digits the fitted machine completes at least 8, Hebb's at most 5.
"""

from __future__ import annotations

import math
from pathlib import Path

import torch
from torch import Tensor

from probgen import (
    BoltzmannMachine,
    Gibbs,
    GibbsMoves,
    Optim,
    PersistentContrastiveDivergence,
    digits,
    fit,
    infer,
)
from probgen.core import Cost, Posterior
from probgen.data import binarise_threshold
from probgen.diagnostics.plots import PALETTE, new_figure
from probgen.diagnostics.unit_plots import draw_recall
from probgen.randomness import forked_rng

CAPACITY = 0.138  # patterns a unit
TURNED = 0.1  # of all pixels of a cue
COLD = 0.1  # temperature
LOADS = (0.025, 0.05, 0.075, 0.1, 0.125, 0.15, 0.175, 0.2, 0.25, 0.3)


def main(
    folder: str | Path = "runs/recall", num_units: int = 200, num_repeats: int = 5, num_steps: int = 1500
) -> dict[str, float]:
    print(__doc__)
    with forked_rng(0):
        curve = {load: overlaps(num_units, round(load * num_units), num_repeats) for load in LOADS}
        for load, (mean, error) in curve.items():
            print(f"{load:.3f} patterns a unit: overlap {mean:.3f} +- {error:.3f}")
        patterns = one_of_each()
        machines = {
            "Hebb's rule": BoltzmannMachine.hebbian(patterns, COLD),
            "fitted": fitted(patterns, num_steps),
        }
    cue = patterns.clone()
    cue[:, patterns.shape[1] // 2 :] = math.nan
    completions = {name: complete(machine, cue) for name, machine in machines.items()}
    recalled = {name: count_recalled(x, patterns) for name, x in completions.items()}
    for name, count in recalled.items():
        print(f"{name}: {count} of {len(patterns)} digits completed")
    print(draw(curve, patterns, cue, completions, recalled, Path(folder) / "recall.png"))
    assert curve[0.05][0] > 0.95
    assert curve[0.3][0] < 0.5
    assert recalled["fitted"] >= 8
    assert recalled["Hebb's rule"] <= 5
    return {name: float(count) for name, count in recalled.items()}


def overlaps(num_units: int, num_patterns: int, num_repeats: int) -> tuple[float, float]:
    """Mean over machines of the overlap 1 - 2 (share of wrong pixels) after 20 sweeps, and its standard error."""
    found = torch.tensor([overlap(num_units, num_patterns) for _ in range(num_repeats)])
    return float(found.mean()), float(found.std() / math.sqrt(num_repeats))


def overlap(num_units: int, num_patterns: int) -> float:
    patterns = torch.rand(num_patterns, num_units).round()
    turned = torch.rand_like(patterns) < TURNED
    cue = torch.where(turned, 1 - patterns, patterns)
    start = Posterior({"x": cue[:, None]}, "mcmc", "asymptotic", "a cue", Cost())
    machine = BoltzmannMachine.hebbian(patterns, COLD)
    ends = infer(
        machine, Gibbs(num_warmup=20), num_draws=1, num_chains=num_patterns, init=start, progress=False
    )
    return float(1 - 2 * (ends["x"][:, 0] != patterns).float().mean())


def one_of_each() -> Tensor:
    """The first digit of each class, `(10, 8, 8)`, binarised."""
    train, _ = digits()
    assert train.labels is not None
    first = torch.stack([(train.labels == label).nonzero()[0, 0] for label in range(10)])
    return binarise_threshold(train.levels[first, 0], train.num_levels)


def fitted(patterns: Tensor, num_steps: int) -> BoltzmannMachine:
    machine = BoltzmannMachine(patterns.shape[1:])
    fit(
        machine,
        patterns,
        PersistentContrastiveDivergence(GibbsMoves(2), num_chains=100),
        num_steps=num_steps,
        optim=Optim(lr=0.05, schedule="cosine"),
        progress=False,
    )
    return machine


def complete(machine: BoltzmannMachine, cue: Tensor) -> Tensor:
    """Draws `(100, 10, 8, 8)` of p(x | upper half)."""
    engine = Gibbs(num_warmup=50, num_temperatures=6)
    return infer(machine, engine, data={"x": cue}, num_draws=25, num_chains=4, progress=False).flat("x")


def count_recalled(x: Tensor, patterns: Tensor) -> int:
    """Patterns of which no more than one pixel of the most frequent values is wrong."""
    wrong = (x.mean(0).round() != patterns).flatten(1).sum(1)
    return int((wrong <= 1).sum())


def draw(
    curve: dict[float, tuple[float, float]],
    patterns: Tensor,
    cue: Tensor,
    completions: dict[str, Tensor],
    recalled: dict[str, int],
    path: Path,
) -> Path:
    with new_figure(path, size=(8.2, 4.2)) as figure:
        left, right = figure.subplots(1, 2, width_ratios=(1, 1.15))
        loads, (means, errors) = list(curve), zip(*curve.values(), strict=True)
        left.axvline(CAPACITY, color="0.4", linewidth=1, linestyle="--")
        left.text(CAPACITY + 0.004, 0.02, f"{CAPACITY}", color="0.3", transform=left.get_xaxis_transform())
        left.errorbar(loads, means, errors, color=PALETTE[0], marker="o", markersize=3.5, linewidth=1.2)
        left.set_xlabel("patterns a unit")
        left.set_ylabel("overlap with the pattern after 20 sweeps")
        left.set_ylim(0, 1.03)
        left.set_title("Hebb's rule, independent pixels, a tenth turned over")
        shown = {f"{name}: {recalled[name]} of {len(patterns)}": x for name, x in completions.items()}
        draw_recall(right, patterns, cue, shown, num_draws=3)
        right.set_title("Digits of which the upper half is seen", pad=16)
    return path


if __name__ == "__main__":
    main()
