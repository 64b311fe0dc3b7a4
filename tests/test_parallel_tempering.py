"""Parallel tempering: every rung keeps its own law under swaps, and modes are found in their proportions."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import pyro
import pyro.distributions as dist
import pytest
import torch
from scipy import stats
from torch import Tensor
from torch.distributions import constraints

from probgen.core import DataSets, InputError, Posterior
from probgen.inference import parallel_tempering
from probgen.inference.hmc import HMC, HMCKernel
from probgen.inference.parallel_tempering import (
    Ladder,
    ParallelTempering,
    TemperedKernel,
    TemperedState,
    equally_spaced,
)
from probgen.kernels import ChainState, Coordinates, Evaluate, Point, Stats, Tuning
from probgen.verbs import infer
from statistics_tools import ALLOWED_Z

WEIGHT = 0.3
SMALL = HMC(num_steps=6, num_warmup=300)


# --- swaps alone, in a world of three states ------------------------------------------------------------------------


class NoMove:
    """Chains that stay where they are, so that only swaps move them."""

    static: ClassVar[bool] = True

    def normals(self, dim: int) -> int:
        return 0

    def start(self, evaluate: Evaluate, position: Tensor, noise: Tensor) -> Point:
        return Point(position, *evaluate(position))

    def step(self, evaluate: Evaluate, state: Point, tuning: Tuning, noise: Tensor) -> tuple[Point, Stats]:
        return state, {}


LOG_P = torch.tensor([0.1, 0.3, 0.6], dtype=torch.float64).log()
BETA = torch.tensor([1.0, 0.5, 0.1], dtype=torch.float64)


def three_states(x: Tensor) -> tuple[Tensor, Tensor]:
    """p over the states 0, 1, 2 with probabilities 0.1, 0.3, 0.6."""
    return LOG_P[x[0].long()], torch.zeros_like(x)


def tuning_of(beta: Tensor, num_chains: int, step_size: float = 1.0, dim: int = 1) -> Tuning:
    steps = torch.full((num_chains * len(beta),), step_size, dtype=beta.dtype)
    return Tuning(steps, Coordinates.identity(dim, beta), steps[0], beta)


def swapped(kernel: TemperedKernel, num_chains: int, num_rounds: int) -> Tensor:
    """States `(chain, rung)` after rounds of swaps from independent draws of p^beta at each rung."""
    generator = torch.Generator().manual_seed(0)
    laws = torch.softmax(BETA[:, None] * LOG_P, -1)
    x = torch.multinomial(laws, num_chains, replacement=True, generator=generator).mT.reshape(1, -1).double()
    noise = torch.randn(num_rounds, 2, x.shape[1], generator=generator, dtype=torch.float64)
    state, tuning = kernel.start(three_states, x, noise[0]), tuning_of(BETA, num_chains)
    for z in noise:
        state, _ = kernel.step(three_states, state, tuning, z)
    return state.position.reshape(num_chains, len(BETA)).long()


def p_of_joint_law(states: Tensor) -> float:
    """p-value of the 27 joint states being as often as the product of the rungs' laws says."""
    law = torch.softmax(BETA[:, None] * LOG_P, -1)
    expected = (law[0][:, None, None] * law[1][:, None] * law[2]).flatten() * len(states)
    counts = torch.bincount(states[:, 0] * 9 + states[:, 1] * 3 + states[:, 2], minlength=27)
    return float(stats.chisquare(counts.numpy(), expected.numpy()).pvalue)


def test_swaps_keep_the_joint_law() -> None:
    """100,000 chains of three rungs: an error of 0.01 in the frequency of a state shows."""
    assert p_of_joint_law(swapped(TemperedKernel(NoMove(), 3), 100_000, num_rounds=5)) > 1e-4


@pytest.mark.parametrize("wrong", ["always", "of one rung", "upside down"])
def test_swaps_with_a_wrong_ratio_fail(wrong: str) -> None:
    class Mutant(TemperedKernel):
        def step(self, evaluate: Any, state: TemperedState, tuning: Tuning, noise: Tensor) -> Any:
            believed = {
                "always": 0 * BETA,
                "of one rung": torch.tensor([1.0, 0.0, 0.0]),
                "upside down": 1.5 - BETA,
            }
            return super().step(evaluate, state, tuning._replace(beta=believed[wrong] + 1e-12), noise)

    assert p_of_joint_law(swapped(Mutant(NoMove(), 3), 100_000, num_rounds=5)) < 1e-6


def test_without_rejections_walkers_climb_and_come_back() -> None:
    """At equal temperatures all swaps succeed: a walker is back after twice as many transitions as there are rungs."""
    rungs, rounds = 5, 40
    beta = torch.ones(rungs, dtype=torch.float64)
    x = torch.arange(rungs, dtype=torch.float64)[None]
    flat = lambda x: (torch.zeros(x.shape[1], dtype=x.dtype), torch.zeros_like(x))  # noqa: E731
    kernel = TemperedKernel(NoMove(), rungs)
    state, trips = kernel.start(flat, x, torch.zeros(2, rungs)), []
    for _ in range(rounds):
        state, found = kernel.step(flat, state, tuning_of(beta, 1), torch.ones(2, rungs, dtype=torch.float64))
        trips.append(int(found["round_trip"].sum()))
        assert sorted(state.position[0].tolist()) == [0, 1, 2, 3, 4]
        assert found["swap_rate"].tolist() == [1, 1, 1, 1, 0]
    assert state.position[0].tolist() == [0, 1, 2, 3, 4]  # 40 is four times 2 x 5
    assert sum(trips[: rungs - 1]) == 0
    assert sum(trips) == pytest.approx(rounds / 2, abs=rungs)


# --- every rung has its law -----------------------------------------------------------------------------------------


def gaussian(x: Tensor) -> tuple[Tensor, Tensor]:
    """N(1, 1) in each coordinate."""
    return -0.5 * (x - 1).square().sum(0), 1 - x


def rungs_after(kernel: TemperedKernel, coordinates: Coordinates, num_chains: int) -> Tensor:
    """u `(dim, chain, rung)` after 20 transitions from exact draws of every rung."""
    generator = torch.Generator().manual_seed(1)
    rungs = len(BETA)
    u = 1 + torch.randn(2, num_chains, rungs, generator=generator, dtype=torch.float64) / BETA.sqrt()
    x = coordinates.to_x(u.flatten(1))

    def evaluate(x: Tensor) -> tuple[Tensor, Tensor]:
        log_prob, grad = gaussian(coordinates.to_u(x))
        return log_prob, coordinates.pull(grad)

    tuning = tuning_of(BETA, num_chains, 0.5, dim=2)._replace(coordinates=coordinates)
    noise = torch.randn(21, kernel.normals(2), x.shape[1], generator=generator, dtype=torch.float64)
    state = kernel.start(evaluate, x, noise[20])
    for z in noise[:20]:
        state, _ = kernel.step(evaluate, state, tuning, z)
    return coordinates.to_u(state.position).unflatten(1, (num_chains, rungs))


def worst_of_rungs(u: Tensor) -> float:
    """Largest |z| of means and variances T of every rung, and of correlations between rungs."""
    n = u.shape[1]
    white = (u - 1) * BETA.sqrt()
    scores = [white.mean(1) * math.sqrt(n), (white.square().mean(1) - 1) * math.sqrt(n / 2)]
    products = torch.einsum("dni,dnj->dij", white, white) / n
    scores.append(products.tril(-1) * math.sqrt(n))
    return max(float(z.abs().max()) for z in scores)


COORDINATES = {
    "the same everywhere": torch.tensor([[1.0], [2.0]]),
    "of each rung": torch.tensor([[1.0, 1.5, 3.0], [0.8, 1.2, 2.0]]),
    "dense": torch.tensor([[[1.0, 0], [0.3, 1]], [[1.5, 0], [-0.5, 1]], [[3.0, 0], [1.0, 2]]]),
}


@pytest.mark.parametrize("scale", COORDINATES.values(), ids=COORDINATES)
def test_each_rung_keeps_the_variance_of_its_temperature(scale: Tensor) -> None:
    """50,000 chains: 2 % of a mean and 3 % of a variance show."""
    kernel = TemperedKernel(HMCKernel(num_steps=3), len(BETA))
    assert worst_of_rungs(rungs_after(kernel, Coordinates(scale.double()), 50_000)) < ALLOWED_Z


def test_rungs_at_a_wrong_law_are_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Swaps that carry x of one rung's coordinates into another's, or moves that forget the temperature."""
    kernel, each = (
        TemperedKernel(HMCKernel(num_steps=3), len(BETA)),
        Coordinates(COORDINATES["of each rung"].double()),
    )

    def carried(point: Point, source: Tensor, coordinates: Coordinates) -> Point:
        return Point(point.position[:, source], point.log_prob[source], point.grad[:, source])

    with monkeypatch.context() as patch:
        patch.setattr(parallel_tempering, "_moved", carried)
        assert worst_of_rungs(rungs_after(kernel, each, 20_000)) > 2 * ALLOWED_Z
    monkeypatch.setattr(parallel_tempering, "Tempered", lambda evaluate, beta: evaluate)
    assert worst_of_rungs(rungs_after(kernel, each, 20_000)) > 2 * ALLOWED_Z


# --- modes ----------------------------------------------------------------------------------------------------------


def two_modes(dim: int) -> Any:
    """0.3 N(-4, 1) + 0.7 N(4, 0.9^2) in every coordinate: 8 sqrt(dim) widths apart."""
    weights, locs = torch.tensor([WEIGHT, 1 - WEIGHT]), torch.tensor([[-4.0], [4.0]]).expand(2, dim)
    modes = dist.Normal(locs, torch.tensor([[1.0], [0.9]])).to_event(1)

    def two_modes() -> None:
        x = pyro.sample("x", dist.ImproperUniform(constraints.real_vector, (), (dim,)))
        pyro.factor("mixture", torch.logsumexp(weights.log() + modes.log_prob(x[..., None, :]), -1))

    return two_modes


def share_of_left(posterior: Posterior) -> tuple[float, float]:
    """The weight of the left mode and its error, from how chains differ."""
    each = (posterior["x"][..., 0] < 0).double().mean(1)
    return float(each.mean()), float(each.std() / math.sqrt(len(each)))


@pytest.mark.parametrize(("dim", "rungs"), [(2, 5), (8, 9)])
def test_modes_get_their_weights(dim: int, rungs: int) -> None:
    """Within 4.5 errors, of 0.02 at most: a weight off by 0.1 shows. Spreads within modes are right too."""
    posterior = infer(two_modes(dim), ParallelTempering(SMALL, rungs), num_draws=600, num_chains=64, seed=1)
    share, error = share_of_left(posterior)
    assert error < 0.02
    assert abs(share - WEIGHT) < ALLOWED_Z * error
    x = posterior.flat("x")
    left, right = x[x[:, 0] < 0], x[x[:, 0] > 0]
    assert float((left.mean(0) + 4).abs().max()) < 0.1
    assert float((right.mean(0) - 4).abs().max()) < 0.1
    assert float((left.std(0) - 1).abs().max()) < 0.08
    assert float((right.std(0) - 0.9).abs().max()) < 0.08
    assert int(posterior.stats["round_trip"].sum()) > 64 * 5


def test_hmc_alone_gets_the_weights_wrong() -> None:
    """Its chains all but never cross, so that the weights are those of its starts: the check above fails it."""
    posterior = infer(two_modes(8), SMALL, num_draws=400, num_chains=64, seed=1)
    left = posterior["x"][..., 0] < 0
    assert int((left[:, 1:] != left[:, :-1]).sum()) < 10
    share, error = share_of_left(posterior)
    assert abs(share - WEIGHT) > ALLOWED_Z * error


def test_data_sets_have_ladders_of_their_own() -> None:
    """x ~ N(1, 3^2), y ~ N(x^2, 0.5^2): two modes at each y, the weight of the left one by quadrature."""

    def squared() -> None:
        x = pyro.sample("x", dist.Normal(1.0, 3.0))
        pyro.sample("y", dist.Normal(x.square(), 0.5))

    y = torch.tensor([1.0, 6.0, 16.0])
    grid = torch.linspace(-10, 10, 20_001, dtype=torch.float64)
    log_p = dist.Normal(1.0, 3.0).log_prob(grid) + dist.Normal(grid.square(), 0.5).log_prob(y[:, None])
    exact = torch.softmax(log_p, -1)[:, grid < 0].sum(-1)
    posterior = infer(
        squared, ParallelTempering(SMALL, 6), data=DataSets({"y": y}), num_draws=400, num_chains=64, seed=2
    )
    assert posterior["x"].shape == (64, 400, 3)
    assert posterior.stats["swap_rate"].shape == (64, 400, 3)
    assert posterior.run_stats["temperature"].shape == (64, 6, 3)
    each = (posterior["x"] < 0).double().mean(1)
    error = each.std(0) / 8
    assert float(error.max()) < 0.03
    assert float(((each.mean(0) - exact) / error).abs().max()) < ALLOWED_Z


def test_chains_go_on_as_if_never_stopped(tmp_path: Any) -> None:
    program, engine = two_modes(2), ParallelTempering(HMC(num_steps=3, num_warmup=30), 3)
    whole = infer(program, engine, num_draws=12, num_chains=2, seed=4)
    first = infer(program, engine, num_draws=8, num_chains=2, seed=4)
    first.state.save(tmp_path / "state.safetensors")
    rest = infer(program, engine, num_draws=4, seed=4, state=ChainState.load(tmp_path / "state.safetensors"))
    assert torch.equal(whole["x"][:, 8:], rest["x"])
    assert torch.equal(whole.run_stats["temperature"], rest.run_stats["temperature"])
    again = infer(program, engine, num_draws=12, num_chains=2, seed=4)
    assert torch.equal(whole["x"], again["x"])


@pytest.mark.slow
def test_compiled_chains_are_the_same() -> None:
    def standard() -> None:
        pyro.sample("x", dist.Normal(torch.zeros(2, dtype=torch.float64), 1.0).to_event(1))

    engine = ParallelTempering(HMC(num_steps=1, num_warmup=0, step_size=0.5), 3)
    eager = infer(standard, engine, num_draws=20, num_chains=4)
    compiled = infer(standard, replace(engine, compile=True), num_draws=20, num_chains=4)
    torch.testing.assert_close(eager["x"], compiled["x"], rtol=0, atol=1e-10)


# --- the ladder -----------------------------------------------------------------------------------------------------


def test_temperatures_move_to_where_swaps_are_equally_frequent() -> None:
    found = equally_spaced(
        torch.tensor([[0.0, 0.0], [1.0, -2.0], [3.0, -3.0]]), torch.tensor([[1.0, 2.0], [1.0, 1.0]])
    )
    torch.testing.assert_close(found, torch.tensor([[0.0, 0.0], [1.0, -1.5], [3.0, -3.0]]))
    posterior = infer(
        two_modes(2), ParallelTempering(SMALL, num_temperatures=5), num_draws=300, num_chains=16
    )
    rates = posterior.run_stats["swap_rates"].mean(0)[:-1]
    temperatures = posterior.run_stats["temperature"]
    assert temperatures.shape == (16, 5)
    assert temperatures[0, 0] == 1
    assert float(temperatures[0, -1]) == pytest.approx(50)
    assert float(rates.max() - rates.min()) < 0.1


def test_a_ladder_without_warm_up_is_geometric() -> None:
    tuning = Ladder(4, 27.0, 0).begin(tuning_of(torch.ones(1), 8), num_sets=8)
    assert (1 / tuning.beta).reshape(4, 2).mT.tolist() == [pytest.approx([1, 3, 9, 27])] * 2
    assert tuning.step_size.tolist() == pytest.approx([1, 1, 3**0.5, 3**0.5, 3, 3, 27**0.5, 27**0.5])


# --- bad input ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Unadjusted(HMC):
    guarantee = "discretised"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_temperatures": 1}, "num_temperatures must be an integer >= 2, got 1"),
        ({"max_temperature": 1.0}, "max_temperature must be > 1"),
        ({"max_temperature": math.nan}, "max_temperature must be > 1"),
        ({"moves": Unadjusted()}, "moves must be an engine of Markov chains with an accept step"),
        ({"moves": HMC}, "moves must be a MarkovEngine"),
        ({"thin": 0}, "thin must be an integer >= 1"),
    ],
)
def test_settings_out_of_range_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        ParallelTempering(**options)


def test_moves_that_remember_more_than_a_position_are_refused() -> None:
    from probgen.inference.chees import ChEES

    with pytest.raises(InputError, match="ChEESKernel remembers more than a position"):
        infer(two_modes(2), ParallelTempering(ChEES(num_warmup=5), 2), num_draws=2)
