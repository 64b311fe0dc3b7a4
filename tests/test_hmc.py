"""HMC: its law, its steps, its settings, and that compiling changes nothing."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import Tensor

from probgen import infer
from probgen.core import InputError, Posterior
from probgen.inference.hmc import HMC, HMCKernel
from probgen.kernels import Coordinates, InCoordinates, Tuning, compiling
from probgen.kernels import run as running
from probgen.kernels.compiling import Compiled
from probgen.randomness import forked_rng

with warnings.catch_warnings():
    warnings.simplefilter("ignore", FutureWarning)
    import arviz

LOC = torch.tensor([1.0, -2.0], dtype=torch.float64)
SCALE_TRIL = torch.tensor([[0.5, 0.0], [1.2, 0.9]], dtype=torch.float64)
Z = 4.5


def gaussian() -> None:
    """Correlated, of unequal scales."""
    pyro.sample("x", dist.MultivariateNormal(LOC, scale_tril=SCALE_TRIL))


def draws_of(engine: HMC, num_draws: int = 500, num_chains: int = 20, seed: int = 0) -> Posterior:
    return infer(gaussian, engine, num_draws=num_draws, num_chains=num_chains, seed=seed)


def worst_z(posterior: Posterior) -> float:
    """The largest |z| of means and of covariances, errors from effective sample sizes; starts are left out."""
    x = posterior["x"][:, 50:] - LOC
    covariance = SCALE_TRIL @ SCALE_TRIL.mT
    found = [x[..., 0], x[..., 1]]
    found += [x[..., i] * x[..., j] - covariance[i, j] for i, j in ((0, 0), (0, 1), (1, 1))]
    return max(abs(float(value.mean()) / float(arviz.mcse(value.numpy(), method="mean"))) for value in found)


ENGINES = {
    "adapted": HMC(num_steps=6, num_warmup=150),
    "dense metric": HMC(num_steps=6, num_warmup=150, metric="dense"),
    "identity metric": HMC(num_steps=10, num_warmup=100, metric="identity"),
    "fixed step": HMC(num_steps=8, step_size=0.25, num_warmup=0),
    "fixed step and metric": HMC(num_steps=8, step_size=0.3, num_warmup=60),
    "no jitter": HMC(num_steps=5, step_size=0.3, num_warmup=0, jitter=0.0),
    "thinned": HMC(num_steps=6, step_size=0.25, num_warmup=0, thin=3),
}


@pytest.mark.parametrize("engine", ENGINES.values(), ids=ENGINES)
def test_it_draws_from_a_gaussian(engine: HMC) -> None:
    """Means and covariances within 4.5 errors, which are some 2 % of an sd; chains start where they like."""
    assert worst_z(draws_of(engine)) < Z


def test_the_check_sees_draws_that_are_too_wide() -> None:
    """By a tenth."""
    posterior = draws_of(ENGINES["adapted"])
    posterior.draws["x"] = LOC + 1.1 * (posterior["x"] - LOC)
    assert worst_z(posterior) > Z


def test_without_the_accept_step_it_would_be_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    """Long steps whose errors nobody refuses: the twin is seen."""
    engine = HMC(num_steps=2, step_size=0.5, num_warmup=0, jitter=0.0)
    assert worst_z(draws_of(engine)) < Z

    def always(old: Any, new: Any, log_ratio: Tensor, noise: Tensor) -> Any:
        return new, torch.ones_like(log_ratio), torch.ones_like(log_ratio, dtype=torch.bool)

    monkeypatch.setattr("probgen.inference.hmc.accept", always)
    assert worst_z(draws_of(engine)) > Z


def test_exactly_so_many_gradients() -> None:
    posterior = draws_of(HMC(num_steps=7, step_size=0.2, num_warmup=5, thin=2), num_draws=11, num_chains=3)
    assert bool((posterior.stats["n_steps"] == 7).all())
    assert posterior.cost.gradients == 7 * 11 * 2 * 3
    assert posterior.cost.warmup_gradients == 7 * 5 * 3
    assert set(posterior.stats) == {"acceptance_rate", "diverging", "energy", "lp", "n_steps"}
    assert posterior.stats["lp"].shape == (3, 11)


def test_gradients_are_asked_for_that_often() -> None:
    """By the kernel, of the density."""
    calls = []

    def function(u: Tensor) -> tuple[Tensor, Tensor]:
        calls.append(u)
        return -0.5 * u.square().sum(0), -u

    kernel = HMCKernel(num_steps=5)
    identity = Coordinates.identity(2, torch.zeros(2, 3))
    evaluate = InCoordinates(identity, function)
    state = kernel.start(evaluate, torch.ones(2, 3), torch.zeros(0, 3))
    calls.clear()
    tuning = Tuning(torch.full((3,), 0.1), identity, torch.ones(()))
    kernel.step(evaluate, state, tuning, torch.ones(kernel.normals(2), 3))
    assert len(calls) == 5


def test_statistics_belong_to_the_draws() -> None:
    """lp is the density at the draw; the energy before a trajectory is above the potential there."""
    posterior = draws_of(HMC(num_steps=4, step_size=0.3, num_warmup=0), num_draws=40, num_chains=2)
    law = torch.distributions.MultivariateNormal(LOC, scale_tril=SCALE_TRIL)
    torch.testing.assert_close(posterior.stats["lp"], law.log_prob(posterior["x"]))
    assert bool((posterior.stats["energy"][:, 1:] >= -posterior.stats["lp"][:, :-1]).all())
    assert not bool(posterior.stats["diverging"].any())


def test_jitter_spreads_the_step() -> None:
    """Without it a trajectory of half a period brings every chain of N(0, 1) to its mirror image; with it, not."""

    def program() -> None:
        pyro.sample("z", dist.Normal(torch.tensor(0.0, dtype=torch.float64), 1.0))

    def change(jitter: float) -> Tensor:
        engine = HMC(num_steps=100, step_size=math.pi / 100, num_warmup=0, jitter=jitter)
        z = infer(program, engine, num_draws=20, num_chains=4)["z"]
        return (z[:, 1:] + z[:, :-1]).abs().max()

    assert float(change(0.0)) < 0.01
    assert float(change(0.3)) > 0.1


def test_warm_up_finds_step_and_metric() -> None:
    posterior = draws_of(HMC(num_steps=6, num_warmup=300, target_accept=0.9), num_draws=200)
    assert float(posterior.stats["acceptance_rate"].mean()) == pytest.approx(0.9, abs=0.05)
    scale = posterior.state.tuning["scale"][:, 0]
    sd = (SCALE_TRIL @ SCALE_TRIL.mT).diagonal().sqrt()
    assert float(scale[1] / scale[0]) == pytest.approx(float(sd[1] / sd[0]), rel=0.15)
    assert float(posterior.run_stats["step_size"].min()) > 0


def test_without_warm_up_the_step_is_the_one_given() -> None:
    posterior = draws_of(HMC(step_size=0.125, num_warmup=0), num_draws=3, num_chains=2)
    assert posterior.run_stats["step_size"].tolist() == [0.125, 0.125]
    assert posterior.cost.warmup_gradients == 0


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        ({"num_steps": 0}, "num_steps"),
        ({"step_size": 0.0}, "step_size"),
        ({"step_size": math.inf}, "step_size"),
        ({"num_warmup": -1}, "num_warmup"),
        ({"num_warmup": 0}, "step_size"),
        ({"target_accept": 1.0}, "target_accept"),
        ({"metric": "dens"}, "dense"),
        ({"jitter": 1.0}, "jitter"),
        ({"jitter": -0.1}, "jitter"),
        ({"thin": 0}, "thin"),
    ],
)
def test_settings_out_of_range(wrong: dict[str, Any], words: str) -> None:
    with pytest.raises(InputError, match=words):
        HMC(**wrong)


# --- compiled -----------------------------------------------------------------------------------------------------


@pytest.fixture
def compilations(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Graphs that were compiled, in order. Compilers take long: the graphs run as they are recorded."""
    made: list[Any] = []

    def as_it_is(graph: Any, tensors: list[Tensor]) -> Callable[..., Any]:
        made.append(graph)
        return graph

    monkeypatch.setattr(compiling, "_compile", as_it_is)
    return made


def same_draws(one: Posterior, other: Posterior) -> None:
    """To 1e-7: chains of a few transitions do not yet drive rounding errors apart."""
    torch.testing.assert_close(one["x"], other["x"], rtol=0, atol=1e-7)
    for name, value in one.stats.items():
        torch.testing.assert_close(value, other.stats[name], rtol=0, atol=1e-6)


def test_a_compiled_engine_makes_the_same_draws() -> None:
    """By the compiler itself; all of its time is counted apart."""
    settings: dict[str, Any] = {"num_steps": 2, "step_size": 0.3, "num_warmup": 0, "metric": "identity"}
    eager = draws_of(HMC(**settings), num_draws=9, num_chains=5)
    compiled = draws_of(HMC(**settings, compile=True), num_draws=9, num_chains=5)
    same_draws(compiled, eager)
    assert compiled.cost.compile_seconds > 10 * compiled.cost.seconds
    assert compiled.cost.gradients == eager.cost.gradients == 2 * 9 * 5


def test_warm_up_and_drawing_compile_twice(compilations: list[Any]) -> None:
    """One transition, for warm-up, and several together; neither new step sizes nor new metrics compile anew."""
    settings: dict[str, Any] = {"num_steps": 2, "num_warmup": 40, "metric": "dense"}
    compiled = draws_of(HMC(**settings, compile=True), num_draws=31, num_chains=4)
    assert len(compilations) == 2
    eager = draws_of(HMC(**settings), num_draws=31, num_chains=4)
    torch.testing.assert_close(compiled["x"][:, 0], eager["x"][:, 0], rtol=0, atol=1e-5)
    sizes = sorted(len(graph.graph.nodes) for graph in compilations)
    assert sizes[1] > 3 * sizes[0]


def test_long_trajectories_are_compiled_step_by_step(
    compilations: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(running, "_MOST_OPERATIONS", 0)
    settings: dict[str, Any] = {"num_steps": 5, "step_size": 0.2, "num_warmup": 0}
    compiled = draws_of(HMC(**settings, compile=True), num_draws=10, num_chains=4)
    assert len(compilations) == 1
    same_draws(compiled, draws_of(HMC(**settings), num_draws=10, num_chains=4))


def test_compiled_chains_go_on(compilations: list[Any]) -> None:
    engine = HMC(num_steps=2, step_size=0.3, num_warmup=0, compile=True)
    whole = draws_of(engine, num_draws=10, num_chains=3)
    part = draws_of(engine, num_draws=6, num_chains=3)
    rest = infer(gaussian, engine, num_draws=4, state=part.state)
    torch.testing.assert_close(torch.cat([part["x"], rest["x"]], 1), whole["x"], rtol=0, atol=1e-7)


def test_compiled_functions_look_at_shapes_alone(compilations: list[Any]) -> None:
    def function(pair: tuple[Tensor, Tensor], factor: float) -> dict[str, Tensor]:
        return {"sum": (pair[0] + pair[1]) * factor}

    compiled = Compiled(function)
    with forked_rng(0):
        for shape, factor in (((2, 3), 1.0), ((2, 3), 1.0), ((3,), 1.0), ((3,), 2.0)):
            pair = torch.randn(shape), torch.randn(shape)
            torch.testing.assert_close(compiled(pair, factor), function(pair, factor))
        turned = torch.randn(3, 2).mT, torch.randn(2, 3)
    torch.testing.assert_close(compiled(turned, 1.0), function(turned, 1.0))
    assert len(compilations) == 3


def test_what_cannot_be_recorded_says_so(compilations: list[Any]) -> None:
    from probgen.core import UnsupportedError

    compiled = Compiled(lambda x: x if x.sum() > 0 else -x)
    with pytest.raises(UnsupportedError, match="compile=False"):
        compiled(torch.ones(2))
