"""What was observed of a prior's draw: Gaussian sites as whitened residuals, the others as log densities."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from pyro.distributions import Distribution, Independent, MultivariateNormal, Normal
from pyro.distributions.torch_distribution import MaskedDistribution
from torch import Tensor

from probgen.core import InputError
from probgen.distributions import DiagonalNormal
from probgen.priors.noise_aware import NoiseAware
from probgen.targets.point import AtPoint
from probgen.targets.routes import Vmap

_HALF_LOG_2PI = 0.5 * math.log(2 * math.pi)


class Seen(NamedTuple):
    """log p(y, z | x) = -1/2 |residual|^2 + log_scale + rest, at each of n points.

    Args:
        residual: L^-1 (y - loc(x, z)) of all Gaussian sites, LL' their covariance; 0 where masked: `(n, m)`.
        log_scale: -log |L| - m/2 log 2 pi: `(n,)`.
        rest: log density of all other sites, transforms included, those with a `NoiseAware` law not: `(n,)`.
    """

    residual: Tensor
    log_scale: Tensor
    rest: Tensor


class GaussianSites(AtPoint):
    """A program at a point, its observed Gaussian sites kept apart."""

    def __enter__(self) -> Any:
        self.residuals: list[Tensor] = []
        self.log_scales: list[Tensor] = []
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
            super()._pyro_post_sample(msg)
            return
        residual, log_scale = white
        batch = log_scale.shape
        masks = [msg["mask"], *(law._mask for law in laws if isinstance(law, MaskedDistribution))]
        scale = torch.as_tensor(msg["scale"]).to(log_scale)
        for mask in masks:
            if mask is not None:
                scale = scale * torch.as_tensor(mask).to(log_scale)
        scale = _spread(scale, batch)
        each = scale.reshape(scale.shape + (1,) * (residual.ndim - scale.ndim))
        self.residuals.append((each.sqrt() * residual).reshape(-1))
        self.log_scales.append((scale * log_scale).sum())

    def seen(self) -> Seen:
        """What was met, after a run."""
        u = self.u
        residual = torch.cat([r.to(u.dtype) for r in self.residuals]) if self.residuals else u[:0]
        log_scale = sum(self.log_scales, torch.zeros((), dtype=u.dtype, device=u.device))
        rest = sum(self.terms.values(), torch.zeros((), dtype=u.dtype, device=u.device))
        return Seen(residual, torch.as_tensor(log_scale).to(u.dtype), rest.to(u.dtype))


class SeenByVmap(Vmap):
    """`Seen` of many points u `(dim, n)` at once."""

    def seen(self, u: Tensor) -> Seen:
        """At u, `(dim, n)`."""
        found = self._over_columns(lambda u, data: self._seen(u, data)._asdict())(u)
        return Seen(**found)

    def linearised(self, u: Tensor, rows: slice) -> tuple[Seen, Tensor, Tensor]:
        """Beside it -d residual/du and d rest/du for these rows of u: `(n, m, k)` and `(n, k)`."""
        found = self._over_columns(lambda u, data: self._linearised(u, rows, data))(u)
        jacobian, slope = found.pop("jacobian"), found.pop("slope")
        return Seen(**found), jacobian, slope

    def _seen(self, u: Tensor, data: Any) -> Seen:
        point = self.at(u, data)
        assert isinstance(point, GaussianSites)
        return point.seen()

    def _linearised(self, u: Tensor, rows: slice, data: Any) -> dict[str, Tensor]:
        def of_rows(part: Tensor) -> tuple[Any, Any]:
            seen = self._seen(torch.cat((u[: rows.start], part, u[rows.stop :])), data)
            return (seen.residual, seen.rest), seen.log_scale

        pulled: Any = torch.func.vjp(of_rows, u[rows], has_aux=True)
        (residual, rest), pullback, log_scale = pulled
        eye = torch.eye(len(residual), dtype=u.dtype, device=u.device)
        rows_of = torch.func.vmap(lambda row: pullback((row, torch.zeros_like(rest)))[0])
        jacobian = rows_of(eye) if len(eye) else eye @ u[:0, None].expand(0, rows.stop - rows.start)
        slope = pullback((torch.zeros_like(residual), torch.ones_like(rest)))[0]
        return {
            "residual": residual,
            "log_scale": log_scale,
            "rest": rest,
            "jacobian": -jacobian,
            "slope": slope,
        }

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
