"""What stands side by side in a tensor, handled part by part, so that compiled code need not put it together.

A gradient is made coordinate by coordinate and put together, the next position is taken apart again for the density.
A compiler stores what it puts together; of parts that meet their likes alone it makes one loop over all chains, in
which a whole trajectory never leaves the processor.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import reduce
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor, fx
from torch.utils._pytree import tree_leaves, tree_map

aten = torch.ops.aten

_MOST = 4  # parts: every operation is compiled as often


def in_parts(graph: fx.GraphModule) -> Callable[..., Any]:
    """The function of a graph of ATen operations, which keeps apart what `cat` puts together as long as it can.

    >>> from probgen.targets.graphs import recorded
    >>> graph = recorded(lambda x: torch.cat([x[:1], x[1:] * 3]).exp().sum(0), torch.ones(2, 5))
    >>> len(graph.graph.find_nodes(op="call_function", target=aten.cat.default))
    1
    >>> apart = recorded(in_parts(graph), torch.ones(2, 5))
    >>> len(apart.graph.find_nodes(op="call_function", target=aten.cat.default))
    0
    """
    if any(_writes(node) for node in graph.graph.nodes):
        return graph
    return _Interpreter(graph).run


def _writes(node: fx.Node) -> bool:
    """Whether it writes into its arguments: into the whole, which must then be there."""
    return bool(getattr(getattr(node.target, "_schema", None), "is_mutable", False))


@dataclass(frozen=True)
class _Parts:
    """Tensors that stand side by side along their first dimension."""

    tensors: tuple[Tensor, ...]

    @property
    def sizes(self) -> list[int]:
        return [len(part) for part in self.tensors]

    @property
    def ndim(self) -> int:
        return self.tensors[0].ndim


class _Interpreter(fx.Interpreter):
    """Does one operation after another; a value is a tensor or its parts."""

    def call_function(self, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Part by part by the rule for this operation, or on whole tensors."""
        if target is aten.cat.default:
            return _cat(*args, **kwargs)
        if any(isinstance(value, _Parts) for value in tree_leaves((args, kwargs))):
            found = _RULES[target](*args, **kwargs) if target in _RULES else None
            if torch.Tag.pointwise in getattr(target, "tags", ()):
                found = _pointwise(target, args, kwargs)
            if found is not None:
                return found
        return target(*tree_map(_whole, args), **tree_map(_whole, kwargs))

    def output(self, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Whole tensors."""
        del target, kwargs
        return tree_map(_whole, args[0])


def _whole(value: Any) -> Any:
    return torch.cat(value.tensors) if isinstance(value, _Parts) else value


def _cat(tensors: Sequence[Any], dim: int = 0) -> Tensor | _Parts:
    if dim % tensors[0].ndim:
        return torch.cat([_whole(x) for x in tensors], dim)
    parts = tuple(part for x in tensors for part in (x.tensors if isinstance(x, _Parts) else (x,)))
    alike = len({(part.ndim, part.dtype) for part in parts}) == 1
    return _Parts(parts) if alike and len(parts) <= _MOST else torch.cat(parts)


def _slice(x: _Parts, dim: int = 0, start: Any = None, stop: Any = None, step: int = 1) -> Any:
    ends = [0, *accumulate(x.sizes)]
    start, stop, _ = slice(start, stop).indices(ends[-1])
    if dim % x.ndim or step != 1 or start not in ends or stop not in ends[ends.index(start) + 1 :]:
        return None
    parts = x.tensors[ends.index(start) : ends.index(stop)]
    return _Parts(parts) if len(parts) > 1 else parts[0]


def _sum(x: _Parts, dims: Sequence[int] | None, *keepdim: bool, **dtype: Any) -> Tensor | None:
    if [dim % x.ndim for dim in dims or ()] != [0]:
        return None
    return reduce(torch.add, [aten.sum.dim_IntList(part, dims, *keepdim, **dtype) for part in x.tensors])


def _pointwise(target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> _Parts | None:
    values = [value for value in tree_leaves((args, kwargs)) if isinstance(value, Tensor | _Parts)]
    apart = [value for value in values if isinstance(value, _Parts)]
    sizes, ndim = apart[0].sizes, max(value.ndim for value in values)
    if any(value.sizes != sizes or value.ndim != ndim for value in apart):
        return None

    def of_part(i: int) -> Tensor:
        def part(value: Any) -> Any:
            if isinstance(value, _Parts):
                return value.tensors[i]
            along = isinstance(value, Tensor) and value.ndim == ndim and len(value) == sum(sizes)
            return value.split(sizes)[i] if along else value

        own_args, own_kwargs = tree_map(part, (args, kwargs))
        found: Tensor = target(*own_args, **own_kwargs)
        return found

    return _Parts(tuple(map(of_part, range(len(sizes)))))


_RULES: dict[Any, Callable[..., Any]] = {aten.slice.Tensor: _slice, aten.sum.dim_IntList: _sum}
