"""Claim: learned at one noise level, a score is wrong where there are no data; many levels are right wherever one is.

    python examples/score_error.py

A small network learns the score by denoising score matching, once at a small noise level alone and once at all levels
of a process. Its error is looked at on all of the plane, against the log density of the data at that small level.
Checked: where the density is below e^-10 of its largest value, the network of one level errs by more than three times
what it errs where that is above e^-3; there the network of many levels, asked at a high noise level, at which sampling
crosses such places, errs by less than half of that.
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from probgen import GaussianMixture, TimeMLP, fit
from probgen.core import Batch
from probgen.diagnostics.plots import PALETTE, new_figure
from probgen.fitting import Optim
from probgen.models.score_sde import ScoreSDE
from probgen.objectives.denoising_score_matching import DenoisingScoreMatching
from probgen.processes import VP
from probgen.randomness import forked_rng

SMALL, MIDDLE, LARGE = 0.05, 0.2, 0.5
FAR, NEAR = -10.0, -3.0


def main(
    folder: str | Path = "runs/score_error", num_steps: int = 1500, width: int = 64, num_data: int = 20_000
) -> dict[str, float]:
    print(__doc__)
    mixture = GaussianMixture.example(dim=2).float()
    with forked_rng(0):
        data = mixture.model(Batch(num_rows=num_data))
        x = 8 * torch.rand(4000, 2) - 4
    depth = log_density(mixture, x, SMALL)
    curves = {}
    for name, objective, levels in (
        ("one level", DenoisingScoreMatching(t=SMALL), (SMALL,)),
        ("many levels", DenoisingScoreMatching(), (SMALL, MIDDLE, LARGE)),
    ):
        network = trained(data, objective, num_steps, width)
        for t in levels:
            curves[f"{name}, t = {t:g}"] = relative_error(mixture, network, x, t)
    far = {name: error[depth < FAR].median().item() for name, error in curves.items()}
    near = {name: error[depth > NEAR].median().item() for name, error in curves.items()}
    for name in curves:
        print(f"{name:<22} median relative error {near[name]:.3f} near the data, {far[name]:.3f} far away")
    alone, large = f"one level, t = {SMALL:g}", f"many levels, t = {LARGE:g}"
    assert far[alone] > 3 * near[alone]
    assert far[large] < far[alone] / 2
    print(draw(depth, curves, Path(folder) / "score_error.png"))
    return far


def trained(data: Tensor, objective: DenoisingScoreMatching, num_steps: int, width: int) -> ScoreSDE:
    with forked_rng(1):
        program = ScoreSDE(TimeMLP((2,), width=width, num_blocks=2), VP())
    optim = Optim(lr=2e-3, schedule="cosine", ema_decay=0.99)
    fit(program, data, objective, num_steps=num_steps, batch_size=512, optim=optim, progress=False)
    return program.eval()


def log_density(mixture: GaussianMixture, x: Tensor, t: float) -> Tensor:
    """log p_t, less its largest value there."""
    value = mixture.log_prob(x, torch.tensor([t]))
    return value - value.max()


def relative_error(mixture: GaussianMixture, program: ScoreSDE, x: Tensor, t: float) -> Tensor:
    """|s - score| / |score| at each x."""
    at = torch.tensor([t])
    alpha, sigma = program.process().alpha(at), program.process().sigma(at)
    with torch.no_grad():
        learned = (alpha * program.denoise(x, at) - x) / sigma.square()
    exact = mixture.score(x, at)
    return (learned - exact).norm(dim=1) / exact.norm(dim=1)


def draw(depth: Tensor, curves: dict[str, Tensor], path: Path, width: float = 5.0) -> Path:
    edges = torch.arange(-60.0, 0.1, width)
    bins = [(depth > low) & (depth <= low + width) for low in edges[:-1]]
    colours = (PALETTE[1], PALETTE[0], PALETTE[0], PALETTE[0])
    with new_figure(path, size=(6.5, 4.0)) as figure:
        panel = figure.add_subplot()
        styles = zip(curves.items(), colours, ("-", "-", "--", ":"), strict=True)
        for (name, error), colour, line in styles:
            quartiles = torch.stack([error[rows].quantile(torch.tensor([0.25, 0.5, 0.75])) for rows in bins])
            low, middle, high = quartiles.mT
            at = edges[:-1] + width / 2
            panel.plot(at, middle, color=colour, linestyle=line, linewidth=1.4, label=name)
            if colour == PALETTE[1] or line == ":":  # one band a network is enough
                panel.fill_between(at, low, high, color=colour, alpha=0.12, linewidth=0)
        panel.set_yscale("log")
        panel.set_xlim(edges[-1].item(), edges[0].item())
        panel.set_xlabel(f"log density of the data (noised to t = {SMALL:g}) less its maximum (nats)")
        panel.set_ylabel("relative error of the score")
        panel.set_title(
            "Scores learned at one noise level and at many: medians over a square, two with quartiles"
        )
        panel.legend()
    return path


if __name__ == "__main__":
    main()
