"""An evaluation of other libraries' likelihoods over a bare forward: `python -m benchmarks.peers.likelihood PAIRS`.

Run by an environment that has zuko and flow_matching; prints one JSON object of median ratios with their quartiles.
"""

from __future__ import annotations

import importlib.util
import json
import sys
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.timing import Ratio, interleaved, keep_freed_memory, seconds_each
from probgen.nets import MLP

SIZE, ROWS, WIDTHS, FORWARDS = 64, 64, (256, 256), 50


class PlainMLP(nn.Module):
    """Hidden layers over x with t beside it; counts its calls."""

    def __init__(self, size: int = SIZE, widths: tuple[int, ...] = WIDTHS) -> None:
        super().__init__()
        self.layers = MLP((size + 1,), (size,), widths)
        self.calls = 0

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        self.calls += 1
        return self.layers(torch.cat([x, t.expand(len(x))[:, None]], dim=1))


def network_and_data(size: int = SIZE, widths: tuple[int, ...] = WIDTHS) -> tuple[PlainMLP, Tensor]:
    """The same for all, with weights large enough for a field that bends."""
    torch.manual_seed(0)
    net, x = PlainMLP(size, widths), torch.randn(ROWS, size)
    for weight in net.requires_grad_(False).parameters():
        weight.mul_(2)
    return net, x


def over_forward(net: PlainMLP, x: Tensor, solve: Callable[[], Any], num_pairs: int) -> Ratio:
    """Seconds of a solve for each of its network calls, over those of a bare forward."""
    t = torch.full((len(x),), 0.5)

    def theirs() -> float:
        with torch.inference_mode():
            return seconds_each(lambda: net(x, t), FORWARDS)

    def ours() -> float:
        net.calls = 0
        return seconds_each(solve, 1) / max(1, net.calls)

    return interleaved(ours, theirs, num_pairs)


def zuko_solves(net: PlainMLP, x: Tensor) -> Iterator[tuple[str, Callable[[], Any]]]:
    from zuko.transforms import FreeFormJacobianTransform

    for name, exact in (("exact", True), ("hutchinson", False)):
        flow = FreeFormJacobianTransform(
            lambda t, y: net(y, t), torch.tensor(0.0), torch.tensor(1.0), atol=1e-5, rtol=1e-5, exact=exact
        )
        yield f"peer/zuko/{name}", torch.no_grad()(lambda flow=flow: flow.call_and_ladj(x))


def flow_matching_solves(net: PlainMLP, x: Tensor) -> Iterator[tuple[str, Callable[[], Any]]]:
    from flow_matching.solver import ODESolver
    from flow_matching.utils import ModelWrapper

    class Wrapped(ModelWrapper):
        def forward(self, x: Tensor, t: Tensor, **extras: Any) -> Tensor:
            return self.model(x, t)

    solver = ODESolver(Wrapped(net))
    for name, exact in (("exact", True), ("hutchinson", False)):
        yield (
            f"peer/flow_matching/{name}",
            lambda exact=exact: solver.compute_likelihood(
                x, lambda end: -end.square().sum(1), step_size=None, method="dopri5", exact_divergence=exact
            ),
        )


def main() -> None:
    torch.set_num_threads(1)
    keep_freed_memory()
    net, x = network_and_data()
    found: dict[str, Any] = {}
    for name, solves in (("zuko", zuko_solves), ("flow_matching", flow_matching_solves)):
        if importlib.util.find_spec(name) is None:
            found[f"skipped {name}"] = f"{name} is not installed in {sys.executable}"
            continue
        for key, solve in solves(net, x):
            ratio = over_forward(net, x, solve, int(sys.argv[1]))
            found[key] = [ratio.median, ratio.lower, ratio.upper, ratio.theirs]
    print(json.dumps(found))


if __name__ == "__main__":
    main()
