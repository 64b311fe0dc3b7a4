"""Markov chains in run folders: stopped, killed or unplugged at any moment, they end where they would have ended.

Run as a program, this file forks chains and kills them: `python test_chain_runs.py ENGINE KILLS FOLDER`.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import pkgutil
import random
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch

from probgen import infer, inference, runs
from probgen.core import Batch, DamagedFileWarning, DataSets, FileError, InputError, Posterior
from probgen.inference.ancestral import Ancestral
from probgen.inference.chees import ChEES
from probgen.inference.hmc import HMC
from probgen.inference.nuts import NUTS
from probgen.inference.ula import ULA
from probgen.kernels import MarkovEngine, keeping
from probgen.kernels.run import Chains
from probgen.runs import read_run
from probgen.targets import Pair

Y = torch.tensor([1.3, 0.2, -0.4, 2.1, 0.9, 1.6])
SCALES = torch.tensor([1.0, 3.0, 0.3])


def shifted(batch: Batch) -> None:
    """Two latents of one mean: correlated a posteriori."""
    w = pyro.sample("w", dist.Normal(torch.zeros(2), torch.tensor([1.0, 2.0])).to_event(1))
    with batch.plate():
        pyro.sample("y", dist.Normal(w.sum(-1), 1.0))


def scaled() -> None:
    """Coordinates of different scales, and an observation that ties them."""
    z = pyro.sample("z", dist.Normal(torch.zeros(3), SCALES).to_event(1))
    pyro.sample("y", dist.StudentT(3.0, z.sum(), 1.0))


def drawn(engine: MarkovEngine, **settings: Any) -> Posterior:
    """Draws from `shifted`."""
    given = {"data": {"y": Y}, "num_draws": 24, "num_chains": 4, "seed": 3} | settings
    return infer(Pair(shifted), engine, **given)


def check_same(found: Posterior, expected: Posterior) -> None:
    """Draws, statistics, final state and what was paid in gradients, to the last bit."""
    assert found.cost.gradients == expected.cost.gradients
    assert found.cost.warmup_gradients == expected.cost.warmup_gradients
    for group in ("draws", "stats", "run_stats"):
        ours, theirs = getattr(found, group), getattr(expected, group)
        assert ours.keys() == theirs.keys()
        for name, value in theirs.items():
            assert torch.equal(ours[name], value), (group, name)
    assert found.state.step == expected.state.step
    for group in ("kernel", "tuning"):
        for name, value in getattr(expected.state, group).items():
            assert torch.equal(getattr(found.state, group)[name], value), (group, name)


class Unplugged(Exception):
    """What ends a run in these tests."""


@pytest.fixture
def always_due(monkeypatch: pytest.MonkeyPatch) -> None:
    """A checkpoint at every opportunity."""
    monkeypatch.setattr(runs, "SECONDS_APART", 0.0)
    monkeypatch.setattr(runs, "SHARE", float("inf"))


@contextlib.contextmanager
def unplugged(after: int) -> Iterator[None]:
    """The run ends when it has written so many checkpoints."""
    whole, written = keeping.RunKeeper.keep, []

    def keep(self: keeping.RunKeeper, chains: keeping.Moving) -> None:
        whole(self, chains)
        written.append(chains.step)
        if len(written) == after:
            raise Unplugged

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(keeping.RunKeeper, "keep", keep)
        yield


def resumed(draw: Callable[[], Posterior], every: int) -> tuple[Posterior, int]:
    """What comes out where a run ends at every so manieth checkpoint, and how often it did."""
    for count in range(1000):
        with contextlib.suppress(Unplugged), unplugged(every):
            return draw(), count
    raise AssertionError("It never ended.")


SHORT = HMC(num_steps=3, num_warmup=20)

# --- resuming ------------------------------------------------------------------------------------------------------


def engines() -> list[MarkovEngine]:
    """One of each that there is, and settings under which more has to be kept."""
    modules = [
        importlib.import_module(f"probgen.inference.{found.name}")
        for found in pkgutil.iter_modules(inference.__path__)
    ]
    examples = [module.example() for module in modules if hasattr(module, "example")]
    return [engine for engine in examples if isinstance(engine, MarkovEngine)] + [
        HMC(num_steps=2, num_warmup=30, metric="dense"),
        ChEES(num_warmup=30, max_steps=4, metric="dense"),
        NUTS(num_warmup=20, max_tree_depth=2, thin=3),
        ULA(step_size=0.05, num_warmup=0, thin=7),
    ]


@pytest.mark.parametrize("engine", engines(), ids=str)
@pytest.mark.usefixtures("always_due")
def test_an_unplugged_run_ends_where_it_would_have_ended(engine: MarkovEngine, tmp_path: Path) -> None:
    """Of every engine there is, in warm-up and while drawing, to the last bit."""
    found, ends = resumed(lambda: drawn(engine, run=tmp_path / "run"), every=11)
    assert ends > 1 or engine.warmup < 20
    check_same(found, drawn(engine))


@pytest.mark.usefixtures("always_due")
def test_data_sets_side_by_side_go_on_too(tmp_path: Path) -> None:
    data = {"data": DataSets({"y": torch.stack([Y, Y - 2, 3 * Y])}), "num_draws": 5}
    engine = HMC(num_steps=3, num_warmup=40)
    found, _ = resumed(lambda: drawn(engine, **data, run=tmp_path / "run"), every=11)
    check_same(found, drawn(engine, **data))


@pytest.mark.usefixtures("always_due")
def test_chains_that_go_on_from_a_state_go_on_from_a_run_folder_too(tmp_path: Path) -> None:
    first = drawn(SHORT)
    found, ends = resumed(lambda: drawn(SHORT, state=first.state, run=tmp_path / "run"), every=2)
    assert ends > 1
    check_same(found, drawn(SHORT, state=first.state))


@pytest.mark.slow
@pytest.mark.usefixtures("always_due")
@pytest.mark.parametrize(
    "engine", [HMC(num_steps=3, num_warmup=40), NUTS(num_warmup=40, max_tree_depth=4)], ids=str
)
def test_compiled_chains_go_on_too(engine: MarkovEngine, tmp_path: Path) -> None:
    engine = replace(engine, compile=True)
    found, _ = resumed(lambda: drawn(engine, num_draws=50, run=tmp_path / "run"), every=20)
    check_same(found, drawn(engine, num_draws=50))


def other_noise(monkeypatch: pytest.MonkeyPatch) -> None:
    """The noise begins anew, as if the number of transitions made were not kept."""
    resume = Chains.resume

    def spoilt(self: Chains, found: runs.Checkpoint) -> None:
        resume(self, found)
        of, begun = self.noise.of, self.step
        monkeypatch.setattr(self.noise, "of", lambda first, count: of(first - begun, count))

    monkeypatch.setattr(Chains, "resume", spoilt)


def adapters_forget(monkeypatch: pytest.MonkeyPatch) -> None:
    """What adapters have learnt is not kept."""
    snapshot = Chains.snapshot

    def spoilt(self: Chains) -> dict[str, Any]:
        whole = snapshot(self)
        adapters = self.engine.adapters() if whole["adapters"] else []
        for adapter in adapters:
            adapter.begin(self.tuning, self.groups)
        return whole | {"adapters": [vars(adapter) for adapter in adapters]}

    monkeypatch.setattr(Chains, "snapshot", spoilt)


@pytest.mark.usefixtures("always_due")
@pytest.mark.parametrize("spoil", [other_noise, adapters_forget])
def test_a_run_that_forgets_ends_elsewhere(
    spoil: Callable[[pytest.MonkeyPatch], None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = HMC(num_steps=3, num_warmup=40)
    expected = drawn(engine)
    spoil(monkeypatch)
    found, _ = resumed(lambda: drawn(engine, run=tmp_path / "run"), every=11)
    with pytest.raises(AssertionError):
        check_same(found, expected)


# --- what is in the folder -------------------------------------------------------------------------------------------


def test_a_finished_run_is_read_without_a_gradient(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = tmp_path / "run"
    first = drawn(SHORT, run=run)
    monkeypatch.setattr(HMC, "run", lambda *_, **__: pytest.fail("It ran again."))
    again = drawn(SHORT, run=run)
    check_same(again, first)
    assert again.target is not None
    assert again.cost == first.cost
    assert not list((run / "checkpoints").iterdir())
    assert read_run(run).verb == "infer"


@pytest.mark.usefixtures("always_due")
def test_draws_are_written_once_and_states_of_warm_up_are_few(tmp_path: Path) -> None:
    run = tmp_path / "run"
    engine = NUTS(num_warmup=30, max_tree_depth=3)
    with contextlib.suppress(Unplugged), unplugged(32):
        drawn(engine, num_draws=100, run=run)
    checkpoints = runs.Checkpoints(run / "checkpoints", keep=100)
    assert checkpoints.steps() == [28, 29, 30, 46, 62]
    parts = [checkpoints.read(step).tensors.get("draws.u", torch.empty(0)) for step in checkpoints.steps()]
    assert [len(part) for part in parts] == [0, 0, 0, 16, 16]
    assert [line["draws"] for line in read_run(run).log[-3:]] == [0, 16, 32]


@pytest.mark.usefixtures("always_due")
@pytest.mark.parametrize("which", [slice(-1, None), slice(3, 4), slice(2, 4), slice(None)])
def test_a_damaged_file_is_passed_over(which: slice, tmp_path: Path) -> None:
    """The last; one of the draws between; with it the last state of warm-up; all."""
    run = tmp_path / "run"
    with contextlib.suppress(Unplugged), unplugged(24):
        drawn(SHORT, run=run)
    for path in sorted((run / "checkpoints").iterdir())[which]:
        content = bytearray(path.read_bytes())
        content[-5] ^= 1
        path.write_bytes(content)
    with pytest.warns(DamagedFileWarning, match=r"checksum.*(Going on from step|Beginning anew)"):
        found = drawn(SHORT, run=run)
    check_same(found, drawn(SHORT))


@pytest.mark.usefixtures("always_due")
def test_a_missing_file_is_made_again(tmp_path: Path) -> None:
    run = tmp_path / "run"
    with contextlib.suppress(Unplugged), unplugged(24):
        drawn(SHORT, run=run)
    sorted((run / "checkpoints").iterdir())[3].unlink()
    check_same(drawn(SHORT, run=run), drawn(SHORT))


@pytest.mark.parametrize(
    ("name", "other"),
    [
        ("num_draws", {"num_draws": 25}),
        ("num_chains", {"num_chains": 5}),
        ("seed", {"seed": 4}),
        ("data", {"data": {"y": Y + 1e-6}}),
        ("init", {"init": True}),
        ("state", {"state": True}),
    ],
)
def test_another_call_is_refused_by_what_differs(name: str, other: dict[str, Any], tmp_path: Path) -> None:
    first = drawn(SHORT, run=tmp_path / "run")
    given = {"init": first, "state": first.state}
    changed = {key: given[key] if value is True else value for key, value in other.items()}
    with pytest.raises(InputError, match=f"asked for otherwise.*{name} was"):
        drawn(SHORT, **changed, run=tmp_path / "run")


def test_another_engine_or_program_is_refused(tmp_path: Path) -> None:
    drawn(SHORT, run=tmp_path / "run")
    with pytest.raises(InputError, match=r"engine was 'HMC.*' and is 'HMC"):
        drawn(replace(SHORT, num_steps=4), run=tmp_path / "run")
    with pytest.raises(InputError, match="program was"):
        infer(Pair(shifted, shifted), SHORT, data={"y": Y}, run=tmp_path / "run")


def test_a_folder_in_use_is_refused(tmp_path: Path) -> None:
    with runs.Run(tmp_path / "run", "infer", {}), pytest.raises(InputError):
        drawn(SHORT, run=tmp_path / "run")
    run = tmp_path / "other"
    with pytest.raises(Unplugged), unplugged(1):
        drawn(SHORT, run=run)
    config = read_run(run).config
    with runs.Run(run, "infer", config), pytest.raises(FileError, match=r"process \d+ .*is at work"):
        drawn(SHORT, run=run)


def test_other_engines_keep_what_they_finished(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def draw() -> Posterior:
        return infer(scaled, Ancestral(), num_draws=5, run=tmp_path / "run")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Ancestral, "run", lambda *_, **__: (_ for _ in ()).throw(Unplugged()))
        with pytest.raises(Unplugged):
            draw()
    first = draw()
    monkeypatch.setattr(Ancestral, "run", lambda *_, **__: pytest.fail("It ran again."))
    assert torch.equal(draw()["z"], first["z"])


# --- processes -------------------------------------------------------------------------------------------------------

ENGINES: dict[str, MarkovEngine] = {
    "NUTS": NUTS(num_warmup=100, max_tree_depth=5),
    "HMC": HMC(num_steps=4, num_warmup=600),
    "ChEES": ChEES(num_warmup=600, max_steps=30),
}
NUM_DRAWS = 200


def long_run(name: str, **settings: Any) -> Posterior:
    """A second or two of chains."""
    given = {"data": {"y": torch.tensor(2.0)}, "num_draws": NUM_DRAWS, "num_chains": 4, "seed": 5}
    return infer(scaled, ENGINES[name], **given, **settings)


def kill_often(name: str, kills: int, run: Path) -> list[str]:
    """Fork the run and kill it at random moments, then let it end: the stages in which it was killed."""
    runs.SECONDS_APART, runs.SHARE = 0.02, float("inf")
    torch.set_num_threads(1)
    infer(scaled, HMC(num_warmup=20), num_draws=1)  # imports what is imported late, for all
    moments, last = random.Random(kills), ENGINES[name].warmup + NUM_DRAWS
    stages = []
    for step in sorted(moments.randrange(last) for _ in range(kills)):
        child = os.fork()
        if child == 0:
            long_run(name, run=run)
            os._exit(0)
        while progress(run)["step"] < step:
            time.sleep(0.001)
        time.sleep(moments.uniform(0.0, 0.1))
        os.kill(child, signal.SIGKILL)
        _, status = os.waitpid(child, 0)
        assert os.WIFSIGNALED(status), "It ended before it was killed."
        stages.append("drawing" if progress(run)["draws"] else "warm-up")
    check_same(long_run(name, run=run), long_run(name))
    return stages


def progress(run: Path) -> dict[str, int]:
    """How far a run is that another process makes."""
    log = read_run(run).log if (run / "run.json").exists() else []
    return log[-1] if log else {"step": -1, "draws": 0}


def in_process(name: str, kills: int, run: Path) -> list[str]:
    """The stages in which a run was killed, in a process of its own; it ended bit-identical."""
    command = [sys.executable, __file__, name, str(kills), str(run)]
    ended = subprocess.run(command, capture_output=True, text=True, check=False, timeout=600)
    assert ended.returncode == 0, ended.stderr
    stages: list[str] = json.loads(ended.stdout)
    return stages


def test_a_killed_run_ends_where_it_would_have_ended(tmp_path: Path) -> None:
    assert len(in_process("HMC", 3, tmp_path / "run")) == 3


@pytest.mark.slow
@pytest.mark.parametrize("name", list(ENGINES))
def test_20_times_killed_20_times_the_same(name: str, tmp_path: Path) -> None:
    stages = in_process(name, 20, tmp_path / "run")
    assert len(stages) == 20
    assert {"warm-up", "drawing"} <= set(stages)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("stage", ["in warm-up", "draws"])
def test_a_run_that_is_asked_to_stop_saves_and_says_how_to_go_on(
    number: signal.Signals, stage: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The signal comes in the middle of a transition; SIGTERM has a handler here that only takes note."""
    taken: list[int] = []
    previous = signal.signal(signal.SIGTERM, lambda number, _: taken.append(number))
    move, left = Chains._move, [10 if stage == "in warm-up" else 23]

    def asked(self: Chains, count: int) -> Any:
        left[0] -= 1
        if left[0] == 0:
            signal.raise_signal(number)
        return move(self, count)

    with monkeypatch.context() as patch:
        patch.setattr(Chains, "_move", asked)
        with pytest.raises(
            KeyboardInterrupt, match=rf"HMC stopped .*{stage}.* make the same call again to go on"
        ):
            drawn(SHORT, run=tmp_path / "run")
    assert signal.getsignal(signal.SIGTERM) is not previous
    signal.signal(signal.SIGTERM, previous)
    assert taken == [signal.SIGTERM] * (number is signal.SIGTERM)
    assert read_run(tmp_path / "run").finished is None
    steps = runs.Checkpoints(tmp_path / "run" / "checkpoints").steps()
    assert steps[-1] == (10 if stage == "in warm-up" else 32)
    check_same(drawn(SHORT, run=tmp_path / "run"), drawn(SHORT))


@pytest.mark.usefixtures("always_due")
def test_a_full_disk_leaves_the_last_checkpoint(tmp_path: Path) -> None:
    run, many = tmp_path / "run", 300
    with pytest.raises(Unplugged), unplugged(3):
        drawn(SHORT, num_chains=many, run=run)
    message = r"checkpoints/00000004.* \([\d,]+ bytes\).* make the same call again to go on from step 3"
    with limited_files(10_000), pytest.raises(FileError, match=message):
        drawn(SHORT, num_chains=many, run=run)
    check_same(drawn(SHORT, num_chains=many, run=run), drawn(SHORT, num_chains=many))


@contextlib.contextmanager
def limited_files(size: int) -> Iterator[None]:
    """No file may grow beyond so many bytes."""
    before, ignored = resource.getrlimit(resource.RLIMIT_FSIZE), signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, ignored)


@pytest.mark.slow
@pytest.mark.usefixtures("always_due")
def test_memory_does_not_grow_with_checkpoints(tmp_path: Path) -> None:
    """Less than 5 MB in 10,000 transitions of warm-up, each of which is kept."""
    sizes: list[int] = []
    whole = keeping.RunKeeper.keep

    def keep(self: keeping.RunKeeper, chains: keeping.Moving) -> None:
        whole(self, chains)
        sizes.append(resident())

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(keeping.RunKeeper, "keep", keep)
        drawn(HMC(num_steps=1, num_warmup=10_000), run=tmp_path / "run")
    assert sizes[9_999] - sizes[500] < 5e6


def resident() -> int:
    """Bytes of memory in use."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


if __name__ == "__main__":
    sys.stdout.write(json.dumps(kill_often(sys.argv[1], int(sys.argv[2]), Path(sys.argv[3]))))
