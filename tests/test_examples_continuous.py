"""The pictures of examples/ are drawn and their claims hold, with tiny settings; without what they claim, they fail."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from torch import Tensor

from example_tools import load, run

TINY: dict[str, dict[str, Any]] = {
    "trajectories": {"num_particles": 1000, "num_steps": 60},
    "score_field": {"num_arrows": 8},
    "quality_against_calls": {"num_draws": 1000, "budgets": (5, 20, 60)},
    "langevin_is_slow": {"num_draws": 2500, "num_calls": 401},
    "score_error": {"num_steps": 500, "width": 48, "num_data": 5000},
    "fokker_planck": {"num_particles": 1000, "num_steps": 30},
}


@pytest.mark.parametrize("name", TINY)
def test_an_example_draws_its_picture_and_checks_its_claim(name: str, tmp_path: Path) -> None:
    text = run(load(name), tmp_path / "new", **TINY[name])
    assert text.startswith("Claim: ")
    pictures = list((tmp_path / "new").iterdir())
    assert pictures
    assert all(picture.stat().st_size > 10_000 for picture in pictures)


def test_quality_is_measured_for_every_engine_that_carries_noise_to_data(tmp_path: Path) -> None:
    from probgen.models.gaussian_mixture import GaussianMixture

    module = load("quality_against_calls")
    found = {
        name
        for name, cls in module.methods("inference").items()
        if module.serves(cls, GaussianMixture.example())
    }
    assert {"Ancestral", "ReverseSDE", "ProbabilityFlowODE"} <= found
    assert not found & {"SVI", "NUTS", "Guide"}


def test_wrong_claims_fail(tmp_path: Path) -> None:
    """Solvers that never arrive; plain Langevin that starts from the answer; paths that start from the wrong noise."""
    quality = load("quality_against_calls")
    right_measure = quality.measure
    quality.measure = lambda *given: (lambda calls, distance: (calls, distance + 0.5))(*right_measure(*given))
    with pytest.raises(AssertionError):
        run(quality, tmp_path, num_draws=200, budgets=(5, 20))

    slow = load("langevin_is_slow")
    slow.langevin = lambda mixture, num_draws, num_calls: exact(mixture, num_draws)
    with pytest.raises(AssertionError):
        run(slow, tmp_path, num_draws=500, num_calls=201)

    paths = load("trajectories")
    right = paths.trajectories
    paths.trajectories = lambda program, x, **options: right(program, 1.2 * x, **options)
    with pytest.raises(AssertionError, match="left the density"):
        run(paths, tmp_path, num_particles=1500, num_steps=20)


def exact(mixture: Any, num_draws: int) -> Tensor:
    from probgen import Batch

    return mixture.model(Batch(num_rows=num_draws))
