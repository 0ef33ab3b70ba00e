"""Ctrl-C and SIGTERM as a request to stop at the next safe point."""

import os
import signal
import threading
import types

import jax

from mdm_jax import distributed


class Interrupted(Exception):
    """Raised by :meth:`Interrupt.check` where work in progress can be discarded."""


class Interrupt:
    """Context manager that turns the first SIGINT or SIGTERM into a flag; reentrant.

    A second SIGINT raises KeyboardInterrupt. With several processes a signal to any stops all,
    where they :meth:`agree`; ``requested`` is that of this process alone.
    """

    def __init__(self):
        self.requested = False
        self._agreed = False
        self._depth = 0
        self._previous: dict[int, object] = {}

    @property
    def stopping(self) -> bool:
        """Whether all processes are to stop, as last agreed."""
        return self.requested if jax.process_count() == 1 else self._agreed

    def agree(self) -> None:
        """Share requests between processes; all call it at the same point."""
        self._agreed = self._agreed or distributed.any_of(self.requested)

    def check(self, *_: object) -> None:
        """Agree, and raise Interrupted if a stop was requested; usable as a progress callback."""
        self.agree()
        if self.stopping:
            raise Interrupted

    def __enter__(self) -> "Interrupt":
        self._depth += 1
        # Only the main thread may install handlers.
        if self._depth == 1 and threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                self._previous[number] = signal.signal(number, self._handle)
        return self

    def __exit__(self, *_: object) -> None:
        self._depth -= 1
        while self._depth == 0 and self._previous:
            signal.signal(*self._previous.popitem())

    def _handle(self, number: int, _frame: types.FrameType | None) -> None:
        if self.requested and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.requested = True
        # Not print: the signal may have come in the middle of one.
        os.write(2, b"\nstopping after this step; once more to stop without saving\n")
