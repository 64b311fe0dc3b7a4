"""`probgen evidence RUN ESTIMATOR --data D`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from probgen import Estimate, Quantised
from probgen.cli.data import DataOptions, labels_for, observations
from probgen.cli.drawing import Source
from probgen.cli.fitted import OwnProgram, free_path
from probgen.cli.naming import method
from probgen.cli.options import Parser
from probgen.cli.words import Answer
from probgen.discovery import methods
from probgen.files import write_json
from probgen.verbs import evidence

_ABOUT = (
    "Estimate log p(x) of each datum under a fitted program (probgen list estimators). RUN is a run folder of fit; the "
    "estimate is kept in RUN/evidence. Of data that come in two parts, as digits do, those held out are taken."
)


def run(words: Sequence[str], *, progress: bool) -> Answer:
    """Estimate, keep and tell."""
    parser = Parser("evidence RUN ESTIMATOR", _ABOUT)
    parser.take(DataOptions, "data")
    parser.take(OwnProgram, "run")
    parser.take(evidence, "evidence", ("seed", "levels"))
    folder, name = parser.names(words, methods("evidence").values())
    kind = method("evidence", name)
    parser.take(kind, kind.__name__)
    values = parser.values(words)
    asked, wanted = OwnProgram(**values["run"]), DataOptions(**values["data"])
    estimator = kind(**values[kind.__name__])
    program = Source(folder, asked.program).program()
    data = wanted.read("held_out")
    condition = labels_for(program, data)
    estimate = evidence(
        program,
        estimator,
        data if isinstance(data, Quantised) else observations(data, values["evidence"].get("seed", 0)),
        args=() if condition is None else (condition,),
        progress=progress,
        **values["evidence"],
    )
    path = free_path(Path(folder, "evidence"), kind.__name__, ".json")
    facts = {
        "run": folder,
        "estimator": str(estimator),
        "data": wanted.data,
        **facts_of(estimate),
    }
    write_json(path, facts)
    return Answer(
        f"{estimate}\nevidence: {path}",
        {**facts, "evidence": str(path)},
        ["Next:", f"  probgen report {folder}"],
    )


def facts_of(estimate: Estimate) -> dict[str, Any]:
    """An estimate for programs: what `Estimate` says of itself, sums over the data instead of one value a datum."""
    bits = None if estimate.levels is None else estimate.bits_per_dim()
    terms = None
    if estimate.terms is not None:
        columns = (
            estimate.terms.names,
            estimate.terms.value.tolist(),
            estimate.terms.standard_error.tolist(),
        )
        terms = [{"name": n, "value": v, "standard_error": e} for n, v, e in zip(*columns, strict=True)]
    return {
        "mean": estimate.mean,
        "mean_error": estimate.mean_error,
        "monte_carlo_error": estimate.monte_carlo_error,
        "bits_per_dim": None if bits is None else bits[0],
        "bits_per_dim_error": None if bits is None else bits[1],
        "num_data": estimate.value.numel(),
        "kind": estimate.kind,
        "trusted": estimate.trusted,
        "reason": estimate.reason,
        "levels": estimate.levels,
        "convention": estimate.convention,
        "terms": terms,
        "cost": asdict(estimate.cost),
    }
