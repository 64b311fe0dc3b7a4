"""Claim: the score points uphill at every level of noise; as noise grows, its hills merge into one.

    python examples/score_field.py

Checked: score p = grad p on a mesh, to a millionth; the number of peaks of the density falls with t, from one a
component to one; a score with a slip in it (no alpha on the means) fails the same check.
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from probgen import GaussianMixture
from probgen.diagnostics.densities import exact_density, on_mesh
from probgen.diagnostics.flow_plots import draw_density
from probgen.diagnostics.fokker_planck import balance_of_score
from probgen.diagnostics.mesh import Mesh
from probgen.diagnostics.plots import new_figure

TIMES = (0.02, 0.1, 0.25, 0.6)


def main(folder: str | Path = "runs/score_field", num_points: int = 128, num_arrows: int = 18) -> Path:
    print(__doc__)
    mixture = GaussianMixture.example(dim=2)
    wide = Mesh((-7.0, -7.0), (7.0, 7.0), num_points)
    density = exact_density(mixture)
    peaks = []
    for t in TIMES:
        found = balance_of_score(wide, density, lambda mesh, t: on_mesh(mixture, mixture.score, mesh, t), t)
        slipped = balance_of_score(wide, density, lambda mesh, t: slip(mixture, mesh, t), t)
        peaks.append(count_peaks(density(wide.refined(), t)))
        print(
            f"t = {t:.2f}: residual {found.residual:.1e} (with the slip {slipped.residual:.1e}), {peaks[-1]} peaks"
        )
        assert found.residual < 1e-6 < 1e-3 < slipped.residual
    assert peaks == sorted(peaks, reverse=True)
    assert (peaks[0], peaks[-1]) == (3, 1)
    return draw(mixture, Path(folder) / "score_field.png", num_arrows)


def slip(mixture: GaussianMixture, mesh: Mesh, t: float) -> Tensor:
    """The score of the noised mixture whose means were not shrunk."""
    alpha = mixture.process().alpha(torch.tensor([t], dtype=torch.float64))
    wrong = GaussianMixture(mixture.weights, mixture.locs / alpha, mixture.covariances, mixture.process())
    return on_mesh(wrong, wrong.score, mesh, t)


def count_peaks(density: Tensor) -> int:
    """Points above all their eight neighbours, and above a thousandth of the highest."""
    shifted = [density.roll((i, j), (0, 1)) for i in (-1, 0, 1) for j in (-1, 0, 1) if (i, j) != (0, 0)]
    above = torch.stack([density > other for other in shifted]).all(0)
    return int((above & (density > 1e-3 * density.max())).sum())


def draw(mixture: GaussianMixture, path: Path, num_arrows: int) -> Path:
    mesh, coarse = Mesh((-3.5, -3.5), (3.5, 3.5), 256), torch.linspace(-3.2, 3.2, num_arrows).double()
    x = torch.cartesian_prod(coarse, coarse)
    with new_figure(path, size=(2.6 * len(TIMES), 3.2)) as figure:
        panels = figure.subplots(1, len(TIMES), sharey=True)
        for panel, time in zip(panels, TIMES, strict=True):
            t = torch.tensor([time], dtype=torch.float64)
            sigma = mixture.process().sigma(t)
            draw_density(panel, mesh, exact_density(mixture)(mesh, time))
            score = mixture.score(x, t)
            arrow = score / (1 + score.norm(dim=1, keepdim=True))  # a long one is not shown longer
            panel.quiver(*x.unbind(1), *arrow.unbind(1), color="0.15", scale=20, width=0.005, pivot="tail")
            panel.set_title(f"t = {time:g}, sigma = {sigma.item():.2f}")
            panel.set_xlabel("x[0]")
        panels[0].set_ylabel("x[1]")
        figure.suptitle(
            "Score over its density: arrows show score / (1 + |score|); shaded, the smallest regions that hold 99, 90, "
            "60 and 30 % of the mass",
            x=0.01,
            ha="left",
            fontsize=9,
        )
    print(path)
    return path


if __name__ == "__main__":
    main()
