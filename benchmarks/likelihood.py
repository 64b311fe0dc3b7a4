"""An evaluation of the velocity with its divergence, as part of a whole solve, over one bare forward of the network.

    python -m benchmarks.likelihood --peers PATH/TO/python

64 data of 64 coordinates, an MLP of (x, t) with two hidden layers of 256, seconds of a solve for each of its network
calls: the stepper's own work is in them. `--peers` names the Python of an environment with zuko and flow_matching,
whose ratios to the same bare forward are measured in its own process; `import zuko` alone would switch off argument
validation in this one.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor, nn

from benchmarks.peers.likelihood import PlainMLP, network_and_data, over_forward
from benchmarks.timing import Ratio, interleaved, keep_freed_memory, report, seconds_each
from probgen.core import Batch
from probgen.dynamics import GaussianInitial, Likelihood

ROOT = Path(__file__).parent.parent


class NetworkFlow(nn.Module):
    """A flow whose velocity is the network's output as it is."""

    def __init__(self, net: PlainMLP, size: int) -> None:
        super().__init__()
        self.net, self.event_shape = net, (size,)

    def model(self, batch: Batch) -> None:
        raise NotImplementedError

    def velocity(self, x_t: Tensor, t: Tensor) -> Tensor:
        return self.net(x_t, t)

    def span(self) -> tuple[float, float]:
        return 0.0, 1.0

    def initial(self) -> GaussianInitial:
        return GaussianInitial(torch.tensor(1.0))


def main() -> None:
    parser = argparse.ArgumentParser(description="Evaluations of likelihoods over bare forwards.")
    parser.add_argument("--peers", type=Path, help="the Python of an environment with zuko and flow_matching")
    parser.add_argument("--pairs", type=int, default=15, help="interleaved pairs of each row (%(default)s)")
    parser.add_argument("--steps", type=int, default=100, help="compiled evaluations of a pair (%(default)s)")
    parser.add_argument(
        "--tiny", action="store_true", help="a tiny network: to see that it runs, not how fast"
    )
    options = parser.parse_args()
    torch.set_num_threads(1)
    keep_freed_memory()
    title = f"an evaluation with divergence over a bare forward, {options.pairs} pairs, one thread"
    report(title, measure(options))
    if options.peers is None:
        print("peers skipped: run with --peers PATH/TO/python", file=sys.stderr)


def measure(options: argparse.Namespace) -> Iterator[tuple[str, Ratio]]:
    """Ours, then theirs."""
    size, widths = (4, (8, 8)) if options.tiny else (64, (256, 256))
    net, x = network_and_data(size, widths)
    likelihood = Likelihood(NetworkFlow(net, size))
    signs = torch.randn(len(x), 1, size).sign()
    for name, probes in (("exact", None), ("hutchinson", signs)):
        yield (
            f"ours/{name}",
            over_forward(net, x, lambda probes=probes: likelihood.solve(x, probes), options.pairs),
        )
    yield "ours/exact_compiled", compiled_ratio(net, x, likelihood, options)
    if options.peers is not None:
        yield from peer_ratios(options)


def compiled_ratio(net: PlainMLP, x: Tensor, likelihood: Likelihood, options: argparse.Namespace) -> Ratio:
    """Evaluations alone: a graph does not count its calls."""
    from probgen.dynamics.likelihood import compiled, field_of
    from probgen.dynamics.trace import exact_divergence

    field, t = field_of(likelihood.velocity()), torch.full((len(x),), 0.5)
    with torch.no_grad():
        evaluate = compiled(lambda x, t: exact_divergence(field, x, t), x, t)

    @torch.no_grad()
    def ours() -> float:
        return seconds_each(lambda: evaluate(x, t), options.steps)

    @torch.inference_mode()
    def theirs() -> float:
        return seconds_each(lambda: net(x, t), options.steps)

    return interleaved(ours, theirs, options.pairs)


def peer_ratios(options: argparse.Namespace) -> Iterator[tuple[str, Ratio]]:
    """What the other environment measures in its own process."""
    command = [str(options.peers), "-m", "benchmarks.peers.likelihood", str(options.pairs)]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(f"{' '.join(command)} failed:\n{done.stderr}")
    for key, found in json.loads(done.stdout.splitlines()[-1]).items():
        if isinstance(found, list):
            yield key, Ratio(*found)
        else:
            print(found, file=sys.stderr)


if __name__ == "__main__":
    main()
