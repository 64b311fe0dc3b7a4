"""ULA, MALA and underdamped Langevin dynamics against what is known of them in closed form."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import Tensor, nn

from probgen import InputError, UnsupportedError, infer
from probgen.core import Batch, NonFiniteWarning
from probgen.inference import mala
from probgen.inference.hmc import HMC
from probgen.inference.mala import MALA, MALAKernel
from probgen.inference.ula import ULA, ULAKernel
from probgen.inference.underdamped_langevin import BAOABKernel, MovingPoint, UnderdampedLangevin
from probgen.kernels import Chains, Coordinates, Evaluate, Kernel, Point, Stats, Tuning, keeping
from probgen.randomness import forked_rng
from probgen.targets import read
from statistics_tools import ALLOWED_Z, z_of_mean

NUM_CHAINS = 20_000
Draws = Callable[[int], Tensor]


# --- kernels at work on densities known by hand -------------------------------------------------------------------


def normal(x: Tensor) -> tuple[Tensor, Tensor]:
    """N(0, 1) in every coordinate."""
    return -0.5 * x.square().sum(0), -x


def gumbel(x: Tensor) -> tuple[Tensor, Tensor]:
    """log p = sum(-x - exp(-x)): skewed, so that a sign that is wrong shows. Mean 0.5772, variance pi^2/6."""
    return (-x - (-x).exp()).sum(0), (-x).exp() - 1


def tuning(step_size: float) -> Tuning:
    one = torch.ones((), dtype=torch.float64)
    return Tuning(step_size * one, Coordinates.identity(1, one), one)


def run(
    kernel: Kernel, evaluate: Evaluate, step_size: float, num_steps: int, start: Draws | None = None
) -> Any:
    """The state of 20,000 independent chains after `num_steps` transitions, from N(0, 1) where there is no `start`."""
    with forked_rng(0):
        first = (start or normals)(1)
        state = kernel.start(evaluate, first, normals(kernel.normals(1)))
        for _ in range(num_steps):
            state, stats = kernel.step(evaluate, state, tuning(step_size), normals(kernel.normals(1)))
            assert bool((stats["n_steps"] == 1).all())
    return state


def normals(rows: int) -> Tensor:
    return torch.randn(rows, NUM_CHAINS, dtype=torch.float64)


def gumbels(rows: int) -> Tensor:
    """Draws of Gumbel's law: -log of exponentials."""
    return -torch.empty(rows, NUM_CHAINS, dtype=torch.float64).exponential_().log()


def steps_to_forget(rate: float) -> int:
    """Transitions after which a start that decays by exp(-rate) each is below a thousandth of what could be seen."""
    return math.ceil(12 / rate)


# --- ULA ----------------------------------------------------------------------------------------------------------


def ula_z(kernel: Kernel, step_size: float) -> float:
    """|z| of the mean square against 1/(1 - h/2), and of the mean against 0."""
    x = run(kernel, normal, step_size, steps_to_forget(step_size)).position
    return max(abs(z_of_mean(x.square(), 1 / (1 - step_size / 2))), abs(z_of_mean(x)))


@pytest.mark.parametrize("step_size", [0.05, 0.3, 1.0, 1.5])
def test_ula_is_as_wide_as_theory_says(step_size: float) -> None:
    """Its variance on N(0, 1) is 1/(1 - h/2): off by 4.5 % would be seen, the bias itself is 2.5 % to 300 %."""
    assert ula_z(ULAKernel(), step_size) < ALLOWED_Z


def altered(kernel: Kernel, change: Callable[[Any, Tuning, Tensor], tuple[Any, Tuning, Tensor]]) -> Kernel:
    """A kernel whose arguments are tampered with."""

    class Altered(type(kernel)):  # type: ignore[misc]
        def step(self, evaluate: Evaluate, state: Any, tuning: Tuning, noise: Tensor) -> tuple[Any, Stats]:
            return super().step(evaluate, *change(state, tuning, noise))

    return Altered(**vars(kernel))


ULA_MISTAKES = {
    "noise sqrt(h)": altered(ULAKernel(), lambda s, t, z: (s, t, z * 0.5**0.5)),
    "drift h/2": altered(ULAKernel(), lambda s, t, z: (s._replace(grad=s.grad / 2), t, z)),
    "drift downhill": altered(ULAKernel(), lambda s, t, z: (s._replace(grad=-s.grad), t, z)),
    "noise shared by chains": altered(ULAKernel(), lambda s, t, z: (s, t, z[:, :1].expand_as(z))),
}


@pytest.mark.parametrize("name", ULA_MISTAKES)
def test_wrong_ula_is_seen(name: str) -> None:
    assert not ula_z(ULA_MISTAKES[name], 0.3) < 2 * ALLOWED_Z


@pytest.mark.parametrize("step_size", [0.1, 0.5])
def test_ula_through_the_whole_of_infer(step_size: float) -> None:
    def model() -> None:
        pyro.sample("z", dist.Normal(torch.zeros(2, dtype=torch.float64), 1.0).to_event(1))

    engine = ULA(step_size=step_size, num_warmup=steps_to_forget(step_size), thin=3)
    posterior = infer(model, engine, num_chains=4000, num_draws=2)
    assert abs(z_of_mean(posterior["z"][:, -1].square(), 1 / (1 - step_size / 2))) < ALLOWED_Z
    assert posterior.guarantee == "discretised"
    assert posterior.cost.gradients == 4000 * 2 * 3
    assert posterior.cost.warmup_gradients == 4000 * engine.num_warmup
    assert set(posterior.stats) == {"lp", "n_steps"}


# --- MALA ---------------------------------------------------------------------------------------------------------

GUMBEL_MEAN, GUMBEL_SQUARE = 0.5772156649015329, math.pi**2 / 6 + 0.5772156649015329**2


def mala_z(kernel: Kernel, step_size: float, num_steps: int = 60) -> float:
    """|z| of what is known of N(0, 1) and of Gumbel's law, after transitions that begin at draws of them."""
    on_normal = run(kernel, normal, step_size, num_steps).position
    on_gumbel = run(kernel, gumbel, step_size, num_steps, gumbels).position
    pairs = (
        (on_normal.square(), 1.0),
        (on_normal, 0.0),
        (on_gumbel, GUMBEL_MEAN),
        (on_gumbel.square(), GUMBEL_SQUARE),
        ((-on_gumbel).exp(), 1.0),
    )
    return max(abs(z_of_mean(values, expected)) for values, expected in pairs)


@pytest.mark.parametrize("step_size", [0.3, 0.8])
def test_mala_is_exact_at_any_step_size(step_size: float) -> None:
    assert mala_z(MALAKernel(), step_size) < ALLOWED_Z


def always(old: Point, new: Point, log_ratio: Tensor, noise: Tensor) -> tuple[Point, Tensor, Tensor]:
    return new, torch.ones_like(log_ratio), torch.ones_like(log_ratio, dtype=torch.bool)


def test_mala_without_accept_step_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mala, "accept", always)
    assert not mala_z(MALAKernel(), 0.3) < 2 * ALLOWED_Z


def test_mala_without_the_density_of_its_proposal_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    """Accepted by p alone, as if the way back were as likely as the way there."""
    monkeypatch.setattr(mala, "kinetic_energy", lambda momentum: momentum.new_zeros(momentum.shape[1]))
    assert mala_z(MALAKernel(), 0.3) > 2 * ALLOWED_Z


MALA_MISTAKES = {
    "drift h/2, corrected as h": altered(MALAKernel(), lambda s, t, z: (s._replace(grad=s.grad / 2), t, z)),
    "longer steps to the right": altered(
        MALAKernel(),
        lambda s, t, z: (s, t._replace(step_size=t.step_size * (1 + 0.5 * torch.tanh(s.position[0]))), z),
    ),
}


@pytest.mark.parametrize("name", MALA_MISTAKES)
def test_wrong_mala_is_seen(name: str) -> None:
    assert mala_z(MALA_MISTAKES[name], 0.3) > 2 * ALLOWED_Z


def test_mala_steps_are_those_of_ula() -> None:
    """From the same noise the same proposal; accepted as the formula of the densities of both ways says."""
    with forked_rng(0):
        x, z, h = normals(3)[:, :50], normals(5)[:, :50], 0.2
    start = ULAKernel().start(gumbel, x, z)
    proposal, _ = ULAKernel().step(gumbel, start, tuning(h), z[:3])
    moved, stats = MALAKernel().step(gumbel, start, tuning(h), z)
    there = (
        torch.distributions.Normal(x + h * start.grad, math.sqrt(2 * h)).log_prob(proposal.position).sum(0)
    )
    back = (
        torch.distributions.Normal(proposal.position + h * proposal.grad, math.sqrt(2 * h)).log_prob(x).sum(0)
    )
    ratio = proposal.log_prob + back - start.log_prob - there
    torch.testing.assert_close(stats["acceptance_rate"], ratio.clamp(max=0).exp())
    taken = (moved.position != x).all(0)
    assert 0 < int(taken.sum()) < 50
    torch.testing.assert_close(moved.position[:, taken], proposal.position[:, taken])


def test_mala_through_the_whole_of_infer() -> None:
    """Adapted, in coordinates of scales 0.01 and 100: acceptance as wanted, variances within their errors."""
    scale = torch.tensor([0.01, 100.0], dtype=torch.float64)

    def model() -> None:
        pyro.sample("z", dist.Normal(torch.zeros(2, dtype=torch.float64), scale).to_event(1))

    posterior = infer(model, MALA(num_warmup=300), num_chains=1000, num_draws=20)
    assert abs(float(posterior.stats["acceptance_rate"].mean()) - 0.574) < 0.05
    last = posterior["z"][:, -1] / scale
    assert max(abs(z_of_mean(last[:, i].square(), 1.0)) for i in range(2)) < ALLOWED_Z
    assert set(posterior.stats) == {"acceptance_rate", "lp", "n_steps"}
    assert posterior.cost.gradients == 1000 * 20


# --- underdamped --------------------------------------------------------------------------------------------------


def stationary(step_size: float, friction: float) -> Tensor:
    """Covariance of (x, p) under BAOAB on N(0, 1): S = M S M' + N N' with M, N the linear maps of one step."""
    b = torch.tensor([[1.0, 0.0], [-step_size / 2, 1.0]], dtype=torch.float64)
    a = torch.tensor([[1.0, step_size / 2], [0.0, 1.0]], dtype=torch.float64)
    kept = math.exp(-friction * step_size)
    o = torch.diag(torch.tensor([1.0, kept], dtype=torch.float64))
    noise = b @ a @ torch.tensor([[0.0], [math.sqrt(1 - kept**2)]], dtype=torch.float64)
    step = b @ a @ o @ a @ b
    system = torch.eye(4, dtype=torch.float64) - torch.kron(step, step)
    return torch.linalg.solve(system, (noise @ noise.mT).flatten()).reshape(2, 2)


@pytest.mark.parametrize(("step_size", "friction"), [(0.2, 1.0), (1.0, 0.3), (1.7, 5.0)])
def test_what_theory_says_of_baoab_on_a_gaussian(step_size: float, friction: float) -> None:
    """Positions are exact at any step; momenta have variance 1 - h^2/4, and are independent of positions."""
    expected = torch.diag(torch.tensor([1.0, 1 - step_size**2 / 4], dtype=torch.float64))
    torch.testing.assert_close(stationary(step_size, friction), expected)


def baoab_z(kernel: Kernel, step_size: float) -> float:
    """|z| of the mean squares of positions and momenta, of their product, and of the mean of positions."""
    state = run(kernel, normal, step_size, steps_to_forget(0.3 * step_size))
    x, p = state.position, state.momentum
    covariance = stationary(step_size, 1.0)
    pairs = ((x.square(), covariance[0, 0]), (p.square(), covariance[1, 1]), (x * p, 0.0), (x, 0.0))
    return max(abs(z_of_mean(values, float(expected))) for values, expected in pairs)


@pytest.mark.parametrize("step_size", [0.2, 1.0, 1.5])
def test_baoab_is_as_theory_says(step_size: float) -> None:
    assert baoab_z(BAOABKernel(1.0), step_size) < ALLOWED_Z


def reversed_kick(state: MovingPoint, tuning: Tuning, noise: Tensor) -> tuple[MovingPoint, Tuning, Tensor]:
    return state._replace(grad=-state.grad), tuning, noise


BAOAB_MISTAKES = {
    "noise of half the variance": altered(BAOABKernel(1.0), lambda s, t, z: (s, t, z * 0.5**0.5)),
    "kick downhill": altered(BAOABKernel(1.0), reversed_kick),
    "momentum from nowhere": altered(BAOABKernel(1.0), lambda s, t, z: (s._replace(momentum=z), t, z)),
    "first kick left out": altered(BAOABKernel(1.0), lambda s, t, z: (s._replace(grad=0 * s.grad), t, z)),
}


@pytest.mark.parametrize("name", BAOAB_MISTAKES)
def test_wrong_baoab_is_seen(name: str) -> None:
    assert not baoab_z(BAOAB_MISTAKES[name], 1.0) < 2 * ALLOWED_Z


def test_baoab_is_of_second_order_where_it_is_not_exact() -> None:
    """Gumbel's law, E x^2: at h = 0.2 within 1 %, while at h = 0.8 the bias is seen and is of the order of h^2."""
    errors = {}
    for h in (0.2, 0.8):
        x = run(BAOABKernel(1.0), gumbel, h, steps_to_forget(0.2 * h)).position
        errors[h] = (
            float(x.square().mean() / GUMBEL_SQUARE - 1),
            ALLOWED_Z * float(x.square().std()) / GUMBEL_SQUARE / math.sqrt(NUM_CHAINS),
        )
    assert abs(errors[0.2][0]) < 0.01 + errors[0.2][1]
    assert abs(errors[0.8][0]) < 0.8**2 + errors[0.8][1]


# --- chains that know nothing of each other -----------------------------------------------------------------------

FREE: list[Any] = [
    ULA(step_size=0.02, num_warmup=5),
    UnderdampedLangevin(step_size=0.1, friction=2.0, num_warmup=5),
]


def lopsided() -> None:
    """Three latents that depend on each other, one of them positive."""
    a = pyro.sample("a", dist.Normal(torch.zeros((), dtype=torch.float64), 1.0))
    b = pyro.sample("b", dist.LogNormal(0.3 * a, 0.5))
    pyro.sample("y", dist.Normal(a * b, 0.5))


Y = {"y": torch.tensor(0.7, dtype=torch.float64)}


@pytest.mark.parametrize("engine", FREE, ids=str)
def test_a_chain_is_the_same_whatever_runs_beside_it(engine: Any) -> None:
    few, many = (infer(lopsided, engine, data=Y, num_draws=30, num_chains=n) for n in (3, 40))
    for site in ("a", "b"):
        torch.testing.assert_close(few[site], many[site][:3], rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("engine", FREE, ids=str)
def test_a_chain_is_the_same_in_whichever_chunk_it_runs(engine: Any) -> None:
    whole, part = (
        Chains(engine, read(lopsided, Y, ()), n, seed=4, first_chain=k) for n, k in ((12, 0), (5, 7))
    )
    found = []
    with torch.no_grad():
        for chains in (whole, part):
            chains.draws = keeping.Draws(20)
            chains.begin()
            chains.warm_up()
            chains.draw()
            found.append(chains.draws.values["u"])
    torch.testing.assert_close(found[0][..., 7:], found[1], rtol=1e-10, atol=1e-10)


# --- scores -------------------------------------------------------------------------------------------------------


class TurningScore(nn.Module):
    """The score of N(1, I) plus a rotation, the gradient of nothing, which leaves N(1, I) as it is."""

    event_shape = (2,)

    def model(self, batch: Batch) -> None:
        raise UnsupportedError("It has no density.")

    def grad_log_prob(self, x: Tensor) -> Tensor:
        off = x - 1
        return -off + 0.5 * torch.stack([off[:, 1], -off[:, 0]], 1)


@pytest.mark.parametrize("engine", [ULA(step_size=0.02), UnderdampedLangevin(step_size=0.1)], ids=str)
def test_a_score_alone_is_served(engine: Any) -> None:
    posterior = infer(TurningScore(), engine, num_chains=2000, num_draws=1)
    assert abs(z_of_mean(posterior["x"], 1.0)) < ALLOWED_Z
    if isinstance(
        engine, ULA
    ):  # rotation leaves the law, discretised it widens it: |1 - h + ih/2|^2 V + 2h = V
        h = engine.step_size
        assert abs(z_of_mean((posterior["x"] - 1).square(), 2 / (2 - 1.25 * h))) < ALLOWED_Z


@pytest.mark.parametrize("engine", [MALA(), HMC()], ids=str)
def test_engines_that_accept_refuse_a_score_alone(engine: Any) -> None:
    with pytest.raises(UnsupportedError, match=r"score.*ULA"):
        infer(TurningScore(), engine, num_draws=2)


# --- bad input ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("value", [0, 0.0, -1.0, math.nan, math.inf, "0.1", True])
@pytest.mark.parametrize("make", [ULA, MALA, UnderdampedLangevin, HMC])
def test_step_sizes_out_of_range_are_refused(make: Any, value: Any) -> None:
    with pytest.raises(InputError, match="step_size must be > 0"):
        make(step_size=value)


@pytest.mark.parametrize(
    ("make", "settings", "message"),
    [
        (ULA, {"step_size": None}, "step_size must be > 0"),
        (UnderdampedLangevin, {"friction": 0.0}, "friction must be > 0"),
        (UnderdampedLangevin, {"friction": math.nan}, "friction must be > 0"),
        (MALA, {"num_warmup": 0}, "there must be a step_size"),
        (MALA, {"target_accept": 1.0}, "target_accept"),
        (MALA, {"target_accept": 0.0}, "target_accept"),
        (MALA, {"target_accept": math.nan}, "target_accept"),
        (MALA, {"metric": "diag"}, "did you mean 'diagonal'"),
        *((make, {"num_warmup": -1}, "num_warmup") for make in (ULA, MALA, UnderdampedLangevin)),
        *((make, {"num_warmup": 1.5}, "num_warmup") for make in (ULA, MALA, UnderdampedLangevin)),
        *((make, {"thin": 0}, "thin") for make in (ULA, MALA, UnderdampedLangevin)),
    ],
)
def test_settings_out_of_range_are_refused(make: Any, settings: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        make(**settings)


@pytest.mark.parametrize("options", [{"num_chains": 0}, {"num_chains": -1}, {"num_draws": 0}])
def test_counts_out_of_range_are_refused(options: dict[str, int]) -> None:
    with pytest.raises(InputError, match=next(iter(options))):
        infer(lopsided, ULA(), data=Y, **options)


def quartic() -> None:
    """log p = -x^4 and nothing else: a long step throws a chain farther than it came from."""
    x = pyro.sample("x", dist.Normal(torch.zeros((), dtype=torch.float64), 1.0).mask(False))
    pyro.factor("quartic", -(x**4))


@pytest.mark.parametrize("engine", [ULA(step_size=1.0), UnderdampedLangevin(step_size=3.0)], ids=str)
def test_chains_that_all_run_away_are_an_error(engine: Any) -> None:
    with pytest.raises(InputError, match="ran away to infinity.*step"):
        infer(quartic, engine, num_draws=10)


def test_chains_of_which_some_run_away_are_a_warning() -> None:
    """At h = 0.15 a chain beyond |x| = 1.8 is thrown out, and others are not yet."""
    with pytest.warns(NonFiniteWarning, match="chains ran away to infinity.*others are unaffected"):
        posterior = infer(quartic, ULA(step_size=0.15, num_warmup=0), num_chains=200, num_draws=8, seed=1)
    finite = torch.isfinite(posterior["x"]).all(1)
    assert 0 < int(finite.sum()) < 200


def test_chains_that_are_all_stuck_are_an_error() -> None:
    for engine in (MALA(step_size=1e6, num_warmup=0), HMC(step_size=1e6, num_warmup=0)):
        with pytest.raises(InputError, match=r"stuck: not one proposal was accepted.*step size is 1e\+06"):
            infer(lopsided, engine, data=Y, num_draws=10)


LANGEVIN: list[Any] = [ULA(step_size=0.1), MALA(num_warmup=50), UnderdampedLangevin(step_size=0.3)]


@pytest.mark.parametrize("engine", LANGEVIN, ids=str)
def test_a_latent_without_a_law_is_refused(engine: Any) -> None:
    def flat() -> None:
        pyro.sample("a", dist.Normal(0.0, 1.0))
        pyro.sample("b", dist.Normal(0.0, 1.0).mask(False))

    with pytest.raises(InputError, match="improper.*'b'"):
        infer(flat, engine, num_draws=10)


def uphill() -> None:
    """A density that grows without bound to both sides."""
    x = pyro.sample("x", dist.Normal(torch.zeros((), dtype=torch.float64), 1.0).mask(False))
    pyro.factor("uphill", x**2)


@pytest.mark.parametrize("engine", [LANGEVIN[0], LANGEVIN[2]], ids=str)
def test_a_density_that_grows_without_bound_is_refused(engine: Any) -> None:
    with pytest.raises(InputError, match="improper"):
        infer(uphill, engine, num_draws=10_000)
