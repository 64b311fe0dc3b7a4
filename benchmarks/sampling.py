"""A step of `infer` with each diffusion engine over one bare forward of the network it calls.

Steps are timed inside the engines, from one network call to the next; bare forwards run under `inference_mode`.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from benchmarks.timing import Ratio, StampedNet, arguments, interleaved, report, seconds_each
from probgen import DDPM, MLP, VP, Ancestral, ProbabilityFlowODE, ReverseSDE, UNet, infer
from probgen.core import Engine


class PlainMLP(nn.Module):
    """Two hidden layers over x with t beside it: the cheapest network for its size, so the hardest to keep up with."""

    def __init__(self, size: int, width: int) -> None:
        super().__init__()
        self.event_shape = (size,)
        self.layers = MLP((size + 1,), (size,), widths=(width, width))

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        return self.layers(torch.cat([x, t[:, None]], dim=1))


def main() -> None:
    options = arguments("Steps of engines over bare forwards.", num_pairs=21, num_steps=10)
    torch.manual_seed(0)
    title = (
        f"a step of an engine over a bare forward, {options.pairs} pairs of {options.steps} steps, one thread"
    )
    report(title, measure(options.pairs, options.steps, options.tiny))


def measure(num_pairs: int, num_steps: int, tiny: bool) -> Iterator[tuple[str, Ratio]]:
    """Every engine on a U-Net over images and on an MLP over vectors."""
    unet = UNet((1, 28, 28), widths=(8, 8) if tiny else (32, 64))
    mlp = PlainMLP(64, width=16 if tiny else 1024)
    for name, net, rows, steps in (("unet", unet, 16, num_steps), ("mlp", mlp, 64, 10 * num_steps)):
        engines: dict[str, Engine] = {
            "ancestral": Ancestral(),
            "reverse_sde": ReverseSDE(steps=steps),
            "probability_flow_ode": ProbabilityFlowODE(steps=steps, method="euler"),
        }
        for engine_name, engine in engines.items():
            yield f"ours/{name}/{engine_name}", compare(net, engine, rows, steps, num_pairs)


def compare(net: nn.Module, engine: Engine, rows: int, num_steps: int, num_pairs: int) -> Ratio:
    """An engine against its own network."""
    stamped = StampedNet(net)
    program = DDPM(stamped, VP(), num_steps, event_shape=net.event_shape)
    x, t = torch.randn(rows, *net.event_shape), torch.full((rows,), 0.5)

    def ours() -> float:
        infer(program, engine, num_draws=rows)
        return stamped.stamps.interval(num_steps)

    @torch.inference_mode()
    def theirs() -> float:
        return seconds_each(lambda: net(x, t), num_steps)

    return interleaved(ours, theirs, num_pairs)


if __name__ == "__main__":
    main()
