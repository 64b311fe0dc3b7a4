"""Programs and posteriors come back from their files as they were, and nothing else comes out of a file."""

import builtins
import copy
import importlib
import inspect
import json
import math
import pkgutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

import probgen.models
from probgen import (
    DDPM,
    ELBO,
    HMC,
    VAE,
    VE,
    VP,
    Ancestral,
    Batch,
    ConditionalVAE,
    DataSets,
    Energy,
    FlowMatching,
    GaussianChain,
    GaussianMixture,
    ImportanceWeighted,
    Labels,
    NeuralSDE,
    OTPath,
    Pair,
    Power,
    ScoreSDE,
    SemiSupervisedVAE,
    TimeMLP,
    UNet,
    Vector,
    evidence,
    fit,
    infer,
)
from probgen.arviz_io import to_arviz
from probgen.core import (
    Cost,
    DamagedFile,
    Energetic,
    Estimate,
    FileError,
    InputError,
    Pairwise,
    Posterior,
    ScoreOnly,
    Terms,
)
from probgen.diagnostics.summary import example as example_posterior
from probgen.diagnostics.summary import summary
from probgen.files import write_tensors
from probgen.models.vae import (
    BernoulliLikelihood,
    FittedPrior,
    GaussianLikelihood,
    MixturePrior,
    point_posterior,
)
from probgen.nets import MLP, Classifier
from probgen.recorded import _NAMEABLE, Recorded, from_plain, to_plain
from probgen.saving import load, save
from test_files import MANY, refusals, small_disk

MODELS = [module.name for module in pkgutil.iter_modules(probgen.models.__path__)]


def small() -> TimeMLP:
    return TimeMLP((2,), width=8, num_blocks=1)


def fitted(program: Any) -> Any:
    """Weights that no constructor gives."""
    with torch.no_grad():
        for parameter in program.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return program


VARIANTS: dict[str, Any] = {
    "vae, learned prior": lambda: VAE.mlp(
        (4,), 2, (8,), likelihood=BernoulliLikelihood(), prior=MixturePrior(2, 3)
    ),
    "vae, latent diffusion": lambda: VAE.mlp((4,), 2, (8,), prior=FittedPrior(ScoreSDE(small(), VE()))),
    "autoencoder": lambda: VAE.mlp((2, 2), 2, (8,), posterior=point_posterior),
    "vae, one scale a pixel": lambda: VAE.mlp(
        (1, 2, 2), 2, (8,), likelihood=GaussianLikelihood(0.1, (1, 2, 2))
    ),
    "semi-supervised": lambda: SemiSupervisedVAE.mlp((4,), 2, 3, (8,), label_weight=0.5),
    "activation": lambda: VAE(
        (4,), 2, probgen.nets.GaussianMLP((4,), (2,), (8,), nn.GELU), MLP((2,), (4,), ())
    ),
    "unet, labels": lambda: DDPM(
        UNet((1, 4, 4), (4, 8), condition=Labels(3)), VP(beta_max=9.0), 4, prediction="v"
    ),
    "vector": lambda: ScoreSDE(TimeMLP((2,), 8, 1, condition=Vector((3, 1))), VE(), condition_dropout=0.5),
    "any network of shapes": lambda: DDPM(small(), num_steps=4, event_shape=(2,), last_step="x0hat"),
    "p_init, a program": lambda: FlowMatching(small(), OTPath(), p_init=GaussianMixture.example()),
    "p_init, data": lambda: FlowMatching(small(), p_init=torch.randn(6, 2), paired=True),
    "grid": lambda: NeuralSDE(small(), num_steps=8, grid=Power(1.5), diffusion=0.7),
    "float64": lambda: DDPM(small(), num_steps=4).double(),
    "bfloat16": lambda: VAE.mlp((4,), 2, (8,)).bfloat16(),
    "evaluation": lambda: DDPM(TimeMLP((2,), 8, 1, condition=Labels(2)), num_steps=4).eval(),
    "oracle, float32": lambda: GaussianMixture.example().float(),
    "chain": lambda: GaussianChain.example(num_steps=5),
    "a network alone": lambda: Classifier((1, 8, 8), width=4),
}


def same(first: nn.Module, second: nn.Module) -> None:
    """Class, structure, settings and every bit of every tensor agree."""
    assert str(first) == str(second)
    assert first.training == second.training
    states = [dict(program.named_parameters()) | dict(program.named_buffers()) for program in (first, second)]
    assert states[0].keys() == states[1].keys()
    for name, value in states[0].items():
        assert value.dtype == states[1][name].dtype, name
        assert torch.equal(value, states[1][name]), name


def outputs(program: Any) -> dict[str, Tensor]:
    """What the program draws, its sites by name."""
    condition = getattr(program, "condition", None)
    c = condition.draw(3) if condition is not None else None
    if isinstance(program, ConditionalVAE):
        c = torch.tensor([0, 1, 2])
    torch.manual_seed(0)
    trace = pyro.poutine.trace(program.model).get_trace(Batch(condition=c, num_rows=3))
    return {name: site["value"] for name, site in trace.nodes.items() if site["type"] == "sample"}


# --- programs --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", MODELS)
def test_every_program_comes_back(name: str, tmp_path: Path) -> None:
    program = fitted(importlib.import_module(f"probgen.models.{name}").example())
    save(program, tmp_path / "a.safetensors")
    again = load(tmp_path / "a.safetensors")
    assert type(again) is type(program)
    same(program, again)
    if not isinstance(program, (Energetic, Pairwise, ScoreOnly)):  # which nobody draws forwards
        torch.manual_seed(1)
        first = outputs(program)
        torch.manual_seed(1)
        for site, value in outputs(again).items():
            assert torch.equal(value, first[site]), site


@pytest.mark.parametrize("make", VARIANTS.values(), ids=VARIANTS)
def test_settings_come_back(make: Any, tmp_path: Path) -> None:
    program = fitted(make())
    save(program, tmp_path / "a.safetensors")
    same(program, load(tmp_path / "a.safetensors"))


def test_a_fitted_program_draws_the_same_after_loading(tmp_path: Path) -> None:
    """Constants set from data, as the analytic variance of a DDPM, included."""
    ddpm = DDPM(small(), num_steps=10)
    fit(ddpm, torch.randn(50, 2), ELBO(), num_steps=5, progress=False)
    save(ddpm, tmp_path / "a.safetensors")
    again = load(tmp_path / "a.safetensors")
    assert isinstance(again, DDPM)
    assert bool((again.x0_variance > 0).all())
    draws = [infer(program, Ancestral(), num_draws=20)["x"] for program in (ddpm, again)]
    assert torch.equal(*draws)


def test_copies_and_averages_can_be_saved(tmp_path: Path) -> None:
    ddpm = fitted(DDPM(small(), num_steps=4))
    for program in (copy.deepcopy(ddpm), copy.copy(ddpm), AveragedModel(ddpm).module):
        save(program, tmp_path / "a.safetensors")
        same(ddpm, load(tmp_path / "a.safetensors"))


def test_parts_that_were_replaced_are_saved_as_they_are(tmp_path: Path) -> None:
    vae = VAE.mlp((4,), 2, (8,))
    vae.prior = FittedPrior(DDPM(small(), num_steps=4))
    save(fitted(vae), tmp_path / "a.safetensors")
    same(vae, load(tmp_path / "a.safetensors"))


def test_loading_leaves_the_random_stream_alone(tmp_path: Path) -> None:
    save(DDPM(small(), num_steps=4), tmp_path / "a.safetensors")
    before = torch.get_rng_state()
    load(tmp_path / "a.safetensors")
    assert torch.equal(before, torch.get_rng_state())


def test_the_default_dtype_does_not_matter(tmp_path: Path) -> None:
    ddpm = DDPM(small(), num_steps=4)
    save(ddpm, tmp_path / "a.safetensors")
    try:
        torch.set_default_dtype(torch.float64)
        same(ddpm, load(tmp_path / "a.safetensors"))
    finally:
        torch.set_default_dtype(torch.float32)


PLAIN = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False)
    | st.text()
    | st.just(torch.float64),
    lambda inner: (
        st.lists(inner) | st.lists(inner).map(tuple) | st.dictionaries(st.text() | st.integers(), inner)
    ),
)


@given(PLAIN)
@settings(max_examples=50, deadline=None)
def test_plain_values_survive_json(value: Any) -> None:
    text = json.dumps(to_plain(value, keep=lambda _: ""), allow_nan=False)
    found = from_plain(json.loads(text), {})
    assert found == value
    assert repr(found) == repr(value)


def test_constructors_show_their_own_arguments() -> None:
    assert list(inspect.signature(VAE).parameters)[:4] == ["event_shape", "latent_dim", "encoder", "decoder"]
    assert list(inspect.signature(DDPM).parameters)[:3] == ["network", "process", "num_steps"]


def test_names_that_files_may_use_are_unique() -> None:
    kinds = [kind for kind in _subclasses(Recorded) if kind.__module__.startswith("probgen.")]
    assert len({kind.__name__ for kind in kinds}) == len(kinds)
    assert all(_NAMEABLE[kind.__name__] is kind for kind in kinds)


def _subclasses(kind: type) -> Iterator[type]:
    for child in kind.__subclasses__():
        yield child
        yield from _subclasses(child)


# --- programs of others ----------------------------------------------------------------------------------------------


class Mine(nn.Module):
    def __init__(self, width: int = 3) -> None:
        super().__init__()
        self.layer = nn.Linear(2, width)
        self.tied = self.layer
        self.register_buffer("mean", torch.randn(2))


def changed_setting() -> nn.Module:
    program = DDPM(small(), num_steps=4)
    program.condition_dropout = 0.7
    return program


def changed_head() -> nn.Module:
    program = VAE.mlp((4,), 2, (8,))
    program.posterior = point_posterior
    return program


def tied() -> nn.Module:
    program = VAE.mlp((2,), 2, ())
    program.decoder.layers[0].bias = nn.Parameter(torch.zeros(2))
    program.decoder.layers[0].weight = program.encoder.mlp.layers[0].weight
    return program


def other_shape() -> nn.Module:
    program = DDPM(small(), num_steps=4)
    program.network.embed = nn.Linear(2, 8, bias=False)
    return program


class MyDDPM(DDPM):
    pass


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (Mine, "Mine is not one of probgen's own"),
        (lambda: MyDDPM(small(), num_steps=4), "MyDDPM is not one"),
        (lambda: DDPM(nn.Identity(), num_steps=4, event_shape=(2,)), "Identity is not one"),
        (lambda: Energy(lambda x: x.sum(-1), (2,)), "<lambda> is not one"),
        (lambda: Pair(Mine()), "Pair is not one"),
        (changed_setting, "condition_dropout"),
        (changed_head, "posterior"),
        (tied, "decoder.layers.0.weight"),
        (other_shape, "network.embed.bias"),
    ],
)
def test_programs_of_others_are_loaded_into_one(make: Any, reason: str, tmp_path: Path) -> None:
    program = fitted(make())
    save(program, tmp_path / "a.safetensors")
    with pytest.raises(InputError, match=rf"(?s){reason}.*load\(path, into=program\)"):
        load(tmp_path / "a.safetensors")
    again = make()
    assert load(tmp_path / "a.safetensors", into=again) is again
    same(program, again)


def test_weights_that_do_not_fit_are_all_named_and_nothing_is_changed(tmp_path: Path) -> None:
    save(Mine(), tmp_path / "a.safetensors")
    other = Mine(4)
    other.layer.bias = nn.Parameter(torch.zeros(4, dtype=torch.float64))
    other.extra = nn.Parameter(torch.ones(1))
    del other.mean
    before = copy.deepcopy(other)
    with pytest.raises(InputError) as caught:
        load(tmp_path / "a.safetensors", into=other)
    for part in (
        "missing in the file: extra",
        "unknown to the program: mean",
        "layer.weight is float32 (4, 2) in the program, float32 (3, 2) in the file",
        "layer.bias is float64 (4,) in the program, float32 (3,) in the file",
    ):
        assert part in str(caught.value)
    same(before, other)


def test_what_cannot_be_saved_says_so(tmp_path: Path) -> None:
    def half_seen() -> None:
        pyro.sample("x", dist.Normal(pyro.param("w", torch.zeros(())), 1.0))

    for thing, message in (
        (half_seen, r"half_seen is a function.*pyro\.param"),
        (nn.LazyLinear(3), "no values yet at weight, bias"),
        (nn.Linear(2, 2, device="meta"), "no values yet"),
    ):
        with pytest.raises(InputError, match=message):
            save(thing, tmp_path / "a.safetensors")  # type: ignore[arg-type]
    for thing, path in ((nn.Linear(2, 2), "a.pt"), (nn.Linear(2, 2), "a.nc"), (example_posterior(), "a.pkl")):
        with pytest.raises(InputError, match="must end in"):
            save(thing, tmp_path / path)
    assert not list(tmp_path.iterdir())


# --- files that mean harm --------------------------------------------------------------------------------------------


def forged(path: Path, recipe: Any, tensors: dict[str, Tensor] | None = None) -> Path:
    """A file whose checksums are right, whatever it asks for."""
    facts = {"format": "probgen program 1", "program": "?", "training": True, "recipe": recipe}
    write_tensors(path / "forged.safetensors", tensors or {}, facts)
    return path / "forged.safetensors"


def made(name: str, **arguments: Any) -> dict[str, Any]:
    return {"made": [name, arguments]}


HARMFUL = [
    *(
        made(name)
        for name in ("os:system", "os.system", "probgen.files:write_bytes", "../evil", "eval", "print")
    ),
    *(
        made(name)
        for name in ("__import__", "__class__", "Linear", "torch.nn.Linear", "Posterior", "object", "")
    ),
    *(
        {"named": name}
        for name in ("write_bytes", "eval", "load_network", "_read_folder", "torch.load", "VP")
    ),
    *({"activation": name} for name in ("Module", "Linear", "Sequential", "SiLU")),
    made("Energy", function={"named": "system"}, event_shape={"tuple": [2]}),
    made("Energy", function={"named": "torch.load"}, event_shape={"tuple": [2]}),
    made("Scheduled", schedule={"named": "eval"}),
    made("VP", __class__={"named": "VP"}),
    made("MLP", in_shape=[2], out_shape=[2], activation={"dtype": "float32"}),
    made("MLP", in_shape=[2], out_shape=[2], activation={"named": "gaussian_posterior"}),
    made("MLP", self=1, in_shape=[2], out_shape=[2]),
    made("gaussian_posterior", loc=1, scale=1),
    {"dtype": "load"},
    {"tensor": "../../etc/passwd"},
    {"tensor": "absent"},
    {"float": "__import__('os')"},
    {"dict": [[[1], 2]]},
    {"made": ["VP"]},
    {"made": "VP", "named": "VP"},
    {"unheard of": 1},
    {},
    [],
    "DDPM",
    5,
    made("VP"),
]
HUGE = [
    made("MLP", in_shape=[2], out_shape=[2], widths=[10**9]),
    made("MLP", in_shape=[2], out_shape=[2], widths=[10**30]),
    made("MLP", in_shape=[2], out_shape=[2], widths=[1] * 200_000),
    made("TimeMLP", event_shape=[2], width=8, num_blocks=10**9),
    made("UNet", event_shape=[1, 8, 8], widths=[10**6]),
    made("DDPM", network=made("TimeMLP", event_shape=[2], width=8, num_blocks=1), num_steps=10**12),
    made("StandardNormalPrior", latent_dim=10**12),
    made("GaussianLikelihood", shape=[10**6, 10**6]),
]


@pytest.mark.parametrize("recipe", HARMFUL, ids=lambda recipe: json.dumps(recipe)[:60])
def test_files_name_nothing_but_programs(
    recipe: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = forged(tmp_path, recipe)

    def never(*args: Any, **kwargs: Any) -> Any:
        raise AssertionError(f"called with {args}")

    for name in ("eval", "exec", "compile", "open"):
        monkeypatch.setattr(builtins, name, never)
    with pytest.raises(DamagedFile):
        load(path)


@pytest.mark.parametrize("recipe", HUGE, ids=lambda recipe: json.dumps(recipe)[:60])
def test_files_may_not_ask_for_more_than_they_hold(recipe: Any, tmp_path: Path) -> None:
    import resource

    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(DamagedFile, match="cannot be made"):
        load(forged(tmp_path, recipe))
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 200_000  # KiB


def test_deep_nesting_is_refused(tmp_path: Path) -> None:
    recipe: Any = 1
    for _ in range(150):
        recipe = {"tuple": [recipe]}
    with pytest.raises(DamagedFile):
        load(forged(tmp_path, recipe))


def test_tensors_that_escape_are_weights_that_do_not_fit(tmp_path: Path) -> None:
    for name in ("../../etc/passwd", "/etc/passwd", "__class__", "layers.__dict__", "", "0" * 1000):
        path = forged(tmp_path, made("MLP", in_shape=[1], out_shape=[1], widths=[]), {name: torch.zeros(1)})
        with pytest.raises(DamagedFile, match="other weights"):
            load(path)


def test_pickles_and_other_endings_are_never_read(tmp_path: Path) -> None:
    class Bomb:
        def __reduce__(self) -> Any:
            return (pytest.fail, ("a pickle was executed",))

    import pickle

    for ending in (".pt", ".pkl", ".bin", ".zarr", ""):
        path = tmp_path / f"a{ending}"
        path.write_bytes(pickle.dumps(Bomb()))
        with pytest.raises(InputError, match="not|zarr"):
            load(path)
    for ending in (".safetensors", ".nc"):
        path = tmp_path / f"a{ending}"
        path.write_bytes(pickle.dumps(Bomb()))
        with pytest.raises(DamagedFile):
            load(path)
        with pytest.raises(FileError, match="no file|could not be read"):
            load(tmp_path / f"absent{ending}")


def test_a_checkpoint_is_no_program(tmp_path: Path) -> None:
    write_tensors(tmp_path / "a.safetensors", {"w": torch.zeros(1)}, {"step": 3})
    with pytest.raises(DamagedFile, match="is no program"):
        load(tmp_path / "a.safetensors")


@MANY
def test_damaged_programs_are_refused(num: int, tmp_path: Path) -> None:
    save(VAE.mlp((4,), 2, (8,)), tmp_path / "a.safetensors")
    found = refusals(tmp_path / "a.safetensors", load, num)
    print(f"program: {found} of {num:,} damaged files refused")
    assert found == num


def test_a_full_disk_leaves_the_program_that_was_there(tmp_path: Path) -> None:
    path, first = tmp_path / "a.safetensors", fitted(DDPM(small(), num_steps=4))
    save(first, path)
    with small_disk(5_000), pytest.raises(FileError, match=r"a\.safetensors.*bytes.*File too large"):
        save(fitted(DDPM(small(), num_steps=4)), path)
    same(first, load(path))
    assert [file.name for file in tmp_path.iterdir()] == ["a.safetensors"]


# --- posteriors ------------------------------------------------------------------------------------------------------


def same_posterior(first: Posterior, second: Any) -> None:
    assert isinstance(second, Posterior)
    for group in ("draws", "stats", "run_stats"):
        tensors, found = getattr(first, group), getattr(second, group)
        assert list(tensors) == list(found)
        for name, value in tensors.items():
            assert (value.dtype, value.shape) == (found[name].dtype, found[name].shape), name
            assert torch.equal(value.nan_to_num(nan=7.0), found[name].nan_to_num(nan=7.0)), name
    for name in ("kind", "guarantee", "engine", "cost", "dims"):
        assert getattr(first, name) == getattr(second, name), name
    assert {name: list(labels) for name, labels in first.coords.items()} == second.coords
    assert second.target is None


def strange() -> Posterior:
    """Every dtype, and names that netCDF, xarray or ArviZ would not have."""
    draws = {
        "a/b": torch.randn(3, 5, 2),
        "a.b": torch.randn(3, 5),
        "chain": torch.randn(3, 5, dtype=torch.float64),
        "draw": torch.randint(9, (3, 5, 4)),
        "größe \u2603": torch.rand(3, 5) > 0.5,
        "school": torch.randn(3, 5, 2),
        "": torch.randn(3, 5, 1, 1).half(),
        "b16": torch.randn(3, 5).bfloat16(),
        "byte": torch.randint(255, (3, 5, 2), dtype=torch.uint8),
        "none": torch.zeros(3, 5, 0),
        "nan": torch.tensor(math.nan).expand(3, 5),
        "square": torch.randn(3, 5, 2, 2),
        "longer": torch.randn(3, 5, 7),
        ".hidden": torch.randn(3, 5),
        "nul\0": torch.randn(3, 5),
        ".": torch.randn(3, 5),
        "/": torch.randn(3, 5),
        "x" * 3000: torch.randn(3, 5),
    }
    dims: dict[str, tuple[str, ...]] = {
        "a/b": ("school",), "square": ("i", "i"), "longer": ("i",), "byte": ("plate/1",),
        "draw": ("chain",),
    }  # fmt: skip
    return Posterior(
        draws,
        "weighted",
        "exact",
        "Strange(scale=1e-300)",
        Cost(network_calls=2**60, seconds=0.1),
        dims=dims,
        coords={"school": ["north", "süd"], "plate/1": [1, 2], "nobody": [1.5, 2.5]},
        stats={
            "diverging": torch.rand(3, 5) > 0.5,
            "a.b": torch.randn(3, 5),
            "tree": torch.randint(9, (3, 5)),
        },
        run_stats={"step_size": torch.rand(3), "count": torch.tensor(3), "mass": torch.randn(3, 2, 2)},
    )


@pytest.mark.parametrize("make", [example_posterior, strange])
def test_posteriors_come_back(make: Any, tmp_path: Path) -> None:
    posterior = make()
    save(posterior, tmp_path / "a.nc")
    same_posterior(posterior, load(tmp_path / "a.nc"))
    assert [file.name for file in tmp_path.iterdir()] == ["a.nc"]


def test_evidence_comes_back(tmp_path: Path) -> None:
    estimate = Estimate(
        torch.randn(3),
        torch.rand(3),
        "lower bound",
        4,
        trusted=False,
        reason="k-hat",
        levels=16,
        terms=Terms(("a", "b"), torch.randn(2), torch.rand(2)),
        diagnostics={"khat": torch.tensor([math.inf, math.nan, 1.0])},
        cost=Cost(3),
        solver_error=torch.rand(3),
        convention="nats",
    )
    posterior = replace(example_posterior(), evidence=estimate)
    save(posterior, tmp_path / "a.nc")
    found = load(tmp_path / "a.nc")
    assert isinstance(found, Posterior)
    assert found.evidence is not None
    assert str(found.evidence) == str(estimate)
    assert torch.equal(found.evidence.terms.value, estimate.terms.value)  # type: ignore[union-attr]
    assert found.evidence.diagnostics["khat"][0] == math.inf
    assert found.evidence.terms.names == ("a", "b")  # type: ignore[union-attr]


def three() -> None:
    pyro.sample("z", dist.Normal(torch.zeros(3), torch.tensor([1.0, 2.0, 3.0])).to_event(1))


def test_chains_go_on_from_a_file_as_if_never_stopped(tmp_path: Path) -> None:
    engine = HMC(num_steps=3, num_warmup=20)
    whole = infer(three, engine, num_draws=12, num_chains=4)
    save(infer(three, engine, num_draws=5, num_chains=4), tmp_path / "hmc.nc")
    begun = load(tmp_path / "hmc.nc")
    assert isinstance(begun, Posterior)
    assert begun.state.engine == str(engine)
    rest = infer(three, engine, num_draws=7, num_chains=4, state=begun.state)
    assert torch.equal(torch.cat([begun["z"], rest["z"]], 1), whole["z"])
    assert str(summary(begun)) == str(summary(replace(begun, draws={"z": whole["z"][:, :5]})))


def test_states_of_others_are_left_out(tmp_path: Path) -> None:
    save(replace(example_posterior(), state=object()), tmp_path / "a.nc")
    found = load(tmp_path / "a.nc")
    assert isinstance(found, Posterior)
    assert found.state is None


def test_posteriors_of_several_data_sets_come_back(tmp_path: Path) -> None:
    def model() -> None:
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("y", dist.Normal(z, 1.0))

    sets = DataSets({"y": torch.tensor([0.0, 1.0, 2.0])})
    posterior = infer(model, HMC(num_warmup=20), data=sets, num_draws=5, num_chains=4)
    save(posterior, tmp_path / "a.nc")
    same_posterior(posterior, load(tmp_path / "a.nc"))


def test_arviz_reads_what_was_saved(tmp_path: Path) -> None:
    import arviz

    posterior = example_posterior()
    save(posterior, tmp_path / "a.nc")
    data = arviz.from_netcdf(str(tmp_path / "a.nc"))
    assert data.posterior["z"].dims == ("chain", "draw", "school")
    assert list(data.posterior["school"].values) == posterior.coords["school"]
    assert torch.equal(torch.from_numpy(data.posterior["z"].values), posterior["z"])


def test_posteriors_of_others_are_chains(tmp_path: Path) -> None:
    import arviz
    import numpy as np

    values = {"mu": np.random.default_rng(0).normal(size=(4, 10)), "theta": np.zeros((4, 10, 3), dtype=">f4")}
    data = arviz.from_dict(
        posterior=values,
        sample_stats={"diverging": np.zeros((4, 10), dtype=bool)},
        observed_data={"mu": np.zeros(5)},
        dims={"theta": ["school"]},
        coords={"school": ["a", "b", "c"]},
    )
    data.to_netcdf(str(tmp_path / "a.nc"))
    found = load(tmp_path / "a.nc")
    assert isinstance(found, Posterior)
    assert (found.kind, found.guarantee, found.engine) == ("mcmc", "asymptotic", "an unknown sampler")
    assert (found.dims["theta"], found.coords["school"]) == (("school",), ["a", "b", "c"])
    assert (found["mu"].dtype, found["theta"].dtype) == (torch.float64, torch.float32)
    assert found.stats["diverging"].dtype == torch.bool
    assert "theta[b]" in str(summary(found))
    to_arviz(strange_but_ours(), groups=["posterior"]).to_netcdf(str(tmp_path / "b.nc"))
    ours = load(tmp_path / "b.nc")
    assert isinstance(ours, Posterior)
    assert (ours.kind, ours.guarantee, ours.engine) == ("weighted", "exact", "SMC")


def strange_but_ours() -> Posterior:
    return Posterior({"z": torch.randn(2, 8)}, "weighted", "exact", "SMC", Cost())


def test_files_of_others_without_draws_are_refused(tmp_path: Path) -> None:
    import xarray

    xarray.Dataset({"w": ("x", [1.0])}).to_netcdf(tmp_path / "a.nc", engine="h5netcdf")
    with pytest.raises(DamagedFile, match="holds no draws"):
        load(tmp_path / "a.nc")
    with pytest.raises(InputError, match="into= is for programs"):
        load(tmp_path / "a.nc", into=nn.Linear(1, 1))


def test_what_netcdf_cannot_hold_is_named(tmp_path: Path) -> None:
    posterior = strange_but_ours()
    posterior.draws["w"] = torch.zeros(2, 8, dtype=torch.complex64)
    with pytest.raises(InputError, match="'w' is complex"):
        save(posterior, tmp_path / "a.nc")
    assert not list(tmp_path.iterdir())


@MANY
def test_damaged_posteriors_are_refused(num: int, tmp_path: Path) -> None:
    save(example_posterior(), tmp_path / "a.nc")
    found = refusals(tmp_path / "a.nc", load, num)
    print(f"posterior: {found} of {num:,} damaged files refused")
    assert found == num


def test_a_full_disk_leaves_the_posterior_that_was_there(tmp_path: Path) -> None:
    first = strange_but_ours()
    save(first, tmp_path / "a.nc")
    with small_disk(20_000), pytest.raises(FileError, match=r"a\.nc.*bytes.*File too large"):
        save(example_posterior(), tmp_path / "a.nc")
    same_posterior(first, load(tmp_path / "a.nc"))
    assert [file.name for file in tmp_path.iterdir()] == ["a.nc"]


def test_posteriors_of_evidence_engines(tmp_path: Path) -> None:
    """What an estimator found is a plain part of a file too."""
    vae = VAE.mlp((4,), 2, (8,))
    found = evidence(vae, ImportanceWeighted(num_samples=25), data=torch.randn(5, 4))
    posterior = replace(strange_but_ours(), evidence=found)
    save(posterior, tmp_path / "a.nc")
    again = load(tmp_path / "a.nc")
    assert isinstance(again, Posterior)
    assert str(again.evidence) == str(found)
