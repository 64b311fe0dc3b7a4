"""What do paths and their density look like on the way between data and noise?"""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from probgen.core import InputError, check_arguments
from probgen.diagnostics.densities import Density, held
from probgen.diagnostics.mesh import Mesh
from probgen.diagnostics.plots import PALETTE, File, new_figure

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_NUM_TIMES = 160  # columns of the picture of a density over time
_NUM_PATHS = 16
_NUM_PANELS = 5
_NUM_POINTS_SHOWN = 400
_HELD = (0.99, 0.9, 0.6, 0.3)
_SHADES = ("#e8f1fa", "#c6dbef", "#9ecae1", "#6baed6")  # light, so that what is drawn on top is seen


def plot_flow(
    density: Density,
    mesh: Mesh,
    runs: Mapping[str, tuple[Tensor, Tensor]],
    path: File,
    *,
    title: str = "",
    unit: str = "",
) -> Path:
    """Densities over time with trajectories on top, one panel a run on the line, one row of panels a run on the plane.

    On the line a density is shown relative to its largest value at that time, on the plane by the smallest regions that
    hold 99, 90, 60 and 30 % of its mass: narrow and wide ones are both seen. Time runs to the right as the paths do.

    Args:
        density: p(mesh, t), `exact_density` or `noised_density` for instance.
        mesh: what is shown, one axis or two.
        runs: by name, times `(m,)` and states `(m, n, *event)` of one or two coordinates, as `trajectories` gives them;
            16 paths are shown on the line, and 400 points on the plane, the first ones.
        path: the file to write.
        title: written above.
        unit: of x, where it has one.

    Returns the path. Raises `InputError` where there is no run, or its coordinates are not those of the mesh.
    """
    check_arguments(plot_flow, locals())
    if not runs:
        raise InputError("There are no runs to plot.")
    flat = {name: (times, states.flatten(2)) for name, (times, states) in runs.items()}
    for name, (_, states) in flat.items():
        if states.shape[2] != len(mesh.low):
            raise InputError(
                f"Run {name!r} has {states.shape[2]} coordinates and the mesh has {len(mesh.low)}."
            )
    draw, size = (_draw_line, (0.7 + 3.6 * len(runs), 3.4)) if len(mesh.low) == 1 else (_draw_plane, None)
    with new_figure(path, size=size or (2.0 * _NUM_PANELS + 0.6, 0.7 + 2.1 * len(runs))) as figure:
        draw(figure, held(density), mesh, flat, f" ({unit})" if unit else "")
        if title:
            figure.suptitle(title, x=0.01, ha="left", fontsize=10)
    return Path(path)


def _draw_line(
    figure: Figure,
    density: Density,
    mesh: Mesh,
    runs: Mapping[str, tuple[Tensor, Tensor]],
    unit: str,
) -> None:
    panels = figure.subplots(1, len(runs), sharey=True, squeeze=False)[0]
    picture: Any = None
    for panel, (name, (times, states)) in zip(panels, runs.items(), strict=True):
        at = np.linspace(times.min().item(), times.max().item(), _NUM_TIMES)
        columns = [_relative(density(mesh, t)) for t in at]
        picture = panel.pcolormesh(
            at,
            mesh.axes[0].numpy(),
            np.stack(columns, 1),
            cmap="Blues",
            vmin=0,
            vmax=1.5,
            shading="nearest",
            rasterized=True,
        )
        for i in range(min(_NUM_PATHS, states.shape[1])):
            panel.plot(times, states[:, i, 0].cpu(), color=PALETTE[1], linewidth=0.6, alpha=0.8)
        panel.set_title(name)
        panel.set_xlabel("time t (0: data, 1: noise)")
        panel.set_xlim(times[0].item(), times[-1].item())
        panel.set_ylim(mesh.low[0], mesh.high[0])
        panel.grid(visible=False)
    panels[0].set_ylabel(f"x{unit}")
    bar = figure.colorbar(picture, ax=panels, label="density / its maximum at that time", pad=0.02)
    bar.ax.set_ylim(0, 1)


def _draw_plane(
    figure: Figure,
    density: Density,
    mesh: Mesh,
    runs: Mapping[str, tuple[Tensor, Tensor]],
    unit: str,
) -> None:
    rows = figure.subplots(len(runs), _NUM_PANELS, sharex=True, sharey=True, squeeze=False)
    for row, (name, (times, states)) in zip(rows, runs.items(), strict=True):
        chosen = torch.linspace(0, len(times) - 1, _NUM_PANELS).round().long().tolist()
        for panel, k in zip(row, chosen, strict=True):
            t = times[k].item()
            draw_density(panel, mesh, density(mesh, t))
            x, y = states[k, :_NUM_POINTS_SHOWN].cpu().unbind(1)
            panel.plot(x, y, ".", color=PALETTE[1], markersize=2.5, alpha=0.6, markeredgewidth=0)
            panel.set_title(f"t = {t:.3g}")
        row[0].set_ylabel(f"{name}\nx[1]{unit}")
    for panel in rows[-1]:
        panel.set_xlabel(f"x[0]{unit}")


def draw_density(panel: Axes, mesh: Mesh, density: Tensor) -> None:
    """Shade the smallest regions of the plane that hold 99, 90, 60 and 30 % of the mass."""
    descending = density.flatten().sort(descending=True).values
    held = descending.cumsum(0) / descending.sum()
    levels = [descending[int((held < part).sum())].item() for part in _HELD]
    x, y = (axis.numpy() for axis in mesh.axes)
    edges = [*levels, math.inf]
    panel.contourf(x, y, density.T.numpy(), levels=edges, colors=_SHADES, extend="neither")
    panel.set_aspect("equal")
    panel.set_xlim(mesh.low[0], mesh.high[0])
    panel.set_ylim(mesh.low[1], mesh.high[1])
    panel.grid(visible=False)


def _relative(density: Tensor) -> Any:
    largest = density.max().item()
    return (density / (largest if largest > 0 else math.inf)).numpy()


def example() -> tuple[Density, Mesh, dict[str, tuple[Tensor, Tensor]]]:
    """What `plot_flow` takes first: two noised points and a path to each."""
    from probgen.diagnostics import densities

    times = torch.linspace(1.0, 0.1, 4).double()
    states = torch.tensor([[[0.3], [-0.2]], [[0.6], [-0.5]], [[1.0], [-0.8]], [[1.4], [-1.0]]]).double()
    return densities.example(), Mesh((-4.0,), (4.0,), 128), {"by hand": (times, states)}
