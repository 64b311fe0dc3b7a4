"""What engines that accept or refuse proposals have in common: warm-up finds their step size and their metric."""

from __future__ import annotations

from typing import ClassVar

from probgen.core import InputError, Target
from probgen.kernels.adaptation import StepSize
from probgen.kernels.core import Adapter, SteppingEngine
from probgen.kernels.metric import Metric, MetricKind
from probgen.kernels.schedule import early
from probgen.priors.noise_space import NoiseDensity, Space, as_space
from probgen.targets import Density


class AdaptiveEngine(SteppingEngine):
    """An engine with the fields `target_accept` and `metric` too, which adapts them and a `step_size` of None.

    Its field `space` says where its chains move: among the values of the sites, or in the noise of a prior.

    Raises `InputError` for settings out of range, or where there is neither a step size nor a warm-up to find it in.
    """

    target_accept: float
    metric: MetricKind
    space: Space
    step_adapter: ClassVar[type[StepSize]] = StepSize
    """Finds the step size."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.step_size is None and self.num_warmup == 0:
            raise InputError(
                "Without warm-up (num_warmup=0) there must be a step_size; None is found in warm-up."
            )
        as_space(self.space)

    def density(self, target: Target) -> Density:
        """What the chains move in."""
        space = as_space(self.space)
        return super().density(target) if space is None else NoiseDensity(target, space)

    def adapters(self) -> list[Adapter]:
        """Step size, where none is given, and metric, unless it is the identity."""
        adapters: list[Adapter] = []
        if self.step_size is None:
            adapters.append(self.step_adapter(self.target_accept, alone=early(self.num_warmup)))
        if self.metric != "identity" and self.num_warmup:
            adapters.append(Metric(self.metric, self.num_warmup))
        return adapters
