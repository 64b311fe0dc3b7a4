"""`probgen fit PROGRAM --data D`."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from probgen import History, Optim, fit
from probgen.cli.data import DataOptions, event_shape, labels_for, warn_of_scale
from probgen.cli.fitted import SETTINGS, make_program, slug, take_settings, write_command
from probgen.cli.naming import is_reference, method
from probgen.cli.options import Parser, value_of
from probgen.cli.words import INTERRUPTED, Answer, UsageError
from probgen.core import Diffusion, Flow, Guided, Pairwise, describe
from probgen.data_files import comes_in_parts
from probgen.discovery import methods
from probgen.report.entries import engines_for

OBJECTIVES: dict[str, type] = {  # by the first of these that a program offers
    "PersistentContrastiveDivergence": Pairwise,
    "ConditionalFlowMatching": Flow,
    "ELBO": Guided,
    "DenoisingScoreMatching": Diffusion,
}
ESTIMATORS = ("AIS", "ELBOEstimate", "ODELikelihood")
_ABOUT = (
    "Fit a program to data, into a run folder. PROGRAM is one of probgen's (probgen list programs), made for the "
    "shape of the data, or one of your own, file.py:Name or module:Name: a program, or a class or function that makes "
    "one. The same call again goes on where a run was stopped."
)


@dataclass(frozen=True)
class Asked:
    """What the command adds.

    Args:
        objective: what is minimised; by default PersistentContrastiveDivergence for Boltzmann machines, then the first
            that serves of ConditionalFlowMatching, ELBO and DenoisingScoreMatching.
        validation: data on which the loss is followed; those in two parts, as digits and MNIST, have them already.
        run: the run folder; runs/PROGRAM-DATA by default.
    """

    objective: str | None = None
    validation: str | None = None
    run: str | None = None


def run(words: Sequence[str], *, progress: bool) -> Answer:
    """Fit, and say what to do next."""
    parser, name, kind, objective = _parser(words)
    values = parser.values(words)
    asked, source = Asked(**values["run"]), DataOptions(**values["data"])
    data = source.read("train")
    warn_of_scale(data)
    program = make_program(kind, event_shape(data), values.get(SETTINGS, {}), values["fit"].get("seed", 0))
    folder = Path(asked.run or Path("runs", slug(name, source.data)))
    again = {"settings": parser.texts(words, SETTINGS), "event_shape": event_shape(data)}
    if not folder.exists():  # so that a run that is killed is known by its command too
        write_command(folder, name, source.data, parser.written(words), **again)
    history = fit(
        program,
        data,
        objective(**values[objective.__name__]),
        condition=labels_for(program, data),
        validation=_validation(asked, source, program),
        optim=Optim(**values["Optim"]),
        run=folder,
        progress=progress,
        **values["fit"],
    )
    write_command(folder, name, source.data, parser.written(words), **again)
    facts = {"run": str(folder), "program": name, "objective": objective.__name__, **_figures(history)}
    if history.interrupted:
        return Answer(str(history), facts, ["Stopped. The same call again goes on from here."], INTERRUPTED)
    unseen = asked.validation or (source.data if comes_in_parts(source.data) else "DATA_IT_HAS_NOT_SEEN")
    unseen += " --binarise" * source.binarise
    return Answer(f"{history}\nrun: {folder}", facts, _next(folder, program, unseen, name))


def _parser(words: Sequence[str]) -> tuple[Parser, str, Any, Any]:
    """The options, the program by its name and as what makes it, and the class of the objective."""
    parser = Parser("fit PROGRAM", _ABOUT)
    parser.take(DataOptions, "data")
    parser.take(Asked, "run")
    parser.take(fit, "fit", ("num_steps", "batch_size", "seed", "devices"))
    parser.take(Optim, "Optim")
    (name,) = parser.names(words, [*methods("models").values(), *methods("objectives").values()])
    kind = method("models", name)
    objective = _objective(kind, value_of("--objective", words))
    parser.take(objective, objective.__name__)
    take_settings(parser, kind)
    return parser, name, kind, objective


def _objective(kind: Any, name: str | None) -> Any:
    """The objective that was named, or that of the first of `OBJECTIVES` that the program offers."""
    if name is not None:
        return method("objectives", name)
    program = kind if isinstance(kind, type) else type(kind)
    for objective, offered in OBJECTIVES.items():
        if issubclass(program, offered):
            return methods("objectives")[objective]
    raise UsageError(
        f"which objective {describe(kind)} is fitted by cannot be told from its class: say it, --objective NAME "
        "(probgen list objectives)."
    )


def _validation(asked: Asked, source: DataOptions, program: Any) -> Any:
    """The data that were named for it, or the second part of data that come in two; None where there are none."""
    if asked.validation is not None:
        held_out = dataclasses.replace(source, data=asked.validation).read("held_out")
    elif comes_in_parts(source.data):
        held_out = source.read("held_out")
    else:
        return None
    condition = labels_for(program, held_out)
    return held_out if condition is None else (held_out, condition)


def _figures(history: History) -> dict[str, Any]:
    """How the fit went, for programs."""
    return {
        "steps": len(history.loss),
        "loss": history.loss[-1] if history.loss else None,
        "unit": history.unit,
        "validation": history.validation[-1][1] if history.validation else None,
        "seconds": history.seconds,
        "interrupted": history.interrupted,
    }


def _next(folder: Path, program: Any, data: str, name: str) -> list[str]:
    known: dict[str, Any] = methods("evidence")
    where = f" --program {name}" if is_reference(name) else ""
    estimator = next((name for name in ESTIMATORS if known[name]().supports(program)), None)
    commands = [f"sample {folder} {engines_for(program)[0]}"]
    commands += [f"evidence {folder} {estimator} --data {data}"] * (estimator is not None)
    return ["Next:", *(f"  probgen {command}{where}" for command in [*commands, f"report {folder}"])]
