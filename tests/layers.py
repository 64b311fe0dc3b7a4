"""Reads the sources of a package called probgen and lists every breach of its layers.

Each import counts, wherever it stands: in a function, under TYPE_CHECKING, relative, or made by a call.
"""

import ast
import graphlib
import re
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

METHOD_FOLDERS = ("models", "objectives", "inference", "evidence", "diagnostics")
FACES = ("cli", "report", "__main__")
BY_NAME = "discovery"  # the support file that looks methods up by folder, naming none
MAY_IMPORT = {
    "core": set(),
    "support": {"core", "support"},
    "methods": {"core", "support"},
    "faces": {"root", "core", "support", "methods", "faces"},
    "root": {"core", "support", "methods", "faces"},
}
ONLY_IN = {"torchsde": "dynamics", "torchdiffeq": "dynamics", "arviz": "arviz_io"}
FORBIDDEN = {  # by what it does
    **dict.fromkeys(
        ["pickle", "cloudpickle", "dill", "joblib", "shelve", "marshal"], "is pickle, or no better"
    ),
    **dict.fromkeys(["torch.load", "torch.save", "torch.jit.load", "torch.hub"], "is pickle, or runs code"),
    **dict.fromkeys(["eval", "exec"], "runs text as code"),
    "torchvision": "is never needed",
}
IMPORTERS = {
    "__import__",
    "importlib.__import__",
    "importlib.import_module",
    "importlib.util.spec_from_file_location",
    "pkgutil.resolve_name",
    "runpy.run_module",
    "runpy.run_path",
}


class Source(NamedTuple):
    """One parsed file; `unit` is the folder or file of probgen it belongs to, "" for `probgen/__init__.py`."""

    path: str
    unit: str
    package: str
    tree: ast.Module


def read_sources(package: Path) -> list[Source]:
    """Every Python file under `package`, a folder called probgen."""
    return [read_source(package, path) for path in sorted(package.rglob("*.py"))]


def read_source(package: Path, path: Path) -> Source:
    inside = path.relative_to(package)
    parts = inside.with_suffix("").parts
    unit = "" if parts == ("__init__",) else parts[0]
    folder = ".".join(("probgen", *parts[:-1]))
    return Source(inside.as_posix(), unit, folder, ast.parse(path.read_text(encoding="utf-8")))


def layer(unit: str) -> str:
    """Which layer a folder or file directly under probgen belongs to."""
    if unit in ("", "core"):
        return unit or "root"
    if unit in METHOD_FOLDERS:
        return "methods"
    return "faces" if unit in FACES else "support"


def resolve(name: str, level: int, package: str) -> str:
    """Absolute dotted name of `level` dots and `name`, seen from `package`."""
    if not level:
        return name
    parents = package.split(".")
    return ".".join(parents[: len(parents) - level + 1] + [name] * bool(name))


def statement_imports(source: Source) -> Iterator[tuple[int, str, str]]:
    """(line, local name, dotted name) of each import statement, at any depth."""
    for node in ast.walk(source.tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield node.lineno, alias.asname or alias.name.split(".")[0], alias.name
        elif isinstance(node, ast.ImportFrom):
            base = resolve(node.module or "", node.level, source.package)
            for alias in node.names:
                yield node.lineno, alias.asname or alias.name, f"{base}.{alias.name}"


def local_names(source: Source) -> dict[str, str]:
    """What the names bound by imports stand for: `import a.b` binds a, `from a import b as c` binds c to a.b."""
    return {
        local: local if dotted.startswith(f"{local}.") else dotted
        for _, local, dotted in statement_imports(source)
    }


def dotted_name(node: ast.AST, names: dict[str, str]) -> str:
    """`a.b.c` for an expression made of names and attributes, imports resolved; "" for any other."""
    if isinstance(node, ast.Name):
        return names.get(node.id, node.id)
    if isinstance(node, ast.Attribute) and (value := dotted_name(node.value, names)):
        return f"{value}.{node.attr}"
    return ""


def called_imports(source: Source) -> Iterator[tuple[int, str]]:
    """(line, dotted name) of each import made by a call; "" where only running the program would tell the name."""
    names = local_names(source)
    for node in ast.walk(source.tree):
        if isinstance(node, ast.Call) and dotted_name(node.func, names) in IMPORTERS:
            text = node.args[0].value if node.args and isinstance(node.args[0], ast.Constant) else ""
            name = text.replace(":", ".") if isinstance(text, str) else ""
            bare = name.lstrip(".")
            yield node.lineno, resolve(bare, len(name) - len(bare), source.package)


def unit_of(dotted: str, units: set[str]) -> str:
    """The unit of probgen that holds `probgen.a.b`: a, or "" for a name of the package itself."""
    unit = dotted.split(".")[1] if "." in dotted else ""
    return unit if unit in units else ""


def check_import(source: Source, dotted: str, units: set[str]) -> str:
    """What is wrong with importing `dotted` there; "" if nothing is."""
    if not dotted:
        hidden = layer(source.unit) not in ("root", "faces") and source.unit != BY_NAME
        message = (
            f"imports a module whose name cannot be read here; only {BY_NAME}.py looks methods up by name"
        )
        return message if hidden else ""
    top = dotted.split(".")[0]
    if top in ("models", "inference"):
        return f"imports {dotted} through the link at the root: import probgen.{dotted}"
    home = ONLY_IN.get(top.split("_")[0], source.unit)
    if home != source.unit:
        return f"imports {dotted}: only {home}.py does"
    if top != "probgen":
        return ""
    imported = unit_of(dotted, units)
    within = imported == source.unit and layer(imported) == "methods"
    if within or layer(imported) in MAY_IMPORT[layer(source.unit)]:
        return ""
    return f"({layer(source.unit)}) imports {dotted} ({layer(imported)})"


def forbidden_uses(source: Source) -> Iterator[tuple[int, str]]:
    """(line, complaint) of each name that must not be used, imported or called."""
    names = local_names(source)
    for node in ast.walk(source.tree):
        if isinstance(node, ast.Name | ast.Attribute):
            name = dotted_name(node, names)
            if name in FORBIDDEN:
                yield node.lineno, f"uses {name}, which {FORBIDDEN[name]}"
        if (
            isinstance(node, ast.Attribute)
            and node.attr in ("load", "save")
            and "store" in ast.unparse(node.value)
        ):
            yield node.lineno, f"uses {ast.unparse(node)}: Pyro's parameter store is written as a pickle"
        if (
            isinstance(node, ast.keyword)
            and node.arg == "allow_pickle"
            and ast.unparse(node.value) != "False"
        ):
            yield node.value.lineno, "allows pickles"
    for line, _, dotted in statement_imports(source):
        for name in (dotted, dotted.split(".")[0]):
            if name in FORBIDDEN:
                yield line, f"imports {name}, which {FORBIDDEN[name]}"


def import_cycle(sources: list[Source], units: set[str]) -> list[str]:
    """Units of core and support that import one another in a circle, if any do."""
    graph: dict[str, set[str]] = {source.unit: set() for source in sources if layer(source.unit) == "support"}
    for source in sources:
        imports = [dotted for _, _, dotted in statement_imports(source)]
        imports += [dotted for _, dotted in called_imports(source)]
        if source.unit in graph:
            inner = {unit_of(dotted, units) for dotted in imports if dotted.split(".")[0] == "probgen"}
            graph[source.unit] |= inner & graph.keys() - {source.unit}
    try:
        graphlib.TopologicalSorter(graph).prepare()
    except graphlib.CycleError as error:
        return [f"circular imports: {' -> '.join(error.args[1])}"]
    return []


def violations(package: Path) -> list[str]:
    """Every breach of the import rule and every forbidden name under `package`, one line each."""
    sources = read_sources(package)
    units = {source.unit for source in sources} - {""}
    found = []
    for source in sources:
        imports = [(line, dotted) for line, _, dotted in statement_imports(source)]
        for line, dotted in [*imports, *called_imports(source)]:
            if complaint := check_import(source, dotted, units):
                found.append(f"{source.path}:{line} {complaint}")
        found += [f"{source.path}:{line} {complaint}" for line, complaint in forbidden_uses(source)]
    return found + import_cycle(sources, units)


def missing_parts(package: Path) -> list[str]:
    """Public classes and functions of the methods without a docstring, modules without `example()`."""
    found = []
    for source in read_sources(package):
        if layer(source.unit) == "methods" and not Path(source.path).name.startswith("_"):
            found += [f"{source.path}{complaint}" for complaint in missing_in_module(source.tree)]
    return found


def missing_in_module(tree: ast.Module) -> Iterator[str]:
    """The complaints about one module of a method."""
    public = [
        node
        for node in tree.body
        if isinstance(node, ast.ClassDef | ast.FunctionDef) and not node.name.startswith("_")
    ]
    for node in public:
        if not ast.get_docstring(node):
            yield f":{node.lineno} {node.name} has no docstring"
    examples = [node for node in public if isinstance(node, ast.FunctionDef) and node.name == "example"]
    if not examples:
        yield " offers no example()"
    elif len(examples[0].args.args) > len(examples[0].args.defaults):
        yield " has an example() that wants arguments"


def stale_docstrings(package: Path) -> list[str]:
    """Docstrings whose `Args:` differ from the signature: a name that is not there, a parameter never mentioned."""
    sources = read_sources(package)
    nodes = [(source, node) for source in sources for node in ast.walk(source.tree)]
    classes = {node.name: node for _, node in nodes if isinstance(node, ast.ClassDef)}
    found = []
    for source, node in nodes:
        if isinstance(node, ast.ClassDef | ast.FunctionDef):
            found += [
                f"{source.path}:{node.lineno} {node.name} {complaint}" for complaint in stale(node, classes)
            ]
    return sorted(found)


def stale(node: ast.ClassDef | ast.FunctionDef, classes: dict[str, ast.ClassDef]) -> Iterator[str]:
    """The complaints about one docstring; it may do without `Args:`, and without what a class inherits."""
    text = ast.get_docstring(node) or ""
    if documented := documented_arguments(text):
        actual = parameters(node)
        known = actual | inherited(node, classes)
        yield from (f"documents {name}, which it does not take" for name in documented - known)
        yield from (
            f"takes {name} and does not document it" for name in actual - set(re.findall(r"\w+", text))
        )


def inherited(node: ast.ClassDef | ast.FunctionDef, classes: dict[str, ast.ClassDef]) -> set[str]:
    """What the classes of the package that this one derives from take."""
    names = [base.id for base in getattr(node, "bases", []) if isinstance(base, ast.Name)]
    bases = [classes[name] for name in names if name in classes]
    return set().union(*(parameters(base) | inherited(base, classes) for base in bases))


def documented_arguments(docstring: str) -> set[str]:
    """The names that head the entries of `Args:`, `a, b: text` naming two."""
    section = re.search(r"^Args:\n((?:    .*\n?|\n)+)", docstring, re.MULTILINE)
    heads = re.findall(r"^ {4}([*\w][*\w, ]*):", section.group(1), re.MULTILINE) if section else []
    return {name.strip(" *") for head in heads for name in head.split(",")}


def parameters(node: ast.ClassDef | ast.FunctionDef) -> set[str]:
    """What a call takes: the arguments of a function or of `__init__`, or the fields of a dataclass."""
    functions = {child.name: child for child in node.body if isinstance(child, ast.FunctionDef)}
    signature = node if isinstance(node, ast.FunctionDef) else functions.get("__init__")
    if signature:
        arguments = signature.args
        named = [
            *arguments.posonlyargs,
            *arguments.args,
            *arguments.kwonlyargs,
            arguments.vararg,
            arguments.kwarg,
        ]
        return {argument.arg for argument in named if argument and argument.arg not in ("self", "cls")}
    fields = [
        child
        for child in node.body
        if isinstance(child, ast.AnnAssign) and isinstance(child.target, ast.Name)
    ]
    return {ast.unparse(field.target) for field in fields if "ClassVar" not in ast.unparse(field.annotation)}
