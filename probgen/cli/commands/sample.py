"""`probgen sample RUN ENGINE`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from probgen import infer
from probgen.cli.drawing import Source, facts_of, keep, lines
from probgen.cli.naming import method
from probgen.cli.options import Parser
from probgen.cli.words import Answer
from probgen.core import InputError
from probgen.discovery import methods

_ABOUT = (
    "Draw from a program by an engine (probgen list engines). RUN is a run folder of fit, or a program of yours, "
    "file.py:Name; the draws are kept in RUN/draws, with a picture where they are images."
)


@dataclass(frozen=True)
class Asked:
    """What is drawn.

    Args:
        num_draws: draws in each chain, of each label.
        labels: classes to draw, apart by commas, for a program that is conditioned on labels.
        program: where a program of your own is found, file.py:Name; its run folder holds the weights alone.
    """

    num_draws: int = 100
    labels: tuple[int, ...] | None = None
    program: str | None = None


def run(words: Sequence[str], *, progress: bool) -> Answer:
    """Draw, keep and show."""
    parser = Parser("sample RUN ENGINE", _ABOUT)
    parser.take(Asked, "sample")
    parser.take(infer, "infer", ("num_chains", "seed", "devices"))
    name, engine_name = parser.names(words, methods("inference").values())
    engine = method("inference", engine_name)
    parser.take(engine, engine.__name__)
    values = parser.values(words)
    asked = Asked(**values["sample"])
    source = Source(name, asked.program)
    program = source.program()
    posterior = infer(
        program,
        engine(**values[engine.__name__]),
        args=_condition(asked, program),
        num_draws=asked.num_draws,
        progress=progress,
        **values["infer"],
    )
    folder = source.folder
    kept = keep(posterior, folder / "draws", engine.__name__)
    advice = ["Next:", *[f"  probgen report {folder}"] * source.is_run, f"  probgen diagnose {kept['draws']}"]
    return Answer(f"{posterior}\n{lines(kept)}", {"run": str(folder), **facts_of(posterior), **kept}, advice)


def _condition(asked: Asked, program: object) -> tuple[torch.Tensor, ...]:
    if asked.labels is None:
        return ()
    if getattr(program, "condition", None) is None:
        raise InputError(
            f"--labels: {type(program).__name__} is not conditioned on anything. Fit it with --condition 'Labels(10)'."
        )
    return (torch.tensor(asked.labels),)
