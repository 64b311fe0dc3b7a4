"""Run folders: whose they are, who is in them, what they keep."""

from __future__ import annotations

import json
import os
import re
import signal
from pathlib import Path

import pytest
import torch

import fit_run_tools as tools
from probgen import InputError, runs
from probgen.core import DamagedFile, DamagedFileWarning, FileError
from probgen.files import PART, write_json
from probgen.runs import Checkpoints, Run, read_run

CONFIG = {"num_steps": 1}


# --- one process at a time ------------------------------------------------------------------------------------------


def test_a_second_run_in_a_folder_is_refused_until_the_first_is_gone(tmp_path: Path) -> None:
    """While another process holds it; free again once that was killed."""
    process, pipe = tools.start(tools.hold, tmp_path)
    assert pipe.recv() == "held"
    with pytest.raises(FileError, match=rf"process {process.pid} \(since 20.*\) is at work in") as refusal:
        Run(tmp_path, "fit", CONFIG).__enter__()
    assert "Wait for it, stop it, or choose another folder" in str(refusal.value)
    assert read_run(tmp_path).config == CONFIG  # reading needs no lock
    process.kill()
    process.join()
    assert process.exitcode == -signal.SIGKILL
    with Run(tmp_path, "fit", CONFIG) as run:
        assert run.resumed


def test_a_second_run_in_the_same_process_is_refused(tmp_path: Path) -> None:
    with Run(tmp_path, "fit", CONFIG), pytest.raises(FileError, match=f"process {os.getpid()} "):
        Run(tmp_path, "fit", CONFIG).__enter__()
    with Run(tmp_path, "fit", CONFIG):
        pass


def test_the_lock_is_given_back_when_the_block_fails(tmp_path: Path) -> None:
    with pytest.raises(ZeroDivisionError), Run(tmp_path, "fit", CONFIG):
        raise ZeroDivisionError
    with Run(tmp_path, "fit", CONFIG):
        pass


# --- whose folder it is ---------------------------------------------------------------------------------------------


def test_another_run_is_refused_by_what_differs(tmp_path: Path) -> None:
    with Run(tmp_path, "fit", {"seed": 1, "optim": {"lr": 0.1, "warmup": 5}, "gone": True}):
        pass
    with pytest.raises(InputError) as refusal:
        Run(tmp_path, "fit", {"seed": 2, "optim": {"lr": 0.2, "warmup": 5}, "new": "x"}).__enter__()
    said = str(refusal.value)
    for part in ("gone was True and is None", "new was None and is 'x'", "optim.lr was 0.1 and is 0.2"):
        assert part in said
    assert "seed was 1 and is 2" in said
    assert "warmup" not in said
    with pytest.raises(InputError, match="is a run of fit; infer needs a folder of its own"):
        Run(tmp_path, "infer", CONFIG).__enter__()


def test_a_folder_of_others_is_refused_and_left_alone(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(FileError, match="holds files but no run of probgen"):
        Run(tmp_path, "fit", CONFIG).__enter__()
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]


def test_a_file_instead_of_a_folder_is_refused(tmp_path: Path) -> None:
    (tmp_path / "run").write_text("")
    for path in (tmp_path / "run", tmp_path / "run" / "below"):
        with pytest.raises(FileError, match="cannot be made"):
            Run(path, "fit", CONFIG).__enter__()


@pytest.mark.parametrize(
    "content", ["", "{", "[]", "{}", '{"format": "probgen run 999"}', '{"format": "probgen run 1"}', "\x00"]
)
def test_a_damaged_description_is_refused(tmp_path: Path, content: str) -> None:
    (tmp_path / "run.json").write_text(content)
    for attempt in (lambda: read_run(tmp_path), lambda: Run(tmp_path, "fit", CONFIG).__enter__()):
        with pytest.raises(DamagedFile, match=r"run\.json"):
            attempt()


def test_what_a_killed_process_left_is_cleared(tmp_path: Path) -> None:
    """Killed while it wrote run.json: the folder is as good as empty."""
    (tmp_path / f".run.json.0a1b{PART}").write_text("{")
    (tmp_path / "lock").write_text("process 1")
    with Run(tmp_path, "fit", CONFIG) as run:
        assert not run.resumed
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "checkpoints" / f".00000001.safetensors.0a1b{PART}").write_text("")
    with Run(tmp_path, "fit", CONFIG):
        pass
    assert not list(tmp_path.rglob(f"*{PART}"))


def test_a_run_that_another_process_began_meanwhile_is_seen(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Between the look at the folder and the lock."""
    lock = runs._lock

    def slow_lock(path: Path) -> object:
        write_json(tmp_path / "run.json", about)
        return lock(path)

    with Run(tmp_path / "other", "fit", {"num_steps": 2}) as run:
        about = json.loads((run.path / "run.json").read_text())
    (tmp_path / "other" / "run.json").unlink()
    (tmp_path / "other" / "lock").unlink()
    (tmp_path / "other").rmdir()
    monkeypatch.setattr(runs, "_lock", slow_lock)
    with pytest.raises(InputError, match="num_steps was 2 and is 1"):
        Run(tmp_path, "fit", CONFIG).__enter__()


# --- what it keeps ----------------------------------------------------------------------------------------------------


def test_the_log_is_rewound_and_a_torn_line_forgotten(tmp_path: Path) -> None:
    with Run(tmp_path, "fit", CONFIG) as run:
        for step in range(5):
            run.log(step=step, loss=0.5)
        with (tmp_path / "log.jsonl").open("a") as file:
            file.write('{"step": 5, "lo')
        assert len(read_run(tmp_path).log) == 5
        run.rewind(2)
        run.log(step=3, loss=0.25)
    assert read_run(tmp_path).log[2:] == [{"step": 2, "loss": 0.5}, {"step": 3, "loss": 0.25}]


def test_finishing_is_noted(tmp_path: Path) -> None:
    with Run(tmp_path, "fit", CONFIG) as run:
        assert run.finished is None
        run.finish(steps=1, seconds=0.5)
        assert run.finished == {"steps": 1, "seconds": 0.5}
    record = read_run(tmp_path)
    assert record.finished == {"steps": 1, "seconds": 0.5}
    assert record.versions["torch"] == torch.__version__
    assert re.fullmatch(r"20\d\d-\d\d-\d\dT.*\+00:00", record.started)


def test_the_last_few_checkpoints_are_kept(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path, keep=2)
    assert checkpoints.latest() is None
    for step in (1, 5, 9, 123_456_789):
        checkpoints.write(step, {"w": torch.full((2,), step)}, {"taken": step})
    assert checkpoints.steps() == [9, 123_456_789]
    latest = checkpoints.latest()
    assert latest is not None
    assert latest.tensors["w"].tolist() == [123_456_789] * 2
    assert latest.facts == {"taken": 123_456_789}


def test_damaged_checkpoints_give_way_to_older_ones(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path)
    for step in (1, 2, 3):
        checkpoints.write(step, {"w": torch.ones(2)}, {})
    checkpoints.path(3).write_bytes(checkpoints.path(3).read_bytes()[:-1])
    checkpoints.path(2).write_bytes(checkpoints.path(1).read_bytes())  # whole, but of another step
    with pytest.warns(DamagedFileWarning, match="Going on from step 1") as said:
        found = checkpoints.latest()
    assert found is not None
    assert found.step == 1
    assert any("was renamed: it is of step 1" in str(warning.message) for warning in said)
    checkpoints.path(1).write_bytes(b"")
    with pytest.raises(DamagedFile, match="None of the 3 checkpoints .* is whole"):
        checkpoints.latest()


def test_checkpoints_are_due_after_a_while_and_later_where_they_are_slow(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = 0.0
    monkeypatch.setattr(runs.time, "perf_counter", lambda: now)
    write = runs.write_tensors

    def slow(*arguments: object) -> None:
        nonlocal now
        now += 3.0
        write(*arguments)  # type: ignore[arg-type]

    checkpoints = Checkpoints(tmp_path)
    assert not checkpoints.due
    now = runs.SECONDS_APART
    assert checkpoints.due
    checkpoints.write(1, {}, {})
    assert not checkpoints.due
    now += runs.SECONDS_APART
    assert checkpoints.due
    monkeypatch.setattr(runs, "write_tensors", slow)
    checkpoints.write(2, {}, {})
    now += 3.0 / runs.SHARE - 1
    assert not checkpoints.due
    now += 2
    assert checkpoints.due
