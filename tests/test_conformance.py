"""What every program, objective, engine and estimator must do; by walking the folders, so that new files are tested."""

from __future__ import annotations

import importlib
import pkgutil
from typing import Any

import pyro
import pytest
import torch
from torch import Tensor, nn

import probgen
from probgen import Ancestral, Batch, UnsupportedError, infer
from probgen.core import Energetic, Engine, Estimator, Guided, Pairwise, Program, ScoreOnly, describe
from probgen.discovery import FOLDERS, methods
from probgen.targets import Pair


def examples(folder: str) -> dict[str, Any]:
    """What each module of a folder offers as its `example()`, by module name."""
    package = importlib.import_module(f"probgen.{folder}")
    names = [info.name for info in pkgutil.iter_modules(package.__path__)]
    return {name: importlib.import_module(f"probgen.{folder}.{name}").example() for name in names}


PROGRAMS = examples("models")


def condition(program: Any, rows: int) -> Tensor | None:
    """A condition for programs that take one: by its kind, or of `condition_dim` numbers."""
    kind, size = getattr(program, "condition", None), getattr(program, "condition_dim", None)
    if kind is not None:
        return kind.draw(rows)
    return None if size is None else torch.randn(rows, size)


def is_unnormalised(program: Any) -> bool:
    """Energies, machines and scores: nobody draws from them by running them forwards."""
    return isinstance(program, (Energetic, Pairwise, ScoreOnly))


def data_of(program: Any, rows: int = 3) -> tuple[dict[str, Tensor], tuple[Any, ...]]:
    """Data drawn from the program itself, or of its shape, and the arguments it needs."""
    if is_unnormalised(program):
        x = torch.randn(rows, *program.event_shape)
        return {"x": x if isinstance(program, (Energetic, ScoreOnly)) else (x > 0).to(x)}, ()
    c = condition(program, rows)
    args = () if c is None else (c,)
    draws = infer(program, Ancestral(), args=args, num_draws=1 if args else rows)["x"]
    return {"x": draws[0, 0] if args else draws[0]}, args


@pytest.mark.parametrize("name", PROGRAMS)
def test_programs_simulate_what_they_declare(name: str) -> None:
    """Site "x" of `event_shape`, in any number of draws and chains; every weight has a use."""
    program = PROGRAMS[name]
    assert isinstance(program, Program)
    if is_unnormalised(program):
        with pytest.raises(UnsupportedError, match="infer|What can"):
            infer(program, Ancestral(), num_draws=2)
        return
    x, args = data_of(program)
    assert x["x"].shape == (3, *program.event_shape)
    assert bool(torch.isfinite(x["x"]).all())
    draws = infer(program, Ancestral(), args=args, num_draws=2, num_chains=2)["x"]
    assert draws.shape == (2, 2, *([3] if args else []), *program.event_shape)


@pytest.mark.parametrize("name", [name for name, program in PROGRAMS.items() if isinstance(program, Guided)])
def test_guides_accept_particles_on_the_left(name: str) -> None:
    """The same pair under a particle plate keeps one log density a particle and a row."""
    program = PROGRAMS[name]
    data, args = data_of(program)
    batch = Batch(data, *args)
    plate = pyro.plate("particles", 4, dim=-2)
    guide = pyro.poutine.trace(plate(program.guide)).get_trace(batch)
    model = pyro.poutine.trace(
        plate(pyro.poutine.replay(pyro.condition(program.model, data=data), guide))
    ).get_trace(batch)
    model.compute_log_prob()
    assert model.nodes["x"]["log_prob"].shape == (4, 3)


@pytest.mark.parametrize("objective", examples("objectives").values(), ids=describe)
@pytest.mark.parametrize("name", PROGRAMS)
def test_objectives_serve_or_refuse(objective: Any, name: str) -> None:
    """A finite scalar with a gradient for some weight, or one error of ours that names the program."""
    program = PROGRAMS[name]
    data, args = data_of(program)
    try:
        loss = objective.loss(program, Batch(data, *args))
    except UnsupportedError:
        return
    assert loss.shape == ()
    assert bool(torch.isfinite(loss))
    weights = list(program.parameters())
    if weights:
        loss.backward()
        assert any(weight.grad is not None for weight in weights)
        program.zero_grad()


@pytest.mark.parametrize("engine", examples("inference").values(), ids=str)
@pytest.mark.parametrize("name", PROGRAMS)
def test_engines_serve_or_refuse(engine: Engine, name: str) -> None:
    program = PROGRAMS[name]
    data, args = data_of(program)
    options: dict[str, Any] = {"num_draws": 3, "num_chains": 2, "args": args}
    if engine.conditions and not is_unnormalised(program):
        options["data"] = data
    try:
        posterior = infer(program, engine, **options)
    except (UnsupportedError, probgen.InputError) as error:
        assert str(error).strip().endswith(".")
        return
    for site, draws in posterior.draws.items():
        assert draws.shape[:2] == (2, 3), site
        assert bool(torch.isfinite(draws.double()).all()), site
    assert posterior.kind == engine.kind
    assert posterior.guarantee == engine.guarantee
    assert posterior.cost.seconds + posterior.cost.warmup_seconds > 0


@pytest.mark.parametrize("estimator", examples("evidence").values(), ids=str)
@pytest.mark.parametrize("name", PROGRAMS)
def test_estimators_serve_or_refuse(estimator: Estimator, name: str) -> None:
    program = PROGRAMS[name]
    data, args = data_of(program)
    try:
        estimate = probgen.evidence(program, estimator, data, args=args)
    except UnsupportedError as error:
        assert "What can" in str(error)
        return
    assert estimate.value.shape == estimate.standard_error.shape == (3,)
    assert bool(torch.isfinite(estimate.value).all())
    assert estimate.event_size == data["x"][0].numel()


@pytest.mark.parametrize("folder", [folder for folder in FOLDERS if folder != "diagnostics"])
def test_methods_introduce_themselves(folder: str) -> None:
    """`probgen list` has a paper, what is offered and what is given up of every method."""
    found = methods(folder)
    assert found
    for name, method in found.items():
        for attribute in ("paper", "offers", "gives_up"):
            assert isinstance(getattr(method, attribute), str), (name, attribute)
            assert getattr(method, attribute), (name, attribute)


def test_a_broken_program_is_noticed() -> None:
    """The checks above fail a program whose data site forgets its event shape."""

    class Broken(nn.Module):
        event_shape = (3,)

        def model(self, batch: Batch) -> None:
            with batch.plate():
                pyro.sample("x", pyro.distributions.Normal(torch.zeros(batch.size), 1.0))

    x, _ = data_of(Broken())
    assert x["x"].shape != (3, *Broken.event_shape)


def test_public_names_exist() -> None:
    for name in probgen.__all__:
        assert getattr(probgen, name) is not None
    assert Pair is probgen.Pair
