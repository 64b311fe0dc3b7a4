"""The bridge to ArviZ: what is handed over, in both forms, and what comes back from a file."""

import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import Tensor

from probgen.arviz_io import GROUPS, Groups, _arviz, build, to_arviz, to_groups
from probgen.core import Cost, InputError, Posterior
from probgen.replay import log_likelihood, predictions, simulations
from probgen.targets import read

ROWS, CHAINS, DRAWS = 6, 2, 40
Y = torch.linspace(-1, 2, ROWS * 3).reshape(ROWS, 3)
LABELS = torch.tensor([0.0, 1, 1, 0, 1, 1])


def regression() -> None:
    """A scale, a slope for each group, three outputs a row and a label a row; with all that may stand beside sites."""
    scale = pyro.sample("scale", dist.Gamma(2.0, 2.0))
    with pyro.plate("group", 2):
        slope = pyro.sample("slope", dist.Normal(0.0, 1.0))
    pyro.deterministic("double", 2 * scale)
    pyro.factor("favour", -slope.square().sum())
    with pyro.plate("row", ROWS), pyro.poutine.scale(scale=10.0):
        pyro.sample("y", dist.Normal(slope.mean().expand(3), scale).to_event(1))
        pyro.sample("label", dist.Bernoulli(logits=slope[..., :1]))


def posterior(program: Any = regression, data: dict[str, Tensor] | None = None) -> Posterior:
    generator = torch.Generator().manual_seed(1)
    draws = {
        "scale": torch.rand(CHAINS, DRAWS, generator=generator) + 0.5,
        "slope": torch.randn(CHAINS, DRAWS, 2, generator=generator),
    }
    return Posterior(
        draws,
        kind="mcmc",
        guarantee="asymptotic",
        engine="Made by hand",
        cost=Cost(),
        dims={"slope": ("group",)},
        coords={"group": ["old", "new"]},
        stats={
            "diverging": torch.zeros(CHAINS, DRAWS, dtype=torch.bool),
            "energy": torch.randn(CHAINS, DRAWS, generator=generator),
        },
        run_stats={"step_size": torch.tensor([0.1, 0.2])},
        target=read(program, {"y": Y, "label": LABELS} if data is None else data),
    )


# --- running a program again ---------------------------------------------------------------------------------------


def test_log_likelihood_has_one_unscaled_term_a_row() -> None:
    p = posterior()
    found = log_likelihood(p)
    loc, scale = p["slope"].mean(-1)[..., None, None], p["scale"][..., None, None]
    assert found.keys() == {"y", "label"}
    torch.testing.assert_close(found["y"], dist.Normal(loc, scale).log_prob(Y).sum(-1))
    torch.testing.assert_close(found["label"], dist.Bernoulli(logits=p["slope"][..., :1]).log_prob(LABELS))


def test_programs_that_vmap_cannot_follow_give_the_same() -> None:
    def stubborn() -> None:
        regression()
        assert float(torch.ones(1)[0]) == 1.0
        with pyro.poutine.block():
            if pyro.sample("coin", dist.Normal(0.0, 1.0)) > 0:  # no vmap follows this
                pass

    batched, looped = log_likelihood(posterior()), log_likelihood(posterior(stubborn))
    for name in batched:
        torch.testing.assert_close(batched[name], looped[name])


def test_masked_rows_count_nothing() -> None:
    def masked() -> None:
        loc = pyro.sample("loc", dist.Normal(0.0, 1.0))
        with pyro.plate("row", 3), pyro.poutine.mask(mask=torch.tensor([True, False, True])):
            pyro.sample("y", dist.Normal(loc, 1.0))

    p = Posterior(
        {"loc": torch.zeros(1, 5)}, "iid", "exact", "hand", Cost(), target=read(masked, {"y": torch.ones(3)})
    )
    assert log_likelihood(p)["y"][0, :, 1].tolist() == [0.0] * 5
    assert (log_likelihood(p)["y"][0, :, [0, 2]] < -1).all()


def test_predictions_hold_latents_and_free_data() -> None:
    """Standardised, 12,000 predictions are N(0, 1) within 4.5 standard errors: a shift of 0.05 sd is seen."""
    p = replace(
        posterior(), draws={"scale": torch.full((1, 2000), 0.7), "slope": torch.full((1, 2000, 2), 3.0)}
    )
    y = predictions(p)["y"]
    assert y.shape == (1, 2000, ROWS, 3)
    z = ((y - 3.0) / 0.7).flatten()
    assert abs(z.mean()) < 4.5 / len(z) ** 0.5
    assert abs(z.std() - 1) < 4.5 / (2 * len(z)) ** 0.5
    assert abs((z + 0.05).mean()) > 4.5 / len(z) ** 0.5  # the broken twin
    assert not torch.equal(y[0, 0], y[0, 1])  # every draw has its own noise


def test_replaying_repeats_itself_and_leaves_the_random_stream() -> None:
    p = posterior()
    before = torch.get_rng_state()
    first, again, other = (
        predictions(p, seed=3)["y"],
        predictions(p, seed=3)["y"],
        predictions(p, seed=4)["y"],
    )
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert torch.equal(before, torch.get_rng_state())


def test_simulations_free_the_data() -> None:
    sites = simulations(posterior().target, num_draws=2000)
    assert {name: tuple(value.shape[1:]) for name, value in sites.items()} == {
        "scale": (), "slope": (2,), "y": (ROWS, 3), "label": (ROWS,),
    }  # fmt: skip
    assert abs(sites["scale"].mean() - 1.0) < 4.5 * 0.5**0.5 / 2000**0.5  # Gamma(2, 2): mean 1, variance 1/2


def test_a_site_that_was_summed_out_is_named() -> None:
    def mixture() -> None:
        loc = pyro.sample("loc", dist.Normal(0.0, 1.0))
        with pyro.plate("row", 3):
            side = pyro.sample("side", dist.Bernoulli(0.5), infer={"enumerate": "parallel"})
            pyro.sample("y", dist.Normal(loc * (2 * side - 1), 1.0))

    p = Posterior(
        {"loc": torch.zeros(1, 5)},
        "mcmc",
        "asymptotic",
        "hand",
        Cost(),
        target=read(mixture, {"y": torch.ones(3)}),
    )
    with pytest.raises(InputError, match="'side'"):
        log_likelihood(p)
    assert predictions(p)["y"].shape == (1, 5, 3)  # predicted data need a fresh side anyway
    assert "log_likelihood" not in to_groups(p).values


# --- groups --------------------------------------------------------------------------------------------------------


def test_every_group_is_there_with_its_shape() -> None:
    groups = to_groups(posterior())
    shapes = {
        group: {name: v.shape for name, v in variables.items()} for group, variables in groups.values.items()
    }
    sample, prior = (CHAINS, DRAWS), (1, 500)
    assert shapes == {
        "posterior": {"scale": sample, "slope": (*sample, 2)},
        "sample_stats": {"diverging": sample, "energy": sample, "step_size": sample},
        "log_likelihood": {"y": (*sample, ROWS), "label": (*sample, ROWS)},
        "posterior_predictive": {"y": (*sample, ROWS, 3), "label": (*sample, ROWS)},
        "prior": {"scale": prior, "slope": (*prior, 2)},
        "prior_predictive": {"y": (*prior, ROWS, 3), "label": (*prior, ROWS)},
        "observed_data": {"y": (ROWS, 3), "label": (ROWS,)},
    }
    assert tuple(groups.values) == GROUPS
    assert all(type(v) is np.ndarray for variables in groups.values.values() for v in variables.values())
    assert groups.dims["slope"] == ["group"]
    assert groups.dims["y"] == groups.dims["label"] == ["row"]
    assert groups.values["sample_stats"]["step_size"][:, -1].tolist() == pytest.approx([0.1, 0.2])


def test_data_observed_inside_the_program_count_too() -> None:
    def program() -> None:
        loc = pyro.sample("loc", dist.Normal(0.0, 1.0))
        with pyro.plate("row", 3):
            pyro.sample("y", dist.Normal(loc, 1.0), obs=torch.arange(3.0))

    p = Posterior({"loc": torch.zeros(1, 5)}, "iid", "exact", "hand", Cost(), target=read(program))
    assert to_groups(p).values["observed_data"]["y"].tolist() == [0, 1, 2]


@pytest.mark.parametrize("outer", ["column", "line"])
def test_two_plates_name_their_own_dimensions(outer: str) -> None:
    def program() -> None:
        loc = pyro.sample("loc", dist.Normal(0.0, 1.0))
        column, line = pyro.plate("column", 4, dim=-1), pyro.plate("line", 2, dim=-2)
        first, second = (column, line) if outer == "column" else (line, column)
        with first, second:
            pyro.sample("y", dist.Normal(loc, 1.0))

    p = Posterior(
        {"loc": torch.zeros(1, 5)},
        "iid",
        "exact",
        "hand",
        Cost(),
        target=read(program, {"y": torch.ones(2, 4)}),
    )
    assert to_arviz(p).observed_data["y"].sizes == {"line": 2, "column": 4}


def test_names_that_files_cannot_hold_are_changed() -> None:
    p = Posterior(
        {"net/weight": torch.zeros(1, 5, 2)}, "iid", "exact", "hand", Cost(), dims={"net/weight": ("draw",)}
    )
    groups = to_groups(p)
    assert list(groups.values["posterior"]) == ["net.weight"]
    assert groups.dims == {"net.weight": ["draw_"]}


@pytest.mark.parametrize(
    ("group", "complaint"),
    [
        ("log_lik", "did you mean 'log_likelihood'"),
        ("prior", "does not know its program"),
        ("sample_stats", "no statistics"),
    ],
)
def test_a_group_that_cannot_be_given_is_refused(group: str, complaint: str) -> None:
    bare = replace(posterior(), target=None, stats={}, run_stats={})
    assert list(to_groups(bare).values) == ["posterior"]
    with pytest.raises(InputError, match=complaint):
        to_groups(bare, groups=[group])


# --- ArviZ ---------------------------------------------------------------------------------------------------------


def test_what_is_written_opens_again(tmp_path: Path) -> None:
    import arviz

    data = to_arviz(posterior())
    data.to_netcdf(str(tmp_path / "posterior.nc"))
    again = arviz.from_netcdf(str(tmp_path / "posterior.nc"))
    assert again.attrs["engine"] == "Made by hand"
    for group, variables in to_groups(posterior()).values.items():
        for name, value in variables.items():
            np.testing.assert_array_equal(again[group][name].values, value)
    assert again["posterior"]["slope"].coords["group"].values.tolist() == ["old", "new"]
    assert again["log_likelihood"]["y"].dims == ("chain", "draw", "row")


def test_the_installed_generation_builds_what_it_was_handed() -> None:
    groups = to_groups(posterior())
    data = build(_arviz(), groups)
    for group, variables in groups.values.items():
        assert set(data[group].data_vars) == set(variables)


@pytest.mark.parametrize("version", ["0.22.0", "0.23.4", "1.0.0", "1.3.0"])
def test_both_forms_are_handed_over_by_version(version: str) -> None:
    """A recorder stands for ArviZ: 0.2x must see groups as keywords, >= 1 one nested dictionary.

    That ArviZ 1.3.0 (Python 3.12) builds all seven groups of these very arrays with their dims from the nested form,
    writes and opens them again, was checked by hand.
    """
    seen: dict[str, Any] = {}

    def from_dict(*args: Any, **kwargs: Any) -> str:
        seen.update(args=args, kwargs=kwargs)
        return "built"

    groups = to_groups(posterior(), groups=["posterior", "observed_data"])
    assert build(SimpleNamespace(__version__=version, from_dict=from_dict), groups) == "built"  # type: ignore[arg-type]
    named = {"dims": groups.dims, "coords": groups.coords}
    if version.startswith("0"):
        assert seen == {"args": (), "kwargs": groups.values | named}
    else:
        assert seen == {"args": (groups.values,), "kwargs": named}


def test_arviz_is_imported_late() -> None:
    import subprocess

    check = "import sys, probgen.arviz_io; assert 'arviz' not in sys.modules"
    subprocess.run([sys.executable, "-c", check], check=True)


def test_groups_are_plain() -> None:
    """`build` needs nothing of a posterior: arrays alone do."""
    groups = Groups(
        {"posterior": {"z": np.zeros((2, 10, 3))}}, {"z": ["side"]}, {"side": np.array(["a", "b", "c"])}
    )
    assert build(_arviz(), groups)["posterior"]["z"].dims == ("chain", "draw", "side")
