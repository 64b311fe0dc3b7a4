"""log p(y) as an engine finds it beside its draws: sequential Monte Carlo around a fitted prior."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any, ClassVar

from probgen.core import Engine, Estimate, Estimator, InputError, Support, Target, Within


@dataclass(frozen=True)
class SMCEvidence(Estimator):
    """log p(y) of all that was observed, from independent runs of an engine that knows its evidence.

    The mean of the runs' unbiased estimates of p(y) is unbiased too; its logarithm lies below log p(y) on average and
    meets it as particles or runs grow. The standard error comes from the spread of the runs, by the delta method.

    Args:
        engine: such as `TwistedSMC()`.
        num_runs: >= 2.

    Raises:
        InputError: a setting out of range, or an engine that gives no evidence.

    Source: Del Moral (2004), "Feynman-Kac formulae"; Wu et al. (2023), arXiv 2306.17775.

    >>> import pyro, pyro.distributions as dist, torch
    >>> from probgen import GaussianMixture, evidence
    >>> from probgen.inference.twisted_smc import TwistedSMC
    >>> from probgen.priors.prior import Prior
    >>> mixture = GaussianMixture.example()
    >>> def seen():
    ...     x = pyro.sample("x", Prior(mixture))
    ...     pyro.sample("y", dist.Normal(x, 0.5).to_event(1))
    >>> estimate = evidence(seen, SMCEvidence(TwistedSMC(steps=30)), {"y": torch.ones(2)})
    >>> exact = mixture.evidence(torch.ones(2).double(), torch.eye(2).double(), 0.5)
    >>> bool((estimate.value - exact).abs() < 4 * estimate.standard_error)
    True
    """

    engine: Engine
    num_runs: Annotated[int, Within(2)] = 16
    paper: ClassVar[str] = "Del Moral 2004; Wu et al. 2023, arXiv 2306.17775"
    offers: ClassVar[str] = (
        "log p(y) of what was seen of a fitted prior's draw, any likelihood, with its error"
    )
    gives_up: ClassVar[str] = "as many runs of an engine; bias of its steps"

    def supports(self, program: Any) -> Support:
        """Whether the engine serves the program."""
        return self.engine.supports(program)

    def estimate(self, target: Target, *, seed: int, progress: bool = True) -> Estimate:
        """log p(y), one value a data set; see `Estimator.estimate`."""
        posterior = self.engine.run(
            target, num_draws=1, num_chains=self.num_runs, seed=seed, progress=progress
        )
        if posterior.evidence is None:
            raise InputError(f"{self.engine} draws without finding the evidence. TwistedSMC() does.")
        return posterior.evidence


def example() -> SMCEvidence:
    """A few runs of few particles."""
    from probgen.discovery import methods

    return SMCEvidence(methods("inference")["TwistedSMC"](particles=32, steps=10), num_runs=2)
