"""What stands side by side is handled part by part, with the same result."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from probgen.kernels.parts import in_parts
from probgen.targets.graphs import recorded

aten = torch.ops.aten
X = torch.randn(3, 7, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def turned(x: Tensor) -> Tensor:
    """Two parts, of one row and of two."""
    return torch.cat([x[2:].sin(), x[:2] * 3])


def many(x: Tensor) -> Tensor:
    """More parts than are kept apart."""
    return torch.cat([x[:1].sin(), x[1:2].cos(), x[2:].exp(), x[:1].tan(), x[:1].square()])


def pointwise(x: Tensor) -> Tensor:
    return x + 0.5 * turned(x) * torch.tensor([[1.0], [2.0], [3.0]]) * x[0]


def chosen(x: Tensor) -> Tensor:
    return torch.where(x[0] > 0, turned(x), turned(2 * x))


def other_parts(x: Tensor) -> Tensor:
    return turned(x) + torch.cat([x[:2], x[:1]])


def broadcast(x: Tensor) -> Tensor:
    return turned(x) * torch.ones(2, 1, 1, dtype=x.dtype)


FUNCTIONS: dict[str, tuple[Callable[[Tensor], Tensor], int]] = {  # and how many `cat` are left
    "the whole": (turned, 1),
    "pointwise": (pointwise, 1),
    "where": (chosen, 1),
    "sum of parts": (lambda x: pointwise(x).square().sum(0), 0),
    "sum over columns": (lambda x: turned(x).sum(1), 1),
    "sum of everything": (lambda x: turned(x).sum(), 1),
    "kept dimension": (lambda x: turned(x).sum(0, keepdim=True), 0),
    "slice that is a part": (lambda x: turned(x)[1:].exp(), 0),
    "slice of two parts": (lambda x: torch.cat([turned(x), x])[:3].exp().sum(0), 0),
    "slice through a part": (lambda x: turned(x)[:2].exp(), 1),
    "slice of columns": (lambda x: turned(x)[:, 2:].exp(), 1),
    "cat of cats": (lambda x: torch.cat([turned(x), turned(x + 1)]).sum(0), 0),
    "along columns": (lambda x: torch.cat([turned(x), x], 1), 2),
    "many": (lambda x: many(x).exp().sum(0), 1),
    "other parts": (other_parts, 2),
    "broadcast over parts": (broadcast, 1),
    "other dtypes": (lambda x: torch.cat([x[:1].float(), x[1:]]).exp().sum(0), 1),
    "matrix": (lambda x: x @ turned(x).T, 1),
}


@pytest.mark.parametrize("name", FUNCTIONS)
def test_same_result_with_less_put_together(name: str) -> None:
    function, expected = FUNCTIONS[name]
    graph = recorded(in_parts(recorded(function, X)), X)
    torch.testing.assert_close(graph(X), function(X), rtol=1e-14, atol=1e-14)
    assert len(graph.graph.find_nodes(op="call_function", target=aten.cat.default)) == expected


def test_what_is_written_into_is_kept_whole() -> None:
    graph = torch.fx.Graph()
    x = graph.placeholder("x")
    whole = graph.call_function(aten.cat.default, ([x, x],))
    graph.output(graph.call_function(aten.mul_.Tensor, (whole, 2.0)))
    function = in_parts(torch.fx.GraphModule(torch.nn.Module(), graph))
    given = X.clone()
    torch.testing.assert_close(function(given), 2 * torch.cat([X, X]), rtol=0, atol=0)
    assert torch.equal(given, X)
