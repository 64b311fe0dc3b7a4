"""What a call takes, as options: `ReverseSDE(steps=200)` in Python is `ReverseSDE --steps 200` here."""

from __future__ import annotations

import argparse
import inspect
import re
import textwrap
import types
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import MISSING, dataclass, fields, is_dataclass
from functools import partial
from typing import Any, Literal, NoReturn, Union, get_args, get_origin, get_type_hints

from probgen.cli.naming import spelled
from probgen.cli.words import HelpAsked, UsageError, closest, split
from probgen.core import InputError

_HELP = {"-h", "--help"}
_PLAIN: dict[Any, str] = {int: "an integer", float: "a number", str: "a word", types.NoneType: "none"}


@dataclass(frozen=True)
class Parameter:
    """One argument of a call: its name, type, default (`MISSING` where there is none) and documentation."""

    name: str
    annotation: Any
    default: Any
    text: str


def parameters(call: Callable[..., Any]) -> list[Parameter]:
    """The arguments of a function, or of what makes an instance of a class: its `of_shape` where it has one.

    >>> from probgen.inference import DDIM
    >>> [parameter.name for parameter in parameters(DDIM)][:2]
    ['steps', 'eta']
    """
    maker = getattr(call, "of_shape", None)
    if maker is None:
        return list(_parameters(call))
    own = list(_parameters(maker))
    known = {"network", "event_shape", *(parameter.name for parameter in own)}
    takes_settings = any(p.kind is p.VAR_KEYWORD for p in inspect.signature(maker).parameters.values())
    others = [p for p in _parameters(call) if p.name not in known] if takes_settings else []
    return [parameter for parameter in own if parameter.name != "event_shape"] + others


def _parameters(call: Callable[..., Any]) -> Iterator[Parameter]:
    hints = _type_hints(call)
    factories = (
        {item.name for item in fields(call) if item.default is MISSING} if is_dataclass(call) else set()
    )
    for name, parameter in inspect.signature(call).parameters.items():
        if parameter.kind not in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD):
            default = MISSING if parameter.default is parameter.empty else parameter.default
            shown = "" if name in factories and default is not MISSING else default
            yield Parameter(name, hints.get(name, Any), shown, _documentation(call, name))


def _type_hints(call: Callable[..., Any]) -> dict[str, Any]:
    if is_dataclass(call):
        return get_type_hints(call)  # each field in the names of the module of its own class
    # mypy: instances of a class may have another __init__; this is the class.
    return get_type_hints(call.__init__ if isinstance(call, type) else call)  # type: ignore[misc]


def _documentation(call: Any, name: str) -> str:
    """What the docstring says of an argument, its own or that of a class it inherits from."""
    for owner in getattr(call, "__mro__", (call,)):
        if text := documented(inspect.cleandoc(owner.__doc__ or "")).get(name):
            return text
    return ""


def documented(docstring: str) -> dict[str, str]:
    r"""The entries of a docstring's `Args:`, each on one line.

    >>> documented("A.\n\nArgs:\n    a, b: sizes,\n        > 0.\n    c: a name.\n\nReturns x.")
    {'a': 'sizes, > 0.', 'b': 'sizes, > 0.', 'c': 'a name.'}
    """
    section = re.search(r"^Args:\n((?:    .*\n?|\n)+)", docstring, re.MULTILINE)
    entries = re.split(r"^ {4}(?=\S)", section.group(1), flags=re.MULTILINE)[1:] if section else []
    found = {}
    for entry in entries:
        names, _, text = entry.partition(":")
        for name in names.split(","):
            found[name.strip(" *")] = " ".join(text.split())
    return found


# --- from text to values -------------------------------------------------------------------------------------------


def convert(annotation: Any, text: str) -> Any:
    """The value of a type that a text stands for; `UsageError` says what was expected.

    >>> convert(int | None, "none"), convert(tuple[float, float], "0.9,0.99"), convert(float, "1e-3")
    (None, (0.9, 0.99), 0.001)
    """
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin in (Union, types.UnionType):
        return _first_that_fits(annotation, text)
    if origin is Literal:
        if text in arguments:
            return text
        raise _expected(annotation, text)
    if origin in (tuple, list, Sequence):
        return tuple(convert(arguments[0], part.strip()) for part in text.split(","))
    if annotation in _PLAIN or annotation is bool:
        return _plain(annotation, text)
    return spelled(text)


def _first_that_fits(annotation: Any, text: str) -> Any:
    """By the member of a union that takes the text; words last, for any text is a word."""
    for member in sorted(get_args(annotation), key=lambda member: (member is str, member not in _PLAIN)):
        try:
            return convert(member, text)
        except (UsageError, InputError):
            continue
    raise _expected(annotation, text)


def _plain(annotation: Any, text: str) -> Any:
    if annotation is types.NoneType and text.lower() == "none":
        return None
    if annotation is bool and text.lower() in ("true", "false"):
        return text.lower() == "true"
    if annotation in (int, float, str):
        try:
            return annotation(text)
        except ValueError:
            pass
    raise _expected(annotation, text)


def _expected(annotation: Any, text: str) -> UsageError:
    return UsageError(f"expected {_in_words(annotation)}, got {text!r}")


def _in_words(annotation: Any) -> str:
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin in (Union, types.UnionType):
        return " or ".join(dict.fromkeys(map(_in_words, arguments)))
    if origin is Literal:
        return " or ".join(map(repr, arguments))
    if origin in (tuple, list, Sequence):
        return f"{_in_words(arguments[0])} or several apart by commas"
    return _PLAIN.get(annotation, "a name such as VP or VP(beta_max=10)")


# --- the parser ----------------------------------------------------------------------------------------------------


class Parser(argparse.ArgumentParser):
    """Names, and options of several calls side by side, such as those of `infer` and of an engine.

    Args:
        usage: verb and the names it wants, such as "sample RUN ENGINE".
        text: what the command does.
    """

    def __init__(self, usage: str, text: str) -> None:
        super().__init__(
            f"probgen {usage}",
            usage=f"probgen {usage} [options]",
            description=textwrap.fill(text, 100),
            formatter_class=argparse.RawDescriptionHelpFormatter,
            allow_abbrev=False,
        )
        self.verb, *self.wanted = usage.split()
        self.calls: list[str] = []

    def take(self, call: Callable[..., Any], title: str, only: Collection[str] | None = None) -> None:
        """Take the arguments of a call as options; one whose name is taken is written `--title-name`.

        Args:
            call: a function or class.
            title: what its options are listed under, and found under by `values`.
            only: the arguments to take; None means all.
        """
        self.calls.append(title)
        group = self.add_argument_group(f"options of {title}")
        for parameter in parameters(call):
            if only is None or parameter.name in only:
                self._add(group, title, parameter)

    def _add(self, group: Any, title: str, parameter: Parameter) -> None:
        flag = f"--{parameter.name.replace('_', '-')}"
        if flag in self._option_string_actions:
            flag = f"--{title.lower()}-{flag[2:]}"
        common: dict[str, Any] = {
            "dest": f"{title}.{parameter.name}",
            "default": argparse.SUPPRESS,
            "help": _shown(parameter),
        }
        if parameter.annotation is bool:
            group.add_argument(flag, action=argparse.BooleanOptionalAction, **common)
        else:
            group.add_argument(
                flag,
                type=partial(_read, parameter.annotation),
                metavar=_metavar(parameter.annotation),
                required=parameter.default is MISSING,
                **common,
            )

    def names(self, words: Sequence[str], makers: Iterable[Callable[..., Any]] = ()) -> list[str]:
        """The words that name things, as many as are wanted; where help is asked for without them, that is given.

        Args:
            words: of the command line, behind the verb.
            makers: calls that may be meant: which of their options have no value tells names from values.
        """
        names, options = split(words, self._flags() | flags_of(makers))
        if len(names) < len(self.wanted) and not _HELP.isdisjoint(options):
            raise HelpAsked(self.format_help())
        if len(names) != len(self.wanted):
            wanted, got = " ".join(self.wanted) or "options alone", " ".join(names) or "none of them"
            self.error(f"expected {wanted}, got {got}")
        return names

    def values(self, words: Sequence[str]) -> dict[str, dict[str, Any]]:
        """The arguments that were given, for each call by its title; what was not given is left to the call."""
        options = self._options(words)
        if not _HELP.isdisjoint(options):
            raise HelpAsked(self.format_help())
        given, unknown = self.parse_known_args(options)
        if unknown:
            option = unknown[0].partition("=")[0]
            self.error(f"there is no option {option}; {closest(option, sorted(self._option_string_actions))}")
        found: dict[str, dict[str, Any]] = {title: {} for title in self.calls}
        for key, value in vars(given).items():
            title, _, name = key.rpartition(".")
            found[title][name] = value
        return found

    def texts(self, words: Sequence[str], title: str) -> dict[str, str]:
        """What was written for the arguments of a call."""
        found = {}
        for flag, text in self.written(words).items():
            action = self._option_string_actions[f"--{flag}"]
            owner, _, name = action.dest.rpartition(".")
            if owner == title:
                found[name] = text if action.nargs != 0 else str(not flag.startswith("no-")).lower()
        return found

    def written(self, words: Sequence[str]) -> dict[str, str]:
        """The options with what was written for them; nothing for those without a value."""
        pairs = (option.removeprefix("--").partition("=") for option in self._options(words))
        return {flag: text for flag, _, text in pairs}

    def error(self, message: str) -> NoReturn:
        """One paragraph, told by whoever called."""
        message = message.removeprefix("argument ")
        end = "" if message.endswith((".", "?")) else "."
        raise UsageError(f"{self.prog}: {message}{end} See probgen {self.verb} --help.")

    def _options(self, words: Sequence[str]) -> list[str]:
        return split(words, self._flags())[1]

    def _flags(self) -> set[str]:
        return {flag for flag, action in self._option_string_actions.items() if action.nargs == 0}


def flags_of(calls: Iterable[Callable[..., Any]]) -> set[str]:
    """The options of some calls that have no value."""
    names = {p.name for call in calls for p in parameters(call) if p.annotation is bool}
    return {f"--{name.replace('_', '-')}" for name in names}


def typed(call: Callable[..., Any], texts: Mapping[str, str]) -> dict[str, Any]:
    """The arguments of a call from what was written for them."""
    return {p.name: convert(p.annotation, texts[p.name]) for p in parameters(call) if p.name in texts}


def value_of(option: str, words: Sequence[str]) -> str | None:
    """What was written for an option, before it is known which others there are.

    >>> value_of("--objective", ["VAE", "--objective", "IWAE"])
    'IWAE'
    """
    given = [word.partition("=")[2] for word in split(words, ())[1] if word.startswith(f"{option}=")]
    return given[-1] if given else None


def _read(annotation: Any, text: str) -> Any:
    try:
        return convert(annotation, text)
    except (UsageError, InputError) as error:
        raise argparse.ArgumentTypeError(str(error).rstrip(".")) from error


def _metavar(annotation: Any) -> str:
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin is Literal:
        return "{" + ",".join(map(str, arguments)) + "}"
    if origin in (Union, types.UnionType):
        return _metavar(arguments[0])
    return {int: "N", float: "NUMBER", str: "WORD"}.get(annotation, "NAME")


def _shown(parameter: Parameter) -> str:
    """Its documentation, with the default where a value is one to be told."""
    told = parameter.annotation is not bool and parameter.default not in (MISSING, "", None)
    value = getattr(parameter.default, "__name__", parameter.default)
    return f"{parameter.text} ({value})".replace("%", "%%") if told else parameter.text.replace("%", "%%")
