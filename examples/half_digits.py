"""Claim: energies of three kinds complete digits of which half is seen, better than what is common to all digits does.

    OMP_NUM_THREADS=1 python examples/half_digits.py

A restricted and a deep Boltzmann machine are fitted to handwritten digits of 8 x 8 pixels, binarised by a threshold,
and an energy-based model, a network on real pixels, to the same digits in grey. Of held-out digits the upper half is
seen. The machines are told NaN for the rest, and Gibbs moves draw it; of the network's energy the seen half is a part
that stays, and what is left is an energy of the other half: Hamiltonian chains draw that. Printed: the mean squared
error of the mean of the draws, beside those of the mean image and of linear regression on the seen pixels. Checked: for
each model it is lower than that of the mean image by more than three standard errors.
"""

from __future__ import annotations

import math
from pathlib import Path

import torch
from torch import Tensor

from probgen import (
    EBM,
    HMC,
    RBM,
    DeepBoltzmannMachine,
    Energy,
    Gibbs,
    GibbsMoves,
    Optim,
    PersistentContrastiveDivergence,
    digits,
    fit,
    infer,
)
from probgen.data import Quantised, binarise_threshold
from probgen.diagnostics.unit_plots import plot_recall
from probgen.greedy import pretrain
from probgen.objectives.smoothed_score_matching import SmoothedScoreMatching

HALF, NUM_SEEN = 4, 100  # rows of a digit, and digits, that are seen
SMOOTHED = 0.3  # of pixels in [-1, 1]


def main(
    folder: str | Path = "runs/half_digits",
    num_steps: int = 1500,
    num_digits: int = 40,
    engine: HMC = HMC(num_steps=8, num_warmup=150),  # noqa: B008 -- frozen
) -> dict[str, float]:
    print(__doc__)
    train, held_out = digits()
    chosen = of_each_class(held_out, NUM_SEEN)
    black, grey = binary(train), train.all()[:, 0]
    seen_black, seen_grey = binary(held_out)[chosen], held_out.all()[chosen[:num_digits], 0]
    draws = {
        "RBM": complete(rbm(black, num_steps), seen_black),
        "DBM": complete(dbm(black, num_steps // 2), seen_black),
        "EBM": complete_energy(ebm(grey, 2 * num_steps), seen_grey, engine),
    }
    truth = {"RBM": (black, seen_black), "DBM": (black, seen_black), "EBM": (grey, seen_grey)}
    errors = {name: lower_error(x.mean(0), truth[name][1]) for name, x in draws.items()}
    shares = {}
    for name, error in errors.items():
        common, linear = (
            lower_error(guess(*truth[name]), truth[name][1]) for guess in (mean_image, regression)
        )
        gain = common - error
        sure = float(gain.mean() / (gain.std() / math.sqrt(len(gain))))
        print(
            f"{name}: squared error a pixel {error.mean():.4f}; mean image {common.mean():.4f}, linear regression "
            f"{linear.mean():.4f}; better than the mean image by {sure:.1f} standard errors"
        )
        shares[name] = float(error.mean() / common.mean())
        assert sure > 3
    shown = slice(0, 10)
    levels = held_out.levels[chosen, 0][shown] / (held_out.num_levels - 1)
    completions = {name: (x[:, shown] + 1) / 2 if name == "EBM" else x[:, shown] for name, x in draws.items()}
    some = {name: x[torch.linspace(0, len(x) - 1, 200).long()] for name, x in completions.items()}
    print(plot_recall(levels, unseen(levels), spread(some), Path(folder) / "half_digits.png"))
    return shares


def binary(data: Quantised) -> Tensor:
    return binarise_threshold(data.levels[:, 0], data.num_levels)


def of_each_class(data: Quantised, count: int) -> Tensor:
    """Indices of rows, one class after another."""
    assert data.labels is not None
    by_class = [(data.labels == label).nonzero()[: -(-count // 10), 0] for label in range(10)]
    return torch.stack(by_class, 1).flatten()[:count]


def unseen(x: Tensor) -> Tensor:
    """NaN in the lower half."""
    cue = x.clone()
    cue[:, HALF:] = math.nan
    return cue


def objective() -> PersistentContrastiveDivergence:
    return PersistentContrastiveDivergence(GibbsMoves(5), num_chains=100)


def rbm(x: Tensor, num_steps: int) -> RBM:
    torch.manual_seed(0)
    machine, optim = RBM((8, 8), num_hidden=150), Optim(lr=0.01, schedule="cosine")
    machine.set_rates(x)
    fit(machine, x, objective(), num_steps=num_steps, batch_size=100, optim=optim, progress=False)
    return machine


def dbm(x: Tensor, num_steps: int) -> DeepBoltzmannMachine:
    torch.manual_seed(0)
    machine, optim = DeepBoltzmannMachine((8, 8), widths=(100, 50)), Optim(lr=0.01, schedule="cosine")
    pretrain(machine, x, objective(), num_steps=num_steps, batch_size=100, optim=optim, progress=False)
    fit(machine, x, objective(), num_steps=num_steps, batch_size=100, optim=optim, progress=False)
    return machine


def ebm(x: Tensor, num_steps: int) -> EBM:
    torch.manual_seed(0)
    network, optim = EBM.mlp((8, 8), widths=(256, 256), base_scale=1.0), Optim(lr=2e-3, schedule="cosine")
    fit(network, x, SmoothedScoreMatching(SMOOTHED), num_steps=num_steps, optim=optim, progress=False)
    return network


def complete(machine: RBM | DeepBoltzmannMachine, x: Tensor) -> Tensor:
    """Draws of p(x | upper half), `(400, n, 8, 8)`."""
    return infer(
        machine, Gibbs(num_warmup=200), data={"x": unseen(x)}, num_draws=100, num_chains=4, progress=False
    ).flat("x")


def complete_energy(network: EBM, x: Tensor, engine: HMC) -> Tensor:
    """The same from an energy: each seen half leaves an energy of the other one."""
    halves = [
        infer(lower(network, upper), engine, num_draws=50, num_chains=8, progress=False).flat("x")
        for upper in x[:, :HALF]
    ]
    below = torch.stack(halves, 1)
    return torch.cat([x[:, :HALF].expand(len(below), -1, -1, -1), below], dim=2)


def lower(network: EBM, upper: Tensor) -> Energy:
    """E(upper, z) as an energy of z."""

    def energy(z: Tensor) -> Tensor:
        return network.energy(torch.cat([upper.expand(*z.shape[:-2], *upper.shape), z], dim=-2))

    return Energy(energy, (8 - HALF, 8))


def spread(completions: dict[str, Tensor]) -> dict[str, Tensor]:
    """Draws in another order: neighbours of a chain are alike."""
    order = torch.randperm(200, generator=torch.Generator().manual_seed(0))
    return {name: x[order] for name, x in completions.items()}


def lower_error(guess: Tensor, truth: Tensor) -> Tensor:
    return (guess - truth)[:, HALF:].square().flatten(1).mean(1)


def mean_image(train: Tensor, seen: Tensor) -> Tensor:
    return train.mean(0).expand_as(seen)


def regression(train: Tensor, seen: Tensor) -> Tensor:
    """Least squares of all pixels on those of the upper half, with a small ridge."""
    inputs, given = (torch.cat([x[:, :HALF].flatten(1), torch.ones(len(x), 1)], 1) for x in (train, seen))
    weights = torch.linalg.solve(
        inputs.mT @ inputs + torch.eye(inputs.shape[1]), inputs.mT @ train.flatten(1)
    )
    return (given @ weights).reshape(seen.shape)


if __name__ == "__main__":
    main()
