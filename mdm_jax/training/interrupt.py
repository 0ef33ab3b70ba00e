"""Ctrl-C and SIGTERM as a request to stop at the next safe point."""

import signal
import sys
import threading
import types


class Interrupted(Exception):
    """Raised by :meth:`Interrupt.check` where work in progress can be thrown away."""


class Interrupt:
    """Context manager that turns the first SIGINT or SIGTERM into a flag.

    The second SIGINT raises KeyboardInterrupt at once. Previous handlers come back on exit.
    """

    def __init__(self):
        self.requested = False
        self._previous: dict[int, object] = {}

    def check(self, *_: object) -> None:
        """Raises Interrupted if a stop was asked for; fits any progress callback."""
        if self.requested:
            raise Interrupted

    def __enter__(self) -> "Interrupt":
        if threading.current_thread() is not threading.main_thread():
            return self  # only the main thread may install handlers
        for number in (signal.SIGINT, signal.SIGTERM):
            self._previous[number] = signal.signal(number, self._handle)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _handle(self, number: int, _frame: types.FrameType | None) -> None:
        if self.requested and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.requested = True
        print("\nstopping after this step; once more to stop without saving", file=sys.stderr)
