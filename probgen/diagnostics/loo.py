"""How well would this posterior predict a row it has not seen?"""

from __future__ import annotations

import textwrap
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import pyro
import pyro.distributions as dist
import torch

from probgen.arviz_io import leave_one_out
from probgen.core import Cost, InputError, Posterior, check_arguments, did_you_mean
from probgen.replay import log_likelihood
from probgen.targets import read

Array = npt.NDArray[np.float64]


@dataclass(frozen=True)
class LOO:
    """Expected log predictive density of rows left out one at a time, in nats.

    Args:
        site: the observed site whose rows are left out.
        elpd: sum over rows of log p(row | all other rows); higher is better.
        se: its standard error, from the spread over rows.
        p_loo: effective number of parameters.
        elpd_i, pareto_k: per row, `batch`: its share of elpd, and the k-hat that tells whether it can be believed.
        good_k: k-hat must be below it.
        advice: what is wrong and the way out, a sentence each.
    """

    site: str
    elpd: float
    se: float
    p_loo: float
    elpd_i: Array
    pareto_k: Array
    good_k: float
    advice: tuple[str, ...]

    @property
    def ok(self) -> bool:
        """True where every row's k-hat is good."""
        return bool((self.pareto_k < self.good_k).all())

    def __str__(self) -> str:
        head = (
            f"Leave-one-out over {self.pareto_k.size} rows of {self.site}: elpd {self.elpd:.4g} +- {self.se:.2g} nats, "
            f"effective number of parameters {self.p_loo:.3g}."
        )
        verdict = f"Every Pareto k is below {self.good_k:.2f}." if self.ok else ""
        advice = [
            textwrap.fill(line, 100, initial_indent="- ", subsequent_indent="  ") for line in self.advice
        ]
        return "\n".join(line for line in (head, verdict, *advice) if line)


def loo(posterior: Posterior, site: str | None = None) -> LOO:
    """elpd = sum_i log p(y_i | y_{-i}) by Pareto-smoothed importance sampling, through ArviZ.

    Args:
        posterior: draws of any engine that conditions, which know their target.
        site: the observed site; None where there is one only.

    Returns a `LOO`. Raises `InputError` where nothing was observed, the site does not exist or must be named, it has
    no rows to leave out, or latent sites were summed out.

    Source: Vehtari, Gelman and Gabry (2017), arXiv 1507.04544; Vehtari et al. (2024), arXiv 1507.02646.

    >>> print(loo(example()))
    Leave-one-out over 20 rows of y: elpd ... nats, effective number of parameters ...
    Every Pareto k is below 0.70.
    """
    check_arguments(loo, locals())
    terms = log_likelihood(posterior)
    site = _choose(site, list(terms))
    if terms[site][0, 0].numel() < 2:
        raise InputError(
            f"Site {site!r} is one datum: there is no row to leave out. Put its independent rows in a pyro.plate, "
            "and leave them out of .to_event()."
        )
    found = leave_one_out(posterior, terms[site])
    advice = tuple(_advice(posterior, site, found.pareto_k, found.good_k))
    return LOO(site, found.elpd, found.se, found.p_loo, found.elpd_i, found.pareto_k, found.good_k, advice)


def example() -> Posterior:
    """Exact draws of the mean of 20 normal data."""
    generator = torch.Generator().manual_seed(0)
    y = 1.0 + torch.randn(20, generator=generator)

    def model() -> None:
        loc = pyro.sample("loc", dist.Normal(0.0, 10.0))
        with pyro.plate("row", 20):
            pyro.sample("y", dist.Normal(loc, 1.0))

    precision = 20 + 0.01
    loc = y.sum() / precision + torch.randn(1, 2000, generator=generator) / precision**0.5
    return Posterior({"loc": loc}, "iid", "exact", "Exact", Cost(), target=read(model, {"y": y}))


def _choose(site: str | None, observed: list[str]) -> str:
    if site is None:
        if len(observed) > 1:
            names = ", ".join(map(repr, observed))
            raise InputError(f"Several sites were observed, {names}: name one, loo(posterior, site).")
        return observed[0]
    if site not in observed:
        raise InputError(f"Site {site!r} was not observed; {did_you_mean(site, observed)}")
    return site


def _advice(posterior: Posterior, site: str, pareto_k: Array, good_k: float) -> list[str]:
    advice = []
    bad = np.argwhere(~(pareto_k < good_k))
    if len(bad):
        rows = ", ".join(str(i[0]) if len(i) == 1 else str(tuple(map(int, i))) for i in bad[:4])
        more = f" and {len(bad) - 4} more" if len(bad) > 4 else ""
        advice.append(
            f"{len(bad)} of {pareto_k.size} rows of {site} have Pareto k >= {good_k:.2f} (row {rows}{more}): the "
            "posterior would change too much without them for elpd to be believed. Refit without those rows "
            "one at a time, use a likelihood with heavier tails, or sum out latents that belong to one row."
        )
    if posterior.guarantee == "approximate":
        advice.append(
            "The draws come from an approximation: elpd is that of the approximation, not of the program."
        )
    return advice
