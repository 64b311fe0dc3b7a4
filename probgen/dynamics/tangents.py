"""Derivatives carried forward through a network together with its values, many directions at once.

A `Dual` is a tensor that knows how it changes along n directions of x. PyTorch hands it every function that it meets
on its way through a network, and a small table of rules, one a kind of layer, says what the directions become: a
linear layer is one matrix product for all of them, an activation a factor. Where a network does something that has no
rule, `NoRule` is raised and the caller goes another way. On a CPU this is faster than PyTorch's own forward mode, and
products are put off until it is known what they are for: the trace of a network of two hidden layers,

    tr(W_3 D_2 W_2 D_1 W_1) = d_2' (W_2 * (W_1 W_3)') d_1,    D_i = diag(d_i),

then costs about what its value costs, instead of one pass a coordinate.

Source: Griewank & Walther (2008), Evaluating Derivatives, chapter 3; the trace of layered networks as in Grathwohl et
al. (2019), arXiv 1810.01367, without their estimate.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.nn import functional as F


class NoRule(TypeError):
    """A network did something to x for which no rule is known here."""


# --- what the directions are at some layer ------------------------------------------------------------------------


class Tangent(Protocol):
    """Derivatives of a value `(batch, *event)` along n directions."""

    @property
    def dense(self) -> Tensor:
        """All of them, `(batch or 1, n, *event)`."""

    def times(self, factor: Tensor) -> Tangent:
        """Those of factor * value, the factor broadcastable over the value."""

    def reshaped(self, event: tuple[int, ...]) -> Tangent:
        """Those of the value with its event in another shape."""

    def trace(self) -> Tensor:
        """sum_i d value_i / d x_i, `(batch or 1,)`, where the directions are the coordinates of x."""


@dataclass(frozen=True)
class Chain:
    """start diag(f_1) W_1' diag(f_2) W_2' ... diag(factor), multiplied out when asked for.

    Args:
        start: `(batch or 1, n, h)`.
        event: shape of the value's event.
        links: pairs of a factor, `(batch or 1, h)` or None, and a weight `(k, h)`.
        factor: the last factor, `(batch or 1, k or 1)` or None.
    """

    start: Tensor
    event: tuple[int, ...]
    links: tuple[tuple[Tensor | None, Tensor], ...] = ()
    factor: Tensor | None = None

    @staticmethod
    def of(dense: Tensor) -> Chain:
        """Derivatives that are known, `(batch or 1, n, *event)`."""
        return Chain(dense.flatten(2) if dense.ndim > 2 else dense[..., None], tuple(dense.shape[2:]))

    @cached_property
    def dense(self) -> Tensor:
        value = _multiplied(self.start, self.links)
        if self.factor is not None:
            value = value * self.factor[:, None]
        return value.reshape(*value.shape[:2], *self.event)

    def times(self, factor: Tensor) -> Chain:
        rows = factor.shape[0] if factor.ndim > len(self.event) else 1
        if factor.numel() == rows:
            flat = factor.reshape(rows, 1)
        else:
            flat = factor.broadcast_to(rows, *self.event).reshape(rows, -1)
        return replace(self, factor=flat if self.factor is None else self.factor * flat)

    def reshaped(self, event: tuple[int, ...]) -> Chain:
        return replace(self, event=event)

    def linear(self, weight: Tensor) -> Chain:
        """Those of weight @ value, along the last dimension."""
        if len(self.event) != 1:
            return Chain.of(F.linear(self.dense, weight))
        if not self.links and self.factor is None and len(self.start) == 1:
            return Chain(F.linear(self.start, weight), (len(weight),))
        return Chain(self.start, (len(weight),), (*self.links, (self.factor, weight)))

    def trace(self) -> Tensor:
        if not self.links:
            diagonal = self.start.diagonal(dim1=1, dim2=2)
            return (diagonal if self.factor is None else diagonal * self.factor).sum(1)
        if self.factor is not None and self.factor.shape[1] != 1:
            return self.dense.flatten(2).diagonal(dim1=1, dim2=2).sum(1)
        *links, (factor, weight) = self.links
        if len(links) == 1 and len(self.start) == 1 and factor is not None and links[0][0] is not None:
            (first, inner), loop = links[0], weight.mT @ self.start[0]
            assert first is not None
            trace = (F.linear(first, inner * loop) * factor).sum(1)
        else:
            before = _multiplied(self.start, tuple(links))
            seen = before if factor is None else before * factor[:, None]
            trace = (seen * weight).flatten(1).sum(1)
        return trace if self.factor is None else trace * self.factor[:, 0]


@dataclass(frozen=True)
class Sum:
    """The sum of two, added when asked for."""

    first: Tangent
    second: Tangent

    @cached_property
    def dense(self) -> Tensor:
        return self.first.dense + self.second.dense

    def times(self, factor: Tensor) -> Tangent:
        return Sum(self.first.times(factor), self.second.times(factor))

    def reshaped(self, event: tuple[int, ...]) -> Tangent:
        return Sum(self.first.reshaped(event), self.second.reshaped(event))

    def trace(self) -> Tensor:
        return self.first.trace() + self.second.trace()


def _multiplied(value: Tensor, links: tuple[tuple[Tensor | None, Tensor], ...]) -> Tensor:
    for factor, weight in links:
        if factor is not None:
            value = value * factor[:, None]
        # In two dimensions: with frozen weights F.linear would copy a batch of matrices first.
        value = F.linear(value.flatten(0, 1), weight).unflatten(0, value.shape[:2])
    return value


# --- a tensor that carries them -----------------------------------------------------------------------------------


class Dual(Tensor):
    """A value `(batch, *event)` with its tangent, handed through a network in place of x.

    >>> x, directions = torch.randn(5, 2), torch.eye(2)[None]
    >>> y = torch.nn.Sequential(torch.nn.Linear(2, 3), torch.nn.Tanh())(Dual(x, Chain.of(directions)))
    >>> y.tangent.dense.shape
    torch.Size([5, 2, 3])
    """

    value: Tensor
    tangent: Tangent

    @staticmethod
    def __new__(cls, value: Tensor, tangent: Tangent) -> Dual:
        made: Dual = torch.Tensor._make_wrapper_subclass(
            cls, value.shape, dtype=value.dtype, device=value.device
        )
        made.value, made.tangent = value, tangent
        return made

    @classmethod
    def __torch_function__(
        cls, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        name, kwargs = getattr(func, "__name__", ""), kwargs or {}
        if name in _RULES:
            return _RULES[name](func, *args, **kwargs)
        if name in _ASKS or name == "__get__":
            found = func(*(_value(each) for each in args), **kwargs)
            if not isinstance(found, Tensor) or not isinstance(args[0], Dual):
                return found
        raise NoRule(f"No rule says how directions go through torch's {name!r}.")

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]  # torch declares it as an instance's method
        cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        raise NoRule(f"{func} was reached behind PyTorch's Python interface.")


def _value(x: Any) -> Any:
    return x.value if isinstance(x, Dual) else x


_ASKS = {
    *("__len__", "dim", "ndimension", "size", "numel", "nelement", "stride", "element_size"),
    *("is_floating_point", "is_complex", "get_device", "to", "type_as", "expand_as"),
    *("zeros_like", "ones_like", "new_zeros", "new_ones"),
}  # answered by the value; what they make of it must not depend on x
_ELEMENTWISE = (
    *("silu", "tanh", "relu", "sigmoid", "softplus", "gelu", "elu", "leaky_relu", "mish", "softsign"),
    *("selu", "celu", "hardtanh", "logsigmoid", "sin", "cos", "exp", "expm1", "log", "log1p", "sqrt"),
    *("rsqrt", "square", "reciprocal", "pow", "abs", "erf"),
)
_SLOPES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "relu": lambda x, _: (x > 0).to(x),
    "sigmoid": lambda _, y: y * (1 - y),
    "silu": lambda x, _: _slope_of_silu(x),
    "tanh": lambda _, y: 1 - y * y,
}  # of y = f(x), where there is a shorter way than asking autograd


def _slope_of_silu(x: Tensor) -> Tensor:
    if torch.is_grad_enabled() and x.requires_grad:  # the operation below has no derivative
        sigmoid = x.sigmoid()
        return sigmoid * (1 + x * (1 - sigmoid))
    return torch.ops.aten.silu_backward(torch.ones_like(x), x)


def _elementwise(function: Callable[..., Tensor], x: Any, *args: Any, **kwargs: Any) -> Dual:
    """f(x), f'(x) dx for a function of each number on its own."""
    if not isinstance(x, Dual) or any(isinstance(each, Tensor) for each in (*args, *kwargs.values())):
        raise NoRule(f"{function} of more than one tensor.")
    if kwargs.pop("inplace", False) or any(each is True for each in args):
        raise NoRule("An activation that overwrites x.")
    if function.__name__ in _SLOPES:
        y = function(x.value, *args, **kwargs)
        return Dual(y, x.tangent.times(_SLOPES[function.__name__](x.value, y)))
    differentiable = torch.is_grad_enabled() and x.value.requires_grad
    with torch.enable_grad():
        at = x.value if differentiable else x.value.detach().requires_grad_()
        result = function(at, *args, **kwargs)
        (slope,) = torch.autograd.grad(result, at, torch.ones_like(result), create_graph=differentiable)
    return Dual(result if differentiable else result.detach(), x.tangent.times(slope))


def _linear(_: Any, x: Any, weight: Tensor, bias: Tensor | None = None) -> Dual:
    if not isinstance(x, Dual) or isinstance(weight, Dual):
        raise NoRule("A weight that depends on x.")
    tangent = x.tangent if isinstance(x.tangent, Chain) else Chain.of(x.tangent.dense)
    return Dual(F.linear(x.value, weight, bias), tangent.linear(weight))


def _matmul(_: Any, x: Any, matrix: Tensor) -> Dual:
    if matrix.ndim != 2:
        raise NoRule("A product with more than one matrix.")
    return _linear(_, x, matrix.mT)


def _layer_norm(
    _: Any,
    x: Any,
    normalized_shape: Any,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
) -> Dual:
    """y = (x - mean)/s, dy = (dx - mean(dx) - y mean(y dx))/s over the last dimension."""
    if len(normalized_shape) != 1 or not isinstance(x, Dual):
        raise NoRule("Normalisation over more than the last dimension.")
    value, change = x.value, x.tangent.dense
    inverse = (value.var(-1, correction=0, keepdim=True) + eps).rsqrt()
    y = (value - value.mean(-1, keepdim=True)) * inverse
    across = y[:, None]
    change = change - change.mean(-1, keepdim=True) - across * (across * change).mean(-1, keepdim=True)
    factor = inverse if weight is None else inverse * weight
    out = y if weight is None else y * weight
    return Dual(out if bias is None else out + bias, Chain.of(change).times(factor))


def _add(function: Callable[..., Tensor], x: Any, y: Any, *, alpha: float = 1.0) -> Dual:
    value = function(_value(x), _value(y), alpha=alpha)
    sign = -alpha if function.__name__ == "sub" else alpha
    terms = [_kept(each, value) for each in (x, y)]
    if terms[1] is not None and sign != 1.0:
        terms[1] = terms[1].times(value.new_tensor(sign))
    return Dual(value, _total(terms))


def _reversed_sub(_: Any, x: Any, y: Any) -> Dual:
    return _add(torch.sub, y, x)


def _mul(_: Any, x: Any, y: Any) -> Dual:
    value = _value(x) * _value(y)
    terms = []
    for one, other in ((x, y), (y, x)):
        tangent = _kept(one, value)
        factor = _value(other)
        factor = factor if isinstance(factor, Tensor) else value.new_tensor(factor)
        terms.append(None if tangent is None else tangent.times(factor))
    return Dual(value, _total(terms))


def _div(_: Any, x: Any, y: Any) -> Dual:
    if isinstance(y, Dual):
        y = torch.reciprocal(y)
        return _mul(_, x, y)
    return _mul(_, x, 1 / y)


def _neg(_: Any, x: Dual) -> Dual:
    return _mul(_, x, -1.0)


def _kept(x: Any, result: Tensor) -> Tangent | None:
    """The tangent of an argument, which must have the shape of the result; None where it does not depend on x."""
    if not isinstance(x, Dual):
        return None
    if x.value.shape != result.shape:
        raise NoRule("Something that depends on x was broadcast.")
    return x.tangent


def _total(terms: list[Tangent | None]) -> Tangent:
    first, *others = [term for term in terms if term is not None]
    return Sum(first, others[0]) if others else first


def _reshape(function: Callable[..., Tensor], x: Any, *args: Any, **kwargs: Any) -> Dual:
    value = function(x.value, *args, **kwargs)
    if value.shape[:1] != x.value.shape[:1] or math.prod(value.shape[1:]) != math.prod(x.value.shape[1:]):
        raise NoRule("A reshape over the batch.")
    return Dual(value, x.tangent.reshaped(tuple(value.shape[1:])))


def _cat(function: Callable[..., Tensor], tensors: Any, dim: int = 0) -> Dual:
    value = function([_value(each) for each in tensors], dim)
    axis = dim % value.ndim
    if axis == 0:
        raise NoRule("Rows put together.")
    duals = [each.tangent.dense for each in tensors if isinstance(each, Dual)]
    batch, n = max(len(each) for each in duals), duals[0].shape[1]
    parts = []
    for each in tensors:
        if isinstance(each, Dual):
            parts.append(each.tangent.dense.expand(batch, -1, *each.value.shape[1:]))
        else:
            parts.append(value.new_zeros(()).expand(batch, n, *each.shape[1:]))
    return Dual(value, Chain.of(torch.cat(parts, axis + 1)))


def _dropout(_: Any, x: Dual, p: float = 0.5, training: bool = True, **_kwargs: bool) -> Dual:
    if training and p > 0:
        raise NoRule("Dropout in training mode.")
    return x


_RULES: dict[str, Callable[..., Dual]] = {
    **dict.fromkeys(_ELEMENTWISE, _elementwise),
    **dict.fromkeys(
        ("reshape", "view", "flatten", "unflatten", "squeeze", "unsqueeze", "contiguous"), _reshape
    ),
    **dict.fromkeys(("add", "sub"), _add),
    **dict.fromkeys(("cat", "concat", "concatenate"), _cat),
    **dict.fromkeys(("div", "true_divide"), _div),
    "__rsub__": _reversed_sub,
    "rsub": _reversed_sub,
    "mul": _mul,
    "neg": _neg,
    "linear": _linear,
    "matmul": _matmul,
    "layer_norm": _layer_norm,
    "dropout": _dropout,
}
