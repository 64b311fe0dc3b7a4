"""Can these draws be trusted? ArviZ's numbers, and what to do about them in sentences."""

from __future__ import annotations

import textwrap
from collections.abc import Collection
from dataclasses import dataclass, replace
from typing import Any

import torch

from probgen.arviz_io import chain_table, draws_table
from probgen.core import MEANINGS, Cost, InputError, Posterior, check_arguments
from probgen.diagnostics.advice import notes, problems

_ROWS_SHOWN = 12


@dataclass(frozen=True)
class Summary:
    """A verdict on a posterior; printed, it explains itself.

    Args:
        table: a DataFrame with one row an entry of each site; R-hat and effective sample sizes for Markov chains,
            quantiles and sd / sqrt(n) for independent draws.
        problems: what is wrong and the way out, a sentence each.
        notes: what these diagnostics cannot see.
        heading: what was summarised, in a sentence.
    """

    table: Any
    problems: tuple[str, ...]
    notes: tuple[str, ...]
    heading: str

    @property
    def ok(self) -> bool:
        """True where nothing that can be checked is wrong; `notes` say what cannot."""
        return not self.problems

    @property
    def advice(self) -> list[str]:
        """Problems, then notes."""
        return [*self.problems, *self.notes]

    def __str__(self) -> str:
        verdict = "Nothing that was checked is wrong." if self.ok else "Do not rely on these draws yet:"
        advice = [
            textwrap.fill(sentence, 100, initial_indent="- ", subsequent_indent="  ")
            for sentence in self.advice
        ]
        return "\n".join([self.heading, "", _shown(self.table), "", verdict, *advice])


def summary(posterior: Posterior, sites: Collection[str] | None = None) -> Summary:
    """Summarise draws and judge them by what their kind allows.

    Markov chains (`kind` "mcmc") get rank-normalised split R-hat, bulk and tail effective sample size (Vehtari et al.
    2021, arXiv 1903.08008), acceptance, divergences, tree depth and energy. Independent draws have no R-hat: their
    Monte Carlo error is sd / sqrt(n), and where they come from an approximation no number of draws tells how good it
    is.

    Args:
        posterior: draws of any engine.
        sites: which sites; None means all. Large ones take about a millisecond an entry.

    Returns a `Summary`. Raises `InputError` for unknown sites, and for chains of fewer than 4 draws.

    >>> verdict = summary(example())
    >>> verdict.ok
    True
    >>> list(verdict.table.columns)[-3:]
    ['ess_bulk', 'ess_tail', 'r_hat']
    """
    check_arguments(summary, locals())
    if posterior.kind == "mcmc" and posterior.num_draws < 4:
        raise InputError(
            f"R-hat needs at least 4 draws a chain, got {posterior.num_draws}; draw a few hundred (num_draws=...)."
        )
    chosen = list(posterior.draws) if sites is None else list(sites)
    if not chosen:
        raise InputError("sites must name one site or more, got none; None means all.")
    part = replace(posterior, draws={site: posterior[site] for site in chosen})
    table = chain_table(part) if part.kind == "mcmc" else draws_table(part)
    return Summary(table, tuple(problems(part, table)), tuple(notes(part)), _heading(part))


def example() -> Posterior:
    """Four well-mixed chains of a made-up posterior over three schools and their spread."""
    generator = torch.Generator().manual_seed(0)
    spread = torch.randn(4, 500, generator=generator).exp()
    schools = torch.randn(4, 500, 3, generator=generator) + torch.tensor([-1.0, 0.0, 2.0])
    return Posterior(
        {"tau": spread, "z": schools},
        kind="mcmc",
        guarantee="asymptotic",
        engine="Example",
        cost=Cost(),
        dims={"z": ("school",)},
        coords={"school": ["north", "east", "south"]},
        stats={
            "diverging": torch.zeros(4, 500, dtype=torch.bool),
            "lp": torch.randn(4, 500, generator=generator),
        },
    )


# --- words ---------------------------------------------------------------------------------------------------------


def _heading(posterior: Posterior) -> str:
    kind = MEANINGS[posterior.kind].split(":")[0]
    num_sets = posterior.target.num_sets if posterior.target is not None else 0
    each = f" of each of {num_sets:,} data sets" if num_sets else ""
    return f"{posterior.num_chains:,} x {posterior.num_draws:,} draws{each} by {posterior.engine} ({kind})."


def _shown(table: Any) -> str:
    """The table, entries of the worst R-hat (or the largest error) first where there are too many."""
    if len(table) <= _ROWS_SHOWN:
        rows, rest = table, ""
    else:
        worst = "r_hat" if "r_hat" in table else "mcse_mean"
        rows = table.sort_values(worst, ascending=False).head(_ROWS_SHOWN)
        rest = f"\n... and {len(table) - _ROWS_SHOWN:,} entries with a smaller {worst}"
    whole = {name: "{:.0f}".format for name in ("ess_bulk", "ess_tail") if name in table}
    formats = dict.fromkeys(table, "{:.3g}".format) | {"r_hat": "{:.3f}".format} | whole
    text: str = rows.to_string(formatters={name: formats[name] for name in table})
    return text + rest
