"""The command `probgen`: the nouns and verbs of Python. Nothing heavy is imported before it is known what is wanted.

Here a command is found in `commands/`, its answer printed and its errors told.
"""

from __future__ import annotations

import importlib
import json
import math
import os
import sys
import textwrap
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext, redirect_stdout
from typing import Any

from probgen.cli.words import INTERRUPTED, USAGE_ERROR, Answer, HelpAsked, UsageError, closest

VERBS = {
    "demo": "fit a VAE and a DDPM to real digits, draw by every engine, judge it all",
    "list": "what there is: what each method needs, offers and gives up",
    "fit": "fit a program to data, into a run folder",
    "sample": "draw from a fitted program by an engine",
    "infer": "draw the latents of a program given data",
    "evidence": "estimate log p(x) of data under a fitted program",
    "diagnose": "can these draws be trusted? what to do if not",
    "report": "one page of a run: curves, pictures, tables, warnings",
    "doctor": "versions, known clashes, cores, GPU",
}
TALKING = ("demo", "list")  # whose answer is what they print
EVERYWHERE = {
    "--quiet": "say the result alone: no progress, no advice",
    "--json": "the result as one JSON object",
    "--traceback": "on an error show where it was raised",
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code: 0, 2 for an error told in one paragraph, 130 for Ctrl-C.

    Results go to stdout, progress and advice to stderr.

    >>> main(["--version"])
    probgen ...
    0
    """
    words = list(sys.argv[1:] if argv is None else argv)
    asked = {word for word in words if word in EVERYWHERE}
    words = [word for word in words if word not in EVERYWHERE]
    try:
        with _plain_warnings():
            answer = _answer(words, asked)
            _print(answer, asked)
    except UsageError as error:
        return _tell(f"{error}", USAGE_ERROR)
    except BrokenPipeError:  # `probgen list | head` has read enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except KeyboardInterrupt:
        return _tell("interrupted.", INTERRUPTED)
    except Exception as error:
        if "--traceback" in asked:
            raise
        return _tell(_in_words(error), USAGE_ERROR)
    return answer.code


def _answer(words: Sequence[str], asked: set[str]) -> Answer:
    if not words:
        raise UsageError("a command is required: " + ", ".join(VERBS) + ". See probgen --help.")
    verb, rest = words[0], list(words[1:])
    if verb in ("-h", "--help"):
        return Answer(_help())
    if verb == "--version":
        from probgen import __version__

        return Answer(f"probgen {__version__}", {"version": __version__})
    if verb not in VERBS:
        raise UsageError(f"there is no command {verb!r}; {closest(verb, VERBS)} See probgen --help.")
    module: Any = importlib.import_module(f"probgen.cli.commands.{verb}")
    with _results_alone(verb in TALKING and "--json" not in asked):
        try:
            answer: Answer = module.run(rest, progress="--quiet" not in asked)
        except HelpAsked as help_asked:
            return Answer(str(help_asked).rstrip(), {"help": str(help_asked)})
    return answer


def _results_alone(talks: bool) -> AbstractContextManager[Any]:
    """Have what is printed on the way, by a program of the user's too, on stderr: stdout is for the answer."""
    return nullcontext() if talks else redirect_stdout(sys.stderr)


def _print(answer: Answer, asked: set[str]) -> None:
    if "--json" in asked:
        print(json.dumps(_in_json(answer.facts)))
    elif answer.text:
        print(answer.text)
    sys.stdout.flush()
    if "--quiet" not in asked:
        for line in answer.advice:
            print(line, file=sys.stderr)


def _in_json(value: Any) -> Any:
    """The same with null for NaN and infinity, which JSON has no words for."""
    if isinstance(value, Mapping):
        return {name: _in_json(part) for name, part in value.items()}
    if isinstance(value, list | tuple):
        return [_in_json(part) for part in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _help() -> str:
    width = max(map(len, (*VERBS, *EVERYWHERE)))
    verbs = [f"  {name.ljust(width)}  {text}" for name, text in VERBS.items()]
    everywhere = [f"  {name.ljust(width)}  {text}" for name, text in EVERYWHERE.items()]
    return "\n".join(
        [
            "usage: probgen COMMAND ... [options]",
            "",
            "Deep generative models as Pyro programs, inference engines swapped by one argument.",
            "",
            *verbs,
            "",
            "options of every command:",
            *everywhere,
            "",
            "probgen COMMAND --help tells more, as does probgen sample RUN ENGINE --help of one engine.",
        ]
    )


def _tell(message: str, code: int) -> int:
    print(textwrap.fill(f"probgen: {message}", 100, break_on_hyphens=False), file=sys.stderr)
    return code


def _in_words(error: Exception) -> str:
    from probgen.core import ProbgenError

    if isinstance(error, ProbgenError):
        return str(error)
    return f"{type(error).__name__}: {error} (not an error that was foreseen: --traceback shows where it was raised)"


@contextmanager
def _plain_warnings() -> Iterator[None]:
    """Warnings for people, one paragraph each on stderr; those between libraries and their developers are left out."""
    with warnings.catch_warnings():
        warnings.simplefilter("default")
        for category in (DeprecationWarning, PendingDeprecationWarning, FutureWarning):
            warnings.simplefilter("ignore", category)
        warnings.showwarning = lambda message, *_, **__: print(
            textwrap.fill(f"probgen: warning: {message}", 100, break_on_hyphens=False), file=sys.stderr
        )
        yield
