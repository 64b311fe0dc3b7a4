"""The demo: real digits, five programs, engine after engine, an honest verdict. An example of all of probgen."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from dataclasses import asdict
from os import PathLike
from pathlib import Path

import torch

from probgen import digits
from probgen.randomness import forked_rng
from probgen.report.folder import Folder
from probgen.report.record import FIGURES, REPORT, Record
from probgen.report.steps import energies, hidden, images, latents, likelihoods, programs
from probgen.report.steps.settings import QUICK, Settings
from probgen.report.steps.yardstick import make_yardstick

FILES = [
    *images.FILES,
    *programs.FILES,
    *hidden.FILES,
    *latents.FILES,
    *likelihoods.FILES,
    *energies.FILES,
    FIGURES,
    REPORT,
]


def demo(out: str | PathLike[str] = "runs/demo", *, quick: bool = False) -> Path:
    """Fit a VAE, a DDPM and three energies to digits, draw by engine after engine, and say how good each draw is.

    Args:
        out: where pictures, posteriors, figures and report.html go; files of others are left alone.
        quick: a few steps of everything, in seconds; shows the way, not the quality.

    Returns the path of the report. Raises `InputError` where `out` cannot be written or holds files of others.
    """
    started, settings = time.perf_counter(), QUICK if quick else Settings()
    record = Record(Folder(out, FILES), asdict(settings))
    with forked_rng(0), _one_thread():
        train, held_out = digits()
        record.say(
            f"1/8  {len(train):,} digits to learn from, {len(held_out)} held out; a classifier to measure by"
        )
        yardstick = make_yardstick(record, train, held_out, settings)
        fitting = record.section("Fitting")
        record.say("2/8  a VAE, by SVI on the ELBO")
        vae = programs.fit_vae(record, fitting, train, held_out, settings)
        record.say("3/8  a hierarchical DDPM, by SVI on the ELBO")
        ddpm = programs.fit_ddpm(record, fitting, train, held_out, settings)
        record.say("4/8  images by four engines")
        images.draw_images(record, train.all(), vae, ddpm, yardstick, settings)
        record.say(f"5/8  the hidden half of {settings.num_hidden_digits} held-out digits by two engines")
        hidden.complete_digits(record, ddpm, held_out, settings)
        record.say(f"6/8  latents of {settings.num_latent_digits} held-out digits by three engines")
        latents.infer_latents(record, vae, held_out, settings)
        record.say(f"7/8  likelihoods of {len(held_out)} held-out digits by three estimates")
        likelihoods.estimate_evidence(record, vae, ddpm, held_out, settings)
        record.say("8/8  three energies: half digits completed, and letters told from digits")
        energies.complete_and_tell(record, train, held_out, settings)
    return record.finish(time.perf_counter() - started)


@contextlib.contextmanager
def _one_thread() -> Iterator[None]:
    """One thread for torch inside the block: on tensors this small a second one waits more than it works."""
    found = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(found)
