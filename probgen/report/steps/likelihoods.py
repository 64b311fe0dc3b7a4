"""Bits/dim of digits that were not learnt from, and where the DDPM's bound is lost."""

from __future__ import annotations

from functools import partial
from typing import Any

from probgen import DDPM, VAE, ELBOEstimate, Estimate, ImportanceWeighted, Quantised, evidence
from probgen.core import Estimator, describe
from probgen.diagnostics.plots import plot_terms
from probgen.report.record import Record
from probgen.report.steps.settings import Settings

ROWS = 256  # of a bound side by side in the network: what the processor's cache holds
FILES = ["ddpm_terms.png"]


def estimate_evidence(record: Record, vae: VAE, ddpm: DDPM, held_out: Quantised, settings: Settings) -> None:
    """Three estimates with their errors, what kind of number each is, and whether it can be trusted."""
    plan: list[tuple[Any, Estimator]] = [
        (vae, ImportanceWeighted(settings.num_samples)),
        (vae, ELBOEstimate()),
        (ddpm, ELBOEstimate(settings.num_bounds, batch_size=ROWS)),
    ]
    estimates = [evidence(program, estimator, held_out, progress=True) for program, estimator in plan]
    for (program, estimator), estimate in zip(plan, estimates, strict=True):
        bits, error = estimate.bits_per_dim()
        quality = f"{bits:.3f} ± {error:.3f} bits/dim"
        record.row(program, estimator, estimate.cost, quality, _trust(estimate), bits)
        if not estimate.trusted:
            record.advise(f"{describe(program)} by {describe(estimator)}: {estimate.reason}")
    terms = estimates[-1].terms
    assert terms is not None
    section = record.section("Where the bound is lost")
    section.plot(
        record.drawn("ddpm_terms.png", partial(plot_terms, terms, title="DDPM on held-out digits")),
        f"Nats lost at each of the {len(terms.names)} steps of the DDPM's chain.",
        "The DDPM's bound on held-out digits, term by term: the KL of each step of the chain, in nats a digit.",
    )


def _trust(estimate: Estimate) -> str:
    if not estimate.trusted:
        return "not to be trusted"
    return f"{estimate.kind}, Monte Carlo ± {estimate.monte_carlo_error:.2g} nats"
