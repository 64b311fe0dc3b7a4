"""The command `probgen`. Nothing heavy is imported before it is known what is wanted."""

from __future__ import annotations

import argparse
import difflib
import os
import sys
import textwrap
from collections.abc import Sequence

COMMANDS = ("demo", "list")
USAGE_ERROR = 2
INTERRUPTED = 130


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code: 0, 2 for an error told in one paragraph, 130 for Ctrl-C.

    >>> main(["--version"])
    Traceback (most recent call last):
    SystemExit: 0
    """
    words = list(sys.argv[1:] if argv is None else argv)
    parser = _parser()
    if words and not words[0].startswith("-") and words[0] not in COMMANDS:
        parser.error(_unknown_command(words[0]))
    return _run(parser.parse_args(words))


def _parser() -> argparse.ArgumentParser:
    from probgen import __version__

    parser = _Parser(
        "probgen",
        description="Deep generative models as Pyro programs, inference engines swapped by one argument.",
    )
    parser.add_argument("--version", action="version", version=f"probgen {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="command")

    demo = commands.add_parser(
        "demo", help="fit a VAE and a DDPM to real digits, draw by every engine, judge it all"
    )
    demo.add_argument("--out", default="runs/demo", metavar="FOLDER", help="where results go (runs/demo)")
    demo.add_argument(
        "--quick", action="store_true", help="a few steps of everything: shows the way, not the quality"
    )

    listing = commands.add_parser("list", help="what there is: what each method needs, offers and gives up")
    listing.add_argument(
        "what", nargs="?", metavar="what", help="programs, objectives, engines, estimators, or a name"
    )
    return parser


class _Parser(argparse.ArgumentParser):
    """Errors as one paragraph."""

    def error(self, message: str) -> None:  # type: ignore[override]
        self.exit(USAGE_ERROR, f"{self.prog}: {message}\nSee {self.prog} --help.\n")


def _unknown_command(word: str) -> str:
    close = difflib.get_close_matches(word, COMMANDS, n=1)
    hint = f"did you mean {close[0]!r}?" if close else f"known: {', '.join(COMMANDS)}"
    return f"there is no command {word!r}; {hint}"


def _run(arguments: argparse.Namespace) -> int:
    from probgen.core import ProbgenError

    try:
        if arguments.command == "list":
            from probgen.report.tables import list_methods

            list_methods(arguments.what)
        else:
            from probgen.report.demo import demo

            demo(arguments.out, quick=arguments.quick)
    except ProbgenError as error:
        print(textwrap.fill(f"probgen: {error}", 100, break_on_hyphens=False), file=sys.stderr)
        return USAGE_ERROR
    except BrokenPipeError:  # `probgen list | head` has read enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except KeyboardInterrupt:
        print("probgen: interrupted.", file=sys.stderr)
        return INTERRUPTED
    return 0


if __name__ == "__main__":
    sys.exit(main())
