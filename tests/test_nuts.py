"""The no-U-turn transition: against plain recursion, its choice of a leaf, the laws it leaves invariant."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import pyro
import pyro.distributions as dist
import pytest
import torch
from scipy.stats import chisquare
from torch import Tensor

from probgen import NUTS, infer
from probgen.core import InputError
from probgen.kernels import Coordinates, Evaluate, Point, Tuning, leapfrog, no_u_turn
from probgen.kernels.no_u_turn import NUTSKernel, Tree
from statistics_tools import ALLOWED_Z

MAX_DEPTH = 8


@pytest.fixture(autouse=True)
def no_gradients() -> Any:
    with torch.no_grad():
        yield


# --- densities by hand --------------------------------------------------------------------------------------------

COVARIANCE = torch.tensor([[1.0, 1.1, 0.2], [1.1, 2.0, 0.5], [0.2, 0.5, 0.7]], dtype=torch.float64)
LOC = torch.tensor([1.0, -2.0, 0.5], dtype=torch.float64)[:, None]
PRECISION = torch.linalg.inv(COVARIANCE)


def gaussian(x: Tensor) -> tuple[Tensor, Tensor]:
    """N(LOC, COVARIANCE)."""
    grad = -PRECISION @ (x - LOC)
    return 0.5 * ((x - LOC) * grad).sum(0), grad


def bent(x: Tensor) -> tuple[Tensor, Tensor]:
    """A lopsided well: log p = -a^4/4 + a/2 - (b - a^2)^2 - b/4 with x = (a, b)."""
    a, b = x
    gap = b - a.square()
    value = -(a**4) / 4 + a / 2 - gap.square() - b / 4
    return value, torch.stack([-(a**3) + 0.5 + 4 * a * gap, -2 * gap - 0.25])


def funnel(x: Tensor) -> tuple[Tensor, Tensor]:
    """v ~ N(0, 3^2), w ~ N(0, e^v)."""
    v, w = x
    precision = (-v).exp()
    value = -v.square() / 18 - 0.5 * v - 0.5 * w.square() * precision
    return value, torch.stack([-v / 9 - 0.5 + 0.5 * w.square() * precision, -w * precision])


# --- running the kernel -------------------------------------------------------------------------------------------


def standard_normals(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def tuning(dim: int, step_size: float | Tensor, n: int) -> Tuning:
    like = torch.ones(n, dtype=torch.float64)
    return Tuning(step_size * like, Coordinates.identity(dim, like), like[0])


class Run(NamedTuple):
    state: Point
    positions: Tensor
    stats: dict[str, Tensor]


def run(
    evaluate: Evaluate,
    position: Tensor,
    step_size: float | Tensor,
    noise: Tensor,
    kernel: NUTSKernel | None = None,
) -> Run:
    kernel = kernel or NUTSKernel(MAX_DEPTH)
    dim, n = position.shape
    state = kernel.start(evaluate, position, noise[0])
    return Run(*kernel.transitions(evaluate, state, tuning(dim, step_size, n), noise))


def noise_for(seed: int, count: int, dim: int, n: int) -> Tensor:
    return standard_normals(seed, count, NUTSKernel(MAX_DEPTH).normals(dim), n)


# --- the same in plain recursion ----------------------------------------------------------------------------------


class Leaf(NamedTuple):
    point: Point
    momentum: Tensor
    change: float


class Subtree(NamedTuple):
    leaves: list[Leaf]  # in the order in which they grew
    valid: bool

    @property
    def total(self) -> Tensor:
        return torch.stack([leaf.momentum for leaf in self.leaves]).sum(0)


def turns(total: Tensor, first: Leaf, last: Leaf) -> bool:
    return bool((total * first.momentum).sum() <= 0) or bool((total * last.momentum).sum() <= 0)


def halves_turn(a: Subtree, b: Subtree) -> bool:
    """The U-turn criterion across two neighbours, as in Stan."""
    return (
        turns(a.total + b.total, a.leaves[0], b.leaves[-1])
        or turns(a.total + b.leaves[0].momentum, a.leaves[0], b.leaves[0])
        or turns(b.total + a.leaves[-1].momentum, a.leaves[-1], b.leaves[-1])
    )


class Recursion:
    """One chain, one trajectory."""

    def __init__(self, evaluate: Evaluate, position: Tensor, momentum: Tensor, step_size: float) -> None:
        self.evaluate, self.step_size = evaluate, step_size
        point = Point(position, *evaluate(position))
        self.energy = float(0.5 * momentum.square().sum() - point.log_prob)
        self.tree = Subtree([Leaf(point, momentum, 0.0)], True)
        self.doublings: list[list[Leaf]] = [self.tree.leaves]
        self.num_steps = 0

    def grow(self, directions: list[int]) -> int:
        """Double until it turns; the number of doublings."""
        for depth, direction in enumerate(directions):
            # Leaves run from the end that stays to the end that grows.
            old = (
                self.tree.leaves
                if depth == 0 or direction == directions[depth - 1]
                else self.tree.leaves[::-1]
            )
            new = self.build(old[-1], direction, depth)
            if not new.valid:
                return depth
            self.doublings.append(new.leaves)
            self.tree = Subtree(old + new.leaves, True)
            if halves_turn(Subtree(old, True), new):
                return depth + 1
        return len(directions)

    def build(self, end: Leaf, direction: int, depth: int) -> Subtree:
        if depth == 0:
            self.num_steps += 1
            step = torch.tensor(direction * self.step_size, dtype=torch.float64)
            point, momentum = leapfrog(self.evaluate, end.point, end.momentum, step)
            change = float(0.5 * momentum.square().sum() - point.log_prob) - self.energy
            return Subtree([Leaf(point, momentum, change)], change < 1000)
        first = self.build(end, direction, depth - 1)
        if not first.valid:
            return first
        second = self.build(first.leaves[-1], direction, depth - 1)
        valid = second.valid and not halves_turn(first, second)
        return Subtree(first.leaves + second.leaves, valid)


def disagreements(num_chains: int = 150) -> int:
    """How many of many random trajectories, on three densities, are not those of the recursion."""
    wrong = 0
    for seed, evaluate, dim in ((1, gaussian, 3), (2, bent, 2), (3, funnel, 2)):
        position = standard_normals(seed, dim, num_chains)
        step_size = (
            0.02 * 40 ** torch.rand(num_chains, generator=torch.Generator().manual_seed(seed))
        ).double()
        noise = noise_for(seed + 10, 1, dim, num_chains)
        found = run(evaluate, position, step_size, noise)
        for i in range(num_chains):
            one = Recursion(evaluate, position[:, i : i + 1], noise[0, :dim, i : i + 1], float(step_size[i]))
            depth = one.grow([1 if z >= 0 else -1 for z in noise[0, dim::2, i]])
            leaves = torch.cat([leaf.point.position for leaves in one.doublings for leaf in leaves], 1)
            gap = (leaves - found.positions[0, :, i : i + 1]).abs().amax(0).min()
            same = depth == found.stats["tree_depth"][0, i] and one.num_steps == found.stats["n_steps"][0, i]
            wrong += not (same and gap < 1e-8)
    return wrong


def test_trees_are_those_of_the_recursion() -> None:
    """450 trajectories of depth 0 to 8 on three densities: the same depth and gradients, the draw one of the leaves."""
    assert disagreements() == 0


@pytest.mark.parametrize("blind_to", ["blocks", "halves"])
def test_the_recursion_sees_a_missing_check(blind_to: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Mutants: blocks of a doubling are not looked at; the stretches across two halves are not."""
    turning, returns = no_u_turn._turning, no_u_turn._returns

    def without_blocks(tree: Tree) -> tuple[Tensor, Tensor]:
        blocks, everything = turning(tree)
        return torch.zeros_like(blocks), everything

    calls = iter(range(10**9))

    def whole_alone(*args: Tensor) -> Tensor:
        found = returns(*args)
        return found if next(calls) % 3 == 0 else torch.zeros_like(found)

    if blind_to == "blocks":
        monkeypatch.setattr(no_u_turn, "_turning", without_blocks)
    else:
        monkeypatch.setattr(no_u_turn, "_returns", whole_alone)
    assert disagreements(60) > 3


# --- the choice of a leaf -----------------------------------------------------------------------------------------


def leaf_probabilities(doublings: list[list[Leaf]]) -> Tensor:
    """Within a doubling by weight; a doubling against all before it with probability min(1, ratio of weights)."""
    chances, total = torch.ones(1, dtype=torch.float64), 1.0
    for leaves in doublings[1:]:
        weights = torch.tensor([math.exp(-leaf.change) for leaf in leaves], dtype=torch.float64)
        new = float(weights.sum())
        moved = min(1.0, new / total)
        chances = torch.cat([(1 - moved) * chances, moved * weights / new])
        total += new
    return chances


def p_of_choice(num_chains: int = 20_000) -> float:
    """p-value of the leaves that many chains choose, all of them on one trajectory of 32 leaves."""
    position = torch.tensor([[-0.6], [-1.0]], dtype=torch.float64)
    momentum = torch.tensor([[-0.3], [-1.2]], dtype=torch.float64)
    step_size, signs = 0.2, torch.tensor([1.0] + [-1.0] * (MAX_DEPTH - 1))
    one = Recursion(bent, position, momentum, step_size)
    assert one.grow([int(sign) for sign in signs]) == 5
    noise = noise_for(0, 1, 2, num_chains)
    noise[0, :2] = momentum
    noise[0, 2::2] = noise[0, 2::2].abs() * signs[:, None]
    found = run(bent, position.repeat(1, num_chains), step_size, noise)
    leaves = torch.cat([leaf.point.position for leaves in one.doublings for leaf in leaves], 1)
    chosen = (found.positions[0][:, :, None] - leaves[:, None]).abs().sum(0).argmin(1)
    expected = leaf_probabilities(one.doublings) * num_chains
    counts = torch.bincount(chosen, minlength=len(expected)).double()
    return float(chisquare(counts[expected > 0], expected[expected > 0]).pvalue)


def flat_weights(weigh: Callable[..., Tree]) -> Callable[..., Tree]:
    return lambda tree, change: weigh(tree, torch.zeros_like(change))


def always_joins(join: Callable[..., Tree]) -> Callable[..., Tree]:
    return lambda tree, *rest: join(tree._replace(uniform=tree.uniform * 1e-300), *rest)


def test_leaves_are_chosen_by_their_weight() -> None:
    """20,000 choices: shares that are off by more than about 0.01 would be seen."""
    assert p_of_choice() > 1e-4


@pytest.mark.parametrize(("part", "mutant"), [("_weigh", flat_weights), ("_join", always_joins)])
def test_wrong_choices_are_seen(part: str, mutant: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(no_u_turn, part, mutant(getattr(no_u_turn, part)))
    assert p_of_choice() < 1e-10


# --- what is left invariant ---------------------------------------------------------------------------------------


def grid_of_bent() -> tuple[Tensor, Tensor]:
    """Points `(2, m)` and their probabilities: quadrature, exact to many digits as the density is smooth."""
    a, b = torch.linspace(-4, 4, 801).double(), torch.linspace(-6, 14, 1601).double()
    points = torch.cartesian_prod(a, b).mT
    return points, bent(points)[0].softmax(0)


def statistics_of(x: Tensor, centre: Tensor, scale: Tensor, cuts: Tensor) -> Tensor:
    """Means, second moments and shares below the cuts `(statistics, ...)` of x `(..., dim, n)`."""
    white = (x - centre) / scale
    parts = [white, white.square(), white * white.roll(1, -2)]
    parts += [(x < cut).double() for cut in cuts]
    return torch.cat(parts, -2)


def exact_bent() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Centre, scale, cuts and the expectation of the statistics."""
    points, weights = grid_of_bent()
    centre = (points * weights).sum(1, keepdim=True)
    scale = ((points - centre).square() * weights).sum(1, keepdim=True).sqrt()
    cuts = torch.stack([centre - scale, centre, centre + scale])
    return centre, scale, cuts, (statistics_of(points, centre, scale, cuts) * weights).sum(1)


def exact_gaussian() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    scale = COVARIANCE.diagonal().sqrt()[:, None]
    correlation = COVARIANCE / (scale * scale.mT)
    z = torch.tensor([-1.2, 0.0, 0.7], dtype=torch.float64)
    below = (0.5 * torch.erfc(-z / math.sqrt(2)))[:, None].expand(3, 3).flatten()
    one = torch.ones(3, dtype=torch.float64)
    products = torch.stack([correlation[i, i - 1] for i in range(3)])
    cuts = LOC + z[:, None, None] * scale
    return LOC, scale, cuts, torch.cat([0 * one, one, products, below])


LAWS: dict[str, tuple[Evaluate, Callable[[], Any], float]] = {
    "gaussian": (gaussian, exact_gaussian, 0.75),
    "bent": (bent, exact_bent, 0.4),
}


def invariance_z(law: str, change_noise: Callable[[Tensor, int], None] | None = None) -> float:
    """The largest |z| of all statistics: 400 chains of 150 draws after 50 thrown away, errors between chains."""
    evaluate, exact, step_size = LAWS[law]
    centre, scale, cuts, expected = exact()
    dim, n = len(centre), 400
    noise = noise_for(5, 200, dim, n)
    if change_noise:
        change_noise(noise, dim)
    found = run(evaluate, centre + scale * standard_normals(6, dim, n), step_size, noise)
    by_chain = statistics_of(found.positions[50:], centre, scale, cuts).mean(0)
    error = by_chain.std(1) / math.sqrt(n)
    return float(((by_chain.mean(1) - expected) / error).abs().max())


@pytest.mark.parametrize("law", LAWS)
def test_the_law_is_left_invariant(law: str) -> None:
    """Biases of about 2 % of a standard deviation, or of 1 % of a share, would be seen."""
    assert invariance_z(law) < ALLOWED_Z


def same_momentum(noise: Tensor, dim: int) -> None:
    noise[:, :dim] = noise[0, :dim]


def one_direction(noise: Tensor, dim: int) -> None:
    noise[:, dim::2] = noise[:, dim::2].abs()


@pytest.mark.parametrize("mutant", [same_momentum, one_direction])
def test_wrong_randomness_is_seen(mutant: Any) -> None:
    assert invariance_z("bent", mutant) > ALLOWED_Z


@pytest.mark.parametrize(("part", "mutant"), [("_weigh", flat_weights), ("_join", always_joins)])
def test_wrong_weights_are_seen(part: str, mutant: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(no_u_turn, part, mutant(getattr(no_u_turn, part)))
    assert invariance_z("bent") > ALLOWED_Z


# --- chains beside chains -----------------------------------------------------------------------------------------


def test_chains_are_not_disturbed_by_others() -> None:
    """Chain i alone, with the same noise, makes the same draws, though trees of others are many times as large."""
    n, noise = 6, noise_for(3, 5, 2, 6)
    position, step_size = standard_normals(4, 2, n), torch.logspace(-2, -0.3, n).double()
    together = run(bent, position, step_size, noise)
    assert together.stats["n_steps"].amax() > 20 * together.stats["n_steps"].amin()
    for i in range(n):
        alone = run(bent, position[:, i : i + 1], step_size[i], noise[:, :, i : i + 1])
        torch.testing.assert_close(alone.positions[..., 0], together.positions[..., i], rtol=0, atol=1e-9)
        assert torch.equal(alone.stats["n_steps"][:, 0], together.stats["n_steps"][:, i])


def test_not_waiting_changes_nothing() -> None:
    """Many transitions at once are those made one after another, and the same again to the bit."""
    kernel, noise, position = NUTSKernel(MAX_DEPTH), noise_for(7, 9, 2, 8), standard_normals(8, 2, 8)
    at_once, again = (run(bent, position, 0.3, noise) for _ in range(2))
    state = kernel.start(bent, position, noise[0])
    for k, z in enumerate(noise):
        state, stats = kernel.step(bent, state, tuning(2, 0.3, 8), z)
        assert torch.equal(state.position, at_once.positions[k])
        assert all(torch.equal(value, at_once.stats[name][k]) for name, value in stats.items())
    assert all(torch.equal(a, b) for a, b in zip(state, at_once.state, strict=True))
    assert torch.equal(at_once.positions, again.positions)
    value, grad = bent(state.position)
    torch.testing.assert_close(state.log_prob, value)
    torch.testing.assert_close(state.grad, grad)


@pytest.mark.slow
def test_compiled_ticks_make_the_same_draws() -> None:
    noise, position = noise_for(7, 3, 2, 4), standard_normals(8, 2, 4)
    eager = run(bent, position, 0.3, noise)
    compiled = run(bent, position, 0.3, noise, NUTSKernel(MAX_DEPTH, compile=True))
    torch.testing.assert_close(compiled.positions, eager.positions)
    for name, value in eager.stats.items():
        torch.testing.assert_close(compiled.stats[name], value)


# --- statistics and settings --------------------------------------------------------------------------------------


def test_divergences_are_counted_and_leave_the_chain_where_it_was() -> None:
    found = run(funnel, standard_normals(1, 2, 20), 1.5, noise_for(2, 100, 2, 20))
    diverging = found.stats["diverging"]
    assert 0.005 < diverging.double().mean() < 0.5
    assert bool(torch.isfinite(found.positions).all())
    calm = run(gaussian, LOC.repeat(1, 20), 0.2, noise_for(2, 20, 3, 20))
    assert not calm.stats["diverging"].any()


def test_a_density_of_nothing_is_a_divergence() -> None:
    """NaN beyond a wall: the draws stay on this side of it."""

    def walled(x: Tensor) -> tuple[Tensor, Tensor]:
        value, grad = gaussian(x)
        return torch.where(x[0] > 1.5, torch.nan, value), grad

    found = run(walled, LOC.repeat(1, 50), 0.3, noise_for(2, 40, 3, 50))
    assert bool((found.positions[:, 0] <= 1.5).all())
    assert bool(found.stats["diverging"].any())


@pytest.mark.parametrize("depth", [1, 3])
def test_trees_end_at_their_greatest_depth(depth: int) -> None:
    kernel = NUTSKernel(depth)
    noise = standard_normals(0, 4, kernel.normals(3), 10)
    found = run(gaussian, LOC.repeat(1, 10) + 1, 1e-3, noise, kernel)
    assert bool((found.stats["n_steps"] == 2**depth - 1).all())
    assert bool((found.stats["tree_depth"] == depth).all())
    assert bool(found.stats["reached_max_tree_depth"].all())


def model() -> None:
    loc = pyro.sample("loc", dist.Normal(0.0, 10.0))
    scale = pyro.sample("scale", dist.HalfNormal(2.0))
    with pyro.plate("row", 6):
        pyro.sample("y", dist.Normal(loc, scale))


DATA = {"y": torch.tensor([1.0, 2.5, 0.3, 1.8, 3.1, 0.9])}


def test_the_engine_adapts_and_reports() -> None:
    posterior = infer(model, NUTS(num_warmup=150), data=DATA, num_draws=100, seed=1)
    assert posterior["loc"].shape == (4, 100)
    stats = posterior.stats
    assert {"acceptance_rate", "diverging", "energy", "lp", "n_steps", "tree_depth"} < set(stats)
    assert 0.65 < stats["acceptance_rate"].mean() < 0.97
    assert stats["diverging"].dtype == stats["reached_max_tree_depth"].dtype == torch.bool
    assert posterior.cost.gradients == int(stats["n_steps"].sum())
    assert 0.1 < float(posterior.run_stats["step_size"].mean()) < 3


def test_chains_go_on_as_if_never_stopped() -> None:
    engine = NUTS(num_warmup=30)
    whole = infer(model, engine, data=DATA, num_draws=12, num_chains=2, seed=1)
    first = infer(model, engine, data=DATA, num_draws=7, num_chains=2, seed=1)
    rest = infer(model, engine, data=DATA, num_draws=5, num_chains=2, seed=1, state=first.state)
    for site, draws in whole.draws.items():
        assert torch.equal(draws, torch.cat([first[site], rest[site]], 1))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"target_accept": 1.2}, "target_accept must lie in"),
        ({"num_warmup": 0}, "there must be a step_size"),
        ({"num_warmup": -1}, "num_warmup"),
        ({"step_size": 0.0}, "step_size must be > 0"),
        ({"max_tree_depth": 0}, "max_tree_depth"),
        ({"metric": "dens"}, "did you mean 'dense'"),
        ({"thin": 0}, "thin"),
    ],
)
def test_bad_settings_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        NUTS(**settings)
