"""How well does a score tell data that do not belong from data that do? The whole trade between misses and alarms."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from probgen.core import InputError, check_arguments, check_fields, check_finite
from probgen.diagnostics.plots import PALETTE, File, new_figure

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_CAUGHT = 0.95


@dataclass(frozen=True, eq=False)
class ROC:
    """Alarms among data inside against those outside, as the threshold on a score falls; printed, a sentence.

    Args:
        false_alarms: share of inside data with a score at or above each threshold, rising from 0 to 1, `(m,)`.
        caught: share of outside data there, `(m,)`.
        standard_error: of `auc`, by DeLong et al. (1988).
        num_inside, num_outside: how many data there are.
    """

    false_alarms: Tensor
    caught: Tensor
    standard_error: float
    num_inside: int
    num_outside: int

    def __post_init__(self) -> None:
        check_fields(self)

    @property
    def auc(self) -> float:
        """Area under the curve: the probability that an outside datum scores higher than an inside one, ties halved."""
        return float(torch.trapezoid(self.caught, self.false_alarms))

    @property
    def false_alarms_at_95(self) -> float:
        """The least share of false alarms at which 95 % of the outside data are caught."""
        return float(self.false_alarms[(self.caught >= _CAUGHT).nonzero()[0, 0]])

    def __str__(self) -> str:
        return (
            f"AUC {self.auc:.3f} +- {self.standard_error:.3f}: so often a datum from outside scores higher than one "
            f"from inside (1/2 is chance). To catch {_CAUGHT:.0%} of the {self.num_outside:,} outside means "
            f"{self.false_alarms_at_95:.1%} false alarms among the {self.num_inside:,} inside."
        )


def roc(inside: Tensor, outside: Tensor) -> ROC:
    """The receiver operating characteristic of a score that should be high outside, such as an energy.

    Args:
        inside: scores of data that belong, `(n,)`.
        outside: scores of data that do not, `(m,)`.

    Returns a `ROC`. Raises `InputError` for scores that are not finite, or fewer than two on a side.

    Source: Hanley & McNeil (1982), Radiology 143, 29, the area; DeLong, DeLong & Clarke-Pearson (1988), Biometrics 44,
    837, its error; the false alarms at 95 % caught: Hendrycks & Gimpel (2017), arXiv 1610.02136.

    >>> roc(torch.tensor([0.0, 1.0, 2.0]), torch.tensor([1.5, 3.0])).auc  # 5 of 6 pairs
    0.83...
    """
    check_arguments(roc, locals())
    for name, value in (("inside", inside), ("outside", outside)):
        if value.ndim != 1 or len(value) < 2:
            raise InputError(f"{name} must be scores (n,), at least two, got shape {tuple(value.shape)}.")
        check_finite(name, value)
    inside, outside = (value.detach().double().cpu() for value in (inside, outside))
    thresholds = torch.cat([inside, outside]).unique().flip(0)
    start = torch.zeros(1, dtype=torch.float64)
    false_alarms, caught = (
        torch.cat([start, _share_at_or_above(value, thresholds)]) for value in (inside, outside)
    )
    error = math.sqrt(sum(float(share.var()) / len(share) for share in _beaten(inside, outside)))
    return ROC(false_alarms, caught, error, len(inside), len(outside))


def plot_roc(curves: Mapping[str, ROC], path: File, *, title: str = "") -> Path:
    """The curves of several scores, with AUC +- its standard error in the legend.

    Args:
        curves: by name, as `roc` gives them; at most seven.
        path: the file to write.
        title: written above.

    Returns the path. Raises `InputError` where there is no curve, or more than there are colours.
    """
    check_arguments(plot_roc, locals())
    if not 1 <= len(curves) <= len(PALETTE):
        raise InputError(f"plot_roc draws 1 to {len(PALETTE)} curves, got {len(curves)}.")
    with new_figure(path, size=(4.2, 5.2)) as figure:
        axes = figure.subplots()
        draw_roc(axes, curves)
        axes.set_title(title)
    return Path(path)


def draw_roc(axes: Axes, curves: Mapping[str, ROC]) -> None:
    """The curves on axes of a larger figure."""
    widths = np.linspace(
        1.2 + 0.6 * (len(curves) - 1), 1.2, len(curves)
    )  # so that curves upon others are seen
    for (name, curve), colour, width in zip(curves.items(), PALETTE, widths, strict=False):
        label = f"{name}: {curve.auc:.3f} ± {curve.standard_error:.3f}"
        axes.plot(curve.false_alarms, curve.caught, color=colour, linewidth=width, label=label)
    axes.plot([0, 1], [0, 1], color="0.6", linewidth=0.8, linestyle="--")
    axes.set_xlabel("false alarms: share of inside above threshold")
    axes.set_ylabel("caught: share of outside above threshold")
    axes.set_aspect("equal")
    axes.legend(
        title="area under the curve ± 1 s.e.",
        title_fontsize=8,
        loc="upper center",
        bbox_to_anchor=(0.5, -0.14),
    )


def _share_at_or_above(values: Tensor, thresholds: Tensor) -> Tensor:
    below = torch.searchsorted(values.sort().values, thresholds)
    return 1 - below.double() / len(values)


def _beaten(inside: Tensor, outside: Tensor) -> tuple[Tensor, Tensor]:
    """Of each outside datum the share of the inside that it beats, of each inside one that of those that beat it."""

    def below(values: Tensor, others: Tensor) -> Tensor:
        ordered = others.sort().values
        left, right = (torch.searchsorted(ordered, values, right=right) for right in (False, True))
        return 0.5 * (left + right).double() / len(others)

    return below(outside, inside), 1 - below(inside, outside)


def example() -> ROC:
    """Scores one standard deviation apart: an area of 0.76."""
    generator = torch.Generator().manual_seed(0)
    inside, outside = torch.randn(2, 500, generator=generator)
    return roc(inside, outside + 1)
