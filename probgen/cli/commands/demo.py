"""`probgen demo`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from probgen.cli.options import Parser
from probgen.cli.words import Answer


@dataclass(frozen=True)
class Asked:
    """What the demo is told.

    Args:
        out: where results go.
        quick: a few steps of everything: shows the way, not the quality.
    """

    out: str = "runs/demo"
    quick: bool = False


def run(words: Sequence[str], *, progress: bool) -> Answer:  # noqa: ARG001 - the demo says on the way what it does
    """Run the demo."""
    parser = Parser("demo", "Fit a VAE and a DDPM to real digits, draw by every engine, judge it all.")
    parser.take(Asked, "demo")
    parser.names(words)
    asked = Asked(**parser.values(words)["demo"])
    from probgen.report import demo

    demo.demo(asked.out, quick=asked.quick)
    return Answer("", {"out": asked.out})
