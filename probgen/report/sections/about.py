"""What was run: the command, the figures that matter most, the configuration, and whether it is done."""

from __future__ import annotations

import shlex
from collections.abc import Iterator, Mapping
from typing import Any

from probgen.report.findings import Findings
from probgen.report.story import Story
from probgen.runs import RunRecord

_LONGEST = 300  # characters of a value
_TAIL = 20  # the last loss is the mean of this part of the log


def tell(story: Story) -> None:
    """Tell it, and say at the top of the page where the run has not finished."""
    found, record = story.found, story.found.record
    section = story.page.section("What was run")
    if found.command:
        section.code(command_line(found, story.folder))
    if figures := key_figures(found):
        section.figures(figures)
    versions = ", ".join(f"{name} {version}" for name, version in record.versions.items())
    facts = {"started": record.started.replace("T", " "), "versions": versions, **dict(flat(record.config))}
    section.facts({name: value for name, value in facts.items() if value})
    if record.finished is None:
        story.page.problem(_unfinished(found, story.folder))


def command_line(found: Findings, folder: str) -> str:
    """The command as it was typed, or one that does the same.

    >>> record = RunRecord("runs/x", "fit", {}, {}, "", [], None)
    >>> command = {"program": "DDPM", "data": "digits", "options": {"num-steps": "500", "no-paired": ""}}
    >>> command_line(Findings(record, command), "runs/x")
    'probgen fit DDPM --data digits --num-steps 500 --no-paired --run runs/x'
    """
    command = found.command
    options = command.get("options")
    given = {"data": found.data or "DATA", **(options if isinstance(options, dict) else {})}
    words = [_option(name, str(value)) for name, value in given.items()]
    names = [command.get("program", found.name), *([command["engine"]] if "engine" in command else [])]
    verb = found.record.verb or "fit"
    return " ".join(["probgen", verb, *(shlex.quote(str(name)) for name in names), *words, f"--run {folder}"])


def _option(name: str, value: str) -> str:
    return f"--{name} {shlex.quote(value)}" if value else f"--{name}"


def key_figures(found: Findings) -> dict[str, str]:
    """Steps, seconds, last losses: whatever was noted."""
    record = found.record
    logged = {
        "steps": _last(record, "step"),
        "seconds": _last(record, "seconds"),
        "loss, at the end": _late_mean(record, "loss"),
        "held out, at the end": _last(record, "validation"),
    }
    if isinstance(record.finished, dict):
        logged |= {name: record.finished[name] for name in ("steps", "seconds") if name in record.finished}
    return {name: number(value) for name, value in logged.items() if value is not None}


def flat(config: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, str]]:
    """Names and values of a nested configuration.

    >>> dict(flat({"optim": {"lr": 0.1}, "seed": 0, "init": None}))
    {'optim.lr': '0.1', 'seed': '0', 'init': 'none'}
    """
    for name, value in config.items():
        if isinstance(value, Mapping):
            yield from flat(value, f"{prefix}{name}.")
        else:
            told = "none" if value is None else str(value)
            yield f"{prefix}{name}", told if len(told) <= _LONGEST else f"{told[:_LONGEST]} ..."


def number(value: Any) -> str:
    """A number for the eye."""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return f"{value:,}"
    return f"{value:,.4g}" if isinstance(value, float) else str(value)


def _last(record: RunRecord, name: str) -> Any:
    return next((line[name] for line in reversed(record.log) if name in line), None)


def _late_mean(record: RunRecord, name: str) -> float | None:
    values = [line[name] for line in record.log if isinstance(line.get(name), int | float)]
    tail = values[-max(1, len(values) // _TAIL) :]
    return float(sum(tail) / len(tail)) if tail else None


def _unfinished(found: Findings, folder: str) -> str:
    step, total = _last(found.record, "step"), found.record.config.get("num_steps")
    so_far = f" after step {number(step)}" if step is not None else ""
    of = f" of {number(total)}" if so_far and isinstance(total, int) else ""
    again = f"`{command_line(found, folder)}`" if found.command else "the same call"
    return (
        f"The run has not finished: it stopped{so_far}{of}, or is still at work. Make {again} again: it goes on from "
        "the last checkpoint."
    )
