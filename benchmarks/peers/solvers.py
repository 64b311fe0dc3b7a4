"""What other libraries draw from the digit network: `python -m benchmarks.peers.solvers PROBLEM.npz DRAWS.npz`.

The problem holds the network, x_T, the exact ends of its first rows and the budgets of network calls. Of every library
each of its usual grids and orders is tried on those rows, budget by budget, and the best draws everything. Each asks
the network at exactly the time of its own noise level, with no rounding to a trained step.

A solver that ends in x0hat is compared with the exact path's x0hat at t_min; one that stops at t_min with the exact
path there.
"""

from __future__ import annotations

import importlib
import importlib.util
import json
import sys
import types
from collections.abc import Callable, Iterator
from functools import cache
from typing import Any

import numpy as np
import torch
from torch import Tensor

from benchmarks.digit_network import NUM_LEVELS, PROCESS, noise_ratio, read_network, time_of

ENDS = torch.tensor([PROCESS.t_max, PROCESS.t_min], dtype=torch.float64)
BATCH = 500


class Eps:
    """The network at x_t = alpha (x_0 + ratio eps), its calls counted."""

    def __init__(self, network: Callable[[Tensor, Tensor], Tensor]) -> None:
        self.network, self.calls = network, 0

    def __call__(self, x: Tensor, t: Tensor) -> Tensor:
        self.calls += 1
        return self.network(x, t.reshape(1).to(x))


Candidate = Callable[[Eps, Tensor, int], Tensor]  # network, x_T, budget -> the end


# --- diffusers ----------------------------------------------------------------------------------------------------


def diffusers_sampler(name: str, **options: Any) -> Candidate:
    def sample(eps: Eps, x: Tensor, budget: int) -> Tensor:
        import diffusers

        k = torch.arange(NUM_LEVELS + 1, dtype=torch.float64) / NUM_LEVELS
        abar = PROCESS.alpha(k).square()
        scheduler = getattr(diffusers, name)(
            num_train_timesteps=NUM_LEVELS, trained_betas=(1 - abar[1:] / abar[:-1]).numpy(), **options
        )
        scheduler.set_timesteps(budget)
        for index, step in enumerate(scheduler.timesteps):
            sigmas = getattr(scheduler, "sigmas", None)
            t = (step + 1) / NUM_LEVELS if sigmas is None else time_of(sigmas[index])
            x = scheduler.step(eps(x, t), step, x).prev_sample
        return x

    return sample


SPACINGS = [{"timestep_spacing": spacing} for spacing in ("linspace", "trailing")]
GRIDS = [*SPACINGS, {"use_karras_sigmas": True}, {"use_exponential_sigmas": True}]


def of_diffusers() -> Iterator[tuple[str, str, Candidate]]:
    plain: dict[str, Any] = {"clip_sample": False, "set_alpha_to_one": True}
    for spacing in ("linspace", "leading", "trailing"):
        options = plain | {"timestep_spacing": spacing}
        yield "diffusers_ddim", spacing, diffusers_sampler("DDIMScheduler", **options)
    for order in (2, 3):
        for grid in [*GRIDS, {"use_lu_lambdas": True}]:
            options = {"solver_order": order, **grid}
            label = f"order {order}, {_label(grid)}"
            yield (
                "diffusers_dpmpp",
                label,
                diffusers_sampler("DPMSolverMultistepScheduler", **options),
            )
        for grid in GRIDS:
            options = {"solver_order": order, **grid}
            label = f"order {order}, {_label(grid)}"
            yield "diffusers_unipc", label, diffusers_sampler("UniPCMultistepScheduler", **options)


def _label(grid: dict[str, Any]) -> str:
    ((key, value),) = grid.items()
    return value if isinstance(value, str) else key.removeprefix("use_")


# --- k-diffusion --------------------------------------------------------------------------------------------------


class Unused(types.ModuleType):
    """Stands for a module that is imported and not used."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return Unused(name)


@cache
def k_sampling() -> Any:
    """`k_diffusion.sampling` alone: its package imports tools for training and for looking at images as well."""
    package = importlib.util.find_spec("k_diffusion")
    assert package is not None
    stand_in = types.ModuleType("k_diffusion")
    stand_in.__path__ = list(package.submodule_search_locations or [])
    sys.modules["k_diffusion"] = stand_in
    for name in ("torchsde", "torchdiffeq", "torchvision", "torchvision.transforms"):
        sys.modules[name] = Unused(name)
    return importlib.import_module("k_diffusion.sampling")


def k_diffusion_sampler(grid: str) -> Candidate:
    def sample(eps: Eps, x: Tensor, budget: int) -> Tensor:
        sampling = k_sampling()
        largest, smallest = noise_ratio(ENDS).tolist()
        if grid == "vp":
            sigmas = sampling.get_sigmas_vp(budget, eps_s=PROCESS.t_min)
        else:
            sigmas = getattr(sampling, f"get_sigmas_{grid}")(budget, smallest, largest)

        def x0hat(y: Tensor, sigma: Tensor) -> Tensor:
            t = time_of(sigma[:1])
            return y - sigma[0] * eps(y * PROCESS.alpha(t).to(y), t)

        return sampling.sample_dpmpp_2m(x0hat, x / PROCESS.alpha(ENDS[:1]).to(x), sigmas, disable=True)

    return sample


def of_k_diffusion() -> Iterator[tuple[str, str, Candidate]]:
    for grid in ("karras", "exponential", "vp"):
        yield "k_diffusion_dpmpp_2m", grid, k_diffusion_sampler(grid)


# --- azula --------------------------------------------------------------------------------------------------------


def azula_sampler(name: str, order: int, grid: str, denoise_last: bool) -> Candidate:
    def sample(eps: Eps, x: Tensor, budget: int) -> Tensor:
        from azula import sample as samplers
        from azula.denoise import Denoiser, DiracPosterior

        class OfNetwork(Denoiser):
            def schedule(self, t: Tensor) -> tuple[Tensor, Tensor]:
                return PROCESS.alpha(t), PROCESS.sigma(t)

            def forward(self, x_t: Tensor, t: Tensor, **_: Any) -> Any:
                alpha, sigma = (value.to(x_t) for value in self.schedule(t))
                return DiracPosterior((x_t - sigma * eps(x_t, t)) / alpha)

        steps = budget - denoise_last
        timesteps = times_of(grid, steps)
        sampler_class = type("OnGrid", (getattr(samplers, name),), {"timesteps": timesteps})
        options = {"order": order} if order else {}
        denoiser = OfNetwork()
        x = sampler_class(denoiser, steps=steps, silent=True, **options)(x)
        return denoiser(x, timesteps[-1]).mean if denoise_last else x

    return sample


def times_of(grid: str, steps: int) -> Tensor:
    u = torch.linspace(0, 1, steps + 1, dtype=torch.float64)
    first, last = noise_ratio(ENDS)
    if grid == "uniform":
        return ENDS[0] + u * (ENDS[1] - ENDS[0])
    if grid == "exponential":
        return time_of(first * (last / first) ** u)
    return time_of((first ** (1 / 7) + u * (last ** (1 / 7) - first ** (1 / 7))) ** 7)


def of_azula() -> Iterator[tuple[str, str, Candidate]]:
    kinds = [("DDIMSampler", 0)] + [
        (f"{kind}Sampler", order) for kind in ("zAB", "vAB", "zEAB", "xEAB", "REAB") for order in (2, 3)
    ]
    for name, order in kinds:
        for grid in ("uniform", "karras", "exponential"):
            for last in (True, False):
                label = f"order {order or 1}, {grid}, {'x0hat' if last else 't_min'}"
                key = "azula_" + name.removesuffix("Sampler").lower()
                yield key, label, azula_sampler(name, order, grid, last)


# --- all of them --------------------------------------------------------------------------------------------------


@torch.inference_mode()
def run(problem: dict[str, np.ndarray]) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """Results by "peer/name/budget": the error and the setting it was reached with; and the draws."""
    eps = Eps(read_network(problem))
    x, exact, at_t_min = (torch.from_numpy(problem[name]) for name in ("x_T", "exact", "exact_at_t_min"))
    results: dict[str, Any] = {}
    draws = {}
    for budget in problem["budgets"].tolist():
        best: dict[str, tuple[float, str, Candidate]] = {}
        for peer, label, candidate in (*of_diffusers(), *of_k_diffusion(), *of_azula()):
            eps.calls = 0
            end = candidate(eps, x[: len(exact)], budget)
            assert eps.calls == budget, f"{peer} ({label}) took {eps.calls} calls for {budget}"
            target = at_t_min if label.endswith("t_min") else exact
            error = (end.double() - target).square().mean().sqrt().item()
            if not error > best.get(peer, (np.inf,))[0]:
                best[peer] = error, label, candidate
        for peer, (error, label, candidate) in best.items():
            key = f"{peer}/{budget}"
            results[key] = {"rmse": error, "setting": label}
            parts = [candidate(eps, part, budget) for part in x.split(BATCH)]
            draws[key] = torch.cat(parts).float().numpy()
            print(key, results[key], file=sys.stderr, flush=True)
    return results, draws


def main() -> None:
    torch.set_num_threads(1)
    with np.load(sys.argv[1], allow_pickle=False) as file:
        problem = dict(file)
    results, draws = run(problem)
    np.savez(sys.argv[2], **draws)
    print(json.dumps(results))


if __name__ == "__main__":
    main()
