"""A network call of `infer` with each diffusion engine over one bare forward of the network it calls.

Calls are timed inside the engines, from one to the next; bare forwards run under `inference_mode`. A step of a method
of second order counts as the two calls it makes. Compiled networks cannot be looked into: there twice the steps less
the steps are timed, against the same network bare, not compiled, and with glibc's memory as it is: part of what
compiling gains is that it asks the system for less.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import pairwise

import torch
from torch import Tensor, nn

from benchmarks.timing import (
    Ratio,
    StampedNet,
    arguments,
    interleaved,
    keep_freed_memory,
    report,
    seconds_each,
)
from probgen import (
    DDIM,
    DDPM,
    MLP,
    VP,
    Ancestral,
    AnnealedLangevin,
    DPMSolver,
    FlowSDE,
    PredictorCorrector,
    ProbabilityFlowODE,
    ReverseSDE,
    UNet,
    infer,
)
from probgen.core import Engine
from probgen.dynamics import FlowEngine
from probgen.nets import TimeEmbedding

ENGINES: dict[str, Callable[[int], Engine]] = {
    "ancestral": lambda calls: Ancestral(),
    "reverse_sde": lambda calls: ReverseSDE(steps=calls),
    "reverse_sde_heun": lambda calls: ReverseSDE(steps=-(-calls // 2), method="heun"),
    "reverse_sde_srk": lambda calls: ReverseSDE(steps=-(-calls // 2), method="srk"),
    "probability_flow_ode": lambda calls: ProbabilityFlowODE(steps=calls, method="euler"),
    "probability_flow_ode_heun": lambda calls: ProbabilityFlowODE(steps=-(-calls // 2), method="heun"),
    "probability_flow_ode_rk4": lambda calls: ProbabilityFlowODE(steps=-(-calls // 4), method="rk4"),
    "ddim": lambda calls: DDIM(steps=calls),
    "ddim_eta1": lambda calls: DDIM(steps=calls, eta=1.0),
    "dpm_solver": lambda calls: DPMSolver(steps=calls),
    "predictor_corrector": lambda calls: PredictorCorrector(steps=-(-calls // 2)),
    "annealed_langevin": lambda calls: AnnealedLangevin(num_levels=2 + calls // 4, steps_per_level=4),
    "flow_sde": lambda calls: FlowSDE(steps=calls),
}
COMPILED = ("reverse_sde", "probability_flow_ode", "ddim")


class PlainMLP(nn.Module):
    """Two hidden layers over x with t beside it: the cheapest network for its size, so the hardest to keep up with."""

    def __init__(self, size: int, width: int) -> None:
        super().__init__()
        self.event_shape = (size,)
        self.layers = MLP((size + 1,), (size,), widths=(width, width))

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        return self.layers(torch.cat([x, t[:, None]], dim=1))


class PlainConv(nn.Module):
    """Three convolutions over images."""

    def __init__(self, event_shape: tuple[int, int, int], width: int) -> None:
        super().__init__()
        self.event_shape = event_shape
        self.embed_time = TimeEmbedding(width)
        sizes = (event_shape[0], width, width, event_shape[0])
        self.layers = nn.ModuleList(nn.Conv2d(a, b, 3, padding=1) for a, b in pairwise(sizes))

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        first, second, last = self.layers
        h = nn.functional.silu(first(x) + self.embed_time(t)[:, :, None, None])
        return last(nn.functional.silu(second(h)))


def main() -> None:
    options = arguments("Network calls of engines over bare forwards.", num_pairs=15, num_steps=12)
    torch.manual_seed(0)
    title = (
        f"a call of an engine over a bare forward, {options.pairs} pairs of {options.steps} calls, one thread"
    )
    report(title, measure(options.pairs, options.steps, options.tiny))


def measure(num_pairs: int, num_calls: int, tiny: bool) -> Iterator[tuple[str, Ratio]]:
    """Some engines on compiled networks (not if tiny: compiling takes longest); then every engine on two networks."""
    image = (1, 28, 28)
    unet = UNet(image, widths=(8, 8) if tiny else (32, 64))
    conv = PlainConv(image, width=8 if tiny else 32)
    mlp = PlainMLP(64, width=16 if tiny else 1024)
    # Convolutions first: once larger blocks were freed, glibc keeps small ones of its own accord.
    for name, net in () if tiny else (("conv_compiled", conv), ("unet_compiled", unet)):
        for engine_name in COMPILED:
            yield f"ours/{name}/{engine_name}", compare_compiled(net, engine_name, 16, num_calls, num_pairs)
    keep_freed_memory()
    for name, net, rows, calls in (("unet", unet, 16, num_calls), ("mlp", mlp, 64, 10 * num_calls)):
        for engine_name, build in ENGINES.items():
            yield f"ours/{name}/{engine_name}", compare(net, build(calls), rows, calls, num_pairs)


def compare(net: nn.Module, engine: Engine, rows: int, num_calls: int, num_pairs: int) -> Ratio:
    """An engine against its own network."""
    stamped = StampedNet(net)
    program = DDPM(stamped, VP(), num_calls, event_shape=net.event_shape)

    def ours() -> float:
        infer(program, engine, num_draws=rows)
        return stamped.stamps.interval(num_calls)

    return interleaved(ours, bare(net, rows, num_calls), num_pairs)


def compare_compiled(net: nn.Module, engine: str, rows: int, num_calls: int, num_pairs: int) -> Ratio:
    """An engine that compiles its network against that network as it is."""
    program = DDPM(net, VP(), 1000, event_shape=net.event_shape)

    def seconds(calls: int) -> float:
        built = ENGINES[engine](calls)
        assert isinstance(built, FlowEngine)
        started = time.process_time()
        infer(program, replace(built, compile=True), num_draws=rows)
        return time.process_time() - started

    def ours() -> float:
        return (seconds(2 * num_calls) - seconds(num_calls)) / num_calls

    return interleaved(ours, bare(net, rows, num_calls), num_pairs)


def bare(net: nn.Module, rows: int, num_calls: int) -> Callable[[], float]:
    """Seconds of one forward."""
    x, t = torch.randn(rows, *net.event_shape), torch.full((rows,), 0.5)

    @torch.inference_mode()
    def theirs() -> float:
        return seconds_each(lambda: net(x, t), num_calls)

    return theirs


if __name__ == "__main__":
    main()
