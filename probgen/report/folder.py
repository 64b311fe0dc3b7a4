"""A folder of results that never destroys what it did not write."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from os import PathLike
from pathlib import Path
from tempfile import TemporaryDirectory

from probgen.core import InputError

MANIFEST = "files.json"


class Folder:
    """Files of a report; `files.json` keeps the SHA-256 of each, and only what still has it is overwritten.

    Args:
        path: the folder; made if it is not there.
        names: the files that will be written: those of others are found before any work is done.

    Raises `InputError` where the folder cannot be made or written, or holds a file of one of these names that was not
    written here or was changed since.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as path, Folder(path, ["a.txt"]).file("a.txt") as draft:
    ...     _ = draft.write_text("ours")
    """

    def __init__(self, path: str | PathLike[str], names: Iterable[str]) -> None:
        self.path = Path(path)
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            with TemporaryDirectory(dir=self.path):
                pass
        except OSError as error:
            raise InputError(
                f"Cannot write into {self.path}: {error.strerror}. Choose another folder."
            ) from error
        self._digests = self._read_manifest()
        self._check(names)

    @contextmanager
    def file(self, name: str) -> Iterator[Path]:
        """Yield a path to write to; what was written there becomes the file when the block ends well."""
        with TemporaryDirectory(dir=self.path) as scratch:
            draft = Path(scratch, name)
            yield draft
            self._check([name])
            self._digests[name] = _digest(draft)
            self._write_manifest(Path(scratch, MANIFEST))
            draft.replace(self.path / name)

    def _check(self, names: Iterable[str]) -> None:
        foreign = [name for name in names if self._is_foreign(self.path / name)]
        if foreign:
            raise InputError(
                f"{self.path} holds {', '.join(foreign)}, not written here or changed since. Move it away, or choose "
                "another folder."
            )

    def _is_foreign(self, path: Path) -> bool:
        if path.is_symlink():
            return True
        return path.exists() and not (path.is_file() and _digest(path) == self._digests.get(path.name))

    def _read_manifest(self) -> dict[str, str]:
        path = self.path / MANIFEST
        if not path.exists():
            return {}
        try:
            digests: dict[str, str] = json.loads(path.read_text(encoding="utf-8"))["written by probgen"]
        except (ValueError, LookupError, TypeError, OSError) as error:
            raise InputError(f"{path} was not written by probgen. Choose another folder.") from error
        return digests

    def _write_manifest(self, draft: Path) -> None:
        draft.write_text(json.dumps({"written by probgen": self._digests}, indent=2) + "\n", encoding="utf-8")
        draft.replace(self.path / MANIFEST)


def _digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()
