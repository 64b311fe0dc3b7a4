"""The bridge to ArviZ: posteriors as its groups, its diagnostics as plain arrays. The only file that knows ArviZ.

ArviZ 0.2x takes groups as keywords and gives `InferenceData`; from 1.0 on it takes one nested dictionary and gives a
`DataTree`. 0.2x accepts the nested form too, silently, and builds nonsense: which one is there is told by version.
"""

from __future__ import annotations

import io
import warnings
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from probgen.core import InputError, NonNegativeInt, Posterior, check_arguments, did_you_mean
from probgen.replay import (
    improper,
    log_likelihood,
    observations,
    observed,
    one_at_a_time,
    predictions,
    require_target,
    simulations,
    unrecorded,
)

Array = npt.NDArray[Any]

GROUPS = (
    "posterior",
    "sample_stats",
    "log_likelihood",
    "posterior_predictive",
    "prior",
    "prior_predictive",
    "observed_data",
)
HDI_PROB = 0.94
_PRIOR_DRAWS = 500


@dataclass(frozen=True)
class Groups:
    """What ArviZ is handed, in NumPy alone.

    Args:
        values: arrays by group and variable; all but `observed_data` begin with (chain, draw).
        dims: names of a variable's dimensions after (chain, draw), as far as they have names.
        coords: labels along named dimensions.
    """

    values: dict[str, dict[str, Array]]
    dims: dict[str, list[str]]
    coords: dict[str, Array]


def to_arviz(posterior: Posterior, *, groups: Collection[str] | None = None, seed: NonNegativeInt = 0) -> Any:
    """The posterior as ArviZ knows it, ready for its plots and for `to_netcdf`.

    Args:
        posterior: draws of any engine.
        groups: names among `GROUPS`; None means all that this posterior can give. Those beyond `posterior`,
            `sample_stats` and `observed_data` run the program again; `prior` simulates it from the start, which for
            a program with a large network inside can cost more than inference: name the groups you need.
        seed: of the simulated groups.

    Returns an `arviz.InferenceData` (ArviZ 0.2x) or an `xarray.DataTree` (ArviZ >= 1).
    Raises `InputError` for a group that does not exist, or that this posterior cannot give.

    >>> from probgen.diagnostics.summary import example
    >>> data = to_arviz(example(), groups=["posterior", "sample_stats"])
    >>> data.posterior["z"].dims
    ('chain', 'draw', 'school')
    """
    check_arguments(to_arviz, locals())
    result = build(_arviz(), to_groups(posterior, groups=groups, seed=seed))
    result.attrs.update(attributes(posterior))
    return result


def attributes(posterior: Posterior) -> dict[str, str]:
    """What ArviZ keeps of a posterior beside its arrays."""
    return {
        "inference_library": "probgen",
        "engine": posterior.engine,
        "kind": posterior.kind,
        "guarantee": posterior.guarantee,
    }


def to_groups(posterior: Posterior, *, groups: Collection[str] | None = None, seed: int = 0) -> Groups:
    """The same as `to_arviz` hands over, without ArviZ: arrays by group and variable, with dims and coords."""
    if groups is None:
        groups = [name for name in GROUPS if not unavailable(posterior, name)]
    else:
        _check_available(posterior, groups)
    values = {name: _arrays(tensors) for name, tensors in _group_values(posterior, groups, seed).items()}
    dims = {safe(site): [safe(dim) for dim in names] for site, names in _dims(posterior, groups).items()}
    return Groups(values, dims, {safe(dim): np.asarray(labels) for dim, labels in posterior.coords.items()})


def _check_available(posterior: Posterior, groups: Collection[str]) -> None:
    for name in groups:
        if name not in GROUPS:
            raise InputError(f"ArviZ group {name!r} is not one of probgen's; {did_you_mean(name, GROUPS)}")
        if reason := unavailable(posterior, name):
            raise InputError(f"Group {name!r} cannot be given: {reason}. Leave it out of groups=.")


def unavailable(posterior: Posterior, group: str) -> str:
    """Why this posterior cannot give an ArviZ group; "" if it can."""
    target = posterior.target
    if group == "posterior":
        return ""
    if group == "sample_stats":
        return "" if posterior.stats or posterior.run_stats else f"{posterior.engine} recorded no statistics"
    if target is None:
        return "the posterior does not know its program"
    if reason := one_at_a_time(posterior):
        return reason
    if not observed(target):
        return "nothing was observed"
    if group == "observed_data":
        return ""
    if group in ("log_likelihood", "posterior_predictive"):
        missing = unrecorded(posterior, summed_out=group == "log_likelihood")
        if missing:
            return f"latent sites {', '.join(map(repr, missing))} have no draws"
        names = [name for name in improper(target) if name in observed(target)]
        return f"observed sites {', '.join(map(repr, names))} have no law of their own" if names else ""
    names = improper(target)
    return f"sites {', '.join(map(repr, names))} have improper priors" if names else ""


def build(arviz: ModuleType, groups: Groups) -> Any:
    """Hand the groups to this ArviZ in the form its generation reads."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "More chains", UserWarning)  # hundreds of chains are no mistake
        if _is_nested(arviz):
            return arviz.from_dict(groups.values, dims=groups.dims, coords=groups.coords)
        return arviz.from_dict(**groups.values, dims=groups.dims, coords=groups.coords)


# --- files -----------------------------------------------------------------------------------------------------------


def to_netcdf(groups: Groups, attrs: Mapping[str, str]) -> bytes:
    """The content of a netCDF file of these groups, as ArviZ reads and writes them."""
    arviz = _arviz()
    tree = build(arviz, groups) if _is_nested(arviz) else build(arviz, groups).to_datatree()
    tree.attrs.update(attrs)
    return bytes(tree.to_netcdf(engine="h5netcdf"))


def from_netcdf(content: bytes) -> tuple[Groups, dict[str, Any]]:
    """The arrays of every group in a netCDF file, and its attributes; dims are those after (chain, draw)."""
    import xarray

    with xarray.open_datatree(io.BytesIO(content), engine="h5netcdf") as tree:
        parts = {str(name): part for name, part in tree.load().children.items()}
    dims = {
        str(name): [*map(str, value.dims[2:])]
        for part in parts.values()
        for name, value in part.data_vars.items()
        if value.dims[:2] == ("chain", "draw")
    }
    coords = {
        str(dim): labels.values
        for part in parts.values()
        for dim, labels in part.coords.items()
        if dim not in ("chain", "draw")
    }
    groups = Groups(
        {
            name: {str(key): value.values for key, value in part.data_vars.items()}
            for name, part in parts.items()
        },
        dims,
        coords,
    )
    return groups, {str(name): value for name, value in tree.attrs.items()}


# --- ArviZ's diagnostics, in the same words for both generations --------------------------------------------------


def chain_table(posterior: Posterior) -> Any:
    """A DataFrame, one row an entry: mean, sd, hdi_3%, hdi_97%, mcse_mean, mcse_sd, ess_bulk, ess_tail, r_hat."""
    arviz = _arviz()
    data = build(arviz, to_groups(posterior, groups=["posterior"]))
    width = {"ci_kind": "hdi", "ci_prob": HDI_PROB} if _is_nested(arviz) else {"hdi_prob": HDI_PROB}
    # Draws that ran away, or stood still, are told in sentences.
    with np.errstate(over="ignore", invalid="ignore", divide="ignore"):
        table = arviz.summary(data, round_to="none", **width)
    return table.rename(columns={"hdi94_lb": "hdi_3%", "hdi94_ub": "hdi_97%"})


def draws_table(posterior: Posterior) -> Any:
    """A DataFrame, one row an entry: mean, sd, 5%, 50%, 95%, mcse_mean = sd / sqrt(number of draws)."""
    arviz = _arviz()
    groups = to_groups(posterior, groups=["posterior"])
    table = arviz.summary(build(arviz, groups), kind="stats", round_to="none")[["mean", "sd"]]
    total = posterior.num_chains * posterior.num_draws
    columns = np.concatenate(
        [value.reshape(total, -1) for value in groups.values["posterior"].values()], axis=1
    )
    quantiles = np.quantile(columns, (0.05, 0.5, 0.95), axis=0)
    errors = table["sd"] / np.sqrt(total)
    return table.assign(**dict(zip(("5%", "50%", "95%"), quantiles, strict=True)), mcse_mean=errors)


def chain_error(values: Array) -> Array:
    """Monte Carlo standard error of the mean of correlated draws, from their effective sample size.

    Args:
        values: `(chain, draw, ...)`, at least 4 draws.
    """
    arviz = _arviz()
    return np.asarray(arviz.mcse(arviz.convert_to_dataset({"value": values}))["value"])


def energy_bfmi(energy: Array) -> Array:
    """Estimated Bayesian fraction of missing information of each chain (Betancourt 2016, arXiv 1604.00695).

    Args:
        energy: the Hamiltonian at each draw, `(chain, draw)`.
    """
    return np.asarray(_arviz().bfmi(energy))


def pareto_khat(log_weights: Tensor) -> Tensor:
    """Shape of the generalised Pareto tail of importance weights, `(sample, row)` -> `(row,)`; above 0.7 they fail.

    Equal weights have no tail: their shape is given as -inf. Source: Vehtari et al. (2015), arXiv 1507.02646.
    """
    arviz = _arviz()
    rows = log_weights.detach().double().cpu().numpy().T
    if _is_nested(arviz):
        from arviz_stats.base import array_stats  # type: ignore[import-not-found,unused-ignore]

        khat = array_stats.psislw(rows)[1]
    else:
        khat = arviz.psislw(rows)[1]
    equal = np.ptp(rows, axis=-1) < 1e-9
    return torch.as_tensor(np.where(equal, -np.inf, khat), device=log_weights.device)


@dataclass(frozen=True)
class LeaveOneOut:
    """ArviZ's answer: nats, `pareto_k` and `elpd_i` per row, `good_k` the bound below which k is fine."""

    elpd: float
    se: float
    p_loo: float
    good_k: float
    elpd_i: Array
    pareto_k: Array


def leave_one_out(posterior: Posterior, log_lik: Tensor) -> LeaveOneOut:
    """PSIS-LOO (Vehtari, Gelman and Gabry 2017, arXiv 1507.04544) from log p(row | draw), `(chain, draw, *batch)`."""
    arviz = _arviz()
    groups = to_groups(posterior, groups=["posterior"])
    data = build(
        arviz, Groups(groups.values | {"log_likelihood": _arrays({"y": log_lik})}, groups.dims, groups.coords)
    )
    efficiency = None if posterior.kind == "mcmc" else 1.0  # independent draws
    scale = {} if _is_nested(arviz) else {"scale": "log"}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # bad k is told in sentences
        found = arviz.loo(data, pointwise=True, reff=efficiency, **scale)
    elpd, p_loo, rows = (
        (found.elpd, found.p, found.elpd_i)
        if _is_nested(arviz)
        else (found.elpd_loo, found.p_loo, found.loo_i)
    )
    return LeaveOneOut(
        float(elpd),
        float(found.se),
        float(p_loo),
        float(found.good_k),
        np.asarray(rows),
        np.asarray(found.pareto_k),
    )


# --- inner parts ---------------------------------------------------------------------------------------------------


def _arviz() -> ModuleType:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # 0.2x announces the next generation at import
        import arviz
    return arviz


def _is_nested(arviz: ModuleType) -> bool:
    return int(arviz.__version__.split(".")[0]) >= 1


def _group_values(
    posterior: Posterior, groups: Collection[str], seed: int
) -> dict[str, Mapping[str, Tensor]]:
    values: dict[str, Mapping[str, Tensor]] = {}
    if "posterior" in groups:
        values["posterior"] = posterior.draws
    if "sample_stats" in groups:
        values["sample_stats"] = _statistics(posterior)
    if "log_likelihood" in groups:
        values["log_likelihood"] = log_likelihood(posterior)
    if "posterior_predictive" in groups:
        values["posterior_predictive"] = predictions(posterior, seed=seed)
    values |= _prior_values(posterior, [name for name in groups if name.startswith("prior")], seed)
    if "observed_data" in groups:
        values["observed_data"] = observations(require_target(posterior))
    return values


def _prior_values(
    posterior: Posterior, groups: Collection[str], seed: int
) -> dict[str, Mapping[str, Tensor]]:
    """One simulation serves both: `prior` has the latent sites, `prior_predictive` the observed ones."""
    if not groups:
        return {}
    target = require_target(posterior)
    sites = {
        name: value[None] for name, value in simulations(target, num_draws=_PRIOR_DRAWS, seed=seed).items()
    }
    data = observed(target)
    parts = {
        "prior": {name: value for name, value in sites.items() if name not in data},
        "prior_predictive": {name: value for name, value in sites.items() if name in data},
    }
    return {name: parts[name] for name in groups}


def _statistics(posterior: Posterior) -> dict[str, Tensor]:
    """Statistics of each draw; those of a whole chain (its step size) are repeated along it, as ArviZ expects."""
    shape = (posterior.num_chains, posterior.num_draws)
    per_chain = {
        name: value[:, None].expand(*shape, *value.shape[1:])
        for name, value in posterior.run_stats.items()
        if value.ndim
    }
    return per_chain | dict(posterior.stats)


def _dims(posterior: Posterior, groups: Collection[str]) -> dict[str, tuple[str, ...]]:
    """Names of dimensions: as the engine gave them, for observed sites their plates."""
    dims = {site: tuple(names) for site, names in posterior.dims.items()}
    if posterior.target is not None and posterior.target.num_sets:
        dims |= {
            name: _set_last(name, value) for name, value in _statistics(posterior).items() if name not in dims
        }
    if not set(groups) <= {"posterior", "sample_stats"}:
        for name, site in require_target(posterior).sites.items():
            if name not in posterior.draws and len(site.plates) == len(site.batch_shape):
                dims[name] = site.plates
    return dims


def _set_last(name: str, value: Tensor) -> tuple[str, ...]:
    """Dimensions of a statistic after (chain, draw), the last being that of data sets."""
    return (*(f"{name}_dim_{i}" for i in range(value.ndim - 3)), "data_set")


def _arrays(tensors: Mapping[str, Tensor]) -> dict[str, Array]:
    return {safe(name): _array(value) for name, value in tensors.items()}


def _array(value: Tensor) -> Array:
    value = value.detach().cpu()
    # NumPy has no bfloat16.
    return (value.float() if value.dtype == torch.bfloat16 else value).numpy()


def safe(name: str) -> str:
    """A name that neither netCDF reads as a path nor ArviZ takes for its own dimensions."""
    return f"{name}_" if name in ("chain", "draw") else name.replace("/", ".")
