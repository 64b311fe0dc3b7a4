"""Simulation-based calibration: is the rank of the truth among draws of its posterior uniform?"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from probgen.core import Fraction, InputError, check_arguments
from probgen.diagnostics.calibration import SimulatedPosteriors, pit, verdict_text
from probgen.diagnostics.calibration import example as simulated
from probgen.diagnostics.plots import PALETTE, File, new_figure
from probgen.diagnostics.uniformity import Uniformity, simultaneous_band, uniformity

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Array = npt.NDArray[np.float64]

_NOTABLE = 3.0  # standard errors beyond which a location or a width is worth a word
_MOST_ENTRIES = 6  # in a picture
BLIND_SPOT = (
    "Ranks of latents alone cannot tell a posterior from the prior: an engine that ignores the data passes. "
    "`with_quantity` adds quantities of latents and data, log p(y | z) first of all, whose ranks can."
)


@dataclass(frozen=True)
class SBC:
    """A verdict on the ranks of truths; printed, it says whether to believe.

    Args:
        pits: by entry, rank / number of draws, `(num_sets,)` in (0, 1).
        tests: by entry, p-values of their being uniform, and what they look like.
        alpha: probability of a false alarm, of all entries together.
        heading: what was judged, in a sentence.
        caveats: what limits the verdict, a sentence each.
    """

    pits: Mapping[str, Array]
    tests: Mapping[str, Uniformity]
    alpha: float
    heading: str
    caveats: tuple[str, ...]

    @property
    def p_value(self) -> float:
        """The smallest over entries, times their number (Bonferroni)."""
        return min(1.0, len(self.tests) * min(test.p_value for test in self.tests.values()))

    @property
    def ok(self) -> bool:
        """True where no rank distribution stands out."""
        return self.p_value >= self.alpha

    @property
    def problems(self) -> tuple[str, ...]:
        """Which entries are wrong, and how, in sentences."""
        worst = sorted(self.tests, key=lambda name: self.tests[name].p_value)
        return tuple(
            f"{name} ({self._p(name)}): {_looks(self.tests[name], len(self.pits[name]))}"
            for name in worst
            if self.tests[name].p_value * len(self.tests) < self.alpha
        )

    def __str__(self) -> str:
        verdict = (
            "Nothing speaks against these posteriors."
            if self.ok
            else f"Do not believe these posteriors: {self._count()} ranks that are not uniform."
        )
        return verdict_text(self.heading, list(self._rows()), verdict, [*self.problems[:5], *self.caveats])

    def plot(self, path: File) -> Path:
        """For each entry the histogram of ranks, and how far their distribution function is from uniform.

        The bands hold 95 % of calibrated histograms' bars, each bar by itself, and 95 % of calibrated curves as a whole
        (Säilynoja et al. 2022, arXiv 2103.10522). At most 6 entries are shown, the worst first.

        Args:
            path: the file to write, whose ending decides the format.

        Returns the path.
        """
        worst = sorted(self.tests, key=lambda name: self.tests[name].p_value)[:_MOST_ENTRIES]
        band = simultaneous_band(len(self.pits[worst[0]]))
        with new_figure(path, size=(8.0, 0.6 + 1.7 * len(worst))) as figure:
            for (left, right), name in zip(figure.subplots(len(worst), 2, squeeze=False), worst, strict=True):
                u = self.pits[name]
                _draw_histogram(left, u, name)
                right.fill_between(
                    band.at, band.low - band.at, band.high - band.at, color="0.85", linewidth=0
                )
                curve = np.searchsorted(np.sort(u), band.at, side="right") / len(u) - band.at
                right.plot(band.at, curve, color=PALETTE[0], linewidth=1.2)
                right.set_ylabel("ECDF - uniform")
                right.set_xlim(0, 1)
            left.set_xlabel("rank of the truth, from 0 to 1")
            right.set_xlabel("rank of the truth, from 0 to 1")
        return Path(path)

    def _p(self, name: str) -> str:
        return f"p = {self.tests[name].p_value:.2g}"

    def _count(self) -> str:
        bad = len(self.problems)
        return f"{bad} of {len(self.tests)} {'entry has' if bad == 1 else 'entries have'}"

    def _rows(self) -> Iterator[str]:
        width = max(map(len, self.tests))
        yield f"{'':{width}}  chi-square       KS   scores   sd off by   mean off by"
        for name, test in sorted(self.tests.items(), key=lambda item: item[1].p_value):
            yield (
                f"{name:{width}}  {test.chi_square:10.2g} {test.ks:8.2g} {test.scores:8.2g}"
                f"   {1 / test.scale - 1:+9.0%}   {-test.loc:+8.2f} sd"
            )


def sbc(posteriors: SimulatedPosteriors, *, alpha: Fraction = 0.01) -> SBC:
    """Test that u = (#{z_l < z} + U)/(L + 1) is uniform over pairs (z, y) ~ p(z, y), with z_1..z_L the draws of z | y.

    Of every entry of every latent: chi-square of ten bins, Kolmogorov-Smirnov, and normal scores, the sharper test of
    location and width. A wrong prior or likelihood inside an engine, warm-up too short, a step too long all show.

    Args:
        posteriors: from `simulated_posteriors`.
        alpha: probability of a false alarm, in (0, 1).

    Returns an `SBC`. Raises `InputError` for fewer than 10 data sets.

    Source: Talts, Betancourt, Simpson, Vehtari & Gelman (2018), arXiv 1804.06788.

    >>> sbc(simulated()).ok
    True
    >>> sbc(example()).problems[0]
    'z (p = ...): draws are too wide, their sd about 1.2... times what it should be.'
    """
    check_arguments(sbc, locals())
    if not 0 < alpha < 1:
        raise InputError(f"alpha is the probability of a false alarm, in (0, 1), got {alpha}.")
    pits = {entry.name: pit(entry.truth, entry.draws) for entry in posteriors.entries}
    tests = {name: uniformity(u) for name, u in pits.items()}
    heading = f"Simulation-based calibration of {posteriors}."
    return SBC(pits, tests, alpha, heading, (*posteriors.caveats(), BLIND_SPOT))


def example() -> SimulatedPosteriors:
    """Exact draws whose sd is then made 1.25 times too large."""
    exact = simulated()
    means = exact.draws["z"].mean(0)
    return replace(exact, draws={"z": means + 1.25 * (exact.draws["z"] - means)}, engine="draws too wide")


def _looks(test: Uniformity, num_sets: int) -> str:
    """What non-uniform ranks say of the draws."""
    said = []
    if abs(test.scale**2 - test.loc**2 - 1) > _NOTABLE * math.sqrt(2 / num_sets):
        ratio = 1 / math.sqrt(max(test.scale**2 - test.loc**2, 1e-6))
        said.append(
            f"draws are too {'wide' if ratio > 1 else 'narrow'}, their sd about {ratio:.2f} times what it should be"
        )
    if abs(test.loc) > _NOTABLE / math.sqrt(num_sets):
        said.append(f"draws lie too {'low' if test.loc > 0 else 'high'}, by about {abs(test.loc):.2f} sd")
    return (" and ".join(said) or "ranks are not uniform, though centre and width are right") + "."


def _draw_histogram(axes: Axes, u: Array, name: str, num_bins: int = 20) -> None:
    from scipy import stats

    low, high = stats.binom.interval(0.95, len(u), 1 / num_bins)
    axes.axhspan(low, high, color="0.88", linewidth=0)
    axes.hist(u, bins=num_bins, range=(0, 1), color=PALETTE[0], alpha=0.7)
    axes.set_title(name)
    axes.set_ylabel("data sets")
    axes.set_xlim(0, 1)
    axes.grid(visible=False)
