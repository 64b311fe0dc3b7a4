"""Ancestral sampling: run the program, each site given its parents."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from pyro import poutine
from torch import Tensor

from probgen.bounds import sample_sites
from probgen.core import Batch, Chained, Cost, Count, Engine, InputError, Posterior, ReverseChain, Target
from probgen.dynamics import FlowEngine, chains
from probgen.dynamics.fields import GaussianInitial, Output
from probgen.randomness import Noise, forked_rng, time_key
from probgen.targets import dims


@dataclass(frozen=True)
class Ancestral(Engine):
    """Draws from the joint law by running the model forwards; exact for whatever the program is.

    A chain of Gaussian steps runs as x_{k-1} = A_k x_k + B_k output + S_k z from a table made before the loop; draw i
    then does not depend on how many are drawn. Any other program is run as it is.

    Args:
        batch_size: draws of a chain made side by side, to bound memory; None makes all at once.

    Source: Ho et al. (2020), arXiv 2006.11239, algorithm 2.

    >>> from probgen import infer
    >>> import pyro, pyro.distributions as dist
    >>> infer(lambda: pyro.sample("z", dist.Normal(0.0, 1.0)), Ancestral(), num_draws=5)["z"].shape
    torch.Size([1, 5])
    """

    batch_size: Count | None = None
    kind = "iid"
    guarantee = "exact"
    shares = "draws"
    numbered = True
    paper: ClassVar[str] = "Ho et al. 2020, arXiv 2006.11239"
    offers: ClassVar[str] = "independent draws from exactly the program's law"
    gives_up: ClassVar[str] = "conditioning; one network call a step of a chain"

    def run(
        self,
        target: Target,
        *,
        num_draws: int,
        num_chains: int,
        seed: int,
        init: Posterior | None = None,
        state: Any = None,
        progress: bool = True,
        first: int = 0,
    ) -> Posterior:
        """Draw from the program; see `Engine.run`."""
        if isinstance(target.program, Chained):
            steps = len(target.program.reverse_chain().times)
            drawn = _Chain(steps, batch_size=self.batch_size).run(
                target, num_draws=num_draws, num_chains=num_chains, seed=seed, progress=progress, first=first
            )
            return replace(drawn, guarantee=self.guarantee, engine=str(self))
        started = time.perf_counter()
        with torch.no_grad():
            draws = _simulate(target, range(first, first + num_draws), num_chains, seed)
        cost = Cost(seconds=time.perf_counter() - started)
        # The plate of a single row is no dimension of its draws.
        names = {site: named[len(named) - draws[site].ndim + 2 :] for site, named in dims(target).items()}
        return Posterior(draws, self.kind, self.guarantee, str(self), cost, dims=names, target=target)


@dataclass(frozen=True)
class _ChainField:
    """The network of a chain with the table of its steps."""

    output: Output
    table: ReverseChain

    @staticmethod
    def of(program: Chained) -> _ChainField:
        return _ChainField(program.predict, program.reverse_chain())

    def through(self, wrap: Callable[[Output], Output]) -> _ChainField:
        return replace(self, output=wrap(self.output))


@dataclass(frozen=True)
class _Chain(FlowEngine):
    """x_{k-1} = A_k x_k + B_k output + S_k z, from the table."""

    steps: int
    field = _ChainField

    def num_calls(self) -> int:
        return self.steps

    def draw(self, field: _ChainField, noise: Noise) -> Tensor:
        return run_chain(field.table, field.output, noise)


def run_chain(chain: ReverseChain, output: Output, noise: Noise) -> Tensor:
    """Run a chain from noise to data: `(noise.num_rows, *event)`."""
    return chains.run_chain(chain, output, GaussianInitial(chain.start_scale).draw(noise), noise)


def _simulate(target: Target, draws: range, num_chains: int, seed: int) -> dict[str, Tensor]:
    if target.per_row and all("data" in site.plates for site in target.sites.values()):
        return _side_by_side(target, len(draws), num_chains)
    runs = [
        _values(target.model, target.args, start + draw)
        for start in (seed, *(time_key(float(seed), float(chain)) for chain in range(1, num_chains)))
        for draw in draws
    ]
    return {name: _unflatten(torch.stack([run[name] for run in runs]), num_chains) for name in runs[0]}


def _side_by_side(target: Target, num_draws: int, num_chains: int) -> dict[str, Tensor]:
    """Rows of the plate over the data are independent, so all draws are rows of one run."""
    given, total = target.batch, num_draws * num_chains
    condition = given.condition
    if condition is None:
        values = _values(target.model, (Batch(num_rows=total * given.size),), None)
    else:
        values = _values(
            target.model, (Batch(condition=condition.repeat(total, *[1] * (condition.ndim - 1))),), None
        )
    rows = (given.size,) if condition is not None or given.size > 1 else ()
    return {
        name: value.reshape(num_chains, num_draws, *rows, *value.shape[1:]) for name, value in values.items()
    }


def _values(model: Any, args: tuple[Any, ...], seed: int | None) -> dict[str, Tensor]:
    if seed is not None:
        with forked_rng(seed % 2**63):
            return _values(model, args, None)
    sites = sample_sites(poutine.trace(model).get_trace(*args))
    values = {name: node["value"] for name, node in sites.items() if type(node["fn"]).__name__ != "Unit"}
    if not values:
        raise InputError("The program has no sample site: there is nothing to draw.")
    return values


def _unflatten(value: Tensor, num_chains: int) -> Tensor:
    return value.reshape(num_chains, -1, *value.shape[1:])


def example() -> Ancestral:
    """All draws side by side."""
    return Ancestral()
