"""`fit`: the only training loop. It knows the `Objective` contract and nothing of what is being fitted."""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import pyro
import torch
from pyro import poutine
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from probgen.core import Batch, Calibrated, InputError, Objective, ProbgenError, check_count, describe
from probgen.progress import ticker
from probgen.randomness import forked_rng
from probgen.targets import check_event, named

CALIBRATION_ROWS = 4096


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
    """

    lr: float = 1e-3
    schedule: Literal["constant", "cosine"] = "constant"
    warmup: int = 0
    betas: tuple[float, float] = (0.9, 0.999)
    clip_norm: float | None = None
    ema_decay: float | None = None

    def __post_init__(self) -> None:
        if not self.lr > 0:
            raise InputError(f"lr must be > 0, got {self.lr!r}.")
        if self.clip_norm is not None and not self.clip_norm > 0:
            raise InputError(f"clip_norm must be > 0 or None, got {self.clip_norm!r}.")
        check_count("warmup", self.warmup, 0)
        if len(self.betas) != 2 or not all(0 <= beta < 1 for beta in self.betas):
            raise InputError(f"betas must be two numbers in [0, 1), got {self.betas!r}.")
        if self.schedule not in ("constant", "cosine"):
            raise InputError(f"schedule must be 'constant' or 'cosine', got {self.schedule!r}.")
        if self.ema_decay is not None and not 0 <= self.ema_decay < 1:
            raise InputError(f"ema_decay must lie in [0, 1), got {self.ema_decay!r}.")

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
        self.condition = condition
        plain = isinstance(data, (Tensor, Mapping, list, tuple)) or not hasattr(data, "__getitem__")
        self._set = None if plain else data
        self._tensors = {} if self._set is not None else named(data)
        sizes = {name: len(value) for name, value in self._tensors.items()}
        if self._set is not None:
            sizes["data"] = len(self._set)
        if condition is not None:
            sizes["condition"] = len(condition)
        if len(set(sizes.values())) != 1:
            raise InputError(f"Every site needs the same number of rows, got {sizes or 'no data'}.")
        self.total = next(iter(sizes.values()))
        if self.total == 0:
            raise InputError("No data: 0 rows.")

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


def fit(
    program: Any,
    data: Any,
    objective: Objective,
    *,
    condition: Tensor | None = None,
    validation: Any = None,
    num_steps: int = 1000,
    batch_size: int = 128,
    optim: Optim = Optim(),
    seed: int = 0,
    progress: bool = True,
) -> History:
    """Minimise an objective over a program's weights by minibatches.

    Args:
        program: a program with `model(batch)`; `Pair(model, guide)` makes one of two functions. Its parameters, and
            what it puts into Pyro's store, are fitted where they are, in their dtype and on their device.
        data: `(n, *event)` for site "x", tensors by site name, or a data set with `len` and `[int64 tensor]`.
        objective: e.g. `ELBO()`.
        condition: `(n, ...)`, what the program is conditioned on.
        validation: data of the same form (with a condition: a pair `(data, condition)`), its loss followed.
        num_steps: optimiser steps, >= 1.
        batch_size: rows a step; n if larger.
        optim: learning rate, schedule, clipping, averaging.
        seed: of data order and Monte Carlo noise; the global random stream is left as it was.
        progress: show a live line on the terminal.

    Returns a `History`; Ctrl-C ends the run early and returns what there is. Raises `InputError` for bad data and
    `ProbgenError` when the loss is not finite, weights being those of the last good step.
    """
    check_count("num_steps", num_steps)
    check_count("batch_size", batch_size)
    rows = Rows(data, condition)
    with_condition = validation if isinstance(validation, tuple) else (validation,)
    held_out = None if validation is None else Rows(*with_condition)
    history = History(num_levels=getattr(data, "num_levels", None), unit=getattr(objective, "unit", ""))
    started = time.perf_counter()
    with forked_rng(seed), _training(program):
        run = _Run(program, rows, held_out, objective, optim, num_steps, min(batch_size, rows.total))
        with contextlib.suppress(KeyboardInterrupt), ticker("fit", num_steps, progress) as update:
            history.interrupted = True
            run.loop(history, update)
            history.interrupted = False
        run.finish()
    history.seconds = time.perf_counter() - started
    return history


class _Run:
    """One fit: the program with its optimiser, average and data order."""

    def __init__(
        self,
        program: Any,
        rows: Rows,
        held_out: Rows | None,
        objective: Objective,
        optim: Optim,
        num_steps: int,
        batch_size: int,
    ) -> None:
        self.program, self.rows, self.held_out, self.objective = program, rows, held_out, objective
        self.optim, self.num_steps, self.batch_size = optim, num_steps, batch_size
        own = list(program.parameters()) if isinstance(program, nn.Module) else []
        self.like = next((p for p in own if p.is_floating_point()), None)
        first = rows.batch(torch.arange(batch_size), self.like)
        check_event(program, first.data)
        self.event_size = sum(value[0].numel() for value in first.data.values())
        self.parameters = _unique(
            [p for p in own if p.requires_grad] + _stored_parameters(objective, program, first)
        )
        if not self.parameters:
            raise InputError(f"{describe(program)} has no weights to fit: no nn.Parameter and no pyro.param.")
        self.optimiser = optim.build(self.parameters)
        self.schedule = torch.optim.lr_scheduler.LambdaLR(
            self.optimiser, lambda step: optim.factor(step, num_steps)
        )
        self.average = None
        if optim.ema_decay is not None:
            if not own:
                raise InputError(
                    "ema_decay needs a program that is an nn.Module; pyro.param weights are not averaged."
                )
            self.average = AveragedModel(program, multi_avg_fn=get_ema_multi_avg_fn(optim.ema_decay))

    def loop(self, history: History, update: Any) -> None:
        history.event_size = self.event_size
        every = max(self.num_steps // 10, 1)
        for step, index in enumerate(_order(self.rows.total, self.batch_size, self.num_steps), start=1):
            value = self.step(step, self.rows.batch(index, self.like))
            history.loss.append(value)
            shown = {"loss": value}
            if history.unit == "nats" and history.num_levels is not None:
                shown["bits/dim"] = history.bits_per_dim(value)
            update(step, **shown)
            if self.held_out is not None and (step % every == 0 or step == self.num_steps):
                history.validation.append((step, self.validate()))

    def step(self, number: int, batch: Batch) -> float:
        self.optimiser.zero_grad(set_to_none=True)
        loss = self.objective.loss(self.program, batch)
        value = loss.item()
        if not math.isfinite(value):
            raise ProbgenError(
                f"The loss became {value} at step {number} of {self.num_steps}; the weights are those of step "
                f"{number - 1}. Lower the learning rate (now {self.optim.lr:g}) or set clip_norm."
            )
        loss.backward()
        if self.optim.clip_norm is not None:
            torch.nn.utils.clip_grad_norm_(self.parameters, self.optim.clip_norm)
        self.optimiser.step()
        self.schedule.step()
        if self.average is not None:
            self.average.update_parameters(self.program)
        return value

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


def _stored_parameters(objective: Objective, program: Any, batch: Batch) -> list[Tensor]:
    """What the program asks of Pyro's store when its loss is first evaluated."""
    with poutine.trace(param_only=True) as capture, torch.random.fork_rng(devices=()):
        objective.loss(program, batch)
    names = [name for name, site in capture.trace.nodes.items() if site["type"] == "param"]
    store = pyro.get_param_store()
    return [store._params[name] for name in names if name in store]


def _unique(parameters: list[Tensor]) -> list[Tensor]:
    return list({id(parameter): parameter for parameter in parameters}.values())


def _order(total: int, batch_size: int, num_steps: int) -> Iterator[Tensor]:
    """Row indices of each step: a new permutation every epoch, incomplete batches left out."""
    taken = 0
    while True:
        for index in torch.randperm(total).split(batch_size):
            if taken == num_steps:
                return
            if len(index) == batch_size:
                taken += 1
                yield index


@contextlib.contextmanager
def _training(program: Any) -> Iterator[None]:
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
