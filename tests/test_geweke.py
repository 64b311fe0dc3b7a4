"""Geweke's joint test of every kernel: alternating with fresh data, it leaves the joint law of a program as it is."""

from __future__ import annotations

from functools import partial
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from location_and_scale import Simulator, geweke, tuning
from mcmc_tools import Statistics, geweke_z
from probgen.inference.chees import ChEES
from probgen.inference.hmc import HMC
from probgen.inference.mala import MALA
from probgen.inference.nuts import NUTS
from probgen.inference.parallel_tempering import ParallelTempering
from probgen.inference.sgld import SGLD
from probgen.inference.ula import ULA
from probgen.inference.underdamped_langevin import UnderdampedLangevin
from probgen.kernels import Coordinates, Kernel
from statistics_tools import ALLOWED_Z

EXACT = {
    "HMC": Simulator(HMC(num_steps=5, jitter=0.0).kernel(), tuning(0.2)),
    "HMC, jittered": Simulator(HMC(num_steps=5, jitter=0.3).kernel(), tuning(0.2)),
    "ChEES": Simulator(ChEES(max_steps=20).kernel(), tuning(0.2, length=2.0)),
    "NUTS": Simulator(NUTS(max_tree_depth=4).kernel(), tuning(0.2)),
    "MALA": Simulator(MALA().kernel(), tuning(0.03)),
}

# Their step is so short that the bias of the discretisation stays below what the test can see. (ConstantSGD is not
# among them: its law is not the posterior, and its covariance has an equation of its own.)
UNADJUSTED = {
    "ULA": Simulator(ULA().kernel(), tuning(0.002)),
    "SGLD": Simulator(SGLD(decay=0.3, offset=10.0).kernel(), tuning(0.004)),
    "UnderdampedLangevin": Simulator(UnderdampedLangevin(friction=1.0).kernel(), tuning(0.1)),
}


@pytest.mark.parametrize("name", EXACT | UNADJUSTED)
def test_kernels_leave_the_joint_law_as_it_is(name: str) -> None:
    """10,000 chains of 20 steps: where z = 4.5, the average of a test function is off by 0.05 sd or less."""
    found = geweke((EXACT | UNADJUSTED)[name], num_chains=10_000)
    assert found.size < ALLOWED_Z, found


@pytest.mark.parametrize(("name", "step_size"), [("ULA", 0.1), ("SGLD", 0.2), ("UnderdampedLangevin", 0.5)])
def test_long_unadjusted_steps_are_seen(name: str, step_size: float) -> None:
    """The bias of steps that are too long stands out."""
    simulator = UNADJUSTED[name]._replace(tuning=tuning(step_size))
    assert geweke(simulator, num_chains=10_000).size > 2 * ALLOWED_Z


# --- temperatures -------------------------------------------------------------------------------------------------


class Rungs(NamedTuple):
    """Every chain at every temperature, chain by chain, and the datum of each chain."""

    chains: Any
    x: Tensor


class TemperedSimulator(NamedTuple):
    """z ~ N(0, 1), x | z ~ N(z, 1): at inverse temperature beta z | x is N(x/2, 1/(2 beta)).

    Only the coldest z goes with x. A step makes three transitions of all rungs, then draws x afresh, then the hot rungs
    from their exact laws.

    Args:
        kernel: moves and swaps.
        swap_noise: factor on the noise of the accept step of swaps; 1 is right.
    """

    kernel: Kernel
    swap_noise: float = 1.0

    def begin(self, n: int) -> Rungs:
        z = torch.randn(n, dtype=torch.float64)
        return self._heated(z, z + torch.randn_like(z))

    def step(self, rungs: Rungs) -> Rungs:
        chains, x = rungs
        for _ in range(3):
            chains, _ = self.kernel.step(partial(self._evaluate, x), chains, TEMPERED, self._noise(len(x)))
        cold = chains.position[0, :: len(BETAS)]
        return self._heated(cold, cold + torch.randn_like(cold))

    def statistics(self, rungs: Rungs) -> Statistics:
        z, x = rungs.chains.position[0, :: len(BETAS)], rungs.x
        return {"z": z, "z^2": z.square(), "z x": z * x}

    def _heated(self, cold: Tensor, x: Tensor) -> Rungs:
        hot = x[:, None] / 2 + torch.randn(len(x), len(BETAS), dtype=x.dtype) / (2 * BETAS).sqrt()
        z = torch.cat([cold[:, None], hot[:, 1:]], 1).reshape(1, -1)
        return Rungs(self.kernel.start(partial(self._evaluate, x), z, self._noise(len(x))), x)

    def _evaluate(self, x: Tensor, z: Tensor) -> tuple[Tensor, Tensor]:
        x = x.repeat_interleave(len(BETAS))
        return (-0.5 * z.square() - 0.5 * (x - z).square())[0], x - 2 * z

    def _noise(self, n: int) -> Tensor:
        noise = torch.randn(self.kernel.normals(1), n * len(BETAS), dtype=torch.float64)
        return torch.cat([noise[:-2], self.swap_noise * noise[-2:]])


BETAS = torch.tensor([1.0, 0.4, 0.1], dtype=torch.float64)
TEMPERED = tuning(0.5)._replace(coordinates=Coordinates.identity(1, BETAS), beta=BETAS)
TEMPERING = TemperedSimulator(ParallelTempering(HMC(num_steps=3), num_temperatures=len(BETAS)).kernel())


def tempered_z(simulator: TemperedSimulator) -> float:
    return geweke_z(
        simulator.begin, simulator.step, simulator.statistics, num_chains=10_000, num_steps=20
    ).size


def test_tempering_leaves_the_joint_law_as_it_is() -> None:
    assert tempered_z(TEMPERING) < ALLOWED_Z


def test_swaps_that_go_uphill_alone_are_seen() -> None:
    assert tempered_z(TEMPERING._replace(swap_noise=0.0)) > 2 * ALLOWED_Z
