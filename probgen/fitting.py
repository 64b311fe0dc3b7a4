"""`fit`: the only training loop, and the run folder that it keeps."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict
from functools import partial
from typing import Any

from torch import Tensor, nn

from probgen.core import Count, InputError, NonNegativeInt, Objective, Program, check, check_arguments, shown
from probgen.devices import Devices, Group, launch, on
from probgen.files import PathLike
from probgen.fingerprints import fingerprint, recipe
from probgen.interrupts import stopping
from probgen.progress import ticker
from probgen.randomness import forked_rng
from probgen.runs import PROGRAM, Run
from probgen.training import Diverged, Rows, Training, training_mode
from probgen.training import History as History
from probgen.training import Optim as Optim

LOG_LINES = 1000


def fit(  # noqa: PLR0913 -- what is fitted, how long, and where it is kept: each stands alone
    program: Any,
    data: Any,
    objective: Objective,
    *,
    condition: Tensor | None = None,
    validation: Any = None,
    num_steps: Count = 1000,
    batch_size: Count = 128,
    optim: Optim = Optim(),  # noqa: B008 -- frozen
    seed: NonNegativeInt = 0,
    run: PathLike | None = None,
    devices: int | Devices = 1,
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
        seed: of data order and Monte Carlo noise; the global random streams are left as they were.
        run: a folder that keeps the fit: its log, its last checkpoints, the fitted program. The same call goes on
            from the last checkpoint, to the same last bit on the same machine; where it was finished, the weights are
            put into the program without a step.
        devices: processes that share the rows of each step, on CPU cores or GPUs; `Devices(...)` also sets precision
            and compilation. How many make a step changes its noise, and nothing else.
        progress: show a live line on the terminal.

    Returns a `History`. Ctrl-C ends the fit early and returns what there is; with a run folder, Ctrl-C and SIGTERM let
    the step at hand end and write a checkpoint first. Raises `InputError` for bad data and for a folder that holds
    another run, `FileError` where it is in use or cannot be written, and `ProbgenError` when the loss or a gradient
    is not finite, weights being those of the last good step.

    >>> import tempfile, torch
    >>> from probgen import ELBO, VAE
    >>> x = torch.randn(64, 6)
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     first = fit(VAE.mlp((6,), 2), x, ELBO(), num_steps=3, run=f"{folder}/vae", progress=False)
    ...     again = fit(VAE.mlp((6,), 2), x, ELBO(), num_steps=3, run=f"{folder}/vae", progress=False)
    >>> first.loss == again.loss
    True
    """
    check_arguments(fit, locals())
    if not isinstance(program, Program) and not callable(program):
        raise InputError(
            f"fit: program must have model(batch), got {shown(program)}; see `Pair(model, guide)`."
        )
    if isinstance(validation, tuple):
        check("fit: validation", validation, tuple[Any, Tensor])
    rows = Rows(data, condition)
    with_condition = validation if isinstance(validation, tuple) else (validation,)
    held_out = None if validation is None else Rows(*with_condition)
    devices, batch_size = Devices.of(devices), min(batch_size, rows.total)
    with forked_rng(seed), on(program, devices.kind(program)), training_mode(program):
        training = Training(program, rows, held_out, objective, optim, num_steps, batch_size, devices)
        if run is None:
            _fit(training, progress)
        else:
            with Run(run, "fit", _config(training, (data, condition), validation, seed)) as folder:
                _fit_in(folder, training, progress)
    return training.history


def _steps(training: Training, progress: bool) -> Iterator[float]:
    """The steps that are left, shown on the terminal: the loss of each."""
    history = training.history
    with ticker("fit", training.num_steps, progress) as update:
        while training.done < training.num_steps:
            loss = training.step()
            shown = {"loss": loss}
            if history.unit == "nats" and history.num_levels is not None:
                shown["bits/dim"] = history.bits_per_dim(loss)
            update(training.done, **shown)
            yield loss


def _go(training: Training, run: Run | None, asked: Callable[[], bool], progress: bool) -> None:
    """Make the steps that are left, or those until it is asked to stop; a run folder keeps what came of each."""
    for loss in _steps(training, progress):
        stop = asked()
        if run is not None:
            _keep(run, training, loss, stop)
        if stop:
            training.history.interrupted = True
            return


def _fit(training: Training, progress: bool) -> None:
    """Go through all steps, keeping nothing."""
    try:
        if training.devices.count == 1:
            _go(training, None, lambda: False, progress)
        else:
            with stopping() as stop:
                _go_elsewhere(training, None, lambda: stop.requested, progress)
    except KeyboardInterrupt:
        training.history.interrupted = True
    training.finish()


# --- in a run folder ----------------------------------------------------------------------------------------------


def _fit_in(run: Run, training: Training, progress: bool) -> None:
    """Go on from the last checkpoint, and leave one every half minute, at the end, and when asked to stop."""
    _resume(run, training, progress)
    go = _go if training.devices.count == 1 else _go_elsewhere
    try:
        with stopping() as stop:
            go(training, run, lambda: stop.requested, progress)
            stop.message = f"Stopped: {_place(run, training)}. Make the same call again to go on."
    except KeyboardInterrupt as interrupt:
        if not training.history.interrupted:  # asked twice: in the middle of a step
            raise
        sys.stderr.write(f"{interrupt}\n")
    except Diverged as error:
        raise Diverged(f"{error} {_last_good(run)}") from None
    training.finish()
    if not training.history.interrupted:
        _finish(run, training)


def _config(training: Training, data: Any, validation: Any, seed: int) -> dict[str, Any]:
    """All that decides the result."""
    objective = training.objective
    ours = type(objective).__module__.startswith("probgen.")  # and says all of its settings
    with forked_rng(0):  # data sets may draw noise when they are looked at
        return {
            "program": recipe(training.program),
            "objective": repr(objective) if ours else recipe(objective),
            "optim": asdict(training.optim),
            "num_steps": training.num_steps,
            "batch_size": training.batch_size,
            "devices": asdict(training.devices),
            "seed": seed,
            "data": f"{training.rows.total:,} rows, {fingerprint(data)}",
            "validation": None if validation is None else fingerprint(validation),
        }


def _place(run: Run, training: Training) -> str:
    return f"{str(run.path)!r} is at step {training.done:,} of {training.num_steps:,}"


def _resume(run: Run, training: Training, progress: bool) -> None:
    """Go on from the last checkpoint; where there is none, keep the weights that the fit begins with."""
    found = run.checkpoints.latest()
    if found is None:
        run.checkpoints.write(0, *training.state())
    else:
        training.restore(found.tensors, found.facts)
        if progress:
            sys.stderr.write(f"Going on: {_place(run, training)}.\n")
    run.rewind(training.done)


def _keep(run: Run, training: Training, loss: float, stop: bool) -> None:
    """Log a step, and leave a checkpoint where one is due."""
    _log(run, training, loss)
    if run.checkpoints.due or stop or training.done == training.num_steps:
        run.checkpoints.write(training.done, *training.state())


def _log(run: Run, training: Training, loss: float) -> None:
    """A line now and then, and one for every look at the validation data."""
    step, seconds, history = training.done, round(training.seconds, 3), training.history
    if step % -(-training.num_steps // LOG_LINES) == 0 or step == training.num_steps:
        run.log(step=step, loss=loss, seconds=seconds)
    if history.validation and history.validation[-1][0] == step:
        run.log(step=step, validation=history.validation[-1][1], seconds=seconds)


def _last_good(run: Run) -> str:
    steps = run.checkpoints.steps()
    return f"{str(run.path)!r} keeps the weights of step {steps[-1]:,}; for other settings choose another run folder."


def _finish(run: Run, training: Training) -> None:
    """Save the program and say that all is done; nothing new where that was said before."""
    if run.finished is not None:
        return
    if isinstance(training.program, nn.Module) and not training.stored:  # those in Pyro's store have no file
        from probgen.saving import save

        save(training.program, run.path / PROGRAM)
    run.finish(steps=training.done, seconds=round(training.seconds, 3))


# --- on several devices -------------------------------------------------------------------------------------------


def _go_elsewhere(training: Training, run: Run | None, asked: Callable[[], bool], progress: bool) -> None:
    """What `_go` does, in several processes: each is given this state, and that of the first comes back."""
    alike = partial(
        Training,
        training.program,
        training.rows,
        training.held_out,
        training.objective,
        training.optim,
        training.num_steps,
        training.batch_size,
        training.devices,
    )
    kept = None if run is None else (run.path, run.config)
    count, kind = training.devices.count, training.devices.kind(training.program)
    work = (alike, training.state(), kept, progress)
    (tensors, facts), *_ = launch(_in_process, *work, count=count, kind=kind, stop=asked)
    training.restore(tensors, facts["state"])
    training.history.interrupted = facts["interrupted"]
    if facts["diverged"]:
        raise Diverged(facts["diverged"])


def _in_process(
    group: Group,
    alike: partial[Training],
    state: tuple[Any, Any],
    kept: tuple[Any, Any] | None,
    progress: bool,
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The steps as one process makes them, the first one for all to see; the folder's lock is the caller's."""
    first, program, diverged = group.rank == 0, alike.args[0], ""
    run = Run(kept[0], "fit", kept[1]) if kept and first else None
    with forked_rng(0), on(program, group.device), training_mode(program):
        training = alike(group=group)
        training.restore(*state)
        try:
            _go(training, run, lambda: group.any(group.told_to_stop()), progress and first)
        except Diverged as error:
            diverged = str(error)
        tensors, facts = training.state()
    told = {"state": facts, "interrupted": training.history.interrupted, "diverged": diverged}
    return (tensors if first else {}), told
