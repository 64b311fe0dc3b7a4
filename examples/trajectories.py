"""Claim: the ODE and the SDE take noise to data along other paths, and have the same law at every time.

    python examples/trajectories.py

Checked: at each of ten times the particles of both come from the exact density (chi-square); on the line the ODE keeps
the order of its particles, because paths of an ODE never cross, and the SDE forgets it.
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from probgen import GaussianMixture
from probgen.diagnostics.chi_square import chi_square
from probgen.diagnostics.densities import exact_density
from probgen.diagnostics.flow_plots import plot_flow
from probgen.diagnostics.mesh import Mesh
from probgen.dynamics.paths import trajectories
from probgen.randomness import forked_rng

LIMIT = 4.5


def main(
    folder: str | Path = "runs/trajectories", num_particles: int = 5000, num_steps: int = 200
) -> dict[str, Path]:
    print(__doc__)
    pictures = {}
    for dim, space in ((1, "line"), (2, "plane")):
        mixture = GaussianMixture.example(dim)
        density, mesh = exact_density(mixture), Mesh((-5.0,) * dim, (5.0,) * dim, 512 if dim == 1 else 256)
        with forked_rng(0):
            noise = torch.randn(num_particles, dim, dtype=torch.float64)
        runs = {}
        for name, a in (("ODE, a = 0", 0.0), ("SDE, a = 1", 1.0)):
            runs[name] = trajectories(
                mixture, noise, t_from=1.0, t_to=0.01, num_steps=num_steps, stochasticity=a
            )
            worst = largest_z(mesh, density, *runs[name])
            kept = rank_correlation(noise[:, 0], runs[name][1][-1, :, 0])
            print(f"{space}, {name}: largest z of 10 times {worst:.1f}; rank correlation of x[0] {kept:.3f}")
            assert worst <= LIMIT, f"{name} left the density"
            if dim == 1:
                assert kept > 0.999 if a == 0 else kept < 0.3
        pictures[space] = plot_flow(
            density,
            Mesh((-3.5,) * dim, (3.5,) * dim, 256),
            runs,
            Path(folder) / f"{space}.png",
            title="From noise to data, with the same density at every time",
        )
        print(f"{pictures[space]}\n")
    return pictures


def largest_z(mesh: Mesh, density, times: Tensor, states: Tensor) -> float:
    some = range(len(times) // 10, len(times), len(times) // 10)
    return max(chi_square(mesh, density(mesh, times[k].item()), states[k]).z for k in some)


def rank_correlation(a: Tensor, b: Tensor) -> float:
    """Spearman's: of the ranks."""
    return torch.corrcoef(torch.stack([value.argsort().argsort().double() for value in (a, b)]))[0, 1].item()


if __name__ == "__main__":
    main()
