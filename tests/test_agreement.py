"""Verdicts on two posteriors: two draws of one law agree, and what is broken on purpose is named."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from probgen.core import Cost, InputError, Posterior
from probgen.diagnostics.agreement import Agreement, Comparison, agree, example
from probgen.diagnostics.c2st import c2st
from probgen.diagnostics.sliced_wasserstein import sliced_wasserstein

LIMIT = 4.5


def of_kind(kind: str, draws: Tensor, cost: Cost | None = None) -> Posterior:
    return Posterior({"z": draws}, kind, "exact", "Made by hand", cost or Cost())  # type: ignore[arg-type]


def normals(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def autoregressive(num_chains: int, num_draws: int, rho: float, seed: int) -> Tensor:
    """Chains of N(0, 1) whose neighbours correlate by rho."""
    noise = normals(num_draws, num_chains, seed=seed)
    x = [noise[0]]
    for z in noise[1:]:
        x.append(rho * x[-1] + math.sqrt(1 - rho**2) * z)
    return torch.stack(x, dim=1)


def compare(a: Posterior, b: Posterior) -> Comparison:
    return agree({"a": a, "b": b})["a", "b"]


# --- statistics and their errors ----------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(2))
def test_two_draws_of_one_law_agree(seed: int) -> None:
    """Independent draws against chains whose ESS is about 900 of 8,000: sqrt(n) alone would be 3 times off."""
    exact, correlated = (
        of_kind("iid", normals(1, 5000, seed=seed)),
        of_kind("mcmc", autoregressive(4, 2000, 0.8, seed + 100)),
    )
    assert agree({"a": exact, "b": correlated}).ok


def test_errors_are_those_of_correlated_draws() -> None:
    """Over 50 independent entries z has variance 1 +- 0.2; taken for independent draws it would be 9."""
    a, b = autoregressive(400, 300, 0.8, 0).reshape(2, 50, 4, 300).permute(0, 2, 3, 1)
    z = compare(of_kind("mcmc", a), of_kind("mcmc", b)).z["z"]
    assert z.shape == (5, 50)
    assert (np.abs(z.std(1) - 1) < 4.5 / math.sqrt(2 * 50)).all()
    assert compare(of_kind("iid", a), of_kind("iid", b)).z["z"][0].std() > 2


def without_tails(x: Tensor) -> Tensor:
    """A uniform law, the same mean and sd, other quantiles."""
    return math.sqrt(12) * (torch.special.ndtr(x.double()) - 0.5)


@pytest.mark.parametrize(
    ("broken", "worst"),
    [
        (lambda x: x + 1, "mean of z|50% quantile of z"),
        (lambda x: 1.3 * x, "sd of z|5% quantile of z|95% quantile of z"),
        (without_tails, "95% quantile of z|5% quantile of z"),
    ],
    ids=["moved", "wide", "no tails"],
)
def test_what_is_wrong_is_named(broken: Callable[[Tensor], Tensor], worst: str) -> None:
    a, b = (of_kind("iid", normals(1, 20_000, seed=seed)) for seed in range(2))
    assert compare(a, b).ok
    found = compare(a, replace(b, draws={"z": broken(b["z"])}))
    assert not found.ok
    assert found.worst.name in worst.split("|")
    assert "disagree" in str(found)


def test_the_entry_is_named() -> None:
    found = example()
    assert found.worst.name.startswith("mean of z[")
    assert found.worst.gap == pytest.approx(-1, abs=0.1)


def test_the_error_of_resampled_draws_comes_from_runs() -> None:
    """Each run is one number repeated 1,000 times: 6 numbers, however many draws; z follows from Student's t_5."""
    from scipy import stats

    runs = normals(6, 1).expand(6, 1000)
    exact = of_kind("iid", normals(1, 5000, seed=1))
    error = runs[:, 0].std() / math.sqrt(6)
    t = float((runs.mean() - exact["z"].mean()) / torch.hypot(error, torch.tensor(1 / math.sqrt(5000))))
    expected = math.copysign(stats.norm.ppf(stats.t.sf(abs(t), 5)), t)
    assert compare(of_kind("weighted", runs), exact).z["z"][0] == pytest.approx(expected, rel=0.02)
    assert abs(compare(of_kind("iid", runs), exact).z["z"][0]) > LIMIT  # the broken twin: draws independent
    with pytest.raises(InputError, match="num_chains >= 2"):
        compare(of_kind("weighted", runs[:1]), exact)


def test_z_of_few_runs_is_normal() -> None:
    """400 entries, four runs each, of which |t_3| > 4.5 in 2 %: 8 of them; said as a normal z none is."""
    runs, exact = normals(4, 1, 400).expand(4, 10, 400), of_kind("iid", torch.zeros(1, 10, 400))
    assert np.abs(compare(of_kind("weighted", runs), exact).z["z"][0]).max() < LIMIT
    t = runs.mean((0, 1)) / (runs.mean(1).std(0) / 2)
    assert float(t.abs().max()) > LIMIT


# --- wholes -------------------------------------------------------------------------------------------------------


def test_a_lost_correlation_is_seen_by_wholes_alone() -> None:
    x = normals(2, 2000, 2)
    correlated = torch.stack([x[0, :, 0], 0.7 * x[0, :, 0] + 0.51**0.5 * x[0, :, 1]], 1)
    found = compare(of_kind("iid", correlated[None]), of_kind("iid", x[1][None]))
    assert abs(found.worst.z) < LIMIT
    assert found.wasserstein is not None
    assert found.classified is not None
    assert min(found.wasserstein.z, found.classified.z) > LIMIT
    assert not found.ok


def test_wholes_take_correlated_draws_for_what_they_are_worth() -> None:
    """Chains with an ESS of 200 a side; the broken twin, all draws as if independent, sees a difference."""
    a, b = autoregressive(4, 2000, 0.95, 0), autoregressive(4, 2000, 0.95, 3)
    found = compare(of_kind("mcmc", a), of_kind("mcmc", b))
    assert found.ok
    assert found.classified is not None
    assert found.classified.num_samples < 700
    assert not compare(of_kind("iid", a), of_kind("iid", b)).ok


def test_null_z_of_wholes_is_about_normal() -> None:
    """Over 40 pairs of one law the z of either has mean 0 +- 0.16 and an sd of about 1, up to 1 +- 0.5."""
    pairs = normals(40, 2, 60, 2)
    for test in (lambda a, b: sliced_wasserstein(a, b).z, lambda a, b: c2st(a, b).z):
        z = np.array([test(a, b) for a, b in pairs])
        assert abs(z.mean()) < 0.7
        assert 0.4 < z.std() < 1.5
        assert z.max() < LIMIT


@pytest.mark.parametrize("dim", [1, 8])
def test_wholes_see_a_wrong_location(dim: int) -> None:
    """0.8 sd in every coordinate, 300 samples each."""
    a, b = normals(2, 300, dim)
    assert sliced_wasserstein(a, b + 0.8).z > LIMIT
    assert c2st(a, b + 0.8).z > LIMIT


def test_wholes_are_the_same_at_any_call_and_scale() -> None:
    a, b = normals(2, 200, 3)
    before = torch.random.get_rng_state()
    assert c2st(a, b) == c2st(a, b)
    assert sliced_wasserstein(a, b) == sliced_wasserstein(a, b)
    assert sliced_wasserstein(1e6 * a, 1e6 * b).distance == pytest.approx(
        sliced_wasserstein(a, b).distance, rel=1e-4
    )
    assert torch.equal(before, torch.random.get_rng_state())
    assert c2st(a, b[:100]).num_samples == 200


@pytest.mark.parametrize("test", [c2st, sliced_wasserstein])
def test_wholes_refuse(test: Callable[[Tensor, Tensor], object]) -> None:
    with pytest.raises(InputError, match="the same d"):
        test(torch.zeros(50, 2), torch.zeros(50, 3))
    with pytest.raises(InputError, match="Set b holds .* NaN"):
        test(torch.zeros(50, 2), torch.full((50, 2), math.nan))
    with pytest.raises(InputError):
        test(torch.zeros(1, 2), torch.zeros(50, 2))


# --- what is compared ----------------------------------------------------------------------------------------------


def three() -> Agreement:
    good = [of_kind("iid", normals(1, 400, seed=seed), Cost(100, 0, 0.5)) for seed in range(2)]
    return agree({"one": good[0], "two": good[1], "moved": of_kind("iid", normals(1, 400, seed=2) + 1)})


def test_every_pair_is_compared() -> None:
    found = three()
    assert [comparison.ok for comparison in found.comparisons] == [True, False, False]
    assert found["two", "one"].names == ("one", "two")
    assert found["moved", "two"].ok is False
    text = str(found)
    assert "2 of 3 pairs disagree" in text
    assert max(map(len, text.splitlines())) <= 110
    with pytest.raises(InputError, match="known: "):
        found["one", "three"]


def test_efficiency_counts_all_that_was_paid() -> None:
    assert three().efficiency["one"] == (400, pytest.approx(400), 100, 0.5)
    chains = of_kind("mcmc", autoregressive(4, 1000, 0.8, 0), Cost(0, 300, 1.0, 200, 3.0))
    found = agree({"chains": chains, "exact": of_kind("iid", normals(1, 400))}).efficiency["chains"]
    assert found.ess == pytest.approx(4000 / 9, rel=0.4)  # (1 - rho) / (1 + rho)
    assert (found.evaluations, found.seconds) == (500, 4.0)


def test_a_picture_is_written(tmp_path: Path) -> None:
    assert three().plot(tmp_path / "agreement.png").stat().st_size > 5000


def test_equal_things_only() -> None:
    with pytest.raises(InputError, match="two posteriors or more"):
        agree({"one": of_kind("iid", torch.zeros(1, 5))})
    with pytest.raises(InputError, match="share no site"):
        compare(
            of_kind("iid", torch.zeros(1, 5)),
            Posterior({"w": torch.zeros(1, 5)}, "iid", "exact", "hand", Cost()),
        )
    with pytest.raises(InputError, match="Site 'z' must have one shape"):
        compare(of_kind("iid", torch.zeros(1, 5)), of_kind("iid", torch.zeros(1, 5, 2)))
    same, other = of_kind("iid", torch.ones(1, 5)), of_kind("iid", torch.full((1, 5), 2.0))
    assert compare(same, same).ok
    assert "Too few independent draws" in str(compare(same, same))
    assert not compare(same, other).ok  # two constants that differ
    assert not compare(of_kind("iid", torch.full((1, 50), math.nan)), of_kind("iid", torch.ones(1, 50))).ok
