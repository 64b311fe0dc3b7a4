"""log p(x) by importance sampling from the guide."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass
from typing import Annotated, ClassVar

import torch

from probgen.arviz_io import pareto_khat
from probgen.core import Cost, Count, Estimate, Estimator, Guided, Support, Target, Within, describe
from probgen.evidence.elbo import bound_kind, drawn_weights, event_size, needs_guide
from probgen.progress import ticker

GOOD_KHAT = 0.7


@dataclass(frozen=True)
class ImportanceWeighted(Estimator):
    """log (1/S) sum_s w_s with w_s = p(x, z_s)/q(z_s | x), z_s ~ q(z | x), for each datum.

    The mean of w is unbiased for p(x), so its logarithm is below log p(x) on average and meets it as S grows. The
    standard error is that of the logarithm, sd(w)/(sqrt(S) mean(w)). The weights are judged: `diagnostics` holds the
    effective sample size (sum w)^2 / sum w^2 and the Pareto shape k-hat of their tail (Vehtari et al. 2015,
    arXiv 1507.02646); where k-hat > 0.7 for a datum the error itself cannot be believed, and `trusted` is False.

    Args:
        num_samples: S >= 25.
        batch_size: samples drawn side by side, to bound memory.

    Source: Burda et al. (2015), arXiv 1509.00519.

    >>> ImportanceWeighted(1000).num_samples
    1000
    """

    num_samples: Annotated[int, Within(25)] = 1000
    batch_size: Count = 100
    needs = (Guided,)
    paper: ClassVar[str] = "Burda et al. 2015, arXiv 1509.00519"
    offers: ClassVar[str] = (
        "log p(x) itself where the guide covers the posterior, and a warning where it does not"
    )
    gives_up: ClassVar[str] = "many decoder calls; fails for far-off guides and long chains"

    def supports(self, program: object) -> Support:
        """Whether the program has a guide."""
        return needs_guide(program)

    def estimate(self, target: Target, *, seed: int, progress: bool = True) -> Estimate:
        """log p of each row; see `Estimator.estimate`."""
        started = time.perf_counter()
        with ticker(describe(self), self.num_samples, progress) as update:
            batches = drawn_weights(target, self.num_samples, self.batch_size, update)
            parts = [torch.stack([site.double() for site in sites.values()]).sum(0) for sites in batches]
        log_w = torch.cat(parts)  # (sample, row)
        normalised = log_w.softmax(0)
        ess = 1 / normalised.square().sum(0)
        khat = pareto_khat(log_w)
        bad = int((khat > GOOD_KHAT).sum())
        return Estimate(
            value=log_w.logsumexp(0) - math.log(self.num_samples),
            standard_error=(1 / ess - 1 / self.num_samples).clamp_min(0).sqrt(),
            kind=bound_kind(target),
            event_size=event_size(target),
            trusted=bad == 0,
            reason=f"k-hat > {GOOD_KHAT} for {bad} of {khat.numel()} data (largest {khat.max():.2f}): the guide misses "
            "posterior mass. Fit a wider guide, or use more samples."
            if bad
            else "",
            diagnostics={"ess": ess, "khat": khat},
            cost=Cost(network_calls=2 * self.num_samples, seconds=time.perf_counter() - started),
        )


def example() -> ImportanceWeighted:
    """A few samples."""
    return ImportanceWeighted(num_samples=100)
