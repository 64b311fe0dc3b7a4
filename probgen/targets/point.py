"""A program at a point of unconstrained space: its log density there, site after site, and the values of its sites.

The latents z of a program lie in supports; z_i = T_i(u_i) with u_i in R^k carries each from unconstrained space. T_i is
taken from the support of site i *as the program reaches it*, so it may depend on the sites before. The density of u is

    log p(u) = log p(z(u), x) + sum_i log |det dT_i/du_i|.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any, Protocol

import pyro
import torch
from pyro.distributions import Delta
from pyro.distributions.util import scale_and_mask
from pyro.poutine.messenger import Messenger
from pyro.poutine.util import site_is_subsample
from torch import Tensor
from torch.distributions import Distribution
from torch.distributions.constraints import Constraint

from probgen.bounds import validation
from probgen.core import InputError, ProbgenError, Target, UnsupportedError, describe
from probgen.randomness import forked_rng
from probgen.targets.bijections import bijection
from probgen.targets.reading import first_line, innermost, precision, with_flat_dtype

Values = dict[str, Tensor]


@dataclass(frozen=True)
class Latent:
    """A continuous latent site and where it stands in the vector of unconstrained coordinates.

    Args:
        name: of the site.
        start, stop: its coordinates.
        unconstrained_shape, shape: of one value, before and after the transform.
        batch_dims: how many of its dimensions on the left are batch dimensions.
        dtype: of its values.
        idle: whether nothing depends on those of its entries that are masked out; they then keep their law, which
            changes nothing else and gives chains something to hold on to.
        free: whether its own law is left out of the density, which is then a function of the rest of the program.
    """

    name: str
    start: int
    stop: int
    unconstrained_shape: tuple[int, ...]
    shape: tuple[int, ...]
    batch_dims: int
    dtype: torch.dtype
    idle: bool = False
    free: bool = False


class AtPoint(Messenger):
    """Runs a program with its latents at T(u), and collects log densities and values site by site.

    Args:
        latents: the layout.
        u: coordinates `(dim,)`, or `(dim, chains)` if `lead` is not None.
        nesting: None for one chain; else how many batch dimensions lie between the chains, on the very left, and the
            events of the sites.
        target: the program, for messages.

    After a run `terms` holds the log density of each site, and of its transform under `jacobian(name)`; `transforms`,
    `values` and `deterministic` what they were; `reached` the last site, also of a run that failed.
    """

    def __init__(
        self, latents: Iterable[Latent], u: Tensor, nesting: int | None = None, target: Target | None = None
    ) -> None:
        super().__init__()
        self.latents = {latent.name: latent for latent in latents}
        self.u, self.nesting, self.target = u, nesting, target
        self.reached = ""

    def __enter__(self) -> Any:
        self.terms: Values = {}
        self.values: Values = {}
        self.deterministic: Values = {}
        self.transforms: dict[str, Any] = {}
        self.missing = set(self.latents)
        return super().__enter__()

    def _pyro_sample(self, msg: Any) -> None:
        name = self.reached = msg["name"]
        if msg["is_observed"] or site_is_subsample(msg) or is_summed_out(msg) or is_record(msg):
            return
        if name not in self.latents:
            raise changed_structure(self.target, f"site {name!r} is new")
        latent = self.latents[name]
        self._check_shape(latent, msg["fn"])
        u = self._coordinates(latent)
        transform = self.transforms[name] = bijection(msg["fn"])
        z = transform(u)
        self.missing.discard(name)
        self.terms[jacobian(name)] = self._total(transform.log_abs_det_jacobian(u, z))
        self.values[name] = z
        msg["value"], msg["done"] = z, True

    def _pyro_post_sample(self, msg: Any) -> None:
        if site_is_subsample(msg):
            return
        if is_record(msg):
            self.deterministic[msg["name"]] = msg["value"]
        latent = self.latents.get(msg["name"])
        if latent is not None and latent.free:
            return
        log_prob = msg["fn"].log_prob(msg["value"], *msg["args"], **msg["kwargs"])
        counted = scale_and_mask(log_prob, msg["scale"], msg["mask"])
        if latent is not None and latent.idle:
            counted = torch.where(torch.as_tensor(msg["mask"]), counted, log_prob)
        self.add(msg["name"], counted)

    def _check_shape(self, latent: Latent, fn: Any) -> None:
        shape = tuple(fn.shape())
        if self.nesting is None and shape != latent.shape:
            raise changed_shape(self.target, latent, shape)

    def add(self, name: str, log_prob: Tensor) -> None:
        """Take the log density of a site into account."""
        self.terms[name] = self._total(log_prob)

    def log_prob(self) -> Tensor:
        """log p(u), `()` or `(chains,)`; `InputError` where a latent was not met."""
        if self.missing:
            raise changed_structure(self.target, f"site {min(self.missing)!r} is gone")
        total = sum(self.terms.values())
        assert isinstance(total, Tensor)
        return total

    def log_jacobian(self) -> Tensor | float:
        """The part of log p(u) that comes from the transforms."""
        return sum(self.terms[jacobian(name)] for name in self.values)

    def _coordinates(self, latent: Latent) -> Tensor:
        u = self.u[latent.start : latent.stop].to(latent.dtype)
        if self.nesting is None:
            return u.reshape(latent.unconstrained_shape)
        padding = (1,) * (self.nesting - latent.batch_dims)
        return u.mT.reshape(-1, *padding, *latent.unconstrained_shape)

    def _total(self, terms: Tensor) -> Tensor:
        """Sum of the terms of each chain; terms without a dimension for chains are the same for all."""
        if self.nesting is None or terms.ndim <= self.nesting:
            return terms.sum()
        return terms.flatten(1).sum(1) if terms.ndim > 1 else terms


def jacobian(name: str) -> str:
    """What the term of a site's transform is called."""
    return f"d{name}/du"


def is_record(msg: Any) -> bool:
    """A site whose value follows from others: deterministic, or drawn from a point mass."""
    point_mass = isinstance(innermost(msg["fn"]), Delta) and not msg["is_observed"]
    return point_mass or bool(msg["infer"].get("_deterministic"))


def is_summed_out(msg: Any) -> bool:
    """A latent site over a finite set, which is summed out and not moved."""
    return bool(msg["infer"].get("enumerate")) or bool(getattr(msg["fn"], "has_enumerate_support", False))


def changed_structure(target: Target | None, what: str) -> InputError:
    """The error for a program that is not the same from run to run."""
    name = "The program" if target is None else describe(target.program)
    return InputError(
        f"{name} changes its structure between runs: {what}. Markov chains need the same latent sites of the same "
        "shapes at every point: make their number a constant, or condition on the choice."
    )


def changed_shape(target: Target | None, latent: Latent, shape: tuple[int, ...]) -> InputError:
    """The error for a latent site that has another shape now."""
    return changed_structure(target, f"site {latent.name!r} had shape {latent.shape} and has {shape}")


class ProgramError(InputError):
    """A program failed while it was run at a point; `site` is the last one it reached."""

    def __init__(self, target: Target, site: str, error: Exception) -> None:
        where = f"after site {site!r}" if site else "before its first site"
        super().__init__(
            f"{describe(target.program)} failed {where}: {first_line(error)} It has to run for all values of its "
            "latents that their supports allow, and did for values drawn from their laws."
        )
        self.site, self.reason = site, first_line(error)


class Follower(Protocol):
    """A messenger that knows the last site it met."""

    reached: str

    def __enter__(self) -> Any: ...

    def __exit__(self, *error: Any) -> None: ...


@contextlib.contextmanager
def following(target: Target, point: Follower) -> Iterator[None]:
    """The program can be run at a point inside the block; what it raises comes out as `ProgramError`."""
    try:
        with validation(False), point:
            yield
    except ProbgenError:
        raise
    except Exception as error:
        raise ProgramError(target, point.reached, error) from error


class FirstPoint(Messenger):
    """Runs a program at u = 0 and writes down the layout of its latents; refuses those that no chain can move.

    Args:
        target: the program.
        dtype: of latents whose laws have none, as improper ones.

    After a run `precise` is the most precise dtype of whatever laws hold or was observed, `laws` those of the latents.
    """

    def __init__(self, target: Target, dtype: torch.dtype) -> None:
        super().__init__()
        self.target, self.default, self.precise = target, dtype, dtype
        self.latents: list[Latent] = []
        self.masks: dict[str, Tensor] = {}
        self.laws: dict[str, Any] = {}
        self.deterministic: dict[str, tuple[int, ...]] = {}
        self.summed_out: list[str] = []
        self.nesting = 0
        self.device = torch.device("cpu")
        self.reached = ""

    def _pyro_sample(self, msg: Any) -> None:
        self.reached = msg["name"]
        if site_is_subsample(msg):
            self._refuse_minibatches(msg)
        elif msg["is_observed"] or is_record(msg):
            return
        elif is_summed_out(msg):
            self.summed_out.append(msg["name"])
        else:
            msg["value"], msg["done"] = self._place(msg), True
            if msg["mask"] is not None and msg["mask"] is not True:
                self.masks[msg["name"]] = torch.as_tensor(msg["mask"])

    def _pyro_post_sample(self, msg: Any) -> None:
        dtypes = [held.dtype for held in _tensors_of(msg["fn"])]
        if msg["is_observed"] and msg["value"].is_floating_point():
            dtypes.append(msg["value"].dtype)
        self.precise = max([self.precise, *dtypes], key=precision)
        frames = (frame.dim for frame in msg["cond_indep_stack"] if frame.vectorized)
        self.nesting = max([self.nesting, len(getattr(msg["fn"], "batch_shape", ())), *(-d for d in frames)])
        if is_record(msg):
            self.deterministic[msg["name"]] = tuple(msg["value"].shape)

    def _refuse_minibatches(self, msg: Any) -> None:
        size, part = msg["fn"].size, msg["fn"].subsample_size
        if part is not None and part < size:
            raise UnsupportedError(
                f"Plate {msg['name']!r} takes {part} of {size} rows at random at every run, so the density is random. "
                "Leave subsample_size out, or use SGLD or ConstantSGD, which are made for minibatches."
            )

    def _place(self, msg: Any) -> Tensor:
        name, fn = msg["name"], msg["fn"]
        self.laws[name] = innermost(fn)
        transform = _bijection_of(name, fn)
        shape = tuple(fn.shape())
        unconstrained = tuple(transform.inverse_shape(shape))
        held = list(_tensors_of(fn))
        dtype = max((tensor.dtype for tensor in held), key=precision, default=self.default)
        self.device = held[0].device if held else self.device
        start = self.latents[-1].stop if self.latents else 0
        stop = start + math.prod(unconstrained)
        self.latents.append(Latent(name, start, stop, unconstrained, shape, len(fn.batch_shape), dtype))
        return transform(torch.zeros(unconstrained, dtype=dtype, device=self.device)).expand(shape)


def first_point(target: Target) -> FirstPoint:
    """The program at u = 0."""

    def run(dtype: torch.dtype) -> FirstPoint:
        first = FirstPoint(target, dtype)
        with forked_rng(0), torch.no_grad(), following(target, first):
            target.model(*target.args)
        return first

    first = with_flat_dtype(target, run)
    return first if first.precise == first.default else run(first.precise)


def _bijection_of(name: str, fn: Any) -> Any:
    """The transform onto the support of a site; `UnsupportedError` where there is none."""
    try:
        transform = bijection(fn)
    except NotImplementedError:
        raise UnsupportedError(
            f"Site {name!r}: {type(fn).__name__} lies in {fn.support}, for which there is no map from "
            "unconstrained space. If it is discrete and its values are finitely many it can be summed out "
            "(infer={'enumerate': 'parallel'}); else observe it, or write it as a function of continuous sites."
        ) from None
    if fn.support.is_discrete:
        raise UnsupportedError(
            f"Site {name!r}: {type(fn).__name__} is discrete with infinitely many values, which chains cannot "
            "move and sums cannot reach. Sum it out by hand, observe it, or use SVI with a guide of your own."
        )
    return transform


def _tensors_of(held: Any) -> Iterator[Tensor]:
    """Floating point tensors that a law holds, those of its base laws, transforms and support included."""
    for value in vars(held).values():
        if isinstance(value, Tensor) and value.is_floating_point():
            yield value
        elif isinstance(value, (Distribution, Constraint)):
            yield from _tensors_of(value)


def conditioned(
    target: Target, data: Mapping[str, Tensor], stacked: bool = False
) -> tuple[Any, tuple[Any, ...]]:
    """The program's model and arguments with other observations in place.

    Args:
        target: the program.
        data: values of the shapes that were observed; none leaves everything as it is.
        stacked: there are chains on their left: then a `Batch` is not told of them, as its rows would be miscounted.
    """
    if not data:
        return target.model, target.args
    if not target.per_row:
        return pyro.condition(target.program, data=dict(data)), target.args
    batch = target.batch
    seen = replace(batch, data={} if stacked else dict(data), num_rows=batch.size)
    return pyro.condition(target.program.model, data=dict(data)), (seen, *target.args[1:])
