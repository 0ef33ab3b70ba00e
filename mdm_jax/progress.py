"""Progress for people: a bar on a terminal, plain lines at sane intervals elsewhere."""

import sys
import time
from typing import Any, Self, TextIO

LINE_SECONDS = 30
"""Between two lines of :class:`Lines`; the last one comes when all is done."""


class Progress:
    """Progress of training: a bar on a terminal (standard error), plain lines elsewhere."""

    def __init__(
        self, total: int, start: int = 0, stream: TextIO | None = None, silent: bool = False
    ):
        import tqdm  # so that a training step can be imported without it

        self._stream = stream or sys.stderr
        self._total = total
        self._interval = tqdm.tqdm.format_interval
        self._silent = silent
        self._bar = (
            tqdm.tqdm(
                total=total,
                initial=start,
                file=self._stream,
                unit="step",
                dynamic_ncols=True,
                smoothing=0.1,
            )
            if self._stream.isatty() and not silent
            else None
        )

    def advance(self, step: int, values: dict[str, str], seconds_per_step: float) -> None:
        """Show that ``step`` steps are done."""
        if self._silent:
            return
        text = " ".join(f"{name} {value}" for name, value in values.items())
        if self._bar is not None:
            self._bar.set_postfix_str(text, refresh=False)
            self._bar.update(step - self._bar.n)
            return
        left = self._interval((self._total - step) * seconds_per_step)
        print(f"step {step}/{self._total} {text} left {left}", file=self._stream, flush=True)

    def note(self, text: str) -> None:
        """Print a line without breaking the bar."""
        if self._bar is not None:
            self._bar.write(text, file=self._stream)
        elif not self._silent:
            print(text, file=self._stream, flush=True)

    def close(self) -> None:
        if self._bar is not None:
            self._bar.close()


def progress_bar(
    total: int | None,
    description: str = "",
    unit: str = "steps",
    *,
    initial: int = 0,
    silent: bool = False,
    leave: bool = True,
) -> Any:
    """A ``tqdm`` bar on a terminal, else :class:`Lines`: a context manager with ``update(n)``."""
    import tqdm

    if not silent and not sys.stderr.isatty():
        return Lines(total, description, unit, initial)
    return tqdm.tqdm(
        total=total, desc=description, unit=unit, initial=initial, disable=silent, leave=leave
    )


class Lines:
    """What of tqdm's bar is used here, as whole lines on ``stream``, for logs and pipes.

    A line every :data:`LINE_SECONDS`, and one when all is done.
    """

    def __init__(
        self,
        total: int | None,
        description: str = "",
        unit: str = "steps",
        initial: int = 0,
        stream: TextIO | None = None,
    ):
        self.n, self.total = initial, total
        self._description, self._unit, self._postfix = description, unit, ""
        self._stream = stream or sys.stderr
        self._started = self._shown = time.monotonic()
        self._last = None

    def update(self, count: int = 1) -> None:
        """``count`` more are done."""
        self.n += count
        now = time.monotonic()
        if self.n == self.total or now >= self._shown + LINE_SECONDS:
            self._shown = now
            self._print()

    def set_description(self, text: str) -> None:
        self._description = text

    def set_postfix_str(self, text: str) -> None:
        self._postfix = text

    def write(self, text: str, file: TextIO | None = None) -> None:
        print(text, file=file or self._stream, flush=True)

    def close(self) -> None:
        if self.n and self._last != self.n:
            self._print()

    def _print(self) -> None:
        self._last = self.n
        seconds = time.monotonic() - self._started
        done = f"{self.n}" if self.total is None else f"{self.n}/{self.total}"
        parts = [f"{self._description}:" * bool(self._description), done, self._unit]
        parts += [f"in {seconds:.0f} s", self._postfix]
        print(" ".join(filter(None, parts)), file=self._stream, flush=True)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
