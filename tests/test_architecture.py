"""The layers of probgen: core <- support <- methods <- faces. The checker is tested too, on small broken packages."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from layers import missing_parts, stale_docstrings, violations

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "probgen"

SOUND = {
    "__init__.py": "def __getattr__(name):\n    import importlib\n    return importlib.import_module(WHERE[name])",
    "core.py": "import torch\ndef plate():\n    import pyro",
    "targets.py": "from probgen.core import Batch\nfrom . import nets",
    "nets.py": "from probgen import core",
    "dynamics.py": "import torchsde\nfrom torchdiffeq import odeint",
    "arviz_io.py": "import arviz as az",
    "models/__init__.py": "",
    "models/base.py": "import numpy as np\nx = np.load('x.npz', allow_pickle=False)",
    "models/vae.py": "from probgen.core import Batch\nfrom .base import x\nnet.eval()\ntorch.compile(net)",
    "inference/nuts.py": "from .. import targets\nfrom ..arviz_io import to_arviz",
    "report/table.py": "from probgen import models, infer, cli",
    "cli.py": "def main():\n    from probgen.inference.nuts import NUTS\n    import_module(sys.argv[1])",
}

BROKEN = [
    ("core.py", "import probgen.nets", "(core) imports probgen.nets (support)"),
    ("core.py", "def f():\n    from . import models", "(core) imports probgen.models (methods)"),
    ("nets.py", "from probgen.models.vae import VAE", "(support) imports probgen.models.vae.VAE (methods)"),
    ("nets.py", "from .models import vae", "(support) imports probgen.models.vae (methods)"),
    ("nets.py", "from probgen import VAE", "(support) imports probgen.VAE (root)"),
    ("nets.py", "import probgen", "(support) imports probgen (root)"),
    ("nets.py", "import probgen.cli as face", "(support) imports probgen.cli (faces)"),
    ("nets.py", "import probgen.dynamics\nimport probgen.targets", "circular imports"),
    ("models/vae.py", "from ..inference import nuts", "(methods) imports probgen.inference.nuts (methods)"),
    (
        "models/vae.py",
        "from ..report.table import show",
        "(methods) imports probgen.report.table.show (faces)",
    ),
    ("models/vae.py", "def f():\n    import probgen.inference.nuts", "imports probgen.inference.nuts"),
    ("models/vae.py", "if TYPE_CHECKING:\n    from probgen import NUTS", "imports probgen.NUTS (root)"),
    (
        "models/vae.py",
        "import importlib\nimportlib.import_module('probgen.inference.nuts')",
        "probgen.inference.nuts",
    ),
    (
        "models/vae.py",
        "import importlib as i\ni.import_module('..inference.nuts', __package__)",
        "probgen.inference",
    ),
    (
        "models/vae.py",
        "from importlib import import_module as get\nget('probgen.inference')",
        "probgen.inference",
    ),
    ("models/vae.py", "__import__('probgen.inference')", "imports probgen.inference (methods)"),
    (
        "models/vae.py",
        "from pkgutil import resolve_name\nresolve_name('probgen.inference:NUTS')",
        "probgen.inference.NUTS",
    ),
    ("models/vae.py", "import importlib\nimportlib.import_module(name)", "name cannot be read"),
    ("models/vae.py", "import importlib\nimportlib.import_module(f'probgen.{x}')", "name cannot be read"),
    ("models/vae.py", "import models.base", "through the link"),
    ("cli.py", "from inference import nuts", "through the link"),
    ("nets.py", "import torchsde", "only dynamics.py does"),
    ("inference/nuts.py", "def f():\n    from torchdiffeq import odeint", "only dynamics.py does"),
    ("diagnostics/loo.py", "import arviz", "only arviz_io.py does"),
    ("cli.py", "from arviz_stats import loo", "only arviz_io.py does"),
    ("nets.py", "import torchvision.datasets", "torchvision"),
    ("nets.py", "import pickle", "imports pickle"),
    ("nets.py", "from joblib import load", "imports joblib"),
    ("nets.py", "import torch as th\nth.load('weights')", "uses torch.load"),
    ("nets.py", "from torch import load", "imports torch.load"),
    ("nets.py", "import torch\nkeep = torch.save", "uses torch.save"),
    ("nets.py", "eval(text)", "runs text as code"),
    ("nets.py", "exec(path.read_text())", "runs text as code"),
    ("nets.py", "import pyro\npyro.get_param_store().load('file')", "parameter store"),
    ("nets.py", "store.save('file')", "parameter store"),
    ("nets.py", "import numpy as np\nnp.load('file', allow_pickle=True)", "allows pickles"),
]


def write_package(folder: Path, files: dict[str, str]) -> Path:
    package = folder / "probgen"
    for name, text in files.items():
        path = package / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
    return package


def test_checker_accepts_a_sound_package(tmp_path: Path) -> None:
    assert violations(write_package(tmp_path, SOUND)) == []


@pytest.mark.parametrize(("name", "text", "complaint"), BROKEN)
def test_checker_sees(tmp_path: Path, name: str, text: str, complaint: str) -> None:
    found = violations(write_package(tmp_path, SOUND | {name: text}))
    assert any(complaint in line for line in found), found


def test_conformance_checker_sees_what_is_missing(tmp_path: Path) -> None:
    package = write_package(
        tmp_path,
        {
            "models/good.py": 'class A:\n    """A."""\ndef example():\n    """A small A."""',
            "models/mute.py": 'class A: pass\ndef _f(): pass\ndef example(): """A."""',
            "evidence/bare.py": "",
            "evidence/asks.py": 'def example(size): """A."""',
            "nets.py": "class Free: pass",
        },
    )
    assert missing_parts(package) == [
        "evidence/asks.py has an example() that wants arguments",
        "evidence/bare.py offers no example()",
        "models/mute.py:1 A has no docstring",
    ]


def test_docstring_checker_sees_what_is_stale(tmp_path: Path) -> None:
    function = 'def f(x, *, scale=1):\n    """F.\n\n    Args:\n        x: data.\n        {}: width.\n    """'
    record = 'class R:\n    """R.\n\n    Args:\n        a, b: sizes.\n    """\n    a: int\n    b: int\n    c: ClassVar'
    package = write_package(
        tmp_path,
        {
            "good.py": function.format("scale"),
            "old.py": function.format("loc"),
            "record.py": record,
            "short.py": record.replace("a, b", "a"),
        },
    )
    assert stale_docstrings(package) == [
        "old.py:1 f documents loc, which it does not take",
        "old.py:1 f takes scale and does not document it",
        "short.py:1 R takes b and does not document it",
    ]


def test_probgen_keeps_its_layers() -> None:
    assert violations(PACKAGE) == []


def test_methods_are_documented_and_offer_an_example() -> None:
    assert missing_parts(PACKAGE) == []


def test_docstrings_name_the_arguments_there_are() -> None:
    assert stale_docstrings(PACKAGE) == []


def run_python(*arguments: str) -> "os._Rusage":
    """CPU time and memory of one child Python, which must succeed."""
    with subprocess.Popen([sys.executable, *arguments], stdout=subprocess.DEVNULL, cwd=ROOT) as child:
        _, status, usage = os.wait4(child.pid, 0)
        child.returncode = os.waitstatus_to_exitcode(status)
    assert child.returncode == 0
    return usage


def test_importing_everything_changes_no_global_state() -> None:
    check = """
import pkgutil, importlib, sys
sys.path.insert(0, "tests")
import arviz, torchdiffeq, torchsde
from global_state import SETTINGS, STREAMS, unchanged
with unchanged(SETTINGS | STREAMS):
    import probgen
    for module in pkgutil.walk_packages(probgen.__path__, "probgen."):
        if not module.name.endswith("__main__"):
            importlib.import_module(module.name)
    for name in dir(probgen):
        getattr(probgen, name)
"""
    run_python("-W", "ignore", "-c", check)


def test_importing_probgen_imports_nothing_heavy() -> None:
    heavy = "{'torch', 'pyro', 'numpy', 'arviz', 'matplotlib', 'sklearn', 'rich'}"
    run_python("-c", f"import sys, probgen; loaded = {heavy} & sys.modules.keys(); assert not loaded, loaded")


def test_help_answers_within_half_a_second_of_cpu() -> None:
    spent = [run_python("-c", "from probgen.cli import main; main()", "--help") for _ in range(3)]
    assert min(usage.ru_utime + usage.ru_stime for usage in spent) < 0.5
