"""One program, a fitted prior seen with noise, under every engine that serves it: only the argument changes.

x ~ N(0, I_8), y = 1 seen with noise 0.5, so that each coordinate of x given y is N(0.80, 0.447^2). 64 runs of 64 draws
each, 4,096 in all; runs are independent whatever the engine, so their spread is the error of its averages, for chains
and populations of particles as for draws one by one. 4.5 errors of a mean or standard deviation are 0.07 sd and 0.05 sd
of one coordinate, 0.025 and 0.018 of all together.
"""

from __future__ import annotations

import math

import pytest
from torch import Tensor

from conditioned_tools import white_gaussian
from probgen import infer
from probgen.core import Engine
from probgen.inference.guided_ode import GuidedODE
from probgen.inference.guided_sde import GuidedSDE
from probgen.inference.hmc import HMC
from probgen.inference.nuts import NUTS
from probgen.inference.split_gibbs import SplitGibbs
from probgen.inference.twisted_smc import TwistedSMC
from probgen.inference.ula import ULA
from probgen.inference.underdamped_langevin import UnderdampedLangevin
from probgen.priors.dps import DPS
from probgen.priors.guidance import Jensen, PiGDM
from probgen.priors.moment_matching import MomentMatching
from probgen.priors.noise_space import NoiseSpace

ALLOWED_Z = 4.5
NUM_RUNS, NUM_DRAWS = 64, 64
RIGHT: dict[str, Engine] = {
    "twisted particles": TwistedSMC(particles=NUM_DRAWS, steps=50),
    "split Gibbs": SplitGibbs(num_steps=40, num_warmup=10),
    "HMC in noise space": HMC(num_steps=4, num_warmup=80, space=NoiseSpace(steps=2)),
    "HMC in data space": HMC(num_steps=6, num_warmup=80),
    "NUTS in data space": NUTS(num_warmup=80),
    "guidance by moments": GuidedSDE(MomentMatching(max_rows=1), steps=100),
    "guidance by pseudo-inverse": GuidedSDE(PiGDM(), steps=100),
    "guided flow": GuidedODE(PiGDM(), steps=50),
    "underdamped Langevin": UnderdampedLangevin(step_size=0.25, num_warmup=100, thin=4),
}
WRONG: dict[str, Engine] = {
    "DPS": GuidedSDE(DPS(), steps=100),
    "guidance by a point": GuidedSDE(Jensen(), steps=50),
    "Langevin in long steps": ULA(step_size=0.1, num_warmup=50),
}


def z_of(by_run: Tensor, exact: float) -> float:
    """The largest error of an average, in errors from the spread of runs `(run, ...)`; NaN is infinite."""
    error = by_run.std(0) / math.sqrt(len(by_run))
    return float(((by_run.mean(0) - exact) / error).abs().nan_to_num(math.inf).max())


def worst_z(engine: Engine) -> float:
    """How far means and mean squares are off, of each coordinate and of all together, which are alike."""
    case = white_gaussian()
    x = infer(case.program, engine, data=case.data, num_draws=NUM_DRAWS, num_chains=NUM_RUNS)["x"]
    assert x.shape == (NUM_RUNS, NUM_DRAWS, 8)
    averages = {case.mean: x.mean(1), case.sd**2: (x - case.mean).square().mean(1)}
    return max(
        z_of(part, exact)
        for exact, found in averages.items()
        for part in (found, found.mean(1, keepdim=True))
    )


def test_one_program_under_every_engine() -> None:
    """At least five have the exact posterior, and the biases of three that say they are biased are seen."""
    scores = {name: worst_z(engine) for name, engine in (RIGHT | WRONG).items()}
    passed = {name for name, z in scores.items() if z < ALLOWED_Z}
    assert len(passed) >= 5
    assert passed == set(RIGHT), scores


@pytest.mark.parametrize("name", WRONG)
def test_engines_that_are_off_say_so(name: str) -> None:
    assert WRONG[name].guarantee in ("approximate", "discretised")
