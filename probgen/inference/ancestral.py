"""Ancestral sampling: run the program, each site given its parents."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from pyro import poutine
from torch import Tensor

from probgen.bounds import sample_sites
from probgen.core import Batch, Chained, Cost, Engine, InputError, Posterior, Target, check_count
from probgen.dynamics import draws_in_batches
from probgen.progress import ticker
from probgen.randomness import Noise, forked_rng
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

    batch_size: int | None = None
    kind = "iid"
    guarantee = "exact"
    paper: ClassVar[str] = "Ho et al. 2020, arXiv 2006.11239"
    offers: ClassVar[str] = "independent draws from exactly the program's law"
    gives_up: ClassVar[str] = "conditioning; one network call a step of a chain"

    def __post_init__(self) -> None:
        if self.batch_size is not None:
            check_count("batch_size", self.batch_size)

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
    ) -> Posterior:
        """Draw from the program; see `Engine.run`."""
        started = time.perf_counter()
        with torch.no_grad():
            if isinstance(target.program, Chained):
                draws, calls = self._chain(target.program, num_draws, num_chains, seed, progress)
                site_dims: dict[str, tuple[str, ...]] = {}
            else:
                draws, calls = _simulate(target, num_draws, num_chains, seed), 0
                site_dims = dims(target)
        cost = Cost(network_calls=calls, seconds=time.perf_counter() - started)
        return Posterior(draws, self.kind, self.guarantee, str(self), cost, dims=site_dims, target=target)

    def _chain(
        self, program: Chained, num_draws: int, num_chains: int, seed: int, progress: bool
    ) -> tuple[dict[str, Tensor], int]:
        steps = len(program.reverse_chain().times)
        batches = -(-num_draws // (self.batch_size or num_draws))
        calls = 0
        with ticker("ancestral", steps * batches, progress) as update:

            def draw(noise: Noise) -> Tensor:
                nonlocal calls
                x = run_chain(program, noise, lambda done: update(calls + done))
                calls += steps
                return x

            counts = {"seed": seed, "num_chains": num_chains, "num_draws": num_draws}
            x = draws_in_batches(program, draw, **counts, batch_size=self.batch_size)
        return {"x": x}, calls


def run_chain(program: Chained, noise: Noise, update: Any = lambda _: None) -> Tensor:
    """Run a chain from noise to data: `(chain * draw, *event)`."""
    chain = program.reverse_chain()
    x = noise(0)

    def rows(factor: Tensor) -> list[Any]:
        return factor.tolist() if factor.ndim == 1 else list(factor.to(x))

    times = list(chain.times.to(x)[:, None])
    noises = noise.each(range(1, len(times) + 1))
    columns = zip(times, rows(chain.on_x), rows(chain.on_output), rows(chain.scale), noises, strict=True)
    for step, (t, on_x, on_output, scale, z) in enumerate(columns, start=1):
        output = program.predict(x, t)
        x = x.mul_(on_x).add_(output * on_output).add_(z.mul_(scale))
        update(step)
    return x


def _simulate(target: Target, num_draws: int, num_chains: int, seed: int) -> dict[str, Tensor]:
    if target.per_row and all("data" in site.plates for site in target.sites.values()):
        return _side_by_side(target, num_draws, num_chains)
    runs = [_values(target.model, target.args, seed + i) for i in range(num_draws * num_chains)]
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
