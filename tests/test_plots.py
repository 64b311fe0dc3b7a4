"""Pictures: written where asked, in the size of what they show, and without touching Matplotlib's global state."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import matplotlib as mpl
import numpy as np
import pytest
import torch

from probgen.core import Cost, InputError, Posterior, Terms
from probgen.diagnostics.plots import (
    _density,
    _pixels,
    _rank_counts,
    _running_median,
    _tiles,
    example,
    image_grid,
    plot_history,
    plot_ranks,
    plot_terms,
    plot_traces,
    reconstruction_grid,
)
from probgen.diagnostics.summary import example as chains

DIGITS = torch.linspace(-1, 1, 7 * 64).reshape(7, 8, 8)

PICTURES: dict[str, Callable[[Path], Path]] = {
    "grid": lambda path: image_grid(DIGITS, path, title="Seven"),
    "colour": lambda path: image_grid(torch.rand(5, 3, 4, 6), path, bounds=(0, 1), num_columns=5),
    "constant": lambda path: image_grid(torch.ones(2, 1, 4, 4), path, bounds=None),
    "reconstructions": lambda path: reconstruction_grid(DIGITS, 0.5 * DIGITS, path, num_columns=4),
    "chain of terms": lambda path: plot_terms(example(), path),
    "two terms": lambda path: plot_terms(Terms(("z", "x"), torch.tensor([-9.0, 3.0]), torch.ones(2)), path),
    "gains alone": lambda path: plot_terms(
        Terms(tuple(map(str, range(20))), torch.ones(20), torch.ones(20)), path
    ),
    "traces": lambda path: plot_traces(chains(), path),
    "divergent traces": lambda path: plot_traces(
        replace(chains(), stats={"diverging": torch.ones(4, 500, dtype=torch.bool)}), path, sites=["tau"]
    ),
    "constant traces": lambda path: plot_traces(
        Posterior({"k": torch.ones(2, 50, 12, dtype=torch.int64)}, "mcmc", "exact", "hand", Cost()), path
    ),
    "ranks": lambda path: plot_ranks(chains(), path, sites=["z"]),
    "history": lambda path: plot_history(
        {"training": [3.0, 2.0, float("nan")] * 100, "held out": [(10, 2.5)]}, path
    ),
}


@pytest.mark.parametrize("name", PICTURES)
@pytest.mark.parametrize("ending", ["png", "svg"])
def test_a_picture_is_written(name: str, ending: str, tmp_path: Path) -> None:
    path = tmp_path / "new folder" / f"picture.{ending}"
    before = dict(mpl.rcParams)
    assert PICTURES[name](path) == path
    assert path.stat().st_size > 1000
    assert dict(mpl.rcParams) == before
    PICTURES[name](path)  # its own output may be written again


def test_no_figure_is_left_to_pyplot(tmp_path: Path) -> None:
    from matplotlib import pyplot

    plot_traces(chains(), str(tmp_path / "traces.png"))
    assert pyplot.get_fignums() == []


def test_pictures_do_not_depend_on_the_users_style(tmp_path: Path) -> None:
    images = [image_grid(DIGITS, tmp_path / "plain.png").read_bytes()]
    with mpl.rc_context({"image.cmap": "jet", "image.interpolation": "bilinear", "image.origin": "lower"}):
        images.append(image_grid(DIGITS, tmp_path / "styled.png").read_bytes())
    assert images[0] == images[1]


def test_pixels_keep_their_place_and_scale() -> None:
    tiles = _tiles(_pixels(DIGITS, (-1.0, 1.0)), columns=3)
    assert tiles.shape == (3, 3, 8, 8, 1)
    np.testing.assert_allclose(tiles[1, 2, ..., 0], (DIGITS[5] + 1) / 2, atol=1e-6)
    assert np.isnan(tiles[2, 1:]).all()
    assert _pixels(torch.tensor([[[-9.0, 9.0]]]), (-1.0, 1.0)).ravel().tolist() == [
        0.0,
        1.0,
    ]  # clipped, not wrapped


def test_ranks_of_sound_chains_are_flat_and_of_a_moved_chain_are_not() -> None:
    """500 draws in 20 bins: 25 +- 4.2 a bin; moved by one sd, the last bin of that chain is 9 standard errors off."""
    x = torch.randn(4, 500, generator=torch.Generator().manual_seed(0)).numpy()
    sound = _rank_counts(x, 20)
    assert sound.sum(1).tolist() == [500] * 4
    assert sound.sum(0).tolist() == [100] * 20
    assert np.abs(sound - 25).max() < 4.5 * 4.2
    assert (_rank_counts(np.zeros((4, 500)), 20) == 25).all()  # ties favour no chain
    x[3] += 1
    assert _rank_counts(x, 20)[3, -1] > 25 + 9 * 4.2


def test_density_integrates_to_one_and_peaks_at_the_mean() -> None:
    at, density = _density(np.random.default_rng(0).normal(2.0, 0.5, 2000))
    assert np.trapezoid(density, at) == pytest.approx(1, abs=0.01)
    assert at[density.argmax()] == pytest.approx(2, abs=0.2)


def test_running_median_ignores_an_outlier() -> None:
    assert _running_median(np.array([1.0, 1, 100, 1, 1]), 1).tolist() == [1.0, 1, 1, 1, 1]


@pytest.mark.parametrize(
    ("call", "complaint"),
    [
        (lambda path: image_grid(torch.zeros(3, 64), path), r"got \(3, 64\)"),
        (lambda path: image_grid(torch.zeros(0, 8, 8), path), "n >= 1"),
        (lambda path: image_grid(torch.zeros(2, 2, 8, 8), path), "1 or 3"),
        (lambda path: reconstruction_grid(DIGITS, DIGITS[:3], path), "must be the same"),
        (lambda path: plot_terms(Terms((), torch.zeros(0), torch.zeros(0)), path), "no terms"),
        (lambda path: plot_traces(chains(), path, sites=["t"]), "no site 't'"),
        (lambda path: plot_ranks(replace(chains(), draws={"tau": chains()["tau"][:1]}), path), "one only"),
        (lambda path: plot_history({"loss": []}, path), "no finite value"),
        (
            lambda path: plot_history({"loss": [(1, 2, 3)]}, path),
            r"curves\['loss'\] must hold numbers, or pairs",
        ),
        (lambda path: plot_history({"loss": ["a"]}, path), r"curves\['loss'\] must hold numbers, or pairs"),
    ],
)
def test_what_cannot_be_drawn_is_refused(
    call: Callable[[Path], Path], complaint: str, tmp_path: Path
) -> None:
    with pytest.raises(InputError, match=complaint):
        call(tmp_path / "picture.png")
    assert list(tmp_path.iterdir()) == []
