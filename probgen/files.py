"""Files that are there whole or not at all, and are refused when they are not what was written.

Numbers go into safetensors, everything else into JSON: nothing in a file is ever executed.
"""

from __future__ import annotations

import hashlib
import json
import os
import secrets
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from probgen.core import DamagedFile, FileError

PathLike = str | os.PathLike[str]
_SEAL = b"\nprobgen sha256 "
PART = ".part"  # ends the names of files that are not yet in their place


def write_bytes(path: PathLike, content: bytes) -> None:
    """Write a file whole or not at all: beside its place first, onto the disk, then into its place in one move.

    Raises `FileError` where it cannot be written, with the path and the number of bytes; what was there before is
    then as it was.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     write_bytes(f"{folder}/a", b"whole")
    ...     read_bytes(f"{folder}/a")
    b'whole'
    """
    path = Path(path)
    try:
        part = path.with_name(f".{path.name}.{secrets.token_hex(4)}{PART}")
        try:
            with part.open("xb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
            part.replace(path)
            _sync_folder(path.parent)
        finally:
            part.unlink(missing_ok=True)
    except (OSError, ValueError) as error:  # ValueError: a path without a name, or with a null in it
        raise FileError(
            f"{str(path)!r} could not be written ({len(content):,} bytes): {_reason(error)}. What was there before is "
            "unharmed. Free some space, or choose another place."
        ) from error


def read_bytes(path: PathLike) -> bytes:
    """All of a file; `FileError` where it cannot be read."""
    try:
        return Path(path).read_bytes()
    except (OSError, ValueError) as error:
        raise FileError(f"{str(path)!r} could not be read: {_reason(error)}.") from error


def sealed(content: bytes) -> bytes:
    """The content of a file with its SHA-256 after its end, for formats that do not mind (HDF5).

    >>> unsealed("a", sealed(b"whole"))
    b'whole'
    """
    return content + _SEAL + hashlib.sha256(content).digest()


def unsealed(path: PathLike, content: bytes) -> bytes | None:
    """What `sealed` was given; None where there is no seal, `DamagedFile` where it does not fit the rest."""
    size = len(content) - len(_SEAL) - hashlib.sha256().digest_size
    if size < 0 or not content.startswith(_SEAL, size):
        return None
    if hashlib.sha256(content[:size]).digest() != content[size + len(_SEAL) :]:
        raise DamagedFile(f"{str(path)!r} is damaged: its checksum does not fit. Take another copy.")
    return content[:size]


def make_folder(path: PathLike) -> None:
    """Make a folder, and those above it, where they are not there; `FileError` where they cannot be made."""
    try:
        Path(path).mkdir(parents=True, exist_ok=True)
    except (OSError, ValueError) as error:
        raise FileError(
            f"The folder {str(path)!r} cannot be made: {_reason(error)}. Choose another."
        ) from error


def remove_parts(folder: PathLike) -> None:
    """Remove what `write_bytes` left in a folder when its process was killed."""
    for part in Path(folder).glob(f".*{PART}"):
        part.unlink(missing_ok=True)


def write_json(path: PathLike, value: Any) -> None:
    """Write a value as JSON, whole or not at all; raises as `write_bytes`."""
    write_bytes(path, (json.dumps(value, indent=2) + "\n").encode())


def read_json(path: PathLike) -> Any:
    """Read a JSON file; `FileError` where there is none, `DamagedFile` where it holds something else."""
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise DamagedFile(
            f"{str(path)!r} is not a whole JSON file: {_reason(error)}. Take another copy."
        ) from error
    except OSError as error:
        raise FileError(f"{str(path)!r} could not be read: {_reason(error)}.") from error


def write_tensors(path: PathLike, tensors: Mapping[str, Tensor], facts: Mapping[str, Any]) -> None:
    """Write tensors and JSON facts to a safetensors file, sealed by a SHA-256 of all of it; raises as `write_bytes`.

    Args:
        path: of the file.
        tensors: by name; of any dtype, shape and device. Those that share memory are written once each.
        facts: what JSON can hold.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     write_tensors(f"{folder}/a.safetensors", {"w": torch.ones(2)}, {"step": 3})
    ...     read_tensors(f"{folder}/a.safetensors")
    ({'w': tensor([1., 1.])}, {'step': 3})
    """
    from safetensors.torch import save

    whole = {
        name: value.detach().cpu().clone(memory_format=torch.contiguous_format)
        for name, value in tensors.items()
    }
    sealed = {"facts": json.dumps(facts), "sha256": _seal(json.dumps(facts), whole)}
    write_bytes(path, save(whole, metadata=sealed))


def read_tensors(path: PathLike) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The tensors, on the CPU, and the facts that `write_tensors` wrote; `DamagedFile` for anything else."""
    from safetensors import SafetensorError, safe_open

    if not Path(path).is_file():
        raise FileError(f"There is no file {str(path)!r}.")
    try:
        with safe_open(str(path), framework="pt") as file:
            sealed = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except PermissionError as error:
        raise FileError(f"{str(path)!r} could not be read: {_reason(error)}.") from error
    except (OSError, SafetensorError, ValueError) as error:
        raise DamagedFile(
            f"{str(path)!r} is damaged, or no safetensors file: {_reason(error)}. Take another copy."
        ) from error
    if not {"facts", "sha256"} <= set(sealed):
        raise DamagedFile(f"{str(path)!r} is a safetensors file, but not one that probgen wrote.")
    if sealed["sha256"] != _seal(sealed["facts"], tensors):
        raise DamagedFile(f"{str(path)!r} is damaged: its checksum does not fit. Take another copy.")
    return tensors, _facts(path, sealed["facts"])


def _facts(path: PathLike, text: str) -> dict[str, Any]:
    try:
        facts = json.loads(text)
    except (ValueError, RecursionError):
        facts = None
    if not isinstance(facts, dict):
        raise DamagedFile(f"{str(path)!r} is a safetensors file, but not one that probgen wrote.")
    return facts


def _seal(facts: str, tensors: Mapping[str, Tensor]) -> str:
    digest = hashlib.sha256(facts.encode())
    for name, value in sorted(tensors.items()):
        digest.update(f"{name} {value.dtype} {tuple(value.shape)}".encode())
        content: Any = value.reshape(-1).view(torch.uint8).numpy()  # a buffer, for all its type says
        digest.update(content)
    return digest.hexdigest()


def _sync_folder(folder: Path) -> None:
    """Have the move itself on the disk, where folders can be opened (not on Windows)."""
    if os.name == "posix":
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def _reason(error: Exception) -> str:
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return next(iter(str(error).splitlines()), type(error).__name__)
