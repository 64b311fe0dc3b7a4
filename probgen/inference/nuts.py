"""The no-U-turn sampler of Pyro."""

from __future__ import annotations

import time
from collections import defaultdict
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from pyro.infer import NUTS as PyroNUTS
from pyro.infer.mcmc.util import initialize_model
from torch import Tensor

from probgen.bounds import validation
from probgen.core import (
    Cost,
    Engine,
    InputError,
    Posterior,
    Target,
    check_count,
    describe,
    did_you_mean,
)
from probgen.progress import ticker
from probgen.randomness import forked_rng
from probgen.targets import dims


@dataclass(frozen=True)
class NUTS(Engine):
    """Draws of Hamiltonian trajectories that stop at a U-turn, in unconstrained space; asymptotically exact.

    Args:
        num_warmup: draws for adapting step size and metric, >= 1; they are thrown away.
        target_accept: acceptance the step size aims at, in (0, 1).
        max_tree_depth: at most 2^depth - 1 gradients a draw.
        dense_metric: adapt a full covariance instead of a diagonal one.

    Chains run one after another, each with a seed of its own. `stats` holds diverging, lp,
    energy, step_size, n_steps (gradients) and reached_max_tree_depth.

    Source: Hoffman & Gelman (2014), arXiv 1111.4246; Pyro's implementation.

    >>> NUTS(num_warmup=200).target_accept
    0.8
    """

    num_warmup: int = 500
    target_accept: float = 0.8
    max_tree_depth: int = 10
    dense_metric: bool = False
    kind = "mcmc"
    guarantee = "asymptotic"
    conditions = True
    default_chains = 4
    paper: ClassVar[str] = "Hoffman & Gelman 2014, arXiv 1111.4246"
    offers: ClassVar[str] = "the posterior itself, of any program with continuous latents, with diagnostics"
    gives_up: ClassVar[str] = "speed: many gradients a draw; separated modes"

    def __post_init__(self) -> None:
        check_count("num_warmup", self.num_warmup)
        check_count("max_tree_depth", self.max_tree_depth)
        if not 0 < self.target_accept < 1:
            raise InputError(f"target_accept must lie in (0, 1), got {self.target_accept!r}.")

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
        """Run the chains; see `Engine.run`."""
        self._check(target, state)
        started, runs = time.perf_counter(), []
        total = num_chains * (self.num_warmup + num_draws)
        with ticker("NUTS", total, progress) as update:
            for chain in range(num_chains):
                start = (
                    None
                    if init is None
                    else {name: value[chain % init.num_chains, -1] for name, value in init.draws.items()}
                )
                with forked_rng((seed + chain) % 2**63), validation(False):
                    run = _Chain(self, target, start)
                    run.draw(
                        num_draws, lambda done, offset=chain: update(offset * total // num_chains + done)
                    )
                runs.append(run)
        seconds = time.perf_counter() - started
        warmup_seconds = sum(run.warmup_seconds for run in runs)
        return Posterior(
            {name: torch.stack([torch.stack(run.draws[name]) for run in runs]) for name in runs[0].draws},
            self.kind,
            self.guarantee,
            str(self),
            Cost(
                gradients=sum(run.gradients - run.warmup_gradients for run in runs),
                seconds=seconds - warmup_seconds,
                warmup_gradients=sum(run.warmup_gradients for run in runs),
                warmup_seconds=warmup_seconds,
            ),
            dims=dims(target),
            stats={
                name: torch.stack([torch.tensor(run.stats[name]) for run in runs]) for name in runs[0].stats
            },
            target=target,
        )

    def _check(self, target: Target, state: Any) -> None:
        if state is not None:
            raise InputError("NUTS cannot continue from a state; start from its draws with init=posterior.")
        latents = target.latents
        if not latents:
            raise InputError(f"Nothing to draw: every site of {describe(target.program)} is observed.")
        for name, site in latents.items():
            if site.discrete and not site.enumerated:
                raise InputError(
                    f"NUTS needs continuous latents, and site {name!r} is discrete. Sum it out with "
                    "infer={'enumerate': 'parallel'}, observe it, or use SVI with a guide of your own."
                )


class _Kernel(PyroNUTS):
    """Pyro's kernel, which also remembers the energy each trajectory starts with (for E-BFMI)."""

    energy = 0.0

    def _sample_r(self, name: str) -> Any:
        momentum, unscaled = super()._sample_r(name)
        self.energy = (self._kinetic_energy(unscaled) + self._potential_energy_last).item()
        return momentum, unscaled


class _Chain:
    """One chain of Pyro's kernel, its gradients counted and its statistics kept."""

    def __init__(self, engine: NUTS, target: Target, start: dict[str, Tensor] | None) -> None:
        self.engine, self.gradients = engine, 0
        initial, potential, transforms, _ = initialize_model(target.model, target.args)
        if not initial:
            raise InputError(f"{describe(target.program)} has no continuous latent site for NUTS.")
        self.transforms = transforms

        def counted(z: dict[str, Tensor]) -> Tensor:
            self.gradients += 1
            return potential(z)

        self.kernel = _Kernel(
            potential_fn=counted,
            target_accept_prob=engine.target_accept,
            max_tree_depth=engine.max_tree_depth,
            full_mass=engine.dense_metric,
        )
        self.kernel.initial_params = initial if start is None else self._unconstrained(initial, start)
        self.kernel.transforms = transforms
        self.draws: dict[str, list[Tensor]] = defaultdict(list)
        self.stats: dict[str, list[Any]] = defaultdict(list)

    def _unconstrained(self, initial: dict[str, Tensor], start: dict[str, Tensor]) -> dict[str, Tensor]:
        for name in initial:
            if name not in start:
                raise InputError(f"init has no draws of site {name!r}; {did_you_mean(name, start)}")
        return {
            name: self.transforms[name](start[name]).detach() if name in self.transforms else start[name]
            for name in initial
        }

    def draw(self, num_draws: int, update: Any) -> None:
        started, warmup = time.perf_counter(), self.engine.num_warmup
        self.kernel.setup(warmup)
        z = self.kernel.initial_params
        for step in range(warmup + num_draws):
            if step == warmup:
                self.warmup_gradients, self.warmup_seconds = self.gradients, time.perf_counter() - started
            divergences = len(self.kernel._divergences)
            before = self.gradients
            z = self.kernel.sample(z)
            if step >= warmup:
                self._keep(z, len(self.kernel._divergences) > divergences, self.gradients - before)
            update(step + 1)

    def _keep(self, z: dict[str, Tensor], diverging: bool, gradients: int) -> None:
        for name, value in z.items():
            constrained = self.transforms[name].inv(value) if name in self.transforms else value
            self.draws[name].append(constrained.detach())
        self.stats["diverging"].append(diverging)
        self.stats["lp"].append(-float(self.kernel._potential_energy_last or 0.0))
        self.stats["energy"].append(self.kernel.energy)
        self.stats["step_size"].append(float(self.kernel.step_size))
        self.stats["n_steps"].append(gradients)
        self.stats["reached_max_tree_depth"].append(gradients >= 2**self.engine.max_tree_depth - 1)


def example() -> NUTS:
    """A short warm-up and short trajectories."""
    return NUTS(num_warmup=10, max_tree_depth=4)
