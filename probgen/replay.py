"""A program run again under given draws: its data predicted, its data's log-likelihood row by row, or simulated.

Runs are batched by `torch.func.vmap` over the draws; programs it cannot follow (control flow on values, calls it has
no rule for) are run once a draw, with the same law.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import pyro
import torch
from pyro import poutine
from pyro.distributions import ImproperUniform
from torch import Tensor

from probgen.bounds import sample_sites, validation
from probgen.core import InputError, Posterior, Target, describe
from probgen.priors.prior import Prior
from probgen.randomness import forked_rng
from probgen.targets import frozen, read, restored_store
from probgen.targets.reading import FlatStart, innermost

Node = Mapping[str, Any]
Pick = Callable[[dict[str, Node]], dict[str, Tensor]]

_DRAWS_AT_ONCE = 64  # bounds the memory that a batch of runs holds


def observed(target: Target) -> list[str]:
    """Every observed site, whether given as data or by the program's own `obs=`."""
    if target.per_row:
        return list(target.data)
    return [name for name, site in target.sites.items() if site.observed]


def observations(target: Target) -> dict[str, Tensor]:
    """The value of every observed site."""
    if target.per_row:
        return dict(target.data)
    nodes = _once(target)
    return {name: nodes[name]["value"] for name in observed(target)}


def improper(target: Target) -> list[str]:
    """Sites whose law is improper: nothing can simulate them."""
    nodes = _once(target)
    return [name for name, node in nodes.items() if isinstance(innermost(node["fn"]), ImproperUniform)]


def one_at_a_time(posterior: Posterior) -> str:
    """Why the program cannot be run again under these draws, where they are of several data sets; "" if it can."""
    count = 0 if posterior.target is None else posterior.target.num_sets
    return (
        f"it holds draws of {count} data sets side by side, and the program is run again for one at a time"
        if count
        else ""
    )


def unrecorded(posterior: Posterior, *, summed_out: bool) -> list[str]:
    """Latent sites of the target that have no draws; those summed out by enumeration only where asked for."""
    latents = require_target(posterior).latents
    return [
        name
        for name, site in latents.items()
        if name not in posterior.draws and (summed_out or not site.enumerated)
    ]


def log_likelihood(posterior: Posterior) -> dict[str, Tensor]:
    """log p(row | draw) of each row of every observed site, in nats: `(chain, draw, *batch)`.

    Masks are honoured (a masked row counts 0), scales of plates and subsamples are not: one row, one term.

    Raises `InputError` where nothing was observed, a latent site has no draws (it was summed out), or the draws are of
    several data sets.
    """
    target = require_target(posterior)
    names = _require_observed(target)
    _require_draws(posterior, summed_out=True)

    def pick(nodes: dict[str, Node]) -> dict[str, Tensor]:
        return {name: _row_log_prob(node) for name, node in nodes.items() if name in names}

    held = {site: posterior.flat(site) for site in _held(posterior)}
    flat = _over_draws(target, target.model, held, pick, seed=0)
    return {name: value.unflatten(0, (posterior.num_chains, -1)) for name, value in flat.items()}


def predictions(
    posterior: Posterior, *, args: tuple[Any, ...] = (), num_draws: int | None = None, seed: int = 0
) -> dict[str, Tensor]:
    """x_new ~ p(x | z), z the draws: every observed site freed, every latent held: `(chain, draw, *batch, *event)`.

    Args:
        posterior: whose draws are held; it must know its target.
        args: other arguments for the program (new inputs); none means those of the posterior.
        num_draws: per chain, evenly spaced among those there are; None means all.
        seed: of the predicted data.

    Raises `InputError` where nothing was observed, a latent has no draws, draws do not fit the new arguments, or are of
    several data sets.
    """
    old = require_target(posterior)
    target = read(old.program, None, args) if args else old
    names = _require_observed(old)
    _require_draws(posterior, summed_out=False)
    if undrawn := sorted(names & set(improper(old))):
        raise InputError(
            f"Nothing can predict {', '.join(map(repr, undrawn))}: {describe(old.program)} gives it no law of its own, "
            "but an energy together with other sites. Draw all of them, infer(program, engine)."
        )
    kept = _evenly_spaced(posterior.num_draws, num_draws)
    held = {site: posterior[site][:, kept].flatten(0, 1) for site in _held(posterior)}
    if args:
        _check_fit(target, held)
    flat = _over_draws(target, poutine.uncondition(target.model), held, _values(names), seed=seed)
    return {name: value.unflatten(0, (posterior.num_chains, -1)) for name, value in flat.items()}


def simulations(target: Target, *, num_draws: int, seed: int = 0) -> dict[str, Tensor]:
    """(z, x) ~ p(z, x), observations freed: every site that is sampled, `(num_draws, *batch, *event)`.

    Raises `InputError` where a site is improper.
    """
    if names := improper(target):
        raise InputError(
            f"{describe(target.program)} cannot be simulated: {', '.join(map(repr, names))} has an improper law. Give "
            "it a proper prior, or observe it."
        )
    held = {"": torch.arange(num_draws)}  # fixes no site; it tells how many runs
    if priors := _fitted_laws(target):
        with _quietly(target, seed):
            held |= {name: law.sample((num_draws,)) for name, law in priors.items()}
            seed = int(torch.randint(2**62, ()))  # the other sites must not be drawn from the same noise
    return _over_draws(target, poutine.uncondition(target.model), held, _values(None), seed=seed)


def _fitted_laws(target: Target) -> dict[str, Any]:
    """Laws of fitted programs that nothing else in the program decides: all draws of them take one run of a network."""
    laws = {name: node["fn"] for name, node in _once(target).items() if not node["is_observed"]}
    return {name: law for name, law in laws.items() if isinstance(law, Prior) and law.condition is None}


def require_target(posterior: Posterior) -> Target:
    """The posterior's target; `InputError` where there is none to run again."""
    if posterior.target is None:
        raise InputError(
            f"This posterior ({posterior.engine}) does not know its program, so it cannot be run again. "
            "Draw it with probgen.infer, which records the target."
        )
    return posterior.target


def _require_observed(target: Target) -> set[str]:
    """The observed sites; `InputError` where there are none."""
    names = set(observed(target))
    if not names:
        raise InputError(
            f"Nothing was observed of {describe(target.program)}: there is no data to predict or to score. "
            "Pass data= to probgen.infer, or simulate with predict(program, num_draws=...)."
        )
    return names


def _held(posterior: Posterior) -> list[str]:
    """The latent sites with draws: what the program computes from them (deterministic sites) it computes again."""
    latents = require_target(posterior).latents
    return [name for name in posterior.draws if name in latents]


def _require_draws(posterior: Posterior, *, summed_out: bool) -> None:
    if reason := one_at_a_time(posterior):
        raise InputError(
            f"This posterior cannot be replayed: {reason}. Infer for the data set in question alone."
        )
    missing = unrecorded(posterior, summed_out=summed_out)
    if missing:
        raise InputError(
            f"Latent sites without draws: {', '.join(map(repr, missing))}. They were summed out or not recorded by "
            f"{posterior.engine}; the program cannot be run again without them. Use an engine that draws them."
        )


def _check_fit(target: Target, held: Mapping[str, Tensor]) -> None:
    for name in target.sites.keys() & held.keys():
        site = target.sites[name]
        expected, got = site.batch_shape + site.event_shape, tuple(held[name].shape[1:])
        if expected != got:
            raise InputError(
                f"Site {name!r}: with the new arguments it has shape {expected}, its draws have {got}. Draws of one "
                "row say nothing of another: pass arguments with the same rows, or infer for the new ones."
            )


def _evenly_spaced(available: int, wanted: int | None) -> Tensor:
    if wanted is None:
        return torch.arange(available)
    if not 1 <= wanted <= available:
        raise InputError(f"num_draws must be in 1..{available}, the draws of each chain, got {wanted}.")
    return torch.linspace(0, available - 1, wanted).round().long()


def _values(names: set[str] | None) -> Pick:
    """Picks the values of the named sites, or of all that are sampled."""

    def pick(nodes: dict[str, Node]) -> dict[str, Tensor]:
        return {
            name: node["value"]
            for name, node in nodes.items()
            if not _is_bookkeeping(node) and (names is None or name in names)
        }

    return pick


def _row_log_prob(node: Node) -> Tensor:
    terms: Tensor = node["fn"].log_prob(node["value"]).expand(node["fn"].batch_shape)
    mask = node["mask"]
    return terms if mask is None else torch.where(torch.as_tensor(mask), terms, 0.0)


def _is_bookkeeping(node: Node) -> bool:
    """A factor, the indices of a plate, or a deterministic record: a site of Pyro's that is no random variable."""
    return type(node["fn"]).__name__ in ("Unit", "_Subsample") or bool(node["infer"].get("_deterministic"))


def _over_draws(
    target: Target, model: Callable[..., Any], draws: Mapping[str, Tensor], pick: Pick, *, seed: int
) -> dict[str, Tensor]:
    """Run the model once for each draw, its sites held there, and stack what `pick` takes from each run."""

    def once(held: dict[str, Tensor]) -> dict[str, Tensor]:
        return pick(_run(pyro.condition(model, data=held), target.args))

    with _quietly(target, seed):
        try:
            batched = torch.func.vmap(once, randomness="different", chunk_size=_DRAWS_AT_ONCE)
            return batched(dict(draws))
        except RuntimeError:  # vmap has no rule for something in this program
            pass
    with _quietly(target, seed):
        runs = [once(dict(zip(draws, row, strict=True))) for row in zip(*draws.values(), strict=True)]
    return {name: torch.stack([run[name] for run in runs]) for name in runs[0]}


def _once(target: Target) -> dict[str, Node]:
    """One run of the program, its improper sites put somewhere inside their support."""
    with _quietly(target, seed=0):
        return _run(FlatStart(torch.get_default_dtype())(target.model), target.args)


def _run(model: Callable[..., Any], args: tuple[Any, ...]) -> dict[str, Node]:
    return dict(sample_sites(poutine.trace(model).get_trace(*args)))


@contextmanager
def _quietly(target: Target, seed: int) -> Iterator[None]:
    """Nothing outside changes: random stream, parameter store, weights and layers' modes, Pyro's validation."""
    with (
        forked_rng(seed),
        restored_store(),
        frozen(target.program),
        validation(False),
        torch.no_grad(),
        warnings.catch_warnings(),
    ):
        warnings.filterwarnings("ignore", "There is a performance drop")  # vmap on some rarer samplers
        yield
