"""The demo with a few steps of everything: what it leaves behind."""

import contextlib
import io
import json
import warnings
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pytest

from probgen.report.demo import FILES, demo
from probgen.report.folder import MANIFEST
from probgen.report.record import REPORT
from probgen.report.steps.settings import QUICK
from test_report import check_page

with warnings.catch_warnings():
    warnings.simplefilter("ignore", FutureWarning)
    import arviz


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """The folder the demo filled, in which someone kept notes, and what it printed."""
    folder = tmp_path_factory.mktemp("demo")
    (folder / "notes.txt").write_text("of others")
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        demo(folder, quick=True)
    return folder, printed.getvalue()


def test_demo_leaves_what_it_promised_and_nothing_else(run: tuple[Path, str]) -> None:
    folder, _ = run
    assert {path.name for path in folder.iterdir()} == {*FILES, MANIFEST, "notes.txt"}
    assert (folder / "notes.txt").read_text() == "of others"


def test_pictures_are_pictures(run: tuple[Path, str]) -> None:
    for path in run[0].glob("*.png"):
        assert np.ptp(plt.imread(path)) > 0.5, path


@pytest.mark.parametrize(("name", "chains"), [("guide", 4), ("svi", 1), ("nuts", 4)])
def test_posteriors_open_in_arviz(run: tuple[Path, str], name: str, chains: int) -> None:
    data = arviz.from_netcdf(run[0] / f"posterior_{name}.nc")
    z = data["posterior"]["z"]
    draws = QUICK.num_draws * 4 // chains
    assert dict(z.sizes) == {"chain": chains, "draw": draws, "data": QUICK.num_latent_digits, "z_dim_0": 8}
    for group in ("posterior_predictive", "log_likelihood", "prior", "prior_predictive"):
        assert "x" in data[group] or group == "prior"
    assert data["observed_data"]["x"].shape == (QUICK.num_latent_digits, 1, 8, 8)
    if name == "nuts":
        assert data["sample_stats"]["diverging"].shape == (chains, draws)


ENGINES = (
    "Ancestral",
    "ReverseSDE",
    "ProbabilityFlowODE",
    "DPMSolver",
    "GuidedSDE",
    "TwistedSMC",
    "Guide",
    "SVI",
    "NUTS",
    "Gibbs",
    "HMC",
)


def test_the_one_table_names_every_engine_and_estimator_of_the_demo(run: tuple[Path, str]) -> None:
    _, printed = run
    table = printed.split("What it cost and what it is worth\n")[1].split("\n\n")[0]
    assert table.splitlines()[0].split("  ")[0] == "program"
    for name in (*ENGINES, "ELBOEstimate", "ImportanceWeighted", "AIS"):
        assert name in table
    for word in ("floor", "bits/dim", "R-hat", "ESS", "divergences", "NUTS"):
        assert word in table


def test_advice_and_figures_follow(run: tuple[Path, str]) -> None:
    folder, printed = run
    assert "- The classifier reads only" in printed  # 20 steps teach it little, and the demo says so
    figures = json.loads((folder / "figures.json").read_text())
    assert 0 < figures["accuracy"] < 1
    assert figures["settings"]["ddpm_steps"] == QUICK.ddpm_steps
    assert figures["DDPM/ELBOEstimate"]["figure"] > 0


def test_one_page_holds_all_pictures_the_table_and_the_advice(run: tuple[Path, str]) -> None:
    folder, printed = run
    assert printed.rstrip().endswith(str(folder / REPORT))
    page = check_page(folder / REPORT)
    # Traces of the two approximate engines stay beside the page.
    assert len(page.all("img")) == len(list(folder.glob("*.png"))) - 2
    for name in (
        *ENGINES,
        "upper_half_seen",
        "KL of each step",
        "The classifier reads only",
        "Worst R-hat",
        "area under the curve",
    ):
        assert name in page.text
    assert "weights of 2 of 2 data sets collapsed" in page.text  # eight particles are few, and it says so


def test_a_second_run_overwrites_the_first(run: tuple[Path, str]) -> None:
    from probgen.report.folder import Folder

    Folder(run[0], FILES)  # refuses nothing
