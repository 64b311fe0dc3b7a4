"""Can these draws be trusted? ArviZ's numbers, and what to do about them in sentences."""

from __future__ import annotations

import textwrap
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from probgen.arviz_io import chain_table, draws_table, energy_bfmi
from probgen.core import MEANINGS, Cost, InputError, Posterior

MAX_R_HAT = 1.01  # Vehtari et al. 2021
MIN_ESS = 400.0
MIN_ESS_PER_CHAIN = 100.0
MIN_BFMI = 0.3  # Betancourt 2016
MAX_DEEP_TREES = 0.01
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
    2021, arXiv 1903.08008), divergences, tree depth and energy. Independent draws have no R-hat: their Monte Carlo
    error is sd / sqrt(n), and where they come from an approximation no number of draws tells how good it is.

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
    if posterior.kind == "mcmc" and posterior.num_draws < 4:
        raise InputError(
            f"R-hat needs at least 4 draws a chain, got {posterior.num_draws}; draw a few hundred (num_draws=...)."
        )
    chosen = list(posterior.draws) if sites is None else list(sites)
    part = replace(posterior, draws={site: posterior[site] for site in chosen})
    table = chain_table(part) if part.kind == "mcmc" else draws_table(part)
    return Summary(table, tuple(_problems(part, table)), tuple(_notes(part)), _heading(part))


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


# --- rules: each looks at one thing and yields a sentence with its remedy ------------------------------------------


def _problems(posterior: Posterior, table: Any) -> Iterator[str]:
    yield from _not_finite(posterior.draws)
    if posterior.evidence is not None and not posterior.evidence.trusted:
        yield f"The evidence that came with these draws is not to be trusted: {posterior.evidence.reason}"
    if posterior.kind == "weighted" and posterior.num_chains == 1:
        yield "One run only: errors of resampled particles come from independent runs; use num_chains=4 or more."
    if posterior.kind == "mcmc":
        if posterior.num_chains == 1:
            yield "One chain only: R-hat cannot see a mode that one chain never left; use num_chains=4."
        yield from _stuck(table)
        yield from _high_r_hat(table)
        yield from _low_ess(table, posterior.num_chains, posterior.num_draws)
        yield from _divergences(posterior.stats)
        yield from _deep_trees(posterior.stats)
        yield from _slow_energy(posterior.stats)


def _not_finite(draws: Mapping[str, Tensor]) -> Iterator[str]:
    bad = [name for name, value in draws.items() if not bool(torch.isfinite(value).all())]
    if bad:
        yield f"Draws of {_list(bad)} hold NaN or Inf: check the program's scales for 0 or overflow."


def _stuck(table: Any) -> Iterator[str]:
    stuck = list(table.index[table["sd"] == 0])
    if stuck:
        yield (
            f"{_list(stuck)} never moved. If that is no constant of the program, the step size is far off: warm up "
            "longer (num_warmup), or start elsewhere (init)."
        )


def _high_r_hat(table: Any) -> Iterator[str]:
    high = table["r_hat"][table["r_hat"] >= MAX_R_HAT].sort_values(ascending=False)
    if len(high):
        yield (
            f"R-hat is {high.iloc[0]:.3f} for {high.index[0]}, and {MAX_R_HAT} or more for {len(high)} of {len(table)} "
            f"entries ({_list(list(high.index))}): the chains disagree. Run longer; if it stays, the posterior has "
            "several modes or chains get stuck: reparameterise, or start elsewhere (init)."
        )


def _low_ess(table: Any, num_chains: int, num_draws: int) -> Iterator[str]:
    needed = max(MIN_ESS, MIN_ESS_PER_CHAIN * num_chains)
    for column, use in (("ess_bulk", "means"), ("ess_tail", "quantiles")):
        low = table[column][table[column] < needed].sort_values()
        if len(low):
            name, smallest = column.removeprefix("ess_"), float(low.iloc[0])
            yield (
                f"The {name} effective sample size is {smallest:.0f} of {num_chains * num_draws:,} draws for "
                f"{low.index[0]}, and below {needed:.0f} for {len(low)} of {len(table)} entries: {use} and R-hat "
                f"itself are too noisy. Draw {needed / max(smallest, 1.0):.1f} times as many, or reparameterise."
            )


def _divergences(stats: Mapping[str, Tensor]) -> Iterator[str]:
    count = int(stats["diverging"].sum()) if "diverging" in stats else 0
    if count:
        were = "was 1 divergence" if count == 1 else f"were {count} divergences"
        yield (
            f"There {were} after warm-up: the step is too long for part of the posterior, which the draws then miss. "
            "Increase target_accept, or reparameterise (non-centred)."
        )


def _deep_trees(stats: Mapping[str, Tensor]) -> Iterator[str]:
    share = (
        float(stats["reached_max_tree_depth"].double().mean()) if "reached_max_tree_depth" in stats else 0.0
    )
    if share > MAX_DEEP_TREES:
        yield (
            f"{share:.0%} of the transitions reached the maximum tree depth: they stop before they turn back, and cost "
            "most. Rescale the latents, warm up longer, or increase max_tree_depth."
        )


def _slow_energy(stats: Mapping[str, Tensor]) -> Iterator[str]:
    if "energy" not in stats:
        return
    lowest = float(energy_bfmi(stats["energy"].double().numpy()).min())
    if lowest < MIN_BFMI:
        yield (
            f"E-BFMI is {lowest:.2f} (below {MIN_BFMI}): the energy changes too slowly from draw to draw, as with "
            "heavy tails or a funnel. Reparameterise (non-centred), or give scales lighter tails."
        )


def _notes(posterior: Posterior) -> Iterator[str]:
    if posterior.guarantee == "approximate" or posterior.kind == "approximate":
        yield (
            "The draws come from an approximation, and nothing here says how close it is: check it with "
            "ImportanceWeighted, or against NUTS with agree(a, b)."
        )
    if posterior.guarantee == "discretised":
        yield "The draws are exact only as steps grow finer: double the number of steps and compare with agree(a, b)."


# --- words ---------------------------------------------------------------------------------------------------------


def _heading(posterior: Posterior) -> str:
    kind = MEANINGS[posterior.kind].split(":")[0]
    return f"{posterior.num_chains} x {posterior.num_draws:,} draws by {posterior.engine} ({kind})."


def _list(names: list[str], most: int = 4) -> str:
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more


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
