"""`probgen infer RUN_OR_FILE.py:program ENGINE --data D`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from probgen import Posterior, infer
from probgen.cli.commands.diagnose import judged
from probgen.cli.data import DataOptions, arguments_and_observations
from probgen.cli.drawing import Source, facts_of, keep, lines
from probgen.cli.fitted import slug, write_command
from probgen.cli.naming import method
from probgen.cli.options import Parser
from probgen.cli.words import Answer
from probgen.discovery import methods
from probgen.report.entries import judge
from probgen.runs import POSTERIOR

SHORTEST = 4  # draws of a chain, for a verdict
_ABOUT = (
    "Draw what a program leaves open, given data (probgen list engines). The program is a fitted run, whose draws go "
    "to RUN/draws, or one of yours, file.py:Name or module:Name, whose draws go to a run folder of their own. A Pyro "
    "function is called with the columns or arrays named like its arguments; the others are its observations. The same "
    "call again goes on where chains were stopped."
)


@dataclass(frozen=True)
class Asked:
    """What the command adds.

    Args:
        run: for a program in a file, the run folder; runs/PROGRAM-DATA-ENGINE by default.
        program: for a fitted run, where a program of your own is found, file.py:Name.
    """

    run: str | None = None
    program: str | None = None


def run(words: Sequence[str], *, progress: bool) -> Answer:
    """Draw, keep and judge."""
    parser = Parser("infer RUN_OR_FILE.py:program ENGINE", _ABOUT)
    parser.take(DataOptions, "data")
    parser.take(Asked, "run")
    parser.take(infer, "infer", ("num_draws", "num_chains", "seed", "devices"))
    program_name, engine_name = parser.names(words, methods("inference").values())
    engine = method("inference", engine_name)
    parser.take(engine, engine.__name__)
    values = parser.values(words)
    asked, wanted = Asked(**values["run"]), DataOptions(**values["data"])
    source = Source(program_name, asked.program)
    program = source.program()
    args, data = arguments_and_observations(program, wanted.read("held_out"), values["infer"].get("seed", 0))
    drawn = {"data": data, "args": args, "progress": progress, **values["infer"]}
    if source.is_run:
        posterior = infer(program, engine(**values[engine.__name__]), **drawn)
        folder, kept = program_name, keep(posterior, source.folder / "draws", engine.__name__)
    else:
        folder = asked.run or str(Path("runs", slug(program_name, wanted.data, engine_name)))
        posterior = infer(program, engine(**values[engine.__name__]), run=folder, **drawn)
        kept = {"draws": str(Path(folder, POSTERIOR))}
        write_command(Path(folder), program_name, wanted.data, parser.written(words), engine=engine_name)
    verdict = _judged(posterior)
    facts = {"run": folder, **facts_of(posterior), **verdict.facts, **kept}
    return Answer(f"{verdict.text}\n{lines(kept)}", facts, ["Next:", f"  probgen report {folder}"])


def _judged(posterior: Posterior) -> Answer:
    """The verdict; the draws alone where chains are too short for one."""
    if posterior.kind == "mcmc" and posterior.num_draws < SHORTEST:
        return Answer(str(posterior))
    return judged(judge(posterior))
