"""Do data like those observed come out of the posterior? The observed values beside those it predicts."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from probgen.core import InputError, check_arguments
from probgen.diagnostics.plots import PALETTE, Array, File, new_figure

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_MOST_SETS = 40  # predicted data sets that are drawn one by one
_MOST_VALUES = 2000  # of a data set
_MOST_LEVELS = 40  # integers beyond these are drawn as if they were continuous
_NUM_POINTS = 200


def plot_predictive(observed: Tensor, predicted: Tensor, path: File, *, name: str = "y") -> Path:
    """How observed values are spread, over how those of predicted data sets are: one pale curve a data set.

    Continuous values are drawn as densities, integers as the share of each. Where the observed curve leaves the pale
    ones the program does not explain the data.

    Args:
        observed: one data set, of any shape.
        predicted: data sets of the same shape, `(..., *shape)`, e.g. `predict(posterior)["y"]`.
        path: the file to write.
        name: of the values, for the axis.

    Returns the path. Raises `InputError` for shapes that do not belong together, or nothing finite to draw.

    Source: Gabry et al. (2019), arXiv 1709.01449.

    >>> from tempfile import mkdtemp
    >>> plot_predictive(torch.randn(50), torch.randn(4, 100, 50), f"{mkdtemp()}/predictive.svg").name
    'predictive.svg'
    """
    check_arguments(plot_predictive, locals())
    data, sets = _values(observed, predicted)
    low, high = _range(np.concatenate([data, sets.ravel()]))
    whole = not predicted.is_floating_point() and high - low <= _MOST_LEVELS
    at = np.arange(low, high + 1) if whole else np.linspace(low, high, _NUM_POINTS)
    spread = _shares if whole else _densities
    with new_figure(path, size=(6.5, 3.2)) as figure:
        axes = figure.add_subplot()
        curves = [spread(row, at) for row in sets]
        _draw(axes, at, curves, spread(data, at))
        axes.set_xlabel(name)
        axes.set_ylabel("share" if whole else "density")
        axes.set_ylim(bottom=0)
        axes.legend()
    return Path(path)


def example() -> tuple[Tensor, Tensor]:
    """Data from N(1, 1), and 100 data sets predicted as N(0, 1)."""
    generator = torch.Generator().manual_seed(0)
    return torch.randn(80, generator=generator) + 1, torch.randn(100, 80, generator=generator)


def _values(observed: Tensor, predicted: Tensor) -> tuple[Array, Array]:
    """Values of the data and of some predicted data sets, `(n,)` and `(sets, n)`, thinned evenly."""
    rank = observed.ndim
    if (
        predicted.ndim <= rank
        or not predicted.numel()
        or predicted.shape[predicted.ndim - rank :] != observed.shape
    ):
        raise InputError(
            f"observed {tuple(observed.shape)} and predicted {tuple(predicted.shape)} do not belong together: expected "
            "predicted (draw, ...) or (chain, draw, ...) of data sets shaped as the observed one."
        )
    data = observed.detach().double().cpu().flatten()
    sets = predicted.detach().double().cpu().reshape(-1, data.numel())
    sets = sets[_evenly(len(sets), _MOST_SETS)]
    if not bool(data.isfinite().any()) or not bool(sets.isfinite().any(1).all()):
        raise InputError("There is nothing to draw: a data set holds no finite value.")
    kept = _evenly(data.numel(), _MOST_VALUES)
    return data[kept].numpy(), sets[:, kept].numpy()


def _evenly(count: int, most: int) -> Tensor:
    return torch.linspace(0, count - 1, min(count, most)).round().long()


def _range(values: Array) -> tuple[float, float]:
    """Where all but the far tails lie."""
    finite = values[np.isfinite(values)]
    low, high = np.quantile(finite, (0.001, 0.999))
    return (float(low), float(high)) if high > low else (float(low) - 1, float(low) + 1)


def _densities(values: Array, at: Array) -> Array:
    """Gaussian kernel density, bandwidth by Silverman's rule."""
    values = values[np.isfinite(values)]
    width = 0.9 * (values.std() or (at[-1] - at[0]) / 50) * len(values) ** -0.2
    kernel = np.exp(-0.5 * ((at[:, None] - values[None, :]) / width) ** 2)
    found: Array = kernel.mean(1) / (width * np.sqrt(2 * np.pi))
    return found


def _shares(values: Array, at: Array) -> Array:
    found: Array = (values[None, :] == at[:, None]).mean(1)
    return found


def _draw(axes: Axes, at: Array, predicted: list[Array], observed: Array) -> None:
    for curve in predicted:
        axes.plot(at, curve, color=PALETTE[0], linewidth=0.6, alpha=0.3)
    axes.plot([], [], color=PALETTE[0], linewidth=1, label=f"{len(predicted)} predicted data sets")
    axes.plot(
        at, np.mean(predicted, axis=0), color=PALETTE[0], linewidth=1.5, linestyle="--", label="their mean"
    )
    axes.plot(at, observed, color=PALETTE[6], linewidth=1.6, label="observed")
