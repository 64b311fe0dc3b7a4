"""The state of a fit, step by step: weights, optimiser, average, order of the data. It knows of no files.

`probgen.fitting.fit` goes through the steps; `Training.state` and `Training.restore` leave a fit and take it up again.
"""

from __future__ import annotations

import contextlib
import math
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

import pyro
import torch
from pyro import poutine
from pyro.poutine.messenger import Messenger
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from probgen.core import (
    Batch,
    Calibrated,
    Count,
    InputError,
    NonNegativeInt,
    Objective,
    Positive,
    ProbgenError,
    Within,
    check_fields,
    describe,
)
from probgen.devices import Devices, Group, Networks
from probgen.randomness import forked_rng, set_streams, streams, time_key
from probgen.targets import check_event, named

CALIBRATION_ROWS = 4096


Decay = Annotated[float, Within(0, 1, "[)")]


@dataclass(frozen=True)
class Optim:
    """How weights move: fused Adam (Kingma & Ba 2014, arXiv 1412.6980) with a schedule, clipping and averaging.

    Args:
        lr: learning rate, > 0.
        schedule: "constant", or "cosine" from lr down to 0 over the run.
        warmup: steps over which lr first rises from 0, >= 0.
        betas: decays of Adam's averages of the gradient and of its square, each in [0, 1).
        clip_norm: largest norm of the gradient, or None; in the unit of the objective, which is nats a row for bounds:
            hundreds for images.
        ema_decay: decay of the exponential moving average of the weights in [0, 1), or None; the average is what
            is left in the program.
        accumulate: parts that the rows of a step are cut into, one after another, to bound memory, >= 1.
    """

    lr: Positive = 1e-3
    schedule: Literal["constant", "cosine"] = "constant"
    warmup: NonNegativeInt = 0
    betas: tuple[Decay, Decay] = (0.9, 0.999)
    clip_norm: Positive | None = None
    ema_decay: Decay | None = None
    accumulate: Count = 1

    def __post_init__(self) -> None:
        check_fields(self)

    def build(self, parameters: list[Tensor]) -> torch.optim.Optimizer:
        """One fused optimiser for all parameters."""
        return torch.optim.Adam(parameters, lr=self.lr, betas=self.betas, fused=True)

    def factor(self, step: int, num_steps: int) -> float:
        """Multiple of `lr` after `step` of `num_steps` steps."""
        rise = min(1.0, (step + 1) / self.warmup) if self.warmup else 1.0
        return rise * (0.5 * (1 + math.cos(math.pi * step / num_steps)) if self.schedule == "cosine" else 1.0)


@dataclass
class History:
    """What happened during a fit.

    Args:
        loss: at every step, in the unit of the objective.
        validation: (step, loss on the validation data with the averaged weights).
        seconds: wall time.
        interrupted: Ctrl-C ended the run early; what was learnt so far is in the program.
        num_levels: K integer levels behind the data, or None; event_size: coordinates of one datum.
        unit: "nats" (a row) for bounds on log p(x), "" for objectives without one.
    """

    loss: list[float] = field(default_factory=list)
    validation: list[tuple[int, float]] = field(default_factory=list)
    seconds: float = 0.0
    interrupted: bool = False
    num_levels: int | None = None
    event_size: int = 1
    unit: str = ""

    def bits_per_dim(self, loss: float) -> float:
        """A loss in nats per row as bits/dim of the integer levels behind the data."""
        if self.num_levels is None or self.unit != "nats":
            raise InputError(
                "bits/dim need integer levels behind the data and a bound on log p(x): fit a probgen.data.Quantised "
                "data set by ELBO() or IWAE()."
            )
        return (loss / self.event_size - math.log(2 / self.num_levels)) / math.log(2)

    def __str__(self) -> str:
        tail = self.loss[-max(len(self.loss) // 20, 1) :]
        loss = sum(tail) / len(tail) if tail else math.nan
        unit = f" {self.unit}" if self.unit else ""
        bits = f", {self.bits_per_dim(loss):.3f} bits/dim" if unit and self.num_levels is not None else ""
        held_out = f"; held out {self.validation[-1][1]:.4g}" if self.validation else ""
        end = "interrupted after" if self.interrupted else "in"
        return f"{len(self.loss)} steps {end} {self.seconds:.1f} s: loss {loss:.4g}{unit}{bits}{held_out}"


class Rows:
    """Data as rows: a tensor (site "x"), tensors by site name, or a data set indexed by an int64 tensor."""

    def __init__(self, data: Any, condition: Tensor | None = None) -> None:
        self.condition, self.num_levels = condition, getattr(data, "num_levels", None)
        plain = isinstance(data, (Tensor, Mapping, list, tuple, str, bytes)) or not hasattr(
            data, "__getitem__"
        )
        self._set = None if plain else data
        self._tensors = {} if self._set is not None else named(data)
        tensors = self._tensors if condition is None else self._tensors | {"condition": condition}
        for name, value in tensors.items():
            if value.ndim == 0:
                raise InputError(f"Site {name!r} must have rows, `(n, ...)`, got one number of shape ().")
        sizes = {name: len(value) for name, value in tensors.items()}
        if self._set is not None:
            sizes["data"] = len(self._set)
        if len(set(sizes.values())) != 1:
            raise InputError(f"Every site needs the same number of rows, got {sizes or 'no data'}.")
        self.total = next(iter(sizes.values()))
        if self.total == 0:
            raise InputError(f"No data: 0 rows, got {sizes}.")

    def batch(self, index: Tensor, like: Tensor | None = None) -> Batch:
        """The rows at `index`, on the device and in the floating point type of `like`."""
        if self._set is not None:
            picked = named(self._set[index])
        else:
            picked = {name: value[index] for name, value in self._tensors.items()}
        condition = None if self.condition is None else _like(self.condition[index], like)
        return Batch(
            {name: _like(value, like) for name, value in picked.items()}, condition, index, self.total
        )


def _like(value: Tensor, like: Tensor | None) -> Tensor:
    if like is None:
        return value
    return value.to(like.device, like.dtype if value.is_floating_point() else value.dtype)


class Order:
    """Rows of each step: a new permutation of all of them every epoch, incomplete batches left out."""

    def __init__(self, total: int, batch_size: int) -> None:
        self.total, self.batch_size = total, batch_size
        self.rows, self.taken = torch.arange(total), total  # the first epoch begins at the first step

    def next(self) -> Tensor:
        """Indices of the next step's rows, `(batch_size,)`."""
        if self.taken + self.batch_size > self.total:
            self.rows, self.taken = torch.randperm(self.total), 0
        self.taken += self.batch_size
        return self.rows[self.taken - self.batch_size : self.taken]


class Diverged(ProbgenError):
    """The loss or a gradient is not finite."""


class Training:
    """A program being fitted, at some step.

    Args:
        program, objective, optim: as for `probgen.fit`.
        rows, held_out: the data, and those that are followed on the side.
        num_steps: how many steps are to be made in all.
        batch_size: rows a step, at most as many as there are.
        devices: in what precision the networks run, and whether they are compiled.
        group: the processes that share the rows of each step, all of them at the same one.

    Its random numbers come from the global streams: run it inside `forked_rng`.
    """

    def __init__(
        self,
        program: Any,
        rows: Rows,
        held_out: Rows | None,
        objective: Objective,
        optim: Optim,
        num_steps: int,
        batch_size: int,
        devices: Devices = Devices(),  # noqa: B008 -- frozen
        group: Group = Group(),  # noqa: B008 -- frozen
    ) -> None:
        self.program, self.rows, self.held_out, self.objective = program, rows, held_out, objective
        self.optim, self.num_steps, self.batch_size = optim, num_steps, batch_size
        self.devices, self.group, self.networks = devices, group, Networks(program, devices)
        self.history = History(num_levels=rows.num_levels, unit=getattr(objective, "unit", ""))
        self._started = time.perf_counter()
        self.num_parts = devices.count * optim.accumulate
        if batch_size < self.num_parts:
            raise InputError(
                f"{batch_size} rows a step cannot be cut into {self.num_parts} parts (devices x accumulate): each "
                "needs a row. Take a larger batch_size."
            )
        own = list(program.parameters()) if isinstance(program, nn.Module) else []
        self.like = next((p for p in own if p.is_floating_point()), None)
        self._check_weights()
        first = rows.batch(torch.arange(batch_size), self.like)
        check_event(program, first.data)
        self.history.event_size = sum(value[0].numel() for value in first.data.values())
        self.stored = _stored_parameters(objective, program, first)
        self.parameters = _unique([p for p in own if p.requires_grad] + list(self.stored.values()))
        if not self.parameters:
            raise InputError(f"{describe(program)} has no weights to fit: no nn.Parameter and no pyro.param.")
        self.optimiser = optim.build(self.parameters)
        self.rates = [group["lr"] for group in self.optimiser.param_groups]
        self.average = None
        if optim.ema_decay is not None:
            if not own:
                raise InputError(
                    "ema_decay needs a program that is an nn.Module; pyro.param weights are not averaged."
                )
            self.average = AveragedModel(program, multi_avg_fn=get_ema_multi_avg_fn(optim.ema_decay))
        self.order = Order(rows.total, batch_size)

    @property
    def done(self) -> int:
        """Steps made so far."""
        return len(self.history.loss)

    @property
    def seconds(self) -> float:
        """Wall time so far."""
        return time.perf_counter() - self._started

    # --- a step -------------------------------------------------------------------------------------------------

    def step(self) -> float:
        """Move the weights once; returns the loss before the move.

        Raises `Diverged` where the loss or a gradient is not finite, before anything moved.
        """
        batch = self.rows.batch(self.order.next(), self.like)
        stream = torch.get_rng_state()
        self.optimiser.zero_grad(set_to_none=True)
        loss = self.differentiate(batch)
        norm = self._clip()
        if not (math.isfinite(loss) and math.isfinite(norm)):
            torch.set_rng_state(stream)  # the same noise again
            raise Diverged(self._diagnosis(loss, batch))
        self._move()
        self.history.loss.append(loss)
        if self.held_out is not None and self._validates():
            self.history.validation.append((self.done, self.validate()))
        return loss

    def differentiate(self, batch: Batch) -> float:
        """Leave the gradient of the loss on these rows in the parameters, if it is finite; returns the loss.

        Each part of the rows has noise of its own, the same whichever process makes it.
        """
        if self.num_parts == 1:
            return self._differentiate(batch)
        seed, loss = int(torch.randint(2**62, ())), torch.zeros((), dtype=torch.float64)
        for i in self.group.share(range(self.num_parts)):
            with forked_rng(time_key(float(seed), float(i)) % 2**63):
                part = _part(batch, i, self.num_parts)
                loss += self._differentiate(part, part.size / batch.size)
        self.group.add([loss])
        self.group.add_gradients(self.parameters)
        return loss.item()

    def _differentiate(self, batch: Batch, weight: float = 1.0) -> float:
        with self.networks.running():
            loss = weight * self.objective.loss(self.program, batch)
            value = loss.item()
            if math.isfinite(value):
                loss.backward()
        return value

    def _clip(self) -> float:
        """Norm of the whole gradient, before it is clipped."""
        gradients = [p.grad for p in self.parameters if p.grad is not None]
        norm = torch.nn.utils.get_total_norm(gradients)
        if self.optim.clip_norm is not None:
            torch.nn.utils.clip_grads_with_norm_(self.parameters, self.optim.clip_norm, norm)
        return norm.item()

    def _move(self) -> None:
        factor = self.optim.factor(self.done, self.num_steps)
        for group, rate in zip(self.optimiser.param_groups, self.rates, strict=True):
            group["lr"] = rate * factor
        self.optimiser.step()
        if self.average is not None:
            self.average.update_parameters(self.program)

    def _validates(self) -> bool:
        return self.done % max(self.num_steps // 10, 1) == 0 or self.done == self.num_steps

    def validate(self) -> float:
        """Loss on the held-out rows with the averaged weights, always with the same noise."""
        assert self.held_out is not None
        program = self.program if self.average is None else self.average.module
        total = 0.0
        with forked_rng(0), torch.no_grad(), _evaluating(program):
            for index in torch.arange(self.held_out.total).split(self.batch_size):
                batch = self.held_out.batch(index, self.like)
                total += self.objective.loss(program, batch).item() * len(index)
        return total / self.held_out.total

    def finish(self) -> None:
        """Leave the averaged weights in the program, and its constants set from data."""
        self.history.seconds = self.seconds
        if self.average is not None:
            with torch.no_grad():
                for weight, mean in zip(
                    self.program.parameters(), self.average.module.parameters(), strict=True
                ):
                    weight.copy_(mean)
        if isinstance(self.program, Calibrated):
            index = torch.randperm(self.rows.total)[:CALIBRATION_ROWS]
            with torch.no_grad(), _evaluating(self.program):
                self.program.calibrate(self.rows.batch(index, self.like).data["x"])

    # --- leaving, and taking up again ---------------------------------------------------------------------------

    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """All that decides what comes next, and what came so far: tensors by name, and what JSON can hold.

        Objectives that are nn.Modules are part of it; what other objects keep to themselves is not.
        """
        tensors = self._tensors()
        for index, values in self.optimiser.state_dict()["state"].items():
            tensors |= {f"optimiser.{index}.{name}": v for name, v in values.items() if isinstance(v, Tensor)}
        tensors |= {f"streams.{name}": stream for name, stream in streams().items()}
        tensors |= {"order": self.order.rows, "loss": torch.tensor(self.history.loss, dtype=torch.float64)}
        facts = {"taken": self.order.taken, "validation": self.history.validation, "seconds": self.seconds}
        return tensors, facts

    def restore(self, tensors: Mapping[str, Tensor], facts: Mapping[str, Any]) -> None:
        """Go on from what `state` gave; `InputError` where it is of another program."""
        own = self._tensors()
        amiss = [name for name in own if name not in tensors or tensors[name].shape != own[name].shape]
        if amiss:
            raise InputError(f"The checkpoint is of another program: it has no {amiss[0]!r} of this shape.")
        with torch.no_grad():
            for name, tensor in own.items():
                tensor.copy_(tensors[name])
        moments: dict[int, dict[str, Tensor]] = {}
        for name, value in _below("optimiser.", tensors).items():
            index, _, entry = name.partition(".")
            moments.setdefault(int(index), {})[entry] = value
        groups = self.optimiser.state_dict()["param_groups"]
        self.optimiser.load_state_dict({"state": moments, "param_groups": groups})
        self.order.rows, self.order.taken = tensors["order"], facts["taken"]
        self.history.loss = tensors["loss"].tolist()
        self.history.validation = [(step, loss) for step, loss in facts["validation"]]
        self._started = time.perf_counter() - facts["seconds"]
        set_streams(_below("streams.", tensors))

    def _tensors(self) -> dict[str, Tensor]:
        """Every tensor that the steps write into, by name."""
        parts = {"program": self.program, "average": self.average, "objective": self.objective}
        found = {
            f"{part}.{name}": tensor
            for part, module in parts.items()
            if isinstance(module, nn.Module)
            for name, tensor in (*module.named_parameters(), *module.named_buffers())
        }
        return found | {f"store.{name}": tensor for name, tensor in self.stored.items()}

    # --- what went wrong ----------------------------------------------------------------------------------------

    def _check_weights(self) -> None:
        own = self.program.named_parameters() if isinstance(self.program, nn.Module) else ()
        for name, weight in own:
            if not _finite(weight):
                raise InputError(
                    f"Weight {name!r} of {describe(self.program)} holds NaN or Inf before the first step. Make the "
                    "program anew, or load weights that are whole."
                )

    def _diagnosis(self, loss: float, batch: Batch) -> str:
        what = f"The loss became {loss}" if not math.isfinite(loss) else "A gradient became NaN or Inf"
        return (
            f"{what} at step {self.done + 1:,} of {self.num_steps:,}{self._place(loss, batch)}; the weights are those "
            f"of step {self.done:,}. Lower the learning rate (now {self.optim.lr:g}) or set clip_norm."
        )

    def _place(self, loss: float, batch: Batch) -> str:
        """Where it shows first: a site of the program where the loss is amiss, a weight where the gradient is."""
        if not math.isfinite(loss):
            found = _first_site(lambda: self.objective.loss(self.program, batch))
            return f", first at {found}" if found else ""
        names = {id(tensor): name for name, tensor in self._tensors().items()}
        for weight in self.parameters:
            if weight.grad is not None and not _finite(weight.grad):
                return f", first at weight {names[id(weight)].partition('.')[2]!r}"
        return ""


def _part(batch: Batch, part: int, num_parts: int) -> Batch:
    """One of several parts of the rows, of nearly equal size."""
    rows = slice(part * batch.size // num_parts, (part + 1) * batch.size // num_parts)
    data = {name: value[rows] for name, value in batch.data.items()}
    condition = None if batch.condition is None else batch.condition[rows]
    index = None if batch.index is None else batch.index[rows]
    return Batch(data, condition, index, batch.total)


def _first_site(loss: Callable[[], Tensor]) -> str:
    """The first site, in words, that is not finite while a loss is evaluated again; "" where none is."""
    watch = _FirstNonFinite()
    with watch, torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Pyro's, of the same
        with contextlib.suppress(ProbgenError, RuntimeError, ValueError):
            loss()
    return watch.found


class _FirstNonFinite(Messenger):
    """Notes the first site of a program whose value or log density is not finite."""

    found = ""

    def _pyro_post_sample(self, msg: Any) -> None:
        if self.found or poutine.util.site_is_subsample(msg):
            return
        if not _finite(msg["value"]):
            self.found = f"site {msg['name']!r}, whose value is not finite"
        elif not _finite(msg["fn"].log_prob(msg["value"])):
            self.found = f"site {msg['name']!r}, whose log density is not finite"


def _finite(value: Any) -> bool:
    return bool(torch.isfinite(torch.as_tensor(value)).all())


def _below(prefix: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}


def _stored_parameters(objective: Objective, program: Any, batch: Batch) -> dict[str, Tensor]:
    """What the program asks of Pyro's store when its loss is first evaluated, unconstrained."""
    with poutine.trace(param_only=True) as capture, torch.random.fork_rng(devices=()):
        objective.loss(program, batch)
    names = [name for name, site in capture.trace.nodes.items() if site["type"] == "param"]
    store = pyro.get_param_store()
    return {name: store._params[name] for name in names if name in store}


def _unique(parameters: list[Tensor]) -> list[Tensor]:
    return list({id(parameter): parameter for parameter in parameters}.values())


@contextlib.contextmanager
def training_mode(program: Any) -> Iterator[None]:
    """Layers in training mode inside the block, as found afterwards."""
    with _mode(program, True):
        yield


@contextlib.contextmanager
def _evaluating(program: Any) -> Iterator[None]:
    with _mode(program, False):
        yield


@contextlib.contextmanager
def _mode(program: Any, training: bool) -> Iterator[None]:
    """Layers in training or evaluation mode inside the block, as found afterwards."""
    modules = list(program.modules()) if isinstance(program, nn.Module) else []
    found = [module.training for module in modules]
    try:
        for module in modules:
            module.training = training
        yield
    finally:
        for module, mode in zip(modules, found, strict=True):
            module.training = mode
