"""Energies and scores, functions and networks, as what Markov chains draw from."""

from __future__ import annotations

from typing import Any

import pyro
import pytest
import torch
from torch import Tensor, fx, nn

from global_state import SETTINGS, STREAMS, unchanged
from mcmc_tools import Moments, worst_z
from probgen import Ancestral, Batch, InputError, UnsupportedError, infer
from probgen.inference.hmc import HMC
from probgen.inference.sgld import SGLD
from probgen.inference.ula import ULA
from probgen.models import energy as energy_module
from probgen.models.energy import Energy
from probgen.models.score import Score
from probgen.nets import UNet
from probgen.targets import density, read
from probgen.targets.energies import EnergyDensity

F64 = torch.float64


def bowl(x: Tensor) -> Tensor:
    """An asymmetric Gaussian on any event shape: sd 1, 1/2, 1/3, ... about 1."""
    flat = (x - 1).flatten(1)
    return 0.5 * (flat * torch.arange(1, flat.shape[1] + 1).to(x)).square().sum(1)


class Network(nn.Module):
    """An energy with weights, dropout, and a well that keeps chains in."""

    def __init__(self, dtype: torch.dtype = F64) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(3, 16), nn.SiLU(), nn.Dropout(0.5), nn.Linear(16, 1)).to(dtype)

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x).squeeze(-1) + 0.5 * x.square().sum(-1)


# --- the density --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("event_shape", [(), (3,), (2, 2), (1, 10, 10)])
def test_value_gradient_and_places(event_shape: tuple[int, ...]) -> None:
    """Flat coordinates of the event; -E and its gradient, recorded or not; `constrain` turned round."""
    target = EnergyDensity(Energy(lambda x: bowl(x.reshape(len(x), -1)), event_shape))
    u = torch.randn(target.dim, 5)
    squares = torch.arange(1, target.dim + 1)[:, None].square()
    expected = -0.5 * (squares * (u - 1).square()).sum(0), -squares * (u - 1)
    for found in (target.value_and_grad(u), target.function(u)(u)):
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-3)
    x = target.constrain(u)
    assert x["x"].shape == (5, *event_shape)
    assert torch.equal(target.unconstrain(x), u)
    assert isinstance(target.function(u), fx.GraphModule) == (target.dim <= 64)
    assert target.dims == {"x": tuple(f"x_dim_{i}" for i in range(len(event_shape)))}


def test_dtype_is_that_of_the_weights() -> None:
    assert EnergyDensity(Energy(Network().eval(), (3,))).dtype == F64
    assert EnergyDensity(Energy(bowl, (3,))).dtype == torch.get_default_dtype()
    draws = infer(Energy(Network(), (3,)), HMC(num_warmup=10), num_draws=3)
    assert draws["x"].dtype == F64


def test_choices_that_depend_on_values_are_not_frozen() -> None:
    """Such an energy is not recorded, but called."""

    def walled(x: Tensor) -> Tensor:
        return bowl(x) + (10.0 if bool((x > 3).any()) else 0.0)

    target = EnergyDensity(Energy(walled, (2,)))
    u = torch.zeros(2, 1)
    function = target.function(u)
    assert float(function(u + 4)[0]) == pytest.approx(-0.5 * (9 + 36) - 10)


def test_as_a_pyro_program_it_is_a_factor() -> None:
    program, x = Energy(bowl, (3,)), torch.randn(4, 3)
    model = pyro.condition(program.model, data={"x": x})
    trace = pyro.poutine.trace(model).get_trace(Batch({"x": x}))
    assert float(trace.log_prob_sum()) == pytest.approx(float(-bowl(x).sum()))


def test_one_call_of_the_network_a_gradient() -> None:
    calls = 0

    class Counted(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            nonlocal calls
            calls += 1
            return bowl(x)

    target = EnergyDensity(Energy(Counted(), (1, 10, 10)))
    u, before = torch.randn(100, 7), calls
    target.function(u)(u)
    assert calls == before + 1


def test_networks_are_left_as_they_were() -> None:
    """Weights need gradients afterwards, have none, and dropout is in training mode again."""
    network = Network()
    with unchanged(SETTINGS | STREAMS):
        infer(Energy(network, (3,)), HMC(num_warmup=10), num_draws=3)
    assert network.training
    assert all(weight.requires_grad and weight.grad is None for weight in network.parameters())


# --- draws --------------------------------------------------------------------------------------------------------


def banana_moments() -> dict[str, Moments]:
    """Mean and sd of both coordinates of `example()`, by quadrature."""
    x, y = torch.meshgrid(
        torch.linspace(-7, 7, 1401).double(), torch.linspace(-6, 26, 1601).double(), indexing="ij"
    )
    energy = energy_module.example().energy(torch.stack([x, y], -1).reshape(-1, 2)).reshape(x.shape)
    p = (-energy).flatten().softmax(0).reshape(x.shape)
    moments = {}
    for name, value in (("x", x), ("y", y)):
        mean = float((p * value).sum())
        moments[name] = Moments(mean, float((p * (value - mean).square()).sum()) ** 0.5)
    return moments


def by_coordinate(draws: Tensor) -> dict[str, Tensor]:
    return {"x": draws[..., 0], "y": draws[..., 1]}


def test_draws_have_the_moments_of_the_energy() -> None:
    """About 10,000 effective draws: a mean off by 5 % of an sd shows, as it does for the energy without its slope."""
    engine = HMC(num_steps=20, num_warmup=200)
    draws = infer(energy_module.example(), engine, num_draws=400, num_chains=64)["x"]
    assert worst_z(by_coordinate(draws), banana_moments())[0] < 4.5
    level = Energy(lambda x: energy_module.example().energy(x) + 0.3 * x[..., 1], (2,))
    assert (
        worst_z(by_coordinate(infer(level, engine, num_draws=400, num_chains=64)["x"]), banana_moments())[0]
        > 10
    )


def test_low_energy_is_where_draws_are() -> None:
    """With the sign turned round chains leave, and it is said."""
    engine = ULA(step_size=0.05, num_warmup=3000)
    draws = infer(Energy(bowl, (2,)), engine, num_draws=200, num_chains=20)["x"]
    assert float((draws - 1).abs().max()) < 6
    with pytest.raises(InputError, match="ran away to infinity"):
        infer(Energy(lambda x: -bowl(x), (2,)), engine, num_draws=200, num_chains=20)


def test_a_score_serves_engines_without_an_accept_step() -> None:
    """s(x) = -B x, B not symmetric: no density, yet ULA has S = (I - h B) S (I - h B)' + 2 h I, within 1.5 %.

    With the rotation left out S is another, and told apart.
    """
    b, h = torch.tensor([[1.0, 0.5], [-0.5, 2.0]], dtype=F64), 0.2
    program = Score(nn.Linear(2, 2, bias=False, dtype=F64), (2,))
    with torch.no_grad():
        program.function.weight.copy_(-b)
    draws = infer(program, ULA(step_size=h, num_warmup=50), num_draws=100, num_chains=1000)["x"]

    def z(b: Tensor) -> float:
        shrink = torch.eye(2, dtype=F64) - h * b
        noise = 2 * h * torch.eye(2, dtype=F64).reshape(4)
        s = torch.linalg.solve(torch.eye(4, dtype=F64) - torch.kron(shrink, shrink), noise).reshape(2, 2)
        moments = (draws[..., :, None] * draws[..., None, :]).mean(1)
        return float(((moments.mean(0) - s) / (moments.std(0) / 1000**0.5)).abs().max())

    assert z(b) < 4.5
    assert z(b.diagonal().diag()) > 10


def test_a_score_may_be_noisy() -> None:
    """As stochastic gradients are: it is asked anew at every step, and SGLD draws from it."""
    calls = 0

    def noisy_score(x: Tensor) -> Tensor:
        nonlocal calls
        calls += 1
        return -x + torch.randn_like(x)

    draws = infer(Score(noisy_score, (2,)), SGLD(0.1, num_warmup=20), num_draws=50, num_chains=200)["x"]
    assert calls > 70
    assert 0.9 < float(draws.std()) < 1.2


def test_a_score_has_no_density_to_accept_by() -> None:
    program = Score(lambda x: -x, (2,))
    with pytest.raises(UnsupportedError, match=r"HMC accepts or rejects .* ULA"):
        infer(program, HMC(), num_draws=2)
    value, _ = density(read(program)).value_and_grad(torch.zeros(2, 3))
    assert bool(value.isnan().all())


def test_chains_start_from_draws_of_other_engines() -> None:
    program = Energy(bowl, (2, 2))
    first = infer(program, ULA(step_size=0.01, num_warmup=100), num_draws=5, num_chains=4)
    again = infer(program, HMC(num_warmup=5), init=first, num_draws=3, num_chains=4)
    assert again["x"].shape == (4, 3, 2, 2)
    other = infer(Energy(bowl, (3,)), ULA(num_warmup=0), num_draws=2, num_chains=1)
    with pytest.raises(InputError, match=r"draws of site 'x' of shape \(2, 2\)"):
        infer(program, HMC(), init=other, num_draws=2, num_chains=1)


# --- wrong use ----------------------------------------------------------------------------------------------------


def noisy(x: Tensor) -> Tensor:
    return bowl(x) + torch.randn(len(x))


def mixing(x: Tensor) -> Tensor:
    return bowl(x - x.mean(0))


WRONG: dict[str, tuple[Any, str]] = {
    "a dimension too many": (
        Energy(lambda x: bowl(x)[:, None], (2,)),
        r"of shape \(3,\), got .*of shape \(3, 1\)",
    ),
    "one number for all": (
        Energy(lambda x: bowl(x).sum(), (2,)),
        r"of shape \(3,\), got .*of shape \(\)",
    ),
    "of another shape": (Score(lambda x: x[:, :1], (2,)), r"of shape \(3, 2\), got .*of shape \(3, 1\)"),
    "random": (Energy(noisy, (2,)), "random: two calls at the same x differ.*as a Score"),
    "rows that know of each other": (Energy(mixing, (2,)), "depends on the other rows"),
    "detached": (
        Energy(lambda x: bowl(x.detach()), (2,)),
        "not depend on x by operations torch can differentiate",
    ),
}


@pytest.mark.parametrize("name", WRONG)
def test_wrong_functions_are_named(name: str) -> None:
    program, words = WRONG[name]
    with pytest.raises(InputError, match=words):
        infer(program, ULA(), num_draws=2)


def test_dropout_is_random_in_training_mode_alone() -> None:
    program = Energy(Network(), (3,))
    with pytest.raises(InputError, match="random"):
        EnergyDensity(program.train())
    EnergyDensity(program.eval())


def test_a_condition_is_not_passed_over() -> None:
    with pytest.raises(InputError, match="takes no condition"):
        infer(Energy(bowl, (2,)), HMC(), args=(torch.zeros(3, 1),), num_draws=2)


def test_a_program_of_others_needs_its_event_shape() -> None:
    class Nameless:
        def model(self, batch: Batch) -> None: ...

        def energy(self, x: Tensor) -> Tensor:
            return bowl(x)

    with pytest.raises(InputError, match="Nameless has no event_shape"):
        infer(Nameless(), HMC(), num_draws=2)


@pytest.mark.parametrize("program", [Energy(bowl, (2,)), Score(lambda x: -x, (2,))], ids=["energy", "score"])
def test_nobody_draws_forwards(program: Any) -> None:
    with pytest.raises(UnsupportedError, match="infer"):
        infer(program, Ancestral(), num_draws=2)


def test_a_start_that_is_not_finite_is_blamed_on_the_energy() -> None:
    with pytest.raises(InputError, match="No start was found: the energy"):
        infer(Energy(lambda x: bowl(x) + (x[:, 0] - 50).log(), (2,)), HMC(), num_draws=2)


def test_an_image_network_keeps_its_shape() -> None:
    net = UNet((1, 8, 8), widths=(8, 16))

    def energy(x: Tensor) -> Tensor:
        return net(x, torch.zeros(len(x))).flatten(1).sum(1) + 0.5 * x.flatten(1).square().sum(1)

    draws = infer(Energy(energy, (1, 8, 8)), ULA(step_size=0.1, num_warmup=2), num_draws=2, num_chains=3)["x"]
    assert draws.shape == (3, 2, 1, 8, 8)
