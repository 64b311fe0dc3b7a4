"""Being asked to stop: Ctrl-C and SIGTERM as a flag that long loops look at between two steps."""

from __future__ import annotations

import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import FrameType
from typing import Any

SIGNALS = (signal.SIGINT, signal.SIGTERM)


@dataclass
class Stop:
    """Whether the process was asked to stop, by which signal, and what to say about it.

    Args:
        signal: the signal that came, None as long as none did.
        message: what was saved and how to go on; set by the loop that stops.
    """

    signal: signal.Signals | None = None
    message: str = ""

    @property
    def requested(self) -> bool:
        """Whether to finish the step at hand, save, and leave the block."""
        return self.signal is not None


@contextmanager
def stopping() -> Iterator[Stop]:
    """Turn the first Ctrl-C or SIGTERM into a flag: `with stopping() as stop: ... if stop.requested: ...`.

    The loop saves, sets `stop.message` and leaves the block, at its end or by a KeyboardInterrupt of its own. Handlers
    are then as they were, and the signal takes its course: Ctrl-C is a KeyboardInterrupt with the message, SIGTERM
    prints the message to stderr and ends the process, as it would have at once. Other errors in the block go first.

    A second signal acts at once. Outside of the main thread, where Python hands out no signals, the flag is never set;
    signals that were ignored before still are.

    >>> try:
    ...     with stopping() as stop:
    ...         signal.raise_signal(signal.SIGINT)
    ...         stop.message = f"Saved. {stop.requested}"
    ... except KeyboardInterrupt as interrupt:
    ...     print(interrupt)
    Saved. True
    """
    stop = Stop()
    before: dict[signal.Signals, Any] = {}

    def restore() -> None:
        for number, handler in before.items():
            signal.signal(number, handler)

    def note(number: int, _frame: FrameType | None) -> None:
        if stop.requested:
            restore()
            signal.raise_signal(number)
        stop.signal = signal.Signals(number)

    if threading.current_thread() is threading.main_thread():
        for number in SIGNALS:
            handler = signal.getsignal(number)
            if handler not in (signal.SIG_IGN, None):  # None: set by C code, which could not be restored
                before[number] = signal.signal(number, note)
    try:
        yield stop
    except KeyboardInterrupt:
        restore()
        _take_course(stop)
        raise
    finally:
        restore()
    _take_course(stop)


def _take_course(stop: Stop) -> None:
    if stop.signal is signal.SIGTERM:
        sys.stderr.write(f"{stop.message}\n" if stop.message else "")
        sys.stderr.flush()
        signal.raise_signal(signal.SIGTERM)  # returns where somebody else handles it
    if stop.requested:
        raise KeyboardInterrupt(stop.message) from None
