"""Draws and chains divided among devices, and put together again."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map

from probgen.core import Cost, DataSets, Engine, InputError, Posterior, Target, UnsupportedError, describe
from probgen.devices import Devices, Group, Networks, launch, on
from probgen.randomness import forked_rng, time_key
from probgen.targets import frozen, read, restored_store

_KINDS = ("draws", "stats", "run_stats")
_PLAIN = ("kind", "guarantee", "engine", "cost", "dims", "coords", "evidence")


def draw_on(  # noqa: PLR0913 -- what `infer` was asked for
    devices: Devices,
    engine: Engine,
    target: Target,
    data: Any,
    args: tuple[Any, ...],
    *,
    num_draws: int,
    num_chains: int,
    seed: int,
    init: Posterior | None = None,
    state: Any = None,
    progress: bool = False,
) -> Posterior:
    """What `engine.run` gives, its draws divided among devices, or its chains where draws depend on each other.

    Draws and chains of engines that are `numbered` have the noise that they have in the whole: independent draws and
    chains that adapt nothing are then the same on any number of devices, up to rounding. Chains that adapt share what
    they learn with those of their own process.

    Args:
        devices: how many processes, and how they work.
        engine: what draws.
        target: of this program, as it is in the caller's process; `data` and `args` make it anew in others.
        data, args, num_draws, num_chains, seed, init, state, progress: as for `infer`.

    Returns a `Posterior` in order, on the CPU; from several devices without a state to go on from.
    Raises `InputError` for fewer draws or chains than devices, `UnsupportedError` for engines that need the whole at
    once, and for a state to go on from on several devices.
    """
    settings = {"num_draws": num_draws, "num_chains": num_chains, "init": init, "state": state}
    work = (devices, engine, target.program, data, args, settings, seed, progress)
    kind = devices.kind(target.program)
    if devices.count == 1:
        return replace(_posterior(*_share(Group(device=torch.device(kind)), *work)), target=target)
    if state is not None:
        raise UnsupportedError(
            "A state is gone on from in one process. On several devices chains start from draws: init=posterior."
        )
    if engine.shares is None:
        raise UnsupportedError(
            f"{describe(engine)} needs all of its draws in one place: they cannot be divided. Take devices=1."
        )
    total = num_draws if engine.shares == "draws" else num_chains
    if total < devices.count:
        raise InputError(
            f"{describe(engine)} divides its {engine.shares} among devices, and there are {total} for {devices.count} "
            f"devices: pass num_{engine.shares}={devices.count} or more."
        )
    found = launch(_share, *work, count=devices.count, kind=kind)
    return replace(joined([_posterior(*part) for part in found], engine.shares), target=target)


def _share(
    group: Group,
    devices: Devices,
    engine: Engine,
    program: Any,
    data: Any,
    args: tuple[Any, ...],
    settings: dict[str, Any],
    seed: int,
    progress: bool,
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """What one process draws: the tensors of a posterior, and all the rest of it."""
    name = f"num_{engine.shares}"
    mine = group.share(range(settings[name]))
    numbered = {"first": mine[0]} if engine.numbered else {}
    stream = time_key(float(seed), float(mine[0])) % 2**63 if mine[0] else seed
    with on(program, group.device), Networks(program, devices).running():
        moved = tree_map(lambda value: _moved(value, group.device), (data, args))
        target = read(program, *moved, missing=engine.completes)
        with forked_rng(stream), frozen(program), restored_store():
            drawn = engine.run(
                target,
                **(settings | {name: len(mine)} | numbered),
                seed=seed if engine.numbered else stream,
                progress=progress and group.rank == 0,
            )
    tensors = {f"{kind} {site}": value for kind in _KINDS for site, value in getattr(drawn, kind).items()}
    rest = {name: getattr(drawn, name) for name in _PLAIN}
    return tensors, rest | {"state": drawn.state if group.count == 1 else None}


def _posterior(tensors: dict[str, Tensor], rest: dict[str, Any]) -> Posterior:
    """The posterior that `_share` took apart."""
    draws, stats, run_stats = (
        {name.removeprefix(kind): value for name, value in tensors.items() if name.startswith(kind)}
        for kind in (f"{kind} " for kind in _KINDS)
    )
    return Posterior(draws=draws, stats=stats, run_stats=run_stats, **rest)


def joined(parts: Sequence[Posterior], shares: str) -> Posterior:
    """Posteriors of parts of the draws, or of the chains, as one; they ran at the same time.

    >>> part = Posterior({"x": torch.zeros(1, 3)}, "iid", "exact", "Ancestral", Cost(seconds=2.0))
    >>> whole = joined([part, part], "draws")
    >>> whole["x"].shape, whole.cost.seconds
    (torch.Size([1, 6]), 2.0)
    """
    dim = 1 if shares == "draws" else 0

    def together(name: str, dim: int) -> dict[str, Tensor]:
        values = [getattr(part, name) for part in parts]
        return {key: torch.cat([value[key] for value in values], dim=dim) for key in values[0]}

    costs = [part.cost for part in parts]
    return replace(
        parts[0],
        draws=together("draws", dim),
        stats=together("stats", dim),
        run_stats=together("run_stats", 0) if shares == "chains" else parts[0].run_stats,
        cost=Cost(
            network_calls=sum(cost.network_calls for cost in costs),
            gradients=sum(cost.gradients for cost in costs),
            seconds=max(cost.seconds for cost in costs),
            warmup_gradients=sum(cost.warmup_gradients for cost in costs),
            warmup_seconds=max(cost.warmup_seconds for cost in costs),
            compile_seconds=max(cost.compile_seconds for cost in costs),
        ),
    )


def _moved(value: Any, device: torch.device) -> Any:
    """Observed values and arguments on the device of the weights."""
    if isinstance(value, DataSets):
        return replace(value, values=tree_map(lambda each: _moved(each, device), value.values))
    return value.to(device) if isinstance(value, Tensor) else value
