"""What is known of images of which a part was seen? Truth, what was seen, draws, their mean and their spread."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from probgen.core import Count, InputError, check_arguments
from probgen.diagnostics.plots import Array, File, new_figure

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_HIDDEN = (0.84, 0.90, 0.97)  # a colour that no grey image has


def plot_image_posterior(
    truth: Tensor,
    seen: Tensor,
    draws: Tensor,
    path: File,
    *,
    num_samples: Count = 3,
    bounds: tuple[float, float] = (-1.0, 1.0),
    title: str = "",
) -> Path:
    """A column for each image: the truth, what was seen of it, some draws, the mean and the sd of all of them.

    Args:
        truth: `(n, height, width)` or `(n, 1, height, width)`.
        seen: the same, NaN where nothing was seen: shown in light blue.
        draws: `(num_draws, n, ...)`, of the same images.
        path: the file to write.
        num_samples: how many draws are shown, spread evenly over all, >= 1.
        bounds: values shown as black and white; the sd is shown from 0 to its largest value.
        title: written above.

    Returns the path. Raises `InputError` for shapes that do not belong together.

    >>> from tempfile import mkdtemp
    >>> truth = torch.rand(4, 8, 8)
    >>> plot_image_posterior(truth, truth, torch.rand(9, 4, 8, 8), f"{mkdtemp()}/seen.png").name
    'seen.png'
    """
    check_arguments(plot_image_posterior, locals())
    real, known, drawn = _grey(truth, "truth"), _grey(seen, "seen"), _grey(draws, "draws")
    if real.shape != known.shape or drawn.ndim != 4 or drawn.shape[1:] != real.shape:
        raise InputError(
            f"truth {tuple(truth.shape)}, seen {tuple(seen.shape)} and draws {tuple(draws.shape)} do not belong "
            "together: expected (n, height, width) twice and (num_draws, n, height, width)."
        )
    shown = np.linspace(0, len(drawn) - 1, min(num_samples, len(drawn))).round().astype(int)
    rows = {"truth": real, "seen": known} | {f"draw {i + 1}": drawn[k] for i, k in enumerate(shown)}
    rows["mean"] = drawn.mean(0)
    spread = drawn.std(0)
    low, high = bounds
    coloured = {name: _coloured((images - low) / (high - low)) for name, images in rows.items()}
    coloured[f"sd, 0 to {float(spread.max()):.2g}"] = _coloured(spread / (spread.max() or 1.0))
    with new_figure(path) as figure:
        count, height, width = real.shape
        wide = max(3.0, 0.45 * count + 0.9)
        figure.set_size_inches(wide, (wide - 0.9) * len(coloured) / count * height / width + 0.3)
        _draw(figure.add_subplot(), coloured, title)
    return Path(path)


def _grey(images: Tensor, name: str) -> Array:
    """Without the dimension of a single channel."""
    has_channels = images.ndim == (5 if name == "draws" else 4)
    if images.ndim < 3 or (has_channels and images.shape[-3] != 1):
        raise InputError(f"{name}: expected images of one channel, got {tuple(images.shape)}.")
    squeezed = images.squeeze(-3) if has_channels else images
    found: Array = squeezed.detach().double().cpu().numpy()
    return found


def _coloured(images: Array) -> Array:
    """`(n, height, width)` in [0, 1], NaN where hidden -> `(n, height, width, 3)`."""
    grey = np.repeat(images.clip(0, 1)[..., None], 3, -1)
    return np.where(np.isnan(grey), np.array(_HIDDEN), grey)


def _draw(axes: Axes, rows: dict[str, Array], title: str) -> None:
    sheet = np.concatenate([np.concatenate(list(images), 1) for images in rows.values()])
    height, width = next(iter(rows.values())).shape[1:3]
    axes.imshow(sheet, interpolation="nearest", origin="upper")
    for row in range(1, len(rows)):
        axes.axhline(row * height - 0.5, color="white", linewidth=2)
    for column in range(1, sheet.shape[1] // width):
        axes.axvline(column * width - 0.5, color="white", linewidth=1.5)
    axes.set_yticks([(row + 0.5) * height - 0.5 for row in range(len(rows))], list(rows))
    axes.set_xticks([])
    axes.tick_params(length=0)
    axes.grid(visible=False)
    axes.spines[:].set_visible(False)
    axes.set_title(title, wrap=True)


def example() -> dict[str, Tensor]:
    """Made-up images, their lower halves hidden."""
    generator = torch.Generator().manual_seed(0)
    truth = torch.rand(5, 8, 8, generator=generator) * 2 - 1
    seen = truth.clone()
    seen[:, 4:] = torch.nan
    draws = truth + 0.3 * torch.randn(20, 5, 8, 8, generator=generator)
    return {"truth": truth, "seen": seen, "draws": draws}
