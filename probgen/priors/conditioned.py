"""A program around one fitted prior, as engines that know the prior see it: p(x) p(z) p(y | x, z).

The program is read once: which site is the prior, which other latents z there are, and what was observed. Points are
rows: x `(n, *shape)`, z in unconstrained coordinates `(n, k)`; row i belongs to data set i mod `num_sets`.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from probgen.core import InputError, Target, UnsupportedError, describe, given
from probgen.dynamics import AffineDenoiser, Velocity
from probgen.dynamics.fields import Output
from probgen.priors.noise_aware import NoiseAware
from probgen.priors.observed import GaussianSites, SeenByVmap
from probgen.priors.prior import Prior
from probgen.priors.sites import sites_and_laws
from probgen.processes import Process
from probgen.targets.density import ProgramDensity
from probgen.targets.point import Values
from probgen.targets.point import jacobian as term_of
from probgen.targets.routes import Vmap

_PROBES = 4
_LINEAR = 1e-5  # relative: by how much the derivative of a linear observation may seem to change


class Covariance(Protocol):
    """Cov[x_0 | x_t] as far as observations see it."""

    def between(self, jacobian: Tensor) -> Tensor:
        """J C J' for J `(n, m, size)` or one for all, `(m, size)` -> `(n, m, m)`."""


@dataclass(frozen=True)
class Isotropic:
    """C = variance I.

    Args:
        variance: >= 0.
    """

    variance: float

    def between(self, jacobian: Tensor) -> Tensor:
        """See `Covariance.between`."""
        return self.variance * jacobian @ jacobian.mT


class Marginal(NamedTuple):
    """log p(y, z | x_t) `(n,)`, and its gradient in x_0hat, `(n, *shape)`, the covariance held.

    Where all sites are Gaussian or counts, `residual` is r `(n, m)`, `jacobian` J `(n, m, size)` or `(m, size)`.
    """

    log_prob: Tensor
    grad: Tensor
    residual: Tensor | None = None
    jacobian: Tensor | None = None


class Linear(NamedTuple):
    """Gaussian sites that are linear in x and see nothing else: residual = offset - x J', J = U diag(s) V'.

    Args:
        offset: `(num_sets, m)`; jacobian: `(m, size)`.
        left, singular, right: of J, `(m, r)`, `(r,)`, `(r, size)`.
        constant: log_scale + rest, `(num_sets,)`.
    """

    offset: Tensor
    jacobian: Tensor
    left: Tensor
    singular: Tensor
    right: Tensor
    constant: Tensor


class Conditioned:
    """One fitted prior and all that was observed of its draw.

    Args:
        target: a program with one site whose law is a `Prior`.

    Attributes:
        name, prior: the prior's site and law; `shape` of its value, batch dimensions first, `size` of it flat.
        others: names of the other latents z; `num_others` their unconstrained coordinates, k.
        density: log p(y, z | x) over (x, z), the prior's own law left out: a `Density`.
        linear: where every observation is Gaussian and linear in x, and there is no z; else None.

    Raises:
        InputError: no prior among the latents, several, or observations that do not depend on it.

    >>> import pyro, pyro.distributions as dist
    >>> from probgen.models.gaussian_mixture import GaussianMixture
    >>> from probgen.targets import read
    >>> mixture = GaussianMixture.example()
    >>> def seen():
    ...     x = pyro.sample("x", Prior(mixture))
    ...     pyro.sample("y", dist.Normal(x[..., 0], 0.5))
    >>> conditioned = Conditioned(read(seen, {"y": torch.tensor(1.0)}))
    >>> conditioned.name, conditioned.shape, conditioned.others, conditioned.linear is not None
    ('x', (2,), (), True)
    """

    def __init__(self, target: Target) -> None:
        self.target = target
        self.name, self.prior, self.aware = _read_prior(target)
        self.density = ProgramDensity(target, free=self.name)
        self.num_sets, self.sets_shown = self.density.num_sets, self.density.sets_shown
        self.latent = next(latent for latent in self.density.latents if latent.name == self.name)
        self.rows = slice(self.latent.start, self.latent.stop)
        self.shape, self.size = self.latent.shape, self.latent.stop - self.latent.start
        self.dtype, self.device = self.density.dtype, self.density.device
        self.others = tuple(latent.name for latent in self.density.latents if latent.name != self.name)
        self.num_others = self.density.dim - self.size
        self.wrap: Callable[[Output], Output] = lambda output: output
        self._recorded: dict[int, Callable[[Tensor], tuple[Tensor, Tensor]]] = {}
        self._seen = SeenByVmap(self.density) if self._can_split else None
        self._check_seen()

    # --- the prior ---

    @cached_property
    def program(self) -> Any:
        """The fitted program, at the condition of the prior."""
        return given(self.prior.program, self.prior.condition)

    @cached_property
    def denoiser(self) -> AffineDenoiser:
        """E[x_0 | x_t] of rows x_t `(n * batch, *event)`; `UnsupportedError` where the prior is no diffusion."""
        support = Velocity.supports(self.prior.program)
        if not support or not hasattr(self.prior.program, "denoise"):
            raise UnsupportedError(
                f"Site {self.name!r} has the law {self.prior}, which is no diffusion: it has no denoise(x_t, t). "
                "Engines for what is decoded from noise, and for densities: HMC(space='noise'), HMC."
            )
        return AffineDenoiser.of(self.program).through(self.wrap)

    def with_denoiser(self, denoiser: AffineDenoiser) -> Conditioned:
        """The same observations of draws of another diffusion."""
        _ = self.linear  # found once for both
        other = copy.copy(self)
        other.denoiser = denoiser
        return other

    def through(self, wrap: Callable[[Output], Output]) -> Conditioned:
        """The same with its network wrapped: counted, watched. What asks it at another condition wraps it likewise."""
        other = self.with_denoiser(self.denoiser.through(wrap))
        other.wrap = wrap
        return other

    @property
    def process(self) -> Process:
        """The noising law of the prior."""
        return self.denoiser.process

    def denoised(self, x_t: Tensor, t: float) -> Tensor:
        """E[x_0 | x_t] of x_t `(n, *shape)`: one network call."""
        event = self.prior.event_shape
        return self.denoiser(x_t.reshape(-1, *event), t).reshape(x_t.shape)

    # --- coordinates ---

    def join(self, x: Tensor, z: Tensor | None = None) -> Tensor:
        """u `(dim, n)` of x `(n, *shape)` and z `(n, k)`, None where there is none."""
        flat = x.reshape(len(x), -1).to(self.dtype)
        if z is None:
            return flat.mT
        start = self.rows.start
        return torch.cat((z[:, :start].to(flat), flat, z[:, start:].to(flat)), 1).mT

    def split(self, u: Tensor) -> tuple[Tensor, Tensor]:
        """x `(n, *shape)` and z `(n, k)` of u `(dim, n)`."""
        z = torch.cat((u[: self.rows.start], u[self.rows.stop :])).mT
        return u[self.rows].mT.reshape(-1, *self.shape).to(self.latent.dtype), z

    def values(self, x: Tensor, z: Tensor | None = None) -> Values:
        """The sites at x and z, deterministic ones included: each `(n, *shape)`."""
        return self.density.constrain(self.join(x, z))

    @property
    def dims(self) -> dict[str, tuple[str, ...]]:
        """Names of the dimensions of each site after (chain, draw)."""
        return self.density.dims

    # --- what was observed ---

    def log_lik(self, x: Tensor, z: Tensor | None = None) -> Marginal:
        """log p(y, z | x) and its gradient in x, exactly as the program says."""
        value, grad = self.evaluate(self.join(x, z))
        return Marginal(value, self.split(grad)[0])

    def evaluate(self, u: Tensor) -> tuple[Tensor, Tensor]:
        """log p(y, z | x) `(n,)` and its gradient `(dim, n)` at u `(dim, n)`; recorded once for each n."""
        n = u.shape[1]
        if n not in self._recorded:
            self._recorded[n] = self.density.function(u)
        return self._recorded[n](u)

    def log_aware(self, x_t: Tensor, t: float) -> Marginal | None:
        """sum log p(c | x_t, t) of the `NoiseAware` sites, and its gradient in x_t; None where there are none.

        Where x_t requires gradients, both can be differentiated once more.
        """
        if not self.aware:
            return None
        with torch.enable_grad():
            again = x_t.requires_grad
            x_t = x_t if again else x_t.detach().requires_grad_()
            time = torch.full((1,), t, dtype=x_t.dtype, device=x_t.device)
            total = sum(
                law.log_prob_at(self._value(name, len(x_t)), x_t, time).reshape(len(x_t), -1).sum(1)
                for name, law in self.aware.items()
            )
            assert isinstance(total, Tensor)
            (grad,) = torch.autograd.grad(total.sum(), x_t, create_graph=again)
        return Marginal(total, grad) if again else Marginal(total.detach(), grad)

    def linearised(self, x: Tensor, z: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Whitened residuals r = L^-1 (y - loc(x, z)) of the Gaussian sites `(n, m)`, and J = -dr/dx `(n, m, size)`.

        m is 0 where there are none, or the program cannot be vectorised.
        """
        if self._seen is None:
            flat = x.reshape(len(x), -1).to(self.dtype)
            return flat[:, :0], flat[:, None, :][:, :0]
        seen, jacobian, _ = self._seen.linearised(self.join(x, z), self.rows)
        return seen.residual, jacobian

    def marginal(self, x_0: Tensor, covariance: Covariance, z: Tensor | None = None) -> Marginal:
        """log int p(y, z | x) N(x; x_0, C) dx, Gaussian sites linearised at x_0, the others evaluated there.

        Counts are taken to be Gaussian of the same slope and about the same curvature (see `observed.curved`).

        With S = I + J C J' and the whitened residual r = L^-1 (y - loc(x_0, z)), J = -dr/dx, the Gaussian sites give
        -1/2 r' S^-1 r - 1/2 log |S| - log |L| - m/2 log 2 pi, of gradient J' S^-1 r. `NoiseAware` sites are left out:
        see `log_aware`.

        Args:
            x_0: E[x_0 | x_t], `(n, *shape)`.
            covariance: C = Cov[x_0 | x_t]; `Isotropic(0.0)` evaluates everything at x_0.
            z: the other latents, `(n, k)`.
        """
        if self.linear is not None and isinstance(covariance, Isotropic):
            return self._linear_marginal(x_0, self.linear, covariance.variance)
        if self._seen is None:
            return self.log_lik(x_0, z)
        if self.linear is not None:
            residual, jacobian = self._linear_residual(x_0, self.linear), self.linear.jacobian
            constant, slope = (
                self._each_set(self.linear.constant, len(x_0)),
                torch.zeros_like(residual[:, :1]),
            )
        else:
            seen, jacobian, slope = self._seen.linearised(self.join(x_0, z), self.rows)
            residual, constant = seen.residual, seen.log_scale + seen.rest
        cov = covariance.between(jacobian)
        eye = torch.eye(cov.shape[-1], dtype=cov.dtype, device=cov.device)
        factor = cholesky(0.5 * (cov + cov.mT) + eye)
        solved = torch.cholesky_solve(residual[..., None], factor)[..., 0]
        log_det = 2 * factor.diagonal(dim1=-2, dim2=-1).log().sum(-1)
        log_prob = constant - 0.5 * ((residual * solved).sum(-1) + log_det)
        grad = ((solved[:, None] @ jacobian)[:, 0] + slope).reshape(x_0.shape).to(x_0)
        return (
            Marginal(log_prob, grad, residual, jacobian) if self._in_residuals else Marginal(log_prob, grad)
        )

    def _linear_residual(self, x_0: Tensor, linear: Linear) -> Tensor:
        x = x_0.reshape(len(x_0), -1).to(linear.offset)
        return self._each_set(linear.offset, len(x)) - x @ linear.jacobian.mT

    def _linear_marginal(self, x_0: Tensor, linear: Linear, variance: float) -> Marginal:
        residual = self._linear_residual(x_0, linear)
        along = residual @ linear.left
        shrink = 1 / (1 + variance * linear.singular.square())
        squares = residual.square().sum(1) - (along.square() * (1 - shrink)).sum(1)
        log_prob = self._each_set(linear.constant, len(x_0)) + 0.5 * (shrink.log().sum() - squares)
        grad = (along * shrink * linear.singular) @ linear.right
        return Marginal(log_prob, grad.reshape(x_0.shape).to(x_0), residual, linear.jacobian)

    def distance(self, x_0: Tensor) -> tuple[Tensor, Tensor]:
        """|y - loc(x_0)| over the Gaussian sites, in the units of y, and its gradient: a norm for each draw in a plate.

        Raises:
            UnsupportedError: a site that is not Gaussian, other latents, or a program that cannot be vectorised.
        """
        if self._seen is None or self.not_gaussian or self.num_others or not self.target.data:
            sites = ", ".join(map(repr, self.not_gaussian or self.others or self.target.data)) or "none"
            raise UnsupportedError(
                f"|y - A x_0| is the distance of Gaussian observations from their means; "
                f"{describe(self.target.program)} has other sites: {sites}. Guidances for any likelihood: Jensen, "
                "PiGDM, MomentMatching."
            )
        distance, grad = self._seen.distance(self.join(x_0), self.rows)
        return distance, grad.reshape(x_0.shape).to(x_0)

    @cached_property
    def not_gaussian(self) -> tuple[str, ...]:
        """The observed sites, factors included, whose laws are not Gaussian."""
        if self._seen is None:
            return tuple(self.target.data)
        others = {term_of(latent.name) for latent in self.density.latents} | {*self.others}
        others |= self._met.deterministic.keys()
        return (*(name for name in self._met.terms if name not in others), *self.aware)

    @cached_property
    def _in_residuals(self) -> bool:
        """Whether residuals tell all that was seen, but by `NoiseAware` sites."""
        return {*self.not_gaussian} <= {*self._met.curved, *self.aware}

    @cached_property
    def _met(self) -> GaussianSites:
        """What a run of the program meets."""
        assert self._seen is not None
        met = self._seen.at(self._probes()[:, 0], self.density.single.data(0))
        assert isinstance(met, GaussianSites)
        return met

    @cached_property
    def linear(self) -> Linear | None:
        if self._seen is None or self.num_others or self.aware:
            return None
        probes = self._probes()
        _, jacobian, slope = self._seen.linearised(probes, self.rows)
        if not jacobian.shape[1]:
            return None
        size = jacobian.abs().max()
        same = (jacobian - jacobian[:1]).abs().max() <= _LINEAR * size
        if not bool(same) or bool(slope.abs().max() > 0):
            return None
        first = self._seen.seen(torch.zeros(self.size, self.num_sets, dtype=self.dtype, device=self.device))
        left, singular, right = torch.linalg.svd(jacobian[0], full_matrices=False)
        return Linear(first.residual, jacobian[0], left, singular, right, first.log_scale + first.rest)

    @property
    def _can_split(self) -> bool:
        return isinstance(self.density.route, Vmap) and not self.density.summed_out

    def _probes(self) -> Tensor:
        n = max(1, -(-_PROBES // self.num_sets)) * self.num_sets
        generator = torch.Generator().manual_seed(1)
        u = torch.randn(self.density.dim, n, generator=generator, dtype=torch.float64)
        return u.to(self.device, self.dtype)

    def _each_set(self, value: Tensor, n: int) -> Tensor:
        """One value a data set `(num_sets, ...)` as one a row, `(n, ...)`."""
        return value if len(value) == n else value.repeat(n // len(value), *[1] * (value.ndim - 1))

    def _value(self, name: str, n: int) -> Tensor:
        values = self.target.sets[name] if self.sets_shown else self.target.data[name][None]
        return self._each_set(values.to(self.device), n)

    def _check_seen(self) -> None:
        """Raise `InputError` where nothing that was observed depends on the prior's site."""
        if not self.target.data or self.aware:
            return
        _, grad = self.density.value_and_grad(self._probes())
        if not bool(grad[self.rows].ne(0).any()):
            raise InputError(
                f"No observation depends on site {self.name!r}: what was observed "
                f"({', '.join(map(repr, self.target.data))}) has the same density whatever it is. Is everything "
                "masked, or is another variable used by mistake?"
            )


def cholesky(matrix: Tensor) -> Tensor:
    """The lower factor of each matrix, NaN where it has none: what went wrong is asked of the draws, not here."""
    factor, failed = torch.linalg.cholesky_ex(matrix)
    return torch.where(failed[..., None, None] == 0, factor, torch.nan)


def _read_prior(target: Target) -> tuple[str, Prior, dict[str, NoiseAware]]:
    """The one latent with a `Prior`, and the observed sites with a `NoiseAware` law on its value."""
    sites = sites_and_laws(target)
    priors = {name: law for name, (_, law) in sites.items() if isinstance(law, Prior)}
    found = {name: law for name, law in priors.items() if not sites[name][0]["is_observed"]}
    if len(found) != 1:
        raise InputError(_wrong_number(target, tuple(found), tuple(priors)))
    (name,) = found
    _check_condition(target, name, found[name])
    x = sites[name][0]["value"]
    aware = {
        other: law
        for other, (node, law) in sites.items()
        if node["is_observed"] and isinstance(law, NoiseAware) and _is_same(law.x, x)
    }
    return name, found[name], aware


def _check_condition(target: Target, name: str, prior: Prior) -> None:
    """Raise `InputError` where the prior is another one when other latents are."""
    if prior.condition is None:
        return
    again = sites_and_laws(target, seed=1)[name][1].condition
    if again is None or not torch.equal(prior.condition, again):
        raise InputError(
            f"The condition of the prior at site {name!r} changes with other latents; this engine follows a prior that "
            "stays. Give it a constant condition, or take an engine for densities, such as HMC() or NUTS()."
        )


def _is_same(a: Tensor, b: Tensor) -> bool:
    return a is b or (a.shape == b.shape and a.data_ptr() == b.data_ptr())


def _wrong_number(target: Target, found: tuple[str, ...], priors: tuple[str, ...]) -> str:
    if priors and not found:
        return (
            f"Site {priors[0]!r} of {describe(target.program)}, which has the law of a fitted program, was observed: "
            "nothing is left to infer. Observe what was seen of it, at sites below it."
        )
    if not found:
        return (
            f"{describe(target.program)} has no latent site with the law of a fitted program. Write it as "
            'x = pyro.sample("x", Prior(program)), and what was seen as sites below it, '
            'pyro.sample("y", dist.Normal(x[..., :4, :], 0.1).to_event(3)).'
        )
    return (
        f"{describe(target.program)} has {len(found)} sites with the law of a fitted program "
        f"({', '.join(map(repr, found))}); this engine follows one. Several draws of one program are one site in a "
        'plate: with pyro.plate("images", n): x = pyro.sample("x", Prior(program)).'
    )
