"""Programs with their observations: read once, with validation on, then handed to engines and estimators."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from typing import Any, TypeVar

import pyro
import torch
from pyro import poutine
from pyro.distributions import ImproperUniform
from pyro.poutine.messenger import Messenger
from torch import Tensor, nn

from probgen.bounds import sample_sites, validation
from probgen.core import (
    Batch,
    DataSets,
    InputError,
    ProbgenError,
    Program,
    Site,
    Stepwise,
    Target,
    check,
    check_arguments,
    check_finite,
    describe,
    did_you_mean,
)
from probgen.randomness import forked_rng
from probgen.targets.bijections import bijection
from probgen.targets.observing import Observing

Result = TypeVar("Result")


class Pair(nn.Module):
    """A Pyro model and a guide, both functions of a `Batch`, as one program.

    Args:
        model, guide: callables of one `Batch`; weights are found where these are nn.Modules, or in Pyro's store.

    >>> import pyro.distributions as dist
    >>> def model(batch):
    ...     w = pyro.sample("w", dist.Normal(0.0, 1.0))
    ...     with batch.plate():
    ...         pyro.sample("y", dist.Normal(w, 1.0))
    >>> Pair(model).model is model
    True
    """

    def __init__(self, model: Callable[..., Any], guide: Callable[..., Any] | None = None) -> None:
        check_arguments(Pair.__init__, locals())
        super().__init__()
        self.model = model
        self.guide = guide


def named(data: Any, missing: bool = False) -> dict[str, Tensor]:
    """Observations by site name: a mapping as it is, a bare tensor as site "x"; all finite, or NaN if `missing`."""
    if data is None:
        return {}
    by_name = dict(data) if isinstance(data, Mapping) else {"x": data}
    check("data", by_name, Mapping[str, Any])
    for name, value in by_name.items():
        if not isinstance(value, Tensor):
            raise InputError(
                f"Site {name!r}: expected a torch.Tensor, got {type(value).__name__}; use torch.as_tensor."
            )
        check(f"Site {name!r}", value, Tensor)
        check_finite(f"Site {name!r}", value.nan_to_num(nan=0.0) if missing else value)
    return by_name


def read(
    program: Any,
    data: Any = None,
    args: tuple[Any, ...] = (),
    *,
    num_rows: int | None = None,
    missing: bool = False,
) -> Target:
    """Put observations into a program.

    Args:
        program: a `Program` (called with a `Batch`) or any Pyro function (called with `args`).
        data: observed values by site name; for a `Program` each has one row a datum. A tensor alone is site "x".
        args: the function's arguments; for a `Program` `(condition,)` or `(batch,)`.
        num_rows: rows to simulate where neither data nor condition says it.
        missing: let NaN stand for values that were not seen.

    Raises `InputError` for values that are not finite or do not fit their site, and for sites that do not exist.
    """
    if isinstance(data, DataSets):
        return _read_sets(program, named(data.values), args)
    observed = named(data, missing)
    if isinstance(program, Program):
        check_event(program, observed)
        args = (_batch(observed, args, num_rows),)
        model, guide = program.model, getattr(program, "guide", None)
    elif callable(program):
        model, guide = program, None
    else:
        raise InputError(
            f"A program is a Pyro function or has a method model(batch), got {type(program).__name__}."
        )
    if observed:
        model = Observing(observed)(model)
    target = Target(program, model, guide, args, observed, read_sites, per_row=isinstance(program, Program))
    if observed:
        _check_names(target)
    return target


def _read_sets(program: Any, stacked: dict[str, Tensor], args: tuple[Any, ...]) -> Target:
    """Read the program with the first data set; the others must be like it."""
    counts = {name: len(value) if value.ndim else 0 for name, value in stacked.items()}
    if not counts or len(set(counts.values())) > 1 or 0 in counts.values():
        raise InputError(f"DataSets need the same number of data sets, >= 1, at every site; got {counts}.")
    first = read(program, {name: value[0] for name, value in stacked.items()}, args)
    target = replace(first, sets=stacked)
    _ = target.sites  # checks the values of all sets
    return target


def _batch(observed: dict[str, Tensor], args: tuple[Any, ...], num_rows: int | None) -> Batch:
    if args and isinstance(args[0], Batch):
        return args[0]
    if len(args) > 1:
        raise InputError(f"A program of a Batch takes args=(condition,), got {len(args)} arguments.")
    for name, value in observed.items():
        if value.ndim == 0:
            raise InputError(f"Site {name!r}: expected one row a datum, got a scalar; pass value[None].")
    condition = args[0] if args else None
    return Batch(observed, condition, num_rows=num_rows if not observed and condition is None else None)


def check_event(program: Any, data: Mapping[str, Tensor]) -> None:
    """Raise `InputError` where site "x" does not hold data of the program's `event_shape`."""
    event = getattr(program, "event_shape", None)
    x = data.get("x")
    if event is None or x is None:
        return
    if x.shape[1:] != torch.Size(event):
        hint = (
            "add the row dimension: x[None]"
            if x.shape == torch.Size(event)
            else "reshape the data or the program"
        )
        raise InputError(
            f"Site 'x' of {describe(program)}: expected shape (n, {', '.join(map(str, event))}), "
            f"got {tuple(x.shape)}; {hint}."
        )
    if len(x) == 0:
        raise InputError(f"Site 'x' of {describe(program)}: no data (0 rows).")
    if not x.is_floating_point():
        raise InputError(
            f"Site 'x' of {describe(program)}: expected floating point data, got {x.dtype} in "
            f"{int(x.min())}..{int(x.max())}; scale it (probgen.data.Quantised dequantises integer levels)."
        )


def _check_names(target: Target) -> None:
    # A chain of T steps would need T network calls to be read; only its data can be observed.
    known = ["x"] if isinstance(target.program, Stepwise) else list(target.sites)
    for name in target.data:
        if name not in known:
            raise InputError(f"{describe(target.program)} has no site {name!r}; {did_you_mean(name, known)}")


def read_sites(target: Target) -> dict[str, Site]:
    """Run the program once, validation on, and describe its sample sites."""

    def run(dtype: torch.dtype) -> Any:
        start = FlatStart(dtype)
        try:
            return poutine.trace(start(target.model)).get_trace(*target.args)
        except ProbgenError:
            raise
        except Exception as error:
            raise InputError(
                f"Running {describe(target.program)} on the given data and arguments failed: {first_line(error)} "
                f"Check shapes and values of data and args against the program{start.reached}."
            ) from error

    with forked_rng(0), torch.no_grad(), restored_store(), validation(True):
        trace = with_flat_dtype(target, run)
    return {
        name: _site(name, node, target.sets.get(name))
        for name, node in sample_sites(trace).items()
        if not _is_record(node)
    }


def first_line(error: Exception) -> str:
    """An error of others in one line.

    >>> first_line(ValueError("expected 2, got 3"))
    'ValueError: expected 2, got 3'
    """
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0][:200]}" if lines else type(error).__name__


def with_flat_dtype(target: Target, run: Callable[[torch.dtype], Result]) -> Result:
    """`run` with a dtype for sites with an improper law, which have none of their own.

    It is the most precise of torch's default, observations and arguments, and float64 where the program then multiplies
    it with float64 matrices.
    """
    values = [
        torch.zeros(()),
        *target.data.values(),
        *(arg for arg in target.args if isinstance(arg, Tensor)),
    ]
    dtype = max((value.dtype for value in values if value.is_floating_point()), key=precision)
    try:
        return run(dtype)
    except (RuntimeError, ProbgenError) as error:
        if dtype == torch.float64 or "dtype" not in str(error):
            raise
        return run(torch.float64)


def precision(dtype: torch.dtype) -> int:
    """Bits of a floating dtype, to compare dtypes by."""
    return torch.finfo(dtype).bits


def innermost(law: Any) -> Any:
    """The law inside of what expands, masks, transforms it or declares its dimensions."""
    while hasattr(law, "base_dist"):
        law = law.base_dist
    return law


class FlatStart(Messenger):
    """Gives sites that cannot be drawn from, or only at a price, a value inside their support.

    These are sites with an improper law, and those whose law has a `stand_in()`: reading never draws from a `Prior`.
    """

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.dtype = dtype
        self.reached = ""

    def _pyro_sample(self, msg: Any) -> None:
        self.reached = f" after site {msg['name']!r}"
        if msg["is_observed"]:
            return
        law = innermost(msg["fn"])
        if hasattr(law, "stand_in"):
            value = law.stand_in().expand(msg["fn"].shape())
            improper = isinstance(law, ImproperUniform)
            msg["value"], msg["done"] = value.to(self.dtype) if improper else value, True
        elif isinstance(law, ImproperUniform):
            transform = bijection(msg["fn"])
            shape = msg["fn"].shape()
            msg["value"] = transform(torch.zeros(transform.inverse_shape(shape), dtype=self.dtype)).expand(
                shape
            )
            msg["done"] = True


def _is_record(node: Mapping[str, Any]) -> bool:
    """A factor or a deterministic value: a site of Pyro's that is no random variable."""
    return type(node["fn"]).__name__ == "Unit" or bool(node["infer"].get("_deterministic"))


def _site(name: str, node: Mapping[str, Any], sets: Tensor | None = None) -> Site:
    fn = node["fn"]
    site = Site(
        name,
        tuple(fn.batch_shape),
        tuple(fn.event_shape),
        tuple(f.name for f in sorted(node["cond_indep_stack"], key=lambda f: f.dim or 0) if f.vectorized),
        observed=node["is_observed"],
        discrete=fn.has_enumerate_support or not node["value"].is_floating_point(),
        reparametrised=fn.has_rsample,
        enumerated=bool(node["infer"].get("enumerate")),
    )
    if site.observed:
        expected = site.batch_shape + site.event_shape
        if tuple(node["value"].shape) != expected:
            raise InputError(f"Site {name!r}: expected shape {expected}, got {tuple(node['value'].shape)}.")
        _check_values(site, fn, node["value"] if sets is None else sets)
    return site


def _check_values(site: Site, fn: Any, value: Tensor) -> None:
    with contextlib.suppress(NotImplementedError):
        value = value.nan_to_num(nan=0.0)  # not seen, or refused before
        if not bool(fn.support.check(value).all()):
            raise InputError(
                f"Site {site.name!r}: values {value.min():.4g}..{value.max():.4g} of {value.dtype} leave the support "
                f"of {type(fn).__name__} ({fn.support}). Transform the data or change the likelihood."
            )


def dims(target: Target) -> dict[str, tuple[str, ...]]:
    """Names of the dimensions of every latent after (chain, draw): its plates, then its event dimensions."""
    return {name: site_dims(site) for name, site in target.latents.items()}


def site_dims(site: Site) -> tuple[str, ...]:
    """Plates where the batch dimensions are plates, and a name of its own for every other dimension.

    >>> site_dims(Site("z", (5,), (2,), ("data",), False, False, True, False))
    ('data', 'z_dim_0')
    """
    named_plates = site.plates if len(site.plates) == len(site.batch_shape) else ()
    rest = len(site.batch_shape) + len(site.event_shape) - len(named_plates)
    return named_plates + tuple(f"{site.name}_dim_{i}" for i in range(rest))


@contextlib.contextmanager
def restored_store() -> Iterator[None]:
    """Pyro's parameter store can be used, and fitted, inside the block, and is as it was found afterwards."""
    store = pyro.get_param_store()
    state = store.get_state()
    # Optimisers write in place: the block works on copies.
    copies = {
        name: value.detach().clone().requires_grad_(value.requires_grad)
        for name, value in state["params"].items()
    }
    with store.scope({"params": copies, "constraints": state["constraints"]}):
        yield


@contextlib.contextmanager
def frozen(program: Any) -> Iterator[None]:
    """Weights need no gradients and layers are in evaluation mode inside the block; as found afterwards."""
    if not isinstance(program, nn.Module):
        yield
        return
    modules = [(module, module.training) for module in program.modules()]
    parameters = [(parameter, parameter.requires_grad) for parameter in program.parameters()]
    try:
        program.eval()
        program.requires_grad_(False)
        yield
    finally:
        for module, training in modules:
            module.training = training
        for parameter, requires_grad in parameters:
            parameter.requires_grad_(requires_grad)
