"""Half of a digit is hidden: the fitted DDPM is one site of a larger program, and that program is conditioned."""

from __future__ import annotations

import inspect
import textwrap
import warnings
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor

from probgen import DDPM, DataSets, GuidedSDE, Posterior, Prior, Quantised, TwistedSMC, infer, summary
from probgen.core import Engine, describe
from probgen.diagnostics.image_posterior import plot_image_posterior
from probgen.priors.particles import CollapsedWarning
from probgen.report.record import Record
from probgen.report.steps.settings import Settings

NOISE, LEVEL, NUM_RUNS = 0.2, 0.9, 4
MAX_R_HAT, MAX_GAP = 1.1, 0.1
FILES = ["hidden_guided_sde.png", "hidden_twisted_smc.png"]


def complete_digits(record: Record, ddpm: DDPM, held_out: Quantised, settings: Settings) -> None:
    """p(x | y) of each digit x, y its upper half seen with noise, by an approximation and by particles."""
    truth = held_out[torch.arange(settings.num_hidden_digits)]
    half = truth.shape[-2] // 2
    y = truth[..., :half, :] + NOISE * torch.randn_like(truth[..., :half, :])

    def upper_half_seen() -> None:
        x = pyro.sample("x", Prior(ddpm))
        pyro.sample("y", dist.Normal(x[..., :half, :], NOISE).to_event(3))

    section = record.section("What is hidden")
    section.prose(
        f"The lower half of held-out digits is hidden, the upper half seen with noise of sd {NOISE}. The DDPM is the "
        "prior of a three-line program and is conditioned without being fitted again. The first engine bends its "
        "reverse SDE and stays an approximation, the second weighs particles and becomes exact as they grow in number."
    )
    section.code(textwrap.dedent(inspect.getsource(upper_half_seen)))
    seen = torch.cat([y, torch.full_like(truth[..., half:, :], torch.nan)], -2)
    steps = settings.guided_steps
    engines: dict[str, Engine] = {
        "guided_sde": GuidedSDE(steps=steps),
        "twisted_smc": TwistedSMC(particles=settings.num_particles, steps=steps),
    }
    alt = f"A column for each of {len(truth)} digits: the truth, its noisy upper half, draws, mean and sd."
    pictures = []
    for name, engine in engines.items():
        posterior = _condition(upper_half_seen, engine, y, settings.num_completions)
        found = judge(posterior, truth, half)
        tell(record, ddpm, engine, posterior, found)
        draw = partial(plot_image_posterior, truth, seen, posterior.flat("x"))
        pictures.append((record.drawn(f"hidden_{name}.png", draw), alt, f"`{engine}`. {found}."))
    section.pictures(pictures)


def _condition(program: Callable[[], None], engine: Engine, y: Tensor, num_draws: int) -> Posterior:
    """All digits side by side; that weights collapsed is told by the evidence too, and looked at there."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", CollapsedWarning)
        data = DataSets({"y": y})
        return infer(program, engine, data=data, num_draws=num_draws, num_chains=NUM_RUNS, progress=True)


@dataclass(frozen=True)
class Verdict:
    """Of the hidden pixels alone: worst R-hat, smallest effective sample size, coverage of central intervals."""

    r_hat: float
    ess: float
    coverage: float

    def __str__(self) -> str:
        return f"Worst R-hat {self.r_hat:.2f}, least ESS {self.ess:.0f}, {self.held}"

    @property
    def held(self) -> str:
        """What the intervals hold, in words."""
        return f"{LEVEL:.0%} intervals hold {self.coverage:.0%} of the hidden pixels"


def judge(posterior: Posterior, truth: Tensor, half: int) -> Verdict:
    """R-hat and ESS of independent runs by ArviZ, as if they were chains, and how often intervals hold the truth."""
    hidden = posterior["x"][..., half:, :]
    as_chains = replace(
        posterior, draws={"hidden": hidden}, kind="mcmc", dims={}, coords={}, stats={}, target=None
    )
    table = summary(as_chains).table
    tail = (1 - LEVEL) / 2
    low, high = (hidden.flatten(0, 1).quantile(q, dim=0) for q in (tail, 1 - tail))
    inside = (truth[..., half:, :] >= low) & (truth[..., half:, :] <= high)
    return Verdict(float(table["r_hat"].max()), float(table["ess_bulk"].min()), float(inside.double().mean()))


def tell(record: Record, ddpm: DDPM, engine: Engine, posterior: Posterior, found: Verdict) -> None:
    """A row of the table, and advice where it is needed."""
    name, evidence = describe(engine), posterior.evidence
    diagnosis = f"R-hat {found.r_hat:.2f}, ESS {found.ess:.0f}; {posterior.guarantee}"
    record.row(ddpm, engine, posterior.cost, found.held, diagnosis, found.coverage)
    if evidence is not None and not evidence.trusted:
        record.advise(f"Hidden halves by {name}: {evidence.reason}")
    if posterior.kind == "weighted" and found.r_hat > MAX_R_HAT:
        record.advise(
            f"Hidden halves by {name}: its {NUM_RUNS} runs differ (R-hat {found.r_hat:.2f}), as where one upper half "
            "belongs to several digits; more draws, or more particles, would settle their shares."
        )
    if found.coverage < LEVEL - MAX_GAP:
        record.advise(
            f"Hidden halves by {name}: {found.held}. The fitted prior is narrower than digits are, or it is chance: "
            "pixels of one digit go together, and few digits tell little (examples/inpainting.py takes twenty)."
        )
