"""A field's divergence is the trace of its Jacobian, whatever the network and whichever way derivatives go."""

from __future__ import annotations

import resource
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from probgen import MLP, GaussianMixture, TimeMLP, UNet
from probgen.dynamics import estimated_divergence, exact_divergence
from probgen.dynamics.tangents import Chain, Dual, NoRule
from probgen.dynamics.trace import bytes_per_row
from statistics_tools import ALLOWED_Z, z_of_mean

ROWS = 4


class PlainMLP(nn.Module):
    def __init__(
        self, size: int, widths: tuple[int, ...], activation: Callable[[], nn.Module] = nn.SiLU
    ) -> None:
        super().__init__()
        self.layers = MLP((size + 1,), (size,), widths, activation)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        return self.layers(torch.cat([x, t[:, None]], dim=1))


class Odd(nn.Module):
    """Everything with a rule that the networks of the package do not use."""

    def __init__(self) -> None:
        super().__init__()
        self.matrix = nn.Parameter(torch.randn(3, 3))
        self.norm = nn.LayerNorm(3, elementwise_affine=False)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        y = 1 - (x @ self.matrix) * torch.sin(x) / 2 + x / (1 + x.square())
        y = torch.cat([y.exp(), x], -1)
        y = nn.functional.gelu(nn.functional.dropout(y, training=False)).reshape(len(x), 2, 3).flatten(1)
        return self.norm(nn.functional.linear(y, torch.ones(3, 6).to(y).tril())) - t[:, None] * x


NETWORKS: dict[str, tuple[nn.Module, tuple[int, ...]]] = {
    "affine": (PlainMLP(3, ()), (3,)),
    "one hidden layer": (PlainMLP(3, (8,)), (3,)),
    "two hidden layers": (PlainMLP(3, (8, 9)), (3,)),
    "three hidden layers": (PlainMLP(3, (8, 9, 7), nn.Tanh), (3,)),
    "ReLU": (PlainMLP(3, (8, 9), nn.ReLU), (3,)),
    "Softplus": (PlainMLP(3, (8, 9), nn.Softplus), (3,)),
    "TimeMLP": (TimeMLP((2,), 16), (2,)),
    "TimeMLP on images": (TimeMLP((1, 2, 3), 16), (1, 2, 3)),
    "UNet": (UNet((1, 5, 6), widths=(4, 8)), (1, 5, 6)),
    "odd": (Odd(), (3,)),
    "oracle": (GaussianMixture.example(3), (3,)),
    "scalar event": (MLP((), (), (8,)), ()),
}
FORWARD = {name for name in NETWORKS if name not in ("UNet", "oracle")}


def field_and_rows(name: str) -> tuple[Callable[[Tensor, Tensor], Tensor], Tensor, Tensor]:
    """a(t) x - net(x, t) with weights of unit gain, in float64; each row at a time of its own."""
    net, event = NETWORKS[name]
    generator = torch.Generator().manual_seed(len(name))
    net.double().requires_grad_(False)
    for weight in net.parameters():  # output layers start at zero
        scale = 0.1 if weight.ndim < 2 else weight[0].numel() ** -0.5
        weight.normal_(std=scale, generator=generator)
    x = torch.randn(ROWS, *event, dtype=torch.float64, generator=generator)
    t = torch.rand(ROWS, dtype=torch.float64, generator=generator)
    return lambda x, t: t.cos().reshape(-1, *[1] * len(event)) * x - call(net, x, t), x, t


def call(net: nn.Module, x: Tensor, t: Tensor) -> Tensor:
    return net(x) if isinstance(net, MLP) else net(x, t)


def jacobians(field: Callable[[Tensor, Tensor], Tensor], x: Tensor, t: Tensor) -> Tensor:
    size = x[0].numel()
    rows = [torch.func.jacrev(lambda y, i=i: field(y[None], t[i : i + 1])[0])(x[i]) for i in range(len(x))]
    return torch.stack(rows).reshape(len(x), size, size)


@pytest.mark.parametrize("name", NETWORKS)
def test_exact_and_estimated_divergence_are_the_jacobians(name: str) -> None:
    field, x, t = field_and_rows(name)
    expected = jacobians(field, x, t)
    probes = torch.randn(ROWS, 3, *x.shape[1:], dtype=torch.float64)
    for memory in (1, 2**30):  # one direction after another, and all side by side
        v, trace = exact_divergence(field, x, t, memory)
        torch.testing.assert_close(v, field(x, t))
        torch.testing.assert_close(trace, expected.diagonal(dim1=1, dim2=2).sum(1))
        _, traces = estimated_divergence(field, x, t, probes, memory)
        flat = probes.reshape(ROWS, 3, -1)
        torch.testing.assert_close(traces, torch.einsum("bni,bij,bnj->bn", flat, expected, flat))


@pytest.mark.parametrize("name", NETWORKS)
def test_which_networks_are_gone_through_forward(name: str) -> None:
    """So that a rule that stops to apply, which costs time but no exactness, is seen."""
    field, x, t = field_and_rows(name)
    dual = Dual(x, Chain.of(torch.eye(x[0].numel()).to(x).reshape(1, -1, *x.shape[1:])))
    if name in FORWARD:
        field(dual, t)
    else:
        with pytest.raises(NoRule):
            field(dual, t)


@pytest.mark.parametrize("name", ["two hidden layers", "three hidden layers", "TimeMLP", "UNet", "odd"])
def test_the_divergence_is_differentiable_in_x(name: str) -> None:
    field, x, t = field_and_rows(name)

    def trace_of(x: Tensor) -> Tensor:
        return jacobians(field, x, t).diagonal(dim1=1, dim2=2).sum()

    at = x.clone().requires_grad_()
    (expected,) = torch.autograd.grad(trace_of(at), at)
    for divergence in (
        lambda x: exact_divergence(field, x, t)[1].sum(),
        lambda x: estimated_divergence(field, x, t, units(x))[1].sum(),
    ):
        at = x.clone().requires_grad_()
        (found,) = torch.autograd.grad(divergence(at), at)
        torch.testing.assert_close(found, expected)


def units(x: Tensor) -> Tensor:
    """The coordinates' directions, as probes."""
    size = x[0].numel()
    return torch.eye(size).to(x).reshape(1, size, *x.shape[1:]).expand(len(x), *[-1] * x.ndim)


def test_what_has_no_rule_is_not_guessed() -> None:
    """Operations that would go wrong silently if treated as element by element fall back to the backward way."""
    x, t = torch.randn(ROWS, 3, dtype=torch.float64), torch.zeros(ROWS, dtype=torch.float64)
    fields: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
        "in place": lambda x, t: nn.functional.relu(x * 1, inplace=True),
        "softmax": lambda x, t: x.softmax(1),
        "broadcast": lambda x, t: x * x.sum(1, keepdim=True),
        "detached": lambda x, t: x * x.detach(),
        "indexed": lambda x, t: x[:, [2, 0, 1]],
        "asked for": lambda x, t: torch.zeros_like(x) + x.square(),
        "outside": lambda x, t: x * torch.special.erf(x),
        "turned": lambda x, t: x.flip(1) ** 2,
    }
    for name, field in fields.items():
        expected = jacobians(field, x, t).diagonal(dim1=1, dim2=2).sum(1)
        if name == "detached":  # autograd's own meaning of it
            expected = x.sum(1)
        torch.testing.assert_close(exact_divergence(field, x, t)[1], expected, msg=name)


def test_a_field_that_does_not_depend_on_x() -> None:
    x, t = torch.randn(ROWS, 3), torch.zeros(ROWS)
    v, trace = exact_divergence(lambda x, t: torch.ones(ROWS, 3), x, t)
    assert v.shape == x.shape
    assert torch.equal(trace, torch.zeros(ROWS))
    assert torch.equal(
        estimated_divergence(lambda x, t: torch.ones(ROWS, 3), x, t, units(x))[1], torch.zeros(ROWS, 3)
    )


def test_signs_estimate_the_trace_without_bias() -> None:
    """20,000 probes of one row: the mean is known to 0.7 % of an estimate's spread, a bias of 4 % of it is seen."""
    field, x, t = field_and_rows("TimeMLP on images")
    x, t = x[:1], t[:1]
    generator = torch.Generator().manual_seed(0)
    probes = torch.randn(1, 20_000, *x.shape[1:], dtype=torch.float64, generator=generator).sign()
    _, traces = estimated_divergence(field, x, t, probes)
    exact = float(exact_divergence(field, x, t)[1])
    assert abs(z_of_mean(traces, exact)) < ALLOWED_Z
    _, wrong = estimated_divergence(field, x, t, probes * 1.05)  # E[ee'] is not I
    assert abs(z_of_mean(wrong, exact)) > ALLOWED_Z


def test_bytes_grow_with_what_a_row_keeps() -> None:
    field, x, t = field_and_rows("UNet")

    def of(side: int) -> int:
        return bytes_per_row(
            UNet((1, side, side), widths=(4,)).double(), x.new_zeros(1, 1, side, side), t[:1]
        )

    small, large = of(8), of(16)
    assert 3.5 < large / small < 4.5
    assert bytes_per_row(field, x, t) > 1000


def test_what_one_evaluation_kept_the_next_does_not_find():
    """Group norms keep an output of their own; 30 evaluations that each kept theirs would add 200 MB or more."""
    net, x, t = UNet((1, 28, 28), widths=(16, 16)), torch.randn(16, 1, 28, 28), torch.full((16,), 0.5)
    probes = torch.randn(16, 2, 1, 28, 28).sign()
    estimated_divergence(net.requires_grad_(False), x, t, probes)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for _ in range(30):
        estimated_divergence(net, x, t, probes)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 60_000  # kilobytes
