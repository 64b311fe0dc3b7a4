"""Several processes on one call, for real: two CPU processes each time."""

import multiprocessing
import os
import signal
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import Tensor, nn

from probgen import ELBO, VAE, Optim, Pair, fit, infer
from probgen.core import Batch, InputError, ProbgenError, UnsupportedError
from probgen.devices import DeviceError, Devices, Group, Networks, launch
from probgen.fitting import History
from probgen.inference import NUTS, ULA, Ancestral, ReverseSDE, TwistedSMC
from probgen.models.ddpm import DDPM
from probgen.models.gaussian_mixture import GaussianMixture
from probgen.nets import MLP, TimeMLP
from probgen.runs import read_run
from probgen.training import Rows, Training

pytest.importorskip("lightning_fabric", reason="pip install 'probgen[devices]'")


@pytest.fixture(autouse=True)
def no_process_is_left() -> Iterator[None]:
    yield
    assert multiprocessing.active_children() == []


# --- what is asked for -------------------------------------------------------------------------------------------


def test_a_number_stands_for_devices() -> None:
    assert Devices.of(3) == Devices(count=3)
    assert Devices.of(Devices(2, compile=True)).compile


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"count": 0}, "count must be an integer >= 1, got 0"),
        ({"count": 2.0}, "count must be an integer"),
        ({"accelerator": "gpus"}, "did you mean 'gpu'"),
        ({"precision": "fp8"}, "known: 'full', 'bf16'"),
        ({"count": 99, "accelerator": "gpu"}, "Asked for 99 GPUs"),
    ],
)
def test_what_cannot_be_is_refused(settings: dict[str, Any], said: str) -> None:
    with pytest.raises(InputError, match=said):
        Devices(**settings)


def test_without_fabric_the_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda _: None)
    with pytest.raises(UnsupportedError, match=r"pip install 'probgen\[devices\]'"):
        launch(lambda _: ({}, None), count=2)


# --- shares and sums ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("count", [1, 2, 3, 5])
@pytest.mark.parametrize("total", [1, 4, 5, 17])
def test_shares_are_neighbours_and_nothing_is_left_out(count: int, total: int) -> None:
    shares = [Group(rank, count).share(range(total)) for rank in range(count)]
    assert [i for share in shares for i in share] == list(range(total))
    assert max(map(len, shares)) - min(map(len, shares)) <= 1


def test_sums_reach_every_process_and_a_missing_gradient_is_zero() -> None:
    def work(group: Group) -> tuple[dict[str, Tensor], Any]:
        first, second, third = (nn.Parameter(torch.zeros(2, 3)) for _ in range(3))
        first.grad = torch.full((2, 3), 1.0 + group.rank)
        if group.rank == 1:
            second.grad = torch.ones(2, 3)
        group.add_gradients([first, second, third])
        counts = torch.tensor(group.rank + 1)
        group.add([counts])
        assert first.grad is not None
        assert second.grad is not None
        return {"first": first.grad, "second": second.grad, "counts": counts}, (
            third.grad is None,
            group.any(group.rank == 1),
            group.any(False),
        )

    for tensors, told in launch(work, count=2):
        assert torch.equal(tensors["first"], torch.full((2, 3), 3.0))
        assert torch.equal(tensors["second"], torch.ones(2, 3))
        assert tensors["counts"] == 3
        assert told == (True, True, False)


def test_parallel_loops_work_in_a_process_whose_parent_used_threads() -> None:
    """OpenMP's threads do not survive a fork: run in the main thread of the child, this would never end."""
    before = torch.get_num_threads()
    torch.set_num_threads(4)
    try:
        torch.randn(1000, 1000).matmul(torch.randn(1000, 1000))
        torch.randn(10**6).exp()

        def work(_: Group) -> tuple[dict[str, Tensor], int]:
            return {"sum": torch.ones(10**6).exp().sum()}, torch.get_num_threads()

        found = launch(work, count=2)
    finally:
        torch.set_num_threads(before)
    assert [threads for _, threads in found] == [2, 2]


@pytest.mark.slow  # each process imports everything anew
def test_processes_that_are_spawned_get_what_is_sent_to_them(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("probgen.devices._start_method", lambda: "spawn")
    net = nn.Linear(2, 1)
    before = net.weight.detach().clone()
    found = launch(_trained, net, count=2)
    assert torch.equal(found[0][0]["weight"], before + 3)
    assert torch.equal(net.weight, before)  # theirs are copies
    with pytest.raises(InputError, match="top level of a module"):
        launch(lambda _: ({}, None), count=2)


def _trained(group: Group, net: nn.Linear) -> tuple[dict[str, Tensor], None]:
    step = torch.tensor(1.0 + group.rank)
    group.add([step])
    with torch.no_grad():
        net.weight += step
    return {"weight": net.weight}, None


# --- when something goes wrong -----------------------------------------------------------------------------------


def _waiting(group: Group, at: int, do: Any) -> tuple[dict[str, Tensor], None]:
    if group.rank == at:
        do()
    group.any(True)
    return {}, None


def _raise(error: Exception) -> None:
    raise error


@pytest.mark.parametrize("rank", [0, 1])
def test_one_error_is_told_and_the_others_are_ended(rank: int) -> None:
    started = time.perf_counter()
    with pytest.raises(
        DeviceError, match=rf"Process {rank} of 2 failed at .*: ValueError: too hot.*devices=1"
    ):
        launch(_waiting, rank, lambda: _raise(ValueError("too hot")), count=2)
    with pytest.raises(InputError, match="^No such site\n"):
        launch(_waiting, rank, lambda: _raise(InputError("No such site")), count=2)
    with pytest.raises(DeviceError, match=f"Process {rank} ended by signal SIGKILL"):
        launch(_waiting, rank, lambda: os.kill(os.getpid(), signal.SIGKILL), count=2)
    assert time.perf_counter() - started < 10


def test_what_cannot_come_back_is_told() -> None:
    with pytest.raises(DeviceError, match="Process . of 2 failed"):
        launch(lambda _: ({}, threading.Lock()), count=2)


def test_warnings_reach_the_caller_once() -> None:
    def work(_: Group) -> tuple[dict[str, Tensor], None]:
        import warnings

        warnings.simplefilter("always")
        warnings.warn("draws 3..5 turned NaN", UserWarning, stacklevel=1)
        return {}, None

    with pytest.warns(UserWarning, match=r"draws 3\.\.5") as caught:
        launch(work, count=2)
    assert len(caught) == 1


def test_processes_can_be_told_to_stop() -> None:
    def work(group: Group) -> tuple[dict[str, Tensor], int]:
        steps = 0
        while not group.any(group.told_to_stop()):
            steps += 1
            time.sleep(0.001)
        return {}, steps

    started = time.perf_counter()
    (_, first), (_, second) = launch(work, count=2, stop=lambda: time.perf_counter() - started > 0.3)
    assert first == second


@pytest.mark.parametrize(
    ("number", "code"), [(signal.SIGINT, 1), pytest.param(signal.SIGKILL, -9, marks=pytest.mark.slow)]
)
def test_no_process_outlives_its_parent(number: signal.Signals, code: int) -> None:
    script = """
        import os, time
        from probgen.devices import launch

        def work(group):
            os.write(1, f"{os.getpid()}\\n".encode())
            time.sleep(60)

        launch(work, count=2)
    """
    with subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(script)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as parent:
        assert parent.stdout is not None
        children = [int(parent.stdout.readline()) for _ in range(2)]
        parent.send_signal(number)
        parent.communicate(timeout=20)
    assert parent.returncode in (code, -number)
    deadline = time.perf_counter() + 5
    while any(map(_lives, children)):
        assert time.perf_counter() < deadline
        time.sleep(0.05)


def _lives(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


# --- precision and compilation -----------------------------------------------------------------------------------


def test_networks_run_in_bfloat16_and_are_themselves_again() -> None:
    network = MLP((2,), (3,), widths=(8,))
    program, x = nn.ModuleDict({"inner": nn.ModuleList([network])}), torch.randn(5, 2)
    full = network(x).detach()
    with Networks(program, Devices(precision="bf16")).running():
        rough = network(x).detach()
    assert rough.dtype == torch.float32
    assert 1e-5 < float((rough - full).abs().max()) < 0.05
    assert torch.equal(network(x), full)
    assert "forward" not in vars(network)


def test_bfloat16_is_refused_for_float64_weights() -> None:
    with pytest.raises(InputError, match=r"float64 weights.*program\.float\(\)"):
        Networks(nn.Sequential(nn.Linear(2, 2)).double(), Devices(precision="bf16"))


@pytest.mark.slow  # compilers take their time
def test_compiled_networks_give_the_same_numbers() -> None:
    program = nn.Sequential(MLP((2,), (3,), widths=(8,)))
    x = torch.randn(5, 2)
    with Networks(program, Devices(compile=True)).running():
        fast = program(x)
    assert torch.allclose(fast, program(x), atol=1e-6)


# --- draws and chains --------------------------------------------------------------------------------------------


def normal() -> None:
    z = pyro.sample("z", dist.Normal(torch.zeros(2, dtype=torch.float64), 1.0).to_event(1))
    pyro.sample("y", dist.Normal(z, 1.0).to_event(1))


Y = {"y": torch.ones(2, dtype=torch.float64)}


def both(program: Any, engine: Any, data: Any = None, **settings: Any) -> tuple[Any, Any]:
    """The same draws by one process and by two."""
    settings |= {"seed": 3}
    return (
        infer(program, engine, data=data, **settings),
        infer(program, engine, data=data, devices=2, **settings),
    )


@pytest.mark.parametrize("num_chains", [1, 2])
def test_independent_draws_are_the_same_on_any_number_of_devices(num_chains: int) -> None:
    mixture = GaussianMixture.example().double()
    ddpm = DDPM(TimeMLP((2,), width=8, num_blocks=1), num_steps=6).double()
    for program, engine in (
        (mixture, ReverseSDE(steps=8)),
        (mixture, ReverseSDE(steps=8, batch_size=2)),
        (ddpm, Ancestral()),
        (normal, Ancestral()),
    ):
        one, two = both(program, engine, num_draws=7, num_chains=num_chains)
        for site, value in one.draws.items():
            assert value.shape == two[site].shape
            assert float((value - two[site]).abs().max()) < 1e-10
        assert (two.kind, two.guarantee, two.engine, two.dims) == (
            one.kind,
            one.guarantee,
            one.engine,
            one.dims,
        )
        assert two.target is not None


def test_chains_that_adapt_nothing_are_the_same_on_any_number_of_devices() -> None:
    one, two = both(normal, ULA(step_size=0.1), Y, num_draws=20, num_chains=3)
    assert float((one["z"] - two["z"]).abs().max()) < 1e-10
    assert one.stats.keys() == two.stats.keys()
    assert torch.equal(one.run_stats["step_size"], two.run_stats["step_size"])


def test_chains_that_adapt_do_so_with_those_of_their_own_process() -> None:
    """Mean and variance are 1/2: four chains of 100 find both to 0.2, four standard errors if 200 draws count."""
    two = infer(normal, NUTS(num_warmup=60), data=Y, num_draws=100, num_chains=4, seed=3, devices=2)
    z = two.flat("z")
    assert float((z.mean(0) - 0.5).abs().max()) < 0.2
    assert float((z.var(0) - 0.5).abs().max()) < 0.2
    steps = two.run_stats["step_size"]
    assert steps.shape == (4,)
    assert steps[0] == steps[1] != steps[2]
    assert len({tuple(chain[0].tolist()) for chain in two["z"]}) == 4
    assert two.state is None


def test_a_share_begins_where_init_says() -> None:
    init = infer(normal, Ancestral(), num_draws=1, num_chains=4, seed=0)
    init.draws.pop("y")
    one, two = both(normal, ULA(step_size=0.1, num_warmup=0), Y, num_draws=2, num_chains=4, init=init)
    assert torch.equal(one["z"], two["z"])


def test_what_cannot_be_divided_is_refused() -> None:
    with pytest.raises(InputError, match="num_chains=2 or more"):
        infer(normal, NUTS(), data=Y, num_chains=1, devices=2)
    with pytest.raises(InputError, match="num_draws=4 or more"):
        infer(GaussianMixture.example(), ReverseSDE(), num_draws=3, devices=4)
    state = infer(normal, ULA(step_size=0.1), data=Y, num_draws=2, num_chains=2).state
    with pytest.raises(UnsupportedError, match="state"):
        infer(normal, ULA(step_size=0.1), data=Y, num_draws=2, num_chains=2, state=state, devices=2)
    assert TwistedSMC.shares is None


# --- fitting -----------------------------------------------------------------------------------------------------


class Squares:
    """E|net(x) - x|^2: no noise, a mean over rows."""

    def loss(self, program: Any, batch: Batch) -> Tensor:
        x = batch.data["x"]
        loss: Tensor = (program.net(x) - x).square().sum(-1).mean()
        return loss


class Copying(nn.Module):
    """A program with a network and nothing else."""

    event_shape = (3,)

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.net = MLP((3,), (3,), widths=(8,))

    def model(self, batch: Batch) -> None:
        """Nothing is drawn."""


X = torch.randn(40, 3, generator=torch.Generator().manual_seed(0))


def fitted(
    make: Any, objective: Any, dtype: torch.dtype = torch.float32, **settings: Any
) -> tuple[Any, History]:
    torch.manual_seed(0)
    program = make().to(dtype)
    settings = {"num_steps": 4, "batch_size": 15, "progress": False} | settings
    return program, fit(program, X.to(dtype), objective, **settings)


def weights(program: nn.Module) -> Tensor:
    return torch.cat([weight.detach().flatten() for weight in program.parameters()])


def flat_gradient(training: Training) -> Tensor:
    return torch.cat([weight.grad.flatten() for weight in training.parameters if weight.grad is not None])


def gradient(count: int, accumulate: int, objective: Any, make: Any) -> Tensor:
    """The gradient of the first step on 15 rows."""

    def first(group: Group) -> tuple[dict[str, Tensor], None]:
        torch.manual_seed(0)
        program = make()
        training = Training(
            program, Rows(X), None, objective, Optim(accumulate=accumulate), 1, 15, Devices(count), group
        )
        training.differentiate(training.rows.batch(torch.arange(15)))
        return {"grad": flat_gradient(training)}, None

    found = launch(first, count=count) if count > 1 else [first(Group())]
    assert all(torch.equal(each[0]["grad"], found[0][0]["grad"]) for each in found)
    return found[0][0]["grad"]


@pytest.mark.parametrize(("count", "accumulate"), [(2, 1), (2, 2), (3, 1), (1, 4)])
def test_the_averaged_gradient_is_that_of_the_whole_batch(count: int, accumulate: int) -> None:
    """15 rows, so that parts differ in size; a plain mean of the parts' gradients is off by far more (below)."""
    whole = gradient(1, 1, Squares(), Copying)
    assert float((gradient(count, accumulate, Squares(), Copying) - whole).abs().max()) < 1e-6 * float(
        whole.norm()
    )


def test_unequal_parts_averaged_as_if_they_were_equal_would_be_noticed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    whole = gradient(1, 1, Squares(), Copying)
    differentiate = Training._differentiate
    monkeypatch.setattr(Training, "_differentiate", lambda self, part, _=1.0: differentiate(self, part, 0.5))
    assert float((gradient(1, 2, Squares(), Copying) - whole).abs().max()) > 1e-4 * float(whole.norm())


PROGRAMS = {
    "VAE": lambda: VAE.mlp((3,), 2),
    "DDPM": lambda: DDPM(TimeMLP((3,), width=8, num_blocks=1), num_steps=6),
}


@pytest.mark.parametrize("name", PROGRAMS)
def test_it_does_not_matter_which_process_makes_a_part(name: str) -> None:
    """Two processes, and one that accumulates: noise belongs to the part. Other noise moves the gradient by far."""
    make = PROGRAMS[name]
    two, one = gradient(2, 1, ELBO(), make), gradient(1, 2, ELBO(), make)
    assert float((two - one).abs().max()) <= 1e-6 * float(one.norm())
    assert float((gradient(1, 3, ELBO(), make) - one).abs().max()) > 1e-3 * float(one.norm())


@pytest.mark.slow
def test_noise_of_parts_leaves_the_mean_of_the_gradient_where_it_is() -> None:
    """Over 400 batches the mean gradients agree to 5 standard errors in every coordinate."""

    def sampled(accumulate: int) -> Tensor:
        torch.manual_seed(0)
        training = Training(PROGRAMS["DDPM"](), Rows(X), None, ELBO(), Optim(accumulate=accumulate), 1, 16)
        found = []
        for _ in range(400):
            training.optimiser.zero_grad()
            training.differentiate(training.rows.batch(torch.arange(16)))
            found.append(flat_gradient(training))
        return torch.stack(found)

    whole, parts = sampled(1), sampled(2)
    error = ((whole.var(0) + parts.var(0)) / 400).sqrt()
    assert float(((whole.mean(0) - parts.mean(0)).abs() / error.clamp_min(1e-6)).max()) < 5


def test_a_fit_on_two_devices_ends_in_the_callers_program() -> None:
    settings: dict[str, Any] = {
        "optim": Optim(ema_decay=0.5, clip_norm=1.0, schedule="cosine"),
        "validation": X[:10],
    }
    program, history = fitted(PROGRAMS["DDPM"], ELBO(), torch.float64, devices=2, **settings)
    again, _ = fitted(PROGRAMS["DDPM"], ELBO(), torch.float64, devices=2, **settings)
    assert torch.equal(weights(program), weights(again))
    settings["optim"] = Optim(ema_decay=0.5, clip_norm=1.0, schedule="cosine", accumulate=2)
    one, alone = fitted(PROGRAMS["DDPM"], ELBO(), torch.float64, **settings)
    assert float((weights(program) - weights(one)).abs().max()) < 1e-10
    assert torch.allclose(torch.tensor(history.loss), torch.tensor(alone.loss), atol=1e-10)
    assert [step for step, _ in history.validation] == [1, 2, 3, 4]
    assert not history.interrupted


def test_parameters_in_pyros_store_are_fitted_too() -> None:
    pyro.clear_param_store()

    def model(batch: Batch) -> None:
        loc = pyro.param("loc", torch.zeros(3))
        with batch.plate():
            pyro.sample("x", dist.Normal(loc, 1.0).to_event(1))

    history = fit(
        Pair(model, lambda _: None),
        X + 5,
        ELBO(),
        num_steps=60,
        optim=Optim(lr=0.3),
        devices=2,
        progress=False,
    )
    assert len(history.loss) == 60
    assert float((pyro.param("loc") - X.mean(0) - 5).detach().abs().max()) < 0.3
    pyro.clear_param_store()


def test_a_loss_that_is_not_finite_leaves_the_last_good_weights() -> None:
    class Failing(Squares):
        steps = 0

        def loss(self, program: Any, batch: Batch) -> Tensor:
            Failing.steps += 1
            value = super().loss(program, batch)
            return value * torch.nan if Failing.steps == 5 else value  # looked at twice, then at step 3

    torch.manual_seed(0)
    program = Copying()
    with pytest.raises(ProbgenError, match="loss became nan at step 3"):
        fit(
            program, X, Failing(), num_steps=4, batch_size=15, devices=2, optim=Optim(lr=1e-2), progress=False
        )
    good, _ = fitted(Copying, Squares(), num_steps=2, optim=Optim(lr=1e-2, accumulate=2))
    assert torch.allclose(weights(program), weights(good), atol=1e-6)


def test_too_few_rows_for_the_parts() -> None:
    with pytest.raises(InputError, match="15 rows a step cannot be cut into 16 parts"):
        fitted(Copying, Squares(), devices=2, optim=Optim(accumulate=8))


def test_a_run_folder_is_kept_by_the_first_process(tmp_path: Path) -> None:
    program, history = fitted(Copying, Squares(), devices=2, run=tmp_path / "run")
    record = read_run(tmp_path / "run")
    assert record.finished is not None
    assert [line["step"] for line in record.log] == [1, 2, 3, 4]
    again, told = fitted(Copying, Squares(), devices=2, run=tmp_path / "run")
    assert told.loss == history.loss
    assert torch.equal(weights(again), weights(program))
    with pytest.raises(InputError, match="devices"):
        fitted(Copying, Squares(), run=tmp_path / "run")


def test_ctrl_c_ends_a_fit_in_all_processes_and_keeps_what_was_learnt() -> None:
    threading.Timer(2.0, os.kill, (os.getpid(), signal.SIGINT)).start()
    program, history = fitted(Copying, Squares(), devices=2, num_steps=10**6)
    assert history.interrupted
    assert 0 < len(history.loss) < 10**6
    assert not torch.equal(weights(program), weights(Copying()))


def test_bfloat16_fits() -> None:
    settings: dict[str, Any] = {"num_steps": 40, "optim": Optim(lr=1e-2)}
    rough, history = fitted(PROGRAMS["DDPM"], ELBO(), devices=Devices(precision="bf16"), **settings)
    full, exact = fitted(PROGRAMS["DDPM"], ELBO(), **settings)
    assert all(weight.dtype == torch.float32 for weight in rough.parameters())
    assert 0 < float((weights(rough) - weights(full)).abs().max()) < 0.1
    assert history.loss[-1] == pytest.approx(exact.loss[-1], rel=0.05)


@pytest.mark.slow  # compilers take their time
def test_compiled_networks_have_the_same_losses() -> None:
    settings: dict[str, Any] = {"num_steps": 3}
    _, compiled = fitted(Copying, Squares(), devices=Devices(compile=True), **settings)
    _, plain = fitted(Copying, Squares(), **settings)
    assert compiled.loss == pytest.approx(plain.loss, rel=1e-5)
