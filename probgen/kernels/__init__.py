"""Pure Markov transitions, and the one loop that runs them.

`core` holds the contracts: a `Kernel` moves points, an `Adapter` tunes it during warm-up, a `MarkovEngine` is a few
settings that make both. `run` is the loop; `coordinates`, `noise`, `starts` and `state` are its parts. `adaptive` is
what engines with a warm-up share: `adaptation` of the step size, `metric`, and the `schedule` of both. A kernel is one
file here or, where only one engine uses it, the engine's own file.
"""

from probgen.kernels.adaptation import StepSize, find_step_size
from probgen.kernels.adaptive import AdaptiveEngine
from probgen.kernels.coordinates import Coordinates, InCoordinates
from probgen.kernels.core import (
    Adapter,
    Evaluate,
    Kernel,
    MarkovEngine,
    Point,
    Stats,
    SteppingEngine,
    Tuning,
    compiled,
    per_chain,
    per_set,
)
from probgen.kernels.leapfrog import MAX_ENERGY_ERROR, accept, kinetic_energy, leapfrog
from probgen.kernels.metric import Metric, MetricKind
from probgen.kernels.run import Chains, run_chains
from probgen.kernels.state import ChainState

__all__ = [
    "MAX_ENERGY_ERROR",
    "Adapter",
    "AdaptiveEngine",
    "ChainState",
    "Chains",
    "Coordinates",
    "Evaluate",
    "InCoordinates",
    "Kernel",
    "MarkovEngine",
    "Metric",
    "MetricKind",
    "Point",
    "Stats",
    "StepSize",
    "SteppingEngine",
    "Tuning",
    "accept",
    "compiled",
    "find_step_size",
    "kinetic_energy",
    "leapfrog",
    "per_chain",
    "per_set",
    "run_chains",
]
