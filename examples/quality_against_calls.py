"""Claim: with the exact score every solver comes down to what exact draws differ by; the smooth ones need few calls.

    python examples/quality_against_calls.py

Every engine that is found to serve a diffusion draws from one mixture on the plane, at several budgets of network
calls. Quality is the sliced Wasserstein distance to exact draws, beside its floor: that of two sets of exact draws.
Checked: at the largest budget each engine is closer than at its smallest, or at the floor; the best is at the floor;
with about twenty calls the best deterministic solver is closer than the reverse SDE.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import MISSING, Field, fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from probgen import DDPM, VP, Ancestral, Batch, GaussianMixture, infer
from probgen.core import Engine
from probgen.diagnostics.plots import PALETTE, new_figure
from probgen.discovery import methods
from probgen.dynamics import FlowEngine
from probgen.randomness import forked_rng

BUDGETS = (5, 10, 20, 50, 100, 200, 500)
DETERMINISTIC = ("DDIM", "DPMSolver", "ProbabilityFlowODE")
SETTINGS = {"AnnealedLangevin": {"steps_per_level": 1}}
MARKERS = "os^vD*PX<>h"
COLOURS = (*PALETTE, "0.6")


def main(
    folder: str | Path = "runs/quality_against_calls",
    num_draws: int = 10_000,
    budgets: Sequence[int] = BUDGETS,
) -> dict[str, list[tuple[int, float]]]:
    print(__doc__)
    mixture = GaussianMixture.example(dim=2).float()
    exact, *others = (exact_draws(mixture, num_draws, seed) for seed in range(6))
    floor = sorted(sliced_wasserstein(exact, other) for other in others)[-1]
    print(f"floor: {floor:.4f}, the largest of 5")
    curves = {
        name: sorted(
            measure(program, engine, exact) for engine, program in at_budgets(cls, mixture, exact, budgets)
        )
        for name, cls in methods("inference").items()
        if serves(cls, mixture)
    }
    for name, points in curves.items():
        print(f"{name:<20}" + "  ".join(f"{calls:>4} {distance:.4f}" for calls, distance in points))
    check(curves, floor)
    print(draw(curves, floor, num_draws, Path(folder) / "quality_against_calls.png"))
    return curves


def serves(engine: type, mixture: GaussianMixture) -> bool:
    """Engines that carry noise to data, and nothing else to start from; ancestral sampling does so along a chain."""
    if engine is Ancestral:
        return True
    from_noise = issubclass(engine, FlowEngine) and not any(is_required(field) for field in fields(engine))
    return from_noise and bool(engine().supports(mixture))


def is_required(field: Field[Any]) -> bool:
    """Whether an engine cannot be made without it."""
    return field.default is MISSING and field.default_factory is MISSING


def at_budgets(
    engine: type, mixture: GaussianMixture, data: Tensor, budgets: Sequence[int]
) -> list[tuple[Engine, Any]]:
    """The engine with the most steps, or levels, that each budget allows, and its program."""
    if engine is Ancestral:
        return [(Ancestral(), chain(mixture, data, budget)) for budget in budgets]
    knob = next(field.name for field in fields(engine) if field.name in ("steps", "num_levels"))

    def with_steps(steps: int) -> FlowEngine:
        return engine(**{knob: steps}, **SETTINGS.get(engine.__name__, {}))

    # Calls are linear in the steps: two counts say how.
    three, four = (infer(mixture, with_steps(k), num_draws=1).cost.network_calls for k in (3, 4))
    steps = dict.fromkeys(3 + (budget - three) // (four - three) for budget in budgets)
    return [(with_steps(k), mixture) for k in steps if k >= (2 if knob == "num_levels" else 1)]


def chain(mixture: GaussianMixture, data: Tensor, num_steps: int) -> DDPM:
    """The hierarchical chain whose network is the exact denoiser."""
    ddpm = DDPM(mixture, VP(), num_steps, event_shape=(2,), prediction="x0", last_step="x0hat")
    ddpm.calibrate(data)
    return ddpm


def exact_draws(mixture: GaussianMixture, num_draws: int, seed: int) -> Tensor:
    with forked_rng(seed):
        return mixture.model(Batch(num_rows=num_draws))


def measure(program: Any, engine: Engine, exact: Tensor) -> tuple[int, float]:
    posterior = infer(program, engine, num_draws=len(exact), seed=1)
    return posterior.cost.network_calls, sliced_wasserstein(posterior.flat("x"), exact)


def sliced_wasserstein(a: Tensor, b: Tensor, num_directions: int = 32) -> float:
    """The mean over directions of the plane of the 1-Wasserstein distance of the projections, in the unit of x."""
    angle = torch.arange(num_directions) * (torch.pi / num_directions)
    directions = torch.stack([angle.cos(), angle.sin()]).to(a)
    return ((a @ directions).sort(0).values - (b @ directions).sort(0).values).abs().mean().item()


def check(curves: dict[str, list[tuple[int, float]]], floor: float) -> None:
    for name, points in curves.items():
        assert points[-1][1] < max(points[0][1], 1.5 * floor), f"{name} does not improve"
    assert min(points[-1][1] for points in curves.values()) < 1.5 * floor
    few = {name: min(d for calls, d in points if calls <= 21) for name, points in curves.items()}
    assert min(few[name] for name in DETERMINISTIC if name in few) < few["ReverseSDE"]


def draw(curves: dict[str, list[tuple[int, float]]], floor: float, num_draws: int, path: Path) -> Path:
    with new_figure(path, size=(7.5, 4.2)) as figure:
        panel = figure.add_subplot()
        for i, (name, points) in enumerate(curves.items()):
            panel.plot(
                *zip(*points, strict=True),
                color=COLOURS[i % len(COLOURS)],
                marker=MARKERS[i % len(MARKERS)],
                markersize=4,
                linewidth=1.2,
                linestyle="-" if name in DETERMINISTIC else "--",
                label=name,
            )
        panel.axhspan(0, floor, color="0.9", linewidth=0, label="between two sets of exact draws")
        panel.set_ylim(0.3 * floor, 1.2)  # what is above is no sample of anything
        panel.set_xscale("log")
        panel.set_yscale("log")
        panel.set_xticks(BUDGETS, [str(budget) for budget in BUDGETS])
        panel.minorticks_off()
        panel.set_xlabel("network calls a draw")
        panel.set_ylabel("sliced Wasserstein distance to exact draws (unit of x)")
        panel.set_title(
            f"Exact score of a mixture on the plane, {num_draws:,} draws; solid lines: deterministic solvers"
        )
        panel.legend(loc="upper left", bbox_to_anchor=(1.0, 1.0))
    return path


if __name__ == "__main__":
    main()
