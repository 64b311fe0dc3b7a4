"""`save` and `load`: fitted programs and posteriors, in files that hold numbers and text and nothing that runs."""

from __future__ import annotations

from pathlib import Path

from torch import nn

from probgen.core import InputError, Posterior, check, check_arguments, describe
from probgen.files import PathLike
from probgen.posterior_files import read_posterior, write_posterior
from probgen.program_files import read_program, write_program


def save(thing: nn.Module | Posterior, path: PathLike) -> None:
    """Write a program or a posterior to a file, whole or not at all; `load` reads it.

    Args:
        thing: a program, whose file ends in `.safetensors`: its weights and constants and, if it is made of probgen's
            own classes and plain values, what it was made with. A posterior, whose file ends in `.nc`: netCDF that
            ArviZ reads too, with everything but its program, chains to go on from included.
        path: where to; what was there is replaced.

    Raises:
        InputError: for what cannot be saved, programs among them whose weights are in Pyro's store (`pyro.param`).
        FileError: where the file cannot be written; what was there before is then unharmed.

    >>> import tempfile
    >>> from probgen import DDPM, TimeMLP
    >>> ddpm = DDPM(TimeMLP((2,), width=8), num_steps=10)
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     save(ddpm, f"{folder}/ddpm.safetensors")
    ...     again = load(f"{folder}/ddpm.safetensors")
    >>> again.num_steps, bool((again.network.embed.weight == ddpm.network.embed.weight).all())
    (10, True)
    """
    check("save: path", path, PathLike)
    if isinstance(thing, Posterior):
        _check_ending(path, ".nc", "a posterior")
        write_posterior(thing, Path(path))
    elif isinstance(thing, nn.Module):
        _check_ending(path, ".safetensors", "a program")
        write_program(thing, path)
    else:
        raise InputError(
            f"save writes programs that are nn.Modules, and posteriors; {describe(thing)} is a "
            f"{type(thing).__name__}. Weights in Pyro's store (pyro.param) belong to nobody: put them into an "
            "nn.Module or a PyroModule."
        )


def load(path: PathLike, into: nn.Module | None = None) -> nn.Module | Posterior:
    """Read what `save` wrote: nothing in the file is executed, and the whole of it is checked before it is used.

    Args:
        path: a program (`.safetensors`) or a posterior (`.nc`).
        into: a program to take the weights, where the file cannot say how to make it; it is left as it was unless every
            name, shape and dtype fits.

    Returns a program on the CPU, or `into` where it was given; or a `Posterior`, which no longer knows its program:
    diagnostics that run it again need a new one. Posteriors of other programs that ArviZ wrote are read as Markov
    chains.

    Raises:
        InputError: weights that do not fit `into`, all of them named.
        FileError: a file that is not there.
        DamagedFile: a file that was changed or cut, or is of another kind.
    """
    check_arguments(load, locals())
    ending = Path(path).suffix
    if ending == ".safetensors":
        return read_program(path, into)
    if ending != ".nc":
        raise InputError(
            f"load reads programs (.safetensors) and posteriors (.nc), not {str(path)!r}. A zarr store becomes one by "
            "arviz.from_zarr(path).to_netcdf(...); pickles (.pt, .pkl) are never read: that runs what they hold."
        )
    if into is not None:
        raise InputError(f"{str(path)!r} is a posterior: into= is for programs.")
    return read_posterior(Path(path))


def _check_ending(path: PathLike, ending: str, what: str) -> None:
    if Path(path).suffix != ending:
        raise InputError(f"The file of {what} must end in {ending}, got {str(path)!r}.")
