"""The live table: what it says while a run goes on, in 100 columns, and that it is silent elsewhere."""

from __future__ import annotations

import io
import re
import sys
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from rich.console import Console

from probgen import (
    DDPM,
    VAE,
    ELBOEstimate,
    GaussianMixture,
    ImportanceWeighted,
    ODELikelihood,
    Pair,
    Prior,
    SMCEvidence,
    TimeMLP,
    TwistedSMC,
    evidence,
)
from probgen.core import Batch, Estimator
from probgen.inference.hmc import HMC
from probgen.progress import Board, Stage, live, ticker
from probgen.verbs import infer

STAGES = {"warm-up": 500, "drawing": 1000}
COLUMNS = 100


class Clock:
    """Seconds that pass when told to."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def shown(board: Board) -> list[str]:
    """The rows as they stand in a terminal of 100 columns."""
    console = Console(record=True, force_terminal=True, width=COLUMNS, file=io.StringIO())
    console.print(board.table())
    lines = console.export_text().splitlines()
    assert max(map(len, lines)) <= COLUMNS
    return [re.sub("[━╸╺ ]+", " ", line).strip() for line in lines]


def of_chains(clock: Clock) -> Board:
    return Board("HMC", STAGES, rates=("gradients",), clock=clock)


def test_warm_up_and_drawing_have_rows_of_their_own() -> None:
    clock = Clock()
    board = of_chains(clock)
    assert shown(board) == ["HMC done time left", "warm-up 0/500 preparing", "drawing 0/1,000"]
    board.update(100, chains=64, divergences=31, step_size=0.25, gradients=50_000)
    clock.now = 2.0
    board.update(300, chains=64, divergences=40, step_size=0.3123, gradients=150_000)
    assert shown(board) == [
        "HMC done chains divergences step size gradients/s time left",
        "warm-up 300/500 64 40 0.312 50k 0:02",
        "drawing 0/1,000",
    ]
    clock.now = 4.0
    board.update(500, chains=64, divergences=41, step_size=0.3, gradients=250_000)
    board.update(600, chains=64, divergences=0, step_size=0.3, gradients=300_000)
    clock.now = 5.0
    board.update(601, chains=64, divergences=0, step_size=0.3, gradients=304_000)
    assert shown(board)[1:] == [
        "warm-up 500/500 64 41 0.3 50k 0:00",
        "drawing 101/1,000 64 0 0.3 4k 14:59",
    ]


def test_the_widest_row_fits() -> None:
    clock = Clock()
    board = Board(
        "ParallelTempering", {"warm-up": 10_000, "drawing": 1_000_000}, rates=("gradients",), clock=clock
    )
    for second in (0, 100_000):
        clock.now = float(second)
        values = {"chains": 1_000_000, "divergences": 123_456_789, "step_size": 1.234e-5}
        board.update(20_000 + second, **values, gradients=second**3)
    assert shown(board)[2].endswith("110,000/1,000,000 1,000,000 123,456,789 1.23e-05 10G 247:13:20")


def test_a_total_that_is_not_known_is_counted() -> None:
    board = Board("ProbabilityFlowODE", 0)
    board.update(7)
    assert shown(board) == ["done time left", "ProbabilityFlowODE 7"]


def test_a_single_stage_is_one_row() -> None:
    clock = Clock()
    board = Board("fit", 1000, clock=clock)
    board.update(1, loss=3.25)
    clock.now = 9.0
    board.update(91, loss=2.5)
    assert shown(board) == ["done loss time left", "fit 91/1,000 2.5 1:31"]


def test_the_table_stays_when_all_is_done() -> None:
    console = Console(force_terminal=True, width=COLUMNS, file=io.StringIO())
    with live(Board("HMC", STAGES), console) as update:
        update(1500, divergences=3)
    assert "1000/1,000".replace("1000", "1,000") in console.file.getvalue()  # type: ignore[attr-defined]


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def terminal(monkeypatch: pytest.MonkeyPatch) -> Terminal:
    """A terminal of 100 columns for stderr; called in tests, as pytest takes stderr back after fixtures."""
    screen = Terminal()
    monkeypatch.setattr(sys, "stderr", screen)
    monkeypatch.setenv("COLUMNS", str(COLUMNS))
    monkeypatch.setenv("TERM", "xterm")
    return screen


def test_nothing_is_shown_where_nobody_looks(monkeypatch: pytest.MonkeyPatch) -> None:
    screen = terminal(monkeypatch)
    with ticker("fit", 3, enabled=False) as update:
        update(3, loss=0.0)
    assert screen.getvalue() == ""
    monkeypatch.setattr(Terminal, "isatty", lambda self: False)
    with ticker("fit", 3, enabled=True) as update:
        update(3, loss=0.0)
    assert screen.getvalue() == ""


def model() -> None:
    pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))


def test_a_run_ends_with_what_its_posterior_says(monkeypatch: pytest.MonkeyPatch) -> None:
    screen = terminal(monkeypatch)
    posterior = infer(model, HMC(num_steps=2, num_warmup=10), num_draws=20, num_chains=3, progress=True)
    last = [line for line in screen.getvalue().splitlines() if "drawing" in line][-1]
    assert "20/20" in last
    assert " 3 " in last  # chains
    assert f"{float(posterior.run_stats['step_size'].median()):.3g}" in last
    assert any("10/10" in line for line in screen.getvalue().splitlines() if "warm-up" in line)


def shared(batch: Batch) -> None:
    mean = pyro.sample("mean", dist.Normal(0.0, 1.0))
    with batch.plate():
        pyro.sample("x", dist.Normal(mean, 1.0))


def near(batch: Batch) -> None:
    pyro.sample("mean", dist.Normal(0.5, 0.8))


def seen() -> None:
    x = pyro.sample("x", Prior(GaussianMixture.example()))
    pyro.sample("y", dist.Normal(x, 0.5).to_event(1))


ESTIMATES: dict[str, tuple[Any, Estimator, Any, str]] = {
    "each step of a chain": (
        DDPM(TimeMLP((2,), width=8), num_steps=10),
        ELBOEstimate(2, batch_size=10),
        torch.randn(5, 2),
        "ELBOEstimate 9/9",
    ),
    "side by side": (VAE.mlp((2,), 1, (4,)), ELBOEstimate(3), torch.randn(5, 2), "ELBOEstimate 3/3"),
    "one after another": (Pair(shared, near), ELBOEstimate(3), torch.ones(4), "ELBOEstimate 3/3"),
    "in batches": (
        VAE.mlp((2,), 1, (4,)),
        ImportanceWeighted(30, batch_size=7),
        torch.randn(5, 2),
        "ImportanceWeighted 30/30",
    ),
    "as far as the paths have come": (
        GaussianMixture.example(),
        ODELikelihood(rtol=1e-2, atol=1e-2),
        torch.randn(7, 2, dtype=torch.float64),
        "ODELikelihood 7/7",
    ),
    "few paths at a time": (
        GaussianMixture.example(),
        ODELikelihood("hutchinson", 2, rtol=1e-2, atol=1e-2, memory=1),
        torch.randn(3, 2, dtype=torch.float64),
        "ODELikelihood 3/3",
    ),
    "an engine's own": (
        seen,
        SMCEvidence(TwistedSMC(particles=64, steps=20), num_runs=2),
        {"y": torch.zeros(2)},
        "TwistedSMC",
    ),
}


@pytest.mark.parametrize("name", ESTIMATES)
def test_an_estimate_shows_how_far_it_is_and_is_the_same(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    program, estimator, data, last = ESTIMATES[name]
    screen = terminal(monkeypatch)
    plain = evidence(program, estimator, data)
    assert screen.getvalue() == ""
    told: list[int] = []
    update = Stage.update

    def listening(stage: Stage, done: int, *rest: Any) -> None:
        told.append(done)
        update(stage, done, *rest)

    monkeypatch.setattr(Stage, "update", listening)
    watched = evidence(program, estimator, data, progress=True)
    assert torch.equal(watched.value, plain.value)
    assert torch.equal(watched.standard_error, plain.standard_error)
    lines = screen.getvalue().splitlines()
    assert any(all(part in line for part in (*last.split(), "0:00")) for line in lines)
    assert len(set(told)) > 1
    assert told[-1] == max(told)


def test_showing_progress_changes_no_draw(monkeypatch: pytest.MonkeyPatch) -> None:
    screen = terminal(monkeypatch)
    engine = HMC(num_steps=2, num_warmup=10)
    watched = infer(model, engine, num_draws=5, num_chains=2, progress=True)
    assert "drawing" in screen.getvalue()
    assert torch.equal(watched["z"], infer(model, engine, num_draws=5, num_chains=2)["z"])
