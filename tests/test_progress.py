"""The live table: what it says while a run goes on, in 100 columns, and that it is silent elsewhere."""

from __future__ import annotations

import io
import re
import sys

import pyro
import pyro.distributions as dist
import pytest
import torch
from rich.console import Console

from probgen.inference.hmc import HMC
from probgen.progress import Board, live, ticker
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


def test_showing_progress_changes_no_draw(monkeypatch: pytest.MonkeyPatch) -> None:
    screen = terminal(monkeypatch)
    engine = HMC(num_steps=2, num_warmup=10)
    watched = infer(model, engine, num_draws=5, num_chains=2, progress=True)
    assert "drawing" in screen.getvalue()
    assert torch.equal(watched["z"], infer(model, engine, num_draws=5, num_chains=2)["z"])
