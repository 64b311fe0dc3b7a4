"""`probgen doctor`: is everything here that probgen needs, and does it get on with one another?"""

from __future__ import annotations

import importlib
import os
import platform
import re
import shutil
import sys
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, requires, version

from packaging.requirements import Requirement

from probgen.cli.options import Parser
from probgen.cli.words import Answer

EXTRAS = {"lightning-fabric": "several processes or GPUs, fit(..., devices=2)"}
IMPORTS = {"pillow": "PIL", "pyro-ppl": "pyro", "scikit-learn": "sklearn"}  # whose module is called otherwise
LEAST_DISK = 2**30
_PYTHON = (3, 11)
_GIB = 2**30


@dataclass(frozen=True)
class Finding:
    """One thing that was looked at: what is there, and what is wrong with it and the way out, if anything."""

    name: str
    found: str
    problem: str = ""

    def __str__(self) -> str:
        return f"{self.name}: {self.found}" + (f"\n  {self.problem}" if self.problem else "")


def run(words: Sequence[str], *, progress: bool) -> Answer:  # noqa: ARG001 - the signature of every command
    """Look at everything; the exit code is 1 where something is wrong."""
    parser = Parser("doctor", "Versions of what probgen needs, clashes that are known, cores, GPU, disk.")
    parser.names(words)
    parser.values(words)
    findings = [*python(), *packages(), *clashes(), *extras(), *machine()]
    problems = [finding for finding in findings if finding.problem]
    verdict = f"{len(problems)} to mend." if problems else "Nothing is wrong."
    facts = {"ok": not problems, "findings": [asdict(finding) for finding in findings]}
    return Answer("\n".join([*map(str, findings), "", verdict]), facts, code=int(bool(problems)))


def python() -> Iterator[Finding]:
    """Python and the machine it runs on."""
    wanted = ".".join(map(str, _PYTHON))
    old = f"probgen needs Python >= {wanted}." if sys.version_info < _PYTHON else ""
    yield Finding("python", f"{platform.python_version()} on {platform.system()} {platform.machine()}", old)


def packages() -> Iterator[Finding]:
    """What probgen says it needs: is it there, new enough, and can it be imported?"""
    try:
        wanted = [Requirement(text) for text in requires("probgen") or []]
    except PackageNotFoundError:
        yield Finding("probgen", "not installed", "It is used from a checkout. Install it: pip install -e .")
        return
    for requirement in wanted:
        if requirement.marker is None or requirement.marker.evaluate():
            yield package(requirement)


def package(requirement: Requirement) -> Finding:
    """One package against what is asked of it."""
    name = requirement.name
    install = f"pip install -c constraints.txt '{requirement}'"
    try:
        found = version(name)
    except PackageNotFoundError:
        return Finding(name, "missing", f"Install it: {install}")
    if not requirement.specifier.contains(found, prereleases=True):
        return Finding(name, found, f"probgen needs {requirement.specifier}: {install}")
    return Finding(name, found, failed_import(name))


def failed_import(name: str) -> str:
    """What is wrong with importing a package; "" if nothing is."""
    module = IMPORTS.get(name, name.replace("-", "_"))
    try:
        with warnings.catch_warnings(action="ignore"):
            importlib.import_module(module)
    except Exception as error:  # noqa: BLE001 - whatever a broken installation raises
        told = f"{type(error).__name__}: {error}"
        return f"import {module} fails: {told}. Reinstall it: pip install --force-reinstall {name}"
    return ""


def clashes() -> Iterator[Finding]:
    """Packages that are each in order and do not get on with another."""
    plots, matplotlib = installed("arviz-plots"), installed("matplotlib")
    if plots and plots.startswith("0.8.") and matplotlib and release(matplotlib) >= (3, 11):
        problem = "It breaks `import arviz`: pip install 'arviz-plots!=0.8.*'"
        yield Finding("arviz-plots", f"{plots} beside Matplotlib {matplotlib}", problem)
    if zuko := installed("zuko"):
        problem = (
            "Where your code imports it, the checks of torch and Pyro distributions are off: call "
            "torch.distributions.Distribution.set_default_validate_args(True) behind the import."
            if "zuko" in sys.modules
            else ""
        )
        yield Finding("zuko", f"{zuko}; importing it switches off the checks of distributions", problem)
    if (
        (numpy := installed("numpy"))
        and release(numpy) >= (2,)
        and release(installed("torch") or "9") < (2, 3)
    ):
        yield Finding("numpy", f"{numpy} beside torch {installed('torch')}", "torch < 2.3 needs numpy < 2.")


def extras() -> Iterator[Finding]:
    """What may be there or not."""
    for name, use in EXTRAS.items():
        yield Finding(name, installed(name) or f"not installed (optional: {use})")


def machine() -> Iterator[Finding]:
    """Cores and threads, GPU and disk."""
    import torch

    cores, threads = os.cpu_count() or 1, torch.get_num_threads()
    crowded = f"{threads} threads on {cores} cores are in one another's way: OMP_NUM_THREADS={cores}"
    yield Finding("cores", f"{cores}, {threads} threads a process", crowded if threads > cores else "")
    yield gpu()
    free = shutil.disk_usage(".").free
    full = "Runs keep three checkpoints each: free some space." if free < LEAST_DISK else ""
    yield Finding("disk", f"{free / _GIB:.1f} GiB free here", full)


def gpu() -> Finding:
    """The GPU as torch sees it, and the driver without a torch that can use it."""
    import torch

    if torch.cuda.is_available():
        names = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
        return Finding("gpu", f"{', '.join(names)} (torch for CUDA {torch.version.cuda})")
    build = f"CUDA {torch.version.cuda}" if torch.version.cuda else "the CPU"
    if shutil.which("nvidia-smi") is None:
        return Finding("gpu", f"none (torch for {build})")
    return Finding(
        "gpu",
        f"a driver is there, and torch for {build} does not see a GPU",
        "Install the torch that is built for your driver's CUDA: https://pytorch.org/get-started/locally",
    )


def installed(name: str) -> str | None:
    """The version of a package; None where it is not installed."""
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def release(text: str) -> tuple[int, ...]:
    """The numbers a version begins with.

    >>> release("3.11.2"), release("2.13.0+cpu")
    ((3, 11, 2), (2, 13, 0))
    """
    return tuple(int(part) for part in re.findall(r"\d+", text.split("+")[0])[:3])
