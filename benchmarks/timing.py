"""Interleaved timings in CPU seconds of this process, which runs one thread.

On a machine that others use too, wall time counts their work as well; and as caches and clock frequency are shared
even so, only ratios of runs made side by side mean anything.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import json
import statistics
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

Timed = Callable[[], float]  # runs something once and returns its seconds a step


@dataclass(frozen=True)
class Ratio:
    """Ours over theirs: the median of the pairs' ratios with its quartiles, and the median seconds a step of theirs."""

    median: float
    lower: float
    upper: float
    theirs: float


class Stamps:
    """The moments at which something inside a loop was called.

    >>> stamps = Stamps()
    >>> for _ in range(3):
    ...     stamps.take()
    >>> len(stamps.moments), stamps.interval(2) >= 0
    (3, True)
    """

    def __init__(self) -> None:
        self.moments: list[float] = []

    def take(self) -> None:
        self.moments.append(time.process_time())

    def interval(self, count: int) -> float:
        """Mean seconds between the last `count` calls."""
        first, *_, last = self.moments[-count:]
        return (last - first) / (count - 1)


class StampedNet(nn.Module):
    """A network that stamps each of its calls."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network
        self.stamps = Stamps()

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        self.stamps.take()
        return self.network(x, t)


class StampedObjective:
    """An objective that stamps each of its losses."""

    def __init__(self, objective: Any) -> None:
        self.objective = objective
        self.stamps = Stamps()

    def loss(self, program: Any, batch: Any) -> Tensor:
        self.stamps.take()
        return self.objective.loss(program, batch)


def seconds_each(run: Callable[[], Any], count: int) -> float:
    """Seconds of one of `count` calls in a row."""
    started = time.process_time()
    for _ in range(count):
        run()
    return (time.process_time() - started) / count


def interleaved(ours: Timed, theirs: Timed, num_pairs: int) -> Ratio:
    """Ratio of pairs run next to each other, each side first in every other pair, after one pair of warm-up."""
    ratios, bases = [], []
    for pair in range(num_pairs + 1):
        if pair % 2:
            base = theirs()
            own = ours()
        else:
            own = ours()
            base = theirs()
        ratios.append(own / base)
        bases.append(base)
    lower, median, upper = statistics.quantiles(ratios[1:], n=4, method="inclusive")
    return Ratio(median, lower, upper, statistics.median(bases[1:]))


def report(title: str, measured: Iterable[tuple[str, Ratio]]) -> None:
    """A table as it is measured, then one line of JSON: medians by name, quartiles under "quartiles"."""
    print(f"{title}\n{'':28}{'ratio':>8}{'quartiles':>18}{'theirs [ms]':>14}")
    ratios = {}
    for name, ratio in measured:
        quartiles = f"{ratio.lower:.3f} .. {ratio.upper:.3f}"
        print(f"{name:28}{ratio.median:8.3f}{quartiles:>18}{1e3 * ratio.theirs:14.3f}", flush=True)
        ratios[name] = ratio
    medians = {name: round(ratio.median, 4) for name, ratio in ratios.items()}
    quartiles = {name: [round(ratio.lower, 4), round(ratio.upper, 4)] for name, ratio in ratios.items()}
    print(json.dumps(medians | {"quartiles": quartiles}))


def arguments(description: str, num_pairs: int, num_steps: int) -> argparse.Namespace:
    """The command line of a benchmark, and one thread for everything."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument(
        "--pairs", type=int, default=num_pairs, help="interleaved pairs of each row (%(default)s)"
    )
    parser.add_argument(
        "--steps", type=int, default=num_steps, help="steps of one side of a pair (%(default)s)"
    )
    parser.add_argument(
        "--tiny", action="store_true", help="tiny networks: to see that it runs, not how fast"
    )
    torch.set_num_threads(1)
    return parser.parse_args()


def keep_freed_memory() -> None:
    """Let glibc keep what is freed.

    Otherwise either side may lose a tenth of its time, or none, to asking the system for the same pages again.
    """
    trim_threshold, mmap_threshold = -1, -3
    with contextlib.suppress(AttributeError, OSError, TypeError):
        libc = ctypes.CDLL(None)
        libc.mallopt(trim_threshold, 2**30)
        libc.mallopt(mmap_threshold, 2**25)
