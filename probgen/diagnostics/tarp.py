"""Are posteriors right as wholes? Coverage of balls around random points."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import numpy.typing as npt
from torch import Tensor

from probgen.core import Fraction, InputError, NonNegativeInt, check_arguments
from probgen.diagnostics.calibration import SimulatedPosteriors, pit, verdict_text
from probgen.diagnostics.calibration import example as simulated
from probgen.diagnostics.plots import PALETTE, File, new_figure
from probgen.diagnostics.uniformity import Uniformity, simultaneous_band, uniformity

Array = npt.NDArray[np.float64]

_BLIND_SPOT = (
    "With reference points that do not depend on the data, draws from the prior pass too: pass references= computed "
    "from the data to see whether the engine looks at them."
)


@dataclass(frozen=True)
class TARP:
    """A verdict on posteriors as wholes; printed, it says whether to believe.

    Args:
        credibility: by data set, the share of its draws that lie nearer to its reference point than the truth does,
            `(num_sets,)` in (0, 1).
        test: p-values of these being uniform.
        alpha: probability of a false alarm.
        heading: what was judged, in a sentence.
        caveats: what limits the verdict, a sentence each.
    """

    credibility: Array
    test: Uniformity
    alpha: float
    heading: str
    caveats: tuple[str, ...]

    @property
    def p_value(self) -> float:
        """Of the credibilities being uniform."""
        return self.test.p_value

    @property
    def ok(self) -> bool:
        """True where coverage is what it should be."""
        return self.p_value >= self.alpha

    def expected_coverage(self, levels: Array) -> Array:
        """Share of data sets whose truth lies in the ball that holds a share `levels` of the draws: `(num_levels,)`."""
        return np.searchsorted(np.sort(self.credibility), levels, side="right") / len(self.credibility)

    def __str__(self) -> str:
        levels = np.array([0.1, 0.25, 0.5, 0.75, 0.9])
        rows = [
            "credibility       " + "".join(f"{level:8.0%}" for level in levels),
            "expected coverage " + "".join(f"{share:8.1%}" for share in self.expected_coverage(levels)),
        ]
        verdict = (
            f"Nothing speaks against these posteriors as wholes (p = {self.p_value:.2g})."
            if self.ok
            else f"Do not believe these posteriors (p = {self.p_value:.2g}): balls around random points hold another "
            "share of truths than of draws."
        )
        return verdict_text(self.heading, rows, verdict, self.caveats)

    def plot(self, path: File) -> Path:
        """Expected coverage over credibility, with the band that holds 95 % of calibrated curves.

        Args:
            path: the file to write, whose ending decides the format.

        Returns the path.
        """
        band = simultaneous_band(len(self.credibility))
        with new_figure(path, size=(4.4, 4.0)) as figure:
            axes = figure.add_subplot()
            axes.fill_between(
                band.at, band.low, band.high, color="0.85", linewidth=0, label="95 % of right ones"
            )
            axes.plot(band.at, self.expected_coverage(band.at), color=PALETTE[0], label="found")
            axes.set_xlabel("credibility")
            axes.set_ylabel("expected coverage")
            axes.legend()
        return Path(path)


def tarp(
    posteriors: SimulatedPosteriors,
    references: Tensor | None = None,
    *,
    alpha: Fraction = 0.01,
    seed: NonNegativeInt = 0,
) -> TARP:
    """Test that f = #{l : |z_l - r| < |z - r|} / L is uniform, r a random point: tests of accuracy with random points.

    All entries together, in units of the spread of the truths: what is wrong between entries, a correlation lost, shows
    here and not in their ranks one by one.

    Args:
        posteriors: from `simulated_posteriors`.
        references: r, one for each data set, `(num_sets, d)` with d the number of entries, which may depend on data
            but not on truths or draws; None draws them uniformly from the box that holds all truths.
        alpha: probability of a false alarm, in (0, 1).
        seed: of the reference points.

    Returns a `TARP`. Raises `InputError` for references of another shape.

    Source: Lemos, Coogan, Hezaveh & Perreault-Levasseur (2023), arXiv 2302.03026.

    >>> tarp(simulated()).ok, tarp(example()).ok
    (True, False)
    """
    check_arguments(tarp, locals())
    truth, draws = posteriors.vectors()
    low, spread = truth.min(0), truth.std(0)
    if references is None:
        r = low + np.random.default_rng(seed).uniform(size=truth.shape) * (truth.max(0) - low)
    elif tuple(references.shape) == truth.shape:
        r = references.detach().double().cpu().numpy()
    else:
        raise InputError(
            f"references must be one for each data set, {truth.shape}, got {tuple(references.shape)}."
        )
    scale = np.where(spread > 0, spread, 1.0)
    f = pit(_distance(truth, r, scale), _distance(draws, r, scale))
    caveats = (*posteriors.caveats(), *[_BLIND_SPOT] * (references is None))
    heading = f"Accuracy with random points (TARP) of {posteriors}."
    return TARP(f, uniformity(f), alpha, heading, caveats)


def example() -> SimulatedPosteriors:
    """Exact draws moved by half of their sd."""
    exact = simulated()
    return replace(exact, draws={"z": exact.draws["z"] + 0.35}, engine="draws too high")


def _distance(points: Array, references: Array, scale: Array) -> Array:
    return np.asarray(np.sqrt((((points - references) / scale) ** 2).sum(-1)))
