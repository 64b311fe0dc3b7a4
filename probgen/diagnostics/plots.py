"""What does it look like? Pictures for a report, each written to one file, whatever the backend.

Every function returns the path it wrote; the ending of the name decides the format (.png, .pdf, .svg).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from probgen.core import InputError, Posterior, Terms

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Array = npt.NDArray[np.float64]

# Okabe and Ito (2008): told apart by every kind of colour vision.
PALETTE = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#F0E442")
_DPI = 150
_LOOK = {
    "font.size": 9,
    "axes.titlesize": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.alpha": 0.25,
    "grid.linewidth": 0.5,
    "axes.axisbelow": True,
    "legend.frameon": False,
    "axes.prop_cycle": None,
}


# --- images --------------------------------------------------------------------------------------------------------


def image_grid(
    images: Tensor,
    path: str | PathLike[str],
    *,
    num_columns: int | None = None,
    bounds: tuple[float, float] | None = (-1.0, 1.0),
    title: str = "",
) -> Path:
    """Draw images side by side on one scale of grey, or in colour.

    Args:
        images: `(n, height, width)`, or `(n, channels, height, width)` with 1 or 3 channels.
        path: the file to write; its folder is made.
        num_columns: None makes the grid about square.
        bounds: the values shown as black and white; None takes the smallest and largest there are.
        title: written above.

    Returns the path. Raises `InputError` for other shapes or no images.
    """
    pixels = _pixels(images, bounds)
    columns = num_columns or math.ceil(math.sqrt(len(pixels)))
    return _save_tiles(_tiles(pixels, columns), path, title=title, labels=())


def reconstruction_grid(
    originals: Tensor,
    reconstructions: Tensor,
    path: str | PathLike[str],
    *,
    num_columns: int = 10,
    bounds: tuple[float, float] | None = (-1.0, 1.0),
    title: str = "",
) -> Path:
    """Draw pairs of rows: data above, their reconstructions below.

    Args:
        originals, reconstructions: `(n, height, width)` or `(n, channels, height, width)`, one shape for both.
        path, bounds, title: as for `image_grid`.
        num_columns: pairs in a row.
    """
    if originals.shape != reconstructions.shape:
        raise InputError(
            f"Originals have shape {tuple(originals.shape)}, reconstructions {tuple(reconstructions.shape)}; "
            "they must be the same."
        )
    both = _pixels(torch.cat([originals.double(), reconstructions.double()]), bounds)
    above, below = (_tiles(half, num_columns) for half in np.split(both, 2))
    rows = np.stack([above, below], axis=1).reshape(-1, *above.shape[1:])
    return _save_tiles(rows, path, title=title, labels=("data", "model"))
