"""Other libraries' samplers of the densities of `benchmarks.mcmc`, each as fast as its own interface lets it be.

All run one thread, in single precision.

- BlackJAX and NumPyro: kernels inside one compiled scan, compiled ahead of time, so that neither tracing nor compiling
  is timed; chains side by side by `vmap`. On the banana `numpyro` is the second run of one `numpyro.infer.MCMC`, which
  traces and compiles anew at every run and lets nobody leave that out; `numpyro_kernel` is without.
- Pyro: its `MCMC`, one chain (several it runs one after another, or in processes), without progress bar and validation,
  its potential traced by TorchScript, or not (`pyro_eager`).
- torchebm: all chains in one batch.
"""

from __future__ import annotations

import os
import time
import warnings
from collections.abc import Callable
from typing import Any

os.environ.setdefault("NPROC", "1")  # threads of JAX; read when it starts
os.environ.setdefault("XLA_FLAGS", "--xla_cpu_multi_thread_eigen=false")

import blackjax
import jax
import jax.numpy as jnp
import numpy as np
import pyro
import torch
from numpyro.infer import HMC as NumPyroHMC
from numpyro.infer import MCMC as NumPyroMCMC
from numpyro.infer import NUTS as NumPyroNUTS
from pyro.infer import HMC as PyroHMC
from pyro.infer import MCMC as PyroMCMC
from pyro.infer import NUTS as PyroNUTS
from torchebm.core import BaseModel
from torchebm.samplers import HamiltonianMonteCarlo

from benchmarks.mcmc_targets import Problem, Run, Sampler, Skipped, banana_draws

CHUNKS = 10  # draws come in so many parts, between which the clock is looked at


# --- Pyro ---------------------------------------------------------------------------------------------------------


def pyro_hmc(problem: Problem, step_size: float, num_steps: int, num_draws: int, jit: bool) -> Sampler:
    def build(program: Any) -> PyroHMC:
        return PyroHMC(
            program,
            step_size=step_size,
            num_steps=num_steps,
            adapt_step_size=False,
            adapt_mass_matrix=False,
            jit_compile=jit,
        )

    return pyro_sampler(problem, build, 10, num_draws)


def pyro_nuts(problem: Problem, num_warmup: int, num_draws: int, jit: bool) -> Sampler:
    return pyro_sampler(problem, lambda program: PyroNUTS(program, jit_compile=jit), num_warmup, num_draws)


def pyro_sampler(problem: Problem, build: Callable[[Any], Any], num_warmup: int, num_draws: int) -> Sampler:
    """One chain. The first transition comes after compiling, so seconds are counted from its end."""

    def sample(seed: int) -> Run:
        moments: list[float] = []
        kernel = build(pyro.condition(problem.program, problem.data))
        with torch.random.fork_rng(), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # TorchScript's, of its end
            torch.manual_seed(seed)
            mcmc = PyroMCMC(
                kernel,
                num_samples=num_draws,
                warmup_steps=num_warmup,
                disable_progbar=True,
                hook_fn=lambda *_: moments.append(time.perf_counter()),
            )
            started = time.perf_counter()
            mcmc.run()
        first, last_of_warmup, last = (moments[i] for i in (0, num_warmup - 1, -1))
        draws = problem.vectors(mcmc.get_samples(group_by_chain=True))
        return Run(draws, last - last_of_warmup, last_of_warmup - first, first - started)

    return sample


# --- torchebm -----------------------------------------------------------------------------------------------------


class Energy(BaseModel):
    def __init__(self, problem: Problem) -> None:
        super().__init__()
        self.problem = problem

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return -self.problem.log_density(x, torch)


def torchebm_hmc(
    problem: Problem, step_size: float, num_steps: int, num_chains: int, num_draws: int
) -> Sampler:
    sampler = HamiltonianMonteCarlo(Energy(problem), step_size=step_size, n_leapfrog_steps=num_steps)

    def sample(seed: int) -> Run:
        generator = torch.Generator().manual_seed(seed)
        start = torch.from_numpy(banana_draws(num_chains, seed))
        started = time.perf_counter()
        draws = sampler.sample(start, n_steps=num_draws, return_trajectory=True, generator=generator)
        return Run(draws.numpy(), time.perf_counter() - started)

    return sample


# --- JAX ----------------------------------------------------------------------------------------------------------


class Compiled:
    """A function of arrays, compiled at its first call; each call returns its value and its seconds."""

    def __init__(self, function: Callable[..., Any]) -> None:
        self.function, self.program, self.compile_seconds = jax.jit(function), None, 0.0

    def __call__(self, *inputs: Any) -> tuple[Any, float]:
        if self.program is None:
            started = time.perf_counter()
            self.program = self.function.lower(*inputs).compile()
            self.compile_seconds = time.perf_counter() - started
        started = time.perf_counter()
        value = jax.block_until_ready(self.program(*inputs))
        return value, time.perf_counter() - started


def in_chunks(draw: Compiled, state: Any, limit_s: float) -> tuple[np.ndarray, float]:
    """Draws `(chain, draw, size)` of `CHUNKS` calls of `draw(state) -> state, draws (draw, chain, size)`."""
    total, parts = 0.0, []
    for _ in range(CHUNKS):
        (state, draws), seconds = draw(state)
        total += seconds
        parts.append(np.asarray(draws))
        if total > limit_s:
            raise Skipped(f"{len(parts)} of {CHUNKS} parts took {total:.0f} s")
    return np.concatenate(parts).swapaxes(0, 1), total


def blackjax_scan(kernel: Any, num_chains: int, num_draws: int) -> Callable[[Any], Any]:
    """(key, states) -> the same after `num_draws` transitions, and the positions on the way `(draw, chain, size)`."""
    step = jax.vmap(kernel.step) if num_chains > 1 else kernel.step

    def transition(carry: Any, key: Any) -> Any:
        state, _ = step(jax.random.split(key, num_chains) if num_chains > 1 else key, carry)
        return state, jnp.reshape(state.position, (num_chains, -1))

    def draw(carry: Any) -> Any:
        key, own = jax.random.split(carry[0])
        state, draws = jax.lax.scan(transition, carry[1], jax.random.split(own, num_draws))
        return (key, state), draws

    return draw


def blackjax_hmc(
    problem: Problem, step_size: float, num_steps: int, num_chains: int, num_draws: int
) -> Sampler:
    kernel = blackjax.hmc(density(problem), step_size, jnp.ones(problem.size), num_steps)
    draw = Compiled(blackjax_scan(kernel, num_chains, num_draws // CHUNKS))

    def sample(seed: int) -> Run:
        states = jax.vmap(kernel.init)(jnp.asarray(banana_draws(num_chains, seed)))
        draws, seconds = in_chunks(draw, (jax.random.key(seed), states), np.inf)
        return Run(draws, seconds, compile_seconds=draw.compile_seconds)

    return sample


def blackjax_nuts(
    problem: Problem, num_chains: int, num_warmup: int, num_draws: int, limit_s: float = np.inf
) -> Sampler:
    """One chain adapts step size and metric; all chains start where it ends and take 100 steps that are not kept."""
    log_density = density(problem)
    adaptation = blackjax.window_adaptation(blackjax.nuts, log_density)

    def warm_up(key: Any) -> Any:
        key, own, start = jax.random.split(key, 3)
        (state, tuned), _ = adaptation.run(own, jax.random.normal(start, (problem.size,)), num_warmup)
        if num_chains == 1:
            return tuned, (key, state)
        states = jax.tree.map(lambda leaf: jnp.broadcast_to(leaf, (num_chains, *leaf.shape)), state)
        carry, _ = blackjax_scan(blackjax.nuts(log_density, **tuned), num_chains, 100)((key, states))
        return tuned, carry

    def drawn(tuned_and_carry: Any) -> Any:
        tuned, carry = tuned_and_carry
        kernel = blackjax.nuts(log_density, **tuned)
        carry, draws = blackjax_scan(kernel, num_chains, num_draws // CHUNKS)(carry)
        return (tuned, carry), draws

    warm, draw = Compiled(warm_up), Compiled(drawn)

    def sample(seed: int) -> Run:
        start, warmup_seconds = warm(jax.random.key(seed))
        draws, seconds = in_chunks(draw, start, limit_s)
        return Run(draws, seconds, warmup_seconds, warm.compile_seconds + draw.compile_seconds)

    return sample


def numpyro_hmc(problem: Problem, step_size: float, num_steps: int) -> NumPyroHMC:
    return NumPyroHMC(
        potential_fn=potential(problem),
        step_size=step_size,
        num_steps=num_steps,
        trajectory_length=None,  # otherwise the steps are stretched to 2 pi in all
        adapt_step_size=False,
        adapt_mass_matrix=False,
    )


def numpyro_mcmc(kernel: Any, num_chains: int, num_draws: int) -> Sampler:
    """The second run of one `MCMC`, which traces and compiles anew."""
    start = jnp.asarray(banana_draws(num_chains, 0))
    mcmc = NumPyroMCMC(
        kernel,
        num_warmup=1,
        num_samples=num_draws,
        num_chains=num_chains,
        chain_method="vectorized",
        progress_bar=False,
    )

    def timed(seed: int) -> tuple[Any, float]:
        started = time.perf_counter()
        mcmc.run(jax.random.key(seed), init_params=start)
        return jax.block_until_ready(mcmc.get_samples(group_by_chain=True)), time.perf_counter() - started

    _, first_seconds = timed(0)

    def sample(seed: int) -> Run:
        draws, seconds = timed(seed)
        return Run(np.asarray(draws), seconds, compile_seconds=first_seconds)

    return sample


def numpyro_nuts(problem: Problem, num_warmup: int, num_draws: int) -> Sampler:
    kernel = NumPyroNUTS(potential_fn=potential(problem))
    return numpyro_sampler(kernel, jnp.full((problem.size,), 0.1), num_warmup, num_draws)


def numpyro_sampler(kernel: Any, start: Any, num_warmup: int, num_draws: int) -> Sampler:
    """Chains by the leading dimension of `start`, if it has two; a kernel is set up once, a seed changes its keys."""

    def keys(seed: int) -> Any:
        return jax.random.split(jax.random.key(seed), len(start)) if start.ndim > 1 else jax.random.key(seed)

    def warm_up(state: Any) -> Any:
        return jax.lax.fori_loop(0, num_warmup, lambda _, state: kernel.sample(state, (), {}), state)

    def drawn(state: Any) -> Any:
        def transition(state: Any, _: None) -> Any:
            state = kernel.sample(state, (), {})
            return state, jnp.atleast_2d(state.z)

        return jax.lax.scan(transition, state, None, num_draws // CHUNKS)

    first = kernel.init(keys(0), num_warmup, start, (), {})
    warm, draw = Compiled(warm_up), Compiled(drawn)

    def sample(seed: int) -> Run:
        state, warmup_seconds = warm(first._replace(rng_key=keys(seed)))
        draws, seconds = in_chunks(draw, state, np.inf)
        return Run(draws, seconds, warmup_seconds, warm.compile_seconds + draw.compile_seconds)

    return sample


def density(problem: Problem) -> Callable[[Any], Any]:
    return lambda z: problem.log_density(z, jnp)


def potential(problem: Problem) -> Callable[[Any], Any]:
    return lambda z: -problem.log_density(z, jnp)


# --- all of them --------------------------------------------------------------------------------------------------


def hmc_samplers(
    problem: Problem, step_size: float, num_steps: int, num_chains: int, num_draws: int
) -> dict[str, Sampler]:
    """HMC of fixed step size and number of steps, from exact draws of the banana; Pyro's one chain."""
    step = (problem, step_size, num_steps)
    return {
        "pyro": pyro_hmc(*step, num_draws=2000, jit=True),
        "pyro_eager": pyro_hmc(*step, num_draws=2000, jit=False),
        "torchebm": torchebm_hmc(*step, num_chains, num_draws // 4),
        "numpyro": numpyro_mcmc(numpyro_hmc(*step), num_chains, num_draws),
        "numpyro_kernel": numpyro_sampler(
            numpyro_hmc(*step), jnp.asarray(banana_draws(num_chains, 0)), 1, num_draws
        ),
        "blackjax": blackjax_hmc(*step, num_chains, num_draws),
    }


def nuts_samplers(problem: Problem, pyro_warmup: int, pyro_draws: int, limit_s: float) -> dict[str, Sampler]:
    """NUTS with adapted step size and diagonal metric: one chain, and 256 side by side."""
    return {
        "pyro": pyro_nuts(problem, pyro_warmup, pyro_draws, jit=True),
        "pyro_eager": pyro_nuts(problem, pyro_warmup, pyro_draws, jit=False),
        "numpyro": numpyro_nuts(problem, 1000, 5000),
        "blackjax": blackjax_nuts(problem, 1, 1000, 5000),
        "blackjax_256": blackjax_nuts(problem, 256, 1000, 200, limit_s),
    }
