"""Images: the same fitted DDPM by four engines, the VAE by one."""

from __future__ import annotations

from functools import partial
from typing import Any

from torch import Tensor

from probgen import DDPM, VAE, Ancestral, DPMSolver, ProbabilityFlowODE, ReverseSDE, infer
from probgen.core import Engine, describe
from probgen.diagnostics.plots import image_grid
from probgen.report.page import Section
from probgen.report.record import Record
from probgen.report.steps.settings import SHOWN, Settings
from probgen.report.steps.yardstick import Yardstick

MAX_FRECHET = 3.0
PICTURES = {
    "data": "Real digits, dequantised",
    "ancestral": "DDPM, ancestral sampling",
    "reverse_sde": "DDPM, reverse SDE",
    "probability_flow_ode": "DDPM, probability-flow ODE",
    "dpm_solver": "DDPM, 20 network calls of DPM-Solver",
    "vae": "VAE, ancestral sampling",
}
REMEDIES = {
    "DDPM": "fit longer, or a wider network",
    "VAE": "one Gaussian pixel beside another is blurred and noisy whatever the fit; look at its latents instead",
}
FILES = [f"samples_{name}.png" for name in PICTURES]


def draw_images(
    record: Record, real: Tensor, vae: VAE, ddpm: DDPM, yardstick: Yardstick, settings: Settings
) -> None:
    """Grids of images, and how far each engine's are from real ones."""
    plan: list[tuple[str, Any, Engine]] = [
        ("ancestral", ddpm, Ancestral()),
        ("reverse_sde", ddpm, ReverseSDE(steps=settings.chain_steps // 2, method="heun", grid="quadratic")),
        ("probability_flow_ode", ddpm, ProbabilityFlowODE(steps=settings.ode_steps)),
        ("dpm_solver", ddpm, DPMSolver(steps=20)),
        ("vae", vae, Ancestral()),
    ]
    images = {"data": real}
    distances = {}
    for name, program, engine in plan:
        draws = infer(program, engine, num_draws=settings.num_images or yardstick.half_size, progress=True)
        images[name] = draws.flat("x")
        distances[name] = distance = yardstick(images[name])
        quality, diagnosis = f"Fréchet {distance:.1f} x floor", f"{draws.guarantee} law"
        record.row(program, engine, draws.cost, quality, diagnosis, distance)
        if distance > MAX_FRECHET:
            record.advise(_too_far(program, engine, distance))
    show(record, record.section("Images"), images, distances)


def show(record: Record, section: Section, images: dict[str, Tensor], distances: dict[str, float]) -> None:
    """The grids side by side."""
    section.prose(
        "One fitted DDPM, drawn from by four engines that differ in one argument, beside real digits and draws of the "
        "VAE. Fréchet distances are in the features of a small classifier, in units of the distance between two halves "
        "of the real digits."
    )
    pictures = []
    for name, values in images.items():
        path = record.drawn(f"samples_{name}.png", partial(image_grid, values[:SHOWN]))
        far = f": {distances[name]:.1f} x the floor." if name in distances else "."
        pictures.append((path, f"Grid of 100 images of 8 x 8. {PICTURES[name]}.", PICTURES[name] + far))
    section.pictures(pictures)


def _too_far(program: Any, engine: Engine, distance: float) -> str:
    return (
        f"Images of {describe(program)} by {describe(engine)} lie {distance:.1f} times as far from real digits as real "
        f"digits from one another ({MAX_FRECHET:.0f} times would do): {REMEDIES[describe(program)]}."
    )
