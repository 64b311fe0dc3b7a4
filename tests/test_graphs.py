"""Recorded operations: the rewritten graph does what the function does, and less of it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import Tensor
from torch.fx.experimental.proxy_tensor import make_fx

from probgen.randomness import forked_rng
from probgen.targets import density, read
from probgen.targets.graphs import recorded

EFFECTS = torch.tensor([28.0, 8, -3, 7, -1, 1, 18, 12], dtype=torch.float64)
ERRORS = torch.tensor([15.0, 10, 16, 11, 9, 11, 10, 18], dtype=torch.float64)
ONE = torch.ones((), dtype=torch.float64)


def schools() -> None:
    mu = pyro.sample("mu", dist.Normal(0 * ONE, 5.0))
    tau = pyro.sample("tau", dist.HalfCauchy(5.0 * ONE))
    with pyro.plate("schools", len(EFFECTS)):
        eta = pyro.sample("eta", dist.Normal(0 * ONE, 1.0))
        pyro.sample("y", dist.Normal(mu + tau * eta, ERRORS), obs=EFFECTS)


def correlated() -> None:
    i = torch.arange(6, dtype=torch.float64)
    covariance = 0.9 ** (i[:, None] - i).abs()
    pyro.sample("x", dist.MultivariateNormal(i, covariance))


def regression() -> None:
    x = torch.linspace(-1, 2, 12, dtype=torch.float64)[:, None] ** torch.arange(3)
    beta = pyro.sample("beta", dist.Normal(torch.zeros(3, dtype=torch.float64), 2.0).to_event(1))
    with pyro.plate("data", 12):
        pyro.sample("y", dist.Bernoulli(logits=x @ beta), obs=(x[:, 1] > 0.3).double())


def bounded() -> None:
    weights = pyro.sample("weights", dist.Dirichlet(torch.tensor([0.5, 2.0, 3.0], dtype=torch.float64)))
    low = pyro.sample("low", dist.Uniform(-1 * ONE, 2.0))
    pyro.sample("high", dist.Uniform(low, low + 1))
    pyro.factor("preference", weights[..., 0] * low - weights[..., 2].log())


def entries() -> None:
    """Entries taken one by one, written in place, and cumulated."""
    z = pyro.sample("z", dist.Normal(torch.zeros(4, dtype=torch.float64), 1.0).to_event(1))
    path = torch.stack([z[0], z[0] + 0.5 * z[1], z[2] * z[3]]).cumsum(0)
    pyro.sample(
        "y", dist.StudentT(3 * ONE, path, 0.5).to_event(1), obs=torch.tensor([0.3, 1.0, -2.0]).double()
    )


def constant_weights() -> None:
    """A latent whose scale is a product of many constants."""
    scale = ONE
    for factor in (2.0, 0.5, 3.0):
        scale = scale * factor
    with pyro.poutine.scale(scale=0.5):
        z = pyro.sample("z", dist.Gamma(2 * ONE, scale))
    pyro.sample("w", dist.Weibull(1 * ONE, 1 + z * 2 * 3 + 0 + 0))


PROGRAMS = [schools, correlated, regression, bounded, entries, constant_weights]


def value_and_grad(program: Any) -> tuple[Callable[[Tensor], tuple[Tensor, Tensor]], Tensor]:
    """Of five chains, as it would be without being recorded."""
    of_program = density(read(program))
    with forked_rng(3):
        u = torch.randn(of_program.dim, 5, dtype=torch.float64)

    def function(u: Tensor) -> tuple[Tensor, Tensor]:
        return of_program.value_and_grad(u)

    return function, u


@pytest.mark.parametrize("program", PROGRAMS, ids=lambda program: program.__name__)
def test_a_graph_gives_what_the_program_gives(program: Any) -> None:
    """To 1e-12 of the largest entry, at points other than the recorded one, with fewer operations."""
    function, u = value_and_grad(program)
    before, after = make_fx(function)(u), recorded(function, u)
    assert len(after.graph.nodes) < 0.75 * len(before.graph.nodes)
    for point in (u, u.flip(0) * 1.7, u + 0.3):
        for found, expected in zip(after(point), function(point), strict=True):
            size = expected.nan_to_num(0, 0, 0).abs().max()
            torch.testing.assert_close(found, expected, rtol=0, atol=float(1e-12 * size), equal_nan=True)


def test_gradients_come_in_columns() -> None:
    """As contiguous as points are: kernels add the two."""
    function, u = value_and_grad(schools)
    assert recorded(function, u)(u)[1].is_contiguous()


def nodes(function: Callable[..., Any], *examples: Tensor) -> list[str]:
    graph = recorded(function, *examples).graph
    return [str(node.target).split(".")[1] for node in graph.nodes if node.op == "call_function"]


U = torch.linspace(-1, 2, 6).reshape(2, 3)


@pytest.mark.parametrize(
    ("function", "left"),
    [
        (lambda u: u * torch.ones(3) + torch.zeros(2, 1) - 0, []),
        (lambda u: ((u * 2) / 4 * torch.full((3,), 6.0)).neg(), ["mul"]),
        (lambda u: u + 1 - torch.full((2, 3), 3.0) + 4, ["add"]),
        (lambda u: u.exp() * u.exp(), ["exp", "mul"]),
        (lambda u: u.mT.mT.reshape(3, 2).view(2, 3).expand(2, 3), []),
        (lambda u: u[:, None].sum(1).to(torch.float32), []),
        (lambda u: u.exp() + 0 * torch.zeros(3).log().exp(), ["exp"]),
    ],
)
def test_what_changes_nothing_is_left_out(function: Any, left: list[str]) -> None:
    assert nodes(function, U) == left
    torch.testing.assert_close(recorded(function, U)(U + 1), function(U + 1))


def test_constants_of_another_dtype_and_zero_divisors() -> None:
    """Products are taken in the dtype of the result; x / 0 is what it was."""

    def function(u: Tensor) -> Tensor:
        return u * 0.1 * torch.tensor([True, False, True]) / torch.tensor([3, 0, 7]) / 0.0

    u = U.double() + 0.01
    torch.testing.assert_close(recorded(function, u)(u), function(u), rtol=1e-15, atol=0, equal_nan=True)


def test_what_is_written_in_place_is_written() -> None:
    def function(u: Tensor) -> Tensor:
        total = torch.zeros_like(u)
        total += u
        total[0] *= 3
        row = torch.ones(3)
        row[1] = 5
        return total * row

    torch.testing.assert_close(recorded(function, U)(U + 1), function(U + 1))


def test_an_ill_conditioned_triangle_is_still_solved_with() -> None:
    """Its inverse would lose digits."""
    triangle = torch.diag(torch.tensor([1.0, 1e-9]))
    well = torch.tensor([[1.0, 0.0], [0.5, 2.0]])

    def solve(matrix: Tensor) -> Callable[[Tensor], Tensor]:
        return lambda u: torch.linalg.solve_triangular(matrix, u.mT[..., None], upper=False)

    assert "linalg_solve_triangular" in nodes(solve(triangle), U)
    assert "mm" in nodes(solve(well), U)
    torch.testing.assert_close(recorded(solve(well), U)(U + 1), solve(well)(U + 1))


def test_random_numbers_stay_random() -> None:
    graph = recorded(lambda u: u + torch.randn(3) + torch.randn(3), U)
    with forked_rng(0):
        first, second = graph(U), graph(U)
    assert bool((first != second).all())


@pytest.mark.parametrize("multiply", [lambda a, x: a @ x, lambda a, x: x @ a], ids=["left", "right"])
def test_a_matrix_that_all_chains_share_is_multiplied_once(
    multiply: Callable[[Tensor, Tensor], Tensor],
) -> None:
    """Not a copy of it for each chain; one of its own for each is left alone."""
    with forked_rng(0):
        shared, u = torch.randn(4, 4, dtype=torch.float64), torch.randn(4, 7, dtype=torch.float64)
        own = torch.randn(7, 4, 4, dtype=torch.float64)

    def over_chains(matrices: Tensor | None) -> Callable[[Tensor], Tensor]:
        if matrices is None:
            return torch.func.vmap(lambda x: multiply(shared, x), in_dims=-1)
        return lambda u: torch.func.vmap(multiply, in_dims=(0, -1))(matrices, u)

    for matrices, products in ((None, 0), (own, 1)):
        function = over_chains(matrices)
        graph = recorded(function, u)
        torch.testing.assert_close(graph(u), function(u), rtol=1e-12, atol=1e-12)
        assert sum(node.target is torch.ops.aten.bmm.default for node in graph.graph.nodes) == products
