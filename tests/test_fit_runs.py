"""Fits in run folders: killed, stopped, refused, out of disk, and always the same in the end."""

from __future__ import annotations

import math
import random
import signal
import time
from pathlib import Path
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import Tensor

import fit_run_tools as tools
from fit_run_tools import NUM_STEPS, Centred, outcome, program, same, small_fit
from global_state import SETTINGS, STREAMS, unchanged
from probgen import ELBO, Batch, InputError, Optim, Pair, ProbgenError, fit, fitting, runs
from probgen.core import DamagedFileWarning
from probgen.runs import Checkpoint, Checkpoints, read_run
from probgen.saving import load


class Crash(Exception):
    """The power went."""


def crash() -> None:
    raise Crash


@pytest.fixture
def often(monkeypatch: pytest.MonkeyPatch) -> None:
    """A checkpoint after every step."""
    monkeypatch.setattr(runs, "SECONDS_APART", 0.0)
    monkeypatch.setattr(runs, "SHARE", math.inf)


@pytest.fixture(scope="module")
def uninterrupted() -> dict[str, Tensor]:
    """What the small fit leaves where nothing happens, without a run folder."""
    vae = program()
    return outcome(vae, small_fit(vae))


def crashed(run: Path, step: int) -> None:
    """A fit that ended at a step without a word."""
    with pytest.raises(Crash):
        small_fit(program(), Centred({step: crash}), run)


def resumed(run: Path) -> dict[str, Tensor]:
    """The same call once more, with other weights to begin with."""
    vae = program(seed=9)
    return outcome(vae, small_fit(vae, run=run))


# --- going on -------------------------------------------------------------------------------------------------------


def test_a_run_folder_changes_no_bit(tmp_path: Path, uninterrupted: dict[str, Tensor]) -> None:
    vae = program()
    with unchanged(SETTINGS), unchanged(STREAMS):
        history = small_fit(vae, run=tmp_path / "run")
    assert same(outcome(vae, history), uninterrupted)
    record = read_run(tmp_path / "run")
    assert record.verb == "fit"
    assert record.config["num_steps"] == NUM_STEPS
    assert record.finished == {"steps": NUM_STEPS, "seconds": record.finished["seconds"]}  # type: ignore[index]
    losses = {line["step"]: line["loss"] for line in record.log if "loss" in line}
    assert losses == dict(enumerate(history.loss, start=1))
    followed = [(line["step"], line["validation"]) for line in record.log if "validation" in line]
    assert followed == history.validation
    again = load(tmp_path / "run" / "program.safetensors", into=program(seed=4))
    assert same(dict(again.state_dict()), dict(vae.state_dict()))  # type: ignore[union-attr]


@pytest.mark.parametrize("step", [1, 2, 6, 7, 12, 13, 60, NUM_STEPS])
def test_after_a_crash_the_same_call_ends_the_same(
    tmp_path: Path, often: None, uninterrupted: dict[str, Tensor], step: int
) -> None:
    """At the first step, at the end of an epoch and of the warm-up, at the last."""
    crashed(tmp_path, step)
    assert Checkpoints(tmp_path / "checkpoints").steps()[-1] == step - 1
    assert same(resumed(tmp_path), uninterrupted)
    steps = [line["step"] for line in read_run(tmp_path).log if "loss" in line]
    assert steps == list(range(1, NUM_STEPS + 1))


def test_it_does_not_matter_when_checkpoints_are_made(
    tmp_path: Path, uninterrupted: dict[str, Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Only the one of step 0 was made: everything is done again."""
    crashed(tmp_path, 50)
    assert Checkpoints(tmp_path / "checkpoints").steps() == [0]
    assert same(resumed(tmp_path), uninterrupted)


def spoilt(name: str, value: Tensor) -> Tensor:
    """Another state of the same kind."""
    if name == "streams.torch":
        return torch.Generator().manual_seed(1).get_state()
    if name.startswith("streams."):
        return torch.cat((value[:600].flip(0), value[600:]))
    return value.flip(0) if name == "order" else torch.zeros_like(value)


@pytest.mark.parametrize(
    "part",
    [
        "program.",
        "average.",
        "objective.",
        "optimiser.0.exp_avg",
        "optimiser.0.exp_avg_sq",
        "optimiser.0.step",
        "streams.torch",
        "streams.numpy",
        "streams.python",
        "order",
        "taken",
        "loss",
    ],
)
def test_every_part_of_a_checkpoint_matters(
    tmp_path: Path, often: None, uninterrupted: dict[str, Tensor], monkeypatch: pytest.MonkeyPatch, part: str
) -> None:
    """A checkpoint that left one part out, or held another, is seen by the comparison above."""
    latest = Checkpoints.latest

    def without(self: Checkpoints) -> Checkpoint | None:
        found = latest(self)
        assert found is not None
        touched = {
            name: spoilt(name, value) for name, value in found.tensors.items() if name.startswith(part)
        }
        facts = found.facts | {"taken": 0}
        assert touched or part == "taken"
        return Checkpoint(found.step, found.tensors | touched, facts if part == "taken" else found.facts)

    crashed(tmp_path, 51)
    monkeypatch.setattr(Checkpoints, "latest", without)
    assert not same(resumed(tmp_path), uninterrupted)


def test_a_finished_run_gives_its_weights_without_a_step(
    tmp_path: Path, uninterrupted: dict[str, Tensor]
) -> None:
    small_fit(program(), run=tmp_path)
    before = {path.name: path.stat().st_mtime_ns for path in tmp_path.glob("*.*")}
    vae, objective = program(seed=9), Centred({1: crash})
    assert same(outcome(vae, small_fit(vae, objective, run=tmp_path)), uninterrupted)
    after = {path.name: path.stat().st_mtime_ns for path in tmp_path.glob("*.*")}
    assert before == after | {"log.jsonl": before["log.jsonl"]}


def test_damaged_checkpoints_are_passed_over(
    tmp_path: Path, often: None, uninterrupted: dict[str, Tensor]
) -> None:
    crashed(tmp_path, 51)
    checkpoints = Checkpoints(tmp_path / "checkpoints")
    assert checkpoints.steps() == [48, 49, 50]
    for step in (49, 50):
        content = bytearray(checkpoints.path(step).read_bytes())
        content[len(content) // 2] ^= 1
        checkpoints.path(step).write_bytes(content)
    with pytest.warns(DamagedFileWarning, match="Going on from step 48"):
        assert same(resumed(tmp_path), uninterrupted)


def test_weights_in_pyros_store_go_on_too(tmp_path: Path, often: None) -> None:
    def model(batch: Batch) -> None:
        loc = pyro.param("loc", torch.tensor(0.0))
        with batch.plate():
            pyro.sample("x", dist.Normal(loc, 1.0))

    def stored_fit(objective: Centred, run: Path | None) -> float:
        with pyro.get_param_store().scope():
            pair = Pair(model, lambda batch: None)
            fit(pair, tools.data()[:, 0], objective, num_steps=20, batch_size=8, run=run, progress=False)
            return float(pyro.param("loc").detach())

    with pytest.raises(Crash):
        stored_fit(Centred({12: crash}), tmp_path)
    assert stored_fit(Centred(), tmp_path) == stored_fit(Centred(), None)


# --- killed -----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def in_a_process(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Tensor], float]:
    """What the small fit leaves in a process of its own, and the seconds it takes there."""
    result = tmp_path_factory.mktemp("alone") / "result"
    process, pipe = tools.start(tools.fit_and_write, None, result, 0, 1.0)
    pipe.recv()
    started = time.perf_counter()
    process.join()
    return tools.read(result), time.perf_counter() - started


def killed(folder: Path, moments: list[float], apart: float) -> tuple[dict[str, Tensor], int]:
    """What a fit leaves that was killed some seconds after each of its beginnings, and how often that hit it."""
    hits, seed = 0, 0
    for moment in [*moments, 600.0]:
        process, pipe = tools.start(tools.fit_and_write, folder / "run", folder / "result", seed, apart)
        pipe.recv()
        process.join(moment)
        hits += process.exitcode is None
        process.kill()
        process.join()
        if any((folder / "run" / "checkpoints").glob("*.safetensors")):
            seed = 9  # the run has its own first weights by now
    return tools.read(folder / "result"), hits


def test_killed_at_three_moments(tmp_path: Path, in_a_process: tuple[dict[str, Tensor], float]) -> None:
    expected, seconds = in_a_process
    found, hits = killed(tmp_path, [seconds * part for part in (0.1, 0.5, 0.3)], apart=0.0)
    assert hits >= 1
    assert same(found, expected)


@pytest.mark.slow
def test_killed_at_twenty_moments(tmp_path: Path, in_a_process: tuple[dict[str, Tensor], float]) -> None:
    """Twenty fits, each killed once: while it begins, steps, writes a checkpoint, follows validation data, ends."""
    expected, seconds = in_a_process
    moments, good, hits = random.Random(0), 0, 0
    while hits < 20:
        folder = tmp_path / str(len(list(tmp_path.iterdir())))
        folder.mkdir()
        found, hit = killed(folder, [moments.uniform(0, seconds)], moments.choice((0.0, 0.05)))
        good += hit * same(found, expected)
        hits += hit
    print(f"\nkill -9 at {hits} random moments of a fit: {good}/{hits} bit-identical")
    assert good == hits


# --- asked to stop ----------------------------------------------------------------------------------------------------


def test_ctrl_c_ends_the_step_and_says_how_to_go_on(
    tmp_path: Path, uninterrupted: dict[str, Tensor], capfd: pytest.CaptureFixture[str]
) -> None:
    vae = program()
    handler = signal.getsignal(signal.SIGINT)
    history = small_fit(vae, Centred({50: lambda: signal.raise_signal(signal.SIGINT)}), tmp_path)
    assert history.interrupted
    assert len(history.loss) == 50
    assert signal.getsignal(signal.SIGINT) is handler
    assert f"is at step 50 of {NUM_STEPS}" in (said := capfd.readouterr().err)
    assert "Make the same call again to go on" in said
    assert read_run(tmp_path).finished is None
    assert same(
        outcome(vae, small_fit(vae, run=tmp_path)), uninterrupted
    )  # the program at hand, averaged by now


def test_a_second_ctrl_c_ends_at_once(tmp_path: Path) -> None:
    def twice() -> None:
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)

    with pytest.raises(KeyboardInterrupt):
        small_fit(program(), Centred({50: twice}), tmp_path)
    assert Checkpoints(tmp_path / "checkpoints").steps() == [0]


def test_sigterm_saves_and_ends_the_process(tmp_path: Path, uninterrupted: dict[str, Tensor]) -> None:
    process, _ = tools.start(tools.fit_and_report, tmp_path, 30, "SIGTERM")
    process.join()
    assert process.exitcode == -signal.SIGTERM
    assert Checkpoints(tmp_path / "checkpoints").steps()[-1] == 30
    assert same(resumed(tmp_path), uninterrupted)


def test_sigterm_is_left_alone_without_a_run() -> None:
    class Term(Exception):
        pass

    def handler(*_: Any) -> None:
        raise Term

    before = signal.signal(signal.SIGTERM, handler)
    try:
        with pytest.raises(Term):
            small_fit(program(), Centred({5: lambda: signal.raise_signal(signal.SIGTERM)}))
    finally:
        signal.signal(signal.SIGTERM, before)


# --- refused ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"optim": Optim(lr=0.02)}, r"optim\.lr was 0\.01 and is 0\.02"),
        ({"num_steps": 7}, "num_steps was 3 and is 7"),
        ({"seed": 8}, "seed was 3 and is 8"),
        ({"batch_size": 9}, "batch_size was 8 and is 9"),
        ({"validation": None}, "validation was '.*' and is None"),
        (
            {"objective": ELBO(num_particles=2)},
            r"objective was 'Centred.*' and is 'ELBO\(num_particles=2, beta=1.0\)'",
        ),
    ],
)
def test_another_fit_is_refused(tmp_path: Path, options: dict[str, Any], message: str) -> None:
    small_fit(program(), run=tmp_path, num_steps=3)
    with pytest.raises(InputError, match=message):
        small_fit(program(), run=tmp_path, **({"num_steps": 3} | options))


def test_other_data_and_programs_are_refused(tmp_path: Path) -> None:
    options: dict[str, Any] = {"num_steps": 3, "run": tmp_path, "progress": False}
    fit(program(), tools.data(), ELBO(), **options)
    with pytest.raises(InputError, match="data was '50 rows, .*' and is '50 rows, "):
        fit(program(), tools.data() + 1e-6, ELBO(), **options)
    torch.manual_seed(0)
    wider = type(program()).mlp((6,), 2, widths=(17,))
    with pytest.raises(InputError, match="program was 'VAE with [0-9]+ weights.*' and is 'VAE with"):
        fit(wider, tools.data(), ELBO(), **options)


def test_a_bad_call_leaves_no_folder(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="expected shape"):
        fit(program(), torch.zeros(4, 5), ELBO(), run=tmp_path / "run", progress=False)
    assert not (tmp_path / "run").exists()


# --- what goes wrong --------------------------------------------------------------------------------------------------


def test_a_full_disk_leaves_the_last_checkpoint(tmp_path: Path, uninterrupted: dict[str, Tensor]) -> None:
    process, pipe = tools.start(tools.fit_and_report, tmp_path, 40, "full disk")
    said = pipe.recv()
    process.join()
    assert process.exitcode == 0
    assert said.startswith("FileError")
    for part in ("00000040.safetensors", "bytes)", "Free some space", "go on from step 39"):
        assert part in said
    assert Checkpoints(tmp_path / "checkpoints").steps() == [37, 38, 39]
    assert not list(tmp_path.rglob("*.part"))
    assert same(resumed(tmp_path), uninterrupted)


class Spoilt(ELBO):
    """At one step a number is added to the loss, or a root whose slope is infinite."""

    def __init__(self, step: int, by: float | None = None) -> None:
        super().__init__()
        self._step, self._by, self._seen = step, by, -1

    def loss(self, program: Any, batch: Batch) -> Tensor:
        loss = super().loss(program, batch)
        self._seen += 1
        if self._seen != self._step:
            return loss
        weight = next(program.parameters()).sum()
        return loss + ((weight - weight.detach()).sqrt() if self._by is None else self._by)


@pytest.mark.parametrize("by", [math.nan, math.inf])
def test_a_loss_that_is_not_finite_names_the_last_checkpoint(tmp_path: Path, often: None, by: float) -> None:
    vae = program()
    with pytest.raises(
        ProbgenError, match=f"loss became {by} at step 5 of .*the weights of step 4.*another run"
    ):
        small_fit(vae, Spoilt(5, by), tmp_path, validation=None)
    kept = Checkpoints(tmp_path / "checkpoints").latest()
    assert kept is not None
    assert kept.step == 4
    for name, value in vae.named_parameters():
        assert torch.equal(value, kept.tensors[f"program.{name}"])


def test_a_gradient_that_is_not_finite_names_the_weight() -> None:
    vae = program()
    first = next(name for name, _ in vae.named_parameters())
    with pytest.raises(
        ProbgenError, match=f"gradient became NaN or Inf at step 5 .*at weight '{first}'.*step 4"
    ):
        small_fit(vae, Spoilt(5), validation=None)
    assert all(bool(torch.isfinite(value).all()) for value in vae.parameters())


@pytest.mark.filterwarnings("ignore:Encountered NaN")  # Pyro's own word of it
def test_a_site_that_is_not_finite_is_named() -> None:
    class Bursting(torch.nn.Module):
        """Its observation's scale turns negative once the weight has moved."""

        def __init__(self) -> None:
            super().__init__()
            self.loc = torch.nn.Parameter(torch.zeros(()))

        def model(self, batch: Batch) -> None:
            with batch.plate():
                z = pyro.sample("z", dist.Normal(self.loc, 1.0))
                scale = torch.where(self.loc == 0, 1.0, math.nan)
                pyro.sample("x", dist.Normal(z, scale))

        def guide(self, batch: Batch) -> None:
            with batch.plate():
                pyro.sample("z", dist.Normal(batch.data["x"] / 2, 1.0))

    with pytest.raises(ProbgenError, match="nan at step 2 of 5, first at site 'x', whose log density"):
        fit(Bursting(), tools.data()[:, 0], ELBO(), num_steps=5, progress=False)


def test_weights_that_are_not_finite_are_refused() -> None:
    vae = program()
    with torch.no_grad():
        next(vae.parameters()).view(-1)[0] = math.nan
    with pytest.raises(InputError, match="Weight '.*' of VAE holds NaN or Inf before the first step"):
        small_fit(vae)


# --- what it costs ----------------------------------------------------------------------------------------------------


def test_the_log_stays_short(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fitting, "LOG_LINES", 10)
    fit(program(), tools.data(), ELBO(), num_steps=51, batch_size=4, run=tmp_path, progress=False)
    assert [line["step"] for line in read_run(tmp_path).log] == [*range(6, 51, 6), 51]


@pytest.mark.slow
def test_memory_stays_as_it_is(tmp_path: Path) -> None:
    process, pipe = tools.start(tools.fit_and_measure, tmp_path, 10_000)
    early, late = pipe.recv(), pipe.recv()
    process.join()
    print(f"\nmemory over 9,000 steps: {(late - early) / 2**20:+.2f} MB")
    assert late - early < 5 * 2**20


@pytest.mark.slow
def test_what_a_run_folder_costs(tmp_path: Path) -> None:
    """With checkpoints as they are by default, and the log."""
    seconds: dict[bool, list[float]] = {False: [], True: []}
    for attempt in range(5):
        for kept in seconds:
            run = tmp_path / str(attempt) if kept else None
            seconds[kept].append(small_fit(program(), run=run, num_steps=1000).seconds)
    ratio = min(seconds[True]) / min(seconds[False])
    print(f"\na fit with a run folder over one without: {ratio:.3f}")
    assert ratio < 1.3
