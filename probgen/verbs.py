"""The verbs that join programs with methods: `infer` draws, `evidence` estimates."""

from __future__ import annotations

from dataclasses import asdict, replace
from functools import partial
from typing import Annotated, Any, cast

import torch

from probgen.core import (
    Draws,
    Engine,
    Estimate,
    Estimator,
    InputError,
    Method,
    NonNegativeInt,
    Posterior,
    Size,
    UnsupportedError,
    Within,
    check_arguments,
    describe,
)
from probgen.devices import Devices
from probgen.files import PathLike
from probgen.fingerprints import fingerprint, recipe
from probgen.kernels.state import ChainState
from probgen.randomness import forked_rng
from probgen.runs import POSTERIOR, Run
from probgen.sharing import draw_on
from probgen.targets import frozen, read, restored_store


def infer(  # noqa: PLR0913 -- what is drawn, from where, and where it is kept: each stands alone
    program: Any,
    engine: Engine,
    *,
    data: Any = None,
    args: tuple[Any, ...] = (),
    num_draws: Draws = 1000,
    num_chains: Size | None = None,
    seed: NonNegativeInt = 0,
    init: Posterior | None = None,
    state: ChainState | None = None,
    run: PathLike | None = None,
    devices: int | Devices = 1,
    progress: bool = False,
) -> Posterior:
    """Draw from a program given what was observed; engines are interchangeable.

    Args:
        program: one of probgen's programs, or any Pyro function.
        engine: how to draw, e.g. `NUTS()`.
        data: observed values by site name; nothing observed means simulate. A tensor alone is site "x".
        args: arguments of the program; `(condition,)` for probgen's own.
        num_draws: draws in each replicate, >= 1.
        num_chains: independent replicates, >= 1; None is the engine's default.
        seed: the same call with the same seed is bit-identical; the global random stream is left as it was.
        init: a posterior of any engine to start from; state: this engine's own continuation.
        run: a folder that keeps the posterior: the same call then reads it, without a gradient. Markov chains leave
            their state and new draws there every half minute, and at once on Ctrl-C and SIGTERM; stopped, killed or
            unplugged, the same call goes on from there, to the same last bit on the same machine with as many
            threads. Other engines begin anew, and so do chains on several devices.
        devices: processes, on CPU cores or GPUs, that divide the draws, or the chains where draws depend on each other;
            independent draws stay what they are. `Devices(...)` also sets the precision of networks.
        progress: show a live line on the terminal.

    Returns a `Posterior` with draws `(chain, draw, *batch, *event)`. Ctrl-C is a KeyboardInterrupt as everywhere; with
    a run folder it waits until all is saved, and says so. Raises `InputError` for bad input and for a folder that holds
    another run, `FileError` where it is in use or cannot be written, and `UnsupportedError` where the engine cannot
    serve, naming those that can.

    >>> import pyro, pyro.distributions as dist
    >>> from probgen.inference import NUTS
    >>> def model():
    ...     z = pyro.sample("z", dist.Normal(0.0, 1.0))
    ...     pyro.sample("y", dist.Normal(z, 1.0))
    >>> posterior = infer(model, NUTS(num_warmup=50), data={"y": torch.tensor(2.0)}, num_draws=50, num_chains=2)
    >>> posterior["z"].shape
    torch.Size([2, 50])
    """
    _check_method(engine, Engine, "inference")
    check_arguments(infer, locals())
    if num_chains is None:
        num_chains = getattr(state, "num_chains", engine.default_chains)
    devices = Devices.of(devices)
    _check_support(program, engine, "inference")
    target = read(program, data, args, missing=engine.completes)
    if target.data and not engine.conditions:
        able = _alternatives(program, "inference", lambda other: getattr(other, "conditions", False))
        raise UnsupportedError(
            f"{describe(engine)} draws without conditioning, but {', '.join(map(repr, target.data))} was observed. "
            f"Engines that condition {describe(program)}: {able}."
        )
    if target.sets and not engine.data_sets:
        able = _alternatives(program, "inference", lambda other: getattr(other, "data_sets", False))
        raise UnsupportedError(
            f"{describe(engine)} takes one data set at a time; side by side they are served by: {able}."
        )
    settings: dict[str, Any] = {"num_draws": num_draws, "num_chains": num_chains, "seed": seed}
    from_where: dict[str, Any] = {"init": init, "state": state}
    draw = partial(engine.run, target)
    if devices != Devices():
        draw = partial(draw_on, devices, engine, target, data, args)
    with forked_rng(seed), frozen(program), restored_store():
        if run is None:
            return draw(**settings, **from_where, progress=progress)
        config = settings | {
            "program": recipe(program),
            "weights": fingerprint(program),
            "engine": str(engine),
            "settings": fingerprint(engine),
            "data": fingerprint(data),
            "args": fingerprint(args),
            "init": None if init is None else fingerprint(init.draws),
            "state": None if state is None else fingerprint(state),
            "devices": asdict(devices),
        }
        with Run(run, "infer", config) as folder:
            if folder.finished is not None:
                return replace(_loaded(folder), target=target)
            from probgen.kernels import MarkovEngine

            if devices == Devices() and isinstance(engine, MarkovEngine):
                draw = partial(draw, run=folder)
            return _kept(folder, draw(**settings, **from_where, progress=progress))


def _loaded(run: Run) -> Posterior:
    """The posterior that a run folder holds, without its target."""
    from probgen.saving import load

    return cast(Posterior, load(run.path / POSTERIOR))


def _kept(run: Run, posterior: Posterior) -> Posterior:
    """The posterior, which the run folder holds from now on."""
    from probgen.saving import save

    save(posterior, run.path / POSTERIOR)
    cost = posterior.cost
    run.finish(steps=posterior.num_draws, seconds=cost.seconds + cost.warmup_seconds + cost.compile_seconds)
    run.checkpoints.clear()
    return posterior


def evidence(
    program: Any,
    estimator: Estimator,
    data: Any,
    *,
    args: tuple[Any, ...] = (),
    seed: NonNegativeInt = 0,
    levels: Annotated[int, Within(2)] | None = None,
    progress: bool = False,
) -> Estimate:
    """Estimate log p(x) of each datum, with its error.

    Args:
        program: the fitted program.
        estimator: e.g. `ImportanceWeighted(1000)`.
        data: what log p is of: a tensor (site "x"), tensors by site name, or a `Quantised` data set.
        args, seed: as for `infer`.
        levels: K where the data are K integer levels dequantised and scaled to [-1, 1]; taken from the data set.
        progress: show a live line on the terminal.

    Returns an `Estimate`, one value a datum. Raises as `infer`.
    """
    _check_method(estimator, Estimator, "evidence")
    check_arguments(evidence, locals())
    _check_support(program, estimator, "evidence")
    with forked_rng(seed), frozen(program), restored_store(), torch.no_grad():
        if hasattr(data, "num_levels"):
            levels, data = data.num_levels, data[torch.arange(len(data))]
        target = read(program, data, args)
        if not target.data:
            raise InputError("There is nothing to take the evidence of: data is empty.")
        return replace(estimator.estimate(target, seed=seed, progress=progress), levels=levels)


def _check_method(method: Any, contract: type, folder: str) -> None:
    if not isinstance(method, contract):
        made = f" {describe(method)}()" if isinstance(method, type) and issubclass(method, contract) else ""
        raise InputError(
            f"Expected an {contract.__name__.lower()} of probgen.{folder}, got {describe(method)}"
            + (f"; did you mean{made}?" if made else ".")
        )


def _check_support(program: Any, method: Method, folder: str) -> None:
    support = method.supports(program)
    if not support:
        able = _alternatives(program, folder, lambda _: True)
        raise UnsupportedError(
            f"{describe(method)} cannot serve {describe(program)}: {support.reason}. What can: {able}."
        )


def _alternatives(program: Any, folder: str, accept: Any) -> str:
    from probgen.discovery import methods

    names = [name for name, other in methods(folder).items() if accept(other) and _serves(other, program)]
    return ", ".join(names) or "none of this folder"


def _serves(method: type, program: Any) -> bool:
    try:
        return bool(method().supports(program))
    except TypeError:  # it has settings without defaults
        return False
