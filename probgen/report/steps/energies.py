"""Energies: two Boltzmann machines and a network complete half digits, and tell digits from letters."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from probgen import (
    AIS,
    EBM,
    HMC,
    RBM,
    DeepBoltzmannMachine,
    Energy,
    Gibbs,
    GibbsMoves,
    Optim,
    PersistentContrastiveDivergence,
    Posterior,
    Quantised,
    evidence,
    fit,
    infer,
    summary,
)
from probgen.core import Engine, describe
from probgen.data import binarise_threshold
from probgen.diagnostics.roc import plot_roc, roc
from probgen.diagnostics.unit_plots import plot_filters, plot_recall
from probgen.greedy import pretrain
from probgen.letters import letters
from probgen.objectives.smoothed_score_matching import SmoothedScoreMatching
from probgen.report.record import Record
from probgen.report.steps.settings import Settings

SHOWN, MAX_R_HAT = 10, 1.1
Picture = tuple[Path, str, str]
SMOOTHED = 0.3  # of pixels in [-1, 1]
FILES = ["completions.png", "rbm_filters.png", "roc.png"]


def complete_and_tell(record: Record, train: Quantised, held_out: Quantised, settings: Settings) -> None:
    """Fit the three, hide half of held-out digits from them, and ask how well they know letters for strangers."""
    machines: dict[str, Any] = {"RBM": RBM((8, 8)), "DBM": DeepBoltzmannMachine((8, 8)), "EBM": _network()}
    steps = settings.energy_steps
    _fit_machines(machines["RBM"], machines["DBM"], _binary(train), steps)
    optim = Optim(lr=2e-3, schedule="cosine")
    fit(machines["EBM"], train.all()[:, 0], SmoothedScoreMatching(SMOOTHED), num_steps=2 * steps, optim=optim)
    section = record.section("Energies")
    section.prose(
        "A restricted and a deep Boltzmann machine on binarised digits, and a network on grey ones, each an energy: "
        "low where digits are. The upper half of held-out digits is seen. The machines are told NaN for the rest, "
        "which Gibbs moves draw; of the network's energy the seen half is a part that stays, and Hamiltonian chains "
        "draw the other one. That none of the three has a normaliser hinders neither this nor telling digits from "
        "letters."
    )
    section.plot(
        record.drawn("completions.png", partial(_draw_completions, record, machines, held_out, settings)),
        f"{SHOWN} digits, their upper halves, and completions by an RBM, a DBM and an EBM: four draws and the mean.",
        "The lower half, drawn by each; the last column of each is the mean of all draws.",
    )
    section.pictures([_filters(record, machines["RBM"]), _strangers(record, machines, held_out)])
    _likelihood(record, machines, _binary(held_out), settings)


def _network() -> EBM:
    return EBM.mlp((8, 8), widths=(256, 256), base_scale=1.0)


def _binary(data: Quantised) -> Tensor:
    return binarise_threshold(data.levels[:, 0], data.num_levels)


def _fit_machines(rbm: RBM, dbm: DeepBoltzmannMachine, x: Tensor, steps: int) -> None:
    """Persistent chains; the deep one begins with its layers one by one."""
    optim = Optim(lr=0.01, schedule="cosine")
    rbm.set_rates(x)
    fit(rbm, x, PersistentContrastiveDivergence(GibbsMoves(5)), num_steps=steps, optim=optim)
    pretrain(dbm, x, PersistentContrastiveDivergence(GibbsMoves(5)), num_steps=steps // 2, optim=optim)
    fit(dbm, x, PersistentContrastiveDivergence(GibbsMoves(5)), num_steps=steps // 2, optim=optim)


# --- the hidden half -------------------------------------------------------------------------------------------


def _draw_completions(
    record: Record, machines: dict[str, Any], held_out: Quantised, settings: Settings, path: Path
) -> None:
    levels = held_out.levels[:SHOWN, 0]
    black, grey = _binary(held_out)[:SHOWN], held_out.all()[:SHOWN, 0]
    draws = {name: _by_gibbs(record, machines[name], black, settings) for name in ("RBM", "DBM")}
    draws["EBM"] = (_by_hmc(record, machines["EBM"], grey, settings) + 1) / 2
    truth = levels / (held_out.num_levels - 1)
    spread = {name: x[torch.randperm(len(x))] for name, x in draws.items()}  # neighbours in a chain are alike
    plot_recall(truth, _lower(truth, torch.nan), spread, path)


def _by_gibbs(record: Record, machine: Any, x: Tensor, settings: Settings) -> Tensor:
    engine = Gibbs(num_warmup=10 * settings.num_warmup, thin=10)
    data = {"x": _lower(x, torch.nan)}
    found = infer(machine, engine, data=data, num_draws=settings.num_draws, num_chains=4)
    draws = found.flat("x")
    _tell(record, machine, engine, found, found["x"][..., 4:, :], (draws.mean(0) - x)[:, 4:])
    return draws


def _by_hmc(record: Record, ebm: EBM, x: Tensor, settings: Settings) -> Tensor:
    """All lower halves side by side: their energies, given the upper ones, add up."""
    above = x[:, :4]

    def energy(below: Tensor) -> Tensor:
        whole = torch.cat([above.expand(*below.shape[:-3], *above.shape), below], dim=-2)
        return ebm.energy(whole.flatten(0, -3)).reshape(whole.shape[:-2]).sum(-1)

    engine = HMC(num_steps=8, num_warmup=settings.num_warmup)
    found = infer(Energy(energy, (len(x), 4, 8)), engine, num_draws=settings.num_draws, num_chains=4)
    below = found.flat("x")
    _tell(record, ebm, engine, found, found["x"], below.mean(0) - x[:, 4:])
    return torch.cat([above.expand(len(below), *above.shape), below], dim=-2)


def _lower(x: Tensor, value: float) -> Tensor:
    """x with a value in its lower half."""
    return torch.cat([x[:, :4], torch.full_like(x[:, 4:], value)], dim=1)


def _tell(
    record: Record, program: Any, engine: Engine, found: Posterior, hidden: Tensor, error: Tensor
) -> None:
    """A row of the table: how far the mean of the draws is from the truth, and whether chains agree."""
    chains = replace(found, draws={"hidden": hidden}, dims={}, coords={}, stats={}, target=None)
    table = summary(chains).table
    r_hat, ess = float(table["r_hat"].max()), float(table["ess_bulk"].min())
    mean = float(error.square().mean())
    quality = f"hidden pixels: squared error {mean:.3f}"
    record.row(program, engine, found.cost, quality, f"R-hat {r_hat:.2f}, ESS {ess:.0f}", mean)
    if r_hat > MAX_R_HAT:
        record.advise(
            f"Lower halves by {describe(program)}: chains differ (R-hat {r_hat:.2f}), as where an upper half belongs "
            "to several digits. Draw longer."
        )


# --- strangers, filters, log Z ---------------------------------------------------------------------------------


def _strangers(record: Record, machines: dict[str, Any], held_out: Quantised) -> Picture:
    """Is a letter's energy higher than a digit's? ROC curves of the three."""
    strangers = letters(len(held_out))
    curves = {
        "RBM": roc(
            machines["RBM"].free_energy(_binary(held_out)), machines["RBM"].free_energy(_binary(strangers))
        ),
        "DBM": roc(
            -machines["DBM"].log_weight(_binary(held_out)), -machines["DBM"].log_weight(_binary(strangers))
        ),
        "EBM": roc(
            machines["EBM"].energy(held_out.all()[:, 0]), machines["EBM"].energy(strangers.all()[:, 0])
        ),
    }
    record.note(roc={name: curve.auc for name, curve in curves.items()})
    path = record.drawn("roc.png", partial(plot_roc, curves, title="Energies of digits and of letters"))
    alt = "ROC curves of the energies of an RBM, a DBM and an EBM, digits against letters."
    found = ", ".join(f"{name} {curve.auc:.3f}" for name, curve in curves.items())
    return (
        path,
        alt,
        f"Held-out digits against printed letters of the same size: area under the curve {found}.",
    )


def _filters(record: Record, rbm: RBM) -> Picture:
    alt = "The weights between the pixels and each of 64 hidden units, as images."
    return (
        record.drawn("rbm_filters.png", partial(plot_filters, rbm)),
        alt,
        "What hidden units of the RBM look for.",
    )


def _likelihood(record: Record, machines: dict[str, Any], x: Tensor, settings: Settings) -> None:
    """log p of binarised digits, log Z between two numbers."""
    estimator = AIS(num_temperatures=settings.num_temperatures)
    for name in ("RBM", "DBM"):
        found = evidence(machines[name], estimator, x, progress=True)
        sign = "≥ " * (found.kind == "lower bound")
        quality = f"log p {sign}{found.mean:.2f} ± {found.mean_error:.2f} nats of pixels on or off"
        trust = (
            f"{found.kind}, log Z to {found.monte_carlo_error:.2g}" if found.trusted else "not to be trusted"
        )
        record.row(machines[name], estimator, found.cost, quality, trust, found.mean)
        if not found.trusted:
            record.advise(f"{describe(machines[name])} by AIS: {found.reason}")
