"""What was observed of a prior's draw: Gaussian sites as whitened residuals, the others as log densities."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from pyro.distributions import Distribution, Independent, MultivariateNormal, Normal
from pyro.distributions.torch_distribution import MaskedDistribution
from torch import Tensor
from torch.distributions import Bernoulli, Binomial, Poisson

from probgen.core import InputError
from probgen.distributions import DiagonalNormal
from probgen.priors.noise_aware import NoiseAware
from probgen.targets.point import AtPoint
from probgen.targets.routes import Layout, Vmap, faithfully_recorded

_COUNTS = (Bernoulli, Binomial, Poisson)
_HALF_LOG_2PI = 0.5 * math.log(2 * math.pi)


class Seen(NamedTuple):
    """log p(y, z | x) = -1/2 |residual|^2 + log_scale + rest, at each of n points.

    Args:
        residual: L^-1 (y - loc(x, z)) of all Gaussian sites, LL' their covariance; 0 where masked: `(n, m)`. Those of
            counts are `curved`.
        log_scale: -log |L| - m/2 log 2 pi: `(n,)`.
        rest: log density of all other sites, transforms included, those with a `NoiseAware` law not: `(n,)`. Of counts
            it is what the residual leaves: at any point its gradient in x is zero.
    """

    residual: Tensor
    log_scale: Tensor
    rest: Tensor


class GaussianSites(AtPoint):
    """A program at a point, its observed Gaussian sites kept apart."""

    def __enter__(self) -> Any:
        self.residuals: list[Tensor] = []
        self.log_scales: list[Tensor] = []
        self.squares: list[Tensor] = []
        self.curved: dict[str, Tensor] = {}
        return super().__enter__()

    def _pyro_post_sample(self, msg: Any) -> None:
        if not msg["is_observed"]:
            super()._pyro_post_sample(msg)
            return
        laws = list(_layers(msg["fn"]))
        if isinstance(laws[-1], NoiseAware):
            return
        white = whitened(laws[-1], msg["value"])
        if white is None:
            self._see_other(msg, laws)
            return
        residual, log_scale = white
        batch = log_scale.shape
        scale = _spread(_counted(msg, laws, log_scale), batch)
        each = scale.reshape(scale.shape + (1,) * (residual.ndim - scale.ndim))
        self.residuals.append((each.sqrt() * residual).reshape(-1))
        self.log_scales.append((scale * log_scale).sum())
        squares = each * (msg["value"] - laws[-1].mean).square()
        self.squares.append(squares.flatten(len(batch)).sum(-1) if squares.ndim > len(batch) else squares)

    def _see_other(self, msg: Any, laws: list[Any]) -> None:
        """A site that is not Gaussian is taken as it is; of counts the curvature is a residual, left out of `rest`."""
        super()._pyro_post_sample(msg)
        residual = curved(laws[-1], msg["value"])
        if residual is not None:
            counted = _spread(_counted(msg, laws, residual), residual.shape)
            residual = counted.sqrt() * residual
            self.residuals.append(residual.reshape(-1))
            self.curved[msg["name"]] = 0.5 * residual.square().sum()

    def seen(self) -> Seen:
        """What was met, after a run."""
        u = self.u
        residual = torch.cat([r.to(u.dtype) for r in self.residuals]) if self.residuals else u[:0]
        log_scale = sum(self.log_scales, torch.zeros((), dtype=u.dtype, device=u.device))
        rest = sum(
            (*self.terms.values(), *self.curved.values()), torch.zeros((), dtype=u.dtype, device=u.device)
        )
        return Seen(residual, torch.as_tensor(log_scale).to(u.dtype), rest.to(u.dtype))

    def distance(self) -> Tensor:
        """|y - loc(x)| over all Gaussian sites, in the units of y; summed over the draws of the prior in a plate."""
        x = next(latent for latent in self.latents.values() if latent.free)
        plates = x.shape[: x.batch_dims]
        total = sum(_within(plates, squares) for squares in self.squares)
        assert isinstance(total, Tensor)
        seen = total > 0
        return (torch.where(seen, total, 1.0).sqrt() * seen).sum().to(self.u.dtype)


class SeenByVmap(Vmap):
    """`Seen` of many points u `(dim, n)` at once; operations are recorded once for each number of points."""

    def __init__(self, layout: Layout) -> None:
        super().__init__(layout)
        self._recorded: dict[tuple[str, torch.Size], Callable[[Tensor], Sequence[Tensor]]] = {}

    def seen(self, u: Tensor) -> Seen:
        """At u, `(dim, n)`."""
        return Seen(*self._replayed("seen", self._seen, u))

    def linearised(self, u: Tensor, rows: slice) -> tuple[Seen, Tensor, Tensor]:
        """Beside it -d residual/du and d rest/du for these rows of u: `(n, m, k)` and `(n, k)`."""
        found = self._replayed("linearised", lambda u, data: self._linearised(u, rows, data), u)
        *seen, jacobian, slope = found
        return Seen(*seen), jacobian, slope

    def distance(self, u: Tensor, rows: slice) -> tuple[Tensor, Tensor]:
        """|y - loc(x)| `(n,)` at u `(dim, n)`, and its gradient in these rows of u, `(n, k)`."""
        distance, grad = self._replayed("distance", lambda u, data: self._distance(u, rows, data), u)
        return distance, grad

    def _replayed(self, name: str, function: Callable[[Tensor, Any], Any], u: Tensor) -> Sequence[Tensor]:
        """What a function of one point and its data gives at all of u."""

        def at_all(u: Tensor) -> tuple[Tensor, ...]:
            found = self._over_columns(lambda u, data: dict(enumerate(function(u, data))))(u)
            return tuple(found.values())

        key = name, u.shape
        if key not in self._recorded:
            self._recorded[key] = faithfully_recorded(at_all, u) or at_all
        return self._recorded[key](u)

    def _distance(self, u: Tensor, rows: slice, data: Any) -> tuple[Tensor, Tensor]:
        def of_rows(part: Tensor) -> Tensor:
            point = self.at(torch.cat((u[: rows.start], part, u[rows.stop :])), data)
            assert isinstance(point, GaussianSites)
            return point.distance()

        grad, distance = torch.func.grad_and_value(of_rows)(u[rows])
        return distance, grad

    def _seen(self, u: Tensor, data: Any) -> Seen:
        point = self.at(u, data)
        assert isinstance(point, GaussianSites)
        return point.seen()

    def _linearised(self, u: Tensor, rows: slice, data: Any) -> tuple[Tensor, ...]:
        def of_rows(part: Tensor) -> tuple[Any, Any]:
            seen = self._seen(torch.cat((u[: rows.start], part, u[rows.stop :])), data)
            return (seen.residual, seen.rest), seen.log_scale

        pulled: Any = torch.func.vjp(of_rows, u[rows], has_aux=True)
        (residual, rest), pullback, log_scale = pulled
        eye = torch.eye(len(residual), dtype=u.dtype, device=u.device)
        rows_of = torch.func.vmap(lambda row: pullback((row, torch.zeros_like(rest)))[0])
        jacobian = rows_of(eye) if len(eye) else eye @ u[:0, None].expand(0, rows.stop - rows.start)
        slope = pullback((torch.zeros_like(residual), torch.ones_like(rest)))[0]
        return residual, log_scale, rest, -jacobian, slope

    def _point(self, u: Tensor, nesting: int | None) -> AtPoint:
        return GaussianSites(self.layout.latents, u, nesting, self.layout.target)


def whitened(law: Any, value: Tensor) -> tuple[Tensor, Tensor] | None:
    """(L^-1 (value - loc), -log |L| - k/2 log 2 pi) of a Gaussian law of k values; None of any other.

    >>> law, value = Normal(torch.zeros(2), 2.0), torch.ones(2)
    >>> residual, log_scale = whitened(law, value)
    >>> residual, bool(torch.allclose(log_scale - 0.5 * residual**2, law.log_prob(value)))
    (tensor([0.5000, 0.5000]), True)
    """
    if isinstance(law, Independent):
        inner = whitened(law.base_dist, value)
        if inner is None:
            return None
        dims = tuple(range(-law.reinterpreted_batch_ndims, 0))
        return inner[0], inner[1].sum(dims) if dims else inner[1]
    if isinstance(law, Normal):
        return (value - law.loc) / law.scale, (-law.scale.log() - _HALF_LOG_2PI).expand(law.batch_shape)
    if isinstance(law, DiagonalNormal):
        scale = law.scale.expand(law.loc.shape)
        log_scale = -scale.log() - _HALF_LOG_2PI
        dims = tuple(range(-len(law.event_shape), 0))
        return (value - law.loc) / scale, log_scale.sum(dims) if dims else log_scale
    if isinstance(law, MultivariateNormal):
        tril, gap = law._unbroadcasted_scale_tril, value - law.loc
        residual = torch.linalg.solve_triangular(tril, gap[..., None], upper=False)[..., 0]
        log_scale = -tril.diagonal(dim1=-2, dim2=-1).log().sum(-1) - gap.shape[-1] * _HALF_LOG_2PI
        return residual, log_scale.expand(law.batch_shape)
    return None


def _within(plates: tuple[int, ...], squares: Tensor) -> Tensor:
    """Sums over all but the plates of the prior, which stand on the right of the batch dimensions."""
    if squares.shape[squares.ndim - len(plates) :] != torch.Size(plates):
        raise InputError(
            f"The prior is drawn in plates of shape {plates}, but an observation has batch shape "
            f"{tuple(squares.shape)}: to whose distance it belongs is not known. Observe each draw inside its plate."
        )
    return (
        squares.flatten(0, squares.ndim - len(plates) - 1).sum(0) if squares.ndim > len(plates) else squares
    )


def curved(law: Any, value: Tensor) -> Tensor | None:
    """r with -1/2 r^2 of the gradient of log p(value), and of about its curvature; None of laws that are no counts.

    In its natural parameter eta a law of counts has d log p/d eta = y - mean, and the curvature is the variance; on the
    way to eta(y) it is (y - mean)/(eta(y) - eta) on average. With h^2 the larger one, r = (y - mean)/h, dr = -h d eta.

    >>> law = torch.distributions.Poisson(torch.tensor(4.0))
    >>> curved(law, torch.tensor(0.0)), curved(law, torch.tensor(4.0))
    (tensor(-2.), tensor(0.))
    """
    if isinstance(law, Independent):
        return curved(law.base_dist, value)
    if not isinstance(law, _COUNTS):
        return None
    mean, variance = law.mean.detach(), law.variance.detach()
    gap = value - mean
    on_the_way = gap / (_natural(law, value) - _natural(law, mean))
    h = torch.maximum(variance, on_the_way.nan_to_num(0.0, 0.0, 0.0)).sqrt()
    return gap / h - h / variance * (law.mean - mean)


def _natural(law: Any, mean: Tensor) -> Tensor:
    """The natural parameter at which a law of counts has this mean."""
    if isinstance(law, Poisson):
        return mean.log()
    return torch.logit(mean / law.total_count if isinstance(law, Binomial) else mean)


def _counted(msg: Any, laws: list[Any], like: Tensor) -> Tensor:
    """How often each element counts: scale times masks."""
    scale = torch.as_tensor(msg["scale"]).to(like)
    for mask in (msg["mask"], *(law._mask for law in laws if isinstance(law, MaskedDistribution))):
        if mask is not None:
            scale = scale * torch.as_tensor(mask).to(like)
    return scale


def _layers(law: Distribution) -> Iterator[Any]:
    """The law, and what it masks."""
    yield law
    while isinstance(law, MaskedDistribution):
        law = law.base_dist
        yield law


def _spread(scale: Tensor, batch: torch.Size) -> Tensor:
    try:
        return scale.expand(batch)
    except RuntimeError:
        raise InputError(
            f"A mask or scale of shape {tuple(scale.shape)} does not fit an observation of batch shape {tuple(batch)}: "
            "declare dimensions as events (.to_event(n)) after masking, not before."
        ) from None
