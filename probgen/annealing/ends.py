"""The two ends of paths over real coordinates: a Gaussian and an energy; a prior, or a guide, and a posterior."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping
from typing import Any, Literal

import torch
from pyro import poutine
from pyro.distributions.util import scale_and_mask
from pyro.poutine.messenger import Messenger
from pyro.poutine.util import site_is_subsample
from torch import Tensor
from torch.distributions import MultivariateNormal

from probgen.bounds import Sites, sample_sites, trace_pair, validation
from probgen.core import Batch, InputError, UnsupportedError, describe, given
from probgen.kernels.core import Point
from probgen.targets.bijections import bijection
from probgen.targets.energies import EnergyDensity
from probgen.targets.graphs import recorded
from probgen.targets.point import is_record, is_summed_out

Start = Literal["prior", "guide"]
Evaluate = Callable[[Tensor], tuple[Tensor, Tensor]]
_ALIKE = 1e-4  # relative: what is recorded and what it is recorded from
_LEAST_LEANING = 1e-3  # of fitted covariances towards their diagonals, so that they stay positive definite
_FAR = 10.0  # times as far out an energy that has a Z is higher


class GaussianToEnergy:
    """From N(m, S S') to exp(-E(x)), in coordinates u with x = m + S u: N(0, I) to exp(-E(m + S u)) |S|.

    Args:
        program: with `energy(x)`.
        num_runs: side by side.
        condition: one for each row of the data, `(rows, ...)`; None where E is the same for all.
        law: N(m, S S') over the flat x; None is N(0, I).
    """

    def __init__(
        self,
        program: Any,
        num_runs: int,
        condition: Tensor | None = None,
        law: MultivariateNormal | None = None,
    ) -> None:
        self.program, self.num_runs, self.condition = program, num_runs, condition
        self.num_rows = 1 if condition is None else len(condition)
        density = EnergyDensity(given(program, None))
        density.program = given(program, None if condition is None else repeated(condition, num_runs))
        self.like = torch.zeros(
            density.dim, num_runs * self.num_rows, dtype=density.dtype, device=density.device
        )
        self.loc, self.scale = self._loc_and_scale(law)
        self.log_scale = self.scale.diagonal().log().sum()
        self.density = density.function(self.like)
        self.log_partition = self.like.new_zeros(() if condition is None else (self.num_rows,))

    def draw(self) -> Point:
        """N(0, I)."""
        return self.at(torch.randn_like(self.like))

    def at(self, position: Tensor) -> Point:
        """log N(u; 0, I) and -E(m + S u) + log |S|."""
        log_prob, grad = self.density(self.loc + self.scale @ position)
        normal = -0.5 * (position.square().sum(0) + len(position) * math.log(2 * math.pi))
        return Point(
            position,
            torch.stack([normal, log_prob + self.log_scale]),
            torch.stack([-position, self.scale.mT @ grad]),
        )

    def check_bounded(self, position: Tensor) -> None:
        """Raise `InputError` where most of these points, `(dim, n)`, are less likely than ten times as far out."""
        far = self.at(_FAR * position).log_prob[1] > self.at(position).log_prob[1]
        if far.float().mean() > 0.5 or not bool(torch.isfinite(position).all()):
            raise InputError(
                f"The energy of {describe(self.program)} does not seem to be bounded below: ten times as far out as "
                "runs went it is lower still, so that there is no Z. Let it rise far from the data, e.g. "
                "EBM(..., base_scale=2.0)."
            )

    def wider(self, position: Tensor) -> GaussianToEnergy:
        """The same energy from a Gaussian that covers this one and the points `(dim, n)`, by mean and covariance."""
        both = torch.cat([torch.randn_like(self.like), position], 1)
        return GaussianToEnergy(
            self.program, self.num_runs, self.condition, fitted((self.loc + self.scale @ both).mT)
        )

    def _loc_and_scale(self, law: MultivariateNormal | None) -> tuple[Tensor, Tensor]:
        dim = len(self.like)
        if law is None:
            return self.like.new_zeros(dim, 1), torch.eye(dim).to(self.like)
        if law.event_shape != (dim,) or law.batch_shape:
            raise InputError(
                f"AIS: base must be one Gaussian over the {dim} coordinates of x of {describe(self.program)}, got "
                f"event shape {tuple(law.event_shape)}, batch shape {tuple(law.batch_shape)}."
            )
        return law.loc[:, None].to(self.like), law.scale_tril.to(self.like)


def fitted(x: Tensor) -> MultivariateNormal | None:
    """The Gaussian with mean and covariance of points `(n, dim)`; None for fewer than two.

    The covariance leans towards its diagonal, the more the fewer points there are.
    """
    count, dim = x.shape
    if count < 2:
        return None
    covariance = torch.cov(x.mT).reshape(dim, dim)
    own = covariance.diagonal().clamp_min(1e-12).diag()
    leaning = max(_LEAST_LEANING, dim / (dim + count))
    return MultivariateNormal(x.mean(0), torch.lerp(covariance, own, leaning))


class PriorToPosterior:
    """From p(z), or q(z | x), to p(z) p(x | z), for each row x of the data, in unconstrained coordinates of z.

    The program is run on all runs of all rows as on one batch, and its operations are recorded.

    Args:
        program: with a guide, its latents continuous and one value a row.
        batch: the data.
        num_runs: of each row.
        start: "prior" or "guide".

    Raises:
        UnsupportedError: a latent that is discrete, fixed by the guide, or not one value a row.
    """

    def __init__(self, program: Any, batch: Batch, num_runs: int, start: Start = "prior") -> None:
        self.program, self.start, self.num_rows = program, start, batch.size
        self.batch = Batch(
            {name: repeated(value, num_runs) for name, value in batch.data.items()},
            None if batch.condition is None else repeated(batch.condition, num_runs),
        )
        self.model = poutine.condition(program.model, data=self.batch.data)
        sites = self._drawn()
        self.latents = list(self._checked(sites))
        u = self._coordinates(sites)
        self._evaluate = self._recorded(u)
        self.log_partition = u.new_zeros(batch.size)

    def draw(self) -> Point:
        """Draws of the prior, or of the guide."""
        return self.at(self._coordinates(self._drawn()))

    def where(self, latents: Mapping[str, Tensor]) -> Point:
        """Runs that begin at given values of the latents, one a row, `(rows, *event)`: each row's at the same."""
        missing = [name for name in self.latents if name not in latents]
        if missing:
            raise InputError(
                f"AIS: the reverse runs of {describe(self.program)} begin at the latents that made the data, and "
                f"{', '.join(map(repr, missing))} is missing. Simulate both: draws = infer(program, Ancestral()), then "
                "data={'x': draws.flat('x'), 'z': draws.flat('z')}."
            )
        num_runs = self.batch.size // self.num_rows
        data = {name: repeated(latents[name], num_runs) for name in self.latents}
        trace = poutine.trace(poutine.condition(self.model, data=data)).get_trace(self.batch)
        return self.at(self._coordinates(sample_sites(trace)))

    def at(self, position: Tensor) -> Point:
        """log densities of both ends with the transforms' part, and their gradients."""
        return Point(position, *self._evaluate(position))

    def _recorded(self, u: Tensor) -> Evaluate:
        """`_differentiated`, written down for points of this shape; itself where that cannot be done."""

        def both(u: Tensor) -> tuple[Tensor, Tensor]:
            def last(u: Tensor) -> tuple[Tensor, tuple[Tensor, Tensor]]:
                ends = self._ends(u)
                return ends[1].sum(), ends

            first = torch.func.grad(lambda u: self._ends(u)[0].sum())(u)
            second, ends = torch.func.grad(last, has_aux=True)(u)
            return torch.stack(ends), torch.stack([first, second])

        elsewhere = u + 0.1
        try:
            graph: Evaluate = recorded(both, u)
            pairs = zip(graph(elsewhere), self._differentiated(elsewhere), strict=True)
        except Exception:  # noqa: BLE001 - whatever a program raises that cannot be followed
            return self._differentiated
        alike = all(torch.allclose(a, b, _ALIKE, _ALIKE * float(b.abs().max())) for a, b in pairs)
        return graph if alike else self._differentiated

    def _differentiated(self, u: Tensor) -> tuple[Tensor, Tensor]:
        with torch.enable_grad():
            u = u.detach().requires_grad_()
            ends = self._ends(u)
            grads = [torch.autograd.grad(end.sum(), u, retain_graph=True)[0] for end in ends]
        return torch.stack(ends).detach(), torch.stack(grads)

    def _ends(self, u: Tensor) -> tuple[Tensor, Tensor]:
        placed, joint = _Placed(self._parts(u)), _RowSums(self.latents)
        with validation(False), placed, joint:
            self.model(self.batch)
        last = joint.latent + joint.seen + placed.jacobian
        if self.start == "prior":
            return joint.latent + placed.jacobian, last
        guide = _RowSums(self.latents)
        with validation(False), guide:
            poutine.condition(self.program.guide, data=placed.values)(self.batch)
        return guide.latent + placed.jacobian, last

    def _drawn(self) -> Sites:
        """The model's sites, its latents drawn from itself or from the guide."""
        with validation(False):
            if self.start == "prior":
                return sample_sites(poutine.trace(self.model).get_trace(self.batch))
            return sample_sites(trace_pair(self.model, self.program.guide, (self.batch,))[0])

    def _coordinates(self, sites: Sites) -> Tensor:
        """u `(dim, n)` of the latents' values."""
        parts = [bijection(sites[name]["fn"]).inv(sites[name]["value"]) for name in self.latents]
        self.event_shapes = [part.shape[1:] for part in parts]
        return torch.cat([part.reshape(len(part), -1) for part in parts], 1).mT.contiguous()

    def _parts(self, u: Tensor) -> dict[str, Tensor]:
        sizes = [shape.numel() for shape in self.event_shapes]
        parts = zip(self.latents, u.mT.split(sizes, 1), self.event_shapes, strict=True)
        return {name: part.reshape(len(part), *shape) for name, part, shape in parts}

    def _checked(self, sites: Sites) -> Sites:
        """The latent sites, all of which a chain of each row can move."""
        latents = {name: site for name, site in sites.items() if not site["is_observed"]}
        for name, site in latents.items():
            shape, count = tuple(site["fn"].batch_shape), self.batch.size
            fault = (
                "is discrete"
                if is_summed_out(site) or site["fn"].support.is_discrete
                else "follows from others"
                if is_record(site)
                else f"has batch shape {shape} for {count} rows, not one value a row"
                if shape != (count,)
                else ""
            )
            if fault:
                raise UnsupportedError(
                    f"AIS moves continuous latents of one row at a time; site {name!r} of {describe(self.program)} "
                    f"{fault}. What can: ELBOEstimate, ImportanceWeighted."
                )
        return latents


class _Placed(Messenger):
    """Sets latents to T(u); `values` are these, `jacobian` the sum of log |det dT/du| by row."""

    def __init__(self, u: Mapping[str, Tensor]) -> None:
        super().__init__()
        self.u = u
        self.values: dict[str, Tensor] = {}
        self.jacobian = torch.zeros(())

    def _pyro_sample(self, msg: Any) -> None:
        u = self.u.get(msg["name"])
        if u is None:
            return
        transform = bijection(msg["fn"])
        z = self.values[msg["name"]] = transform(u)
        self.jacobian = self.jacobian + transform.log_abs_det_jacobian(u, z).reshape(len(u), -1).sum(1)
        msg["value"], msg["done"] = z, True


class _RowSums(Messenger):
    """Adds up log densities by row, those of the latents and all others apart."""

    def __init__(self, latents: Collection[str]) -> None:
        super().__init__()
        self.latents = latents
        self.latent = self.seen = torch.zeros(())

    def _pyro_post_sample(self, msg: Any) -> None:
        if site_is_subsample(msg):
            return
        log_prob = scale_and_mask(msg["fn"].log_prob(msg["value"]), msg["scale"], msg["mask"])
        by_row = log_prob.reshape(-1, log_prob.shape[-1]).sum(0)
        if msg["name"] in self.latents:
            self.latent = self.latent + by_row
        else:
            self.seen = self.seen + by_row


def repeated(value: Tensor, times: int) -> Tensor:
    """All rows, then all rows again: `(times * rows, ...)`."""
    return value.repeat(times, *[1] * (value.ndim - 1))
