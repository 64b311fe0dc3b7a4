"""Which route to believe: the fastest that says of a few chains what they say alone."""

from __future__ import annotations

import warnings
from typing import NamedTuple

import torch
from torch import Tensor

from probgen.core import describe
from probgen.targets.point import ProgramError, Values
from probgen.targets.reading import first_line
from probgen.targets.routes import Batched, Layout, Route, Single, SlowWarning, Vmap, close

_CHAINS = 11  # of the probes, where there is one data set: a number that the sizes of few programs divide
_SPREAD = 0.3


class Alone(NamedTuple):
    """A few points, and what single chains say at some of them.

    Args:
        u: `(dim, n)`.
        columns: those that were looked at, k of them.
        value, grad: log p `(k,)` and its gradient `(dim, k)`.
        sites: values, each `(k, *shape)`.
    """

    u: Tensor
    columns: list[int]
    value: Tensor
    grad: Tensor
    sites: Values


def probe_points(layout: Layout) -> Tensor:
    """Points about the origin, `(dim, n)`, at least two for each data set."""
    n = max(2, _CHAINS // layout.num_sets) * layout.num_sets
    generator = torch.Generator().manual_seed(0)
    u = _SPREAD * torch.randn(n, layout.dim, generator=generator, dtype=torch.float64)
    return u.mT.to(layout.device, layout.dtype)


def probe(single: Single, u: Tensor) -> Alone:
    """The first, second and last column are looked at; data sets differ between these."""
    columns = sorted({0, 1, u.shape[1] - 1})
    pairs = [single.value_and_grad_at(u[:, i], i) for i in columns]
    value, grad = (torch.stack(parts, -1) for parts in zip(*pairs, strict=True))
    found = [single.values_at(u[:, i], i) for i in columns]
    sites = {name: torch.stack([values[name] for values in found]) for name in found[0]}
    return Alone(u, columns, value, grad, sites)


def choose(single: Single, alone: Alone) -> Route:
    """The first route that runs and agrees with single chains; these, with a `SlowWarning`, if there is none."""
    layout = single.layout
    failures: dict[str, str] = {}  # by reason: ways that fail alike are named once
    for name, route in _routes(layout).items():
        failure = _failure(route, single, alone)
        if failure is None:
            return route
        failures.setdefault(failure, name)
    warnings.warn(
        f"The chains of {describe(layout.target.program)} run one after another, which is slow. Together they fail: "
        + "; ".join(f"{name}, {failure}" for failure, name in failures.items())
        + ". Write choices by torch.where instead of if, avoid .item(), and index and sum from the right "
        "(x[..., 0], x.sum(-1)) so that chains can stand on the left.",
        SlowWarning,
        stacklevel=2,
    )
    return single


def _routes(layout: Layout) -> dict[str, Route]:
    """From fast to slow."""
    return {
        "by vmap": Vmap(layout),
        "by vmap, writing in place": Vmap(layout, writable=True),
        "as a dimension on the left": Batched(layout),
    }


def _failure(route: Route, single: Single, alone: Alone) -> str | None:
    """Why a route cannot be used, with the site where it shows; None where it can."""
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "There is a performance drop")
            value, grad = route.value_and_grad(alone.u)
            sites = route.values(alone.u)
    except ProgramError as error:
        return f"after site {error.site!r}: {_in_short(error.reason)}"
    except Exception as error:  # noqa: BLE001 -- whatever is raised by a program that cannot be followed
        return _in_short(first_line(error))
    columns = alone.columns
    wrong = [name for name in alone.sites if not close(sites[name][columns], alone.sites[name])]
    if not wrong and close(value[columns], alone.value) and close(grad[:, columns], alone.grad):
        return None
    where = wrong or (_wrong_terms(route, single, alone) if isinstance(route, Batched) else [])
    return f"chains change each other{f' at site {where[0]!r}' if where else ''}"


def _in_short(reason: str) -> str:
    """A reason of `vmap`'s in fewer words."""
    return "a choice depends on values" if "data-dependent control flow" in reason else reason


def _wrong_terms(route: Batched, single: Single, alone: Alone) -> list[str]:
    """Sites whose log density is not that of single chains."""
    terms = route.terms(alone.u)
    expected = [single.terms(alone.u[:, i], i) for i in alone.columns]
    return [
        name
        for name in expected[0]
        if not close(terms[name][alone.columns], torch.stack([values[name] for values in expected]))
    ]
