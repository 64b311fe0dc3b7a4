"""What does it look like? Pictures for a report, each written to one file, whatever Matplotlib's backend.

Every function returns the path it wrote, whose ending decides the format (.png, .pdf, .svg); its folder is made.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import islice
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from probgen.core import FileError, InputError, Posterior, Size, Terms, check, check_arguments, shown

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Array = npt.NDArray[np.float64]
File = str | PathLike[str]
Curve = Sequence[float] | Sequence[tuple[float, float]]

# Okabe and Ito (2008): told apart by every kind of colour vision.
PALETTE = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
_STYLE: Any = {
    "font.size": 9,
    "axes.titlesize": 9,
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "0.9",
    "grid.linewidth": 0.6,
    "legend.frameon": False,
    "legend.fontsize": 8,
}
_DPI = 160
_FEW_TERMS = 12
_MOST_ENTRIES = 8


# --- images --------------------------------------------------------------------------------------------------------


def image_grid(
    images: Tensor,
    path: File,
    *,
    num_columns: Size | None = None,
    bounds: tuple[float, float] | None = (-1.0, 1.0),
    title: str = "",
) -> Path:
    """Images side by side, on one scale of grey or in colour.

    Args:
        images: `(n, height, width)`, or `(n, channels, height, width)` with 1 or 3 channels.
        path: the file to write.
        num_columns: None makes the grid about square.
        bounds: the values shown as black and white; None takes the smallest and largest there are.
        title: written above.

    Returns the path. Raises `InputError` for other shapes, or no images.
    """
    check_arguments(image_grid, locals())
    pixels = _pixels(images, bounds)
    columns = num_columns or math.ceil(math.sqrt(len(pixels)))
    with new_figure(path) as figure:
        _draw_tiles(figure, _tiles(pixels, columns), title)
    return Path(path)


def reconstruction_grid(
    originals: Tensor,
    reconstructions: Tensor,
    path: File,
    *,
    num_columns: Size = 10,
    bounds: tuple[float, float] | None = (-1.0, 1.0),
    title: str = "",
) -> Path:
    """Pairs of rows: data above, their reconstructions below.

    Args:
        originals, reconstructions: `(n, height, width)` or `(n, channels, height, width)`, the same shape.
        path, bounds, title: as for `image_grid`.
        num_columns: pairs side by side.

    Returns the path. Raises `InputError` for other shapes, or no images.
    """
    check_arguments(reconstruction_grid, locals())
    if originals.shape != reconstructions.shape:
        raise InputError(
            f"Originals have shape {tuple(originals.shape)} and reconstructions {tuple(reconstructions.shape)}: "
            "they must be the same."
        )
    both = _pixels(torch.cat([originals, reconstructions.to(originals)]), bounds)
    above, below = (_tiles(half, min(num_columns, len(half))) for half in np.split(both, 2))
    rows = np.stack([above, below], axis=1).reshape(-1, *above.shape[1:])
    with new_figure(path) as figure:
        axes = _draw_tiles(figure, rows, title)
        height = rows.shape[2]
        axes.set_yticks(
            [(row + 0.5) * height - 0.5 for row in range(len(rows))], ["data", "model"] * len(above)
        )
        axes.tick_params(length=0)
    return Path(path)


def _pixels(images: Tensor, bounds: tuple[float, float] | None) -> Array:
    """`(n, height, width, 1 or 3)`, scaled so that bounds are 0 and 1."""
    pixels = images.detach().double().cpu()
    if pixels.ndim == 3:
        pixels = pixels[:, None]
    if pixels.ndim != 4 or pixels.shape[1] not in (1, 3) or not len(pixels):
        raise InputError(
            f"Expected images (n, height, width) or (n, 1 or 3, height, width) with n >= 1, got {tuple(images.shape)}."
        )
    low, high = bounds or (float(pixels.min()), float(pixels.max()))
    scaled = (pixels - low) / ((high - low) or 1.0)
    return scaled.clamp(0, 1).permute(0, 2, 3, 1).numpy()


def _tiles(pixels: Array, columns: int) -> Array:
    """`(rows, columns, height, width, channels)`; what is left over is not a number, and shown as paper."""
    rows = -(-len(pixels) // columns)
    tiles = np.full((rows * columns, *pixels.shape[1:]), np.nan)
    tiles[: len(pixels)] = pixels
    return tiles.reshape(rows, columns, *pixels.shape[1:])


def _draw_tiles(figure: Figure, tiles: Array, title: str) -> Axes:
    """One picture of all tiles, white lines between them: sharp at any size, and quick."""
    rows, columns, height, width, _ = tiles.shape
    sheet = tiles.swapaxes(1, 2).reshape(rows * height, columns * width, -1)
    paper = np.where(np.isnan(sheet), 1.0, sheet)
    wide = min(10.0, max(4.0, 0.5 * columns))
    figure.set_size_inches(wide, wide * rows * height / (columns * width))
    axes = figure.add_subplot()
    picture = paper.squeeze(-1) if paper.shape[-1] == 1 else paper
    axes.imshow(picture, cmap="gray", vmin=0, vmax=1, interpolation="nearest", origin="upper")
    for column in range(1, columns):
        axes.axvline(column * width - 0.5, color="white", linewidth=1.5)
    for row in range(1, rows):
        axes.axhline(row * height - 0.5, color="white", linewidth=1.5)
    axes.grid(visible=False)
    axes.spines[:].set_visible(False)
    axes.set_xticks([])
    axes.set_yticks([])
    axes.set_title(title)
    return axes


# --- the bound -----------------------------------------------------------------------------------------------------


def plot_terms(terms: Terms, path: File, *, title: str = "Terms of the bound") -> Path:
    """What each term adds to a bound, in nats a datum, with its standard error.

    A few terms are bars with a sign. A long chain is a curve of nats *lost* a step (the KL terms), on a log axis where
    they span more than a factor 20; terms that add nats are told in the corner.

    Args:
        terms: e.g. `evidence(program, ELBOEstimate(), data).terms`.
        path: the file to write.
        title: written above.

    Returns the path. Raises `InputError` where there is no term.
    """
    check_arguments(plot_terms, locals())
    if not terms.names:
        raise InputError("There are no terms to plot.")
    value, error = _floats(terms.value), _floats(terms.standard_error)
    total = f"{title}: sum {value.sum():.4g} nats a datum"
    with new_figure(path, size=(6.5, 0.9 + 0.32 * len(value) if len(value) <= _FEW_TERMS else 3.6)) as figure:
        axes = figure.add_subplot()
        axes.set_title(total)
        draw = _draw_bars if len(value) <= _FEW_TERMS else _draw_losses
        draw(axes, terms.names, value, error)
    return Path(path)


def _draw_bars(axes: Axes, names: Sequence[str], value: Array, error: Array) -> None:
    colours = [PALETTE[0] if gained else PALETTE[1] for gained in value >= 0]
    axes.barh(
        range(len(names)),
        value,
        xerr=error,
        color=colours,
        height=0.65,
        error_kw={"linewidth": 1, "capsize": 2},
    )
    axes.axvline(0, color="black", linewidth=0.8)
    axes.set_yticks(range(len(names)), names)
    axes.invert_yaxis()
    axes.grid(visible=False, axis="y")
    axes.set_xlabel("nats added to the bound a datum, ± 1 standard error")


def _draw_losses(axes: Axes, names: Sequence[str], value: Array, error: Array) -> None:
    lost = value < 0
    at, loss, spread = np.flatnonzero(lost), -value[lost], error[lost]
    logarithmic = len(loss) > 0 and loss.max() > 20 * loss.min()
    lower = np.maximum(loss - spread, loss / 10) if logarithmic else loss - spread
    marker = "o" if len(at) <= 60 else ""
    axes.plot(at, loss, color=PALETTE[0], linewidth=1.2, marker=marker, markersize=3, label="term")
    axes.fill_between(
        at, lower, loss + spread, color=PALETTE[0], alpha=0.25, linewidth=0, label="± 1 standard error"
    )
    axes.set_yscale("log" if logarithmic else "linear")
    ticks = np.unique(np.linspace(0, len(names) - 1, 7).round().astype(int))
    axes.set_xticks(ticks, [names[tick] for tick in ticks])
    axes.set_xlim(-0.5, len(names) - 0.5)
    axes.set_xlabel("site, in the order it is drawn")
    axes.set_ylabel("nats lost a datum")
    gained = [f"{names[i]}: {value[i]:+.4g} ± {error[i]:.2g} nats" for i in np.flatnonzero(~lost)[:4]]
    if gained:
        axes.plot([], [], " ", label="not on this axis: " + ", ".join(gained))
    axes.legend(loc="best")


# --- chains --------------------------------------------------------------------------------------------------------


def plot_traces(posterior: Posterior, path: File, sites: Collection[str] | None = None) -> Path:
    """For each entry its density in each chain, and the draws in their order; ticks below mark divergences.

    Chains that have mixed lie on top of one another. At most 8 entries are shown, the first ones.

    Args:
        posterior: draws of any engine.
        path: the file to write.
        sites: which sites; None means all.

    Returns the path. Raises `InputError` for unknown sites, or sites without an entry.
    """
    check_arguments(plot_traces, locals())
    entries = _first_entries(posterior, sites)
    diverging = posterior.stats.get("diverging")
    with new_figure(path, size=(8.5, 0.5 + 1.35 * len(entries))) as figure:
        axes = figure.subplots(len(entries), 2, squeeze=False, width_ratios=(1, 2.2))
        for (left, right), (name, chains) in zip(axes, entries, strict=True):
            for colour, draws in zip(_colours(chains), chains, strict=True):
                left.plot(*_density(draws), color=colour, linewidth=1.1)
                right.plot(draws, color=colour, linewidth=0.5, alpha=0.75)
            if diverging is not None:
                _mark(right, diverging)
            left.set_yticks([])
            left.set_ylim(bottom=0)
            left.set_xlabel(name)
            left.set_ylabel("density")
            right.set_ylabel(name)
            right.margins(x=0)
        axes[-1, 1].set_xlabel("draw")
        axes[0, 0].set_title(f"one colour a chain, {posterior.num_chains} chains")
        axes[0, 1].set_title(_divergence_count(diverging))
    return Path(path)


def plot_ranks(
    posterior: Posterior, path: File, sites: Collection[str] | None = None, num_bins: Size = 20
) -> Path:
    """For each entry, how the ranks of a chain's draws among all draws are spread: flat where chains agree.

    The grey band holds 95 % of the bars of independent draws; correlated draws leave it more often. At most 8 entries
    are shown, the first ones.

    Args:
        posterior: draws of at least two chains.
        path: the file to write.
        sites: which sites; None means all.
        num_bins: bars of a chain.

    Returns the path. Raises `InputError` for one chain, or unknown sites.

    Source: Vehtari et al. (2021), arXiv 1903.08008.
    """
    check_arguments(plot_ranks, locals())
    if posterior.num_chains < 2:
        raise InputError("Ranks compare chains, and there is one only: draw with num_chains=4.")
    entries = _first_entries(posterior, sites)
    expected = posterior.num_draws / num_bins
    width = 1.96 * math.sqrt(expected * (1 - 1 / num_bins) * (1 - 1 / posterior.num_chains))
    columns = 2 if len(entries) > 1 else 1
    rows = -(-len(entries) // columns)
    with new_figure(path, size=(4.2 * columns, 0.6 + 1.6 * rows)) as figure:
        axes = figure.subplots(rows, columns, squeeze=False).ravel()
        for panel, (name, chains) in zip(axes, entries, strict=False):
            panel.axhspan(expected - width, expected + width, color="0.88", linewidth=0)
            for colour, counts in zip(_colours(chains), _rank_counts(chains, num_bins), strict=True):
                panel.stairs(
                    counts, np.linspace(0, 100, num_bins + 1), baseline=None, color=colour, linewidth=1.1
                )
            panel.set_title(name)
            panel.set_ylim(bottom=0)
            panel.set_xlim(0, 100)
            panel.grid(visible=False)
        for panel in axes[len(entries) :]:
            panel.set_visible(False)
        figure.supxlabel("rank among the draws of all chains (%), one colour a chain", fontsize=9)
        figure.supylabel("draws in a bin", fontsize=9)
    return Path(path)


def _first_entries(posterior: Posterior, sites: Collection[str] | None) -> list[tuple[str, Array]]:
    entries = list(islice(_entries(posterior, sites), _MOST_ENTRIES))
    if not entries:
        shapes = {site: tuple(value.shape) for site, value in posterior.draws.items()}
        raise InputError(f"There is nothing to plot: no entries in draws of shapes {shapes}.")
    return entries


def _entries(posterior: Posterior, sites: Collection[str] | None) -> Iterator[tuple[str, Array]]:
    """(name, `(chain, draw)`) of every entry of the sites, labelled by coords where there are any."""
    for site in posterior.draws if sites is None else sites:
        draws = _floats(posterior[site])
        for index in np.ndindex(draws.shape[2:]):
            labels = [_label(posterior, site, axis, i) for axis, i in enumerate(index)]
            yield site + (f"[{', '.join(labels)}]" if labels else ""), draws[(..., *index)]


def _label(posterior: Posterior, site: str, axis: int, i: int) -> str:
    names = posterior.dims.get(site, ())
    coords = posterior.coords.get(names[axis]) if axis < len(names) else None
    return str(i if coords is None else coords[i])


def _density(draws: Array, num_points: int = 200) -> tuple[Array, Array]:
    """Gaussian kernel density with Silverman's bandwidth 0.9 min(sd, IQR / 1.34) n^(-1/5)."""
    quartile = np.subtract(*np.quantile(draws, (0.75, 0.25))) / 1.34
    sd = draws.std()
    bandwidth = 0.9 * (min(sd, quartile) or sd or 1e-3) * len(draws) ** -0.2
    # From the first draw to the last: a scale must not seem to reach below 0.
    at = np.linspace(draws.min(), draws.max(), num_points)
    kernel = np.exp(-0.5 * ((at[:, None] - draws[None, :]) / bandwidth) ** 2)
    return at, kernel.mean(1) / (bandwidth * math.sqrt(2 * math.pi))


def _rank_counts(chains: Array, num_bins: int) -> Array:
    """Draws of each chain in each bin of their rank among all draws: `(chain, bin)`; ties are shared by all chains."""
    ranks = chains.T.ravel().argsort(kind="stable").argsort().reshape(chains.T.shape).T
    bins = ranks * num_bins // chains.size
    return np.stack([np.bincount(row, minlength=num_bins) for row in bins])


def _mark(axes: Axes, diverging: Tensor) -> None:
    at = diverging.nonzero()[:, 1].tolist()
    axes.plot(at, [0.02] * len(at), "|", color="black", markersize=7, transform=axes.get_xaxis_transform())


def _divergence_count(diverging: Tensor | None) -> str:
    count = 0 if diverging is None else int(diverging.sum())
    return f"{count} divergence{'s' * (count > 1)}, marked below" if count else ""


def _colours(chains: Array) -> list[str]:
    return [PALETTE[i % len(PALETTE)] for i in range(len(chains))]


# --- fitting -------------------------------------------------------------------------------------------------------


def plot_history(
    curves: Mapping[str, Curve], path: File, *, ylabel: str = "loss (nats a datum)", title: str = ""
) -> Path:
    """How quantities moved during a fit; noisy ones are drawn pale, with their running median.

    Args:
        curves: by name, one number a step, or pairs (step, value), e.g. `{"training": history.loss,
            "held out": history.validation}`.
        path: the file to write.
        ylabel: what the numbers are, with the unit.
        title: written above.

    Returns the path. Raises `InputError` where there is nothing to draw.
    """
    check_arguments(plot_history, {"path": path, "ylabel": ylabel, "title": title})
    check("plot_history: curves", curves, Mapping[str, Sequence[Any]])  # losses may be NaN
    points = {name: _points(name, curve) for name, curve in curves.items() if len(curve)}
    points = {name: (step, value) for name, (step, value) in points.items() if len(value)}
    if not points:
        raise InputError(f"plot_history: there is no finite value to plot in the curves {list(curves)}.")
    with new_figure(path, size=(6.5, 3.4)) as figure:
        axes = figure.add_subplot()
        smooth = [
            _draw_curve(axes, step, value, colour, name)
            for colour, (name, (step, value)) in zip(PALETTE, points.items(), strict=False)
        ]
        axes.set_ylim(*_window(smooth))
        axes.set_xlabel("step")
        axes.set_ylabel(ylabel)
        axes.set_title(title)
        axes.legend()
    return Path(path)


def _points(name: str, curve: Curve) -> tuple[Array, Array]:
    """Steps, counted from 1 where they are not given, and values, where both are finite."""
    points = _numbers(curve)
    if points.ndim == 1:
        points = np.stack([np.arange(1.0, len(points) + 1), points], axis=1)
    if points.shape[1:] != (2,):
        raise InputError(f"curves[{name!r}] must hold numbers, or pairs (step, value), got {shown(curve)}.")
    step, value = points[np.isfinite(points).all(1)].T
    return step, value


def _numbers(curve: Curve) -> Array:
    """All of them, as they are nested; none where there is something else."""
    try:
        return np.asarray(curve, dtype=np.float64)
    except (TypeError, ValueError):
        return np.empty(())


def _draw_curve(axes: Axes, step: Array, value: Array, colour: str, name: str) -> Array:
    """Draw one curve; what is returned is free of noise."""
    if len(value) < 100:
        axes.plot(step, value, color=colour, linewidth=1.4, marker="o", markersize=3, label=name)
        return value
    axes.plot(step, value, color=colour, linewidth=0.5, alpha=0.25)
    median = _running_median(value, len(value) // 40)
    axes.plot(step, median, color=colour, linewidth=1.4, label=f"{name} (running median)")
    return median


def _running_median(value: Array, reach: int) -> Array:
    """Median over `reach` neighbours on each side, fewer at the ends."""
    padded = np.pad(value, reach, constant_values=np.nan)
    return np.nanmedian(np.lib.stride_tricks.sliding_window_view(padded, 2 * reach + 1), axis=1)


def _window(curves: Sequence[Array]) -> tuple[float, float]:
    """Limits that leave the steep beginning out: from the lowest value to the value a fiftieth of the way in."""
    low = min(float(curve.min()) for curve in curves)
    high = max(float(curve[len(curve) // 50 :].max()) for curve in curves)
    margin = 0.08 * ((high - low) or 1.0)
    return low - margin, high + margin


# --- files ---------------------------------------------------------------------------------------------------------


def example() -> Terms:
    """The terms of a made-up chain of 40 steps."""
    names = ("x_T", *(f"x_{k}" for k in range(39, 0, -1)), "x")
    lost = 0.05 * torch.linspace(0, 1, 41).mul(5).exp()
    return Terms(names, torch.cat([-lost[:-1], torch.tensor([12.0])]), 0.1 * lost)


@contextmanager
def new_figure(path: File, size: tuple[float, float] = (6.5, 4.0)) -> Iterator[Figure]:
    """A figure of no backend and no global state, in the style of the project, written to path at the end."""
    import matplotlib as mpl
    from matplotlib.figure import Figure

    with mpl.rc_context(_STYLE):
        figure = Figure(figsize=size, dpi=_DPI, layout="constrained")
        yield figure
        try:
            Path(path).parent.mkdir(parents=True, exist_ok=True)
            figure.savefig(path, bbox_inches="tight")
        except (OSError, ValueError) as error:  # a format that matplotlib does not know is a ValueError
            raise FileError(
                f"The file {str(path)!r} cannot be written: {error}. Choose another path."
            ) from error


def _floats(value: Tensor) -> Array:
    return value.detach().double().cpu().numpy()
