"""How fitted programs make their draws of noise: x = f(eps), differentiable, with a law of eps that is known.

A diffusion or a flow carries x_1 = scale eps along its ODE; any other program is run with each of its sites carried
from noise, z = loc + scale eps where it is Gaussian. The law of x is that of the program, up to the solver's error.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple, Protocol

import torch
from pyro import poutine
from pyro.distributions import MultivariateNormal, Normal
from pyro.poutine.messenger import Messenger
from pyro.poutine.util import site_is_subsample
from torch import Tensor
from torch.distributions import Independent

from probgen.bounds import sample_sites, validation
from probgen.core import Batch, Energetic, Guided, InputError, ScoreOnly, UnsupportedError, describe, given
from probgen.distributions import DiagonalNormal, FlowLaw, apart
from probgen.dynamics import (
    FIXED_STEP,
    ClockedField,
    GaussianInitial,
    Velocity,
    fixed_step,
    flow_field,
    reversed_schedule,
)
from probgen.dynamics.fields import scalar, times
from probgen.priors.observed import whitened
from probgen.priors.prior import Prior
from probgen.processes import Grid, as_grid
from probgen.targets.bijections import bijection
from probgen.targets.point import is_record

_ROWS = 11  # of the first run, for each row of a condition: a number that few shapes hold
_GAUSSIAN = (Normal, DiagonalNormal, MultivariateNormal)


class Solver(NamedTuple):
    """Fixed steps of the flow ODE.

    Args:
        steps: their number; method: "euler", "heun" or "rk4"; grid: how they are spread over time.
    """

    steps: int
    method: str
    grid: Grid | str

    @property
    def num_calls(self) -> int:
        """Network calls from noise to data, the last one for E[x_0 | x]."""
        return self.steps * len(FIXED_STEP[self.method].nodes) + 1


class Carried(NamedTuple):
    """Rows x `(n, *event)` and the log density of the noise they were made of, `(n,)`."""

    x: Tensor
    log_prob: Tensor


class NoiseMap(Protocol):
    """x = f(noise), row by row.

    Attributes:
        size: numbers that make one x.
        num_calls: network calls of f.
    """

    size: int
    num_calls: int

    def __call__(self, noise: Tensor) -> Carried:
        """x and the log density of noise `(n, size)`."""

    def inverse(self, x: Tensor) -> Tensor:
        """noise `(n, size)` that makes x `(n, *event)`, or nearly so."""


def noise_map(prior: Any, solver: Solver) -> NoiseMap:
    """How the fitted program of a `Prior`, or of a `FlowLaw`, makes one x; `UnsupportedError` where it does not."""
    if Velocity.supports(prior.program):
        return FlowMap(prior, solver)
    if isinstance(prior.program, (Energetic, ScoreOnly)) or not hasattr(prior.program, "model"):
        raise UnsupportedError(
            f"{describe(prior.program)} is known by its density or score alone: there is no noise that its draws are "
            "made of. Take space='data'."
        )
    return ProgramMap(prior, solver)


class FlowMap:
    """x = E[x_0 | x_t] at the end t = t_min of dx = velocity dt, from x_1 = scale eps, eps ~ N(0, I).

    Flows that begin elsewhere, such as at other data, take x_1 itself as their noise.

    Args:
        prior: the law, a `Prior` or a `FlowLaw`.
        solver: of the ODE.
    """

    def __init__(self, prior: Any, solver: Solver) -> None:
        self.prior, self.solver, self.num_calls = prior, solver, solver.num_calls
        self.size = math.prod(prior.event_shape)
        self._paths: dict[int, _Path] = {}

    def __call__(self, noise: Tensor) -> Carried:
        """See `NoiseMap`."""
        path = self._path(len(noise))
        x_1, log_prob = path.begun(noise.reshape(-1, *self.prior.event_shape))
        return Carried(path.finished(fixed_step(path.down, x_1, self.solver.method)), log_prob)

    def inverse(self, x: Tensor) -> Tensor:
        """The noise, up to what the solver and E[x_0 | x] at t_min lose."""
        path = self._path(len(x))
        initial, x_1 = path.flow.initial, fixed_step(path.up, x, self.solver.method)
        scale = initial.scale.to(x_1) if isinstance(initial, GaussianInitial) else 1.0
        return (x_1 / scale).reshape(len(x), -1)

    def _path(self, rows: int) -> _Path:
        """The path of this many rows, worked out once: each row has its condition."""
        rows = rows if self.prior.condition is not None else 0
        if rows not in self._paths:
            program = given(self.prior.program, _condition(self.prior, rows))
            self._paths = {rows: _Path.of(program, self.solver)}
        return self._paths[rows]


class _Path(NamedTuple):
    """The ODE of a flow on the clock of its solver, from noise to data and back, and factors of E[x_0 | x] at t_min."""

    flow: Velocity
    down: ClockedField
    up: ClockedField
    on_x: Any
    on_output: Any

    @staticmethod
    def of(program: Any, solver: Solver) -> _Path:
        flow = Velocity.of(program)
        schedule = as_grid(solver.grid).between(flow.t_max, flow.t_min, flow.process)
        down = flow_field(flow, schedule, solver.steps)
        up = flow_field(flow, reversed_schedule(schedule), solver.steps)
        if flow.denoiser is None:
            return _Path(flow, down, up, 1.0, None)
        at = torch.full((1,), flow.t_min, dtype=torch.float64)
        on_x, on_output = (scalar(value[0]) for value in flow.denoiser.coefficients(at))
        return _Path(flow, down, up, on_x, on_output)

    def begun(self, noise: Tensor) -> Carried:
        """x_1 of noise `(n, *event)`, and the log density of the noise."""
        initial = self.flow.initial
        if isinstance(initial, GaussianInitial):
            return Carried(noise * initial.scale.to(noise), standard_normal(noise))
        return Carried(noise, initial.log_prob(noise))

    def finished(self, x: Tensor) -> Tensor:
        """See `Velocity.finish`."""
        if self.on_output is None:
            return x
        t = torch.full((1,), self.flow.t_min, dtype=x.dtype, device=x.device)
        return times(self.on_x, x) + times(self.on_output, self.flow.output(x, t))


class ProgramMap:
    """x of a program that is run with every site carried from noise; exact.

    Args:
        prior: the law of its site "x".
        solver: of flows among the laws of its sites, as in latent diffusion.

    Raises:
        UnsupportedError: a discrete site, or one that is shared by all rows.
    """

    def __init__(self, prior: Any, solver: Solver) -> None:
        self.prior, self.sites = prior, _SiteMaps(solver)
        with torch.no_grad():
            run = self._run(_ROWS * (1 if prior.condition is None else len(prior.condition)), None)
        self.size, self.num_calls = run.used, 1 + run.num_calls

    def __call__(self, noise: Tensor) -> Carried:
        """See `NoiseMap`."""
        run = self._run(len(noise), noise)
        return Carried(run.values["x"], run.log_prob)

    def inverse(self, x: Tensor) -> Tensor:
        """The noise of x and of the latents that the guide gives for it."""
        batch = self._batch(len(x), {"x": x})
        values = {"x": x} | self._guided(batch)
        into = _IntoNoise(values, self.sites)
        with apart(), validation(False), into:
            self.prior.program.model(self._batch(len(x)))
        return torch.cat(into.noise, 1)

    def _run(self, rows: int, noise: Tensor | None) -> _FromNoise:
        run = _FromNoise(rows, noise, self.sites, like=self.prior.like)
        with apart(), validation(False), run:
            self.prior.program.model(self._batch(rows))
        return run

    def _batch(self, rows: int, data: dict[str, Tensor] | None = None) -> Batch:
        return Batch(data or {}, _condition(self.prior, rows), num_rows=rows)

    def _guided(self, batch: Batch) -> dict[str, Tensor]:
        if not isinstance(self.prior.program, Guided):
            return {}
        with apart(), validation(False), torch.no_grad():
            trace = poutine.trace(self.prior.program.guide).get_trace(batch)
        return {name: node["value"] for name, node in sample_sites(trace).items()}


def _condition(prior: Any, rows: int) -> Tensor | None:
    """The condition of each of the rows."""
    c: Tensor | None = prior.condition
    return None if c is None else c.repeat(rows // len(c), *[1] * (c.ndim - 1))


def standard_normal(noise: Tensor) -> Tensor:
    """log N(noise; 0, I) of each row, `(n,)`.

    >>> standard_normal(torch.zeros(1, 2))
    tensor([-1.8379])
    """
    flat = noise.flatten(1)
    return -0.5 * (flat.square().sum(1) + flat.shape[1] * math.log(2 * math.pi))


# --- programs, site by site -------------------------------------------------------------------------------------


class _FromNoise(Messenger):
    """Runs a program over rows, the value of each site made of its part of the noise `(rows, size)`.

    Without noise every site gets zeros, to find out how much is used.
    """

    def __init__(self, rows: int, noise: Tensor | None, sites: _SiteMaps, like: Tensor) -> None:
        super().__init__()
        self.rows, self.noise, self.sites, self.like = rows, noise, sites, like
        self.used = self.num_calls = 0
        self.values: dict[str, Tensor] = {}
        self.log_prob = (like if noise is None else noise).new_zeros(rows)

    def _pyro_sample(self, msg: Any) -> None:
        if site_is_subsample(msg) or is_record(msg) or msg["is_observed"]:
            return
        site = self.sites.of(msg["name"], msg["fn"], self.rows)
        part = slice(self.used, self.used + site.size)
        noise = self.like.new_zeros(self.rows, site.size) if self.noise is None else self.noise[:, part]
        value, log_prob = site(noise)
        self.used, self.num_calls = part.stop, self.num_calls + site.num_calls
        self.log_prob = self.log_prob + log_prob
        msg["value"], msg["done"] = value.reshape(msg["fn"].shape()), True
        self.values[msg["name"]] = msg["value"]


class _IntoNoise(Messenger):
    """Runs a program with its sites at given values and writes down the noise they are made of."""

    def __init__(self, values: dict[str, Tensor], sites: _SiteMaps) -> None:
        super().__init__()
        self.values, self.sites = values, sites
        self.noise: list[Tensor] = []

    def _pyro_sample(self, msg: Any) -> None:
        if site_is_subsample(msg) or is_record(msg) or msg["is_observed"]:
            return
        if msg["name"] not in self.values:
            raise InputError(
                f"There is no way back to the noise of site {msg['name']!r}: a guide would tell it from x. Start "
                "without init."
            )
        value = self.values[msg["name"]]
        self.noise.append(self.sites.of(msg["name"], msg["fn"], len(value)).inverse(value))
        msg["value"], msg["done"] = value, True


class _SiteMaps:
    """How each site of a program is made of noise; what is known of flows among them is kept from run to run."""

    def __init__(self, solver: Solver) -> None:
        self.solver = solver
        self._flows: dict[str, NoiseMap] = {}

    def of(self, name: str, law: Any, rows: int) -> NoiseMap:
        """The map of one site, of shape `(rows, *shape)`."""
        _check_site(name, law, rows)
        while isinstance(law, Independent):
            law = law.base_dist
        if isinstance(law, (Prior, FlowLaw)):
            return self._flow(name, law)
        return _Gaussian(law) if isinstance(law, _GAUSSIAN) else _Unconstrained(law)

    def _flow(self, name: str, law: Any) -> NoiseMap:
        if law.condition is not None:  # which may be another one each time
            return noise_map(law, self.solver)
        if name not in self._flows:
            self._flows[name] = noise_map(law, self.solver)
        return self._flows[name]


def _check_site(name: str, law: Any, rows: int) -> None:
    if law.support.is_discrete:
        raise UnsupportedError(
            f"Site {name!r} of the prior's program is discrete ({type(law).__name__}): it is no smooth function of "
            "noise. Give the program a continuous likelihood, such as GaussianLikelihood."
        )
    if law.batch_shape[:1] != (rows,):
        raise UnsupportedError(
            f"Site {name!r} of the prior's program has shape {tuple(law.shape())} where it is run over {rows} rows: "
            "one value for all rows would tie the chains together. Draw it once a row, inside of batch.plate()."
        )


class _Gaussian:
    """x = loc + L eps, LL' the covariance.

    Args:
        law: of batch shape `(rows, ...)`.
    """

    num_calls = 0

    def __init__(self, law: Any) -> None:
        self.law, self.shape = law, law.shape()
        self.size = self.shape.numel() // self.shape[0]

    def __call__(self, noise: Tensor) -> Carried:
        law, eps = self.law, noise.reshape(self.shape)
        if isinstance(law, MultivariateNormal):
            scaled = (law._unbroadcasted_scale_tril @ eps[..., None])[..., 0]
        else:
            scaled = law.scale * eps
        return Carried(law.loc + scaled, standard_normal(noise))

    def inverse(self, x: Tensor) -> Tensor:
        white = whitened(self.law, x)
        assert white is not None
        return white[0].reshape(len(x), -1)


class _Unconstrained:
    """x = T(u), u in the unconstrained coordinates of the law's support; the density is that of u.

    Args:
        law: of batch shape `(rows, ...)`.
    """

    num_calls = 0

    def __init__(self, law: Any) -> None:
        self.law, self.transform = law, bijection(law)
        self.shape = self.transform.inverse_shape(law.shape())
        self.size = math.prod(self.shape) // self.shape[0]

    def __call__(self, noise: Tensor) -> Carried:
        u = noise.reshape(self.shape)
        x = self.transform(u)
        terms = (self.law.log_prob(x), self.transform.log_abs_det_jacobian(u, x))
        total = sum((term.reshape(len(x), -1).sum(1) for term in terms), noise.new_zeros(len(x)))
        return Carried(x, total)

    def inverse(self, x: Tensor) -> Tensor:
        return torch.as_tensor(self.transform.inv(x)).reshape(len(x), -1)
