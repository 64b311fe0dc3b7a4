"""What have the units of a machine learnt, what do they dream, and what do they remember?"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from probgen.core import InputError, Pairwise, Posterior, Size, check_arguments, describe
from probgen.couplings import seen_couplings
from probgen.diagnostics.plots import PALETTE, Array, File, new_figure

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Head = tuple[int, int, str]
"""First column of a group, the column after its last, and what stands above it."""

_STRONGEST = 0.995  # of all weights lie within the scale of colours
_LAST = "draws, and on the right of each the mean of all"
_UNSEEN = "#F4D8A8"
_FRAME = 0.8  # grey
_INCH, _FINE = 0.34, 48  # a tile, and the least of its pixels


def plot_filters(program: Pairwise, path: File, *, num_filters: Size = 64, title: str = "") -> Path:
    """The weights between the data and each hidden unit of the layer above as images, the longest first.

    Red pixels turn a unit on and blue ones turn it off; white is 0, and all have one scale.

    Args:
        program: a machine whose data are images, `(height, width)` or `(1, height, width)`; of a belief net the first
            of its `stack()`.
        path: the file to write.
        num_filters: how many are shown, fewer where there are fewer.
        title: written above.

    Returns the path. Raises `InputError` for machines without hidden units, or whose data are no images.
    """
    check_arguments(plot_filters, locals())
    couplings = seen_couplings(program)
    above = [weight for (lower, upper), weight in couplings.weights.items() if lower == "x" != upper]
    if not above:
        raise InputError(f"{describe(program)} has no hidden units, and no filters to plot.")
    filters = above[0].detach().double().mT
    longest = filters.norm(dim=1).argsort(descending=True)[:num_filters]
    images = filters[longest].reshape(len(longest), *_image_shape(program))
    largest = float(images.abs().flatten().quantile(_STRONGEST)) or 1.0
    tiles = _in_rows(_signed(images / largest))
    with new_figure(path, size=_size(tiles)) as figure:
        axes = figure.add_subplot()
        _draw(axes, tiles, [(0, tiles.shape[1], "")])
        axes.set_title(title)
        axes.set_xlabel(f"weights from {-largest:.2g} (blue) over 0 (white) to {largest:.2g} (red)")
    return Path(path)


def plot_fantasies(
    posterior: Posterior, path: File, *, num_particles: Size = 10, num_columns: Size = 12, title: str = ""
) -> Path:
    """Particles over the sweeps of their chains: a row each, the first draws on the left and ever longer gaps.

    Chains that stay in one mode show the same image along their row.

    Args:
        posterior: draws of images at site "x", `(chain, draw, height, width)` or `(chain, draw, 1, height, width)`,
            e.g. `infer(rbm, Gibbs(num_warmup=0), num_draws=1000, num_chains=10)`.
        path: the file to write.
        num_particles, num_columns: the chains and draws shown, fewer where there are fewer.
        title: written above.

    Returns the path. Raises `InputError` for draws that are no images.
    """
    check_arguments(plot_fantasies, locals())
    images = _images(posterior["x"].flatten(0, 1), "Draws of site 'x'")
    images = images.unflatten(0, (posterior.num_chains, posterior.num_draws))[:num_particles]
    draws = sorted({round(draw) for draw in np.geomspace(1, posterior.num_draws, num_columns)})
    shown = images[:, [draw - 1 for draw in draws]]
    heads = [(column, column + 1, f"{draw:,}") for column, draw in enumerate(draws)]
    tiles = _ink(shown)
    with new_figure(path, size=_size(tiles)) as figure:
        axes = figure.add_subplot()
        _draw(axes, tiles, heads)
        axes.set_xlabel("draw of each chain")
        axes.set_title(title)
    return Path(path)


def plot_recall(
    truth: Tensor,
    cue: Tensor,
    completions: Mapping[str, Tensor],
    path: File,
    *,
    num_draws: Size = 4,
    title: str = "",
) -> Path:
    """Patterns, what was seen of them, and how each machine completes it: a few draws, and the mean of all.

    Args:
        truth: `(n, height, width)` or `(n, 1, height, width)`, white at 0 and black at 1.
        cue: the same with NaN where nothing was seen, drawn in a colour of its own.
        completions: by name, `(draw, n, *event)`, e.g. `posterior.flat("x")`.
        path: the file to write.
        num_draws: draws shown of each, fewer where there are fewer.
        title: written above.

    Returns the path. Raises `InputError` for other shapes.
    """
    check_arguments(plot_recall, locals())
    tiles, heads = _recall(truth, cue, completions, num_draws)
    with new_figure(path, size=_size(tiles)) as figure:
        axes = figure.add_subplot()
        _draw(axes, tiles, heads)
        axes.set_title(title)
        axes.set_xlabel(_LAST)
    return Path(path)


def draw_recall(
    axes: Axes, truth: Tensor, cue: Tensor, completions: Mapping[str, Tensor], num_draws: Size = 4
) -> None:
    """What `plot_recall` draws, into axes of a picture of one's own."""
    _draw(axes, *_recall(truth, cue, completions, num_draws))
    axes.set_xlabel(_LAST)


def _recall(
    truth: Tensor, cue: Tensor, completions: Mapping[str, Tensor], num_draws: int
) -> tuple[Array, list[Head]]:
    columns = [_ink(_images(truth, "truth")), _ink(_images(cue, "cue"))]
    heads = [(0, 1, "truth"), (1, 2, "seen")]
    for name, draws in completions.items():
        if draws.shape[1:] != truth.shape or cue.shape != truth.shape or not len(draws):
            raise InputError(
                f"Completions {name!r} of shape {tuple(draws.shape)} and a cue of shape {tuple(cue.shape)} do not "
                f"fit truth of shape {tuple(truth.shape)}: expected (draw, {', '.join(map(str, truth.shape))})."
            )
        parts = [*draws[:num_draws], draws.double().mean(0)]
        columns += [_ink(_images(part, name)) for part in parts]
        heads.append((len(columns) - len(parts), len(columns), name))
    return np.stack(columns, 1), heads


def _image_shape(program: Pairwise) -> tuple[int, int]:
    shape = tuple(getattr(program, "event_shape", ()))
    height_and_width = shape[1:] if len(shape) == 3 and shape[0] == 1 else shape
    if len(height_and_width) != 2:
        raise InputError(f"The data of {describe(program)} are no images: one x has shape {shape}.")
    return height_and_width[0], height_and_width[1]


def _images(x: Tensor, what: str) -> Tensor:
    images = x.detach().double().cpu()
    images = images[:, 0] if images.ndim == 4 and images.shape[1] == 1 else images
    if images.ndim != 3 or not len(images):
        raise InputError(f"{what}: expected images (n, height, width), got shape {tuple(x.shape)}.")
    return images


def _signed(share: Tensor) -> Array:
    """`(n, height, width, 3)`: white at 0, blue at -1 and below, red at 1 and above."""
    share = share.clamp(-1, 1)[..., None]
    blue, red = (torch.tensor(_rgb(colour)) for colour in PALETTE[:2])
    return (1 - share.clamp_min(0) * (1 - red) - (-share).clamp_min(0) * (1 - blue)).numpy()


def _in_rows(tiles: Array) -> Array:
    """`(n, ...)` in about as many rows as columns, `(rows, columns, ...)`; what is left over is paper."""
    columns = math.ceil(math.sqrt(len(tiles)))
    rows = -(-len(tiles) // columns)
    filled = np.ones((rows * columns, *tiles.shape[1:]))
    filled[: len(tiles)] = tiles
    return filled.reshape(rows, columns, *tiles.shape[1:])


def _rgb(colour: str) -> tuple[float, ...]:
    """Red, green and blue in [0, 1] of "#rrggbb"."""
    return tuple(part / 255 for part in bytes.fromhex(colour[1:]))


def _ink(images: Tensor) -> Array:
    """`(..., height, width, 3)`: paper at 0, black at 1, what was not seen in its own colour."""
    pixels = 1 - images.clamp(0, 1)[..., None].expand(*images.shape, 3).numpy()
    return np.where(np.isnan(pixels), np.array(_rgb(_UNSEEN)), pixels)


def _size(tiles: Array) -> tuple[float, float]:
    """Inches of a picture of these tiles."""
    rows, columns, height, width, _ = tiles.shape
    inch = max(_INCH, 4.0 / columns)
    return inch * columns, inch * rows * height / width + 0.5


def _draw(axes: Axes, tiles: Array, heads: Sequence[Head]) -> None:
    """Tiles `(rows, columns, height, width, 3)` side by side, groups of columns set apart, with their heads."""
    fine = -(-_FINE // tiles.shape[2])
    tiles = tiles.repeat(fine, axis=2).repeat(fine, axis=3)
    framed = np.pad(tiles, ((0, 0), (0, 0), (1, 1), (1, 1), (0, 0)), constant_values=_FRAME)
    gap = np.ones((len(tiles) * framed.shape[2], _FINE // 6, 3))
    sheet, middles = [gap[:, :0]], []
    for first, end, _ in heads:
        group = framed[:, first:end].swapaxes(1, 2).reshape(len(gap), -1, 3)
        start = sum(part.shape[1] for part in sheet)
        middles.append(start + group.shape[1] / 2)
        sheet += [group, gap]
    axes.imshow(np.concatenate(sheet[:-1], axis=1), interpolation="nearest", origin="upper")
    axes.set_xticks(middles, [head for _, _, head in heads], fontsize=8)
    axes.tick_params(length=0, labeltop=True, labelbottom=False)
    axes.set_yticks([])
    axes.grid(visible=False)
    axes.spines[:].set_visible(False)


def example() -> Tensor:
    """Two patterns of 3 x 4 pixels."""
    return torch.linspace(0, 1, 24).reshape(2, 3, 4)
