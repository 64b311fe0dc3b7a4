"""Reports: pages that need nothing else, true to what a run folder holds, whatever state it is in."""

from __future__ import annotations

import base64
import io
import itertools
import re
import shutil
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import nn

from browser import BROWSER, look
from probgen import DDPM, ELBO, MLP, NUTS, VAE, Ancestral, ELBOEstimate, TimeMLP, digits, evidence, fit, infer
from probgen.cli.commands.evidence import facts_of
from probgen.core import Cost, FileError, InputError, Posterior
from probgen.diagnostics.plots import image_grid, plot_history
from probgen.diagnostics.predictive import example as predictive_example
from probgen.diagnostics.predictive import plot_predictive
from probgen.files import write_json
from probgen.report.entries import bounds_of, images_of, judge
from probgen.report.page import Page
from probgen.report.run import report
from probgen.runs import Run
from probgen.saving import save

HOSTILE = '<script>alert("x")</script> & "quoted" <img src=http://example.org/x.png>'
STYLE = Path(__file__).parent.parent / "probgen" / "report" / "page.css"


# --- reading a page ------------------------------------------------------------------------------------------------


class Reader(HTMLParser):
    """Elements in order, with their attributes, and the text of the body."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.words: list[str] = []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        if tag not in ("meta", "link", "img", "br"):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if "style" not in self.open:
            self.words.append(data)

    def all(self, *tags: str) -> list[dict[str, str | None]]:
        return [attributes for tag, attributes in self.elements if tag in tags]

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.words).split())


def read_page(path: Path) -> Reader:
    return Reader(path.read_text(encoding="utf-8"))


def check_page(path: Path) -> Reader:
    """What holds for every page: self-contained, in order, and legible to those who do not see it."""
    text, page = path.read_text(encoding="utf-8"), read_page(path)
    assert page.all("html")[0]["lang"] == "en"
    assert not page.all("script", "iframe", "object", "embed", "form")
    for attributes in page.all("img", "a", "link"):
        target = attributes.get("src") or attributes.get("href") or ""
        assert target.startswith(("data:", "#")), target
    assert "@import" not in text
    assert "url(" not in text
    ids = [attributes["id"] for _, attributes in page.elements if "id" in attributes]
    assert len(ids) == len(set(ids))
    assert {str(a["href"])[1:] for a in page.all("a")} <= set(ids)
    headings = [int(tag[1]) for tag, _ in page.elements if re.fullmatch("h[1-6]", tag)]
    assert headings[0] == 1
    assert headings.count(1) == 1
    assert all(after <= before + 1 for before, after in itertools.pairwise(headings))
    assert len(page.all("table")) == len(page.all("caption"))
    assert all(cell.get("scope") in ("col", "row") for cell in page.all("th"))
    for image in page.all("img"):
        assert len(str(image["alt"])) > 10
        check_image(str(image["src"]))
    return page


def check_image(source: str) -> None:
    kind, _, content = source.partition(";base64,")
    image = base64.b64decode(content, validate=True)
    if kind == "data:image/svg+xml":
        assert image.rstrip().endswith(b"</svg>")
    else:
        assert plt.imread(io.BytesIO(image), format=kind.rpartition("/")[2]).size


# --- the page ------------------------------------------------------------------------------------------------------


@pytest.fixture
def page(tmp_path: Path) -> Page:
    """One of everything, with hostile text wherever text goes."""
    page = Page(HOSTILE, HOSTILE)
    page.problem(f"{HOSTILE} `code {HOSTILE}`")
    section = page.section(HOSTILE)
    section.prose(HOSTILE)
    section.points([HOSTILE])
    section.code(HOSTILE)
    section.missing(HOSTILE, HOSTILE)
    section.facts({HOSTILE: HOSTILE})
    section.figures({HOSTILE: "1.5", "steps": "1,000"})
    section.table(HOSTILE, ["name", "value"], [[HOSTILE, "1.0"], ["b", "-"]])
    section.plot(plot_history({"a": [3.0, 2.0, 1.0]}, tmp_path / "a.svg"), f"falls {HOSTILE}", HOSTILE)
    picture = image_grid(torch.rand(9, 8, 8), tmp_path / "a.png")
    page.section("Pictures").picture(picture, "nine digits", HOSTILE)
    page.section("More").pictures([(picture, "nine digits", HOSTILE)] * 3)
    return page


def test_a_page_is_one_file_that_shows_text_as_text(page: Page, tmp_path: Path) -> None:
    found = check_page(page.write(tmp_path / "report.html"))
    assert found.text.count('<script>alert("x")</script> & "quoted"') == 22  # wherever text went
    assert len(found.all("img")) == 5


def test_numbers_stand_on_the_right_and_names_do_not() -> None:
    page = Page("Table")
    rows = [["a", "1.50", "-", "2 x 100", "none"], ["b", "-3e-05", "12,000", "4 x 1,000", "3"]]
    page.section("Rows").table("Five columns", ["name", "p", "q", "r", "s"], rows)
    classes = [cell.get("class") for cell in Reader(page.html()).all("th") if cell.get("scope") == "col"]
    assert classes == [None, "number", "number", "number", None]


def test_text_that_no_encoding_holds_is_no_reason_to_fail(tmp_path: Path) -> None:
    assert read_page(Page("half a pair \ud800").write(tmp_path / "report.html")).text


def test_only_images_go_into_a_page(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("words")
    with pytest.raises(InputError, match="a.txt"):
        Page("A").section("B").plot(tmp_path / "a.txt", "words")
    with pytest.raises(FileError, match="report.html"):
        Page("A").write(tmp_path / "not there" / "report.html")


def themes() -> Iterator[tuple[str, dict[str, str]]]:
    """The colours of each theme, as the style sheet names them."""
    style = STYLE.read_text(encoding="utf-8")
    light, dark = re.findall(r":root \{([^}]*--alarm-line[^}]*)\}", style)
    for name, block in (("light", light), ("dark", dark)):
        yield name, dict(re.findall(r"--([\w-]+): (#[0-9a-f]{6})", block))


def luminance(colour: str) -> float:
    """WCAG 2.1, relative luminance."""
    parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    red, green, blue = (x / 12.92 if x <= 0.03928 else ((x + 0.055) / 1.055) ** 2.4 for x in parts)
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue


@pytest.mark.parametrize(("theme", "colours"), list(themes()))
def test_text_stands_out_in_both_themes(theme: str, colours: dict[str, str]) -> None:
    """WCAG AA asks for 4.5: ink, soft ink and links on every ground they stand on."""
    pairs = [(ink, ground) for ink in ("ink", "soft", "link") for ground in ("paper", "card", "code")]
    for ink, ground in [*pairs, ("alarm-ink", "alarm"), ("fine-ink", "fine")]:
        low, high = sorted((luminance(colours[ink]), luminance(colours[ground])))
        assert (high + 0.05) / (low + 0.05) >= 4.5, f"{ink} on {ground}, {theme}"


# --- run folders ---------------------------------------------------------------------------------------------------


def seen() -> None:
    z = pyro.sample("z", dist.Normal(0.0, 1.0))
    with pyro.plate("row", 20):
        pyro.sample("y", dist.Normal(z, 1.0))


Y = {"y": torch.linspace(-1.0, 2.0, 20)}


def log_a_fit(path: Path, done: bool = True) -> None:
    """The folder as `fit` leaves it, without the program."""
    with Run(path, "fit", {"num_steps": 40, "seed": 0, "optim": {"lr": 0.001, "name": HOSTILE}}) as run:
        for step in range(1, 41):
            run.log(step=step, loss=40.0 / step, seconds=0.1 * step)
        run.log(step=40, validation=1.5)
        for step in (20, 30, 40):
            run.checkpoints.write(step, {"w": torch.ones(3)}, {})
        if done:
            run.finish(steps=40, seconds=4.0)


@pytest.fixture(scope="module")
def chain_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A DDPM of digits as the command fits it, drawn from and estimated."""
    path = tmp_path_factory.mktemp("runs") / "ddpm"
    ddpm = DDPM(TimeMLP((1, 8, 8), width=8, num_blocks=1), num_steps=8)
    log_a_fit(path)
    save(ddpm, path / "program.safetensors")
    write_json(path / "command.json", {"program": "DDPM", "data": "digits", "options": {"num-steps": "40"}})
    (path / "draws").mkdir()
    save(infer(ddpm, Ancestral(), num_draws=9), path / "draws" / "ancestral.nc")
    (path / "evidence").mkdir()
    found = evidence(ddpm, ELBOEstimate(), digits()[1][torch.arange(8)])
    write_json(path / "evidence" / "elbo.json", {**facts_of(found), "trusted": False, "reason": "Too few."})
    return path


@pytest.fixture(scope="module")
def nuts_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Chains as `infer` leaves them."""
    path = tmp_path_factory.mktemp("runs") / "nuts"
    with Run(path, "infer", {"engine": "NUTS", "num_draws": 50}) as run:
        run.finish(seconds=1.0)
    save(infer(seen, NUTS(num_warmup=50), data=Y, num_draws=50, num_chains=4), path / "posterior.nc")
    return path


def test_a_fitted_chain_is_told_with_all_it_has(chain_run: Path) -> None:
    page = check_page(report(chain_run))
    text = page.text
    for words in (
        "DDPM of digits",
        f"probgen fit DDPM --data digits --num-steps 40 --run {chain_run}",
        "optim.lr 0.001",
        "ancestral: Ancestral; the law is exact.",
        "elbo: Too few.",
        "KL of each step",
        "Whole checkpoints are there of steps 20, 30, 40",
        "draws/ancestral.nc",
    ):
        assert words in text
    assert len(page.all("img")) == 3  # the losses, the grid, the terms
    assert "Nothing that was checked is wrong" not in text
    assert "has not finished" not in text


def test_chains_are_told_with_traces_ranks_and_predictions(nuts_run: Path) -> None:
    text = check_page(report(nuts_run)).text
    for words in ("Inference by NUTS", "Ranks (Vehtari et al. 2021)", "r_hat", "effective sample size is"):
        assert words in text
    assert "report(" in text  # how to see the predictions, which need the program
    known = check_page(report(nuts_run, program=seen, data=Y))
    assert "Posterior predictive of y by posterior" in known.text
    assert len(known.all("img")) == 3


def test_a_program_that_does_not_belong_to_the_draws_is_named(nuts_run: Path) -> None:
    def other() -> None:
        w = pyro.sample("w", dist.Normal(0.0, 1.0))
        pyro.sample("y", dist.Normal(w, 1.0))

    text = check_page(report(nuts_run, program=other, data={"y": torch.zeros(())})).text
    assert "'w'" in text.partition("What was run")[0]


def test_a_program_with_guide_and_decoder_is_shown_at_work(tmp_path: Path) -> None:
    log_a_fit(tmp_path / "vae", done=False)
    save(VAE.mlp((1, 8, 8), latent_dim=2, widths=(8,)), tmp_path / "vae" / "program.safetensors")
    write_json(tmp_path / "vae" / "command.json", {"program": "VAE", "data": "digits", "options": {}})
    text = check_page(report(tmp_path / "vae")).text
    assert "E[x_new | x] under the guide" in text
    assert "The run has not finished: it stopped after step 40 of 40" in text
    assert "Nothing was drawn yet" in text
    assert f"probgen sample {tmp_path / 'vae'} Ancestral" in text
    assert "ReverseSDE" not in text  # which does not serve it
    assert f"probgen evidence {tmp_path / 'vae'} ELBOEstimate --data digits" in text


def test_programs_of_others_take_their_weights_where_they_are_given(tmp_path: Path) -> None:
    class Mine(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = MLP((1,), (1,), (4,))

    log_a_fit(tmp_path / "mine")
    save(Mine(), tmp_path / "mine" / "program.safetensors")
    assert "into=program" in read_page(report(tmp_path / "mine")).text
    page = read_page(report(tmp_path / "mine", program=Mine()))
    assert "into=program" not in page.text
    assert "Mine" in page.text


DAMAGED = [
    "run.json",
    "finished.json",
    "command.json",
    "program.safetensors",
    "draws/ancestral.nc",
    "evidence/elbo.json",
    "checkpoints/00000030.safetensors",
]


@pytest.mark.parametrize("name", DAMAGED)
@pytest.mark.parametrize("how", ["cut", "foreign"])
def test_what_is_damaged_is_named_and_the_rest_is_told(
    name: str, how: str, chain_run: Path, tmp_path: Path
) -> None:
    path = shutil.copytree(chain_run, tmp_path / "run")
    content = (path / name).read_bytes()
    (path / name).write_bytes(content[: len(content) // 2] if how == "cut" else b"[1, 2]")
    page = check_page(report(path))
    assert name.rpartition("/")[2] in page.text.partition("What was run")[0]
    assert len(page.all("img")) >= 1


def test_an_empty_run_says_what_is_missing_and_how_to_make_it(tmp_path: Path) -> None:
    with Run(tmp_path / "bare", "fit", {}):
        pass
    text = check_page(report(tmp_path / "bare")).text
    for words in ("has not finished", "Nothing was logged yet", "Nothing was drawn yet", "No likelihood was"):
        assert words in text


@pytest.mark.parametrize(
    "lines",
    [
        b'{"step": "one", "loss": 1}\n{"step": 2, "loss": NaN}\nhalf a li',
        b'{"step": 1, "loss": "low"}\n[]\n\xff\xfe\n',
        b'{"step": 1, "loss": Infinity, "validation": -Infinity}\n{"step": true, "loss": 2}',
    ],
)
def test_a_log_of_any_kind_is_read(lines: bytes, tmp_path: Path) -> None:
    with Run(tmp_path / "run", "fit", {}) as run:
        (run.path / "log.jsonl").write_bytes(lines)
    check_page(report(tmp_path / "run"))


def test_no_run_is_refused_by_name(tmp_path: Path) -> None:
    for path in (tmp_path, tmp_path / "nowhere"):
        with pytest.raises(FileError, match="no run"):
            report(path)


@pytest.mark.filterwarnings("error")
def test_a_real_fit_is_told(tmp_path: Path) -> None:
    vae = VAE.mlp((1, 8, 8), latent_dim=2, widths=(8,))
    train, held_out = digits()
    fit(vae, train, ELBO(), validation=held_out, num_steps=20, run=tmp_path / "run")
    page = check_page(report(tmp_path / "run"))
    assert "has not finished" not in page.text
    assert "the training loss goes from" in str(page.all("img")[0]["alt"])


# --- parts ---------------------------------------------------------------------------------------------------------


def draws_of(**values: torch.Tensor) -> Any:
    return Posterior(dict(values), "iid", "exact", "hand", Cost())


def test_images_are_told_from_other_draws() -> None:
    found = images_of(
        draws_of(
            grey=torch.rand(2, 5, 1, 8, 8),
            latents=torch.rand(2, 5, 8, 8),
            sets=torch.rand(2, 5, 3, 1, 8, 8),
            colour=torch.rand(2, 5, 3, 6, 9),
            vector=torch.rand(2, 5, 64),
            scalar=torch.rand(2, 5),
            table=torch.rand(2, 5, 10, 3),
            counts=torch.ones(2, 5, 1, 8, 8, dtype=torch.int64),
        )
    )
    shapes = {name: tuple(value.shape) for name, value in found.items()}
    assert shapes == {
        "grey": (10, 1, 8, 8),
        "sets": (30, 1, 8, 8),
        "colour": (10, 3, 6, 9),
    }
    assert bounds_of(torch.rand(9, 1, 8, 8) * 2 - 1) == (-1.0, 1.0)
    assert bounds_of(torch.rand(9, 1, 8, 8))[1] == pytest.approx(1, abs=0.05)


def test_sites_with_many_entries_are_judged_by_some() -> None:
    assert len(judge(draws_of(x=torch.randn(1, 5, 3000), z=torch.randn(1, 5))).table) == 501


def test_predictions_are_drawn_for_numbers_and_counts(tmp_path: Path) -> None:
    observed, predicted = predictive_example()
    assert plot_predictive(observed, predicted, tmp_path / "a.svg").stat().st_size > 1000
    counts = torch.poisson(torch.full((4, 25, 30), 3.0)).long()
    assert plot_predictive(counts[0, 0], counts, tmp_path / "b.svg").stat().st_size > 1000
    with pytest.raises(InputError, match="belong together"):
        plot_predictive(observed, predicted[:, :3], tmp_path / "c.svg")
    with pytest.raises(InputError, match="no finite value"):
        plot_predictive(observed * torch.nan, predicted, tmp_path / "d.svg")


ODD = {
    "NaN": torch.full((4, 20), torch.nan),
    "constant": torch.ones(4, 20, dtype=torch.int64),
    "one draw": torch.randn(1, 1),
    "no entries": torch.zeros(2, 10, 0),
}


@pytest.mark.parametrize("kind", ["mcmc", "iid"])
@pytest.mark.parametrize("name", ODD)
def test_odd_draws_are_told_without_a_traceback(name: str, kind: Any, tmp_path: Path) -> None:
    """Nor with warnings of libraries, which are errors here."""
    with Run(tmp_path / "run", "infer", {}) as run:
        run.finish()
    save(Posterior({"z": ODD[name]}, kind, "exact", "hand", Cost()), run.path / "posterior.nc")
    check_page(report(run.path))


# --- in a browser --------------------------------------------------------------------------------------------------

needs_browser = pytest.mark.skipif(BROWSER is None, reason="no Chromium here")


@needs_browser
@pytest.mark.parametrize("width", [1280, 390])
@pytest.mark.parametrize("theme", ["light", "dark"])
def test_a_browser_shows_it_without_complaint(page: Page, width: int, theme: str, tmp_path: Path) -> None:
    """All images load, nothing is wider than the window, the theme is the reader's, the console stays silent."""
    found = look(page.write(tmp_path / "report.html"), width, theme, tmp_path)
    assert found.console == []
    assert found.broken == []
    assert found.images == 5
    assert found.window == width
    assert found.page <= found.window
    paper = dict(themes())[theme]["paper"]
    assert found.background == f"rgb({', '.join(str(int(paper[i : i + 2], 16)) for i in (1, 3, 5))})"


@needs_browser
def test_a_browser_complains_of_what_is_broken(page: Page, tmp_path: Path) -> None:
    """The same look at a page with a broken image, a picture from elsewhere and a wide block finds all three."""
    path = page.write(tmp_path / "report.html")
    broken = (
        '<img src="data:image/png;base64,AAAA" alt="broken"><img src="http://localhost:9/x.png" alt="elsewhere">'
        '<pre style="width: 3000px">wide</pre></main>'
    )
    path.write_text(path.read_text(encoding="utf-8").replace("</main>", broken), encoding="utf-8")
    found = look(path, 1280, "light", tmp_path)
    assert set(found.broken) == {"broken", "elsewhere"}
    assert any("Content Security Policy" in line for line in found.console)
    assert found.page > found.window
