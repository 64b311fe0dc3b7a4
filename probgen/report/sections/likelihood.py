"""What estimators found: log p(x), and where a bound is lost."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

import torch

from probgen.core import Stepwise, Terms
from probgen.diagnostics.plots import plot_terms
from probgen.report.story import Story

_COLUMNS = ("estimate", "data", "nats a datum", "bits/dim", "Monte Carlo error", "kind", "trusted")


def tell(story: Story) -> None:
    """One row an estimate, the terms of each that has some, and the command for what is not there."""
    section = story.page.section("Likelihood")
    found = story.found.estimates
    estimator = "ELBOEstimate" if hasattr(story.found.program, "guide") else "ODELikelihood"
    command = f"probgen evidence {story.folder} {estimator} --data {story.data}"
    if not found:
        section.missing("No likelihood was estimated yet.", command)
        return
    section.table("log p(x) by each estimator", _COLUMNS, [_row(name, each) for name, each in found.items()])
    for name, each in found.items():
        if not each.get("trusted", True):
            story.page.problem(f"{name}: {each.get('reason') or 'this estimate is not to be trusted.'}")
        if terms := read_terms(each):
            story.plot(
                section,
                partial(plot_terms, terms, title=name),
                f"Nats that each of {len(terms.names)} terms of the bound loses or adds.",
                "The bound term by term: of a chain the KL of each step, in nats a datum.",
            )
    if isinstance(story.found.program, Stepwise) and not any(map(read_terms, found.values())):
        section.missing("Where the bound is lost, step by step, was not noted.", command)


def read_terms(estimate: Mapping[str, Any]) -> Terms | None:
    """The terms of a bound, where they are whole."""
    terms = estimate.get("terms")
    if not isinstance(terms, list) or not terms:
        return None
    try:
        names = tuple(str(term["name"]) for term in terms)
        value, error = (
            torch.tensor([float(term[key]) for term in terms]) for key in ("value", "standard_error")
        )
    except (KeyError, TypeError, ValueError):
        return None
    return Terms(names, value, error)


def _row(name: str, estimate: Mapping[str, Any]) -> list[str]:
    """An estimate as text; what is not there is a dash."""
    trusted = estimate.get("trusted")
    return [
        str(estimate.get("estimator", name)),
        str(estimate.get("data", "-")),
        _with_error(estimate, "mean", "mean_error"),
        _with_error(estimate, "bits_per_dim", "bits_per_dim_error"),
        _with_error(estimate, "monte_carlo_error"),
        str(estimate.get("kind", "-")),
        {True: "yes", False: "no"}[trusted] if isinstance(trusted, bool) else "-",
    ]


def _with_error(estimate: Mapping[str, Any], value: str, error: str = "") -> str:
    if not isinstance(estimate.get(value), int | float):
        return "-"
    spread = estimate.get(error)
    return f"{estimate[value]:.4g}" + (f" ± {spread:.2g}" if isinstance(spread, int | float) else "")
