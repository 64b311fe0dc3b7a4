"""The contracts: what a program, an objective, an engine, an estimator, a posterior and an estimate are.

A *program* is a joint density p(x, z) written as a Pyro model; its *guide* is q(z | x). *Fitting* minimises an
*objective*. An *engine* draws from a program given what was observed. A *posterior* is those draws with the
statistics of how they were drawn; an *estimate* is a log-likelihood with its error. Nothing here knows a method.
"""

from __future__ import annotations

import contextlib
import difflib
import math
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import MISSING, Field, dataclass, field, fields, is_dataclass, replace
from functools import cache, cached_property
from itertools import repeat
from types import NoneType, UnionType
from typing import (
    Annotated,
    Any,
    ClassVar,
    Literal,
    Protocol,
    Union,
    get_args,
    get_origin,
    get_type_hints,
    runtime_checkable,
)

import torch
from torch import Tensor

Guarantee = Literal["exact", "asymptotic", "discretised", "approximate"]
PosteriorKind = Literal["iid", "mcmc", "weighted", "approximate"]
EstimateKind = Literal["exact", "unbiased", "lower bound", "unnormalised"]


# --- errors -----------------------------------------------------------------------------------------------------


class ProbgenError(Exception):
    """Every error probgen raises on purpose: what happened and where, expected and got, the way out."""


class InputError(ProbgenError):
    """Something given to probgen is not what it must be (data, shapes, counts, site names)."""


class UnsupportedError(ProbgenError):
    """An engine, objective or estimator needs what this program does not offer; the message says which would do."""


class FileError(InputError):
    """A file or folder that cannot be read or written: missing, another's, locked, or the disk is full."""


class DamagedFile(FileError):
    """A file that was cut or changed since it was written, or was never what it is taken for."""


class DamagedFileWarning(UserWarning):
    """A damaged file was passed over for an older one that is whole."""


class NonFiniteWarning(UserWarning):
    """Some draws turned NaN or infinite; they are so in the result, and the others are unaffected."""


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """Closest known name as a sentence, or the list of all known names.

    >>> did_you_mean("w_t", ["z_t", "y"])
    "did you mean 'z_t'?"
    """
    known = list(known)
    close = difflib.get_close_matches(name, known, n=1)
    if close:
        return f"did you mean {close[0]!r}?"
    return f"known: {', '.join(map(repr, known)) or 'none'}"


# --- what may be given ------------------------------------------------------------------------------------------
# An annotation is the contract: `steps: Count`, `eta: Probability`, `metric: MetricKind`. `check_fields` holds settings
# to theirs, `check_arguments` functions, both where a person gives values and never inside a loop.


@dataclass(frozen=True)
class Within:
    """The numbers between two ends, round brackets leaving an end out: `Annotated[float, Within(0, 1, "(]")]`.

    >>> 0.0 in Within(0, 1, "(]"), str(Within(0, 1, "(]")), str(Within(0, ends="(]"))
    (False, 'in (0, 1]', '> 0')
    """

    low: float = -math.inf
    high: float = math.inf
    ends: str = "[]"
    why: str = ""

    def __contains__(self, value: float) -> bool:
        inside = self.low <= value <= self.high
        return inside and not any(
            value == end and bracket in "()"
            for end, bracket in zip((self.low, self.high), self.ends, strict=True)
        )

    def __str__(self) -> str:
        if self.high == math.inf:
            return f">{'=' * (self.ends[0] == '[')} {self.low:,}"
        return f"in {self.ends[0]}{self.low:,}, {self.high:,}{self.ends[1]}"

    def asked_of(self, value: Any) -> str:
        """What to say to a value outside: an end that is there for a reason of its own only to what is beyond it."""
        if not self.why:
            return str(self)
        beyond = isinstance(value, int | float) and not value < self.high
        return f"{self}: {self.why}" if beyond else str(replace(self, high=math.inf))


Count = Annotated[int, Within(1)]
Size = Annotated[int, Within(1, 1_000_000, why="more would not fit memory")]
NonNegativeInt = Annotated[int, Within(0)]
Draws = Annotated[int, Within(1, 100_000_000, why="more would not fit memory")]
Positive = Annotated[float, Within(0, ends="(]")]
NonNegative = Annotated[float, Within(0)]
Fraction = Annotated[float, Within(0, 1, "()")]
Probability = Annotated[float, Within(0, 1)]


def check(name: str, value: Any, annotation: Any) -> None:
    """Raise `InputError` unless `value` is what the annotation says: its type, its range, one of its choices.

    What an annotation cannot say, such as a shape, is checked where it is known. Numbers are finite, True is none of
    them, tensors are real and hold values.

    >>> check("step_size", 0.1, Positive)
    >>> check("step_size", -0.1, Positive)
    Traceback (most recent call last):
    probgen.core.InputError: step_size must be > 0 and finite, got -0.1.
    """
    kind, parts = get_origin(annotation) or annotation, get_args(annotation)
    if kind in (Union, UnionType):
        others = [part for part in parts if part is not NoneType]
        if value is not None and len(others) == 1:
            return check(name, value, others[0])
    if not _fits(value, annotation):
        choices = [choice for part in (annotation, *parts) for choice in _choices(part)]
        if choices and (isinstance(value, str) or kind is Literal):
            known = f"known: {', '.join(map(repr, choices))}"
            close = did_you_mean(value, map(str, choices)) if isinstance(value, str) else known
            raise InputError(f"Unknown {name} {shown(value)}; {close}")
        raise InputError(f"{name} must {_wanted(annotation, value)}, got {shown(value)}.")
    return _check_parts(name, value, kind, parts)


def check_fields(settings: Any) -> None:
    """Hold a dataclass to its annotations; for `__post_init__`."""
    kind: Any = type(settings)
    given = {item.name: getattr(settings, item.name) for item in fields(kind)}
    _check_all(kind.__name__, _annotations(kind), given)


def check_arguments(function: Callable[..., Any], given: Mapping[str, Any], owner: str = "") -> None:
    """Hold a function to its annotations: `check_arguments(sample, locals())` is its first line."""
    _check_all(owner or function.__qualname__.removesuffix(".__init__"), _annotations(function), given)


def check_count(name: str, value: int, minimum: int = 1) -> None:
    """Raise `InputError` unless `value` is an integer of at least `minimum`."""
    check(name, value, Annotated[int, Within(minimum)])


def check_positive(name: str, value: float) -> None:
    """Raise `InputError` unless `value` is a finite number > 0."""
    check(name, value, Positive)


def check_choice(name: str, value: str, known: Iterable[str]) -> None:
    """Raise `InputError` unless `value` is one of the known ones."""
    check(name, value, Literal[*known])


def check_finite(name: str, value: Tensor) -> None:
    """Raise `InputError` if `value` holds NaN or Inf, saying how many and where the first one is."""
    if not value.is_floating_point():
        return
    bad = ~torch.isfinite(value)
    if bool(bad.any()):
        first = tuple(int(i) for i in bad.nonzero()[0])
        raise InputError(
            f"{name} holds {int(bad.sum())} NaN or Inf of {value.numel()} values, the first at index {first}. "
            "Remove those rows, or mask them before fitting."
        )


def check_shape(name: str, value: Any, *shapes: Sequence[int]) -> None:
    """Raise `InputError` unless `value`, what a function of the user gave for one, is a tensor of one of these shapes.

    >>> check_shape("density(mesh, t)", None, (64,))
    Traceback (most recent call last):
    probgen.core.InputError: density(mesh, t) must be a torch.Tensor of real numbers of shape (64,), got None.
    """
    if not (_fits(value, Tensor) and tuple(value.shape) in map(tuple, shapes)):
        wanted = " or ".join(str(tuple(shape)) for shape in shapes)
        raise InputError(f"{name} must {_wanted(Tensor, value)} of shape {wanted}, got {shown(value)}.")


def check_alike(owner: str, tensors: Mapping[str, Tensor]) -> None:
    """Raise `InputError` unless all tensors are finite and of one floating point type on one device."""
    kinds = {name: (value.dtype, value.device) for name, value in tensors.items()}
    if len(set(kinds.values())) > 1 or not next(iter(tensors.values())).is_floating_point():
        told = ", ".join(f"{name} {dtype} on {device}" for name, (dtype, device) in kinds.items())
        raise InputError(f"{owner}: tensors must be of one floating point type on one device, got {told}.")
    for name, value in tensors.items():
        check_finite(f"{owner}: {name}", value)


def check_covariance(name: str, value: Tensor) -> None:
    """Raise `InputError` unless `value`, `(*batch, d, d)`, is finite, symmetric and positive definite."""
    check_finite(name, value)
    smallest = torch.linalg.eigvalsh(value).min().item()
    asymmetry = (value - value.mT).abs().max().item()
    if asymmetry > 1e-5 * value.abs().max().item() or not smallest > 0:
        raise InputError(
            f"{name} must be symmetric and positive definite; the smallest eigenvalue is {smallest:.3g}. Add a little "
            "to the diagonal."
        )


def shown(value: Any) -> str:
    """A value as messages show it: short, tensors and arrays by their shape.

    >>> shown(torch.zeros(3, 2))
    'a torch.float32 Tensor of shape (3, 2) on cpu'
    """
    if isinstance(value, Tensor):
        layout = "" if value.layout is torch.strided else f" {value.layout}"
        return f"a{layout} {value.dtype} Tensor of shape {tuple(value.shape)} on {value.device}"
    if isinstance(value, type):
        return f"the class {value.__name__}"
    if isinstance(getattr(value, "shape", None), tuple):
        return f"{type(value).__name__} of shape {tuple(value.shape)}"
    text = repr(value)
    return text if len(text) <= _SHOWN else f"{type(value).__name__} {text[:_SHOWN]}..."


_SHOWN = 80
_LARGEST_INT = 2**63


def _check_parts(name: str, value: Any, kind: Any, parts: tuple[Any, ...]) -> None:
    """What a union, a sequence or a mapping is made of; one member of a union is enough."""
    if kind in (Union, UnionType):
        *others, last = [part for part in parts if _fits(value, part)]
        for part in others:
            with contextlib.suppress(InputError):
                return check(name, value, part)
        return check(name, value, last)
    if kind in (tuple, list, Sequence, Collection) and parts:
        kinds = parts if kind is tuple and parts[-1] is not Ellipsis else repeat(parts[0])
        for i, (item, part) in enumerate(zip(value, kinds, strict=False)):
            check(f"{name}[{i}]", item, part)
    if kind in (dict, Mapping) and parts:
        for key, item in value.items():
            check(f"key {key!r} of {name}", key, parts[0])
            check(f"{name}[{key!r}]", item, parts[1])
    return None


def _check_all(owner: str, annotations: Mapping[str, Any], given: Mapping[str, Any]) -> None:
    for name, annotation in annotations.items():
        if name in given:
            try:
                check(name, given[name], annotation)
            except InputError as error:
                raise InputError(f"{owner}: {error}") from None


@cache
def _annotations(thing: Any) -> dict[str, Any]:
    """Annotations as types, with bounds; those that only type checkers import are `Any`."""
    unknown: dict[str, Any] = {}
    while True:
        try:
            found = get_type_hints(thing, localns=unknown, include_extras=True)
        except NameError as error:
            unknown[str(error.name)] = Any
        else:
            return {name: value for name, value in found.items() if name != "return"}


def _fits(value: Any, annotation: Any) -> bool:
    kind, parts = get_origin(annotation) or annotation, get_args(annotation)
    if kind is Annotated:
        return _fits(value, parts[0]) and all(value in limit for limit in parts[1:])
    if kind in (Union, UnionType):
        return any(_fits(value, part) for part in parts)
    if kind is Literal:
        return any(type(value) is type(part) and value == part for part in parts)
    if kind is tuple and parts and parts[-1] is not Ellipsis:
        return isinstance(value, tuple) and len(value) == len(parts)
    return _FITS[kind](value) if kind in _FITS else _is_a(value, kind)


_FITS: dict[Any, Callable[[Any], bool]] = {
    Any: lambda _: True,
    int: lambda value: type(value) is int and abs(value) < _LARGEST_INT,
    float: lambda value: _FITS[int](value) or (isinstance(value, float) and abs(value) < math.inf),
    Tensor: lambda value: isinstance(value, Tensor) and not _holds_no_numbers(value),
    Sequence: lambda value: isinstance(value, Sequence) and not _is_one(value),
    Collection: lambda value: isinstance(value, Collection) and not _is_one(value),
    Callable: callable,
}


def _is_a(value: Any, kind: Any) -> bool:
    if getattr(kind, "_is_protocol", False):
        return not isinstance(value, type) and all(hasattr(value, name) for name in _members(kind))
    return not isinstance(kind, type) or isinstance(value, kind)


def _is_one(value: Any) -> bool:
    """Texts and arrays are not taken for collections of what they hold."""
    return isinstance(value, str | bytes) or (hasattr(value, "shape") and not isinstance(value, tuple))


def _holds_no_numbers(value: Tensor) -> bool:
    return value.is_meta or value.is_complex() or value.layout is not torch.strided


def _members(protocol: type) -> list[str]:
    names = {name for base in protocol.__mro__ if base not in (Protocol, object) for name in vars(base)}
    return sorted(name for name in names if not name.startswith("_"))


def _choices(annotation: Any) -> tuple[Any, ...]:
    return get_args(annotation) if get_origin(annotation) is Literal else ()


def _wanted(annotation: Any, value: Any) -> str:
    """What a value must do, in words that follow "must"."""
    kind, parts = get_origin(annotation) or annotation, get_args(annotation)
    if kind is Annotated:
        limit = parts[1].asked_of(value)
        if parts[0] is int:
            return f"be an integer {limit}"
        return f"lie {limit}" if limit.startswith("in") else f"be {limit} and finite"
    if kind in (Union, UnionType):
        return " or ".join(_wanted(part, value) for part in parts).replace(" or be ", " or ")
    if kind is Literal:  # in a union with something else
        return f"be {' or '.join(map(repr, parts))}"
    if kind is NoneType:
        return "be None"
    if kind is Tensor:
        return "be a torch.Tensor of real numbers"
    if kind is Callable:
        return "be a function"
    if kind is tuple and parts and parts[-1] is not Ellipsis:
        return f"be a tuple of {len(parts)}"
    plain = {int: "an integer", float: "a finite number", bool: "True or False", str: "a string"}
    named = getattr(kind, "__name__", str(kind))
    article = "an" if named[0].lower() in "aeiou" else "a"
    return f"be {plain.get(kind, f'{article} {named}')}"


# --- data as programs see it ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Batch:
    """A minibatch: what was observed, at which rows of how many.

    Args:
        data: observed values by site name, each `(size, *event)`.
        condition: what the program is conditioned on without having a law for it, `(size, ...)`, or None.
        index: rows of the full data set, `(size,)` of dtype int64; None means all rows in order.
        total: number of rows of the full data set; 0 means `size`.
        num_rows: number of rows where neither `data` nor `condition` says it (simulation).

    >>> batch = Batch({"y": torch.zeros(2)}, total=10)
    >>> batch.size, batch.total
    (2, 10)
    """

    data: dict[str, Tensor] = field(default_factory=dict)
    condition: Tensor | None = None
    index: Tensor | None = None
    total: NonNegativeInt = 0
    num_rows: NonNegativeInt | None = None

    def __post_init__(self) -> None:
        check_fields(self)
        tensors = dict(self.data) | ({} if self.condition is None else {"condition": self.condition})
        for name, value in tensors.items():
            if value.ndim == 0:
                raise InputError(f"Batch: {name} must be `(rows, ...)`, got one number of shape ().")
        rows = {name: len(value) for name, value in tensors.items()}
        if self.num_rows is not None:
            rows["num_rows"] = self.num_rows
        if len(set(rows.values())) > 1:
            raise InputError(f"data, condition and num_rows must have the same number of rows, got {rows}.")
        size = next(iter(rows.values()), 1)
        object.__setattr__(self, "num_rows", size)
        object.__setattr__(self, "total", self.total or size)

    @property
    def size(self) -> int:
        """Number of rows in this minibatch."""
        assert self.num_rows is not None
        return self.num_rows

    @contextlib.contextmanager
    def plate(self, name: str = "data") -> Iterator[None]:
        """The plate over rows, at dimension -1, each row counted `total / size` times."""
        import pyro

        with pyro.plate(name, self.size, dim=-1), pyro.poutine.scale(scale=self.total / self.size):
            yield


@dataclass(frozen=True)
class DataSets:
    """Several data sets, each to have a posterior of its own, side by side in one run.

    Args:
        values: observed values by site name, each `(num_sets, *shape of one data set)`; a tensor alone is site "x".

    Posteriors then hold draws `(chain, draw, num_sets, ...)`.

    >>> len(DataSets({"y": torch.zeros(100, 8)}))
    100
    """

    values: Mapping[str, Tensor] | Tensor

    def __post_init__(self) -> None:
        check_fields(self)

    def __len__(self) -> int:
        values = self.values if isinstance(self.values, Mapping) else {"x": self.values}
        return len(next(iter(values.values()))) if values else 0


# --- programs and what they can offer ---------------------------------------------------------------------------


@runtime_checkable
class Program(Protocol):
    """A generative program of one datum: a Pyro model over a `Batch`, weights as plain `nn.Parameter`s.

    Any callable Pyro model is accepted by the engines that need no more; this is what probgen's own offer.
    Sites inside `batch.plate()` must accept further batch dimensions to the left.
    """

    def model(self, batch: Batch, /) -> Any:
        """Run the Pyro model; sites are observed from outside, by name."""


@runtime_checkable
class Guided(Program, Protocol):
    """A program with a guide q(z | x)."""

    def guide(self, batch: Batch, /) -> Any:
        """Run the Pyro guide; it reads the observations from `batch.data`."""


@runtime_checkable
class Diffusion(Program, Protocol):
    """A program noised by a process, with E[x_0 | x_t]; score, eps and velocity follow from it."""

    def process(self) -> Any:
        """The noising law, a `probgen.processes.Process`."""

    def denoise(self, x_t: Tensor, t: Tensor, /) -> Tensor:
        """E[x_0 | x_t]: x_t `(batch, *event)`, t `(batch,)` or `(1,)` in [0, 1] -> `(batch, *event)`."""


@runtime_checkable
class Predicting(Diffusion, Protocol):
    """A diffusion whose denoiser is affine in one network call: x0hat = a(t) x_t + b(t) predict(x_t, t)."""

    def predict(self, x_t: Tensor, t: Tensor, /) -> Tensor:
        """The network's own output, `(batch, *event)`."""

    def denoiser_coefficients(self, t: Tensor, /) -> tuple[Tensor, Tensor]:
        """a and b at times t `(n,)`, each `(n,)` or `(n, *event)`."""


@runtime_checkable
class Flow(Program, Protocol):
    """A program that carries the law of noise to that of data along dx/dt = velocity(x, t), t from 1 to 0."""

    def velocity(self, x_t: Tensor, t: Tensor, /) -> Tensor:
        """dx_t/dt: x_t `(batch, *event)`, t `(batch,)` or `(1,)` in `span()` -> `(batch, *event)`."""

    def span(self) -> tuple[float, float]:
        """The earliest and the latest time at which the velocity may be asked for."""

    def initial(self) -> Any:
        """The law at the latest time, a `probgen.dynamics.Initial`."""


@runtime_checkable
class Coupled(Flow, Protocol):
    """A flow fitted by regression on the paths x_t = alpha x_0 + sigma x_1 between coupled pairs (x_0, x_1)."""

    def couple(self, batch: Batch, /) -> Tensor:
        """x_1, the partner of each row of `batch.data["x"]`: `(batch, *event)`."""

    def path(self) -> Any:
        """alpha and sigma of the paths, a `probgen.processes.Process`."""


@runtime_checkable
class Levelled(Diffusion, Protocol):
    """A diffusion whose network knows a few noise levels and nothing between them."""

    def levels(self) -> Tensor:
        """Their times, `(L,)` in [0, 1]."""


@runtime_checkable
class Scored(Diffusion, Protocol):
    """A diffusion that knows its score without dividing by the noise, as oracles do: exact at t = 0 too."""

    def score(self, x_t: Tensor, t: Tensor, /) -> Tensor:
        """grad log p_t(x_t), `(batch, *event)`."""


@runtime_checkable
class Conditional(Program, Protocol):
    """A program that takes a condition c, and of which one may ask for what it is given c."""

    def given(self, condition: Tensor | None, /) -> Any:
        """The program at this condition, one row for each row of x: the same capabilities, the condition filled in.

        Rows of c may be missing (-1 for labels, NaN for arrays; None for all): what is given is then nothing. In
        training mode conditions are dropped at random, so that one network learns both.
        """


def given(program: Any, condition: Tensor | None) -> Any:
    """The program at a condition: itself where there is none."""
    if condition is None:
        return program
    if not isinstance(program, Conditional):
        raise InputError(f"{describe(program)} takes no condition: it has no method given(condition).")
    return program.given(condition)


@dataclass(frozen=True)
class ReverseChain:
    """x_{k-1} = on_x[k] x_k + on_output[k] predict(x_k, t_k) + scale[k] z, rows ordered k = T..1; z ~ N(0, I).

    Args:
        times: t_k in (0, 1], `(T,)`.
        on_x, on_output, scale: `(T,)` or `(T, *event)`, float64.
        start_scale: standard deviation of p(x_T) = N(0, .), `()` or `(*event)`.
    """

    times: Tensor
    on_x: Tensor
    on_output: Tensor
    scale: Tensor
    start_scale: Tensor = field(default_factory=lambda: torch.ones(()))


@runtime_checkable
class Stepwise(Guided, Protocol):
    """A program whose ELBO is a sum of steps, each with one network call (a hierarchical chain).

    Its model and guide take the step of each row as `t`, `(batch,)` integers of `steps()`: the bound then counts that
    one step `weight` times, `(batch,)`. `weight` = 1/probability of having drawn it keeps the bound unbiased; None is
    `len(steps())`, for steps drawn uniformly. With t = None they run the full chain.
    """

    def steps(self) -> range:
        """The steps whose terms need the network."""

    def step_probabilities(self) -> Tensor:
        """How often to draw each of `steps()` so that the bound's gradient varies little: `(len(steps()),)`."""

    def step_term(self, x_0: Tensor, k: Tensor, /) -> Tensor:
        """Nats lost at step k: x_0 `(batch, *event)`, k `(batch,)` in `steps()` -> one-sample estimate `(batch,)`."""

    def end_terms(self, x_0: Tensor, /) -> Mapping[str, Tensor]:
        """Nats lost by the terms known in closed form, by name, each `(batch,)`."""


@runtime_checkable
class Chained(Predicting, Protocol):
    """A diffusion that is itself a chain of Gaussian steps, drawn by ancestral sampling."""

    def reverse_chain(self) -> ReverseChain:
        """The table of the chain's steps."""


@runtime_checkable
class Decoding(Program, Protocol):
    """A program with a deterministic map from latents to data space."""

    def decode(self, z: Tensor, /) -> Tensor:
        """z `(..., latent)` -> the mean of x, `(..., *event)`."""


@runtime_checkable
class Normalised(Protocol):
    """A program whose density is known exactly."""

    def log_prob(self, x: Tensor, /) -> Tensor:
        """log p(x) in nats: x `(batch, *event)` -> `(batch,)`."""


@runtime_checkable
class Energetic(Program, Protocol):
    """A program that is an energy, low where x is likely: log p(x) = -E(x) - log Z, Z unknown."""

    def energy(self, x: Tensor, /) -> Tensor:
        """E(x) in nats: x `(batch, *event)` -> `(batch,)`."""


@runtime_checkable
class Pairwise(Program, Protocol):
    """A Boltzmann machine: units with pairwise couplings, drawn layer by layer given the others."""

    def couplings(self) -> Any:
        """Its energy, temperature included, as `probgen.couplings.Couplings`; site "x" is what data show, flat.

        Where "x" is none of the layers, they are the top of a program that goes on downwards from them.
        """


@runtime_checkable
class ScoreOnly(Program, Protocol):
    """A program of which only the score is known, which may be the gradient of nothing (a network)."""

    def grad_log_prob(self, x: Tensor, /) -> Tensor:
        """The score grad log p(x): x `(batch, *event)` -> `(batch, *event)`."""


@runtime_checkable
class Calibrated(Protocol):
    """A program with constants that are set from data in closed form, as batch-norm statistics are."""

    def calibrate(self, x: Tensor, /) -> None:
        """Set them from x `(n, *event)`; called by `fit` after the last step."""


class Objective(Protocol):
    """What fitting minimises. Bounds on log p(x) say `unit = "nats"`, and are then shown in bits/dim too."""

    def loss(self, program: Any, batch: Batch) -> Tensor:
        """The loss per row of the full data set, a differentiable scalar."""


# --- targets ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Site:
    """One sample site as read from a program: where it stands, its shapes, its plates."""

    name: str
    batch_shape: tuple[int, ...]
    event_shape: tuple[int, ...]
    plates: tuple[str, ...]
    observed: bool
    discrete: bool
    reparametrised: bool
    enumerated: bool


@dataclass(frozen=True)
class Target:
    """A program, its arguments and what was observed: all an engine is given. Made by `probgen.targets.read`.

    Args:
        program: the user's program.
        model, guide: its callables, observations in place (`guide` is None where there is none).
        args: what they are called with.
        data: observed values by site name.
        reader: gives the program's sites when first asked for them.
        per_row: True if rows of `args[0]` (a `Batch`) are independent data of one of probgen's programs.
        sets: the observed values of several data sets, each `(num_sets, ...)`; `data` then holds the first.
    """

    program: Any
    model: Callable[..., Any]
    guide: Callable[..., Any] | None
    args: tuple[Any, ...]
    data: dict[str, Tensor]
    reader: Callable[[Target], dict[str, Site]] = field(repr=False)
    per_row: bool = False
    sets: dict[str, Tensor] = field(default_factory=dict)

    @property
    def num_sets(self) -> int:
        """Data sets side by side, each with a posterior of its own; 0 where there is just the one."""
        return len(next(iter(self.sets.values()))) if self.sets else 0

    @cached_property
    def sites(self) -> dict[str, Site]:
        """Every sample site in program order, read by running the program once, validation on."""
        return self.reader(self)

    @property
    def latents(self) -> dict[str, Site]:
        """The sites that were not observed."""
        return {name: site for name, site in self.sites.items() if not site.observed}

    @property
    def batch(self) -> Batch:
        """The rows the program runs over; `InputError` for a program that takes no `Batch`."""
        if self.args and isinstance(self.args[0], Batch):
            return self.args[0]
        raise InputError(f"{describe(self.program)} takes no Batch as its first argument.")


def describe(program: Any) -> str:
    """The name a message calls a program, engine or estimator by."""
    return getattr(program, "__name__", type(program).__name__)


# --- engines ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Support:
    """Whether a program can be served, and why not. True or False as a condition."""

    ok: bool
    reason: str = ""

    def __bool__(self) -> bool:
        return self.ok


def _short(value: Any) -> str:
    return getattr(value, "__name__", None) or (str(value) if isinstance(value, Method) else repr(value))


def _is_changed(method: Any, item: Field[Any]) -> bool:
    default = item.default if item.default_factory is MISSING else item.default_factory()
    return bool(getattr(method, item.name) != default)


class Method:
    """What engines and evidence estimators share: what they need from a program and say of themselves."""

    needs: ClassVar[tuple[type, ...]] = ()
    offers: ClassVar[str]
    gives_up: ClassVar[str]
    paper: ClassVar[str]

    def __post_init__(self) -> None:
        check_fields(self)

    def __str__(self) -> str:
        """The name with the settings that are not the defaults, as headings show it."""
        settings: tuple[Field[Any], ...] = fields(self) if is_dataclass(self) else ()
        changed = [
            f"{item.name}={_short(getattr(self, item.name))}" for item in settings if _is_changed(self, item)
        ]
        return f"{type(self).__name__}({', '.join(changed)})" if changed else type(self).__name__

    def supports(self, program: Any) -> Support:
        """Whether `program` offers what this method needs; the reason names what is missing."""
        for capability in self.needs:
            if not isinstance(program, capability):
                wanted = (capability.__doc__ or "").split(".")[0].split("\n")[0]
                return Support(
                    False, f"it needs {capability.__name__} programs ({wanted[0].lower()}{wanted[1:]})"
                )
        return (
            process_support(program)
            if any(issubclass(need, Diffusion) for need in self.needs)
            else Support(True)
        )


def process_support(program: Any) -> Support:
    """A program may have a process for some of its settings only: then `process()` says why not for these."""
    try:
        program.process()
    except UnsupportedError as error:
        return Support(False, str(error))
    return Support(True)


class Engine(Method):
    """Draws from a program given what was observed. Subclasses are frozen dataclasses of a few hyper-parameters.

    Class attributes: `needs` (capabilities), `conditions` (can it take observations?), `completes` (does it draw what
    is NaN in them?), `data_sets` (several side by side?), `kind`, `guarantee` of its draws, `default_chains`, and for
    `probgen list`: `offers`, `gives_up`, `paper`.
    """

    kind: ClassVar[PosteriorKind]
    guarantee: ClassVar[Guarantee]
    conditions: ClassVar[bool] = False
    completes: ClassVar[bool] = False
    data_sets: ClassVar[bool] = False
    default_chains: ClassVar[int] = 1
    shares: ClassVar[Literal["draws", "chains"] | None] = "chains"
    """What several devices divide among them; None where the whole is needed at once."""
    numbered: ClassVar[bool] = False
    """Whether `run` takes `first`, and the share from the i-th on has the noise it has in the whole. If not, each
    share has a seed of its own: other draws of the same law."""

    def supports(self, program: Any) -> Support:
        """As for every method; engines of any program still cannot serve units that are on or off."""
        if not self.needs and isinstance(program, Pairwise) and not isinstance(program, Energetic):
            return Support(False, "its units are on or off, and no pass forwards draws them")
        return super().supports(program)

    def run(
        self,
        target: Target,
        *,
        num_draws: int,
        num_chains: int,
        seed: int,
        init: Posterior | None = None,
        state: Any = None,
        progress: bool = True,
    ) -> Posterior:
        """Draw `num_draws` times in each of `num_chains` independent replicates."""
        raise NotImplementedError


class Estimator(Method):
    """Estimates log p(x) of each datum, with its error. Subclasses are frozen dataclasses."""

    def estimate(self, target: Target, *, seed: int, progress: bool = True) -> Estimate:
        """The estimate for the rows of `target.batch`; `progress` shows a live line on the terminal."""
        raise NotImplementedError


# --- results ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Cost:
    """What was paid: network calls (or densities), gradients, seconds; warm-up or fitting, and preparation, apart."""

    network_calls: int = 0
    gradients: int = 0
    seconds: float = 0.0
    warmup_gradients: int = 0
    warmup_seconds: float = 0.0
    compile_seconds: float = 0.0

    def __str__(self) -> str:
        parts = [f"{self.seconds:.2f} s"]
        parts += [f"{self.network_calls:,} network calls"] * bool(self.network_calls)
        parts += [f"{self.gradients:,} gradients"] * bool(self.gradients)
        parts += [f"warm-up {self.warmup_seconds:.2f} s, {self.warmup_gradients:,} gradients"] * bool(
            self.warmup_seconds or self.warmup_gradients
        )
        parts += [f"preparation {self.compile_seconds:.2f} s"] * bool(self.compile_seconds)
        return ", ".join(parts)


MEANINGS: dict[str, str] = {
    "iid": "independent draws: errors follow from their number",
    "mcmc": "correlated draws of Markov chains: judge them by R-hat and effective sample size (`summary`)",
    "weighted": "draws resampled from weighted particles: errors come from independent runs",
    "approximate": "independent draws of an approximation: more draws do not bring them closer to the posterior",
}
GUARANTEES: dict[str, str] = {
    "exact": "the law is exact",
    "asymptotic": "exact as the number of draws grows",
    "discretised": "exact as steps grow finer",
    "approximate": "of an approximation, which more draws do not mend",
}


@dataclass
class Posterior:
    """Draws with the statistics of how they were drawn.

    Args:
        draws: per site `(chain, draw, *batch, *event)`, constrained, equally weighted.
        kind, guarantee, engine, cost: what the draws are, and what they cost.
        dims, coords: names of the dimensions after (chain, draw), from the program's plates.
        stats: per-draw statistics `(chain, draw)`; run_stats: per-replicate statistics `(chain,)`; data sets last.
        evidence: log p(data) where the engine gives it.
        state: the engine's own continuation.
        target: what was conditioned; diagnostics rerun it.
    """

    draws: dict[str, Tensor]
    kind: PosteriorKind
    guarantee: Guarantee
    engine: str
    cost: Cost
    dims: dict[str, tuple[str, ...]] = field(default_factory=dict)
    coords: dict[str, Any] = field(default_factory=dict)
    stats: dict[str, Tensor] = field(default_factory=dict)
    run_stats: dict[str, Tensor] = field(default_factory=dict)
    evidence: Estimate | None = None
    state: Any = None
    target: Target | None = field(default=None, repr=False)

    def __post_init__(self) -> None:
        check_fields(self)
        shapes = {name: tuple(value.shape) for name, value in self.draws.items()}
        if (
            not shapes
            or len({shape[:2] for shape in shapes.values()}) > 1
            or min(map(len, shapes.values())) < 2
        ):
            raise InputError(
                f"Posterior: draws must be `(chain, draw, ...)`, alike for every site, got {shapes}."
            )

    def __getitem__(self, site: str) -> Tensor:
        if site not in self.draws:
            raise InputError(f"This posterior has no site {site!r}; {did_you_mean(site, self.draws)}")
        return self.draws[site]

    @property
    def num_chains(self) -> int:
        """Number of independent replicates."""
        return next(iter(self.draws.values())).shape[0]

    @property
    def num_draws(self) -> int:
        """Draws in each replicate."""
        return next(iter(self.draws.values())).shape[1]

    def flat(self, site: str) -> Tensor:
        """All draws of a site, replicates joined: `(chain * draw, *batch, *event)`."""
        return self[site].flatten(0, 1)

    def __str__(self) -> str:
        lines = [
            f"{self.num_chains} x {self.num_draws:,} draws by {self.engine}: {MEANINGS[self.kind]}.",
            f"Guarantee: {self.guarantee} ({GUARANTEES[self.guarantee]}).",
            f"Cost: {self.cost}.",
        ]
        for name, value in self.draws.items():
            shape = " x ".join(map(str, value.shape[2:])) or "scalar"
            if value.is_floating_point():
                lines.append(
                    f"  {name}: {shape}, mean {value.mean():.4g}, sd {value.std():.4g} over all entries"
                )
            else:
                lines.append(f"  {name}: {shape}, values {int(value.min())}..{int(value.max())}")
        divergences = self.stats.get("diverging")
        if divergences is not None and int(divergences.sum()):
            count, total = int(divergences.sum()), divergences.numel()
            lines.append(f"{count:,} of {total:,} transitions diverged ({count / total:.2g}): see `summary`.")
        return "\n".join(lines)


@dataclass(frozen=True)
class Terms:
    """An estimate split into its terms, in nats averaged over the data: `value[i]` +- `standard_error[i]`."""

    names: tuple[str, ...]
    value: Tensor
    standard_error: Tensor


@dataclass(frozen=True)
class Estimate:
    """A log-likelihood per datum with its error and everything needed to compare it with another.

    Args:
        value: nats, `(n,)`.
        standard_error: Monte Carlo error of each value, nats, `(n,)`; zero where exact.
        kind: what the value is.
        event_size: d, number of coordinates of one datum.
        trusted, reason: False with the reason when the estimate's own diagnostics fail.
        levels: K where x is K integer levels, uniformly dequantised and scaled affinely to [-1, 1]; else None.
        terms: the split into terms, where the estimator has one.
        diagnostics: the estimator's own per-datum diagnostics, each `(n,)`.
        cost: what was paid.
        solver_error: what a solver may be off by, nats, `(n,)`; None where none is involved.
        convention: what exactly the value is the log density of, in words.
        shared_error: what of `standard_error` the data have in common, as that of log Z, nats, `(n,)`; None is nothing.

    >>> e = Estimate(torch.tensor([-1.0, -3.0]), torch.zeros(2), "exact", event_size=2)
    >>> print(e)
    log p(x): -2 +- 1 nats a datum (2 data; exact; Monte Carlo error 0)
    """

    value: Tensor
    standard_error: Tensor
    kind: EstimateKind
    event_size: NonNegativeInt
    trusted: bool = True
    reason: str = ""
    levels: Annotated[int, Within(2)] | None = None
    terms: Terms | None = None
    diagnostics: Mapping[str, Tensor] = field(default_factory=dict)
    cost: Cost = Cost()
    solver_error: Tensor | None = None
    convention: str = ""
    shared_error: Tensor | None = None

    def __post_init__(self) -> None:
        check_fields(self)
        if self.value.ndim != 1 or not len(self.value) or self.standard_error.shape != self.value.shape:
            raise InputError(
                "Estimate: value and standard_error must be `(n,)`, one a datum, got shapes "
                f"{tuple(self.value.shape)} and {tuple(self.standard_error.shape)}."
            )
        if self.shared_error is not None:
            check_shape("Estimate: shared_error", self.shared_error, self.value.shape)

    @property
    def mean(self) -> float:
        """Average over the data, nats."""
        return float(self.value.double().mean())

    @property
    def mean_error(self) -> float:
        """Standard error of `mean` as an estimate for the population: spread over data, Monte Carlo error included."""
        n = self.value.numel()
        if n == 1:
            return float(self.standard_error[0])
        return math.hypot(float(self.value.double().std() / math.sqrt(n)), self._shared)

    @property
    def monte_carlo_error(self) -> float:
        """Standard error of `mean` for these very data: Monte Carlo error alone."""
        own = self.standard_error.double().square()
        if self.shared_error is not None:
            own = (own - self.shared_error.double().square()).clamp_min(0)
        return math.hypot(float(own.sum().sqrt() / self.value.numel()), self._shared)

    @property
    def _shared(self) -> float:
        """What the errors of all data have in common does not average out."""
        return 0.0 if self.shared_error is None else float(self.shared_error.double().mean())

    def bits_per_dim(self) -> tuple[float, float]:
        """Mean bits/dim and its standard error: -(log p(x) + d log(2/K)) / (d log 2), K levels scaled to [-1, 1]."""
        if self.levels is None:
            raise InputError(
                "bits/dim need the number of integer levels behind the data: call evidence(..., levels=K), "
                "or pass a probgen.data.Quantised data set. For continuous data report nats."
            )
        unit = self.event_size * math.log(2)
        return -(self.mean + self.event_size * math.log(2 / self.levels)) / unit, self.mean_error / unit

    def __str__(self) -> str:
        sign = {"lower bound": ">=", "unnormalised": "+ const ="}.get(self.kind, ":")
        text = (
            f"log p(x){'' if sign == ':' else ' '}{sign} {self.mean:.5g} +- {self.mean_error:.2g} nats a datum "
            f"({self.value.numel()} data; {self.kind}; Monte Carlo error {self.monte_carlo_error:.2g}"
        )
        if self.solver_error is not None:
            text += f"; solver error {self.solver_error.double().mean():.2g}"
        text += ")"
        if self.levels is not None:
            bits, error = self.bits_per_dim()
            text += f"\n{bits:.4f} +- {error:.4f} bits/dim ({self.levels} levels, uniform dequantisation to [-1, 1])"
        text += f"\nConvention: {self.convention}" if self.convention else ""
        return text if self.trusted else f"{text}\nDo not trust it: {self.reason}"
