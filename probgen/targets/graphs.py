"""Recorded operations of a density, with everything done beforehand that does not depend on the point.

`recorded` writes down what a function does as a graph of ATen operations and rewrites it, one operation after another:
what depends on constants alone is worked out, what was done before is not done again, and what changes nothing is left
out. A rule takes an operation whose arguments are rewritten already and gives what may stand in its place.
"""

from __future__ import annotations

import itertools
import math
import operator
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, fx, nn
from torch.fx.node import map_arg
from torch.utils._pytree import tree_map_only

from probgen.targets.recording import record

aten = torch.ops.aten

_SAME_VALUES = {  # of which the result holds the elements of the first argument in their order
    aten.alias.default,
    aten.clone.default,
    aten.detach.default,
    aten.expand.default,
    aten.lift_fresh_copy.default,
    aten.slice.Tensor,
    aten._to_copy.default,
}
_RESHAPES = {
    aten._unsafe_view.default,
    aten.reshape.default,
    aten.squeeze.default,
    aten.squeeze.dim,
    aten.squeeze.dims,
    aten.unsqueeze.default,
    aten.view.default,
}
_PERMUTES = {aten.permute.default, aten.t.default, aten.transpose.int}
_OF_SHAPE = {  # of which the result depends on the shape of the argument alone
    aten.full_like.default,
    aten.new_full.default,
    aten.new_ones.default,
    aten.new_zeros.default,
    aten.ones_like.default,
    aten.zeros_like.default,
}
_OF_MEMORY = {aten.as_strided.default, aten.as_strided_scatter.default}
_TIMES = {aten.mul.Tensor, aten.mul.Scalar}
_OVER = {aten.div.Tensor, aten.div.Scalar}
_PLUS = {aten.add.Tensor, aten.add.Scalar}
_MINUS = {aten.sub.Tensor, aten.sub.Scalar}
_BINARY = {aten.mul.Tensor, aten.div.Tensor, aten.add.Tensor, aten.sub.Tensor}
_PLAIN = {
    "dtype",
    "device",
    "layout",
    "pin_memory",
    "memory_format",
    "implicit",
}  # arguments that rules need not see
_LOST = 1e-3  # of a result, relatively, an inverse may cost
_FEW = 4096  # constants of as many elements are compared by value


def recorded(function: Callable[..., Any], *examples: Tensor) -> fx.GraphModule:
    """The operations of a function for tensors of these shapes, dtypes and devices, rewritten.

    Args:
        function: of tensors, without choices that depend on values; it may write in place.
        examples: its arguments.

    Returns a module that gives what `function` gives, up to rounding; weights and data are frozen in it.
    Raises whatever the function, or the recording of it, raises.

    >>> graph = recorded(lambda u: (u - torch.ones(3).log()) * 2 * torch.full((3,), 1.5), torch.ones(3))
    >>> print(graph.code.strip())
    def forward(self, argument_0):
        mul_tensor_1 = torch.ops.aten.mul.Tensor(argument_0, 3.0);  argument_0 = None
        return mul_tensor_1
    """
    try:
        graph = record(torch.func.functionalize(function, remove="mutations"), *examples)
    except RuntimeError:  # it holds what functorch does not follow, as autograd inside of it
        from torch.fx.experimental.proxy_tensor import make_fx

        graph = make_fx(function)(*[x.detach().clone() for x in examples])
    return simplified(graph)


def simplified(module: fx.GraphModule) -> fx.GraphModule:
    """The same function, with fewer operations; left as it is where operations share memory."""
    try:
        return _Rewriting(module).done()
    except _SharedMemory:
        return module


class _SharedMemory(Exception):
    """Operations cannot be looked at one by one."""


class _Operation(NamedTuple):
    """An operation, its arguments, named ones behind the others, and something of the shape and dtype of the result."""

    target: Any
    args: tuple[Any, ...]
    like: Any


class _Rewriting:
    """One pass over a graph.

    A value is a node of the new graph, or a constant: a tensor, a number, or whatever else an operation takes. Each
    node holds in `meta["val"]` something of its shape and dtype.
    """

    def __init__(self, module: fx.GraphModule) -> None:
        self.old, self.graph, self.root = module, fx.Graph(), nn.Module()
        self.values: dict[fx.Node, Any] = {}
        self.made: dict[Any, fx.Node] = {}

    def done(self) -> fx.GraphModule:
        for node in self.old.graph.nodes:
            self.values[node] = self._value(node)
        self.graph.eliminate_dead_code()
        return fx.GraphModule(self.root, self.graph)

    def _value(self, node: fx.Node) -> Any:
        if node.op == "placeholder":
            return _holding(self.graph.placeholder(node.name), node.meta["val"])
        if node.op == "get_attr":
            return operator.attrgetter(str(node.target))(self.old).detach()
        args, kwargs = map_arg((node.args, node.kwargs), self.values.__getitem__)
        if node.op == "output":
            return self.graph.output(_map_tensors(self.as_node, args[0]))
        target: Any = node.target
        if target in _OF_SHAPE and isinstance(args[0], fx.Node):
            args = (_filled(0, args[0].meta["val"]), *args[1:])
        if not _nodes_in((args, kwargs)) and not _is_random(target):
            return target(*args, **kwargs)  # which may write into constants made before
        args, kwargs = _map_tensors(_narrowed, (args, kwargs))
        return self.call(target, *args, like=node.meta.get("val"), **kwargs)

    def call(self, target: Any, *args: Any, like: Any = None, **kwargs: Any) -> Any:
        """The value of an operation, by the first rule that applies; `like` has its shape and dtype."""
        if like is None:
            like = target(
                *_map_tensors(_on_meta, map_arg(args, lambda node: _on_meta(node.meta["val"]))), **kwargs
            )
        if target in _OF_MEMORY or getattr(getattr(target, "_schema", None), "is_mutable", False):
            raise _SharedMemory(str(target))
        seen = args + tuple(value for name, value in kwargs.items() if name not in _PLAIN)
        for rule in _RULES.get(target, ()):
            found = rule(self, _Operation(target, seen, like))
            if found is not None:
                return found
        return self.emit(target, *args, like=like, **kwargs)

    def emit(self, target: Any, *args: Any, like: Any, **kwargs: Any) -> fx.Node:
        """The node of this operation: the one there is, or a new one."""
        if target in _BINARY:
            args = tuple(_small(x) if _is_like(y, like) else x for x, y in zip(args, args[::-1], strict=True))
        if torch.Tag.pointwise not in getattr(
            target, "tags", ()
        ):  # kernels of layers read memory without strides
            args, kwargs = _map_tensors(Tensor.contiguous, (args, kwargs))
        args, kwargs = _map_tensors(self.as_node, (args, kwargs))
        key = (target, _key((args, kwargs)))
        if key not in self.made or _is_random(target):
            self.made[key] = _holding(self.graph.call_function(target, args, kwargs), like)
        return self.made[key]

    def as_node(self, constant: Tensor) -> fx.Node:
        """The node of a constant tensor."""
        content = constant.tolist() if constant.numel() <= _FEW else id(constant)
        key = ("constant", constant.dtype, constant.device, constant.shape, constant.stride(), repr(content))
        if key not in self.made:
            name = f"constant_{len(list(self.root.buffers()))}"
            self.root.register_buffer(name, constant)
            # The graph has no module yet in which the name could be looked up.
            self.made[key] = _holding(self.graph.create_node("get_attr", name), constant)
        return self.made[key]

    def constant(self, value: Any) -> Any:
        """The constant that a value is, or None."""
        if not isinstance(value, fx.Node):
            return value
        return getattr(self.root, str(value.target)) if value.op == "get_attr" else None


# --- rules: (rewriting, operation) -> value, or None where it does not apply ---------------------------------------


def _nothing_done(_: _Rewriting, did: _Operation) -> Any:
    """All elements of x in their order, in the shape and dtype of x, are x."""
    return did.args[0] if _is_like(did.args[0], did.like) else None


def _one_reshape(at: _Rewriting, did: _Operation) -> Any:
    """One reshape for several."""
    x = did.args[0]
    while x.target is aten.reshape.default:
        x = x.args[0]
    return (
        x if _is_like(x, did.like) else at.emit(aten.reshape.default, x, list(did.like.shape), like=did.like)
    )


def _sum_of_one(at: _Rewriting, did: _Operation) -> Any:
    """The sum over dimensions of size 1 is a reshape."""
    x = did.args[0].meta["val"]
    return _one_reshape(at, did) if (x.numel(), x.dtype) == (did.like.numel(), did.like.dtype) else None


def _one_permutation(at: _Rewriting, did: _Operation) -> Any:
    """One permutation for several, inside of concatenations; one of dimensions of size 1 is a reshape."""
    x, order = did.args[0], _order(did.target, did.args)
    if x.target is aten.permute.default:
        x, order = x.args[0], [x.args[1][d] for d in order]
    long = [d for d in order if x.meta["val"].shape[d] != 1]
    if long == sorted(long):
        return _one_reshape(at, did._replace(args=(x,)))
    if x.target is aten.cat.default:
        parts, dim = _joined(x)
        turned = [at.call(aten.permute.default, part, order) for part in parts]
        return at.emit(aten.cat.default, turned, order.index(dim), like=did.like)
    return at.emit(aten.permute.default, x, order, like=did.like)


def _order(target: Any, args: Any) -> list[int]:
    """Which dimension of x becomes the first, the second, ..."""
    ndim = args[0].meta["val"].ndim
    if target is aten.permute.default:
        return [d % ndim for d in args[1]]
    order = list(range(ndim))
    if ndim > 1:
        a, b = args[1:] or (0, 1)
        order[a], order[b] = order[b], order[a]
    return order


def _slice_first(at: _Rewriting, did: _Operation) -> Any:
    """A slice of a permutation is a permutation of a slice."""
    x, dim, *ends = did.args if len(did.args) > 1 else (*did.args, 0)
    if x.target is not aten.permute.default:
        return None
    inner, order = x.args
    return at.call(aten.permute.default, at.call(did.target, inner, order[dim], *ends), order, like=did.like)


def _between_zeros(at: _Rewriting, did: _Operation) -> Any:
    """The gradient of a slice stands between zeros."""
    grad, _, dim, start, stop, step = did.args
    if step != 1:
        return None
    start, stop, _ = slice(start, stop).indices(did.like.shape[dim])
    return _side_by_side(at, [(start, stop, grad)], dim % did.like.ndim, did.like)


def _one_between_zeros(at: _Rewriting, did: _Operation) -> Any:
    """The gradient of one entry stands between zeros."""
    grad, _, dim, index = did.args
    start, dim = index % did.like.shape[dim], dim % did.like.ndim
    return _side_by_side(at, [(start, start + 1, at.call(aten.unsqueeze.default, grad, dim))], dim, did.like)


def _sum_of_neighbours(at: _Rewriting, did: _Operation) -> Any:
    """What stands between zeros and does not overlap is put side by side, not added."""
    if not all(_is_like(x, did.like) and x.target is aten.cat.default for x in did.args):
        return None
    (first, dim), (second, other) = (_joined(x) for x in did.args)
    parts = sorted(_places(at, first, dim) + _places(at, second, dim), key=operator.itemgetter(0))
    apart = all(before[1] <= after[0] for before, after in itertools.pairwise(parts))
    return _side_by_side(at, parts, dim, did.like) if apart and dim == other else None


def _joined(x: fx.Node) -> tuple[Sequence[Any], int]:
    """What `cat` puts side by side, and along which dimension, from the left; the first where it does not say."""
    parts: Any
    dim: Any
    parts, dim = (*x.args, 0)[:2]
    return parts, dim % x.meta["val"].ndim


def _places(at: _Rewriting, parts: Sequence[Any], dim: int) -> list[tuple[int, int, Any]]:
    """(start, stop, part) of what stands side by side, zeros left out."""
    found, start = [], 0
    for part in parts:
        stop = start + part.meta["val"].shape[dim]
        constant = at.constant(part)
        if constant is None or bool(constant.any()):
            found.append((start, stop, part))
        start = stop
    return found


def _side_by_side(at: _Rewriting, parts: Sequence[tuple[int, int, Any]], dim: int, like: Any) -> Any:
    """The parts along `dim`, zeros between them."""
    pieces, end, size = [], 0, like.shape[dim]
    for start, stop, part in (*parts, (size, size, None)):
        if start > end:
            pieces.append(_filled(0, like.narrow(dim, 0, start - end)))
        if part is not None:
            pieces.append(part)
        end = stop
    return pieces[0] if len(pieces) == 1 else at.emit(aten.cat.default, pieces, dim, like=like)


def _first_power(_: _Rewriting, did: _Operation) -> Any:
    """x^1 is x."""
    return did.args[0] if did.args[1] == 1 and _is_like(did.args[0], did.like) else None


def _constants_first(at: _Rewriting, did: _Operation) -> Any:
    """(x * a) * b is x * (a b) and (x + a) + b is x + (a + b) for constants a and b; x * 1 and x + 0 are x."""
    found = _split(at, did.target, did.args, did.like)
    if found is None:
        return None
    x, constant, scaling = found
    inner = _split(at, x.target, x.args, did.like) if not x.kwargs else None
    if inner is None or inner[2] != scaling:
        return x if _number(constant) == scaling else None
    x, other, _ = inner
    combined = _plain(constant * other if scaling else constant + other)
    if _number(combined) == scaling:
        return x
    return at.emit(aten.mul.Tensor if scaling else aten.add.Tensor, x, combined, like=did.like)


def _split(at: _Rewriting, target: Any, args: Any, like: Any) -> tuple[fx.Node, Any, bool] | None:
    """(x, c, True) for an operation that is x * c, and (x, c, False) for x + c, with x as large as the result."""
    if target is aten.neg.default:
        args = (args[0], -1)
    elif len(args) != 2 or target not in _TIMES | _OVER | _PLUS | _MINUS:
        return None
    x, constant = args[0], at.constant(args[1])
    if constant is None and target in _TIMES | _PLUS:
        x, constant = args[1], at.constant(args[0])
    if constant is None or not _is_like(x, like) or x.op == "get_attr" or not like.is_floating_point():
        return None
    constant = _plain(constant.to(like.dtype) if isinstance(constant, Tensor) else constant)
    if target in _OVER:
        constant = 1 / constant if isinstance(constant, Tensor) or constant else math.inf
    elif target in _MINUS:
        constant = -constant
    return x, _plain(constant), target in _TIMES | _OVER or target is aten.neg.default


def _product_with_inverse(at: _Rewriting, did: _Operation) -> Any:
    """To solve with a triangle that never changes is to multiply with its inverse, where that is as accurate."""
    triangle, b, upper, *rest = did.args
    if rest or isinstance(triangle, fx.Node) or triangle.shape[:-2].numel() != 1 or did.like.shape[-1] != 1:
        return None
    triangle = triangle.reshape(triangle.shape[-2:]).double()
    triangle = triangle.triu() if upper else triangle.tril()
    inverse = torch.linalg.inv(triangle)
    if not float(triangle.norm() * inverse.norm()) < _LOST / torch.finfo(did.like.dtype).eps:
        return None
    size = len(inverse)
    rows = at.call(aten.reshape.default, b, [did.like.numel() // size, size])
    product = at.call(aten.mm.default, rows, inverse.mT.to(did.like.dtype).contiguous())
    return at.call(aten.reshape.default, product, list(did.like.shape), like=did.like)


def _one_matrix_for_all(at: _Rewriting, did: _Operation) -> Any:
    """x_b A for every b of a batch, with one constant A, is all rows of x times A at once."""
    x, matrix = did.args
    if isinstance(x, Tensor) and isinstance(matrix, fx.Node):  # A x_b = (x_b' A')'
        turned = did._replace(
            args=(at.call(aten.permute.default, matrix, [0, 2, 1]), x.mT), like=did.like.mT.contiguous()
        )
        product = _one_matrix_for_all(at, turned)
        return None if product is None else at.call(aten.permute.default, product, [0, 2, 1], like=did.like)
    if isinstance(matrix, fx.Node) or _narrowed(matrix).stride(0) != 0:
        return None
    batch, rows, columns = did.like.shape
    flat = at.call(aten.reshape.default, x, [batch * rows, matrix.shape[1]])
    product = at.call(aten.mm.default, flat, matrix[0].contiguous())
    return at.call(aten.reshape.default, product, [batch, rows, columns], like=did.like)


def _columns_last(at: _Rewriting, did: _Operation) -> Any:
    """x' A is (A' x)', for a constant A: chains stay in columns."""
    x, matrix = did.args
    if isinstance(matrix, fx.Node) or x.target is not aten.permute.default:
        return None
    product = at.emit(did.target, matrix.mT.contiguous(), x.args[0], like=did.like.mT)
    return at.call(aten.permute.default, product, [1, 0], like=did.like)


_RULES: dict[Any, tuple[Callable[[_Rewriting, _Operation], Any], ...]] = {
    **dict.fromkeys(_SAME_VALUES, (_nothing_done,)),
    **dict.fromkeys(_RESHAPES, (_one_reshape,)),
    **dict.fromkeys(_PERMUTES, (_one_permutation,)),
    **dict.fromkeys(_TIMES | _OVER | _MINUS | {aten.neg.default}, (_constants_first,)),
    aten.add.Tensor: (_sum_of_neighbours, _constants_first),
    aten.add.Scalar: (_constants_first,),
    aten.linalg_solve_triangular.default: (_product_with_inverse,),
    aten.bmm.default: (_one_matrix_for_all,),
    aten.mm.default: (_columns_last,),
    aten.pow.Tensor_Scalar: (_first_power,),
    aten.select_backward.default: (_one_between_zeros,),
    aten.slice.Tensor: (_nothing_done, _slice_first),
    aten.slice_backward.default: (_between_zeros,),
    aten.sum.dim_IntList: (_sum_of_one,),
}


# --- constants, shapes --------------------------------------------------------------------------------------------


def _narrowed(constant: Tensor) -> Tensor:
    """The same constant, of which dimensions along which it does not change take no room."""
    narrow = constant
    for dim in range(constant.ndim):
        first = narrow.narrow(dim, 0, 1) if constant.shape[dim] > 1 else narrow
        if constant.stride(dim) == 0 or bool((narrow == first).all()):
            narrow = first
    return narrow.contiguous().expand(constant.shape)


def _small(value: Any) -> Any:
    """A constant beside a tensor as large as the result: a number, or as small as broadcasting allows."""
    if not isinstance(value, Tensor):
        return value
    value = _plain(value)
    while isinstance(value, Tensor) and value.ndim and value.stride(0) == 0:
        value = value[0]
    for dim in range(value.ndim if isinstance(value, Tensor) else 0):
        value = value.narrow(dim, 0, 1) if value.stride(dim) == 0 else value
    return value


def _number(constant: Any) -> float | None:
    """The number that all elements are, or None."""
    if not isinstance(constant, Tensor):
        return constant
    if constant.numel() == 0 or any(
        constant.stride(d) for d in range(constant.ndim) if constant.shape[d] > 1
    ):
        return None
    return constant.flatten()[0].item()


def _plain(constant: Any) -> Any:
    """The constant as a number, where it is one."""
    narrow = _narrowed(constant) if isinstance(constant, Tensor) else constant
    number = _number(narrow)
    return narrow if number is None else number


def _filled(number: float, like: Any) -> Tensor:
    return torch.full((), number, dtype=like.dtype, device=like.device).expand(like.shape)


def _is_like(x: Any, like: Any) -> bool:
    """Whether x is a node of this shape, dtype and device."""
    if not isinstance(x, fx.Node):
        return False
    held = x.meta["val"]
    return (held.shape, held.dtype, held.device) == (like.shape, like.dtype, like.device)


def _holding(node: fx.Node, like: Any) -> fx.Node:
    node.meta["val"] = like
    return node


def _on_meta(value: Tensor) -> Tensor:
    return torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device="meta")


def _map_tensors(function: Callable[[Tensor], Any], values: Any) -> Any:
    return tree_map_only(Tensor, function, values)


def _nodes_in(values: Any) -> bool:
    found: list[fx.Node] = []
    map_arg(values, found.append)
    return bool(found)


def _key(values: Any) -> Any:
    """Something to look arguments up by; 1, 1.0 and True are different arguments."""
    if isinstance(values, list | tuple):
        return tuple(map(_key, values))
    if isinstance(values, dict):
        return tuple((name, _key(value)) for name, value in values.items())
    return (type(values), repr(values) if isinstance(values, float) else values)


def _is_random(target: Any) -> bool:
    return torch.Tag.nondeterministic_seeded in getattr(target, "tags", ())
