"""The command `probgen`: what it prints, and how it fails."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

from probgen import __version__
from probgen.cli import main
from probgen.core import InputError
from probgen.discovery import methods
from probgen.report.folder import MANIFEST, Folder
from probgen.report.tables import KINDS, list_methods


def probgen(*words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", "import sys; from probgen.cli import main; sys.exit(main())", *words],
        capture_output=True,
        text=True,
        check=False,
    )


def test_version_and_help() -> None:
    assert probgen("--version").stdout == f"probgen {__version__}\n"
    text = probgen("--help").stdout
    assert "demo" in text
    assert "list" in text


def test_list_names_every_method_in_one_plain_line_each(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["list"]) == 0
    lines = capsys.readouterr().out.splitlines()
    for kind, folder in KINDS.items():
        assert kind.capitalize() in lines
        for name, method in methods(folder).items():
            (line,) = [line for line in lines if line.split(" ")[0] == name]
            for text in (method.offers, method.gives_up, method.paper):
                assert text in line
    assert not [line for line in lines if line != line.rstrip()]


def test_list_says_what_engines_need_and_which_serve_a_program(capsys: pytest.CaptureFixture[str]) -> None:
    list_methods("engines")
    engines = capsys.readouterr().out
    assert re.search("ReverseSDE +a program noised by a process", engines)
    assert "Programs" not in engines
    list_methods("programs")
    (vae,) = [line for line in capsys.readouterr().out.splitlines() if line.startswith("VAE ")]
    assert "Guide" in vae
    assert "ReverseSDE" not in vae


def test_list_explains_one_method(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["list", "NUTS"]) == 0
    out = capsys.readouterr().out
    assert "arXiv 1111.4246" in out
    assert "target_accept" in out


@pytest.mark.parametrize(
    ("words", "hint"),
    [
        (["lst"], "did you mean 'list'"),
        (["demp"], "did you mean 'demo'"),
        (["xyzzy"], "known: demo, list, fit"),
        (["list", "NUTZ"], "did you mean 'NUTS'"),
        (["list", "engine"], "did you mean 'engines'"),
        (["demo", "--out", __file__], "Choose another folder"),
        (["demo", "--qick"], "did you mean '--quick'"),
        (["demo", "there"], "expected options alone, got there"),
        (["list", "--what"], "unrecognized arguments: --what"),
        ([], "a command is required"),
    ],
)
def test_mistakes_get_one_paragraph_and_exit_code_2(
    words: list[str], hint: str, capsys: pytest.CaptureFixture[str]
) -> None:
    code = main(words)
    captured = capsys.readouterr()
    assert code == 2
    assert captured.out == ""
    assert hint in captured.err.replace("\n", " ")
    assert "\n\n" not in captured.err


def test_no_traceback_reaches_the_terminal() -> None:
    result = probgen("list", "NUTZ")
    assert result.returncode == 2
    assert "Traceback" not in result.stderr
    assert result.stderr.startswith("probgen: ")


def test_ctrl_c_is_no_traceback(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def interrupted(what: str | None = None) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("probgen.report.tables.list_methods", interrupted)
    assert main(["list"]) == 130
    assert "interrupted" in capsys.readouterr().err


# --- the folder of a report ----------------------------------------------------------------------------------------


def write(folder: Folder, text: str) -> None:
    with folder.file("a.txt") as draft:
        draft.write_text(text)


def test_folder_overwrites_its_own_files_alone(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("of others")
    write(Folder(tmp_path, ["a.txt"]), "first")
    write(Folder(tmp_path, ["a.txt"]), "second")
    assert (tmp_path / "a.txt").read_text() == "second"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.txt", MANIFEST, "notes.txt"]


def test_folder_refuses_files_of_others(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("precious")
    with pytest.raises(InputError, match=r"a\.txt, not written here"):
        Folder(tmp_path, ["a.txt"])
    with pytest.raises(InputError, match=r"a\.txt"):
        write(Folder(tmp_path, []), "ours")
    assert (tmp_path / "a.txt").read_text() == "precious"


def test_folder_refuses_its_own_file_once_someone_changed_it(tmp_path: Path) -> None:
    write(Folder(tmp_path, ["a.txt"]), "ours")
    (tmp_path / "a.txt").write_text("ours, with remarks")
    with pytest.raises(InputError, match="changed since"):
        Folder(tmp_path, ["a.txt"])


def test_folder_refuses_links_and_the_manifest_of_others(tmp_path: Path) -> None:
    (tmp_path / "elsewhere").write_text("precious")
    (tmp_path / "a.txt").symlink_to("elsewhere")
    with pytest.raises(InputError, match=r"a\.txt"):
        Folder(tmp_path, ["a.txt"])
    (tmp_path / MANIFEST).write_text("[1, 2]")
    with pytest.raises(InputError, match="not written by probgen"):
        Folder(tmp_path, [])


def test_a_failed_file_leaves_nothing_behind(tmp_path: Path) -> None:
    folder = Folder(tmp_path, ["a.txt"])

    def fail(draft: Path) -> None:
        draft.write_text("half")
        raise RuntimeError

    with pytest.raises(RuntimeError), folder.file("a.txt") as draft:
        fail(draft)
    assert list(tmp_path.iterdir()) == []
