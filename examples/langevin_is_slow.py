"""Claim: Langevin dynamics on the law of the data itself does not find the weights of its modes; noise levels do.

    python examples/langevin_is_slow.py

Two modes far apart hold 80 % and 20 % of the mass. With the exact score and equal numbers of score calls, plain
Langevin leaves each draw in the mode it fell into, which depends on where it started; annealed Langevin and the reverse
SDE start where there is one mode. Checked: the weight found by plain Langevin is off by more than 0.1 and 20 standard
errors, and each of the others is within 4.5 standard errors and 0.02 of the truth.
"""

from __future__ import annotations

import math
from pathlib import Path

import torch
from torch import Tensor

from probgen import GaussianMixture, ReverseSDE, infer
from probgen.diagnostics.densities import exact_density
from probgen.diagnostics.flow_plots import draw_density
from probgen.diagnostics.mesh import Mesh
from probgen.diagnostics.plots import PALETTE, new_figure
from probgen.inference.annealed_langevin import AnnealedLangevin
from probgen.randomness import Noise

STEPS_PER_LEVEL = 2
LEFT_OVER = 0.02  # what discretisation may cost, in weight


def main(
    folder: str | Path = "runs/langevin_is_slow", num_draws: int = 10_000, num_calls: int = 601
) -> dict[str, float]:
    print(__doc__)
    mixture = two_modes()
    annealed = AnnealedLangevin(num_levels=num_calls // STEPS_PER_LEVEL, steps_per_level=STEPS_PER_LEVEL)
    draws = {"plain Langevin": langevin(mixture, num_draws, num_calls)}
    for name, engine in (("annealed Langevin", annealed), ("reverse SDE", ReverseSDE(steps=num_calls - 1))):
        posterior = infer(mixture, engine, num_draws=num_draws)
        assert posterior.cost.network_calls == num_calls
        draws[name] = posterior.flat("x")
    weights = {name: weight_of_first(mixture, x) for name, x in draws.items()}
    for name, (weight, error) in weights.items():
        print(f"{name:<18} weight of the heavier mode {weight:.4f} +- {error:.4f} (truth {truth(mixture)})")
        off = abs(weight - truth(mixture))
        if name == "plain Langevin":
            assert off > max(0.1, 20 * error)
        else:
            assert off < 4.5 * error + LEFT_OVER
    print(draw(mixture, draws, weights, num_calls, Path(folder) / "langevin_is_slow.png"))
    return {name: weight for name, (weight, _) in weights.items()}


def two_modes() -> GaussianMixture:
    covariances = torch.tensor([[[0.3, 0.1], [0.1, 0.2]], [[0.2, -0.1], [-0.1, 0.4]]], dtype=torch.float64)
    locs = torch.tensor([[-2.5, -1.0], [3.0, 1.5]], dtype=torch.float64)
    return GaussianMixture(torch.tensor([0.8, 0.2], dtype=torch.float64), locs, covariances)


def truth(mixture: GaussianMixture) -> float:
    return mixture.weights[0].item()


def langevin(mixture: GaussianMixture, num_draws: int, num_calls: int, step: float = 0.02) -> Tensor:
    """x <- x + h score + sqrt(2 h) z on the law of the data, noised as little as t_min is, from N(0, 3^2 I)."""
    t = torch.tensor([mixture.process().t_min], dtype=torch.float64)
    noise = Noise(0, 1, num_draws, (2,), torch.float64)
    x = 3 * noise(0)
    for k in range(1, num_calls + 1):
        x = x + step * mixture.score(x, t) + math.sqrt(2 * step) * noise(k)
    return x


def weight_of_first(mixture: GaussianMixture, x: Tensor) -> tuple[float, float]:
    """The mean of P(first mode | x), and its standard error."""
    first = mixture.responsibilities(x)[:, 0]
    return first.mean().item(), (first.std() / math.sqrt(len(first))).item()


def draw(
    mixture: GaussianMixture,
    draws: dict[str, Tensor],
    weights: dict[str, tuple[float, float]],
    num_calls: int,
    path: Path,
) -> Path:
    mesh = Mesh((-5.5, -5.5), (5.5, 5.5), 256)
    with new_figure(path, size=(10.5, 3.2)) as figure:
        *panels, bars = figure.subplots(1, len(draws) + 1, width_ratios=(*[1] * len(draws), 1.1))
        for panel, (name, x) in zip(panels, draws.items(), strict=True):
            draw_density(panel, mesh, exact_density(mixture)(mesh, mixture.process().t_min))
            panel.plot(*x[:500].unbind(1), ".", color=PALETTE[1], markersize=2.5, markeredgewidth=0)
            panel.set_title(name)
            panel.set_xticks((-4, -2, 0, 2, 4))
            panel.set_xlabel("x[0]")
        panels[0].set_ylabel("x[1]")
        value, error = zip(*weights.values(), strict=True)
        bars.barh(range(len(value)), value, xerr=error, color=PALETTE[0], height=0.6)
        bars.axvline(truth(mixture), color="black", linestyle="--", linewidth=1)
        bars.set_title("dashed: the truth")
        bars.set_yticks(range(len(value)), [name.replace(" ", "\n", 1) for name in weights])
        bars.invert_yaxis()
        bars.set_xlim(0, 1)
        bars.grid(visible=False, axis="y")
        bars.set_xlabel("weight of the heavier mode, ± 1 s.e.")
        figure.suptitle(
            f"{num_calls} calls of the exact score each: 500 draws over the density of the data",
            x=0.01,
            ha="left",
            fontsize=10,
        )
    return path


if __name__ == "__main__":
    main()
