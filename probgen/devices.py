"""Where the numbers are worked out: processes on CPU cores or GPUs, in which precision, compiled or not.

A call with `devices=2` starts two processes that both run the same function, each with its share of the work. They
meet in sums over all of them, by Lightning Fabric; what each returns comes back to the caller's process, which alone
changes the caller's objects. CPU processes and GPUs run the same code.
"""

from __future__ import annotations

import contextlib
import copy
import importlib.util
import logging
import multiprocessing
import os
import signal
import socket
import threading
import traceback
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from multiprocessing.connection import Connection, wait
from typing import Any, Literal, TypeVar

import pyro
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from probgen.core import Count, InputError, ProbgenError, UnsupportedError, check, check_fields, describe

Accelerator = Literal["auto", "cpu", "gpu"]
Precision = Literal["full", "bf16"]
Item = TypeVar("Item")

_LOOK_EVERY = 0.2  # seconds between looks at whether the caller wants to stop
_PATIENCE = 5.0  # seconds a process is given to end by itself


class DeviceError(ProbgenError):
    """A process on one of the devices failed, or could not be started; the others were ended."""


class _Alone(DeviceError):
    """The others are gone: one of them knows why."""


@dataclass(frozen=True)
class Devices:
    """Processes to work with, and how their numbers are worked out.

    Args:
        count: processes, one a GPU or some CPU cores each, >= 1; one is the caller's own.
        accelerator: "cpu", "gpu", or "auto": where the program's weights are.
        precision: "full" is that of the weights; "bf16" runs the networks in bfloat16 where that is safe, as torch's
            autocast does, weights and losses staying what they are.
        compile: compile the networks first (seconds to a minute).

    Raises `InputError` for a count below 1, unknown names, or more GPUs than there are.

    >>> Devices(count=2, precision="bf16")
    Devices(count=2, accelerator='auto', precision='bf16', compile=False)
    """

    count: Count = 1
    accelerator: Accelerator = "auto"
    precision: Precision = "full"
    compile: bool = False

    def __post_init__(self) -> None:
        check_fields(self)
        if self.accelerator == "gpu" and torch.cuda.device_count() < self.count:
            raise InputError(
                f"Asked for {self.count} GPUs, and torch sees {torch.cuda.device_count()}. "
                "Ask for fewer, or for accelerator='cpu'."
            )

    @staticmethod
    def of(devices: int | Devices) -> Devices:
        """`devices=2` stands for `Devices(2)`."""
        check("devices", devices, Count | Devices)
        return devices if isinstance(devices, Devices) else Devices(devices)

    def kind(self, program: Any) -> Literal["cpu", "cuda"]:
        """What the program runs on: "auto" is where its weights are."""
        on_gpu = self.accelerator == "gpu" or (self.accelerator == "auto" and _weight(program).is_cuda)
        return "cuda" if on_gpu else "cpu"


# --- what each process sees --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Group:
    """The processes of one call, as one of them sees them; `Group()` is the caller's process alone.

    Args:
        rank: which one this is, 0..count - 1.
        count: how many there are.
        device: where this one works.
        fabric: Lightning Fabric, which joins them; None where there is one.
        told_to_stop: whether the caller asked for an end.

    >>> Group(rank=1, count=2).share(range(5)), Group().share(range(5))
    (range(3, 5), range(0, 5))
    """

    rank: int = 0
    count: int = 1
    device: torch.device = torch.device("cpu")  # noqa: RUF009 -- immutable
    fabric: Any = field(default=None, repr=False)
    told_to_stop: Callable[[], bool] = field(default=lambda: False, repr=False)

    def share(self, items: Sequence[Item]) -> Sequence[Item]:
        """This process's part of what all of them do together: neighbours, the first processes one more."""
        size, more = divmod(len(items), self.count)
        first = self.rank * size + min(self.rank, more)
        return items[first : first + size + (self.rank < more)]

    def add(self, tensors: Sequence[Tensor]) -> None:
        """Put the sum over all processes into tensors that each of them has; every process gets the same bits."""
        if self.count == 1:
            return
        for kind in dict.fromkeys((value.dtype, value.device) for value in tensors):
            alike = [value for value in tensors if (value.dtype, value.device) == kind]
            total = self._summed(torch.cat([value.flatten() for value in alike]))
            for value, part in zip(alike, total.split([value.numel() for value in alike]), strict=True):
                value.copy_(part.view_as(value))

    def add_gradients(self, parameters: Sequence[Tensor]) -> None:
        """Put the sum of all processes' gradients into each; None stays where no process has one."""
        if self.count == 1:
            return
        there = torch.tensor([float(weight.grad is not None) for weight in parameters])
        self.add([there])
        moved = [weight for weight, found in zip(parameters, there.tolist(), strict=True) if found]
        for weight in moved:
            weight.grad = torch.zeros_like(weight) if weight.grad is None else weight.grad
        self.add([weight.grad for weight in moved if weight.grad is not None])

    def any(self, flag: bool) -> bool:
        """Whether it holds in one of the processes: all of them get the same answer."""
        count = torch.tensor(float(flag))
        self.add([count])
        return bool(count)

    def _summed(self, values: Tensor) -> Tensor:
        try:
            total: Tensor = self.fabric.all_reduce(values.to(self.device), reduce_op="sum")
        except RuntimeError as error:
            raise _Alone(f"Process {self.rank} of {self.count} lost the others: {error}") from error
        return total


@contextlib.contextmanager
def on(program: Any, device: torch.device | str) -> Iterator[None]:
    """The program's weights on a device inside the block, and back where they were after it."""
    before, device = _weight(program).device, torch.device(device)
    there = before.type == device.type and device.index in (None, before.index)
    if there or not isinstance(program, nn.Module):
        yield
        return
    program.to(device)
    try:
        yield
    finally:
        program.to(before)


# --- networks: precision and compilation -------------------------------------------------------------------------


class Networks:
    """The networks of a program as devices run them: in bfloat16, compiled, or as they are.

    A network is a module inside the program with a `forward` of its own. Whatever the program computes from its output
    (densities, losses) stays in the precision of the weights, and the program is itself again after each block.

    Args:
        program: whose networks.
        devices: precision and compilation.

    Raises `InputError` for bfloat16 asked of float64 weights, which autocast leaves alone.

    >>> net = nn.Sequential(nn.Linear(2, 2))
    >>> with Networks(net, Devices(precision="bf16")).running():
    ...     net(torch.full((1, 2), 1 / 3)).dtype
    torch.float32
    """

    def __init__(self, program: Any, devices: Devices) -> None:
        like = _weight(program)
        if devices.precision == "bf16" and like.dtype == torch.float64:
            raise InputError(
                f"{describe(program)} has float64 weights: precision='bf16' needs float32 ones (program.float())."
            )
        changed = devices.precision == "bf16" or devices.compile
        networks = _networks(program) if changed else ()
        self._forwards = {module: _forward(module, devices) for module in networks}
        self._compiled = devices.compile

    @contextlib.contextmanager
    def running(self) -> Iterator[None]:
        """The networks so inside the block."""
        before: dict[nn.Module, Any] = {module: module.__dict__.get("forward") for module in self._forwards}
        try:
            for module, forward in self._forwards.items():
                module.__dict__["forward"] = forward
            with _settings_kept() if self._compiled else contextlib.nullcontext():
                yield
        finally:
            for module, forward in before.items():
                module.__dict__.pop("forward")
                module.__dict__ |= {} if forward is None else {"forward": forward}


@contextlib.contextmanager
def _settings_kept() -> Iterator[None]:
    """What compilers and Fabric change when they are imported and used is as before after the block.

    That is variables of the environment, the validation of distributions, filters on warnings, torch.compile.
    """
    names, compiler = set(os.environ), torch.compile
    try:
        with pyro.settings.context(**pyro.settings.get()), warnings.catch_warnings():
            yield
    finally:
        torch.compile = compiler
        for name in os.environ.keys() - names:
            del os.environ[name]


def _networks(program: Any) -> Iterator[nn.Module]:
    """The outermost modules inside a program that can be called."""
    for module in program.children() if isinstance(program, nn.Module) else ():
        if _callable(module):
            yield module
        else:
            yield from _networks(module)


def _callable(module: nn.Module) -> bool:
    return getattr(type(module), "forward", None) is not nn.Module.forward


def _forward(module: nn.Module, devices: Devices) -> Callable[..., Any]:
    forward: Callable[..., Any] = module.forward
    if devices.precision == "bf16":
        forward = _in_bf16(forward, _weight(module))
    if not devices.compile:
        return forward
    with _settings_kept():
        warnings.simplefilter("ignore", DeprecationWarning)  # of torch against itself
        return torch.compile(forward, dynamic=False)


def _in_bf16(forward: Callable[..., Any], like: Tensor) -> Callable[..., Any]:
    def back(value: Any) -> Any:
        return value.to(like.dtype) if isinstance(value, Tensor) and value.dtype == torch.bfloat16 else value

    def called(*args: Any, **named: Any) -> Any:
        with torch.autocast(like.device.type, torch.bfloat16):
            return tree_map(back, forward(*args, **named))

    return called


def _weight(program: Any) -> Tensor:
    """A floating point weight of a program; a default one where it has none."""
    weights = program.parameters() if isinstance(program, nn.Module) else ()
    return next((weight for weight in weights if weight.is_floating_point()), torch.zeros(()))


# --- starting processes ------------------------------------------------------------------------------------------


def launch(
    function: Callable[..., tuple[Mapping[str, Tensor], Any]],
    *args: Any,
    count: int,
    kind: Literal["cpu", "cuda"] = "cpu",
    stop: Callable[[], bool] = lambda: False,
) -> list[tuple[dict[str, Tensor], Any]]:
    """What `function(group, *args)` returns in each of `count` new processes, in order of their ranks.

    Processes are forked: they begin with a copy of everything the caller has, closures and notebook cells included,
    and run no line of the caller's script again. Where there are GPUs, whose state does not survive a fork, they are
    spawned: function and arguments are sent to them, so must be defined at the top level of a module or of a guarded
    script. Each gets its part of the caller's threads. What comes back is tensors by name, and plain values.

    Args:
        function: called in each process with its `Group` first; returns tensors by name, and anything plain.
        args: what else it is called with: each process has a copy of its own.
        count: processes, >= 2.
        kind: "cpu", or "cuda" for a GPU each.
        stop: asked while waiting; once it says so, `group.told_to_stop()` is true in every process.

    Raises what a process raised if that is a `ProbgenError`, `DeviceError` for any other end, `UnsupportedError`
    without Lightning Fabric. The other processes are ended first, as they are by Ctrl-C.

    >>> def add(group, x):
    ...     return {"sum": x + group.rank}, f"process {group.rank}"
    >>> launch(add, torch.tensor(10), count=2)
    [({'sum': tensor(10)}, 'process 0'), ({'sum': tensor(11)}, 'process 1')]
    """
    _import_fabric()
    method = _start_method()
    context = multiprocessing.get_context(method)
    stopped = context.Event()
    threads, port = max(1, torch.get_num_threads() // count), _free_port()
    pipes, workers = [], []
    try:
        for rank in range(count):
            ours, theirs = context.Pipe(duplex=False)
            place = _Place(rank, count, kind, threads, port, os.getpid(), method == "spawn")
            work = (place, function, args, theirs, stopped)
            worker = context.Process(target=_work, args=work)  # type: ignore[attr-defined]
            _start(worker)
            theirs.close()
            pipes.append(ours)
            workers.append(worker)
        return _results(pipes, workers, stopped, stop)
    finally:
        _end(workers)


def _start_method() -> str:
    """Forking where it is safe: neither CUDA nor the autograd threads that come with it survive it."""
    can_fork = "fork" in multiprocessing.get_all_start_methods() and not torch.cuda.is_available()
    return "fork" if can_fork else "spawn"


def _start(worker: Any) -> None:
    try:
        with warnings.catch_warnings():  # of forking while there are threads: `_work` says why it may
            warnings.simplefilter("ignore", DeprecationWarning)
            worker.start()
    except OSError as error:
        raise DeviceError(f"A process could not be started: {error}. Take fewer devices.") from error
    except Exception as error:
        raise InputError(
            f"New processes begin empty here, and this cannot be sent to them: {error}. Define programs and data sets "
            "at the top level of a module."
        ) from error


@dataclass(frozen=True)
class _Place:
    """Where a process stands among the others."""

    rank: int
    count: int
    kind: str
    threads: int
    port: int
    parent: int
    spawned: bool


@dataclass(frozen=True)
class _Answer:
    """What a process says at its end: tensors, as safetensors has them, and values; or an error; and warnings."""

    tensors: bytes = b""
    value: Any = None
    error: type[ProbgenError] | None = None
    message: str = ""
    trace: str = ""
    warned: tuple[tuple[type[Warning], str], ...] = ()

    def result(self) -> tuple[dict[str, Tensor], Any]:
        """What the function returned, or what it raised."""
        if self.error is not None:
            error = self.error.__new__(self.error, self.message)
            error.add_note(self.trace)
            raise error
        from safetensors.torch import load

        return load(self.tensors), self.value


def _results(
    pipes: Sequence[Connection], workers: Sequence[Any], stopped: Any, stop: Callable[[], bool]
) -> list[tuple[dict[str, Tensor], Any]]:
    """Wait for all processes; raise for the first that fails, not for those that only notice."""
    found: dict[int, _Answer] = {}
    while len(found) < len(workers):
        left = [rank for rank in range(len(workers)) if rank not in found]
        wait([pipes[rank] for rank in left] + [workers[rank].sentinel for rank in left], _LOOK_EVERY)
        for rank in left:
            ended = workers[rank].exitcode is not None  # asked first: what it had to say is there by then
            if pipes[rank].poll():
                found[rank] = _received(pipes[rank], workers[rank], rank)
                if found[rank].error is not _Alone:
                    found[rank].result()
            elif ended:
                raise _lost(workers[rank], rank)
        if stop():
            stopped.set()
    results = [found[rank].result() for rank in range(len(workers))]
    for worker in workers:
        worker.join(_PATIENCE)
    for kind, message in dict.fromkeys(warned for one in found.values() for warned in one.warned):
        warnings.warn(message, kind, stacklevel=4)
    return results


def _received(pipe: Connection, worker: Any, rank: int) -> _Answer:
    try:
        answer: _Answer = pipe.recv()
    except EOFError as error:
        worker.join(_PATIENCE)
        raise _lost(worker, rank) from error
    return answer


def _lost(worker: Any, rank: int) -> DeviceError:
    code = worker.exitcode
    how = f"signal {signal.Signals(-code).name}" if code is not None and code < 0 else f"exit code {code}"
    memory = " The machine may have run out of memory: take fewer devices or smaller batches."
    return DeviceError(
        f"Process {rank} ended by {how} before it was done; the others were ended.{memory * (code == -9)}"
    )


def _end(workers: Sequence[Any]) -> None:
    """See to it that no process outlives the call."""
    for worker in workers:
        worker.terminate()
    for worker in workers:
        worker.join(_PATIENCE)
        worker.kill()
        worker.join()


# --- inside of a process -----------------------------------------------------------------------------------------


def _work(
    place: _Place, function: Callable[..., Any], args: tuple[Any, ...], pipe: Connection, stopped: Any
) -> None:
    """The life of a process: one call, in a thread of its own.

    The main thread of a forked process still believes in OpenMP's threads of its parent, and would wait for them for
    ever at its first parallel loop; a new thread makes new ones. The main thread sees to it that a process whose parent
    is gone ends. Ctrl-C at a terminal reaches all processes, and is the parent's to answer.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)

    def body() -> None:
        answer = _answer(place, function, args, stopped)
        try:
            pipe.send(answer)
        except Exception as error:  # noqa: BLE001 - a value that cannot be sent
            pipe.send(_failed(error, place))

    thread = threading.Thread(target=body, daemon=True)
    thread.start()
    while thread.is_alive():
        thread.join(_LOOK_EVERY)
        if os.getppid() != place.parent:
            os._exit(1)


def _answer(place: _Place, function: Callable[..., Any], args: tuple[Any, ...], stopped: Any) -> _Answer:
    from safetensors.torch import save

    if place.spawned:
        args = copy.deepcopy(args)  # tensors that were sent are still the parent's
    try:
        with warnings.catch_warnings(record=True) as caught:
            tensors, value = function(_joined(place, stopped), *args)
            torch.distributed.destroy_process_group()
        named = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in tensors.items()}
        return _Answer(save(named), value, warned=tuple((one.category, str(one.message)) for one in caught))
    except Exception as error:  # noqa: BLE001 - it is raised in the caller's process
        return _failed(error, place)


def _failed(error: Exception, place: _Place) -> _Answer:
    """An error as the caller is to see it: ours as they are, others with the place they come from."""
    trace = "".join(traceback.format_exception(error))
    if isinstance(error, ProbgenError):
        return _Answer(error=type(error), message=str(error), trace=trace)
    last = traceback.extract_tb(error.__traceback__)[-1]
    where = f"{os.path.basename(last.filename)}:{last.lineno}"
    message = (
        f"Process {place.rank} of {place.count} failed at {where}: {type(error).__name__}: {error}. The same call with "
        "devices=1 shows whether it is the program's own."
    )
    return _Answer(error=DeviceError, message=message, trace=trace)


def _joined(place: _Place, stopped: Any) -> Group:
    """Join the other processes; from here on sums over all of them work."""
    os.environ |= {
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(place.port),
        "LOCAL_RANK": str(place.rank),
        "NODE_RANK": "0",
    }
    Fabric, environment = _import_fabric()
    logging.getLogger("lightning_fabric").setLevel(logging.WARNING)
    fabric = Fabric(accelerator=place.kind, devices=place.count, strategy="ddp", plugins=[environment()])
    fabric.launch()
    torch.set_num_threads(place.threads)  # Fabric would take all cores of the machine
    return Group(place.rank, place.count, fabric.device, fabric, stopped.is_set)


def _import_fabric() -> Any:
    """Fabric, and the environment of processes that are already there."""
    if importlib.util.find_spec("lightning_fabric") is None:
        raise UnsupportedError(
            "More than one device needs Lightning Fabric, which is not installed: pip install 'probgen[devices]' "
            "(or pip install lightning-fabric)."
        )
    with _settings_kept():
        from lightning_fabric import Fabric
        from lightning_fabric.plugins.environments.lightning import LightningEnvironment
    return Fabric, LightningEnvironment


def _free_port() -> int:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        port: int = one.getsockname()[1]
        return port
