"""Discrete latents summed out: the log density of a program with its finite sites marginalised.

Every latent over a finite set is given all of its values at once, each along a dimension of its own, left of chains and
plates. The log densities are then factors f(z_1, z_2, ...), and

    log p(u) = log sum_z prod_i f_i(z)

is worked out by eliminating one discrete site after another, those in the deepest plates first.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from pyro.distributions.util import scale_and_mask
from pyro.poutine.enum_messenger import EnumMessenger
from pyro.poutine.util import site_is_subsample
from torch import Tensor

from probgen.core import ProbgenError, UnsupportedError
from probgen.targets.point import AtPoint, Latent, is_record, is_summed_out


class SummedOut(AtPoint):
    """A program at a point of unconstrained space, as `AtPoint`, its discrete latents summed out.

    Args:
        latents, u, nesting, target: as for `AtPoint`.
        num_plates: how many batch dimensions the sites have at most: dimensions further left are free for sums.
        deterministic: shapes of the deterministic sites.

    Raises `UnsupportedError` where the sum cannot be had plate by plate, or the program cannot take all values at once.

    Source: Obermeyer et al. (2019), arXiv 1902.03210, for sums inside plates.
    """

    def __init__(
        self,
        latents: Iterable[Latent],
        u: Tensor,
        nesting: int | None = None,
        target: Any = None,
        *,
        num_plates: int,
        deterministic: Mapping[str, tuple[int, ...]],
    ) -> None:
        super().__init__(latents, u, nesting, target)
        self.deterministic_shapes = deterministic
        self.chain_dim = None if nesting is None else -1 - nesting
        self._enumerate = _Enumerate(first_available_dim=-1 - num_plates - (nesting is not None))

    def __enter__(self) -> Any:
        self.factors: list[Factor] = []
        self.summed: dict[Dim, Summed] = {}
        super().__enter__()
        self._enumerate.__enter__()
        return self

    def __exit__(self, kind: Any, error: Any, trace: Any) -> None:
        self._enumerate.__exit__(kind, error, trace)
        super().__exit__(kind, error, trace)
        if isinstance(error, Exception) and not isinstance(error, ProbgenError):
            raise UnsupportedError(self._all_at_once_failed(error)) from error
        if error is None and self.factors:
            chains = () if self.chain_dim is None else self.u.shape[1:]
            totals = sum_out(self.factors, self.summed)
            self.terms |= {name: total.expand(chains) for name, total in totals.items()}

    def _check_shape(self, latent: Latent, fn: Any) -> None:
        """Laws that depend on discrete sites have dimensions for their values."""

    def _pyro_post_sample(self, msg: Any) -> None:
        if is_record(msg):
            self._check_deterministic(msg)
        elif not site_is_subsample(msg):
            factor = self._factor(msg)
            own = msg["infer"].get("_enumerate_dim")
            if own is not None:
                self.summed[Dim(SUM, self._enumerate.numbers(msg)[own])] = Summed(msg["name"], factor.plates)
            if factor.sums:
                self.factors.append(factor)
                return
        super()._pyro_post_sample(msg)

    def _check_deterministic(self, msg: Any) -> None:
        """A deterministic value is recorded with the draws: it must be one where discrete sites have none."""
        expected = self.deterministic_shapes.get(msg["name"])
        if self.chain_dim is None and expected is not None and tuple(msg["value"].shape) != expected:
            raise UnsupportedError(
                f"Deterministic site {msg['name']!r} depends on discrete latents, which are summed out and have no "
                "value: leave it out, and work it out afterwards."
            )

    def _factor(self, msg: Any) -> Factor:
        """The log density of a site with a name for each dimension that is longer than one."""
        log_prob = msg["fn"].log_prob(msg["value"], *msg["args"], **msg["kwargs"])
        log_prob = scale_and_mask(log_prob, mask=msg["mask"])
        names = {frame.dim: Dim(PLATE, frame.name) for frame in msg["cond_indep_stack"] if frame.vectorized}
        names |= {dim: Dim(SUM, number) for dim, number in self._enumerate.numbers(msg).items()}
        if self.chain_dim is not None:
            names[self.chain_dim] = Dim(CHAINS, 0)
        found = {}
        for dim in range(-log_prob.ndim, 0):
            if log_prob.shape[dim] > 1:
                found[dim] = names.get(dim) or self._undeclared(msg["name"], dim, log_prob.shape[dim])
        order = sorted(found, key=lambda dim: found[dim])
        value = log_prob.reshape([size for size in log_prob.shape if size > 1])
        positions = {dim: i for i, dim in enumerate(found)}
        return Factor(
            msg["name"],
            value.permute([positions[dim] for dim in order]),
            tuple(found[dim] for dim in order),
            msg["scale"],
        )

    def _undeclared(self, name: str, dim: int, size: int) -> Dim:
        """A batch dimension that no plate declares: one of its own where the program has it without sums too."""
        batch = (
            self.target.sites[name].batch_shape
            if self.target is not None and name in self.target.sites
            else ()
        )
        if len(batch) >= -dim and batch[dim] == size:
            return Dim(PLATE, f"dimension {dim} of size {size}")
        raise UnsupportedError(
            f"Site {name!r} has a dimension {dim} of size {size} that belongs to no plate: discrete latents that are "
            "summed out have all their values along dimensions on the far left. Index and sum from the right "
            "(table[..., z], x.sum(-1, keepdim=True)), and declare every batch dimension by pyro.plate."
        )

    def _all_at_once_failed(self, error: Exception) -> str:
        text = str(error).strip().splitlines()
        return (
            f"Discrete latents are summed out by giving each all of its values at once, along a dimension on the far "
            f"left, and that failed at site {self.reached!r}: {type(error).__name__}: {text[0] if text else ''} "
            "Write choices by torch.where instead of if, index by pyro.ops.indexing.Vindex, declare batch dimensions "
            "by pyro.plate, or sum the site out by hand."
        )


class _Enumerate(EnumMessenger):
    """Pyro's messenger, for every latent over a finite set; nearer to the program than the point it is run at."""

    def numbers(self, msg: Any) -> dict[int, int]:
        """The discrete sites a site may depend on, itself included: their numbers by dimension."""
        return msg["infer"].get("_dim_to_id", {}) | self._param_dims.get(msg["name"], {})

    def _pyro_sample(self, msg: Any) -> None:
        if not msg["is_observed"] and not site_is_subsample(msg) and is_summed_out(msg):
            msg["infer"] = msg["infer"] | {"enumerate": "parallel"}
        super()._pyro_sample(msg)

    def _pyro_post_sample(self, msg: Any) -> None:
        # Pyro reads `value.data`, for its shape alone: what vmap forbids.
        super()._pyro_post_sample(msg | {"value": torch.empty(msg["value"].shape, device="meta")})


# --- factors ------------------------------------------------------------------------------------------------------

CHAINS, PLATE, SUM = 0, 1, 2


class Dim(NamedTuple):
    """A named dimension: of chains, of a plate, or of the values of a discrete site; sorted in this order."""

    kind: int
    key: Any


class Summed(NamedTuple):
    """A discrete site, and the plates it stands in."""

    name: str
    plates: frozenset[Dim]


class Factor(NamedTuple):
    """Log densities over named dimensions, which are sorted; `scale` has yet to multiply them."""

    name: str
    value: Tensor
    dims: tuple[Dim, ...]
    scale: Any = 1.0

    @property
    def plates(self) -> frozenset[Dim]:
        """Those of its dimensions that are plates."""
        return frozenset(dim for dim in self.dims if dim.kind == PLATE)

    @property
    def sums(self) -> frozenset[Dim]:
        """Those of its dimensions that are discrete sites."""
        return frozenset(dim for dim in self.dims if dim.kind == SUM)


def sum_out(factors: Sequence[Factor], summed: dict[Dim, Summed]) -> dict[str, Tensor]:
    """log sum_z prod_i f_i, `()` or `(chains,)`, for each group of factors that share discrete sites."""
    totals = {}
    for group in _connected(factors):
        for factor in group:
            _check_plates(factor, summed)
        scaled, scale = _scaled(group, summed)
        names = sorted({summed[dim].name for factor in group for dim in factor.sums})
        totals[f"sum over {', '.join(names)}"] = scale * sum(
            part.value for part in _eliminate(scaled, summed)
        )
    return totals


def _connected(factors: Sequence[Factor]) -> list[list[Factor]]:
    """Groups of factors that share discrete sites, directly or through others."""
    groups: list[tuple[set[Dim], list[Factor]]] = []
    for factor in factors:
        touching = [group for group in groups if group[0] & factor.sums]
        groups = [group for group in groups if not group[0] & factor.sums]
        dims = set(factor.sums).union(*(group[0] for group in touching))
        groups.append((dims, [*(member for group in touching for member in group[1]), factor]))
    return [members for _, members in groups]


def _check_plates(factor: Factor, summed: dict[Dim, Summed]) -> None:
    """A factor that depends on a discrete site inside a plate must itself be inside that plate."""
    for dim in factor.sums:
        outside = summed[dim].plates - factor.plates
        if outside:
            raise UnsupportedError(
                f"Site {factor.name!r} depends on {summed[dim].name!r} but stands outside of its plate "
                f"{min(outside).key!r}: all joint values of that plate would have to be summed. Move the site into the "
                "plate, make the plate sequential (for i in pyro.plate(...)), or sum out by hand."
            )


def _scaled(group: list[Factor], summed: dict[Dim, Summed]) -> tuple[list[Factor], Any]:
    """Scales taken in, or one for all taken out: (sum_z prod f)^s where discrete sites are scaled with the rest."""
    own = {site.name for site in summed.values()}
    scales = [float(factor.scale) for factor in group]
    if all(scale == scales[0] for scale in scales):
        return group, group[0].scale
    if any(scale != 1 and factor.name in own for factor, scale in zip(group, scales, strict=True)):
        named = {factor.name: scale for factor, scale in zip(group, scales, strict=True)}
        raise UnsupportedError(
            f"Discrete sites that are summed out together, and what depends on them, must have one scale; got {named}."
        )
    return [factor._replace(value=factor.value * factor.scale) for factor in group], 1.0


def _eliminate(factors: list[Factor], summed: dict[Dim, Summed]) -> list[Factor]:
    """Factors of chains alone, whose product is the sum over all discrete sites."""
    done: list[Factor] = []
    while factors:
        leaf = max((factor.plates for factor in factors), key=len)
        here = [factor for factor in factors if factor.plates == leaf]
        factors = [factor for factor in factors if factor.plates != leaf]
        inner = {dim for factor in here for dim in factor.sums if summed[dim].plates == leaf}
        for dim in sorted(inner, reverse=True):  # what was drawn last depends on what was drawn before
            holding = [factor for factor in here if dim in factor.dims]
            here = [factor for factor in here if dim not in factor.dims]
            here.append(_log_sum(_product(holding), dim))
        for factor in here:
            outer = factor.sums and frozenset().union(*(summed[dim].plates for dim in factor.sums))
            if outer == leaf and leaf:
                raise UnsupportedError(_not_a_tree(factor, summed))
            left = _over_plates(factor, leaf - outer)
            (factors if left.sums else done).append(left)
    return done


def _product(factors: list[Factor]) -> Factor:
    dims = tuple(sorted({dim for factor in factors for dim in factor.dims}))
    value = sum(
        factor.value[tuple(slice(None) if dim in factor.dims else None for dim in dims)] for factor in factors
    )
    assert isinstance(value, Tensor)
    return Factor(factors[0].name, value, dims)


def _log_sum(factor: Factor, dim: Dim) -> Factor:
    value = torch.logsumexp(factor.value, factor.dims.index(dim))
    return factor._replace(value=value, dims=tuple(other for other in factor.dims if other != dim))


def _over_plates(factor: Factor, plates: frozenset[Dim]) -> Factor:
    """The product over plates, which are independent given what is outside of them."""
    positions = [i for i, dim in enumerate(factor.dims) if dim in plates]
    value = factor.value.sum(positions) if positions else factor.value
    return factor._replace(value=value, dims=tuple(dim for dim in factor.dims if dim not in plates))


def _not_a_tree(factor: Factor, summed: dict[Dim, Summed]) -> str:
    sites = ", ".join(f"{summed[dim].name!r}" for dim in sorted(factor.sums))
    plates = ", ".join(repr(dim.key) for dim in sorted(factor.plates))
    return (
        f"Site {factor.name!r} joins the discrete sites {sites} of independent plates ({plates}): the sum over all of "
        "them grows exponentially with the size of a plate. Make one of the plates sequential "
        "(for i in pyro.plate(...)), nest the plates, or sum out by hand."
    )
