"""Being asked to stop: the first signal waits, the second does not, and all is left as it was found."""

from __future__ import annotations

import signal
import subprocess
import sys
import threading

import pytest

from probgen.interrupts import SIGNALS, stopping


def asked(times: int = 1, error: type[BaseException] | None = None) -> list[int]:
    """A loop of three steps, asked to stop that often in the first two; it saves, and may leave by an error."""
    steps: list[int] = []
    with stopping() as stop:
        for step in range(3):
            if step < times:
                signal.raise_signal(signal.SIGINT)
            steps.append(step)
            stop.message = f"Saved after {steps}."
        if error is not None:
            raise error
    return steps


def test_ctrl_c_waits_for_the_end_of_the_block_and_carries_the_message() -> None:
    before = [signal.getsignal(number) for number in SIGNALS]
    with pytest.raises(KeyboardInterrupt, match=r"Saved after \[0, 1, 2\]"):
        asked()
    assert [signal.getsignal(number) for number in SIGNALS] == before


def test_a_loop_may_leave_by_an_interrupt_of_its_own() -> None:
    with pytest.raises(KeyboardInterrupt, match="Saved"):
        asked(error=KeyboardInterrupt)


def test_a_second_ctrl_c_acts_at_once() -> None:
    with pytest.raises(KeyboardInterrupt, match=r"Saved after \[0\]"):
        asked(times=2)


def test_an_error_goes_first() -> None:
    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(ZeroDivisionError):
        asked(error=ZeroDivisionError)
    assert signal.getsignal(signal.SIGINT) is before


def test_nothing_asked_nothing_raised() -> None:
    with stopping() as stop:
        pass
    assert not stop.requested


def test_blocks_within_blocks() -> None:
    with pytest.raises(KeyboardInterrupt, match="Saved"), stopping():
        asked()


def test_outside_of_the_main_thread_nothing_is_touched() -> None:
    handlers = []

    def work() -> None:
        with stopping() as stop:
            handlers.append(signal.getsignal(signal.SIGINT))
            assert not stop.requested

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert handlers == [signal.getsignal(signal.SIGINT)]


def test_signals_that_were_ignored_still_are() -> None:
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with stopping() as stop:
            signal.raise_signal(signal.SIGINT)
        assert not stop.requested
    finally:
        signal.signal(signal.SIGINT, before)


@pytest.mark.parametrize(
    ("name", "status", "said"),
    [("SIGTERM", -signal.SIGTERM, "Saved.\n"), ("SIGINT", -signal.SIGINT, "KeyboardInterrupt: Saved.\n")],
)
def test_the_process_ends_as_it_would_have_and_says_what_was_saved(name: str, status: int, said: str) -> None:
    code = f"""
import signal
from probgen.interrupts import stopping
with stopping() as stop:
    signal.raise_signal(signal.{name})
    print("finished the step", flush=True)
    stop.message = "Saved."
print("never here")
"""
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert ended.returncode == status
    assert ended.stdout == "finished the step\n"
    assert ended.stderr.endswith(said)
