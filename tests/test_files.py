"""Files are there whole or not at all, and refused when one bit of them was changed."""

import os
import pickle
import random
import resource
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

from probgen.core import DamagedFile, DamagedFileWarning, FileError
from probgen.files import (
    read_bytes,
    read_json,
    read_tensors,
    remove_parts,
    sealed,
    unsealed,
    write_bytes,
    write_json,
    write_tensors,
)
from probgen.kernels.state import ChainState
from probgen.runs import Checkpoints

TENSORS = {
    "weight": torch.randn(3, 4, dtype=torch.float64),
    "half": torch.randn(5).bfloat16(),
    "count": torch.tensor(7),
    "mask": torch.tensor([True, False]),
    "empty": torch.zeros(0, 3),
    "complex": torch.randn(2, dtype=torch.complex64),
    "transposed": torch.randn(2, 3).mT,
}
FACTS = {"step": 3, "name": "größe \u2603", "nested": [1, {"a": None}]}
MANY = pytest.mark.parametrize("num", [100, pytest.param(1000, marks=pytest.mark.slow)])


@contextmanager
def small_disk(num_bytes: int) -> Iterator[None]:
    """No file may grow beyond this size inside the block."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def damaged(content: bytes, generator: random.Random) -> bytes:
    """One bit flipped, or cut somewhere."""
    position = generator.randrange(len(content))
    if generator.random() < 0.5:
        return content[:position]
    flipped = content[position] ^ (1 << generator.randrange(8))
    return content[:position] + bytes([flipped]) + content[position + 1 :]


def refusals(path: Path, read: Callable[[Path], object], num: int) -> int:
    """How many of so many damaged copies are refused by name."""
    content, generator = path.read_bytes(), random.Random(0)
    count = 0
    for _ in range(num):
        path.write_bytes(damaged(content, generator))
        try:
            read(path)
        except DamagedFile:
            count += 1
    path.write_bytes(content)
    read(path)
    return count


def checkpoint(folder: Path) -> tuple[Path, Callable[[Path], object]]:
    checkpoints = Checkpoints(folder)
    checkpoints.write(10, TENSORS, FACTS)
    return checkpoints.path(10), lambda _: checkpoints.latest()


def chain_state(folder: Path) -> tuple[Path, Callable[[Path], object]]:
    path = folder / "state.safetensors"
    ChainState("HMC()", 5, 2, {"position": torch.randn(3, 2)}, {"step_size": torch.rand(2)}).save(path)
    return path, ChainState.load


@MANY
@pytest.mark.parametrize("kind", [checkpoint, chain_state])
def test_damages_are_refused(
    num: int, kind: Callable[[Path], tuple[Path, Callable[[Path], object]]], tmp_path: Path
) -> None:
    path, read = kind(tmp_path)
    found = refusals(path, read, num)
    print(f"{kind.__name__}: {found} of {num:,} damaged files refused")
    assert found == num


def test_without_the_checksum_damages_would_pass(tmp_path: Path) -> None:
    """The broken twin: safetensors itself takes most flipped bits of numbers for numbers."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file, save_file

    path, accepted, generator = tmp_path / "plain.safetensors", 0, random.Random(0)
    save_file({"w": torch.randn(1000)}, path)
    content = path.read_bytes()
    for _ in range(100):
        path.write_bytes(damaged(content, generator))
        try:
            load_file(path)
            accepted += 1
        except SafetensorError:
            continue
    assert accepted > 20


def test_damaged_checkpoints_are_passed_over(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path)
    for step in (10, 20):
        checkpoints.write(step, {"w": torch.full((3,), float(step))}, {"step": step})
    checkpoints.path(20).write_bytes(checkpoints.path(20).read_bytes()[:-1])
    with pytest.warns(DamagedFileWarning, match="Going on from step 10"):
        found = checkpoints.latest()
    assert found is not None
    assert found.step == 10
    assert torch.equal(found.tensors["w"], torch.full((3,), 10.0))


def test_tensors_and_facts_come_back_as_they_were(tmp_path: Path) -> None:
    write_tensors(tmp_path / "a", TENSORS, FACTS)
    found, facts = read_tensors(tmp_path / "a")
    assert facts == FACTS
    assert found.keys() == TENSORS.keys()
    for name, value in TENSORS.items():
        assert found[name].dtype == value.dtype
        assert torch.equal(found[name], value)


def test_nothing_and_shared_memory_can_be_written(tmp_path: Path) -> None:
    write_tensors(tmp_path / "nothing", {}, {})
    assert read_tensors(tmp_path / "nothing") == ({}, {})
    whole = torch.arange(6.0)
    write_tensors(tmp_path / "shared", {"a": whole, "b": whole[2:], "c": whole}, {})
    found, _ = read_tensors(tmp_path / "shared")
    assert torch.equal(found["b"], whole[2:])
    assert torch.equal(found["c"], whole)


def test_strangers_are_refused(tmp_path: Path) -> None:
    """Pickles, text, folders, files of others, and files that are not there: one kind of error each."""
    from safetensors.torch import save_file

    save_file({"w": torch.zeros(2)}, tmp_path / "others")
    (tmp_path / "pickle").write_bytes(pickle.dumps(print))
    torch.save({"w": torch.zeros(2)}, tmp_path / "zip")  # noqa: TID251 - to be refused
    (tmp_path / "text").write_text("no")
    (tmp_path / "empty").write_bytes(b"")
    for name in ("others", "pickle", "zip", "text", "empty"):
        with pytest.raises(DamagedFile, match=name):
            read_tensors(tmp_path / name)
    for path in (tmp_path / "absent", tmp_path, "a\0b"):
        with pytest.raises(FileError):
            read_tensors(path)
        with pytest.raises(FileError):
            read_bytes(path)


def test_facts_that_are_no_facts_are_refused(tmp_path: Path) -> None:
    """Sealed all the same: whoever made the file knew how."""
    from safetensors.torch import save_file

    from probgen import files

    for text in ("[1]", "{", "[" * 100_000, ""):
        save_file({}, tmp_path / "a", metadata={"facts": text, "sha256": files._seal(text, {})})
        with pytest.raises(DamagedFile):
            read_tensors(tmp_path / "a")


def test_a_full_disk_leaves_what_was_there(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path)
    checkpoints.write(1, {"w": torch.zeros(10)}, {})
    with (
        small_disk(20_000),
        pytest.raises(FileError, match=r"00000002\.safetensors.*\(40,\d\d\d bytes\).*File too large"),
    ):
        checkpoints.write(2, {"w": torch.zeros(10_000)}, {})
    assert [path.name for path in tmp_path.iterdir()] == ["00000001.safetensors"]
    found = checkpoints.latest()
    assert found is not None
    assert found.step == 1


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_folders_that_may_not_be_written_are_named(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    with pytest.raises(FileError, match="Permission denied"):
        write_bytes(tmp_path / "a", b"")
    tmp_path.chmod(0o700)


def test_places_that_cannot_be_are_named(tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    for path in (tmp_path / "absent" / "a", tmp_path / "folder", "a\0b", ".", "/"):
        with pytest.raises(FileError, match="could not be written"):
            write_bytes(path, b"content")
    assert [path.name for path in tmp_path.iterdir()] == ["folder"]


def test_a_link_is_replaced_and_not_followed(tmp_path: Path) -> None:
    (tmp_path / "precious").write_bytes(b"precious")
    (tmp_path / "link").symlink_to(tmp_path / "precious")
    write_bytes(tmp_path / "link", b"new")
    assert (tmp_path / "precious").read_bytes() == b"precious"
    assert (tmp_path / "link").read_bytes() == b"new"


def test_parts_of_killed_processes_are_removed(tmp_path: Path) -> None:
    (tmp_path / ".a.safetensors.1234.part").write_bytes(b"half")
    write_bytes(tmp_path / "a.part", b"whole")
    remove_parts(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["a.part"]


def test_json_comes_back(tmp_path: Path) -> None:
    write_json(tmp_path / "a.json", FACTS)
    assert read_json(tmp_path / "a.json") == FACTS
    for content in (b"{", b"\xff", b"[" * 100_000):
        (tmp_path / "a.json").write_bytes(content)
        with pytest.raises(DamagedFile):
            read_json(tmp_path / "a.json")
    with pytest.raises(FileError):
        read_json(tmp_path / "absent")


def test_seals() -> None:
    content = b"HDF" * 10
    whole = sealed(content)
    assert unsealed("a", whole) == content
    for position in range(len(whole)):
        broken = whole[:position] + bytes([whole[position] ^ 4]) + whole[position + 1 :]
        try:
            assert unsealed("a", broken) is None  # the seal's own mark
        except DamagedFile:
            continue
    for short in (b"", b"x", whole[:-1], content):
        assert unsealed("a", short) is None
