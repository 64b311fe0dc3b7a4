"""Bad input: whatever is given to whatever is public, it works or is refused by one error that says what was wrong.

What is tried and when a refusal is a good one is told in `bad_input_tools`. Every callable, parameter and bad value is
tried by the slow test; the others try a sample of them, and values that hypothesis makes up.
"""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import bad_input_tools
from bad_input_tools import Subject, attempt, bad_values, is_finite, public, short, spoiled, subjects
from probgen.core import InputError

SUBJECTS = subjects()
SAMPLED = settings(
    max_examples=100,
    derandomize=True,
    database=None,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
PLACES = [(name, parameter) for name, subject in SUBJECTS.items() for parameter in subject.parameters()]
SMALL = st.integers(0, 3)
TENSORS = st.builds(
    lambda shape, dtype, value: torch.full(tuple(shape), value).to(dtype),
    st.lists(SMALL, max_size=3),
    st.sampled_from([torch.float32, torch.float64, torch.int64, torch.bool, torch.complex64]),
    st.floats(width=32),
)
ANYTHING = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(max_size=5)
    | st.binary(max_size=5)
    | TENSORS,
    lambda parts: st.lists(parts, max_size=3) | st.dictionaries(st.text(max_size=3), parts, max_size=2),
    max_leaves=4,
)


@pytest.fixture(autouse=True)
def _in_a_folder_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def judged(name: str, parameter: str, value: Any) -> None:
    verdict = attempt(SUBJECTS[name], parameter, value)
    assert verdict, f"{name}({parameter}={short(value)}): {verdict.kind}: {verdict.words}"


def test_everything_public_is_tried() -> None:
    """A new engine is by being there; what else is public needs a line in `WORKING`."""
    assert set(public()) == set(SUBJECTS)


@SAMPLED
@given(st.sampled_from(PLACES), st.data())
def test_bad_values(place: tuple[str, str], data: st.DataObject) -> None:
    name, parameter = place
    values = bad_values() + spoiled(SUBJECTS[name].working().get(parameter))
    judged(name, parameter, values[data.draw(st.integers(0, len(values) - 1))])


@SAMPLED
@given(st.sampled_from(PLACES), ANYTHING)
def test_anything_at_all(place: tuple[str, str], value: Any) -> None:
    judged(*place, value)


@pytest.mark.slow
@pytest.mark.parametrize("name", SUBJECTS)
def test_the_whole_matrix(name: str) -> None:
    subject, wrong = SUBJECTS[name], []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of so little work
        assert is_finite(subject.use(subject.call(**subject.working()))), (
            "what it is tried with does not work"
        )
    for parameter in subject.parameters():
        for value in bad_values() + spoiled(subject.working().get(parameter)):
            verdict = attempt(subject, parameter, value)
            if not verdict:
                wrong.append(f"{parameter}={short(value)}: {verdict.kind}: {verdict.words}")
    assert not wrong, "\n".join(wrong)


# --- the judge is judged --------------------------------------------------------------------------------------------


def careless(rate: float) -> float:
    """Takes a string, and divides by zero."""
    return 1.0 if isinstance(rate, str) else 1 / rate


def hasty(rate: float) -> float:
    """Refuses without a word of what was wrong."""
    if not isinstance(rate, float) or not 0 < rate < 1:
        raise InputError("Bad settings.")
    return rate


def endless(rate: float) -> float:
    """Never comes back from what it does not expect."""
    while rate != 0.5:
        pass
    return rate


def overflowing(rate: float) -> float:
    """Gives infinity without a word."""
    if isinstance(rate, bool) or not isinstance(rate, float | int):
        raise InputError(f"rate must be a number, got {rate!r}.")
    return rate * 1e300


def careful(rate: float) -> float:
    """As it should be."""
    if isinstance(rate, bool) or not isinstance(rate, float | int) or not 0 < rate < 1:
        raise InputError(f"rate must be a number in (0, 1), got {rate!r}.")
    return rate


@pytest.mark.parametrize(
    ("call", "value", "kind"),
    [
        (careless, 0.0, "foreign"),
        (careless, "x", "nonsense"),
        (hasty, "x", "vague"),
        (endless, 0.25, "slow"),
        (overflowing, 1e30, "not finite"),
        (careful, 1e30, "refused"),
        (careful, 0.25, "accepted"),
    ],
)
def test_the_judge(monkeypatch: pytest.MonkeyPatch, call: Any, value: Any, kind: str) -> None:
    """A function that is bad on purpose is caught, for what is bad about it; a good one is not."""
    monkeypatch.setattr(bad_input_tools, "WORKING_SECONDS", 0.2)
    subject = Subject(call.__name__, call, lambda: {"rate": 0.5}, lambda result: result)
    assert attempt(subject, "rate", value).kind == kind
