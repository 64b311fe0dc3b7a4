"""Claim: runs from both ends of a path close in on log Z as temperatures grow, and say so before they are there.

    python examples/ais_paths.py

A restricted Boltzmann machine is fitted to digits of 8 x 8 binary pixels and cooled, so that its modes are deep; with
14 hidden units its log Z can be summed at every beta. Annealed importance sampling goes there from units that are as
often on as off, and back. Checked: the gap between the mean log weights shrinks with every tenfold number of
temperatures; the exact log Z lies within three standard errors of both estimates where they are trusted; with ten
temperatures they are not.
"""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import torch
from torch import Tensor

from probgen import AIS, RBM, Optim, PersistentContrastiveDivergence, fit
from probgen.annealing import Bracket
from probgen.couplings import Couplings
from probgen.data import binarise_threshold, digits
from probgen.diagnostics.plots import PALETTE, new_figure
from probgen.evidence.enumeration import log_partition
from probgen.moves import GibbsMoves
from probgen.randomness import forked_rng

NUM_TEMPERATURES = (10, 100, 1000, 10_000)
COOL = 0.35  # of the temperature it was fitted at
LIMIT = 3.0


def main(
    folder: str | Path = "runs/ais_paths",
    num_steps: int = 3000,
    num_hidden: int = 14,
    num_runs: int = 200,
    temperatures: tuple[int, ...] = NUM_TEMPERATURES,
) -> dict[int, Bracket]:
    print(__doc__)
    rbm = fitted(num_steps, num_hidden)
    base = {site: torch.zeros_like(bias) for site, bias in rbm.couplings().biases.items()}
    exact = exact_path(rbm.couplings(), base, torch.linspace(0, 1, 101))
    brackets = {}
    for count in temperatures:
        with forked_rng(0):
            found = brackets[count] = AIS(num_runs, count, base=base).bracket(rbm)
        verdict = found.reason or "trusted"
        print(f"{count:>6} temperatures: {found}, {float(found.ess):.0f} of {num_runs} runs ({verdict})")
    print(f"exact log Z {exact[-1]:.3f}")
    check(brackets, float(exact[-1]))
    print(draw(brackets, exact, Path(folder) / "ais_paths.png"))
    return brackets


def fitted(num_steps: int, num_hidden: int) -> RBM:
    train = digits()[0]
    x = binarise_threshold(train.levels, train.num_levels).flatten(1)
    with forked_rng(0):
        rbm = RBM(x.shape[1:], num_hidden).double()
    rbm.set_rates(x.double())
    optim = Optim(lr=5e-3, schedule="cosine")
    objective = PersistentContrastiveDivergence(GibbsMoves(5), num_chains=100)
    fit(rbm, x.double(), objective, num_steps=num_steps, batch_size=100, optim=optim, progress=False)
    rbm.temperature = COOL
    return rbm


@torch.no_grad()
def exact_path(couplings: Couplings, base: dict[str, Tensor], betas: Tensor) -> Tensor:
    """log Z on the way from the base to the machine."""
    return torch.stack([log_partition(couplings.between(base, float(beta))) for beta in betas])


def check(brackets: dict[int, Bracket], exact: float) -> None:
    gaps = [
        float(found.reverse_paths[-1].mean() - found.forward_paths[-1].mean()) for found in brackets.values()
    ]
    assert all(later < earlier for earlier, later in pairwise(gaps)), gaps
    assert next(iter(brackets.values())).reason
    for found in brackets.values():
        if not found.reason:
            assert abs(float(found.forward) - exact) < LIMIT * float(found.forward_error)
            assert abs(float(found.reverse) - exact) < LIMIT * float(found.reverse_error)


def draw(brackets: dict[int, Bracket], exact: Tensor, path: Path) -> Path:
    with new_figure(path, size=(8.5, 3.8)) as figure:
        paths, ends = figure.subplots(1, 2, width_ratios=(1.5, 1))
        for (count, found), colour in zip(brackets.items(), PALETTE, strict=False):
            truth = interpolated(exact, found.betas)
            for runs, line in ((found.forward_paths, "-"), (found.reverse_paths, "--")):
                above = runs - truth[:, None]
                mean, spread = above.mean(1), above.std(1)
                label = f"{count:,} temperatures" if line == "-" else None
                paths.plot(found.betas, mean, color=colour, linestyle=line, linewidth=1.4, label=label)
                paths.fill_between(
                    found.betas, mean - spread, mean + spread, color=colour, alpha=0.12, linewidth=0
                )
        paths.axhline(0, color="black", linewidth=0.8)
        paths.set_yscale("symlog", linthresh=1, linscale=1)
        paths.set_xlim(0, 1)
        paths.set_ylim(bottom=-100)  # room for the legend
        paths.set_xlabel("inverse temperature beta")
        paths.set_ylabel("log weights less exact log Z at beta (nats)")
        paths.set_title("Runs forward (lines) and back (dashes): mean and one deviation")
        paths.legend(loc="lower left", ncols=2)
        for side, colour, shift, mark in (
            ("forward", PALETTE[0], 0.93, "^"),
            ("reverse", PALETTE[1], 1.07, "v"),
        ):
            values = [float(getattr(found, side)) for found in brackets.values()]
            errors = [float(getattr(found, f"{side}_error")) for found in brackets.values()]
            at = [shift * count for count in brackets]
            ends.errorbar(at, values, errors, color=colour, fmt=mark, markersize=5, capsize=2, label=side)
        ends.axhline(float(exact[-1]), color="black", linewidth=0.8, label="exact")
        ends.set_xscale("log")
        ends.set_xlabel("temperatures")
        ends.set_ylabel("log Z (nats)")
        ends.set_title("What they say, with standard errors")
        ends.legend()
    return path


def interpolated(exact: Tensor, betas: Tensor) -> Tensor:
    """Exact values, known on an even grid of beta, at other beta; linearly."""
    at = betas * (len(exact) - 1)
    left = at.long().clamp(max=len(exact) - 2)
    return torch.lerp(exact[left], exact[left + 1], at - left)


if __name__ == "__main__":
    main()
