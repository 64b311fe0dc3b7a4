"""The verbs that join programs with methods: `infer` draws, `evidence` estimates."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch

from probgen.core import (
    Engine,
    Estimate,
    Estimator,
    InputError,
    Method,
    Posterior,
    UnsupportedError,
    check_count,
    describe,
)
from probgen.randomness import forked_rng
from probgen.targets import frozen, read, restored_store


def infer(
    program: Any,
    engine: Engine,
    *,
    data: Any = None,
    args: tuple[Any, ...] = (),
    num_draws: int = 1000,
    num_chains: int | None = None,
    seed: int = 0,
    init: Posterior | None = None,
    state: Any = None,
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
        progress: show a live line on the terminal.

    Returns a `Posterior` with draws `(chain, draw, *batch, *event)`. Raises `InputError` for bad input and
    `UnsupportedError` where the engine cannot serve, naming those that can.

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
    if num_chains is None:
        num_chains = getattr(state, "num_chains", engine.default_chains)
    check_count("num_draws", num_draws)
    check_count("num_chains", num_chains)
    _check_support(program, engine, "inference")
    target = read(program, data, args)
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
    with forked_rng(seed), frozen(program), restored_store():
        return engine.run(
            target,
            num_draws=num_draws,
            num_chains=num_chains,
            seed=seed,
            init=init,
            state=state,
            progress=progress,
        )


def evidence(
    program: Any,
    estimator: Estimator,
    data: Any,
    *,
    args: tuple[Any, ...] = (),
    seed: int = 0,
    levels: int | None = None,
) -> Estimate:
    """Estimate log p(x) of each datum, with its error.

    Args:
        program: the fitted program.
        estimator: e.g. `ImportanceWeighted(1000)`.
        data: what log p is of: a tensor (site "x"), tensors by site name, or a `Quantised` data set.
        args, seed: as for `infer`.
        levels: K where the data are K integer levels dequantised and scaled to [-1, 1]; taken from the data set.

    Returns an `Estimate`, one value a datum. Raises as `infer`.
    """
    _check_method(estimator, Estimator, "evidence")
    _check_support(program, estimator, "evidence")
    with forked_rng(seed), frozen(program), restored_store(), torch.no_grad():
        if hasattr(data, "num_levels"):
            levels, data = data.num_levels, data[torch.arange(len(data))]
        target = read(program, data, args)
        if not target.data:
            raise InputError("There is nothing to take the evidence of: data is empty.")
        return replace(estimator.estimate(target, seed=seed), levels=levels)


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
