"""The evidence lower bound of any model/guide pair, and its importance weights, for fitting and for evidence alike.

ELBO = E_q [log p(x, z) - log q(z | x)] <= log p(x)  (Jordan et al. 1999; Kingma & Welling 2013, arXiv 1312.6114).
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import pyro
import torch
from pyro import poutine
from pyro.infer import Trace_ELBO, TraceEnum_ELBO, TraceMeanField_ELBO
from pyro.poutine.messenger import Messenger
from torch import Tensor
from torch.distributions import kl_divergence

from probgen.core import InputError, did_you_mean

Sites = dict[str, dict[str, Any]]


def trace_pair(
    model: Callable[..., Any],
    guide: Callable[..., Any],
    args: tuple[Any, ...],
    kwargs: dict[str, Any] | None = None,
) -> tuple[Any, Any]:
    """Traces of the model, replayed on the guide, and of the guide."""
    kwargs = kwargs or {}
    guide_trace = poutine.trace(guide).get_trace(*args, **kwargs)
    model_trace = poutine.trace(poutine.replay(model, trace=guide_trace)).get_trace(*args, **kwargs)
    return poutine.util.prune_subsample_sites(model_trace), poutine.util.prune_subsample_sites(guide_trace)


def sample_sites(trace: Any) -> Sites:
    """The sample sites of a trace, in order, factors included, without the bookkeeping of plates."""
    subsampled = poutine.util.site_is_subsample
    return {
        name: site for name, site in trace.nodes.items() if site["type"] == "sample" and not subsampled(site)
    }


def plate_nesting(*traces: Any) -> int:
    """How many dimensions on the left of the event belong to plates."""
    frames = [
        f for trace in traces for site in sample_sites(trace).values() for f in site["cond_indep_stack"]
    ]
    return max((-frame.dim for frame in frames if frame.vectorized), default=0)


def check_pair(model_sites: Sites, guide_sites: Sites) -> None:
    """Raise `InputError` where a guide lacks a latent site of its model, or has one the model lacks."""
    latents = [name for name, site in model_sites.items() if not site["is_observed"]]
    for name in latents:
        if name not in guide_sites and not model_sites[name]["infer"].get("enumerate"):
            raise InputError(
                f"The guide has no site {name!r}, which is latent in the model (guide sites: {sorted(guide_sites)}). "
                f"Add pyro.sample({name!r}, ...) to the guide, or observe {name!r}."
            )
    for name, site in guide_sites.items():
        if name not in latents and not site["infer"].get("is_auxiliary"):
            where = "observed in" if name in model_sites else "not a site of"
            raise InputError(f"Guide site {name!r} is {where} the model; {did_you_mean(name, latents)}")


class NegativeELBO:
    """-ELBO of one pair: closed-form KL where Pyro has one, enumeration where sites ask for it, else Monte Carlo.

    Args:
        num_particles: Monte Carlo samples averaged.
        vectorised: the pair accepts a particle dimension on the left, so that particles cost one run.

    The first call runs the pair once with validation on, checks it, and picks the estimator; later calls are plain.
    """

    def __init__(self, num_particles: int = 1, vectorised: bool = False) -> None:
        self.num_particles, self.vectorised = num_particles, vectorised
        self._estimator: Any = None

    def __call__(
        self, model: Callable[..., Any], guide: Callable[..., Any], *args: Any, **kwargs: Any
    ) -> Tensor:
        """A differentiable surrogate whose value is -ELBO in nats, summed over the full data set."""
        if self._estimator is None:
            self._estimator = self._choose(model, guide, args, kwargs)
        # TraceEnum differentiates inside the loss, and would fail where gradients are off.
        enumerating = isinstance(self._estimator, TraceEnum_ELBO)
        with validation(False), torch.set_grad_enabled(enumerating or torch.is_grad_enabled()):
            loss = self._estimator.differentiable_loss(model, guide, *args, **kwargs)
        return loss if isinstance(loss, Tensor) else torch.tensor(float(loss))

    def _choose(
        self, model: Callable[..., Any], guide: Callable[..., Any], args: tuple[Any, ...], kwargs: Any
    ) -> Any:
        # Looking ahead must not move the random stream that the caller's seed stands for.
        with validation(True), torch.random.fork_rng(devices=()), torch.no_grad():
            model_trace, guide_trace = trace_pair(model, guide, args, kwargs)
        model_sites, guide_sites = sample_sites(model_trace), sample_sites(guide_trace)
        check_pair(model_sites, guide_sites)
        options = {
            "num_particles": self.num_particles,
            "vectorize_particles": self.vectorised and self.num_particles > 1,
            "max_plate_nesting": plate_nesting(model_trace, guide_trace),
        }
        if any(site["infer"].get("enumerate") for site in (model_sites | guide_sites).values()):
            return TraceEnum_ELBO(**options)
        order = [name for name, site in model_sites.items() if not site["is_observed"]]
        same_order = order == [name for name in guide_sites if name in order]
        if same_order and all(site["fn"].has_rsample for site in guide_sites.values()):
            closed = guide_sites.keys() == set(order) and all(
                _closed_kl(guide_sites[name]["fn"], model_sites[name]["fn"]) for name in order
            )
            return _ClosedForm(**options) if closed else TraceMeanField_ELBO(**options)
        return Trace_ELBO(**options)


class _ClosedForm(TraceMeanField_ELBO):
    """Pyro's mean-field bound where every KL is known: the draws of latent sites need no scores then."""

    def _get_trace(self, model: Any, guide: Any, args: Any, kwargs: Any) -> tuple[Any, Any]:
        model_trace, guide_trace = trace_pair(model, guide, args, kwargs)
        model_trace.compute_log_prob(lambda _, site: site["is_observed"])
        return model_trace, guide_trace


def _closed_kl(q: Any, p: Any) -> bool:
    """Whether KL(q || p) has a formula."""
    try:
        kl_divergence(q, p)
    except NotImplementedError:
        return False
    return True


@contextlib.contextmanager
def validation(enabled: bool) -> Iterator[None]:
    """Pyro's and torch's argument validation on or off inside the block, as found outside."""
    with pyro.validation_enabled(enabled):
        yield


class ScaledLatents(Messenger):
    """Multiplies the log density of every latent site by beta: the KL weight of a beta-VAE."""

    def __init__(self, beta: float) -> None:
        super().__init__()
        self.beta = beta

    def _pyro_sample(self, msg: Any) -> None:
        if not msg["is_observed"]:
            msg["scale"] = msg["scale"] * self.beta


def log_weights(
    model: Callable[..., Any],
    guide: Callable[..., Any],
    args: tuple[Any, ...],
    num_particles: int,
    vectorised: bool,
) -> dict[str, Tensor]:
    """log p(z_i | ..) - log q(z_i | ..), or log p(x_i | ..), of each site for z ~ q; their sum is log p(x, z)/q(z | x).

    Each is `(num_particles, rows)`; one column where rows are not independent.

    Args:
        model, guide: the pair, observations in place, and `args` what both are called with.
        num_particles: draws of the guide.
        vectorised: the pair keeps one column a row of its plate "data" and accepts a particle dimension on the left.
    """
    with validation(False):
        if not vectorised:
            runs = [_site_weights(*trace_pair(model, guide, args), _total) for _ in range(num_particles)]
            return {name: torch.stack([run[name] for run in runs])[:, None] for name in runs[0]}
        model_trace, guide_trace = trace_pair(model, guide, args)
        check_pair(sample_sites(model_trace), sample_sites(guide_trace))
        nesting = max(plate_nesting(model_trace, guide_trace), 1)
        particles = pyro.plate("particles", num_particles, dim=-1 - nesting)
        traces = trace_pair(particles(model), particles(guide), args)
        weights = _site_weights(*traces, lambda site: _by_row(site, nesting))
        return {name: weight.expand(num_particles, args[0].size) for name, weight in weights.items()}


def _site_weights(
    model_trace: Any, guide_trace: Any, reduce: Callable[[dict[str, Any]], Tensor]
) -> dict[str, Tensor]:
    model_trace.compute_log_prob()
    guide_trace.compute_log_prob()
    weights = {name: reduce(site) for name, site in sample_sites(model_trace).items()}
    for name, site in sample_sites(guide_trace).items():
        weights[name] = weights.get(name, torch.zeros(())) - reduce(site)
    return weights


def _total(site: dict[str, Any]) -> Tensor:
    return site["log_prob"].sum()


def _by_row(site: dict[str, Any], nesting: int) -> Tensor:
    """Sum a site's log density over every plate but the particles (leftmost) and the data (rightmost)."""
    if "data" not in {frame.name for frame in site["cond_indep_stack"]}:
        raise InputError(
            f"Site {site['name']!r} stands outside the plate over the data, so rows have no weights of their own. "
            "Estimate the evidence of such a program as a plain function of all its data."
        )
    log_prob = site["log_prob"]
    padded = log_prob.reshape((1,) * (nesting + 1 - log_prob.ndim) + log_prob.shape)
    return padded.sum(tuple(range(1, nesting))) if nesting > 1 else padded
