"""Do posteriors of several engines tell the same story, and which told it at the least cost?"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import combinations, islice
from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from probgen.arviz_io import chain_error
from probgen.core import InputError, NonNegativeInt, Positive, Posterior, check_arguments
from probgen.diagnostics.c2st import C2ST, c2st
from probgen.diagnostics.calibration import verdict_text
from probgen.diagnostics.plots import PALETTE, File, new_figure
from probgen.diagnostics.sliced_wasserstein import SlicedWasserstein, sliced_wasserstein

Array = npt.NDArray[np.float64]

QUANTILES = (0.05, 0.5, 0.95)
STATISTICS = ("mean", "sd", *(f"{q:.0%} quantile" for q in QUANTILES))
LIMIT = 4.5
_FEWEST, _MOST = 25, 1000  # independent draws that posteriors are compared by as wholes
_MOST_ENTRIES = 8  # in a picture


class Worst(NamedTuple):
    """Where two posteriors lie furthest apart: which statistic, the gap in sds, and in standard errors."""

    name: str
    gap: float
    z: float


class Efficiency(NamedTuple):
    """What draws are worth, and what they cost.

    Args:
        num_draws: over all chains.
        ess: how many independent draws have the same error of the mean, the least over entries; of an approximation
            it counts Monte Carlo error alone.
        evaluations: calls of the network, or gradients where there is none; warm-up included.
        seconds: warm-up included.
    """

    num_draws: int
    ess: float
    evaluations: int
    seconds: float


@dataclass(frozen=True)
class Comparison:
    """Two posteriors side by side.

    Args:
        names: a and b.
        gaps: by site, a - b of each of `STATISTICS`, in sds of the two together: `(5, *batch, *event)`.
        z: the same in standard errors. Quantiles are compared by the probability below the quantile of all draws.
        wasserstein, classified: of independent draws of all shared sites together; None where fewer than 25 are left.
        limit: how large |z| may be.
    """

    names: tuple[str, str]
    gaps: Mapping[str, Array]
    z: Mapping[str, Array]
    wasserstein: SlicedWasserstein | None
    classified: C2ST | None
    limit: float

    @cached_property
    def worst(self) -> Worst:
        """The statistic with the largest |z|; NaN counts as infinite."""
        site = max(self.z, key=lambda name: _size(self.z[name]).max())
        at = np.unravel_index(int(_size(self.z[site]).argmax()), self.z[site].shape)
        entry = f"[{', '.join(str(i) for i in at[1:])}]" if len(at) > 1 else ""
        name = f"{STATISTICS[int(at[0])]} of {site}{entry}"
        return Worst(name, float(self.gaps[site][at]), float(self.z[site][at]))

    @property
    def ok(self) -> bool:
        """True where no z is beyond the limit, of statistics and of wholes; NaN is beyond."""
        wholes = (found.z for found in (self.wasserstein, self.classified) if found is not None)
        return abs(self.worst.z) <= self.limit and all(z <= self.limit for z in wholes)

    def __str__(self) -> str:
        a, b = self.names
        count, worst = sum(z.size for z in self.z.values()), self.worst
        told = (
            f"{a} and {b} {'agree' if self.ok else 'disagree'}: of {count:,} means, sds and quantiles the furthest "
            f"apart is the {worst.name}, by {worst.gap:+.2g} sd, z = {worst.z:+.1f} (limit {self.limit:g})."
        )
        if self.wasserstein is None or self.classified is None:
            return f"{told} Too few independent draws are left to compare them as wholes."
        return f"{told} {self.wasserstein} {self.classified}"


@dataclass(frozen=True)
class Agreement:
    """Posteriors compared pair by pair; printed, it is a verdict in sentences.

    Args:
        comparisons: of every pair, in the order given.
        values: by name and site, each of `STATISTICS`: `(5, *batch, *event)`.
        efficiency: by name, what the draws are worth and what they cost.
    """

    comparisons: tuple[Comparison, ...]
    values: Mapping[str, Mapping[str, Array]]
    efficiency: Mapping[str, Efficiency]

    @property
    def ok(self) -> bool:
        """True where every pair agrees."""
        return all(comparison.ok for comparison in self.comparisons)

    @property
    def worst(self) -> Worst:
        """The largest |z| over pairs."""
        return max((comparison.worst for comparison in self.comparisons), key=lambda worst: _size(worst.z))

    def __getitem__(self, names: tuple[str, str]) -> Comparison:
        for comparison in self.comparisons:
            if set(comparison.names) == set(names):
                return comparison
        raise InputError(f"No two posteriors here are called {names}; known: {list(self.values)}.")

    def __str__(self) -> str:
        apart = sum(not comparison.ok for comparison in self.comparisons)
        verdict = f"{apart} of {len(self.comparisons)} pairs disagree:" if apart else "All agree:"
        sentences = sorted(self.comparisons, key=lambda comparison: comparison.ok)
        return verdict_text(
            "What draws are worth (the least over entries) and what they cost, warm-up included:",
            list(self._rows()),
            verdict,
            [str(comparison) for comparison in sentences],
        )

    def plot(self, path: File) -> Path:
        """Of each entry the mean, one sd around it and the 5 % and 95 % quantiles, by every posterior.

        At most 8 entries are shown, the first ones.

        Args:
            path: the file to write, whose ending decides the format.

        Returns the path.
        """
        entries = list(islice(self._entries(), _MOST_ENTRIES))
        names = list(self.values)
        with new_figure(path, size=(6.0, 0.8 + 0.24 * len(entries) * (len(names) + 1))) as figure:
            axes = figure.add_subplot()
            for row, (_, statistics) in enumerate(entries):
                for i, name in enumerate(names):
                    mean, sd, low, _, high = statistics[name]
                    y, colour = row + 0.8 * (i + 0.5) / len(names) - 0.4, PALETTE[i % len(PALETTE)]
                    axes.plot((low, high), (y, y), color=colour, linewidth=1)
                    axes.plot((mean - sd, mean + sd), (y, y), color=colour, linewidth=3, alpha=0.6)
                    axes.plot(mean, y, "o", color=colour, markersize=4, label=None if row else name)
            axes.set_yticks(range(len(entries)), [entry for entry, _ in entries])
            axes.invert_yaxis()
            axes.set_xlabel("mean, ± sd, 5 % to 95 %")
            axes.legend()
        return Path(path)

    def _entries(self) -> Iterator[tuple[str, dict[str, Array]]]:
        for site, statistics in next(iter(self.values.values())).items():
            for index in np.ndindex(statistics.shape[1:]):
                entry = site + (f"[{', '.join(map(str, index))}]" if index else "")
                yield entry, {name: self.values[name][site][(slice(None), *index)] for name in self.values}

    def _rows(self) -> Iterator[str]:
        width = max(map(len, self.efficiency))
        yield f"{'':{width}}      draws       ESS     calls   seconds  ESS/1,000 calls     ESS/s"
        for name, e in self.efficiency.items():
            per_call = f"{1000 * e.ess / e.evaluations:17.3g}" if e.evaluations else f"{'':17}"
            per_second = f"{e.ess / e.seconds:10.3g}" if e.seconds else f"{'':10}"
            paid = f"{e.evaluations:9,} {e.seconds:9.3g}{per_call}{per_second}"
            yield f"{name:{width}} {e.num_draws:10,} {e.ess:9.0f} {paid}"


def agree(
    posteriors: Mapping[str, Posterior], *, limit: Positive = LIMIT, seed: NonNegativeInt = 0
) -> Agreement:
    """Compare posteriors pair by pair: z = (s_a - s_b) / sqrt(e_a^2 + e_b^2) for statistics s of every entry.

    s is the mean, the sd, and the probability below the 5, 50 and 95 % quantile of all draws; e its Monte Carlo error:
    by effective sample size for Markov chains (ArviZ), between independent runs for resampled particles (Student's t,
    said as a normal z), sd / sqrt(n) for independent draws. As wholes they are compared by the sliced Wasserstein
    distance and by a classifier, from as many draws as are worth being called independent, 1,000 at most.

    Args:
        posteriors: of any engines, by the name to call them; the sites all of them have are compared.
        limit: |z| above it is disagreement. 4.5 raises less than one false alarm in 1,000 for 40 comparisons.
        seed: of random directions, exchanges and folds.

    Returns an `Agreement`. Raises `InputError` for fewer than two posteriors, where no site is shared, shapes differ,
    or errors cannot be told.

    Agreement of engines that share an error is no proof; a posterior known to be right is needed for that, or
    calibration.

    >>> from probgen.diagnostics.summary import example as chains
    >>> posterior = chains()
    >>> agree({"NUTS": posterior, "HMC": posterior}).ok
    True
    >>> agree({"NUTS": posterior, "HMC": replace(posterior, draws={"z": posterior["z"] + 0.3})}).worst.name
    'mean of z[2]'
    """
    check_arguments(agree, locals())
    if len(posteriors) < 2:
        raise InputError(f"Agreement takes two posteriors or more, by name; got {list(posteriors)}.")
    sites = _shared(posteriors)
    ends = {site: _quantiles([posterior[site] for posterior in posteriors.values()]) for site in sites}
    found = {name: _Measured(posterior, ends) for name, posterior in posteriors.items()}
    comparisons = tuple(_compare((a, b), found[a], found[b], limit, seed) for a, b in combinations(found, 2))
    values = {name: {site: one.statistics[site].value for site in sites} for name, one in found.items()}
    return Agreement(comparisons, values, {name: one.efficiency for name, one in found.items()})


def example() -> Agreement:
    """A posterior beside the same with one site moved by one standard deviation: they disagree."""
    from probgen.diagnostics.summary import example as chains

    posterior = chains()
    moved = replace(posterior, draws=posterior.draws | {"z": posterior["z"] + 1.0})
    return agree({"right": posterior, "moved": moved})


# --- one posterior -------------------------------------------------------------------------------------------------


class _Statistics(NamedTuple):
    """`STATISTICS` of a site: their value, what is compared of them, and its error; each `(5, *batch, *event)`."""

    value: Array
    compared: Array
    error: Array


class _Measured:
    """What is compared of one posterior."""

    def __init__(self, posterior: Posterior, ends: Mapping[str, Array]) -> None:
        self.posterior = posterior
        self.statistics = {site: _statistics(posterior, site, end) for site, end in ends.items()}
        # Errors between a few runs have a Student's t behind them.
        self.freedom = posterior.num_chains - 1 if posterior.kind == "weighted" else math.inf

    @cached_property
    def efficiency(self) -> Efficiency:
        cost, num_draws = self.posterior.cost, self.posterior.num_chains * self.posterior.num_draws
        with np.errstate(divide="ignore", invalid="ignore"):
            unbiased = num_draws / np.float64(num_draws - 1)
            ratios = np.concatenate(
                [(unbiased * (s.value[1] / s.error[0]) ** 2).ravel() for s in self.statistics.values()]
            )
        ess = float(np.min(ratios[np.isfinite(ratios)], initial=num_draws))
        evaluations = cost.network_calls or cost.gradients + cost.warmup_gradients
        return Efficiency(num_draws, ess, evaluations, cost.seconds + cost.warmup_seconds)

    @cached_property
    def independent(self) -> Tensor:
        """Evenly spaced draws, as many as all are worth: `(n, d)`, entries of all sites side by side."""
        total = self.efficiency.num_draws
        kept = torch.linspace(0, total - 1, max(1, min(round(self.efficiency.ess), _MOST))).round().long()
        sites = [self.posterior.flat(site)[kept].double() for site in self.statistics]
        return torch.cat([x.reshape(len(kept), -1) for x in sites], 1)


def _statistics(posterior: Posterior, site: str, ends: Array) -> _Statistics:
    x = _array(posterior[site])
    mean, quantiles = x.mean((0, 1)), _quantiles([posterior[site]])
    squares = (x - mean) ** 2
    sd = np.sqrt(squares.mean((0, 1)))
    below = [(x <= end).astype(np.float64) for end in ends]
    with np.errstate(divide="ignore", invalid="ignore"):
        error_of_sd = _error(posterior, squares) / (2 * sd)
    return _Statistics(
        np.stack([mean, sd, *quantiles]),
        np.stack([mean, sd, *(part.mean((0, 1)) for part in below)]),
        np.stack([_error(posterior, x), error_of_sd, *(_error(posterior, part) for part in below)]),
    )


def _quantiles(draws: list[Tensor]) -> Array:
    """`QUANTILES` of draws `(chain, draw, ...)`, averaged over several sets of them: `(3, ...)`."""
    return np.asarray(np.mean([np.quantile(_array(x), QUANTILES, axis=(0, 1)) for x in draws], axis=0))


def _error(posterior: Posterior, x: Array) -> Array:
    """Standard error of the mean of x `(chain, draw, ...)` over chains and draws."""
    if posterior.kind == "mcmc":
        return chain_error(x)
    if posterior.kind == "weighted":
        if len(x) < 2:
            raise InputError(
                f"{posterior.engine}: the error of resampled particles needs runs; use num_chains >= 2."
            )
        return np.asarray(x.mean(1).std(0, ddof=1) / np.sqrt(len(x)))
    return np.asarray(x.std((0, 1), ddof=1) / np.sqrt(x.shape[0] * x.shape[1]))


# --- two posteriors ------------------------------------------------------------------------------------------------


def _shared(posteriors: Mapping[str, Posterior]) -> list[str]:
    """Sites that all have, in the same shape."""
    first, *others = posteriors.values()
    shared = [site for site in first.draws if all(site in other.draws for other in others)]
    if not shared:
        sites = {name: list(posterior.draws) for name, posterior in posteriors.items()}
        raise InputError(f"The posteriors share no site: {sites}.")
    for site in shared:
        shapes = {name: tuple(posterior[site].shape[2:]) for name, posterior in posteriors.items()}
        if len(set(shapes.values())) > 1:
            raise InputError(f"Site {site!r} must have one shape in all posteriors, got {shapes}.")
    return shared


def _compare(names: tuple[str, str], a: _Measured, b: _Measured, limit: float, seed: int) -> Comparison:
    gaps, z = {}, {}
    for site, one in a.statistics.items():
        other = b.statistics[site]
        spread = np.sqrt((one.value[1] ** 2 + other.value[1] ** 2) / 2)
        with np.errstate(divide="ignore", invalid="ignore"):
            gaps[site] = (one.value - other.value) / np.where(spread > 0, spread, 1.0)
        z[site] = _scores(one, other, a.freedom, b.freedom)
    xs = [one.independent for one in (a, b)]
    if min(map(len, xs)) < _FEWEST or not all(bool(torch.isfinite(x).all()) for x in xs):
        return Comparison(names, gaps, z, None, None, limit)
    return Comparison(names, gaps, z, sliced_wasserstein(*xs, seed=seed), c2st(*xs, seed=seed), limit)


def _scores(a: _Statistics, b: _Statistics, freedom_a: float, freedom_b: float) -> Array:
    """Differences in standard errors; those of few runs by Welch's t, said as the normal z of the same p-value."""
    from scipy import stats

    difference, error = a.compared - b.compared, np.hypot(a.error, b.error)
    with np.errstate(divide="ignore", invalid="ignore"):
        # Equal constants agree, although neither has an error.
        t = np.where((difference == 0) & ~(error > 0), 0.0, difference / error)
        freedom = error**4 / (a.error**4 / freedom_a + b.error**4 / freedom_b)
        few = np.isfinite(freedom) & np.isfinite(t)
    return np.asarray(np.where(few, -np.sign(t) * stats.norm.ppf(stats.t.sf(abs(t), freedom)), t))


def _size(z: Array | float) -> Array:
    """|z|, what is not a number counted as infinitely far apart."""
    return np.where(np.isnan(z), np.inf, np.abs(z))


def _array(value: Tensor) -> Array:
    return value.detach().double().cpu().numpy()
