"""Claim: Fokker-Planck equation, probability flow and every SDE of the family move one density; backwards, the heat
equation blows up and the family does not.

    python examples/fokker_planck.py

Checked: residuals of the equations below a thousandth, chi-square tests of particles for a = 0, 1/2, 1, 2 forwards and
backwards, and that the same diagnostics fail a velocity without its 1/2; backwards the heat equation makes the finest
wave of a mesh grow as theory says and loses the density, which the family returns.
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from probgen import Batch, GaussianMixture
from probgen.diagnostics.backward_heat import BackwardHeat, backward_heat
from probgen.diagnostics.densities import exact_density
from probgen.diagnostics.flow_plots import plot_flow
from probgen.diagnostics.fokker_planck import fokker_planck
from probgen.diagnostics.mesh import Mesh
from probgen.dynamics.paths import trajectories
from probgen.processes import OTPath, over_event
from probgen.randomness import forked_rng


class NoHalf(GaussianMixture):
    """A denoiser whose score is twice as large: its velocity is f x - g^2 score."""

    def denoise(self, x_t: Tensor, t: Tensor) -> Tensor:
        alpha, sigma = (over_event(value(t), x_t) for value in (self.process().alpha, self.process().sigma))
        return (x_t + 2 * sigma**2 * self.score(x_t, t)) / alpha


def main(
    folder: str | Path = "runs/fokker_planck", num_particles: int = 20_000, num_steps: int = 150
) -> BackwardHeat:
    print(__doc__)
    for dim in (2, 1):
        mixture = GaussianMixture.example(dim)
        with forked_rng(0):
            data = mixture.model(Batch(num_rows=num_particles))
        found = fokker_planck(mixture, data, num_steps=num_steps)
        slipped = fokker_planck(NoHalf.example(dim), data, num_steps=num_steps, stochasticities=())
        print(f"{found}\n\nand without the half:\n{slipped}\n")
        assert found.ok
        assert not slipped.ok
    print(draw(mixture, data, num_steps, Path(folder) / "family.png"), "\n")
    back = backward_heat(GaussianMixture.example(1, OTPath()), data, t_from=0.4, t_to=0.3)
    print(back)
    assert abs(back.heat_growth / back.theory - 1) < 0.01
    assert back.family_error < 1e-6 < 1 < back.heat_error
    return back


def draw(mixture: GaussianMixture, data: Tensor, num_steps: int, path: Path) -> Path:
    """Two members of the family forwards, then the same two backwards."""
    runs = {}
    for (name, start), end in zip((("forward", 0.01), ("backward", 0.9)), (0.9, 0.01), strict=True):
        law = mixture.process().marginal(data[:50], torch.tensor([start], dtype=torch.float64))
        with forked_rng(2):
            x = law.loc + law.scale * torch.randn_like(law.loc)
        for a in (0.5, 2.0):
            runs[f"{name}, a = {a:g}"] = trajectories(
                mixture, x, t_from=start, t_to=end, num_steps=num_steps, stochasticity=a
            )
    mesh = Mesh((-3.5,), (3.5,), 256)
    return plot_flow(exact_density(mixture), mesh, runs, path, title="One density, moved by four equations")


if __name__ == "__main__":
    main()
