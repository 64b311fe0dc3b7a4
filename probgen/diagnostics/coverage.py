"""Does a credible interval of level c hold the truth in a share c of all data sets?"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import numpy.typing as npt

from probgen.core import Fraction, InputError, check_arguments
from probgen.diagnostics.calibration import SimulatedPosteriors, pit, verdict_text
from probgen.diagnostics.calibration import example as simulated
from probgen.diagnostics.plots import PALETTE, File, new_figure

Array = npt.NDArray[np.float64]

LEVELS = (0.5, 0.8, 0.9, 0.95)
_MOST_CURVES = 6  # in a picture
_PAIRS_AT_ONCE = 2**24  # distances held in memory


@dataclass(frozen=True)
class Coverage:
    """Which share of the truths lies in credible regions; printed, it says whether these are to be believed.

    Args:
        levels: what the shares should be, in (0, 1).
        central: by entry, shares in the intervals that leave as much below as above, `(num_levels,)`.
        highest: by entry, shares in regions of highest posterior density, `(num_levels,)`.
        joint: shares in regions of highest density of all entries together, `(num_levels,)`.
        num_sets: of how many data sets.
        alpha: probability of a false alarm, of all numbers together.
        heading: what was judged, in a sentence.
        caveats: what limits the verdict, a sentence each.
    """

    levels: tuple[float, ...]
    central: Mapping[str, Array]
    highest: Mapping[str, Array]
    joint: Array
    num_sets: int
    alpha: float
    heading: str
    caveats: tuple[str, ...]

    @property
    def errors(self) -> Array:
        """Standard error of each share where the regions are right, sqrt(c (1 - c)/num_sets): `(num_levels,)`."""
        c = np.asarray(self.levels)
        return np.sqrt(c * (1 - c) / self.num_sets)

    @property
    def average(self) -> Array:
        """Coverage of central intervals averaged over entries, `(num_levels,)`."""
        return np.asarray(np.mean(list(self.central.values()), axis=0))

    @property
    def ok(self) -> bool:
        """True where no share is off by more than chance allows."""
        return not self.problems

    @property
    def problems(self) -> tuple[str, ...]:
        """Which regions are wrong, and how, in sentences: of each the level that is worst."""
        limit = self.alpha / (len(self.levels) * len(self._all))
        worst = {name: int(self._p_values(shares).argmin()) for name, shares in self._all.items()}
        return tuple(
            f"{self.levels[i]:.0%} {name} hold {self._all[name][i]:.1%} +- {self.errors[i]:.1%} of the truths: "
            + ("too narrow." if self._all[name][i] < self.levels[i] else "too wide.")
            for name, i in worst.items()
            if self._p_values(self._all[name])[i] < limit
        )

    def __str__(self) -> str:
        verdict = "Regions hold as many truths as they claim." if self.ok else "Do not believe these regions:"
        return verdict_text(self.heading, list(self._rows()), verdict, [*self.problems[:5], *self.caveats])

    def plot(self, path: File) -> Path:
        """Shares over levels, with the band that holds 95 % of calibrated shares at each level.

        At most 6 entries are shown beside the joint region.

        Args:
            path: the file to write, whose ending decides the format.

        Returns the path.
        """
        from scipy import stats

        c = np.linspace(0.005, 0.995, 199)
        low, high = (np.asarray(end) / self.num_sets for end in stats.binom.interval(0.95, self.num_sets, c))
        with new_figure(path, size=(4.6, 4.2)) as figure:
            axes = figure.add_subplot()
            axes.fill_between(c, low, high, color="0.85", linewidth=0, label="95 % of right ones")
            axes.plot((0, 1), (0, 1), color="black", linewidth=0.7)
            for colour, name in zip(PALETTE, list(self.central)[:_MOST_CURVES], strict=False):
                axes.plot(self.levels, self.central[name], "o-", color=colour, markersize=3, label=name)
            axes.plot(self.levels, self.joint, "s--", color="black", markersize=4, label="all together")
            axes.set_xlabel("level")
            axes.set_ylabel("truths inside")
            axes.legend()
        return Path(path)

    @property
    def _all(self) -> dict[str, Array]:
        central = {f"central intervals of {name}": shares for name, shares in self.central.items()}
        highest = {f"highest-density regions of {name}": shares for name, shares in self.highest.items()}
        joint = {"highest-density regions of all entries together": self.joint}
        return central | highest | joint

    def _p_values(self, shares: Array) -> Array:
        """Two-sided binomial tests, `(num_levels,)`."""
        from scipy import stats

        inside = np.rint(shares * self.num_sets)
        below = stats.binom.cdf(inside, self.num_sets, self.levels)
        above = stats.binom.sf(inside - 1, self.num_sets, self.levels)
        return np.minimum(1.0, 2 * np.minimum(below, above))

    def _furthest(self, name: str) -> float:
        return float(np.abs(self.central[name] - self.levels).max())

    def _rows(self) -> Iterator[str]:
        width = max(12, *map(len, self.central))
        yield f"{'':{width}} " + "".join(f"{level:>16.0%}" for level in self.levels)
        yield f"{'':{width}} " + "central highest ".rjust(16) * len(self.levels)
        yield f"{'all together':{width}} " + "".join(f"{'':8}{share:8.1%}" for share in self.joint)
        for name in sorted(self.central, key=self._furthest, reverse=True):
            pairs = zip(self.central[name], self.highest[name], strict=True)
            yield f"{name:{width}} " + "".join(f"{a:8.1%}{b:8.1%}" for a, b in pairs)
        yield f"{'+-':{width}} " + "".join(f"{error:16.1%}" for error in self.errors)


def coverage(
    posteriors: SimulatedPosteriors, levels: Sequence[Fraction] = LEVELS, *, alpha: Fraction = 0.01
) -> Coverage:
    """#{i : z_i in R_c(y_i)} / num_sets, over pairs (z_i, y_i) ~ p(z, y): expected coverage of credible regions R_c.

    z lies in the central interval where its rank u among the draws has |2 u - 1| < c, and in the region of highest
    density where the rank of its density is above 1 - c. The density is a kernel estimate, at each of draws and truth
    from all the others: as these are exchangeable where draws are right, coverage is then c for any number of draws and
    however rough the estimate.

    Args:
        posteriors: from `simulated_posteriors`.
        levels: c, each in (0, 1).
        alpha: probability of a false alarm, in (0, 1).

    Returns a `Coverage`. Raises `InputError` for levels outside of (0, 1).

    Source: Hermans, Delaunoy, Rozet, Wehenkel, Begy & Louppe (2022), arXiv 2110.06581.

    >>> print(coverage(simulated(), levels=[0.5, 0.9]))
    Coverage of 99 draws for each of 1,000 simulated data sets by exact draws.
    ...
    Regions hold as many truths as they claim.
    ...
    >>> coverage(example(), levels=[0.9]).problems[0]
    '90% central intervals of z hold 8... +- 0.9% of the truths: too narrow.'
    """
    check_arguments(coverage, locals())
    if not levels or not all(0 < level < 1 for level in levels):
        raise InputError(f"levels must lie in (0, 1), got {list(levels)}.")
    c = np.asarray(levels)
    central = {e.name: _share(np.abs(2 * pit(e.truth, e.draws) - 1), c) for e in posteriors.entries}
    highest = {e.name: _share(_depth(e.truth[:, None], e.draws[..., None]), c) for e in posteriors.entries}
    joint = highest[posteriors.entries[0].name]
    if len(highest) > 1:
        joint = _share(_depth(*posteriors.vectors()), c)
    heading = f"Coverage of {posteriors}."
    return Coverage(
        tuple(levels), central, highest, joint, posteriors.num_sets, alpha, heading, _caveats(posteriors)
    )


def example() -> SimulatedPosteriors:
    """Exact draws whose sd is then made 0.8 of what it should be."""
    exact = simulated()
    means = exact.draws["z"].mean(0)
    return replace(exact, draws={"z": means + 0.8 * (exact.draws["z"] - means)}, engine="draws too narrow")


def _caveats(posteriors: SimulatedPosteriors) -> tuple[str, ...]:
    blind = (
        "Coverage is an average over data sets: an engine that ignores the data and draws from the prior has it too, "
        "and errors that cancel over data sets do not show."
    )
    return (*posteriors.caveats(), blind)


def _share(depth: Array, levels: Array) -> Array:
    return np.asarray((depth[:, None] < levels).mean(0))


def _depth(truth: Array, draws: Array) -> Array:
    """Which share of each posterior has a higher density than the truth: `(num_sets,)` in (0, 1), uniform if right.

    Args:
        truth: `(num_sets, d)`.
        draws: `(num_draws, num_sets, d)`.
    """
    chunk = max(1, _PAIRS_AT_ONCE // (1 + len(draws)) ** 2)
    parts = range(0, len(truth), chunk)
    density = np.concatenate([_densities(truth[i : i + chunk], draws[:, i : i + chunk]) for i in parts], 1)
    return 1 - pit(density[0], density[1:])


def _densities(truth: Array, draws: Array) -> Array:
    """Log of a Gaussian kernel estimate at truth and draws, each from all the others: `(1 + num_draws, num_sets)`.

    In units of each coordinate's sd, with Silverman's bandwidth (4/(d + 2))^(1/(d + 4)) n^(-1/(d + 4)).
    """
    points = np.concatenate([truth[None], draws]).transpose(1, 0, 2)  # (set, n, d)
    spread = points.std(1, keepdims=True)
    points = (points - points.mean(1, keepdims=True)) / np.where(spread > 0, spread, 1.0)
    _, n, d = points.shape
    bandwidth = (4 / (d + 2)) ** (1 / (d + 4)) * n ** (-1 / (d + 4))
    squares = (points**2).sum(-1)
    exponents = squares[:, :, None] + squares[:, None] - 2 * points @ points.transpose(0, 2, 1)
    exponents *= -0.5 / bandwidth**2
    exponents[:, range(n), range(n)] = -np.inf
    largest = exponents.max(-1, keepdims=True)
    np.exp(exponents - largest, out=exponents)
    return np.asarray((largest[..., 0] + np.log(exponents.sum(-1))).T)
