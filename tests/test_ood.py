"""Telling what does not belong: areas under curves and their errors against the definitions, letters, the example."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from torch import Tensor

from example_tools import load, run
from probgen import EBM, InputError, Optim, digits, fit
from probgen.data import Quantised
from probgen.diagnostics.roc import ROC, plot_roc, roc
from probgen.letters import letters
from probgen.objectives.smoothed_score_matching import SmoothedScoreMatching
from statistics_tools import ALLOWED_Z

# --- the curve ------------------------------------------------------------------------------------------------------


def pairs(inside: Tensor, outside: Tensor) -> Tensor:
    """1 where the outside datum scores higher, 1/2 for ties: `(outside, inside)`."""
    difference = outside[:, None] - inside
    return (difference > 0).double() + 0.5 * (difference == 0).double()


def with_ties() -> tuple[Tensor, Tensor]:
    return torch.randint(5, (40,)).double(), torch.randint(7, (30,)).double()


def test_the_area_is_the_share_of_pairs_in_order() -> None:
    for inside, outside in (with_ties(), (torch.randn(50), torch.randn(20) + 1)):
        assert roc(inside, outside).auc == pytest.approx(float(pairs(inside, outside).mean()), abs=1e-12)


def test_the_error_is_delongs() -> None:
    """Variances of what single data add, over both sides."""
    inside, outside = with_ties()
    won = pairs(inside, outside)
    variance = float(won.mean(1).var() / len(outside) + won.mean(0).var() / len(inside))
    assert roc(inside, outside).standard_error == pytest.approx(math.sqrt(variance), rel=1e-12)


def test_the_error_is_how_much_areas_vary() -> None:
    """Over 2,000 sets of N(0, 1) against N(1, 1): mean Phi(1/sqrt 2), spread as told to 10 %."""
    curves = [roc(torch.randn(60), torch.randn(40) + 1) for _ in range(2000)]
    areas, errors = (
        torch.tensor(values) for values in zip(*((c.auc, c.standard_error) for c in curves), strict=True)
    )
    truth = 0.5 * (1 + math.erf(0.5))
    assert abs(float(areas.mean()) - truth) < ALLOWED_Z * float(areas.std()) / math.sqrt(2000)
    assert float(errors.square().mean().sqrt() / areas.std()) == pytest.approx(1, abs=0.1)


def test_points_of_the_curve() -> None:
    found = roc(torch.tensor([0.0, 1.0, 2.0]), torch.tensor([1.5, 3.0]))
    assert torch.equal(found.caught, torch.tensor([0, 0.5, 0.5, 1, 1, 1], dtype=torch.float64))
    torch.testing.assert_close(found.false_alarms * 3, torch.tensor([0, 0, 1, 1, 2, 3], dtype=torch.float64))
    assert found.false_alarms_at_95 == pytest.approx(1 / 3)
    assert "33.3% false alarms among the 3 inside" in str(found)


def test_a_score_of_the_wrong_sign_is_seen() -> None:
    inside, outside = torch.randn(200), torch.randn(200) + 1
    right, wrong = roc(inside, outside), roc(-inside, -outside)
    assert right.auc + wrong.auc == pytest.approx(1)
    assert right.auc - 0.5 > ALLOWED_Z * right.standard_error


@pytest.mark.parametrize(
    ("inside", "outside", "words"),
    [
        (torch.randn(5, 2), torch.randn(5), r"inside.*\(5, 2\)"),
        (torch.randn(5), torch.randn(1), "at least two"),
        (torch.randn(5), torch.tensor([1.0, math.nan]), "NaN"),
    ],
)
def test_scores_that_are_none(inside: Tensor, outside: Tensor, words: str) -> None:
    with pytest.raises(InputError, match=words):
        roc(inside, outside)


def test_the_picture(tmp_path: Path) -> None:
    curves = {
        "a score": roc(torch.randn(20), torch.randn(20)),
        "another": roc(torch.randn(20), torch.randn(20) + 2),
    }
    assert plot_roc(curves, tmp_path / "roc.png").stat().st_size > 10_000
    with pytest.raises(InputError, match="1 to 7"):
        plot_roc({}, tmp_path / "none.png")


# --- letters --------------------------------------------------------------------------------------------------------


def test_letters_have_the_shape_of_digits() -> None:
    """As much ink as digits to a quarter, the same whenever they are made, every letter as often as others."""
    made, (train, _) = letters(240), digits()
    assert made.event_shape == train.event_shape
    assert made.num_levels == train.num_levels
    assert torch.equal(made.levels, letters(240).levels)
    assert float(made.levels.double().mean() / train.levels.double().mean()) == pytest.approx(1, abs=0.25)
    assert made.labels is not None
    counts = torch.bincount(made.labels, minlength=26)
    assert set(counts.tolist()) == {0, 10}
    assert counts[ord("I") - ord("A")] == counts[ord("O") - ord("A")] == 0


def test_letters_differ_from_one_another() -> None:
    """No two images are the same, and those of a letter are closer to one another than to others."""
    made = letters(480)
    flat = made.levels.double().flatten(1)
    assert len(flat.unique(dim=0)) == len(flat)
    means = torch.stack([flat[i::24].mean(0) for i in range(24)])
    nearest = torch.cdist(flat, means).argmin(1)
    assert float((nearest == torch.arange(480) % 24).double().mean()) > 0.6


def test_letters_of_no_number() -> None:
    with pytest.raises(InputError, match="count"):
        letters(0)


# --- digits against letters -----------------------------------------------------------------------------------------


def energies_of(num_steps: int) -> ROC:
    train, held_out = digits()
    ebm = EBM.mlp((1, 8, 8), (128, 128), base_scale=1.0)
    optim = Optim(schedule="cosine")
    fit(ebm, train, SmoothedScoreMatching(0.3), num_steps=num_steps, optim=optim, progress=False)
    with torch.no_grad():
        return roc(ebm.energy(held_out.all()), ebm.energy(letters(len(held_out)).all()))


def test_an_energy_tells_letters_from_digits() -> None:
    """A few seconds' fit: AUC above 0.9; before it, an energy that only weighs |x|^2 is below 0.7."""
    fitted, before = energies_of(250), energies_of(1)
    print(fitted, before, sep="\n")
    assert fitted.auc > 0.9
    assert before.auc < 0.7


def test_the_example_holds_its_claim(tmp_path: Path) -> None:
    """And fails with digits in place of their averages, which are as likely as digits are."""
    module = load("out_of_distribution")
    scores = module.scores(digits()[0], 250, 25)
    module.scores = lambda *_: scores
    assert run(module, tmp_path).startswith("Claim: ")
    assert (tmp_path / "out_of_distribution.png").stat().st_size > 10_000
    module.averages = lambda held_out, count: Quantised(held_out.levels, held_out.num_levels)
    with pytest.raises(AssertionError, match="no likelier"):
        run(module, tmp_path)
