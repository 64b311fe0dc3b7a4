"""Bad input, for every public callable at every parameter: what is called, what is given, and the verdict.

The subjects are discovered: settings (engines, estimators, objectives, processes, ...) by walking the folders,
everything else by the public names. What a callable needs to work at all is its line in `WORKING`; a new one without a
line, and without an `example()`, is reported by `test_everything_public_is_tried`.

A call is right if it works and gives finite results, or raises one `ProbgenError` that names the parameter and shows
what was given, in under a second. It is wrong if another library's error comes through, if it hangs, if it is refused
without saying what was wrong, or if what cannot be right (a string for a number, NaN for a step size) is taken in
silence.
"""

from __future__ import annotations

import collections.abc
import contextlib
import dataclasses
import functools
import gc
import importlib
import inspect
import math
import numbers
import os
import pkgutil
import re
import signal
import sys
import time
import traceback
import types
import typing
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import pyro
import pyro.distributions as dist
import torch
from pyro.poutine import runtime
from torch import Tensor, nn

import probgen
from probgen import verbs
from probgen.conditioning import Condition
from probgen.core import Batch, Cost, Engine, Estimator, NonFiniteWarning, Pairwise, ProbgenError, Terms
from probgen.diagnostics import Mesh, flow_plots
from probgen.discovery import FOLDERS
from probgen.nets import GaussianMLP
from probgen.priors.guidance import Guidance
from probgen.processes import Grid, Process

REFUSING_SECONDS = 1.0
WORKING_SECONDS = 10.0
LONG = 10_000  # as a count it is work for longer than a test waits


# --- what is given --------------------------------------------------------------------------------------------------


def returns_nothing(*_: Any, **__: Any) -> None:
    """A function, but not the one that is meant."""


class Something:
    """A class where one of its objects is meant, and of the wrong kind."""

    def __init__(self, *_: Any, **__: Any) -> None: ...


NUMBERS: tuple[Any, ...] = (
    -1, 0, 3, 10**9, 2**70, -0.5, 0.0, 0.5, 1.0, 1.5, 1e30, -1e30, 1e-30, math.nan, math.inf, -math.inf, 1j,
)  # fmt: skip
OTHERS: tuple[Any, ...] = (
    None, True, "", "nonsense", "nan", b"x", [], [1.0], [-1], ["x"], (), (0,), (3, -1), (1.5,), {}, {"nowhere": 1.0},
    object(), Something, returns_nothing, Path("/dev/null/nowhere"),
)  # fmt: skip


def tensors() -> Iterator[Tensor]:
    """Tensors that are wrong somewhere, whatever is expected."""
    yield torch.ones(())
    yield torch.ones(0)
    yield torch.ones(0, 2)
    yield torch.ones(3, 5, 7)
    yield torch.full((3, 2), math.nan)
    yield torch.tensor([[1.0, math.inf]])
    yield torch.full((2,), 1e30)
    yield -torch.ones(2)
    yield torch.zeros(4, dtype=torch.int64)
    yield torch.ones(4, dtype=torch.bool)
    yield torch.ones(4, dtype=torch.complex64)
    yield torch.ones(4, 2, device="meta")
    yield torch.ones(4, 2).to_sparse()


def bad_values() -> list[Any]:
    """What every parameter is given, whatever it expects."""
    return [*NUMBERS, *OTHERS, *tensors(), np.ones(3)]


def spoiled(good: Any) -> list[Any]:
    """Values that were right, made wrong in one place."""
    if isinstance(good, Tensor):
        return list(_spoiled_tensors(good))
    if isinstance(good, Mapping) and good and all(isinstance(value, Tensor) for value in good.values()):
        name, value = next(iter(good.items()))
        return [{**good, name: bad} for bad in (*_spoiled_tensors(value), None, 1.0, "x")] + [
            {f"{name}_": value},
            {**good, "nowhere": value},
            {1: value},
        ]
    return []


def _spoiled_tensors(good: Tensor) -> Iterator[Tensor]:
    if good.is_floating_point() and good.numel():
        for wrong in (math.nan, math.inf, 1e30):
            one = good.clone()
            one.view(-1)[-1] = wrong
            yield one
        yield good.long()
        yield good.to(torch.complex64)
        yield good.half()
    else:
        yield good.double()
        yield good - 7
        yield good + 10**6
    yield good[:0] if good.ndim else good[None][:0]
    yield good[None]
    yield good[..., :-1] if good.ndim else good[None]
    yield good.to("meta")


def short(value: Any) -> str:
    """A value as tables of trials show it."""
    if isinstance(value, Tensor):
        kind = f"{str(value.dtype).removeprefix('torch.')} {tuple(value.shape)} {value.device}"
        bad = "" if value.is_meta or value.is_sparse or bool(torch.isfinite(value).all()) else " not finite"
        return f"tensor {kind}{bad}"
    return repr(value)[:60]


# --- what is called -------------------------------------------------------------------------------------------------


class Subject(NamedTuple):
    """A public callable and arguments with which it works; `use` tries out what it returned."""

    name: str
    call: Callable[..., Any]
    working: Callable[[], dict[str, Any]]
    use: Callable[[Any], Any]

    def parameters(self) -> dict[str, Any]:
        """What may be given, by name, with its annotation."""
        hints = hints_of(self.call)
        given = inspect.signature(self.call).parameters.values()
        return {
            item.name: hints.get(item.name, Any)
            for item in given
            if item.kind not in (item.VAR_POSITIONAL, item.VAR_KEYWORD)
        }


def hints_of(call: Callable[..., Any]) -> dict[str, Any]:
    """Annotations as types; those of names that only type checkers import are `Any`."""
    holder = call if dataclasses.is_dataclass(call) else getattr(call, "__init__", call)
    holder = holder if isinstance(call, type) else inspect.unwrap(call)
    unknown: dict[str, Any] = {}
    for _ in range(20):
        try:
            return typing.get_type_hints(holder, localns=unknown)
        except NameError as error:
            unknown[str(error.name)] = Any
        except (AttributeError, TypeError):
            return {}
    return {}


MODULES = (
    "data",
    "processes",
    "nets",
    "conditioning",
    "diagnostics",
    "diagnostics.plots",
    "diagnostics.image_posterior",
)
NOT_CALLED = {
    "History",
    "Grid",
    "Process",
    "Condition",
    "Gaussian",
    "Schedule",
}  # contracts, and what functions return
INNER = {  # called in loops, with what was checked before
    "over_event", "check_times", "denoiser_coefficients", "velocity_coefficients", "output_from_denoised",
    "eps_from_denoised", "score_from_denoised", "zeroed", "drop", "new_figure",
}  # fmt: skip


def public() -> dict[str, Callable[..., Any]]:
    """Every public callable by its name, `module.name` where probgen itself does not offer it."""
    found: dict[str, Callable[..., Any]] = {name: getattr(probgen, name) for name in probgen.__all__}
    found["evidence"] = verbs.evidence  # a folder by that name stands before the verb, and passes all on
    known = set(map(id, found.values()))
    for name in MODULES:
        module = importlib.import_module(f"probgen.{name}")
        names = getattr(module, "__all__", [key for key in vars(module) if not key.startswith("_")])
        for key in names:
            value = getattr(module, key)
            at_home = getattr(value, "__module__", "").startswith(f"probgen.{name}")
            if at_home and callable(value) and id(value) not in known and key != "example":
                found[f"{name}.{key}"] = value
                known.add(id(value))
    return {
        name: value
        for name, value in found.items()
        if callable(value) and name.rpartition(".")[2] not in NOT_CALLED | INNER and not _is_no_call(value)
    }


def _is_no_call(value: Any) -> bool:
    """Types that are names for others, and errors."""
    if isinstance(value, type) and issubclass(value, BaseException):
        return True
    return isinstance(value, typing.TypeVar) or typing.get_origin(value) is not None


def examples(folder: str) -> Iterator[Any]:
    """What the modules of a folder offer as their `example()`."""
    package = importlib.import_module(f"probgen.{folder}")
    for info in pkgutil.iter_modules(package.__path__):
        yield importlib.import_module(f"probgen.{folder}.{info.name}").example()


def subjects() -> dict[str, Subject]:
    """Everything public that we know how to call rightly."""
    settings = {
        type(example).__name__: example
        for folder in FOLDERS
        if folder != "diagnostics"
        for example in examples(folder)
        if dataclasses.is_dataclass(example)
    }
    found = {}
    for name, call in public().items():
        working = WORKING.get(name)
        if working is None and name in settings:
            working = _fields(settings[name])
        if working is None and _needs_nothing(call):
            working = dict
        if working is not None:
            found[name] = Subject(name, call, working, usage(call))
    return found


def _fields(example: Any) -> Callable[[], dict[str, Any]]:
    return lambda: {
        item.name: getattr(example, item.name) for item in dataclasses.fields(example) if item.init
    }


def _needs_nothing(call: Callable[..., Any]) -> bool:
    kinds = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    return all(
        item.default is not item.empty or item.kind in kinds
        for item in inspect.signature(call).parameters.values()
    )


# --- small things to call them with -----------------------------------------------------------------------------------


def net(**options: Any) -> nn.Module:
    torch.manual_seed(0)
    return probgen.TimeMLP((2,), width=8, num_blocks=1, **options)


def rows(num_rows: int = 12) -> Tensor:
    return torch.randn(num_rows, 2, generator=torch.Generator().manual_seed(1))


def bits(num_rows: int = 12) -> Tensor:
    return (rows(num_rows) > 0).float()


def machine() -> Any:
    torch.manual_seed(0)
    return probgen.RBM((2,), num_hidden=2)


def pictures() -> Any:
    return probgen.infer(
        probgen.RBM((4, 4), num_hidden=3), probgen.Gibbs(num_warmup=2), num_draws=4, num_chains=2
    )


def mixture() -> Any:
    return probgen.GaussianMixture(
        torch.tensor([0.3, 0.7]), torch.tensor([[-1.0, 0.0], [1.0, 0.5]]), torch.eye(2).repeat(2, 1, 1)
    )


def seen() -> None:
    x = pyro.sample("x", probgen.Prior(mixture()))
    pyro.sample("y", dist.Normal(x, 0.5).to_event(1))


def normal() -> None:
    z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
    with pyro.plate("rows", 5):
        pyro.sample("y", dist.Normal(z.sum(), 1.0))


def minibatches() -> None:
    z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
    with pyro.plate("rows", 5, subsample_size=2):
        pyro.sample("y", dist.Normal(z.sum(), 1.0))


SEEN = {"y": torch.tensor([0.5, -0.5])}
ROWS = {"y": torch.linspace(-1, 1, 5)}


@functools.cache
def posterior() -> Any:
    return probgen.infer(normal, probgen.NUTS(num_warmup=20), data=ROWS, num_draws=20, num_chains=2)


@functools.cache
def simulated() -> Any:
    from probgen.diagnostics.calibration import example

    return example()


def vae_nets() -> dict[str, Any]:
    return {"encoder": GaussianMLP((2,), (1,), (4,)), "decoder": probgen.MLP((1,), (2,), (4,))}


def square(x: Tensor) -> Tensor:
    """Of events of any rank, of numbers too: a function that knows fewer raises its own error, as it should."""
    return 0.5 * x.square().reshape(len(x), -1).sum(1)


FIGURE = "figure.png"
images = torch.linspace(-1, 1, 2 * 16).reshape(2, 1, 4, 4)
levels = torch.arange(12).reshape(3, 4)

WORKING: dict[str, Callable[[], dict[str, Any]]] = {
    # verbs
    "fit": lambda: {
        "program": probgen.VAE.mlp((2,), 1, (4,)), "data": rows(), "objective": probgen.ELBO(), "num_steps": 2,
        "batch_size": 4, "progress": False,
    },
    "infer": lambda: {
        "program": normal, "engine": probgen.NUTS(num_warmup=5), "data": dict(ROWS), "num_draws": 4, "num_chains": 2,
    },
    "evidence": lambda: {"program": mixture(), "estimator": probgen.ODELikelihood(), "data": rows(3)},
    "moments": lambda: {
        "program": normal, "engine": probgen.NUTS(num_warmup=5), "data": dict(ROWS), "num_draws": 4, "num_chains": 2,
    },
    "predict": lambda: {"source": posterior()},
    "to_arviz": lambda: {"posterior": posterior()},
    "save": lambda: {"thing": mixture(), "path": Path("program.safetensors")},
    "load": lambda: {"path": _written("program.safetensors")},
    "Table": lambda: {"columns": ("dose", "response"), "values": rows()},
    "read_data": lambda: {"spec": _written("a.npz")},
    # what they take and give
    "Batch": lambda: {"data": {"x": rows()}},
    "DataSets": lambda: {"values": {"y": torch.zeros(3, 5)}},
    "Pair": lambda: {"model": normal},
    "Posterior": lambda: {
        "draws": {"z": torch.zeros(2, 4)}, "kind": "iid", "guarantee": "exact", "engine": "Mine",
        "cost": Cost(),
    },
    "Estimate": lambda: {
        "value": torch.zeros(3), "standard_error": torch.zeros(3), "kind": "exact", "event_size": 2,
    },
    "ChainState": lambda: {
        "engine": "NUTS", "step": 3, "num_chains": 2, "kernel": {"position": torch.zeros(2, 2)},
        "tuning": {"step_size": torch.ones(1)},
    },
    # programs
    "VAE": lambda: {"event_shape": (2,), "latent_dim": 1, **vae_nets()},
    "ConditionalVAE": lambda: {
        "event_shape": (2,), "latent_dim": 1, "condition_dim": 2,
        "encoder": lambda x, c: (x[..., :1] + c[..., :1], torch.ones_like(x[..., :1])),
        "decoder": lambda z, c: torch.cat([z, z], -1) + c,
    },
    "SemiSupervisedVAE": lambda: {
        "event_shape": (2,), "latent_dim": 1, "class_probs": torch.tensor([0.5, 0.5]),
        "encoder": lambda x, y: (x[..., :1] + y[..., :1], torch.ones_like(x[..., :1])),
        "decoder": lambda z, y: torch.cat([z, z], -1) + y,
        "classifier": lambda x: x,
    },
    "ConjugateGaussian": lambda: {
        "prior_loc": torch.zeros(2), "prior_covariance": torch.eye(2), "weight": torch.ones(3, 2),
        "bias": torch.zeros(3), "noise_covariance": torch.eye(3),
    },
    "GaussianMixture": lambda: {
        "weights": torch.tensor([0.3, 0.7]), "locs": torch.zeros(2, 2), "covariances": torch.eye(2).repeat(2, 1, 1),
    },
    "GaussianChain": lambda: {"loc": torch.zeros(2), "covariance": torch.eye(2), "num_steps": 5},
    "Empirical": lambda: {"data": rows()},
    "Energy": lambda: {"function": square, "event_shape": (2,)},
    "EBM": lambda: {"network": square, "event_shape": (2,)},
    "BoltzmannMachine": lambda: {"event_shape": (3,), "num_hidden": 1},
    "RBM": lambda: {"event_shape": (3,), "num_hidden": 2},
    "GaussianRBM": lambda: {"event_shape": (3,), "num_hidden": 2},
    "TwinRBM": lambda: {"event_shape": (3,), "num_hidden": 2, "visible_copies": 2},
    "DeepBeliefNet": lambda: {"event_shape": (3,), "widths": (2, 2)},
    "pretrain": lambda: {
        "machine": probgen.DeepBeliefNet((2,), (2, 2)), "data": bits(), "objective": probgen.ContrastiveDivergence(),
        "num_steps": 2, "batch_size": 4, "progress": False,
    },
    "DeepBoltzmannMachine": lambda: {"event_shape": (3,), "widths": (2, 2)},
    "Score": lambda: {"function": torch.neg, "event_shape": (2,)},
    "DDPM": lambda: {"network": net(), "num_steps": 5},
    "ScoreSDE": lambda: {"network": net()},
    "NCSN": lambda: {"network": net(), "num_levels": 3},
    "FlowMatching": lambda: {"network": net()},
    "NeuralSDE": lambda: {"network": net()},
    "Pretrained": lambda: {"network": net(), "process": probgen.VP(), "prediction": "eps"},
    "load_network": lambda: {"source": net(), "process": probgen.VP(), "prediction": "eps", "event_shape": (2,)},
    "Prior": lambda: {"program": mixture()},
    "FlowLaw": lambda: {"program": mixture()},
    "NoiseAware": lambda: {"classifier": lambda x, t: x, "x": rows(1)[0]},
    "SMCEvidence": lambda: {"engine": probgen.TwistedSMC(particles=32, steps=5), "num_runs": 2},
    "ExplicitScoreMatching": lambda: {"target": lambda x, t: -x},
    "ConstantSGD": lambda: {"step_size": 0.01, "num_warmup": 5},
    "SDEdit": lambda: {"guide": torch.zeros(2), "steps": 5},
    "ParallelTempering": lambda: {
        "moves": probgen.HMC(num_steps=2, num_warmup=5), "num_temperatures": 2,
    },
    "PiGDM": dict,
    # networks, conditions and data
    "MLP": lambda: {"in_shape": (2,), "out_shape": (3,), "widths": (4,)},
    "nets.GaussianMLP": lambda: {"in_shape": (2,), "out_shape": (3,), "widths": (4,)},
    "TimeMLP": lambda: {"event_shape": (2,), "width": 8, "num_blocks": 1},
    "UNet": lambda: {"event_shape": (1, 4, 4), "widths": (4,)},
    "nets.Classifier": lambda: {"event_shape": (1, 4, 4), "width": 4, "num_features": 4},
    "nets.TimeEmbedding": lambda: {"width": 8},
    "nets.usual_denoiser": lambda: {"event_shape": (2,), "width": 8, "condition": None},
    "Labels": lambda: {"num_classes": 3},
    "Vector": lambda: {"shape": (2,)},
    "data.Binarised": lambda: {"quantised": probgen.digits()[0]},
    "Quantised": lambda: {"levels": levels, "num_levels": 12, "labels": torch.arange(3)},
    "data.dequantise": lambda: {"levels": levels, "num_levels": 12},
    "data.quantise": lambda: {"x": rows(), "num_levels": 12},
    "data.binarise_threshold": lambda: {"levels": levels, "num_levels": 12},
    "data.binarise_stochastic": lambda: {"levels": levels, "num_levels": 12},
    "data.read_npz": lambda: {"path": _written("a.npz")},
    "data.read_idx": lambda: {"path": _written("a.idx")},
    "data.mnist": lambda: {"folder": _written("mnist")},
    # processes
    "processes.as_grid": lambda: {"grid": "uniform"},
    # diagnostics
    "summary": lambda: {"posterior": posterior()},
    "loo": lambda: {"posterior": posterior()},
    "agree": lambda: {"posteriors": {"a": posterior(), "b": posterior()}},
    "c2st": lambda: {"a": rows(40), "b": rows(40) + 1},
    "sbc": lambda: {"posteriors": simulated()},
    "coverage": lambda: {"posteriors": simulated()},
    "tarp": lambda: {"posteriors": simulated()},
    "frechet_distance": lambda: {"features_a": rows(40), "features_b": rows(40) + 1},
    "diagnostics.frechet_floor": lambda: {"features": rows(40)},
    "diagnostics.sliced_wasserstein": lambda: {"a": rows(40), "b": rows(40) + 1},
    "lipschitz": lambda: {"program": mixture(), "num_paths": 4, "num_steps": 4},
    "fokker_planck": lambda: {"program": mixture(), "data": rows(200), "num_points": 16, "num_steps": 4},
    "diagnostics.backward_heat": lambda: {
        "program": mixture(), "data": rows(200), "t_from": 0.3, "t_to": 0.2, "num_points": 16,
    },
    "diagnostics.Mesh": lambda: {"low": (-1.0, -1.0), "high": (1.0, 1.0), "num_points": 8},
    "diagnostics.chi_square": lambda: {
        "mesh": Mesh((-4.0,), (4.0,), 16), "density": torch.full((16,), 1 / 8),
        "x": torch.linspace(-4, 3.9, 400)[:, None],
    },
    "diagnostics.exact_density": lambda: {"program": mixture()},
    "diagnostics.noised_density": lambda: {"data": rows(), "process": probgen.VP()},
    "diagnostics.simulated_posteriors": lambda: {
        "program": probgen.ConjugateGaussian.example(),
        "engine": probgen.NUTS(num_warmup=5), "observed": "x", "num_sets": 3, "num_draws": 4,
    },
    "diagnostics.SimulatedPosteriors": lambda: {
        "truth": {"z": torch.zeros(5)}, "draws": {"z": torch.randn(9, 5)}, "data": {"x": torch.zeros(5)},
    },
    "diagnostics.plot_predictive": lambda: {"observed": rows(), "predicted": torch.randn(1, 6, 12, 2), "path": FIGURE},
    "diagnostics.image_grid": lambda: {"images": images, "path": FIGURE},
    "diagnostics.reconstruction_grid": lambda: {"originals": images, "reconstructions": images, "path": FIGURE},
    "diagnostics.plot_history": lambda: {"curves": {"loss": [(1, 3.0), (2, 2.0)]}, "path": FIGURE},
    "diagnostics.plot_ranks": lambda: {"posterior": posterior(), "path": FIGURE},
    "diagnostics.plot_traces": lambda: {"posterior": posterior(), "path": FIGURE},
    "diagnostics.plot_terms": lambda: {
        "terms": Terms(("a", "b"), torch.ones(2), torch.ones(2)), "path": FIGURE,
    },
    "diagnostics.plot_roc": lambda: {
        "curves": {"energy": probgen.roc(torch.arange(5.0), torch.arange(2.0, 9.0))}, "path": FIGURE,
    },
    "roc": lambda: {"inside": torch.arange(5.0), "outside": torch.arange(2.0, 9.0)},
    "diagnostics.landscape": lambda: {
        "program": probgen.Energy(lambda x: x.square().sum(-1), (2,)), "mesh": Mesh((-5.0, -5.0), (5.0, 5.0), 32),
    },
    "diagnostics.chain_chi_square": lambda: {
        "mesh": Mesh((-8.0,), (8.0,), 512), "chains": torch.randn(100, 50, 1),
        "density": dist.Normal(0.0, 1.0).log_prob(Mesh((-8.0,), (8.0,), 512).axes[0]).exp(),
    },
    "diagnostics.plot_filters": lambda: {"program": probgen.RBM((4, 4), num_hidden=3), "path": FIGURE},
    "diagnostics.plot_fantasies": lambda: {"posterior": pictures(), "path": FIGURE},
    "diagnostics.plot_recall": lambda: {
        "truth": images, "cue": images, "completions": {"rbm": images.repeat(5, 1, 1, 1, 1)}, "path": FIGURE,
    },
    "diagnostics.plot_flow": lambda: {
        **dict(zip(("density", "mesh", "runs"), flow_plots.example(), strict=True)), "path": FIGURE,
    },
    "diagnostics.image_posterior.plot_image_posterior": lambda: {
        "truth": images, "seen": images, "draws": torch.zeros(8, *images.shape), "path": FIGURE,
    },
}  # fmt: skip


def _written(name: str) -> Path:
    """A small file of data, written into the working folder."""
    path = Path(name)
    if name.endswith(".safetensors"):
        probgen.save(mixture(), path)
    elif name.endswith(".npz"):
        np.savez(path, a=np.zeros(3))
    elif name.endswith(".idx"):
        path.write_bytes(b"\0\0\x08\x01" + (3).to_bytes(4, "big") + b"abc")
    else:
        path.mkdir(exist_ok=True)
        for part in ("train", "test"):
            bytes_of_images = np.zeros((2, 3, 3), dtype=np.uint8)
            np.savez(path / f"mnist_{part}.npz", images=bytes_of_images, labels=np.zeros(2, dtype=np.uint8))
    return path


# --- trying out what was made ---------------------------------------------------------------------------------------


def usage(call: Callable[..., Any]) -> Callable[[Any], Any]:
    """What is done with the result of a call: settings are used, for bad ones may show only then."""
    if isinstance(call, type):
        for kind, use in USES.items():
            if issubclass(call, kind):
                return use
        if hasattr(call, "loss"):
            return use_objective
        if hasattr(call, "model"):
            return use_program
    return lambda result: result


def use_engine(engine: Any) -> Any:
    """A few draws of the first program that its kind serves."""
    kind: Any = type(engine)
    found = home(kind)
    if found is None or is_long(engine) or getattr(engine, "compile", False):
        return None
    program, options = found
    return probgen.infer(program, engine, num_draws=3, num_chains=2, **options)


@functools.cache
def home(kind: type[Engine]) -> tuple[Any, dict[str, Any]] | None:
    """A program, with its data, that an engine serves when its settings are right."""
    engine = kind(**subjects()[kind.__name__].working())
    for program, options in _programs():
        with contextlib.suppress(ProbgenError):
            probgen.infer(program, engine, num_draws=3, num_chains=2, **options)
            return program, options
    return None


def is_long(settings: Any) -> bool:
    """Whether settings ask for more work than a test can wait for: it would be done, and is left."""
    return any(isinstance(value, int) and value > LONG for value in vars(settings).values())


def _programs() -> Iterator[tuple[Any, dict[str, Any]]]:
    yield seen, {"data": SEEN}
    yield normal, {"data": ROWS}
    yield mixture(), {}
    yield machine(), {"data": {"x": bits(2)}}
    yield probgen.VAE.mlp((2,), 1, (4,)), {"data": {"x": rows(4)}}
    yield minibatches, {"data": ROWS}
    yield probgen.NCSN(net(), num_levels=3), {}
    yield probgen.DDPM(net(), num_steps=5), {}
    yield probgen.FlowMatching(net()), {}


def use_estimator(estimator: Any) -> Any:
    if is_long(estimator):
        return None
    vae = probgen.VAE.mlp((2,), 1, (4,))
    for program, data in ((vae, rows(3)), (mixture(), rows(3)), (seen, SEEN), (machine(), bits(3))):
        if estimator.supports(program):
            return probgen.evidence(program, estimator, data)
    return None


def use_objective(objective: Any) -> Any:
    if is_long(objective):
        return None
    programs = (
        probgen.VAE.mlp((2,), 1, (4,)),
        probgen.ScoreSDE(net()),
        probgen.FlowMatching(net()),
        probgen.EBM.mlp((2,), widths=(4,)),
    )
    for program in programs:
        with contextlib.suppress(probgen.UnsupportedError):
            return objective.loss(program, Batch({"x": rows(4)})).detach()
    with contextlib.suppress(probgen.UnsupportedError):
        return objective.loss(machine(), Batch({"x": bits(4)})).detach()
    return None


def use_process(process: Any) -> Any:
    t = torch.linspace(process.t_min, process.t_max, 9, dtype=torch.float64)
    sigma = process.sigma(t)
    if not bool((sigma.diff() > 0).all()):
        raise AssertionError(f"noise does not grow: {sigma}")
    inside = t[1:-1]  # rates may be infinite at the ends
    return [process.alpha(t), sigma, process.drift(inside), process.diffusion2(inside)]


def use_grid(grid: Any) -> Any:
    schedule = grid.between(0.999, 0.001, probgen.VP())
    u = torch.linspace(0, 1, 9, dtype=torch.float64)
    if not bool((schedule.time(u).diff() < 0).all()):
        raise AssertionError("times do not fall")
    return schedule.time(u)


def use_program(program: Any) -> Any:
    if isinstance(program, Pairwise):
        return probgen.infer(program, probgen.Gibbs(num_warmup=2), num_draws=2)
    if isinstance(program, (probgen.EBM, probgen.Energy, probgen.Score)):
        return probgen.infer(program, probgen.ULA(num_warmup=2), num_draws=2)
    condition = getattr(program, "condition", None)
    size = getattr(program, "condition_dim", None)
    args = () if condition is None else (condition.draw(2),)
    args = args if size is None else (torch.zeros(2, size),)
    return probgen.infer(program, probgen.Ancestral(), num_draws=2, args=args)


def use_net(network: Any) -> Any:
    shape = getattr(network, "event_shape", None) or getattr(network, "in_shape", None)
    if shape is None:
        return None
    x = torch.randn(2, *shape)
    return network(x, torch.rand(2)).detach() if hasattr(network, "embed_time") else network(x).detach()


def seen_label() -> None:
    x = pyro.sample("x", probgen.Prior(mixture()))
    pyro.sample("label", probgen.NoiseAware(lambda x, t: x, x))


def seen_of_a_class() -> None:
    program = probgen.ScoreSDE(net(condition=probgen.Labels(3)))
    x = pyro.sample("x", probgen.Prior(program, condition=torch.tensor([1])))
    pyro.sample("y", dist.Normal(x, 0.5).to_event(1))


def use_guidance(guidance: Any) -> Any:
    engine = probgen.GuidedSDE(guidance, steps=3)
    if isinstance(guidance, probgen.ClassifierGuidance):
        return probgen.infer(seen_label, engine, data={"label": torch.tensor(1)}, num_draws=2)
    program = seen_of_a_class if isinstance(guidance, probgen.ClassifierFree) else seen
    y = SEEN["y"] if program is seen else SEEN["y"][None]
    return probgen.infer(program, engine, data={"y": y}, num_draws=2)


def use_condition(condition: Any) -> Any:
    return condition.draw(2)


USES: dict[type, Callable[[Any], Any]] = {
    Engine: use_engine,
    Estimator: use_estimator,
    Process: use_process,
    Guidance: use_guidance,
    probgen.Labels: use_condition,
    probgen.Vector: use_condition,
    probgen.Power: use_grid,
    probgen.Karras: use_grid,
    probgen.MLP: use_net,
    probgen.TimeMLP: use_net,
    probgen.UNet: use_net,
    **dict.fromkeys((probgen.Posterior, probgen.Estimate, probgen.History), lambda result: len(str(result))),
}


# --- the verdict ----------------------------------------------------------------------------------------------------

Kind = Literal["refused", "accepted", "foreign", "slow", "vague", "nonsense", "not finite"]
GOOD: tuple[Kind, ...] = ("refused", "accepted")


class Verdict(NamedTuple):
    """What came of one call, with the error or the result in words."""

    kind: Kind
    words: str = ""

    def __bool__(self) -> bool:
        return self.kind in GOOD


class TooSlow(BaseException):
    """A base exception, so that nothing in between takes it for its own."""


def _leave(error: BaseException) -> None:
    """Close the plates that a call was in when it was broken off: in this order they cannot all do what they should."""
    hook, sys.unraisablehook = sys.unraisablehook, lambda _: None
    try:
        traceback.clear_frames(error.__traceback__)
        gc.collect()
    finally:
        sys.unraisablehook = hook


@contextlib.contextmanager
def time_limit(seconds: float) -> Iterator[None]:
    """`TooSlow` inside the block after as many seconds of work, time in which others work not counted."""

    def stop(*_: Any) -> None:
        raise TooSlow

    before = signal.signal(signal.SIGPROF, stop)
    signal.setitimer(signal.ITIMER_PROF, seconds)
    try:
        yield
    except TooSlow as error:
        _leave(error)
        runtime._PYRO_STACK.clear()  # handlers that the call was in when it was broken off
        runtime._DIM_ALLOCATOR._stack.clear()
        raise
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.signal(signal.SIGPROF, before)


def attempt(subject: Subject, parameter: str, value: Any) -> Verdict:
    """Call it with this value, all else as it works, and use what it made."""
    arguments, annotation = subject.working() | {parameter: value}, subject.parameters()[parameter]
    started = time.process_time()
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        try:
            with time_limit(WORKING_SECONDS):
                result = subject.call(**arguments)
                if not may_be(annotation, value):
                    return Verdict("nonsense", short(result))
                used = subject.use(result)
        except ProbgenError as error:
            if time.process_time() - started > REFUSING_SECONDS:
                return Verdict("slow", str(error))
            return _of_refusal(str(error), parameter, annotation, value)
        except TooSlow:
            if type(value) is int and value > LONG:
                return Verdict("accepted", "as much work as was asked for")
            return Verdict("slow", f"more than {WORKING_SECONDS} seconds")
        except Exception as error:  # noqa: BLE001 - whichever it is, it came through
            return Verdict("foreign", f"{type(error).__name__}: {error}"[:160])
    warned = any(issubclass(warning.category, NonFiniteWarning) for warning in told)
    return Verdict("accepted") if warned or is_finite(used) else Verdict("not finite", short(used))


def _of_refusal(words: str, parameter: str, annotation: Any, value: Any) -> Verdict:
    """A message names the parameter, and shows the value; what is of the right kind may be wrong beside others only."""
    told = names(words, parameter) and (may_be(annotation, value) or shows(words, value))
    return Verdict("refused" if told else "vague", words)


def names(words: str, parameter: str) -> bool:
    """Whether a message says which parameter, or which of its parts, is meant."""
    singular = parameter.rstrip("s")
    near = (parameter, singular, singular.replace("_", " "), "Site", "site ", *NEAR.get(parameter, ()))
    return any(word.lower() in words.lower() for word in near)


NEAR = {
    "args": ("condition", "takes", "argument"),
    "condition": ("condition",),
    "features_a": ("features",),
    "features_b": ("features",),
    "event_shape": ("event shape", "shape"),
    "in_shape": ("shape", "sizes"),
    "out_shape": ("shape", "sizes"),
    "widths": ("sizes",),
    "objective": ("nn.Parameter",),
    "num_steps": ("steps",),
    "latent_dim": ("shape",),
    "guide": ("SDEdit",),
    "data": ("draws",),
    "program": ("has none",),
    "thing": ("save writes",),
    "spec": ("file", "folder", "data", "images"),
    "target_accept": ("stuck",),
    "run": ("folder",),
    "sites": ("no entries",),
    "levels": ("labels",),
    "prediction": ("what its output is",),
    "process": ("how its data were noised",),
    "validation": ("No data",),
    "path": ("file", "folder"),
    "source": ("file", "folder", "draws of", "cannot be read"),
    "folder": ("file", "images"),
}


def shows(words: str, value: Any) -> bool:
    """Whether a message shows what was given: the value, its type, its shape or what is wrong inside."""
    return any(word and word in words for word in told_of(value))


def told_of(value: Any) -> Iterator[str]:
    """Words by which a message may show a value."""
    yield from (repr(value), str(value), type(value).__name__, getattr(value, "__name__", ""))
    if isinstance(value, int | float):
        yield f"{value:,}"
    if isinstance(value, Tensor):
        shape = ", ".join(map(str, value.shape))
        yield from (
            str(value.dtype),
            shape or "()",
            str(value.device),
            "NaN",
            "finite",
            "ensor",
            "rows",
            "empty",
        )
    elif isinstance(value, Mapping):
        yield from (
            *map(str, value),
            "dict",
            "empty",
            "no data",
            "shape",
            "NaN",
            "nothing",
            "finite",
            "Tensor",
            "meta",
        )
    elif isinstance(value, Sequence) and not isinstance(value, str | bytes):
        yield from (*map(repr, value), "empty", "none")
        for item in value:
            yield from told_of(item) if isinstance(item, Tensor) else ()


def may_be(annotation: Any, value: Any) -> bool:  # noqa: C901 - one line a kind
    """Whether a value is of the annotated type, as a person reads it: True is no number, NaN no setting."""
    origin, parts = typing.get_origin(annotation), typing.get_args(annotation)
    if annotation is Any or isinstance(annotation, str | typing.TypeVar):
        return True
    if origin in (typing.Union, types.UnionType):
        return any(may_be(part, value) for part in parts)
    if origin is typing.Annotated:
        return may_be(parts[0], value)
    if origin is Literal:
        return any(type(value) is type(part) and value == part for part in parts)
    if annotation in (None, types.NoneType):
        return value is None
    if annotation is int:
        return isinstance(value, numbers.Integral) and not isinstance(value, bool)
    if annotation is float:
        return isinstance(value, numbers.Real) and not isinstance(value, bool) and math.isfinite(value)
    if annotation is Tensor:
        return isinstance(value, Tensor) and not value.is_meta
    if origin is collections.abc.Callable or annotation is collections.abc.Callable:
        return callable(value)
    if origin is collections.abc.Collection:
        return isinstance(value, list | tuple | set | Mapping) and all(
            may_be(parts[0], item) for item in value
        )
    if origin in (collections.abc.Sequence, tuple, list):
        if not isinstance(value, Sequence) or isinstance(value, str | bytes):
            return False
        return all(may_be(parts[0], item) for item in value) if parts else True
    if origin in (collections.abc.Mapping, dict):
        return isinstance(value, Mapping)
    if origin is os.PathLike or annotation is os.PathLike:
        return isinstance(value, os.PathLike)
    kind = origin or annotation
    if isinstance(kind, type) and not getattr(kind, "_is_protocol", False):
        return isinstance(value, kind)
    if getattr(kind, "_is_runtime_protocol", False):
        return isinstance(value, kind)
    if kind in (Grid, Condition):
        return all(hasattr(value, name) for name in vars(kind) if not name.startswith("_"))
    return True


def is_finite(result: Any) -> bool:
    """Whether all numbers of a result are."""
    if isinstance(result, float):
        return math.isfinite(result)
    if isinstance(result, Tensor):
        return result.is_meta or not result.is_floating_point() or bool(torch.isfinite(result).all())
    if isinstance(result, np.ndarray):
        return result.dtype.kind != "f" or bool(np.isfinite(result).all())
    if isinstance(result, Mapping):
        return all(map(is_finite, result.values()))
    if isinstance(result, list | tuple):
        return all(map(is_finite, result))
    if isinstance(result, probgen.Posterior):
        return is_finite(result.draws)
    if isinstance(result, probgen.Estimate):
        return is_finite(result.value) or not result.trusted
    if isinstance(result, str):
        return not re.search(r"\bnan\b|\binf\b", result)
    return True
