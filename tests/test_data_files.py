"""Data of one's own: read right, and refused with the file, the row and the column where they are not."""

import gzip
import pickle
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from probgen import ELBO, VAE, Quantised, fit
from probgen.core import InputError
from probgen.data_files import MAX_PIXELS, Table, comes_in_parts, read_data, read_images, read_table

DIGITS = np.arange(5 * 6 * 4, dtype=np.uint8).reshape(5, 6, 4)


def write(path: Path, text: str | bytes) -> Path:
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return path


def pictures(folder: Path, *arrays: np.ndarray, ending: str = "png") -> Path:
    folder.mkdir(exist_ok=True)
    for i, array in enumerate(arrays):
        Image.fromarray(array).save(folder / f"{i:02}.{ending}")
    return folder


def bomb(path: Path, width: int, height: int) -> Path:
    """A png of a few bytes that claims any size."""
    header = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    chunks = [(b"IHDR", header), (b"IDAT", zlib.compress(b"")), (b"IEND", b"")]
    body = b"".join(
        struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        for kind, data in chunks
    )
    return write(path, b"\x89PNG\r\n\x1a\n" + body)


# --- what is read --------------------------------------------------------------------------------------------------


def test_table_is_a_data_set_and_a_site_a_column(tmp_path: Path) -> None:
    path = write(tmp_path / "a.csv", '\ufeffdose, response ,"a, b"\r\n1,2.5,-1e-3\r\n\r\n"3",4,5\r\n')
    table = read_data(path)
    assert isinstance(table, Table)
    assert table.columns == ("dose", "response", "a, b")
    assert torch.equal(table.all(), torch.tensor([[1.0, 2.5, -0.001], [3.0, 4.0, 5.0]]))
    assert table.sites()["response"].tolist() == [2.5, 4.0]
    assert table.select(["response", "dose"])[torch.tensor([1])].tolist() == [[4.0, 3.0]]
    assert (len(table), table.event_shape) == (2, (3,))


def test_a_table_apart_by_tabs(tmp_path: Path) -> None:
    assert read_table(write(tmp_path / "a.tsv", "a\tb\n1\t2\n")).sites()["b"].tolist() == [2.0]


def test_arrays_by_name_and_bytes_as_levels(tmp_path: Path) -> None:
    np.save(tmp_path / "a.npy", np.eye(3))
    np.savez(tmp_path / "b.npz", y=np.ones((4, 2)), z=np.zeros(4))
    np.savez(tmp_path / "c.npz", x=DIGITS, labels=np.arange(5))
    np.save(tmp_path / "d.npy", DIGITS)
    x = read_data(tmp_path / "a.npy")
    assert isinstance(x, dict)
    assert torch.equal(x["x"], torch.eye(3, dtype=torch.float64))
    assert {name: value.shape for name, value in read_data(tmp_path / "b.npz").items()} == {
        "y": (4, 2),
        "z": (4,),
    }
    labelled = read_data(tmp_path / "c.npz")
    assert isinstance(labelled, Quantised)
    assert labelled.labels.tolist() == [0, 1, 2, 3, 4]
    levels = read_data(tmp_path / "d.npy")
    assert (levels.event_shape, levels.num_levels) == ((1, 6, 4), 256)


def test_idx_files_and_mnist_folders(tmp_path: Path) -> None:
    header = b"\0\0\x08\x03" + b"".join(size.to_bytes(4, "big") for size in DIGITS.shape)
    images, labels = header + DIGITS.tobytes(), b"\0\0\x08\x01" + (5).to_bytes(4, "big") + bytes(5)
    for part in ("train", "t10k"):
        (tmp_path / f"{part}-images-idx3-ubyte.gz").write_bytes(gzip.compress(images))
        (tmp_path / f"{part}-labels-idx1-ubyte.gz").write_bytes(gzip.compress(labels))
    for spec in (tmp_path, f"mnist:{tmp_path}", tmp_path / "t10k-images-idx3-ubyte.gz"):
        assert read_data(spec, "held_out").event_shape == (1, 6, 4)
    assert comes_in_parts(tmp_path)


@pytest.mark.parametrize("ending", ["png", "JPG"])
def test_a_folder_of_images(tmp_path: Path, ending: str) -> None:
    colour = np.stack([DIGITS[0], DIGITS[1], DIGITS[2]], axis=-1)
    folder = pictures(tmp_path / "a", colour, colour[::-1], ending=ending)
    data = read_data(write(folder / "notes.txt", "no image").parent)
    assert (len(data), data.event_shape, data.num_levels) == (2, (3, 6, 4), 256)
    if ending == "png":
        assert torch.equal(data.levels[0, 1], torch.as_tensor(DIGITS[1]))
    grey = pictures(tmp_path / "b", DIGITS[0], ending=ending)
    assert read_data(grey).event_shape == (1, 6, 4)


def test_what_was_read_is_what_fit_takes(tmp_path: Path) -> None:
    table = read_data(write(tmp_path / "a.csv", "a,b\n" + "1,2\n3,5\n" * 4))
    images = read_data(pictures(tmp_path / "images", *DIGITS))
    for data in (table, images):
        program = VAE.of_shape(data.event_shape, latent_dim=1, widths=(4,))
        assert len(fit(program, data, ELBO(), num_steps=2, progress=False).loss) == 2


# --- what is refused -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "is empty"),
        ("a,b\n", "holds no rows"),
        ("a;b\n1;2\n", "apart by commas, got 'a;b'"),
        ("1,2\n3,4\n", "expected column names, got numbers"),
        ("a,\n1,2\n", "column 2 of 2 has no name"),
        ("a,a\n1,2\n", "two columns are called 'a'"),
        ("a,b\n1,2\n3\n", "line 3: expected 2 cells, as the header has, got 1"),
        ("a,b\n1,2\n3,4,5\n", "line 3: expected 2 cells, as the header has, got 3"),
        ("a,b\n1,\n", "line 2, column 'b': expected a finite number, got ''"),
        ("a,b\n\n1,x\n", "line 3, column 'b': expected a finite number, got 'x'"),
        ("a,b\n1,nan\n", "column 'b': expected a finite number, got 'nan'"),
        ("a,b\n1,-inf\n", "got '-inf'"),
        ("a,b\n1,1e39\n", "got '1e39'"),
        ("a,b\n1,1_000\n", "got '1_000'"),
        ('a,b\n1,"2\n', "line 2: unexpected end of data"),
        (b"a,b\n1,\xff\n", "no text in UTF-8: byte 6 is 0xff"),
        (b"PK\x03\x04" + bytes(range(256)), "is no text in UTF-8"),
    ],
)
def test_a_table_is_refused_where_it_is_wrong(tmp_path: Path, text: str | bytes, message: str) -> None:
    with pytest.raises(InputError) as caught:
        read_data(write(tmp_path / "a.csv", text))
    assert message in str(caught.value)
    assert "a.csv" in str(caught.value)


@pytest.mark.parametrize(
    ("array", "message"),
    [
        (np.array([1.0, np.nan]), "1 NaN or Inf of 2 values, the first at index (1,)"),
        (np.empty((0, 3)), "has shape (0, 3)"),
        (np.array(3.0), "has shape ()"),
        (np.array([1j]), "holds complex numbers"),
        (np.array(["a", "b"]), "not an npy file of a plain numeric array"),
        (np.array([{"a": 1}], dtype=object), "not an npy file of a plain numeric array"),
    ],
)
def test_an_array_is_refused_where_it_is_wrong(tmp_path: Path, array: np.ndarray, message: str) -> None:
    np.save(tmp_path / "a.npy", array, allow_pickle=True)
    with pytest.raises(InputError) as caught:
        read_data(tmp_path / "a.npy")
    assert message in str(caught.value)


class Vicious:
    """Its pickle, opened, would leave a file behind."""

    def __reduce__(self) -> tuple[object, tuple[Path]]:
        return Path.touch, (Path("opened"),)


@pytest.mark.parametrize("name", ["a.npy", "a.npz", "a.pt", "a.pkl"])
def test_pickles_are_never_opened(tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError, match=r"a\.np|of no kind"):
        read_data(write(tmp_path / name, pickle.dumps(Vicious())))
    np.savez(tmp_path / "b.npz", x=np.array([Vicious()], dtype=object))
    with pytest.raises(InputError, match="not an npz file of plain numeric arrays"):
        read_data(tmp_path / "b.npz")
    assert not (tmp_path / "opened").exists()


def test_images_of_two_sizes_are_named(tmp_path: Path) -> None:
    folder = pictures(tmp_path / "a", DIGITS[0], DIGITS[1], DIGITS[0].T)
    with pytest.raises(InputError, match=r"00\.png' is 4 x 6 in grey, .*02\.png' is 6 x 4 in grey"):
        read_data(folder)


def test_images_that_are_none_are_named(tmp_path: Path) -> None:
    noise = np.random.default_rng(0).integers(0, 255, (64, 64), dtype=np.uint8)
    folder = pictures(tmp_path / "a", noise)
    whole = (folder / "00.png").read_bytes()
    for content, message in ((b"no image", "is no image"), (whole[: len(whole) // 2], "is damaged")):
        write(folder / "01.png", content)
        with pytest.raises(InputError, match=rf"01\.png' {message}"):
            read_images(folder)


@pytest.mark.parametrize(("width", "height"), [(MAX_PIXELS, 2), (10_000, 10_000), (30_000, 30_000)])
def test_a_small_file_that_claims_to_be_huge_is_not_unpacked(tmp_path: Path, width: int, height: int) -> None:
    folder = pictures(tmp_path / "a", DIGITS[0])
    bomb(folder / "01.png", width, height)
    with pytest.raises(InputError, match=r"01\.png' is (\d+ x \d+: expected at most|damaged: Image size)"):
        read_images(folder)


def test_images_of_16_bits_and_empty_folders(tmp_path: Path) -> None:
    Image.fromarray(np.zeros((4, 4), dtype=np.uint16)).save(tmp_path / "a.png")
    with pytest.raises(InputError, match="expected grey or colour of 8 bits"):
        read_data(tmp_path)
    (tmp_path / "b").mkdir()
    with pytest.raises(InputError, match="There are no images in"):
        read_data(tmp_path / "b")
    with pytest.raises(InputError, match="is one image"):
        read_data(tmp_path / "a.png")


@pytest.mark.parametrize("spec", ["nowhere.csv", "", "digit", "a\0b", "x" * 5000, "mnist:nowhere"])
def test_what_is_not_there(spec: str) -> None:
    with pytest.raises(InputError):
        read_data(spec)


def test_parts_and_columns_that_do_not_exist() -> None:
    with pytest.raises(InputError, match="did you mean 'held_out'"):
        read_data("digits", "heldout")  # type: ignore[arg-type]
    with pytest.raises(InputError, match="no column 'dos'; did you mean 'dose'"):
        Table(("dose",), torch.zeros(2, 1)).select(["dos"])
