"""What Markov chains move in: a log density over unconstrained space, many points at a time.

Points stand in columns, `(dim, n)`: operations between coordinates of many chains then run along contiguous memory.
Where the target holds several data sets, column i belongs to data set i mod `num_sets`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import torch
from pyro.poutine.messenger import Messenger
from torch import Tensor

from probgen.core import Energetic, InputError, ScoreOnly, Site, Target, describe, given
from probgen.randomness import forked_rng
from probgen.targets.bijections import bijection
from probgen.targets.checks import check_known, check_proper, check_repeatable, with_idle_entries
from probgen.targets.choosing import Alone, choose, probe, probe_points
from probgen.targets.point import (
    FirstPoint,
    Values,
    changed_shape,
    changed_structure,
    conditioned,
    first_point,
    following,
)
from probgen.targets.reading import precision, site_dims
from probgen.targets.routes import Single

_COLUMNS_AT_ONCE = 4096  # bounds the memory that turning draws back takes


class Density(ABC):
    """log p(u) over unconstrained space R^dim, up to a constant.

    Attributes:
        dim: number of coordinates.
        dtype, device: of points and densities.
        num_sets: data sets side by side; column i of a batch of points belongs to set i mod `num_sets`.
        sets_shown: whether draws have a dimension for data sets.
        has_log_prob: False where only the gradient is known; `value_and_grad` then returns NaN for the value.
        num_normals: standard normals that one evaluation takes: of a random estimate. `function(u)` then has a second
            argument `normals` `(num_normals, n)`; 0 for densities that are not random.
        network_calls: that one evaluation takes, of all chains at once, the way back not counted; 0 where unknown.
        dims: names of the dimensions of each site after (chain, draw).
    """

    dim: int
    dtype: torch.dtype
    device: torch.device
    num_sets: int = 1
    sets_shown: bool = False
    has_log_prob: bool = True
    num_normals: int = 0
    network_calls: int = 0
    dims: dict[str, tuple[str, ...]]

    @abstractmethod
    def value_and_grad(self, u: Tensor) -> tuple[Tensor, Tensor]:
        """log p(u) `(n,)` and its gradient `(dim, n)`, detached; u `(dim, n)`."""

    @abstractmethod
    def constrain(self, u: Tensor) -> Values:
        """The values of all latent and deterministic sites at u `(dim, n)`: each `(n, *shape)`."""

    @abstractmethod
    def unconstrain(self, values: Mapping[str, Tensor]) -> Tensor:
        """u `(dim, n)` at given values of the latent sites, each `(n, *shape)`; inverse of `constrain`."""

    def function(self, u: Tensor) -> Callable[[Tensor], tuple[Tensor, Tensor]]:
        """`value_and_grad` for points of the shape of u, as plain as it can be given to a compiler."""
        return self.value_and_grad

    def blame(self, u: Tensor) -> str:
        """Which part of the density is not finite at u `(dim, 1)`, in words."""
        return "the log density"


def density(target: Target) -> Density:
    """The density that a program, with what was observed, puts on its unobserved sites.

    Raises `InputError` where nothing is left to draw, `UnsupportedError` for latents that no chain can move.
    """
    if isinstance(target.program, (Energetic, ScoreOnly)) and not target.data:
        from probgen.targets.energies import EnergyDensity

        return EnergyDensity(given(target.program, target.batch.condition))
    return ProgramDensity(target)


class ProgramDensity(Density):
    """The density of a Pyro program's continuous latents, by the fastest route that can be trusted.

    Args:
        target: the program.
        free: a latent whose own law is left out: p(z, y | x) as a function of x and z, if it is x.
    """

    def __init__(self, target: Target, free: str = "") -> None:
        self.target, self.sets, self.num_sets = target, dict(target.sets), max(1, target.num_sets)
        self.sets_shown = bool(self.sets)
        sites = target.latents
        first = first_point(target)
        if not first.latents:
            raise InputError(_nothing_to_draw(target, first))
        _check_same(target, sites, first)
        for name, law in first.laws.items():
            if name != free:
                check_known(target, name, law)
        self.latents = tuple(replace(latent, free=latent.name == free) for latent in first.latents)
        self.nesting = first.nesting
        self.summed_out, self.deterministic = tuple(first.summed_out), first.deterministic
        self.dim, self.device = self.latents[-1].stop, first.device
        self.dtype = max((latent.dtype for latent in self.latents), key=precision)
        self.dims = self._dims()
        self.single = Single(self)
        with forked_rng(0):
            self._look_closer(first.masks)

    def _look_closer(self, masks: Values) -> None:
        """Run the program at a few points: refuse what chains cannot draw from, choose the route."""
        u = probe_points(self)
        self.latents = with_idle_entries(self.latents, masks, self.single, u[:, 0])
        alone = probe(self.single, u)
        check_repeatable(self.target, self.single, u[:, 0], float(alone.value[0]))
        check_proper(self.target, self.latents, self.single, alone)
        self.route = choose(self.single, alone)
        self.transforms = self._fixed_transforms(alone)

    def value_and_grad(self, u: Tensor) -> tuple[Tensor, Tensor]:
        return self.route.forgiving(u)

    def function(self, u: Tensor) -> Callable[[Tensor], tuple[Tensor, Tensor]]:
        return self.route.function(u)

    def constrain(self, u: Tensor) -> Values:
        if self.transforms and not self.deterministic:
            return self._transformed(u, self.transforms)
        step = max(1, _COLUMNS_AT_ONCE // self.num_sets) * self.num_sets
        parts = [self.route.values(part) for part in u.split(step, dim=1)]
        return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}

    def unconstrain(self, values: Mapping[str, Tensor]) -> Tensor:
        missing = [latent.name for latent in self.latents if latent.name not in values]
        if missing:
            raise InputError(
                f"There is no value to start from for {', '.join(map(repr, missing))}: draws of these sites are needed."
            )
        held = {latent.name: values[latent.name].to(latent.dtype) for latent in self.latents}
        n = len(held[self.latents[0].name])
        if self.transforms:
            parts = {name: transform.inv(held[name]) for name, transform in self.transforms.items()}
        else:
            columns = [self._inverse({name: value[i] for name, value in held.items()}, i) for i in range(n)]
            parts = {name: torch.stack([column[name] for column in columns]) for name in columns[0]}
        return torch.cat([parts[latent.name].reshape(n, -1).to(self.dtype) for latent in self.latents], 1).mT

    def blame(self, u: Tensor) -> str:
        for column in range(self.num_sets):
            for name, term in self.single.terms(u[:, 0], column).items():
                if not bool(torch.isfinite(term)):
                    return f"the log density of site {name!r}"
        return "the gradient of the log density"

    def _dims(self) -> dict[str, tuple[str, ...]]:
        sites = self.target.latents
        front = ("data_set",) if self.sets else ()
        latents = {x.name: front + site_dims(sites[x.name]) for x in self.latents}
        records = {
            name: front + tuple(f"{name}_dim_{i}" for i in range(len(shape)))
            for name, shape in self.deterministic.items()
        }
        return latents | records

    def _fixed_transforms(self, alone: Alone) -> dict[str, Any]:
        """The transforms of all latents, where they are the same at every point; else none."""
        with torch.no_grad():
            transforms = self.single.at(torch.zeros_like(alone.u[:, 0]), self.single.data(0)).transforms
        try:
            values = self._transformed(alone.u[:, alone.columns], transforms)
        except (RuntimeError, ValueError, IndexError):  # written for one chain alone
            return {}
        same = all(torch.equal(values[name], alone.sites[name]) for name in values)
        return transforms if same else {}

    def _transformed(self, u: Tensor, transforms: Mapping[str, Any]) -> Values:
        values = {}
        for latent in self.latents:
            rows = u[latent.start : latent.stop].mT.to(latent.dtype)
            values[latent.name] = transforms[latent.name](rows.reshape(-1, *latent.unconstrained_shape))
        return values

    def _inverse(self, values: Values, column: int) -> Values:
        model, args = conditioned(self.target, self.single.data(column))
        inverse = _Inverse(values)
        with forked_rng(0), torch.no_grad(), following(self.target, inverse):
            model(*args)
        return inverse.coordinates


def _check_same(target: Target, sites: Mapping[str, Site], first: FirstPoint) -> None:
    """Raise `InputError` where the program has other latents than when it was read."""
    for latent in first.latents:
        if latent.name not in sites:
            raise changed_structure(target, f"site {latent.name!r} is new")
        site = sites[latent.name]
        if site.batch_shape + site.event_shape != latent.shape:
            raise changed_shape(target, latent, site.batch_shape + site.event_shape)
    known = {latent.name for latent in first.latents} | {*first.summed_out, *first.deterministic}
    for name in sites:
        if name not in known:
            raise changed_structure(target, f"site {name!r} is gone")


def _nothing_to_draw(target: Target, first: FirstPoint) -> str:
    if first.summed_out:
        return (
            f"Nothing to draw: the latents of {describe(target.program)} "
            f"({', '.join(map(repr, first.summed_out))}) are discrete, and are summed out."
        )
    return f"Nothing to draw: every site of {describe(target.program)} is observed, or it has none."


class _Inverse(Messenger):
    """Runs a program with its latents at given values and writes down where they are in unconstrained space."""

    def __init__(self, values: Values) -> None:
        super().__init__()
        self.held, self.reached = values, ""
        self.coordinates: Values = {}

    def _pyro_sample(self, msg: Any) -> None:
        self.reached = msg["name"]
        if not msg["is_observed"] and msg["name"] in self.held:
            z = self.held[msg["name"]]
            self.coordinates[msg["name"]] = bijection(msg["fn"]).inv(z)
            msg["value"], msg["done"] = z, True
