"""A small fit that uses everything a checkpoint must hold, to be run and killed in processes of its own."""

from __future__ import annotations

import math
import multiprocessing
import os
import random
import resource
import signal
from collections.abc import Callable, Mapping
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from probgen import ELBO, VAE, History, Optim, fit, runs
from probgen.core import Batch, ProbgenError
from probgen.files import read_tensors, write_tensors

NUM_STEPS = 80


class Noisy:
    """Rows that draw noise from every stream there is, as data sets of users do."""

    def __init__(self, x: Tensor) -> None:
        self.x = x

    def __len__(self) -> int:
        return len(self.x)

    def __getitem__(self, index: Tensor) -> Tensor:
        noise = random.gauss(0, 1) + np.random.standard_normal()  # noqa: NPY002
        return self.x[index] + 0.01 * torch.randn(len(index), 6) + 0.01 * noise


class Centred(ELBO, nn.Module):
    """An objective with a state, the running mean of its loss; at some steps it does something first."""

    def __init__(self, actions: Mapping[int, Callable[[], Any]] | None = None) -> None:
        nn.Module.__init__(self)
        ELBO.__init__(self)
        self.register_buffer("mean", torch.zeros(()))
        self._seen, self._actions = -1, dict(actions or {})  # one look at the parameters comes first

    def loss(self, program: Any, batch: Batch) -> Tensor:
        loss = super().loss(program, batch)
        if torch.is_grad_enabled():
            self.mean += 0.1 * (loss.detach() - self.mean)
            self._seen += 1
            self._actions.pop(self._seen, lambda: None)()
        return loss + 0.01 * (loss - self.mean).square()


def data() -> Tensor:
    generator = torch.Generator().manual_seed(5)
    return torch.randn(50, 3, generator=generator) @ torch.randn(3, 6, generator=generator)


def program(seed: int = 0) -> VAE:
    torch.manual_seed(seed)
    return VAE.mlp((6,), 2, widths=(16,))


def small_fit(vae: VAE, objective: Any = None, run: Path | None = None, **options: Any) -> History:
    """Eight epochs a hundred steps, validation, an average, a schedule: every part of a checkpoint matters."""
    settings = {
        "validation": data()[:10],
        "num_steps": NUM_STEPS,
        "batch_size": 8,
        "optim": Optim(lr=0.01, schedule="cosine", warmup=10, ema_decay=0.95, clip_norm=50.0),
        "seed": 3,
        "progress": False,
    }
    return fit(vae, Noisy(data()), objective or Centred(), run=run, **(settings | options))


def outcome(vae: nn.Module, history: History) -> dict[str, Tensor]:
    """All that two fits are compared by."""
    found = {name: value.detach().clone() for name, value in vae.state_dict().items()}
    found["losses"] = torch.tensor(history.loss, dtype=torch.float64)
    found["validation"] = torch.tensor(history.validation, dtype=torch.float64)
    return found


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    """Whether two outcomes agree to the last bit."""
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def checkpoint_always() -> None:
    """A checkpoint after every step."""
    runs.SECONDS_APART, runs.SHARE = 0.0, math.inf


# --- in a process of its own --------------------------------------------------------------------------------------


def start(target: Any, *arguments: Any) -> tuple[BaseProcess, Connection]:
    """A process, forked from a clean one that has imported everything, and the end of a pipe to it."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["fit_run_tools"])
    here, there = context.Pipe()
    process = context.Process(target=target, args=(there, *arguments))
    process.start()
    there.close()
    return process, here


def fit_and_write(pipe: Connection, run: Path | None, result: Path, seed: int, apart: float) -> None:
    """The small fit, its outcome left in a file."""
    torch.set_num_threads(1)
    runs.SECONDS_APART, runs.SHARE = apart, math.inf
    vae = program(seed)
    pipe.send("begun")
    write_tensors(result, outcome(vae, small_fit(vae, run=run)), {})


def fit_and_report(pipe: Connection, run: Path, step: int, what: str) -> None:
    """The small fit, to which something happens at a step; the error, if there is one, is sent."""
    torch.set_num_threads(1)
    checkpoint_always()
    actions = {
        "full disk": lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, resource.RLIM_INFINITY)),
        "SIGTERM": lambda: signal.raise_signal(signal.SIGTERM),
    }
    vae = program()
    try:
        small_fit(vae, Centred({step: actions[what]}), run)
    except ProbgenError as error:
        pipe.send(f"{type(error).__name__}: {error}")


def hold(pipe: Connection, run: Path) -> None:
    """Hold a run folder until killed."""
    with runs.Run(run, "fit", {"num_steps": 1}):
        pipe.send("held")
        signal.pause()


def fit_and_measure(pipe: Connection, run: Path, num_steps: int) -> None:
    """Bytes of memory after a tenth of the steps, and at the last."""
    torch.set_num_threads(1)
    runs.SECONDS_APART = 2.0
    looks = {step: lambda: pipe.send(resident()) for step in (num_steps // 10, num_steps)}
    small_fit(program(), Centred(looks), run, num_steps=num_steps)


def resident() -> int:
    """Bytes of memory that this process holds."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def read(result: Path) -> dict[str, Tensor]:
    return read_tensors(result)[0]
