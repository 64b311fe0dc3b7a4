"""Files of posteriors: netCDF that ArviZ reads, sealed, with the state of their chains inside.

What netCDF cannot say stands in one attribute, as JSON: dtypes, names of sites, what the draws are and cost, evidence.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any, get_args

import numpy as np
import torch
from torch import Tensor

from probgen.arviz_io import Groups, attributes, from_netcdf, safe, to_netcdf
from probgen.core import Cost, DamagedFile, Estimate, Guarantee, InputError, Posterior, PosteriorKind, Terms
from probgen.files import read_bytes, sealed, unsealed, write_bytes
from probgen.kernels.state import ChainState
from probgen.recorded import NotPlainError, from_plain, nameable, to_plain

FORMAT = "probgen posterior 1"
_ATTRIBUTE = "probgen"
_APART = ("draws", "stats", "target")  # fields of a posterior that are not told in JSON
_LONGEST_NAME = 200
_WITHOUT_DTYPE = {torch.bfloat16: torch.float32, torch.float16: torch.float32}
for _kind in (ChainState, Cost, Estimate, Terms):
    nameable(_kind)


def write_posterior(posterior: Posterior, path: Path) -> None:
    """Write all of a posterior but its target; see `probgen.save`."""
    others: dict[str, Tensor] = {}

    def keep(tensor: Tensor) -> str:
        name = f"tensor_{len(others)}"
        others[name] = tensor
        return name

    told = {item.name: getattr(posterior, item.name) for item in fields(posterior) if item.name not in _APART}
    told["state"] = posterior.state if isinstance(posterior.state, ChainState) else None
    told["coords"] = {name: np.asarray(labels).tolist() for name, labels in posterior.coords.items()}
    try:
        about = to_plain(told, keep)
    except NotPlainError as reason:
        raise InputError(f"This posterior cannot be saved: {reason}.") from reason
    tensors = {"posterior": posterior.draws, "sample_stats": posterior.stats, "constant_data": others}
    variables, groups = _as_groups(tensors, posterior)
    facts = {"format": FORMAT, "about": about, "variables": variables}
    told = {**attributes(posterior), _ATTRIBUTE: json.dumps(facts)}
    write_bytes(path, sealed(to_netcdf(groups, told)))


def read_posterior(path: Path) -> Posterior:
    """Read what `write_posterior` wrote, or a posterior of another program that ArviZ wrote; see `probgen.load`."""
    content = read_bytes(path)
    own = unsealed(path, content)
    try:
        groups, told = from_netcdf(content if own is None else own)
    except Exception as error:  # whatever HDF5 and xarray make of bytes that are not theirs
        raise DamagedFile(
            f"{str(path)!r} is damaged, or no netCDF file of ArviZ: {_first_line(error)}"
        ) from error
    if _ATTRIBUTE not in told:
        return _of_others(path, groups, told)
    if own is None:
        raise DamagedFile(f"{str(path)!r} was cut or changed since probgen wrote it. Take another copy.")
    try:
        return _restored(path, groups, json.loads(told[_ATTRIBUTE]))
    except (AttributeError, LookupError, NotPlainError, RuntimeError, TypeError, ValueError) as error:
        raise DamagedFile(f"{str(path)!r} is no posterior of probgen: {_first_line(error)}") from error


def _first_line(error: Exception) -> str:
    return next(iter(str(error).splitlines()), type(error).__name__)


# --- tensors and the names, dtypes and shapes that netCDF cannot hold ------------------------------------------------


def _as_groups(
    tensors: Mapping[str, Mapping[str, Tensor]], posterior: Posterior
) -> tuple[dict[str, Any], Groups]:
    """Arrays by group under names unique in the file, and by these names what they stand for."""
    variables: dict[str, Any] = {}
    values: dict[str, dict[str, Any]] = {group: {} for group in tensors}
    for group, named in tensors.items():
        for name, tensor in named.items():
            variable = _plain(name)
            while variable in variables:
                variable += "_"
            kind = str(tensor.dtype).removeprefix("torch.")
            variables[variable] = [group, name, kind, list(tensor.shape)]
            values[group][variable] = _array(name, tensor)
    dims = _dims(variables, posterior.dims)
    used = {dim: size for variable in dims for dim, size in _sizes(variables[variable], dims[variable])}
    coords = {
        _plain(dim): np.asarray(labels)
        for dim, labels in posterior.coords.items()
        if np.shape(labels) == (used.get(_plain(dim)),)
    }
    return variables, Groups({group: v for group, v in values.items() if v}, dims, coords)


def _plain(name: str) -> str:
    """A name that netCDF, xarray and ArviZ can all have."""
    return safe(re.sub(r"[^\w.\[\]-]", "_", name.replace("/", "."))[:_LONGEST_NAME].strip(".") or "_")


def _array(name: str, tensor: Tensor) -> Any:
    if tensor.is_complex():
        raise InputError(f"{name!r} is complex, which netCDF cannot hold: split it into two real sites.")
    return tensor.detach().cpu().to(_WITHOUT_DTYPE.get(tensor.dtype, tensor.dtype)).numpy()


def _sizes(variable: Any, dims: list[str]) -> list[tuple[str, int]]:
    """Dimensions with their sizes, those of chain and draw left out."""
    return list(zip(dims, variable[3][2:], strict=False))


def _dims(variables: Mapping[str, Any], dims: Mapping[str, tuple[str, ...]]) -> dict[str, list[str]]:
    """Names of dimensions where xarray can have them: one size a name, none twice, none that a variable has."""
    kept: dict[str, list[str]] = {}
    sizes: dict[str, int] = {}
    for variable, about in variables.items():
        names = [_plain(dim) for dim in dims.get(about[1], ())]
        if about[0] == "constant_data" or len(names) > len(about[3]) - 2:
            continue
        own = dict(_sizes(about, names))
        clash = len(own) < len(names) or own.keys() & variables.keys()
        if not clash and all(sizes.get(dim, size) == size for dim, size in own.items()):
            kept[variable] = names
            sizes |= own
    return kept


def _restored(path: Path, groups: Groups, facts: Mapping[str, Any]) -> Posterior:
    if facts["format"] != FORMAT:
        raise DamagedFile(f"{str(path)!r} was written by another version of probgen: it lacks {FORMAT!r}.")
    tensors: dict[str, dict[str, Tensor]] = {"posterior": {}, "sample_stats": {}, "constant_data": {}}
    for variable, (group, name, kind, shape) in facts["variables"].items():
        dtype = from_plain({"dtype": kind}, {})
        tensors[group][name] = (
            torch.from_numpy(np.array(groups.values[group][variable])).to(dtype).reshape(shape)
        )
    about = from_plain(facts["about"], tensors["constant_data"])
    return Posterior(draws=tensors["posterior"], stats=tensors["sample_stats"], **about)


# --- posteriors of others --------------------------------------------------------------------------------------------


def _of_others(path: Path, groups: Groups, told: Mapping[str, Any]) -> Posterior:
    """Draws that ArviZ wrote: of Markov chains, unless the file says otherwise."""
    draws, stats = (
        {
            name: _tensor(path, name, array)
            for name, array in groups.values.get(group, {}).items()
            if name in groups.dims
        }
        for group in ("posterior", "sample_stats")
    )
    if not draws:
        raise DamagedFile(
            f"{str(path)!r} holds no draws: no group 'posterior' of variables (chain, draw, ...)."
        )
    kind: Any = str(told.get("kind"))
    guarantee: Any = str(told.get("guarantee"))
    return Posterior(
        draws,
        kind if kind in get_args(PosteriorKind) else "mcmc",
        guarantee if guarantee in get_args(Guarantee) else "asymptotic",
        str(told.get("engine", told.get("inference_library", "an unknown sampler"))),
        Cost(),
        dims={name: tuple(groups.dims[name]) for name in draws},
        coords={dim: labels.tolist() for dim, labels in groups.coords.items()},
        stats=stats,
    )


def _tensor(path: Path, name: str, array: Any) -> Tensor:
    if array.dtype.kind not in "biuf":
        raise DamagedFile(f"{str(path)!r} holds {array.dtype} at {name!r}: draws must be numbers.")
    return torch.from_numpy(np.ascontiguousarray(array, dtype=array.dtype.newbyteorder("=")))
