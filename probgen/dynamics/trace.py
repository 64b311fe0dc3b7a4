"""A field with its divergence tr(dv/dx): exactly, or estimated from random probes.

Exactly it costs d directional derivatives of a field over d coordinates. Where `tangents` knows every layer they go
forward through the network; otherwise backward, side by side. Estimates e'(dv/dx)e with E[ee'] = I cost one pass back
each and are unbiased (Hutchinson 1989, doi 10.1080/03610918908812806; Grathwohl et al. 2019, arXiv 1810.01367).
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from probgen.dynamics.tangents import Chain, Dual, NoRule

Field = Callable[[Tensor, Tensor], Tensor]


def exact_divergence(field: Field, x: Tensor, t: Tensor, memory: int = 2**30) -> tuple[Tensor, Tensor]:
    """v and tr(dv/dx).

    Args:
        field: v, x `(batch, *event)` and t `(batch,)` -> `(batch, *event)`; a row depends on its own row alone.
        x, t: where.
        memory: bytes that derivatives going backward side by side may take.

    Returns:
        v `(batch, *event)` and its divergence `(batch,)`. Where gradients are on and x asks for them, both are
        differentiable, in x and in the weights of the field.

    >>> v, trace = exact_divergence(lambda x, t: -2 * x, torch.ones(5, 3), torch.zeros(5))
    >>> trace.shape, trace[0].item()
    (torch.Size([5]), -6.0)
    """
    try:
        return _forward(field, x, t)
    except (NoRule, RuntimeError):  # whatever is wrong with the field itself shows again on the other way
        return _backward(field, x, t, memory)


def estimated_divergence(
    field: Field, x: Tensor, t: Tensor, probes: Tensor, memory: int = 2**30
) -> tuple[Tensor, Tensor]:
    """v and e'(dv/dx)e for n probes e `(batch, n, *event)`: `(batch, n)`; the rest as for `exact_divergence`.

    >>> _, traces = estimated_divergence(lambda x, t: -2 * x, torch.ones(5, 3), torch.zeros(5), torch.ones(5, 4, 3))
    >>> traces.shape, traces[0, 0].item()
    (torch.Size([5, 4]), -6.0)
    """
    if probes.shape[1] > 1:
        return _products(field, x, t, memory, lambda some: probes[:, some].transpose(0, 1), probes.shape[1])
    v, at, _ = _graph(field, x, t, measured=False)
    keep = _differentiable(x)
    return v if keep else v.detach(), _product(v, at, probes[:, 0], keep)[:, None]


def bytes_per_row(field: Field, x: Tensor, t: Tensor) -> int:
    """What one row of x keeps for the way back through the field."""
    first, both = (_graph(field, x[:1].expand(n, *x.shape[1:]), t[:1].expand(n))[2] for n in (1, 2))
    return max(1, both - first)


def _forward(field: Field, x: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
    size = math.prod(x.shape[1:])
    directions = torch.eye(size, dtype=x.dtype, device=x.device).reshape(1, size, *x.shape[1:])
    v = field(Dual(x, Chain.of(directions)), t)
    if not isinstance(v, Dual):
        raise NoRule("The field lost its directions, or does not depend on x.")
    return v.value, v.tangent.trace().expand(len(x))


def _backward(field: Field, x: Tensor, t: Tensor, memory: int) -> tuple[Tensor, Tensor]:
    size = math.prod(x.shape[1:])

    def units(some: Tensor) -> Tensor:
        unit = torch.nn.functional.one_hot(some, size).to(x).reshape(-1, 1, *x.shape[1:])
        return unit.expand(-1, len(x), *x.shape[1:])

    v, diagonal = _products(field, x, t, memory, units, size)
    return v, diagonal.sum(1)


def _products(
    field: Field, x: Tensor, t: Tensor, memory: int, directions: Callable[[Tensor], Tensor], count: int
) -> tuple[Tensor, Tensor]:
    """v and e'(dv/dx)e for each direction: `directions` of indices `(n,)` are `(n, batch, *event)`."""
    v, at, kept = _graph(field, x, t)
    each, keep = torch.arange(count, device=x.device), _differentiable(x)
    if keep:  # one at a time: side by side, PyTorch 2.13 cannot differentiate the gradient of a group norm
        parts = [_product(v, at, directions(some)[0], keep)[None] for some in each.split(1)]
    else:
        many = max(1, memory // max(1, kept))
        parts = [_product(v, at, directions(some), keep) for some in each.split(many)]
    return v if keep else v.detach(), torch.cat(parts).mT


def _product(v: Tensor, x: Tensor, e: Tensor, keep: bool) -> Tensor:
    """e'(dv/dx)e for directions `(n, batch, *event)`, or for one without n; differentiable if `keep`."""
    if not v.requires_grad:  # it does not depend on x
        return e.new_zeros(e.shape[: e.ndim - x.ndim + 1])
    several = e.ndim > x.ndim
    (product,) = torch.autograd.grad(v, x, e, retain_graph=True, create_graph=keep, is_grads_batched=several)
    shape = (*e.shape[: e.ndim - x.ndim + 1], -1)
    return torch.linalg.vecdot(product.reshape(shape), e.reshape(shape))


def _differentiable(x: Tensor) -> bool:
    return torch.is_grad_enabled() and x.requires_grad


def _graph(field: Field, x: Tensor, t: Tensor, measured: bool = True) -> tuple[Tensor, Tensor, int]:
    """v as a function of x that can be gone back through, that x, and the bytes kept for it."""
    kept = 0

    def count(tensor: Tensor) -> Tensor:
        nonlocal kept
        kept += tensor.numel() * tensor.element_size()
        return tensor.detach()  # a node that kept its own output as it is would keep itself alive for ever

    keep = _differentiable(x)
    at = x if keep else x.detach().requires_grad_()
    with torch.enable_grad():
        if keep or not measured:
            return field(at, t), at, kept
        with torch.autograd.graph.saved_tensors_hooks(count, lambda tensor: tensor):
            return field(at, t), at, kept
