"""Claim: a network fitted without its normaliser is the law of the data, and six kernels draw that law.

    python examples/energy_landscape.py

An energy is fitted to two moons by sliced score matching. Checked: by quadrature its negative log-likelihood is within
0.05 nats of the entropy of the moons; draws of each kernel agree with it in a chi-square over cells that counts chains
for what they are worth, and those of the same energy at twice the temperature do not.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from matplotlib.axes import Axes
from torch import Tensor

from probgen import EBM, Optim, SlicedScoreMatching, fit, infer
from probgen.core import Cost, Posterior
from probgen.diagnostics.chain_chi_square import ChainChiSquare, chain_chi_square
from probgen.diagnostics.landscape import Landscape, landscape
from probgen.diagnostics.mesh import Mesh
from probgen.diagnostics.plots import PALETTE, new_figure
from probgen.inference.hmc import HMC
from probgen.inference.mala import MALA
from probgen.inference.nuts import NUTS
from probgen.inference.parallel_tempering import ParallelTempering
from probgen.inference.ula import ULA
from probgen.inference.underdamped_langevin import UnderdampedLangevin
from probgen.models.energy import Energy
from probgen.planar import two_moons

MESH = Mesh((-8.0, -8.0), (8.0, 8.0), 256)
WINDOW = (-2.6, 2.6), (-1.9, 1.9)
SCALE, LIMIT = 0.14, 4.5
SHADES = ("#6baed6", "#85bcdc", "#9ecae1", "#b2d2e8", "#c6dbef", "#d4e4f4", "#e1edf8", "#eff6fc")
KERNELS = {
    "ULA": ULA(0.002, num_warmup=400, thin=30),
    "Underdamped Langevin": UnderdampedLangevin(0.05, num_warmup=200, thin=10),
    "MALA": MALA(num_warmup=100, thin=8),
    "HMC": HMC(num_warmup=60, num_steps=8),
    "NUTS": NUTS(num_warmup=40),
    "Parallel tempering": ParallelTempering(HMC(num_warmup=60, num_steps=6), num_temperatures=6),
}


def main(
    folder: str | Path = "runs/energy_landscape",
    num_steps: int = 3000,
    num_chains: int = 200,
    num_draws: int = 50,
) -> Path:
    print(__doc__)
    law = two_moons(SCALE)
    truth = Landscape(MESH, -law.log_prob(MESH.points).double().reshape(MESH.shape))
    ebm = fitted(law, num_steps)
    found = landscape(ebm, MESH)
    entropy, nll = (each.cross_entropy(truth.density) for each in (truth, found))
    print(
        f"negative log-likelihood {nll:.4f} nats, entropy of the moons {entropy:.4f}; log Z {found.log_partition:.3f}"
    )
    assert nll - entropy < 0.05, "the energy is another law than the data have"
    verdicts = {name: judged(ebm, name, found, num_chains, num_draws) for name in KERNELS}
    halved = Energy(lambda x: 0.5 * ebm.energy(x), (2,))
    hot = judged(halved, "Parallel tempering", found, num_chains, num_draws)
    for name, verdict in {**verdicts, "the last, half of E": hot}.items():
        print(
            f"{name:<22} z {verdict.z:5.1f}; worth {verdict.ess:6,.0f} independent draws, finds errors of "
            f"{verdict.detectable:.0%}"
        )
    assert all(verdict.z < LIMIT for verdict in verdicts.values()), "a kernel draws another law"
    assert hot.z > LIMIT, "twice the temperature goes unnoticed"
    paths = {name: trajectories(ebm, name) for name in KERNELS}
    path = draw(truth, found, paths, verdicts, nll - entropy, Path(folder) / "energy_landscape.png")
    print(path)
    return path


def fitted(law, num_steps: int) -> EBM:
    torch.manual_seed(0)
    ebm = EBM.mlp((2,), widths=(64, 64), base_scale=3.0)
    optim = Optim(lr=1e-2, schedule="cosine")
    fit(ebm, law.sample((20_000,)), SlicedScoreMatching(), num_steps=num_steps, batch_size=256, optim=optim)
    return ebm


def judged(program, name: str, found: Landscape, num_chains: int, num_draws: int) -> ChainChiSquare:
    chains = infer(program, KERNELS[name], num_draws=num_draws, num_chains=num_chains)["x"]
    return chain_chi_square(MESH, found.density, chains)


def trajectories(ebm: EBM, name: str) -> Tensor:
    """The first 30 draws of two chains that begin on either moon, `(chain, draw, 2)`; every transition counts."""
    starts = torch.tensor([[-1.4, 0.1], [1.4, -0.1]])[:, None].expand(2, 6, 2)  # one for each temperature
    init = Posterior({"x": starts}, "iid", "exact", "by hand", Cost())
    engine = KERNELS[name]
    engine = replace(engine, thin=5) if name in ("ULA", "Underdamped Langevin") else replace(engine, thin=1)
    return infer(ebm, engine, num_draws=30, num_chains=2, init=init, seed=1)["x"]


def draw(
    truth: Landscape,
    found: Landscape,
    paths: dict[str, Tensor],
    verdicts: dict[str, ChainChiSquare],
    gap: float,
    path: Path,
) -> Path:
    with new_figure(path, size=(10.5, 4.8)) as figure:
        panels = figure.subplots(2, 4, sharex=True, sharey=True)
        draw_energy(panels[0, 0], truth)
        panels[0, 0].set_title("Law of the data, -log p")
        drawn = draw_energy(panels[1, 0], found)
        panels[1, 0].set_title(f"Energy learnt, KL {gap:.3f} nats")
        for panel, (name, chains) in zip(panels[:, 1:].T.flatten(), paths.items(), strict=True):
            draw_energy(panel, found)
            for colour, chain in zip(("black", PALETTE[1]), chains, strict=True):
                x, y = chain.unbind(1)
                panel.plot(x, y, color=colour, linewidth=0.8, marker="o", markersize=1.8)
                panel.plot(x[0], y[0], "o", color="white", markeredgecolor=colour, markersize=5)
            panel.set_title(f"{name}, z = {verdicts[name].z:.1f}")
        for panel in panels.flat:
            panel.set_xlim(*WINDOW[0])
            panel.set_ylim(*WINDOW[1])
        for panel in panels[1]:
            panel.set_xlabel("x[0]")
        for panel in panels[:, 0]:
            panel.set_ylabel("x[1]")
        figure.colorbar(drawn, ax=panels, label="energy above its lowest point (nats)", shrink=0.8, pad=0.01)
        figure.suptitle(
            "Thirty draws of two chains by each kernel, the first one white (Langevin: every fifth step).\n"
            "z: chi-square of many chains over cells, against the law of the energy; above 4.5 it is another",
            x=0.01,
            ha="left",
            fontsize=9,
        )
    return path


def draw_energy(panel: Axes, found: Landscape) -> Any:
    """E above its lowest point, up to 8 nats."""
    height = found.energy - found.energy.min()
    x, y = (axis.numpy() for axis in MESH.axes)
    drawn = panel.contourf(x, y, height.T.numpy(), levels=range(9), colors=SHADES)
    panel.set_aspect("equal")
    panel.grid(visible=False)
    return drawn


if __name__ == "__main__":
    main()
