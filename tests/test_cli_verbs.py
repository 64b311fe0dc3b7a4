"""Every command end to end in small settings: what it prints where, what it leaves behind, and how it refuses."""

import functools
import importlib
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from probgen import DDPM, Posterior, fit, infer
from probgen.cli import main
from probgen.cli.commands import doctor
from probgen.cli.options import Parser, parameters
from probgen.discovery import methods
from probgen.objectives import SimpleLoss
from probgen.saving import load

OWN = """
import pyro, torch
import pyro.distributions as dist
from probgen import DDPM, VAE, TimeMLP, infer
from probgen.core import Engine

def regression(dose):
    slope = pyro.sample("slope", dist.Normal(0.0, 1.0))
    noise = pyro.sample("noise", dist.HalfNormal(1.0))
    with pyro.plate("rows", len(dose)):
        pyro.sample("response", dist.Normal(slope * dose, noise))

def constant():
    rate = pyro.sample("rate", dist.Gamma(2.0, 1.0))
    with pyro.plate("rows", 3):
        pyro.sample("count", dist.Poisson(rate))

class Heights(torch.nn.Module):
    def __init__(self, event_shape, width: int = 8):
        super().__init__()
        self.vae, self.event_shape = VAE.mlp(event_shape, 1, (width,)), tuple(event_shape)
    def model(self, batch):
        return self.vae.model(batch)
    def guide(self, batch):
        return self.vae.guide(batch)

def chain(event_shape, length: int = 4) -> DDPM:
    return DDPM(TimeMLP(event_shape, width=8), num_steps=length)

def wants_more(event_shape, secret):
    pass
"""
TABLE = "dose,response\n" + "".join(f"{x / 5},{0.1 * x + 0.1 * (-1) ** x}\n" for x in range(-10, 10))
FIT = "fit VAE --data digits --num-steps 3 --latent-dim 2 --widths 8 --run runs/vae --rows 50"


@dataclass(frozen=True)
class Told:
    """What a command said."""

    code: int
    out: str
    err: str

    @property
    def facts(self) -> dict:
        return json.loads(self.out)


Say = Callable[[str], Told]


@pytest.fixture
def say(folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Say:
    """Run a command in the folder of the tests."""
    monkeypatch.chdir(folder)

    def said(command: str) -> Told:
        code = main(command.split())
        printed = capsys.readouterr()
        return Told(code, printed.out, printed.err)

    return said


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder as a user has it: a table, images, a program, and two fitted runs."""
    folder = tmp_path_factory.mktemp("user")
    (folder / "own.py").write_text(OWN)
    (folder / "broken.py").write_text("import probgen\n\nwrong = 1 / 0\n")
    (folder / "trial.csv").write_text(TABLE)
    (folder / "counts.csv").write_text("count\n1\n2\n4\n")
    (folder / "bad.csv").write_text("a,b\n1,x\n")
    (folder / "images").mkdir()
    for i, pixels in enumerate(np.random.default_rng(0).integers(0, 255, (6, 5, 4, 3), dtype=np.uint8)):
        Image.fromarray(pixels).save(folder / "images" / f"{i}.png")
    here = Path.cwd()
    os.chdir(folder)
    try:
        assert main([*FIT.split(), "--quiet"]) == 0
        assert (
            main(["fit", "ScoreSDE", "--data", "trial.csv", "--num-steps", "3", "--width", "8", "--quiet"])
            == 0
        )
    finally:
        os.chdir(here)
    return folder


# --- fit -----------------------------------------------------------------------------------------------------------


def test_fit_says_what_came_of_it_and_what_to_do_next(say: Say, folder: Path) -> None:
    told = say("fit FlowMatching --data images --num-steps 2 --width 8 --batch-size 4")
    assert (told.code, "2 steps in" in told.out, "run: runs/flowmatching-images\n" in told.out) == (
        0,
        True,
        True,
    )
    assert "probgen sample runs/flowmatching-images Ancestral" in told.err
    assert "probgen evidence runs/flowmatching-images ODELikelihood --data DATA_IT_HAS_NOT_SEEN" in told.err
    assert load(folder / "runs/flowmatching-images/program.safetensors").event_shape == (3, 5, 4)
    command = json.loads((folder / "runs/flowmatching-images/command.json").read_text())
    assert command["program"] == "FlowMatching"
    assert command["options"] == {"num-steps": "2", "width": "8", "batch-size": "4"}


def test_a_boltzmann_machine_from_digits_to_log_z(say: Say) -> None:
    """Pixels on or off, the objective of machines, and the commands that serve them next."""
    told = say("fit RBM --data digits --binarise --num-hidden 4 --num-steps 3 --run runs/rbm")
    assert told.code == 0
    assert "probgen sample runs/rbm Gibbs" in told.err
    assert "probgen evidence runs/rbm AIS --data digits --binarise" in told.err
    assert say("sample runs/rbm Gibbs --num-draws 2 --num-warmup 2").code == 0
    estimate = say("evidence runs/rbm AIS --data digits --binarise --rows 5 --num-temperatures 20 --json")
    assert estimate.facts["kind"] == "unbiased"
    grey = say("fit RBM --data digits --num-steps 3 --run runs/grey")
    assert (grey.code, "0 or 1" in grey.err, "binarise" in grey.err) == (2, True, True)
    table = say("fit RBM --data trial.csv --binarise --num-steps 3 --run runs/table")
    assert (table.code, "--binarise takes images" in table.err) == (2, True)


def test_fit_is_what_python_does(say: Say, folder: Path) -> None:
    table = torch.tensor([list(map(float, line.split(","))) for line in TABLE.splitlines()[1:]])
    torch.manual_seed(3)
    program = DDPM.of_shape((2,), width=8, num_steps=5)
    history = fit(program, table, SimpleLoss(), num_steps=4, batch_size=7, seed=3, progress=False)
    told = say(
        "fit DDPM --program-num-steps=5 --objective SimpleLoss --width 8 --num-steps 4 --data trial.csv --seed 3 "
        "--batch-size 7 --json"
    )
    assert told.facts["loss"] == history.loss[-1]
    fitted = load(folder / "runs/ddpm-trial/program.safetensors")
    for mine, theirs in zip(program.parameters(), fitted.parameters(), strict=True):
        assert torch.equal(mine, theirs)


def test_a_run_of_another_fit_is_refused_and_the_same_goes_on(say: Say, folder: Path) -> None:
    before = (folder / "runs/vae/command.json").read_bytes()
    refused = say(f"{FIT} --lr 0.5")
    assert refused.code == 2
    assert "asked for otherwise" in refused.err
    assert (folder / "runs/vae/command.json").read_bytes() == before
    assert say(FIT).code == 0


def test_a_condition_from_the_labels_of_the_data(say: Say) -> None:
    options = "--num-steps 2 --width 8 --program-num-steps 3 --rows 40 --run runs/labels"
    assert say(f"fit DDPM --data digits --condition Labels(10) {options}").code == 0
    facts = say("sample runs/labels Ancestral --labels 3,7 --num-draws 4 --json").facts
    assert facts["sites"] == {"x": [2, 1, 8, 8]}
    assert "is not conditioned on anything" in say("sample runs/vae Ancestral --labels 3").err


@pytest.mark.parametrize("name", ["Heights", "chain"])
def test_programs_of_ones_own_are_fitted_and_drawn_from(say: Say, name: str) -> None:
    told = say(f"fit own.py:{name} --data trial.csv --num-steps 2 --objective ELBO")
    assert f"sample runs/{name.lower()}-trial Ancestral --program own.py:{name}" in told.err
    refused = say(f"sample runs/{name.lower()}-trial Ancestral")
    assert refused.code == 2
    assert f"--program own.py:{name}" in refused.err.replace("\n", " ")
    drawn = say(f"sample runs/{name.lower()}-trial Ancestral --program own.py:{name} --num-draws 3 --json")
    assert drawn.facts["sites"]["x"] == [2]


def test_numbers_far_from_unit_size_are_named(say: Say, folder: Path) -> None:
    (folder / "heights.csv").write_text("height,dose\n" + "".join(f"{170 + x},{x % 2}\n" for x in range(20)))
    told = say("fit VAE --data heights.csv --num-steps 2 --widths 4")
    assert told.code == 0
    assert "warning: 'height' has mean 180" in told.err
    assert "'dose'" not in told.err


# --- sample, evidence, infer, diagnose, report ---------------------------------------------------------------------


def test_sample_keeps_draws_and_a_picture_and_overwrites_nothing(say: Say, folder: Path) -> None:
    first = say("sample --num-draws 9 runs/vae --seed 1 Ancestral --json").facts
    again = say("sample runs/vae Ancestral --num-draws=9 --seed 1 --json").facts
    assert (first["draws"], again["draws"]) == (
        "runs/vae/draws/Ancestral.nc",
        "runs/vae/draws/Ancestral-2.nc",
    )
    draws = [load(folder / facts["draws"]) for facts in (first, again)]
    assert torch.equal(draws[0]["x"], draws[1]["x"])
    program = load(folder / "runs/vae/program.safetensors")
    expected = infer(program, methods("inference")["Ancestral"](), num_draws=9, seed=1)
    assert torch.equal(draws[0]["x"], expected["x"])
    with Image.open(folder / first["picture"]) as picture:
        assert picture.format == "PNG"


def test_sample_of_a_function_of_ones_own(say: Say, folder: Path) -> None:
    told = say("sample own.py:constant Ancestral --num-draws 5")
    assert told.code == 0
    assert load(folder / "runs/constant/draws/Ancestral.nc")["count"].shape == (1, 5, 3)


def test_sample_takes_the_fields_of_the_engine(say: Say) -> None:
    told = say(
        "sample runs/scoresde-trial DDIM --steps 3 --eta 0.5 --grid Power(3) --no-compile --num-draws 5 --json"
    )
    assert told.facts["engine"] == "DDIM(steps=3, eta=0.5, grid=Power(exponent=3))"
    assert told.facts["num_draws"] == 5
    assert "picture" not in told.facts


def test_evidence_shows_how_far_it_is_unless_told_to_be_quiet(
    say: Say, monkeypatch: pytest.MonkeyPatch
) -> None:
    shown: list[bool] = []
    command = importlib.import_module("probgen.cli.commands.evidence")
    estimate = command.evidence

    @functools.wraps(estimate)
    def watched(*args: Any, progress: bool, **options: Any) -> Any:
        shown.append(progress)
        return estimate(*args, progress=progress, **options)

    monkeypatch.setattr(command, "evidence", watched)
    told = [say(f"evidence runs/vae ELBOEstimate --data digits --rows 3 {flag}") for flag in ("", "--quiet")]
    assert shown == [True, False]
    assert told[1].err == ""


def test_evidence_is_kept_as_json(say: Say, folder: Path) -> None:
    told = say("evidence runs/vae ELBOEstimate --data digits --rows 7 --num-particles 2 --json")
    kept = json.loads((folder / told.facts["evidence"]).read_text())
    assert kept["estimator"] == "ELBOEstimate(num_particles=2)"
    assert (kept["num_data"], kept["levels"], kept["kind"]) == (7, 17, "lower bound")
    assert kept["mean"] == told.facts["mean"]
    assert "log p(x):" in say("evidence runs/scoresde-trial ODELikelihood --data trial.csv --rows 3").out


def test_infer_draws_the_latents_of_a_fitted_run(say: Say) -> None:
    told = say("infer runs/vae Guide --data digits --rows 2 --num-draws 20")
    assert told.code == 0
    assert "z[1, 0]" in told.out
    assert "runs/vae/draws/Guide.nc" in told.out


def test_infer_gives_columns_to_arguments_and_sites_of_a_function(say: Say, folder: Path) -> None:
    told = say(
        "infer own.py:regression NUTS --data trial.csv --num-draws 30 --num-warmup 30 --num-chains 2 --json"
    )
    assert told.facts["run"] == "runs/regression-trial-nuts"
    assert told.facts["sites"] == {"slope": [], "noise": []}
    posterior = load(folder / "runs/regression-trial-nuts/posterior.nc")
    assert isinstance(posterior, Posterior)
    assert abs(float(posterior["slope"].median()) - 0.5) < 0.1
    judged = say("diagnose runs/regression-trial-nuts/posterior.nc --sites slope --json").facts
    assert list(judged["table"]) == ["slope"]
    assert set(judged) == {"ok", "problems", "notes", "table"}


def test_a_column_may_be_a_site_alone(say: Say) -> None:
    command = "infer own.py:constant NUTS --data counts.csv --num-draws 3 --num-warmup 20 --num-chains 2 --run runs/c"
    told = say(command)
    assert (told.code, "rate: scalar" in told.out) == (0, True)


def test_report_says_where_it_is(say: Say, folder: Path) -> None:
    told = say("report runs/vae")
    assert told.out == "runs/vae/report.html\n"
    assert (folder / "runs/vae/report.html").stat().st_size > 1000


def test_json_holds_no_nan(say: Say, folder: Path) -> None:
    (folder / "nan.py").write_text(
        "import pyro, torch\nimport pyro.distributions as dist\n"
        "def flat():\n    pyro.sample('x', dist.Delta(torch.tensor(1.0)))\n"
    )
    draws = say("sample nan.py:flat Ancestral --num-draws 3 --json").facts["draws"]
    told = say(f"diagnose {draws} --json")
    assert "NaN" not in told.out
    assert told.code == 0


@pytest.mark.parametrize("content", ["[1]", "{", '{"program": "own.py:Heights", "settings": {"width": 4}}'])
def test_a_command_file_that_was_changed_is_refused(say: Say, folder: Path, content: str) -> None:
    run = folder / "runs/damaged"
    shutil.copytree(folder / "runs/vae", run, dirs_exist_ok=True)
    (run / "command.json").write_text(content)
    told = say("sample runs/damaged Ancestral --num-draws 2")
    assert told.code == 2
    assert "command.json" in told.err
    assert "not an error that was foreseen" not in told.err


def test_no_code_is_run_because_a_run_folder_names_it(say: Say, folder: Path) -> None:
    run = folder / "runs/strange"
    shutil.copytree(folder / "runs/vae", run, dirs_exist_ok=True)
    (run / "command.json").write_text('{"program": "vicious.py:Name"}')
    (folder / "vicious.py").write_text("open('opened', 'w')")
    assert say("sample runs/strange Ancestral --num-draws 2").code == 2
    assert not (folder / "opened").exists()


# --- doctor --------------------------------------------------------------------------------------------------------


def test_doctor_names_versions_and_the_machine(say: Say) -> None:
    told = say("doctor --json")
    found = {finding["name"]: finding["found"] for finding in told.facts["findings"]}
    assert found["torch"] == torch.__version__
    assert {"python", "arviz", "cores", "gpu", "disk", "lightning-fabric"} <= set(found)
    assert told.code == int(not told.facts["ok"])
    assert not [finding for finding in told.facts["findings"] if "import" in finding["problem"]]


def test_doctor_sees_what_is_wrong(say: Say, monkeypatch: pytest.MonkeyPatch) -> None:
    there = {"arviz-plots": "0.8.1", "matplotlib": "3.11.2", "numpy": "2.4", "torch": "2.1.0"}
    monkeypatch.setattr(doctor, "installed", there.get)
    problems = [finding.problem for finding in doctor.clashes()]
    assert any("pip install 'arviz-plots!=0.8.*'" in problem for problem in problems)
    assert any("needs numpy < 2" in problem for problem in problems)
    monkeypatch.setattr(
        doctor, "requires", lambda _: ["torch>=99", "not-there-at-all", "pytest; extra == 'test'"]
    )
    told = say("doctor")
    assert told.code == 1
    assert "torch: " + torch.__version__ + "\n  probgen needs >=99: pip install" in told.out
    assert "not-there-at-all: missing" in told.out


# --- where things are printed --------------------------------------------------------------------------------------


def probgen(folder: Path, *words: str) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "probgen.cli", *words]
    return subprocess.run(command, capture_output=True, text=True, check=False, cwd=folder, env=environment)


def test_stdout_is_clean_when_piped(folder: Path) -> None:
    command = ["evidence", "runs/vae", "ELBOEstimate", "--data", "digits", "--rows", "3"]
    told = probgen(folder, *command, "--json")
    assert json.loads(told.stdout)["num_data"] == 3
    assert told.stdout.count("\n") == 1
    assert told.stderr.startswith("Next:")
    assert "\x1b" not in told.stdout + told.stderr


def test_what_programs_print_goes_to_stderr(say: Say, folder: Path) -> None:
    (folder / "loud.py").write_text(OWN + "\nprint('hear me')\n")
    told = say("sample loud.py:constant Ancestral --num-draws 2 --json")
    assert told.facts["num_draws"] == 2
    assert "hear me" in told.err


def test_list_as_json(say: Say) -> None:
    facts = say("list --json").facts
    assert facts["engines"]["NUTS"]["paper"].endswith("arXiv 1111.4246")


def test_quiet_is_the_result_alone(say: Say) -> None:
    told = say("sample runs/vae Ancestral --num-draws 2 --quiet")
    assert told.out.startswith("1 x 2 draws by Ancestral")
    assert told.err == ""


@pytest.mark.slow
def test_ctrl_c_says_how_to_go_on(folder: Path) -> None:
    command = [
        sys.executable,
        "-m",
        "probgen.cli",
        *["fit", "VAE", "--data", "digits", "--num-steps", "100000", "--run", "runs/long"],
    ]
    with subprocess.Popen(
        command, cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as child:
        while not (folder / "runs/long/log.jsonl").exists():
            time.sleep(0.1)
        child.send_signal(2)
        out, err = child.communicate(timeout=60)
    assert child.returncode == 130
    assert "Traceback" not in err
    assert "same call" in err
    assert "steps" in out


# --- wrong words ---------------------------------------------------------------------------------------------------

WRONG = [
    ("fit", "expected PROGRAM, got none of them"),
    ("fit VAE", "arguments are required: --data"),
    ("fit VAE --data", "expected one argument"),
    ("fit VEA --data digits", "'VEA' is not a program of probgen; did you mean 'VAE'?"),
    ("fit NUTS --data digits", "NUTS is an engine, and a program was expected"),
    ("fit GaussianMixture --data digits", "needs more than the shape of the data"),
    ("fit Pretrained --data digits", "needs more than the shape of the data"),
    ("fit VAE --data digit", "no data 'digit'"),
    ("fit VAE --data bad.csv", "'bad.csv', line 2, column 'b': expected a finite number, got 'x'"),
    ("fit VAE --data digits --columns a", "--columns picks columns of a table"),
    ("fit VAE --data trial.csv --columns dos", "no column 'dos'; did you mean 'dose'?"),
    ("fit VAE --data digits --rows 0", "--rows must be an integer >= 1, got 0"),
    ("fit VAE --data digits --num-step 3", "no option --num-step; did you mean '--num-steps'?"),
    ("fit VAE --data digits --num-steps three", "--num-steps: expected an integer, got 'three'"),
    ("fit VAE --data digits --num-steps -3", "num_steps must be"),
    ("fit VAE --data digits --lr fast", "--lr: expected a number, got 'fast'"),
    ("fit VAE --data digits --lr -1", "lr must be"),
    ("fit VAE --data digits --lr nan", "lr must be"),
    ("fit VAE --data digits --schedule square", "expected 'constant' or 'cosine', got 'square'"),
    ("fit VAE --data digits --betas 0.9,a", "--betas: expected a number"),
    (
        "fit VAE --data digits --objective ELBOW",
        "'ELBOW' is not an objective of probgen; did you mean 'ELBO'?",
    ),
    ("fit VAE --data digits --objective ConditionalFlowMatching --run runs/w", "ConditionalFlowMatching"),
    ("fit VAE --data digits --latent-dim 0", "must be an integer"),
    ("fit DDPM --data digits --process VPP", "probgen has no 'VPP'; did you mean 'VP'?"),
    ("fit DDPM --data digits --process VP(beta_mix=1)", "spells nothing"),
    ("fit DDPM --data digits --process __import__('os')", "probgen has no '__import__'"),
    ("fit DDPM --data digits --condition Labels(3)", "labels"),
    ("fit VAE --data digits --run own.py", "own.py"),
    ("fit nowhere.py:Name --data digits", "no file 'nowhere.py'"),
    (
        "fit broken.py:Name --data digits",
        "broken.py cannot be run: ZeroDivisionError: division by zero (line 3)",
    ),
    ("fit own.py:Hights --data digits", "has no 'Hights'; did you mean 'Heights'?"),
    ("fit nowhere.at.all:Name --data digits", "module 'nowhere.at.all' cannot be imported"),
    ("fit own.py:wants_more --data trial.csv --objective ELBO", "arguments are required: --secret"),
    ("sample runs/vae", "expected RUN ENGINE, got runs/vae"),
    ("sample runs/nothing Ancestral", "'runs/nothing' is no run folder"),
    ("sample runs/vae Ancestrall", "did you mean 'Ancestral'?"),
    ("sample runs/vae DDIM", "DDIM cannot serve VAE"),
    ("sample own.py:Heights Ancestral", "Heights wants the shape of one datum"),
    ("sample runs/vae Ancestral --steps 3", "no option --steps"),
    ("sample runs/scoresde-trial DDIM --steps 0", "steps must be"),
    ("sample runs/scoresde-trial DDIM --eta 2", "eta must"),
    ("sample runs/scoresde-trial DDIM --grid carras", "did you mean 'karras'?"),
    ("sample runs/scoresde-trial DDIM --compile=yes", "ignored explicit argument 'yes'"),
    ("sample runs/vae Ancestral --num-draws 1.5", "expected an integer, got '1.5'"),
    ("sample runs/vae Ancestral --num-draws 0", "num_draws must be"),
    ("sample runs/vae Ancestral --seed -1", "seed"),
    ("infer runs/vae NUTS", "arguments are required: --data"),
    ("infer runs/vae Ancestral --data digits --rows 2", "Ancestral draws without conditioning"),
    (
        "infer own.py:regression NUTS --data counts.csv",
        "regression is called with dose, and the data have count",
    ),
    ("infer own.py:constant NUTS --data trial.csv", "dose"),
    ("infer runs/vae NUTS --data trial.csv", "expected shape (n, 1, 8, 8), got (20, 2)"),
    ("evidence runs/vae ELBO --data digits", "ELBO is an objective, and an estimator was expected"),
    ("evidence runs/vae ODELikelihood --data digits", "ODELikelihood cannot serve VAE"),
    ("diagnose trial.csv", "load reads programs"),
    ("diagnose nowhere.nc", "nowhere.nc"),
    ("diagnose runs/vae/program.safetensors", "holds a program, not draws"),
    ("report runs/nothing", "runs/nothing"),
    ("report runs/vae extra", "expected RUN, got runs/vae extra"),
    ("doctor please", "expected options alone, got please"),
    ("doctor --jsn", "no option --jsn"),
]


@pytest.mark.parametrize(("command", "hint"), WRONG, ids=[command for command, _ in WRONG])
def test_wrong_words_get_one_paragraph_within_a_second(say: Say, command: str, hint: str) -> None:
    started = time.process_time()
    told = say(command)
    assert time.process_time() - started < 1.0
    assert told.code == 2
    assert told.out == ""
    paragraph = told.err.replace("\n", " ")
    assert hint in paragraph
    assert "\n\n" not in told.err
    assert "not an error that was foreseen" not in paragraph


# --- options -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("folder_name", ["models", "objectives", "inference", "evidence"])
def test_every_argument_of_every_method_is_an_option_with_its_documentation(folder_name: str) -> None:
    for name, method in methods(folder_name).items():
        parser = Parser(f"x {name}", "")
        parser.take(method, name)
        for parameter in parameters(method):
            assert f"--{parameter.name.replace('_', '-')}" in parser.format_help(), (name, parameter)
            assert parameter.text, (name, parameter)


def test_help_shows_the_arguments_of_the_docstring(say: Say) -> None:
    told = say("sample runs/vae ReverseSDE --help")
    assert told.code == 0
    assert "--stochasticity NUMBER" in told.out
    assert "(500)" in told.out
    for command in (
        "fit",
        "fit DDPM",
        "sample",
        "infer",
        "evidence",
        "diagnose",
        "report",
        "doctor",
        "demo",
        "list",
    ):
        told = say(f"{command} --help")
        assert (told.code, told.err) == (0, "")
        assert told.out.startswith(f"usage: probgen {command.split()[0]}")
