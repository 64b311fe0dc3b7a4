"""Ways from a program of one chain to many chains at once: `vmap`, `batched`, one after another.

`vmap` follows any program that is a function of tensors. What it cannot enter (ODE solvers, sums over discrete sites,
custom autograd) is run with chains as a dimension on the left of all plates, and believed only where it agrees with
running single chains. What remains is run one chain after another.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor
from torch.fx import GraphModule
from torch.overrides import TorchFunctionMode

from probgen.core import Target
from probgen.targets.enumeration import SummedOut
from probgen.targets.graphs import recorded
from probgen.targets.point import AtPoint, Latent, Values, conditioned, following

Evaluate = Callable[[Tensor], tuple[Tensor, Tensor]]


_AGREEMENT = 1e-3  # relative: adaptive ODE solvers take other steps for other batches


class SlowWarning(UserWarning):
    """Chains run one after another because neither way of running them together works for this program."""


class Layout(Protocol):
    """What a route needs to know of a program."""

    target: Target
    latents: tuple[Latent, ...]
    nesting: int
    summed_out: tuple[str, ...]
    sets: Values
    num_sets: int
    deterministic: dict[str, tuple[int, ...]]
    dim: int
    dtype: torch.dtype
    device: torch.device


class Route:
    """Evaluates a program at many points u `(dim, n)`; column i belongs to data set i mod `num_sets`.

    `value_and_grad(u)` gives log p `(n,)` and its gradient `(dim, n)`; `values(u)` the sites, each `(n, *shape)`. Where
    u holds some columns of more, their indices `(n,)` are given beside it.
    """

    def __init__(self, layout: Layout) -> None:
        self.layout = layout

    def value_and_grad(self, u: Tensor, columns: Tensor | None = None) -> tuple[Tensor, Tensor]:
        raise NotImplementedError

    def forgiving(self, u: Tensor, columns: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """`value_and_grad`, with log p = -inf and a gradient of NaN where the program fails.

        An ODE solver or a factorisation may fail far from where the posterior is: such points are never accepted. A
        trajectory ends there, as nothing is finite on its way from a gradient of NaN. Where the program fails for
        columns together, those that are not finite are left out, and the others taken apart by halving.
        """
        try:
            return self.value_and_grad(u, columns)
        except Exception:  # noqa: BLE001 -- programs raise what they like
            n = u.shape[1]
        value, grad = u.new_full((n,), -torch.inf), torch.full_like(u, torch.nan)
        columns = torch.arange(n, device=u.device) if columns is None else columns
        finite = torch.isfinite(u).all(0).nonzero()[:, 0]
        parts = finite.tensor_split(2) if len(finite) == n else [finite]
        for part in parts:
            if 0 < len(part) < n:
                value[part], grad[:, part] = self.forgiving(u[:, part], columns[part])
        return value, grad

    def chosen(self, columns: Tensor | None, n: int) -> Values:
        """The data set of each of n columns, `(n, ...)`."""
        columns = torch.arange(n) if columns is None else columns
        return {name: value[columns % self.layout.num_sets] for name, value in self.layout.sets.items()}

    def values(self, u: Tensor) -> Values:
        raise NotImplementedError

    def function(self, u: Tensor) -> Evaluate:
        """`forgiving` for points of the shape of u, as plain as it can be given to a compiler."""
        return self.forgiving

    def at(self, u: Tensor, data: Values, nesting: int | None = None) -> AtPoint:
        """Run the program once at u, and return what was met; enumerated sites are summed out."""
        layout = self.layout
        model, args = conditioned(layout.target, data, stacked=nesting is not None)
        point = self._point(u, nesting)
        with following(layout.target, point):
            model(*args)
        return point

    def _point(self, u: Tensor, nesting: int | None) -> AtPoint:
        layout = self.layout
        if not layout.summed_out:
            return AtPoint(layout.latents, u, nesting, layout.target)
        return SummedOut(
            layout.latents,
            u,
            nesting,
            layout.target,
            num_plates=layout.nesting,
            deterministic=layout.deterministic,
        )


class Single(Route):
    """One chain after another."""

    def value_and_grad(self, u: Tensor, columns: Tensor | None = None) -> tuple[Tensor, Tensor]:
        indices = range(u.shape[1]) if columns is None else columns.tolist()
        pairs = [self.value_and_grad_at(u[:, i], column) for i, column in enumerate(indices)]
        return torch.stack([value for value, _ in pairs]), torch.stack([grad for _, grad in pairs], 1)

    def values(self, u: Tensor) -> Values:
        found = [self.values_at(u[:, i], i) for i in range(u.shape[1])]
        return {name: torch.stack([values[name] for values in found]) for name in found[0]}

    def value_and_grad_at(self, u: Tensor, column: int) -> tuple[Tensor, Tensor]:
        """log p `()` and its gradient `(dim,)` at u `(dim,)`, with the data set of a column."""
        return self._differentiated(u, AtPoint.log_prob, column)

    def values_at(self, u: Tensor, column: int) -> Values:
        """The sites, likewise."""
        with torch.no_grad():
            run = self._run(u, column)
        return run.values | run.deterministic

    def terms(self, u: Tensor, column: int = 0) -> Values:
        """The log density of each site, likewise."""
        with torch.no_grad():
            return self._run(u, column).terms

    def without_jacobians(self, u: Tensor, column: int = 0) -> tuple[Tensor, Tensor]:
        """log p(z(u), x), the density of the sites themselves, and its gradient in u, likewise."""
        return self._differentiated(u, lambda point: point.log_prob() - point.log_jacobian(), column)

    def _differentiated(
        self, u: Tensor, log_prob: Callable[[AtPoint], Tensor], column: int
    ) -> tuple[Tensor, Tensor]:
        with torch.enable_grad():
            u = u.detach().requires_grad_()
            value = log_prob(self._run(u, column))
            grad = torch.autograd.grad(value, u, allow_unused=True)[0] if value.requires_grad else None
        return value.detach().to(u.dtype), torch.zeros_like(u) if grad is None else grad

    def data(self, column: int) -> Values:
        """The data set of a column; none where there is just the one that the program holds."""
        return {name: value[column % self.layout.num_sets] for name, value in self.layout.sets.items()}

    def _run(self, u: Tensor, column: int) -> AtPoint:
        return self.at(u, self.data(column))


class Vmap(Route):
    """All chains through `torch.func.vmap`; what is done is recorded once for a number of chains, and then replayed.

    Args:
        layout: of the program.
        writable: what the program makes out of nothing, to write into it, is made for each chain. Programs that write
            in place need it, for others it is a waste.
    """

    def __init__(self, layout: Layout, writable: bool = False) -> None:
        super().__init__(layout)
        self.writable = writable

    def value_and_grad(self, u: Tensor, columns: Tensor | None = None) -> tuple[Tensor, Tensor]:
        with torch.enable_grad():
            if columns is not None and self.layout.sets:
                each = torch.func.vmap(self._value_and_grad, in_dims=(-1, 0), out_dims=(0, -1))
                value, grad = each(u.detach(), self.chosen(columns, u.shape[1]))
            else:
                value, grad = self._over_columns(self._value_and_grad)(u.detach())
        return value.detach(), grad.detach()

    def function(self, u: Tensor) -> Evaluate:
        """The operations of `value_and_grad` as recorded, if they can be and do the same; else `forgiving`."""
        with torch.enable_grad():
            return faithfully_recorded(self._over_columns(self._value_and_grad), u) or self.forgiving

    def values(self, u: Tensor) -> Values:
        with torch.no_grad():
            return self._over_columns(self._values)(u)

    def _over_columns(self, function: Callable[[Tensor, Values], Any]) -> Callable[[Tensor], Any]:
        sets, num_sets = self.layout.sets, self.layout.num_sets

        def over_columns(u: Tensor) -> Any:
            if not sets:
                return torch.func.vmap(lambda u: function(u, {}), in_dims=-1)(u)
            split = u.unflatten(1, (-1, num_sets))
            each = torch.func.vmap(function, in_dims=(-1, 0))
            nested = torch.func.vmap(each, in_dims=(1, None))(split, sets)
            return torch.utils._pytree.tree_map(lambda value: value.flatten(0, 1), nested)

        def columns_last(u: Tensor) -> Any:
            out = over_columns(u)
            return (out[0], out[1].mT) if isinstance(out, tuple) else out

        return columns_last

    def at(self, u: Tensor, data: Values, nesting: int | None = None) -> AtPoint:
        with _MadeForEach(u) if self.writable else contextlib.nullcontext():
            return super().at(u, data, nesting)

    def _value_and_grad(self, u: Tensor, data: Values) -> tuple[Tensor, Tensor]:
        grad, value = torch.func.grad_and_value(lambda u: self.at(u, data).log_prob().to(u.dtype))(u)
        return value, grad

    def _values(self, u: Tensor, data: Values) -> Values:
        point = self.at(u, data)
        return point.values | point.deterministic


class _MadeForEach(TorchFunctionMode):
    """Tensors made out of nothing, or copied, are made like u: of its own for each chain that `vmap` runs."""

    _MAKERS: ClassVar[frozenset[Any]] = frozenset(
        {torch.empty, torch.zeros, torch.ones, torch.full, torch.clone, Tensor.clone, Tensor.new_empty}
        | {torch.empty_like, torch.zeros_like, torch.ones_like, torch.full_like, Tensor.new_zeros}
    )

    def __init__(self, u: Tensor) -> None:
        super().__init__()
        self.u = u

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        made = func(*args, **(kwargs or {}))
        if func in self._MAKERS and made.is_floating_point():
            return made + self.u.new_zeros(made.shape, dtype=made.dtype)
        return made


def faithfully_recorded(function: Callable[[Tensor], Sequence[Tensor]], u: Tensor) -> GraphModule | None:
    """The operations of a function as recorded; None where they cannot be, or do something else at u."""
    try:
        graph = recorded(function, u)
        pairs = zip(graph(u), function(u), strict=True)
        return graph if all(close(found, expected) for found, expected in pairs) else None
    except Exception:  # noqa: BLE001 -- there are many ways in which a recording can fail, and a way without it
        return None


def close(found: Tensor, expected: Tensor) -> bool:
    """Whether each row differs by little of its largest entry."""
    if found.shape != expected.shape:
        return False
    found, expected = torch.atleast_2d(found.double()), torch.atleast_2d(expected.double())
    size = expected.nan_to_num(0.0, 0.0, 0.0).abs().flatten(1).max(1).values
    size = size.reshape(-1, *[1] * (expected.ndim - 1)).expand_as(expected)
    same = (found == expected) | (found.isnan() & expected.isnan())
    return bool((same | ((found - expected).abs() <= _AGREEMENT * size)).all())


class Batched(Route):
    """All chains in one run, as a dimension on the left of all plates."""

    def value_and_grad(self, u: Tensor, columns: Tensor | None = None) -> tuple[Tensor, Tensor]:
        with torch.enable_grad():
            u = u.detach().requires_grad_()
            value = self._run(u, columns).log_prob()
            if value.shape != u.shape[1:]:
                raise ValueError(f"the log density has shape {tuple(value.shape)} for {u.shape[1]} chains")
            (grad,) = torch.autograd.grad(value.sum(), u)
        return value.detach().to(u.dtype), grad

    def values(self, u: Tensor) -> Values:
        n = u.shape[1]
        with torch.no_grad():
            run = self._run(u)
        shapes = {latent.name: latent.shape for latent in self.layout.latents} | self.layout.deterministic
        found = run.values | run.deterministic
        return {
            name: value.expand(n, *shapes[name])
            if value.ndim <= len(shapes[name])
            else value.reshape(n, *shapes[name])
            for name, value in found.items()
        }

    def terms(self, u: Tensor) -> Values:
        """The log density of each site, `(n,)`."""
        with torch.no_grad():
            return {name: term.expand(u.shape[1:]) for name, term in self._run(u).terms.items()}

    def _run(self, u: Tensor, columns: Tensor | None = None) -> AtPoint:
        stacked = {
            name: self._padded(name, value) for name, value in self.chosen(columns, u.shape[1]).items()
        }
        return self.at(u, stacked, self.layout.nesting)

    def _padded(self, name: str, value: Tensor) -> Tensor:
        missing = self.layout.nesting - len(self.layout.target.sites[name].batch_shape)
        return value.reshape(len(value), *[1] * missing, *value.shape[1:])
